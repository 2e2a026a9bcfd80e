"""The shifts of real images, their commands, and the look at gradients."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.shifts import commands
from experiments.shifts.commands import (
    choose,
    evenly,
    format_shifts,
    summarize,
    summarize_trials,
)
from experiments.shifts.config import (
    IMAGES,
    IMAGES_CHOOSE_PRESETS,
    IMAGES_PRESETS,
    ImagesConfig,
    ImagesSettings,
)
from experiments.shifts.image_data import CHANNELS, make_data, rotate
from experiments.shifts.look import of_layer
from experiments.vision.data import MNIST_MD5, DataError
from tests.experiments.conftest import only_error, read_csv, shifts

SETTINGS = ImagesSettings(
    dataset="generated", num_envs=4, examples_per_env=40, test_examples=50
)


@pytest.fixture(scope="module")
def drawn():
    return {problem: make_data(0, problem, SETTINGS) for problem in IMAGES}


def test_make_data_has_the_same_training_shapes_for_all_shifts(drawn):
    for data in drawn.values():
        assert data.train.features.shape == (4, 40, 4, 4, CHANNELS)
        assert data.train.labels.shape == (4, 40)
        assert data.held_out.features.shape == (2, 40, 4, 4, CHANNELS)
        assert data.test.features.shape[1:] == (50, 4, 4, CHANNELS)
        for leaf in jax.tree.leaves(data):
            assert leaf.dtype == np.float32
            assert leaf.min() >= 0
            assert leaf.max() <= 1


@pytest.mark.parametrize("problem", IMAGES)
def test_make_data_is_a_function_of_the_seed(drawn, problem):
    again = make_data(0, problem, SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, again, drawn[problem])
    other = make_data(1, problem, SETTINGS)
    assert not np.array_equal(other.train.features, again.train.features)


def test_own_shortcut_paints_by_label_and_environment(drawn):
    data = drawn["own_shortcut"]
    patterns = []
    for features, labels in zip(*data.train, strict=True):
        for label in (0, 1):
            painted = features[labels == label]
            patterns.append((painted[..., 1] == 1).all(axis=0))
            untouched = ~patterns[-1]
            gray = painted[:, untouched]
            np.testing.assert_array_equal(gray[..., 0], gray[..., 1])
    assert len({pattern.tobytes() for pattern in patterns}) > len(patterns) / 2
    none, *fresh = data.test.features
    np.testing.assert_array_equal(none[..., 0], none[..., 1])
    assert all(np.any(own[..., 0] != own[..., 1]) for own in fresh)


def test_coloured_labels_agree_in_every_environment_and_turn_around_in_the_test():
    settings = dataclasses.replace(SETTINGS, num_envs=2, examples_per_env=80)
    data = make_data(0, "coloured_labels", settings)

    def agreement(envs):
        colours = envs.features[..., 1].sum(axis=(2, 3)) > 0
        one = envs.features.sum(axis=(2, 3)) > 0
        assert np.all(one.sum(axis=-1) <= 1)
        return np.mean(colours == (envs.labels > 0.5), axis=1)

    assert np.all(agreement(data.train) > 0.65)
    assert np.all(agreement(data.held_out) > 0.65)
    assert np.all(agreement(data.test) < 0.35)


def test_rotate_by_a_right_angle_is_a_quarter_turn():
    images = np.random.default_rng(0).uniform(size=(2, 5, 5)).astype(np.float32)
    turned = rotate(images, 90.0)
    quarter = [np.rot90(images, k, axes=(1, 2)) for k in (1, -1)]
    assert min(np.abs(turned - one).max() for one in quarter) < 1e-5
    np.testing.assert_allclose(rotate(images, 0.0), images, atol=1e-6)


def test_rotated_leaves_the_test_angle_out(drawn):
    envs = drawn["rotated"]
    np.testing.assert_array_equal(envs.train.features[0, ..., 0] >= 0, True)
    plain = drawn["own_shortcut"].train.features[0, ..., 0]
    np.testing.assert_allclose(envs.train.features[0, ..., 0], plain, atol=1e-6)


def test_mixed_labels_differ_in_noise_alone(drawn):
    clean = drawn["own_shortcut"].train.labels
    noisy = drawn["mixed_labels"].train.labels
    shares = np.mean(clean != noisy, axis=1)
    assert shares[0] == 0
    assert shares[-1] > 0.2
    np.testing.assert_array_equal(
        drawn["mixed_labels"].test.labels[0], drawn["own_shortcut"].test.labels[0]
    )


def test_mnist_is_looked_for_in_the_folder_given(tmp_path):
    settings = dataclasses.replace(SETTINGS, dataset="mnist")
    with pytest.raises(DataError, match=r"train-images.*give a folder with its four"):
        make_data(0, "rotated", settings, tmp_path)
    assert len(MNIST_MD5) == 4


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    path = tmp_path_factory.mktemp("choose") / "run"
    assert shifts("images-choose", "--preset", "smoke", "--out", path) == 0
    return path


@pytest.fixture(scope="module")
def run(chosen, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "run"
    assert shifts(*smoke(chosen), "--out", path) == 0
    return path


def smoke(chosen):
    return "images", "--preset", "smoke", "--chosen", chosen / "chosen.json"


def test_images_choose_smoke_writes_a_setting_for_each_method_and_shift(chosen):
    found = json.loads((chosen / "chosen.json").read_text())
    names = IMAGES_CHOOSE_PRESETS["smoke"].problems
    assert list(found) == [f"averaging-{problem}" for problem in names]
    for setting in found.values():
        assert setting["learning_rate"] in (0.01, 0.03)
        assert setting["oracle"]["learning_rate"] in (0.01, 0.03)
    trials = read_csv(chosen / "trials.csv")
    assert len(trials) == 4
    assert {"problem", "held_out_share", "test_mean"} <= trials[0].keys()


def test_images_smoke_reports_every_environment_seed_and_the_oracles_choice(run):
    rows = read_csv(run / "results.csv")
    config = IMAGES_PRESETS["smoke"]
    assert list(rows[0]) == ["problem", "num_envs", "method", "seed", "split", "error"]
    own = [row for row in rows if row["problem"] == "own_shortcut"]
    splits = {row["split"] for row in own}
    assert {"train_0", "train_1", "held_out_1", "test_0", "test_3"} <= splits
    assert {"test_mean", "test_worst", "oracle_test_mean"} <= splits
    seeds = [row["seed"] for row in own if row["split"] == "oracle_test_mean"]
    assert seeds == ["0", "1"]
    once = [row for row in own if row["split"] == "test_mean"]
    assert len(once) == config.seeds[1] + 1
    table = json.loads((run / "summary.json").read_text())["results"]
    assert all("oracle_chosen" in row for row in table)
    assert (run / "images.png").stat().st_size > 10_000


def test_images_goes_on_with_the_runs_that_are_missing(run, chosen, tmp_path):
    expected = (run / "results.csv").read_bytes()
    out, calls, train = tmp_path / "run", [], commands.TRAIN["images"]

    def stop_in_the_second_run(config, seed):
        calls.append((config.problem, seed))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(config, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(commands.TRAIN, "images", stop_in_the_second_run)
        assert shifts(*smoke(chosen), "--out", out) == 130
        assert not (out / "results.csv").exists()
        before = len(calls)
        assert shifts(*smoke(chosen), "--out", out) == 0
    assert {problem for problem, _ in calls[before:]} == {"coloured_labels"}
    assert (out / "results.csv").read_bytes() == expected


def test_images_draws_its_figure_again(run, tmp_path):
    assert shifts("images", "--from", run, "--out", tmp_path) == 0
    found = (tmp_path / "images.png").read_bytes()
    assert found == (run / "images.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-envs", "1"), "num_envs must be at least 2, got 1"),
        (("--batch-size", "99"), "batch_size must be at most examples_per_env (16)"),
        (("--methods", "oracle"), "without oracle, which linear alone has"),
        (("--chosen", "nowhere.json"), "make it with images-choose"),
        (("--dataset", "cifar10"), "dataset must be one of fashion_mnist, mnist"),
    ],
)
def test_images_refuses_wrong_input_in_one_line(arguments, message, tmp_path, capsys):
    out = tmp_path / "run"
    command = ("images", "--preset", "smoke", *arguments, "--out", out)
    assert shifts(*command) == 2
    error = only_error(capsys.readouterr().err)
    assert message in error
    assert not out.exists()


def test_images_look_smoke_shows_each_layer_twice(tmp_path, capsys):
    command = ("images-look", "--preset", "smoke", "--problems", "own_shortcut")
    assert shifts(*command, "--out", tmp_path / "look") == 0
    rows = read_csv(tmp_path / "look" / "look.csv")
    assert [row["layer"] for row in rows] == ["conv1", "conv2", "head"] * 2
    assert [row["epochs"] for row in rows] == ["0"] * 3 + ["1"] * 3
    assert "spectrum_1" in rows[0]
    assert "conv2" in capsys.readouterr().out


def test_of_layer_tells_agreement_from_none():
    found = of_layer(jnp.array([[1.0, 2.0, 0.0], [1.0, -2.0, 0.0]]))
    # One weight of three is unanimous with a gradient that is not 0.
    assert found["shared"] == pytest.approx(0.2)
    assert found["common"] == pytest.approx(1.0)
    assert (found["directions"], found["unanimous"]) == (1, 0)
    assert found["spectrum_0"] == pytest.approx(1.0)
    same = of_layer(jnp.array([[1.0, -2.0], [1.0, -2.0]]))
    assert (same["shared"], same["directions"], same["kept"]) == (1.0, 0, 1.0)


def test_choose_by_problem_has_a_choice_for_each_and_the_oracles_beside():
    rows = [
        {
            "method": "irm",
            "problem": problem,
            "learning_rate": rate,
            "number": 1.0,
            "split": split,
            "error": error,
        }
        for problem, rate, share, test in (
            ("rotated", 0.1, 0.2, 0.9),
            ("rotated", 0.3, 0.4, 0.1),
            ("mixed_labels", 0.1, 0.5, float("nan")),
            ("mixed_labels", 0.3, 0.3, 0.2),
        )
        for split, error in (("held_out_share", share), ("test_mean", test))
    ]
    found = choose(summarize_trials(rows, by_problem=True))
    assert found["irm-rotated"]["learning_rate"] == 0.1
    assert found["irm-rotated"]["oracle"]["learning_rate"] == 0.3
    assert found["irm-mixed_labels"]["oracle"]["test_mean"] == 0.2


def test_summarize_shows_the_oracles_choice_where_there_is_one():
    rows = [
        {
            "problem": "rotated",
            "num_envs": 8,
            "method": "irm",
            "seed": seed,
            "split": split,
            "error": error,
        }
        for seed in (0, 1)
        for split, error in (
            ("test_mean", 0.4),
            ("test_worst", 0.5),
            ("oracle_test_mean", 0.2 + 0.1 * seed),
        )
    ]
    [row] = summarize(rows)
    assert row["oracle_chosen"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("values", "most", "expected"),
    [
        ((1.0, 2.0, 3.0, 4.0, 5.0), 3, (1.0, 3.0, 5.0)),
        ((1.0, 2.0), 3, (1.0, 2.0)),
        ((1.0, 2.0), 1, (1.0,)),
        ((1.0, 2.0), None, (1.0, 2.0)),
    ],
)
def test_evenly_picks_from_the_first_to_the_last(values, most, expected):
    assert evenly(values, most) == expected


def test_preset_cpu_is_the_default():
    assert ImagesConfig() == IMAGES_PRESETS["cpu"]


def test_format_shifts_has_a_line_for_each_method_and_a_column_for_each_problem():
    row = {"method": "irm", "error": 0.25, "low": 0.2, "high": 0.3}
    table = [
        {**row, "problem": problem, "oracle_chosen": 0.125}
        for problem in ("rotated", "mixed_labels")
    ]
    title, _, line = format_shifts(table).splitlines()
    assert title == "| method | rotated | mixed labels |"
    cell = "0.250 (0.200 to 0.300)"
    assert line == f"| IRM | {cell} | {cell} |"
    last = format_shifts(table, "oracle_chosen").splitlines()[-1]
    assert last == "| IRM | 0.125 | 0.125 |"
