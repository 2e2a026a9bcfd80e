"""CoinRun's levels as environments: data, batches, training and the commands."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.coinrun import dataset as coinrun
from experiments.coinrun.dataset import generate
from experiments.coinrun.game import NUM_ACTIONS
from experiments.coinrun.student.config import DATASET_PRESETS
from experiments.coinrun.student.resnet import (
    Architecture,
    Variables,
    init_variables,
    make_apply,
    make_train_apply,
)
from experiments.coinrun.student.training import constant_kl, kl_divergence
from experiments.common.settings import fields_of
from experiments.shifts import commands
from experiments.shifts.levels import (
    IMITATION,
    data_for,
    draw_batches,
    make_loop,
)
from experiments.shifts.levels_config import (
    LEVELS_CHOOSE_PRESETS,
    LEVELS_PRESETS,
    LevelsSettings,
)
from experiments.shifts.methods import Setting
from tests.experiments.conftest import only_error, read_csv, shifts

SMOKE = LEVELS_PRESETS["smoke"]
GENERATED = DATASET_PRESETS["smoke"]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    path = tmp_path_factory.mktemp("choose") / "run"
    assert shifts("levels-choose", "--preset", "smoke", "--out", path) == 0
    return path


@pytest.fixture(scope="module")
def compared(chosen, tmp_path_factory):
    path = tmp_path_factory.mktemp("levels") / "run"
    assert shifts(*smoke(chosen), "--out", path) == 0
    return path


def smoke(chosen):
    return "levels", "--preset", "smoke", "--chosen", chosen / "chosen.json"


def test_levels_choose_smoke_tries_the_thresholds_of_its_config(chosen):
    config = LEVELS_CHOOSE_PRESETS["smoke"]
    trials = read_csv(chosen / "trials.csv")
    assert [float(row["number"]) for row in trials] == list(config.thresholds)
    [setting] = json.loads((chosen / "chosen.json").read_text()).values()
    assert setting["number"] in config.thresholds
    assert 0 <= setting["held_out_share"] <= 1


def test_levels_smoke_reports_every_level_and_seed(compared):
    rows = read_csv(compared / "results.csv")
    assert list(rows[0]) == ["problem", "num_envs", "method", "seed", "split", "error"]
    assert {row["seed"] for row in rows} == {"0", "1"}
    splits = {row["split"] for row in rows}
    training = GENERATED.levels - SMOKE.held_out_levels
    assert {f"train_{level}" for level in range(training)} <= splits
    assert {"held_out_0", "held_out_1", "test_0", "held_out_share"} <= splits
    assert f"train_{training}" not in splits
    assert all(float(row["error"]) >= 0 for row in rows)
    assert (compared / "levels.png").stat().st_size > 10_000
    assert len(read_csv(compared / "levels.csv")) == 1


def test_levels_goes_on_with_the_runs_that_are_missing(compared, chosen, tmp_path):
    out = tmp_path / "run"
    seeds, train = [], commands.TRAIN["levels"]

    def stop_in_the_second_run(run, seed, data_dir):
        seeds.append(seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return train(run, seed, data_dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(commands.TRAIN, "levels", stop_in_the_second_run)
        assert shifts(*smoke(chosen), "--out", out) == 130
        assert shifts(*smoke(chosen), "--out", out) == 0
    assert seeds == [0, 1, 1]
    expected = (compared / "results.csv").read_bytes()
    assert (out / "results.csv").read_bytes() == expected


def test_levels_refuses_a_directory_of_other_data(compared, chosen, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coinrun, "load", lambda *_: (generate(GENERATED), "another"))
        assert shifts(*smoke(chosen), "--out", compared) == 2
    assert "data_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-envs", "3"), "a multiple of each of num_envs, also of 3, got 4"),
        (("--methods", "oracle"), "without oracle, which linear alone has"),
        (("--held-out-levels", "7"), "must be at most the 8 training levels"),
        (("--states-per-step", "34"), "at most 32 with 2 levels of 16 states, got 34"),
        (("--evaluated-states", "17"), "at most the 16 states that a level"),
        (
            ("--dataset", "coinrun", "--data", "nowhere"),
            "holds no complete dataset: make one",
        ),
        (("--data", "nowhere"), "--data is not read: the dataset 'generated'"),
        (("--chosen", "nowhere.json"), "make it with levels-choose"),
    ],
)
def test_levels_refuses_wrong_input_in_one_line(
    arguments, message, chosen, tmp_path, capsys
):
    out = tmp_path / "run"
    assert shifts(*smoke(chosen), *arguments, "--out", out) == 2
    error = only_error(capsys.readouterr().err)
    assert message in error
    assert not out.exists()


def test_data_for_holds_out_other_levels_with_another_seed(tmp_path):
    everything = generate(GENERATED).train.images
    held_out = []
    for seed in (0, 1, 0):
        data = data_for(SMOKE, seed, tmp_path)
        parts = data.train.features, data.held_out.features
        assert [len(part) for part in parts] == [6, 2]
        both = {level.tobytes() for part in parts for level in part}
        assert both == {level.tobytes() for level in everything}
        assert data.test.labels.shape == (1, GENERATED.test_levels, NUM_ACTIONS)
        held_out.append(parts[1])
    assert not np.array_equal(held_out[0], held_out[1])
    np.testing.assert_array_equal(held_out[0], held_out[2])


@pytest.mark.parametrize(("levels", "in_a_pass"), [(6, 3), (7, 3)])
def test_draw_batches_takes_different_levels_and_states(levels, in_a_pass):
    taken, rows = draw_batches(jax.random.key(0), 7, 2, 3, levels, 5)
    assert taken.shape == (7, 2)
    assert rows.shape == (7, 2, 3)
    for first in (0, in_a_pass):
        own = np.ravel(taken[first : first + in_a_pass])
        assert len(set(own.tolist())) == 2 * in_a_pass
        assert own.max() < levels
    assert all(len(set(row)) == 3 for row in rows.reshape(-1, 3).tolist())
    assert not np.array_equal(taken[:in_a_pass], taken[in_a_pass : 2 * in_a_pass])


def test_training_reports_kl_by_the_mean_statistics_of_the_training_levels(tmp_path):
    settings = LevelsSettings(**fields_of(SMOKE, LevelsSettings))
    loop = make_loop(settings, "and_mask", 2)
    data = jax.tree.map(jnp.asarray, data_for(settings, 0, tmp_path))
    setting = Setting(jnp.float32(0.01), jnp.float32(0.5))
    key = jax.random.key(0)
    state, found = loop.run(loop.init(key, setting), data, key, 0, setting)

    architecture = Architecture(
        settings.width, settings.blocks, NUM_ACTIONS, momentum=0.0
    )
    train_apply = jax.jit(make_train_apply(architecture))
    apply = jax.jit(make_apply(architecture))
    params, seen = state.params, settings.evaluated_states
    # Any statistics: with a momentum of 0 nothing is left of them.
    some = init_variables(key, architecture).batch_stats
    each = [
        train_apply(Variables(params, some), images[:seen])[1]
        for images in data.train.features
    ]
    mean = jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *each)
    for name, levels in (("train", data.train), ("held_out", data.held_out)):
        images, labels = (leaf[1] for leaf in levels)
        if name == "train":
            images, labels = images[:seen], labels[:seen]
        logits = apply(Variables(params, mean), images)
        expected = kl_divergence(labels, logits).mean()
        np.testing.assert_allclose(found[name][1], expected, rtol=1e-4)


def test_imitation_is_judged_by_kl_and_its_slope_along_the_scale_of_logits():
    logits = jnp.array([[0.3, -1.2, 2.0], [0.1, 0.5, -0.7]])
    targets = jnp.array([[0.2, 0.2, 0.6], [0.0, 0.9, 0.1]])
    expected = np.mean(kl_divergence(targets, logits))
    for found in (IMITATION.loss, IMITATION.error):
        np.testing.assert_allclose(found(logits, targets), expected, rtol=1e-6)
    slope = jax.grad(lambda s: IMITATION.loss(s * logits, targets))(jnp.float32(1.0))
    np.testing.assert_allclose(
        IMITATION.penalty(logits, targets), jnp.square(slope), rtol=1e-5
    )
    assert IMITATION.baseline(targets) == constant_kl(targets)
