"""The commands on the linear unit tests, in seconds."""

import json

import numpy as np
import pytest

from experiments.shifts import commands
from experiments.shifts.commands import (
    choose,
    format_markdown,
    summarize,
    summarize_trials,
)
from experiments.shifts.config import LINEAR_PRESETS, LinearConfig
from tests.experiments.conftest import only_error, read_csv, shifts


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    path = tmp_path_factory.mktemp("choose") / "run"
    assert shifts("linear-choose", "--preset", "smoke", "--out", path) == 0
    return path


@pytest.fixture(scope="module")
def linear(chosen, tmp_path_factory):
    path = tmp_path_factory.mktemp("linear") / "run"
    assert shifts(*smoke(chosen), "--out", path) == 0
    return path


def smoke(chosen):
    return "linear", "--preset", "smoke", "--chosen", chosen / "chosen.json"


def test_linear_choose_smoke_writes_a_setting_for_each_method(chosen):
    found = json.loads((chosen / "chosen.json").read_text())
    assert list(found) == ["averaging", "oracle"]
    for setting in found.values():
        assert setting["learning_rate"] == 0.1
        assert 0 <= setting["held_out_share"] <= 1
    assert len(read_csv(chosen / "trials.csv")) == 2


def test_linear_smoke_reports_every_environment_and_seed(linear):
    rows = read_csv(linear / "results.csv")
    config = LINEAR_PRESETS["smoke"]
    assert list(rows[0]) == ["problem", "num_envs", "method", "seed", "split", "error"]
    splits = {row["split"] for row in rows}
    assert {"train_0", "train_1", "test_0", "test_1", "held_out_3"} <= splits
    assert {"test_mean", "test_worst", "held_out_share"} <= splits
    runs = {(row["problem"], row["method"], row["seed"]) for row in rows}
    assert len(runs) == len(config.problems) * len(config.methods) * 2
    own = {
        row["split"]: float(row["error"])
        for row in rows
        if (row["problem"], row["method"], row["seed"]) == next(iter(sorted(runs)))
    }
    envs = [own["test_0"], own["test_1"]]
    assert own["test_mean"] == pytest.approx(np.mean(envs))
    assert own["test_worst"] == max(envs)


def test_linear_smoke_prints_and_keeps_the_summary(linear, chosen, capsys):
    assert shifts(*smoke(chosen), "--out", linear) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown
    table = json.loads((linear / "summary.json").read_text())["results"]
    assert len(table) == len(read_csv(linear / "linear.csv")) == 4
    assert all(row["method"] in shown for row in table)
    assert (linear / "linear.png").stat().st_size > 10_000


def test_linear_goes_on_with_the_runs_that_are_missing(linear, chosen, tmp_path):
    expected = (linear / "results.csv").read_bytes()
    out = tmp_path / "run"
    seeds, train = [], commands.TRAIN["linear"]

    def stop_in_the_third_run(run, seed):
        seeds.append(seed)
        if len(seeds) == 6:
            raise KeyboardInterrupt
        return train(run, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(commands.TRAIN, "linear", stop_in_the_third_run)
        assert shifts(*smoke(chosen), "--out", out) == 130
        assert not (out / "results.csv").exists()
        before = len(seeds)
        assert shifts(*smoke(chosen), "--out", out) == 0
    # Of four runs of two seeds two were finished.
    assert len(seeds) - before == 4
    assert (out / "results.csv").read_bytes() == expected


def test_linear_draws_its_figure_again(linear, tmp_path):
    assert shifts("linear", "--from", linear, "--out", tmp_path) == 0
    assert (tmp_path / "linear.png").read_bytes() == (
        linear / "linear.png"
    ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-envs", "1"), "num_envs must be at least 2, got 1"),
        (("--examples", "7"), "examples must be even: half of each class, got 7"),
        (("--seeds", "3", "1"), "seeds must be in ascending order, got (3, 1)"),
        (("--damping", "-1"), "damping must be in [0, 1), got -1.0"),
        (("--l2", "-1"), "l2 must be in [0, 1), got -1.0"),
        (("--chosen", "nowhere.json"), "make it with linear-choose"),
    ],
)
def test_linear_refuses_wrong_input_in_one_line(arguments, message, tmp_path, capsys):
    out = tmp_path / "run"
    command = ("linear", "--preset", "smoke", *arguments, "--out", out)
    assert shifts(*command) == 2
    error = only_error(capsys.readouterr().err)
    assert message in error
    assert not out.exists()


def test_linear_refuses_a_choice_without_the_method(chosen, tmp_path, capsys):
    command = (*smoke(chosen), "--methods", "averaging", "irm", "--out", tmp_path / "r")
    assert shifts(*command) == 2
    assert "lacks 'irm': make it with linear-choose" in capsys.readouterr().err


def test_spirals_smoke_chooses_trains_and_draws(tmp_path):
    choice, out = tmp_path / "choice", tmp_path / "run"
    assert shifts("spirals-choose", "--preset", "smoke", "--out", choice) == 0
    source = choice / "chosen.json"
    command = ("spirals", "--preset", "smoke", "--chosen", source, "--out", out)
    assert shifts(*command) == 0
    rows = read_csv(out / "results.csv")
    assert {row["problem"] for row in rows} == {"spirals", "spirals_rotated"}
    assert {"train_0", "train_1", "test_0", "held_out_mean"} <= {
        row["split"] for row in rows
    }
    assert (out / "spirals.png").stat().st_size > 10_000


def test_spirals_refuses_the_oracle(tmp_path, capsys):
    out = tmp_path / "run"
    assert shifts("spirals", "--methods", "oracle", "--out", out) == 2
    assert "without oracle, which linear alone has" in capsys.readouterr().err


def test_choose_takes_the_lowest_share_and_counts_what_diverged_as_worst():
    def row(rate, error):
        return {
            "method": "irm",
            "split": "held_out_share",
            "learning_rate": rate,
            "number": 1.0,
            "error": error,
        }

    rows = [row(0.1, 0.2), row(0.1, float("nan")), row(0.3, 0.4), row(0.3, 0.5)]
    trials = summarize_trials(rows)
    assert [trial["held_out_share"] for trial in trials] == [0.6, 0.45]
    assert choose(trials)["irm"]["learning_rate"] == 0.3


def test_summarize_divides_by_the_oracle_seed_by_seed():
    rows = [
        {
            "problem": "example1",
            "num_envs": 2,
            "method": method,
            "seed": seed,
            "split": split,
            "error": error,
        }
        for method, errors in (("irm", (2.0, 6.0)), ("oracle", (1.0, 2.0)))
        for seed, error in enumerate(errors)
        for split in ("test_mean", "test_worst")
    ]
    irm, oracle = summarize(rows)
    assert (irm["error"], irm["worst_seed"], irm["over_oracle"]) == (4.0, 6.0, 2.5)
    assert oracle["over_oracle"] == 1.0


def test_format_markdown_shows_what_was_not_run_as_a_dash():
    def row(method, num_envs):
        interval = {"error": 0.25, "low": 0.2, "high": 0.3, "over_oracle": 1.5}
        names = {"problem": "example1", "method": method, "num_envs": num_envs}
        return {**names, **interval}

    rows = [row("irm", 4.0), row("irm", 2.0), row("vrex", 2.0)]
    lines = format_markdown(rows, "example1").splitlines()
    assert lines[0] == "| method | 2 envs | 4 envs |"
    cell = "0.2500 (0.2000 to 0.3000)"
    assert lines[2:] == [f"| IRM | {cell} | {cell} |", f"| V-REx | {cell} | - |"]
    last = format_markdown(rows, "example1", "over_oracle").splitlines()[-1]
    assert last == "| V-REx | 1.500 | - |"


def test_presets_are_of_all_problems_and_methods():
    config = LinearConfig()
    assert config == LINEAR_PRESETS["cpu"]
    assert config.num_envs == tuple(range(2, 11))
