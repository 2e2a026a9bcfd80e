"""`figure 6|7|14|15`: from training to CSV and PNG, and back from the CSV."""

import json
import shutil

import pytest
from matplotlib.image import imread

from experiments.common.cli import main
from experiments.common.figures import read_table
from experiments.common.run_dir import RunDir, RunDirError
from experiments.synthetic import commands
from experiments.synthetic.__main__ import COMMANDS
from experiments.synthetic.commands import (
    DRAWINGS,
    Outcome,
    learning_curves,
    selected_settings,
)
from experiments.synthetic.config import (
    ENVS_PRESETS,
    METHODS,
    PRESETS,
    SELECTED_PRESETS,
    EnvsConfig,
    SelectedConfig,
    TrainConfig,
)
from experiments.synthetic.figures import draw_accuracies, draw_envs
from tests.experiments.conftest import read_csv

TINY = ("--preset", "smoke")


def figure(*arguments):
    command = ["figure", *map(str, arguments)]
    return main("python -m experiments.synthetic", COMMANDS, command)


def assert_redraws_to_the_same_bytes(number, path, out):
    assert figure(number, "--from", path, "--out", out) == 0
    name = f"figure{number}.png"
    assert (out / name).read_bytes() == (path / name).read_bytes()
    assert [p.name for p in out.iterdir()] == [name]


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """Directory of `figure 6` with two methods."""
    path = tmp_path_factory.mktemp("selected") / "run"
    arguments = ("--methods", "erm", "and_mask", "--many", "and_mask")
    code = figure(6, *TINY, *arguments, "--many-seeds", 0, 2, "--out", path)
    assert code == 0
    return path


def test_figure_6_has_every_method_and_seed(selected, tmp_path):
    rows = read_csv(selected / "figure6.csv")
    found = [(row["method"], int(row["seed"])) for row in rows]
    assert found == [
        *(("erm", s) for s in (0, 1)),
        *(("and_mask", s) for s in (0, 1, 2)),
    ]
    for row in rows:
        run = selected / f"{row['method']}-seed{row['seed']}"
        summary = json.loads((run / "summary.json").read_text())
        assert float(row["test_accuracy"]) == summary["test_accuracy"]
    assert json.loads((selected / "summary.json").read_text())["erm"]["seeds"] == 2
    assert_redraws_to_the_same_bytes(6, selected, tmp_path)


def test_figure_14_comes_with_the_same_runs(selected, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in selected.rglob("*")}
    arguments = ("--methods", "erm", "and_mask", "--many", "and_mask")
    many = ("--many-seeds", 0, 2)
    assert figure(14, *TINY, *arguments, *many, "--out", selected) == 0
    assert {p: p.stat().st_mtime_ns for p in selected.rglob("*")} == before
    assert "figure14.png" in capsys.readouterr().out
    rows = read_csv(selected / "figure14.csv")
    assert len(rows) == 2 * PRESETS["smoke"]["epochs"]
    assert_redraws_to_the_same_bytes(14, selected, tmp_path)


def test_learning_curves_are_extremes_and_mean_over_seeds():
    def outcome(method, accuracies):
        history = [
            {"epoch": i + 1.0, "train_accuracy": a, "test_accuracy": a / 2}
            for i, a in enumerate(accuracies)
        ]
        return Outcome({"method": method}, history)

    rows = learning_curves([outcome("erm", [0.2, 0.4]), outcome("erm", [0.6, 0.8])])
    assert [row["epoch"] for row in rows] == [1, 2]
    first = rows[0]
    assert first["method"] == "erm"
    assert (first["train_lowest"], first["train_highest"]) == (0.2, 0.6)
    assert first["train_mean"] == pytest.approx(0.4)
    assert first["test_mean"] == pytest.approx(0.2)


def test_figure_15_trains_masks_with_every_threshold(tmp_path):
    path = tmp_path / "run"
    assert figure(15, *TINY, "--seeds", 0, 0, "--out", path) == 0
    rows = read_csv(path / "figure15.csv")
    found = [(r["method"], int(r["num_envs"]), float(r["threshold"])) for r in rows]
    assert found == [
        (method, envs, threshold)
        for envs in (2, 4)
        for method, thresholds in (("erm", (1.0,)), ("and_mask", (1.0, 0.8)))
        for threshold in thresholds
    ]
    assert_redraws_to_the_same_bytes(15, path, tmp_path / "again")


@pytest.mark.parametrize("preset", ENVS_PRESETS)
def test_envs_config_every_run_has_the_same_steps_and_examples(preset):
    config = ENVS_PRESETS[preset]
    for run in config.train_configs():
        assert run.num_envs * run.batch_size <= config.examples_per_step
        assert run.epochs * run.steps_per_epoch == config.steps
        full = run.batch_size == run.examples_per_env
        assert full or run.num_envs * run.batch_size == config.examples_per_step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"envs": (2, 2)}, "envs must be one or more different"),
        ({"envs": (0,)}, "envs must be between 1 and 2048, got 0"),
        ({"envs": (4096,)}, "envs must be between 1 and 2048, got 4096"),
        ({"thresholds": (1.5,)}, r"thresholds must be in \[0, 1\], got 1.5"),
        ({"thresholds": ()}, "thresholds must be at least one"),
        ({"methods": ("sand_mask",)}, "threshold must be below 1 for sand_mask"),
        ({"seeds": (3, 1)}, "seeds must be in ascending order"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
    ids=str,
)
def test_envs_config_refuses_what_makes_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        EnvsConfig(**settings)


def test_draw_envs_shows_the_threshold_that_is_best_on_held_out_environments():
    def row(threshold, held_out, test, seed=0):
        return {
            "method": "and_mask",
            "num_envs": 4.0,
            "threshold": threshold,
            "seed": float(seed),
            "held_out_accuracy": held_out,
            "test_accuracy": test,
        }

    rows = [row(1.0, 0.6, 0.9), row(0.8, 0.8, 0.7), row(1.0, 0.7, 0.5, seed=1)]
    [axes] = draw_envs(rows).axes
    [dots] = axes.collections
    assert sorted(dots.get_offsets()[:, 1]) == [0.5, 0.7]
    assert axes.lines[0].get_ydata() == [0.7]
    assert "every seed" in axes.get_title()
    [axes] = draw_envs(rows[:2]).axes
    assert axes.get_title() == ""


def test_draw_accuracies_bars_are_means_and_dots_are_seeds():
    rows = [
        {"method": "erm", "run": run, "seed": s, "train_accuracy": 1.0, **test}
        for run, test_accuracies in (("", (0.4, 0.6)), ("large", (0.8,)))
        for s, accuracy in enumerate(test_accuracies)
        for test in [{"test_accuracy": accuracy}]
    ]
    [axes] = draw_accuracies(rows).axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, 0.5, 1.0, 0.8]
    assert len(axes.collections[1].get_offsets()) == 2
    assert "large" in axes.get_xticklabels()[1].get_text()


def test_figure_6_shows_reruns_beside_the_methods(tmp_path):
    table, path = tmp_path / "seeds.csv", tmp_path / "run"
    table.write_text("method,seed,train_accuracy,test_accuracy\nand_mask,7,1,0.75\n")
    reruns = ("--reruns", f"large={table}")
    arguments = ("--methods", "erm", "--seeds", 0, 0, *reruns, "--out", path)
    assert figure(6, *TINY, *arguments) == 0
    rows = read_csv(path / "figure6.csv")
    assert [(row["method"], row["run"], row["seed"]) for row in rows] == [
        ("erm", "", "0"),
        ("and_mask", "large", "7"),
    ]
    assert float(rows[1]["test_accuracy"]) == 0.75
    assert rows[1]["loss"] == "nan"
    assert_redraws_to_the_same_bytes(6, path, tmp_path / "again")


def test_figure_7_needs_no_training(tmp_path):
    path = tmp_path / "run"
    assert figure(7, *TINY, "--seeds", 0, 1, "--out", path) == 0
    rows = read_csv(path / "figure7.csv")
    assert {row["mask"] for row in rows} == {"and", "xor"}
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert imread(path / "figure7.png").shape[0] > 500
    assert_redraws_to_the_same_bytes(7, path, tmp_path / "again")


def test_figure_6_does_not_pass_another_presets_runs_for_its_own(selected, capsys):
    arguments = ("--methods", "erm", "and_mask", "--many", "and_mask")
    many = ("--many-seeds", 0, 2, "--seeds", 0, 1, "--selected", "None")
    assert figure(6, "--preset", "cpu", *arguments, *many, "--out", selected) == 2
    assert "settings" in capsys.readouterr().err


def test_figure_finished_is_not_made_again(selected, capsys):
    arguments = ("--methods", "erm", "and_mask", "--many", "and_mask")
    many = ("--many-seeds", 0, 2)
    assert figure(6, *TINY, *arguments, *many, "--out", selected) == 0
    assert "finished; --overwrite runs it again" in capsys.readouterr().out
    assert figure(6, *TINY, *arguments, "--out", selected) == 2
    assert "many_seeds" in capsys.readouterr().err


def test_figure_overwrite_discards_every_part(tmp_path, monkeypatch):
    config = TrainConfig(**PRESETS["smoke"])
    path = tmp_path / "run"
    with RunDir(path, "synthetic selected", SELECTED_PRESETS["smoke"]):
        for name in ("erm-seed0", "dann-seed1"):
            with RunDir(path / name, "synthetic train", config) as part:
                part.finish({"from": "an older version of the program"})

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_train_all", stop)
    assert figure(6, *TINY, "--out", path, "--overwrite") == 130
    assert not list(path.rglob("summary.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "--reruns a table of seeds"), ("a,b\n1,2\n", "is not a table of seeds")],
)
def test_figure_6_wrong_reruns_exit_2_before_anything(text, message, tmp_path, capsys):
    table, path = tmp_path / "seeds.csv", tmp_path / "run"
    if text is not None:
        table.write_text(text)
    assert figure(6, *TINY, "--reruns", f"large={table}", "--out", path) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("number", [6, 7, 14, 15])
def test_figure_from_a_directory_without_its_csv_exits_2(number, tmp_path, capsys):
    assert figure(number, "--from", tmp_path) == 2
    assert f"figure{number}.csv is not there" in capsys.readouterr().err
    (tmp_path / f"figure{number}.csv").write_text("method,seed\n")
    assert figure(number, "--from", tmp_path) == 2
    assert "has no rows" in capsys.readouterr().err
    assert figure(number, "--from", tmp_path / f"figure{number}.csv") == 2
    assert "takes the directory" in capsys.readouterr().err
    (tmp_path / f"figure{number}.csv").write_text("colour\nblue\n")
    assert figure(number, "--from", tmp_path) == 2
    assert "it is not of this figure" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_figure_from_draws_beside_the_csv_without_out(selected, tmp_path):
    shutil.copy(selected / "figure6.csv", tmp_path)
    assert figure(6, "--from", tmp_path) == 0
    assert (tmp_path / "figure6.png").exists()


def test_read_table_numbers_are_numbers(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,c\n1,x,nan\n")
    [row] = read_table(tmp_path / "t.csv")
    assert (row["a"], row["b"]) == (1.0, "x")
    assert row["c"] != row["c"]
    figures = {f"figure{number}" for number in (6, 7, 14, 15)}
    assert set(DRAWINGS) == {*figures, "consistency"}


def test_selected_settings_are_a_search_on_top_of_a_preset(tmp_path):
    (tmp_path / "erm.json").write_text('{"oracle": {"method": "erm", "l2": 0.5}}')
    config = SelectedConfig(selected=str(tmp_path), rule="oracle", methods=("erm",))
    settings = selected_settings(config, "erm", "paper")
    assert settings == {**PRESETS["paper"], "method": "erm", "l2": 0.5}
    with pytest.raises(RunDirError, match=r"irm\.json.*search subcommand"):
        selected_settings(config, "irm", "cpu")


@pytest.mark.parametrize("method", METHODS)
def test_selected_settings_without_a_search_are_valid_for_every_method(method):
    settings = selected_settings(SELECTED_PRESETS["smoke"], method, "smoke")
    assert TrainConfig(**settings).method == method
