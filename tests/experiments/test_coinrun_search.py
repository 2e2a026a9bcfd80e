"""The search over optimizers: draws, trials, the best of them, and the command."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from experiments.coinrun.__main__ import COMMANDS
from experiments.coinrun.student import search as student_search
from experiments.coinrun.student.config import (
    METHODS,
    SEARCH_PRESETS,
    TrainConfig,
)
from experiments.coinrun.student.search import (
    RANGES,
    WORST_KL,
    Objective,
    best_trials,
    study_of,
)
from experiments.common.bootstrap import bootstrap, bootstrap_difference
from experiments.common.cli import main
from experiments.common.search import open_study
from tests.experiments.conftest import ROOT, kill_at_random, read_csv

SMOKE = SEARCH_PRESETS["smoke"]
# Trials of one epoch: they are here to be killed, resumed and counted.
SHORT = ("search", "--preset", "smoke", "--epochs", "1", "--top", "2")


def coinrun(*arguments):
    arguments = list(map(str, arguments))
    return main("python -m experiments.coinrun", COMMANDS, arguments)


class RandomTrial:
    """Draws uniformly, and remembers what it was asked for, reported and told."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.ranges, self.user_attrs = {}, {}

    def suggest_float(self, name, low, high, log=False):
        self.ranges[name] = low, high
        return self.random.uniform(low, high)

    def suggest_categorical(self, name, choices):
        self.ranges[name] = tuple(choices)
        return self.random.choice(choices)

    def set_user_attr(self, name, value):
        self.user_attrs[name] = value


@pytest.mark.parametrize("method", METHODS)
def test_suggest_every_draw_is_a_valid_config_and_ranges_are_shared(method):
    asked = {}
    for seed in range(40):
        trial = RandomTrial(seed)
        config = Objective(SMOKE, method, None, "").train_config(trial)
        assert (config.method, config.seed) == (method, SMOKE.seed)
        assert (config.decay == "off") == (config.weight_decay == 0)
        asked |= trial.ranges
    expected = dataclasses.asdict(RANGES)
    if method == "adam":
        del expected["b3"], expected["threshold"]
    assert asked == expected


def test_ranges_contain_the_papers_five_best():
    table_3 = [
        (0.0078, 0.21, 0.79, 0.36, 0.057),
        (0.0072, 0.26, 0.86, 0.40, 0.041),
        (0.0080, 0.23, 0.84, 0.41, 0.045),
        (0.0068, 0.33, 0.72, 0.47, 0.077),
        (0.0063, 0.67, 0.65, 0.47, 0.080),
    ]
    names = ("learning_rate", "b1", "b3", "threshold", "weight_decay")
    for row in table_3:
        for name, value in zip(names, row, strict=True):
            low, high = getattr(RANGES, name)
            assert low <= value <= high


def objective(monkeypatch, curve):
    """An objective whose trials have a given course of test KL."""
    epochs = iter(curve)

    class Trainer:
        def init(self, key):
            return None

        def epoch(self, state, dataset, key, index, rates):
            kl = next(epochs)
            return state, {
                "train_kl": np.float32(kl / 2),
                "test_kl": np.float32(kl),
                "running_kl": np.float32(kl),
                "test_accuracy": np.float32(0.5),
                "open_fraction": np.float32(0.25),
            }

    monkeypatch.setattr(student_search, "make_trainer", lambda *_: Trainer())
    monkeypatch.setattr(student_search, "_data", lambda *_: None)
    return Objective(dataclasses.replace(SMOKE, epochs=len(curve)), "adam", None, "")


def test_objective_value_is_the_lowest_test_kl_and_curves_are_kept(monkeypatch):
    trial = RandomTrial(0)
    assert objective(monkeypatch, [3.0, 1.0, 2.0])(trial) == -1.0
    kept = trial.user_attrs
    assert kept["test_kl_curve"] == [3.0, 1.0, 2.0]
    assert kept["train_kl_curve"] == [1.5, 0.5, 1.0]
    assert (kept["min_test_kl"], kept["last_test_kl"]) == (1.0, 2.0)
    assert (kept["epochs"], kept["stopped"]) == (3, "")


@pytest.mark.parametrize("end", [np.nan, np.inf])
def test_objective_that_diverges_ends_and_counts_as_the_worst(end, monkeypatch):
    trial = RandomTrial(0)
    assert objective(monkeypatch, [0.5, end, 0.1])(trial) == -WORST_KL
    assert trial.user_attrs["stopped"] == "diverged"
    assert trial.user_attrs["test_kl_curve"] == [0.5]
    assert objective(monkeypatch, [end])(RandomTrial(0)) == -WORST_KL


def test_best_trials_are_the_lowest_and_none_that_diverged():
    rows = [
        {"number": number, "min_test_kl": kl, "stopped": stopped}
        for number, kl, stopped in [
            (0, 0.3, ""),
            (1, 0.1, "diverged"),
            (2, 0.2, ""),
            (3, 0.2, ""),
            (4, 0.4, ""),
        ]
    ]
    assert [row["number"] for row in best_trials(rows, 3)] == [2, 3, 0]
    assert len(best_trials(rows, 9)) == 4


def test_bootstrap_interval_is_that_of_normal_theory_for_normal_values():
    values = np.random.default_rng(0).normal(5, 2, (400, 2))
    mean, low, high = bootstrap(values)
    np.testing.assert_allclose(mean, values.mean(0))
    error = values.std(0) / np.sqrt(400)
    np.testing.assert_allclose(low, mean - 1.96 * error, atol=0.1 * error.max())
    np.testing.assert_allclose(high, mean + 1.96 * error, atol=0.1 * error.max())
    for first, second in zip(bootstrap(values), (mean, low, high), strict=True):
        np.testing.assert_array_equal(first, second)
    one = bootstrap(values[:1])
    np.testing.assert_array_equal(one.low, one.high)


def test_bootstrap_difference_of_two_samples():
    rng = np.random.default_rng(0)
    first, second = rng.normal(3, 1, 300), rng.normal(1, 2, 200)
    mean, low, high = bootstrap_difference(first, second)
    assert mean == first.mean() - second.mean()
    error = np.sqrt(first.var() / 300 + second.var() / 200)
    np.testing.assert_allclose(
        [low, high], mean + 1.96 * error * np.array([-1, 1]), atol=0.1 * error
    )


def test_study_of_has_no_first_trials_and_knows_its_data(tmp_path):
    studies = [
        study_of(SMOKE, method, tmp_path, None, digest)
        for method in METHODS
        for digest in ("a", "b")
    ]
    assert all(not study.first for study in studies)
    assert len({study.trials for study in studies}) == 1
    assert len({study.seed for study in studies}) == 1
    assert studies[0].name != studies[2].name
    assert studies[0].plan != studies[1].plan
    assert {study.space["seed"] for study in studies} == {SMOKE.seed}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Directory of a finished search with both methods, by two workers each."""
    path = tmp_path_factory.mktemp("searched") / "run"
    assert coinrun(*SHORT, "--workers", 2, "--out", path) == 0
    return path


def test_search_two_workers_on_a_study_finish_every_trial_once(searched):
    trials = read_csv(searched / "trials.csv")
    numbers = [(trial["method"], int(trial["number"])) for trial in trials]
    assert numbers == [(method, n) for method in METHODS for n in range(3)]
    for method in METHODS:
        study = open_study(
            study_of(
                dataclasses.replace(SMOKE, epochs=1),
                method,
                searched,
                None,
                "generated",
            )
        )
        assert len(study.trials) == 3
        workers = [Path(trial.user_attrs["worker"]).name for trial in study.trials]
        processes = {worker.split("-")[1] for worker in workers}
        assert len(processes) == 2
        started = sorted(trial.datetime_start for trial in study.trials)
        assert started[1] < min(trial.datetime_complete for trial in study.trials)
    assert not [name for name in trials[0] if name.endswith("_curve")]


def test_search_tables_and_figures_are_the_best_trials(searched, tmp_path, capsys):
    trials = read_csv(searched / "trials.csv")
    best, curves = read_csv(searched / "best.csv"), read_csv(searched / "figure18.csv")
    summary = json.loads((searched / "summary.json").read_text())
    selected = json.loads((searched / "selected.json").read_text())
    for method in METHODS:
        own = [t for t in trials if t["method"] == method]
        lowest = sorted(own, key=lambda t: float(t["min_test_kl"]))[:2]
        shown = [row for row in best if row["method"] == method]
        assert [row["trial"] for row in shown] == [t["number"] for t in lowest]
        assert [row["rank"] for row in shown] == ["1", "2"]
        for row, trial in zip(shown, lowest, strict=True):
            assert row["test_kl"] == trial["min_test_kl"]
            assert row["learning_rate"] == trial["learning_rate"]
            [point] = [
                c
                for c in curves
                if (c["method"], c["trial"]) == (method, trial["number"])
            ]
            assert point["test_kl"] == trial["last_test_kl"]
        part = summary["methods"][method]
        mean = np.mean([float(row["test_kl"]) for row in shown])
        assert part["top_mean_test_kl"] == pytest.approx(mean)
        low, high = part["top_interval"]
        assert low <= mean <= high
        TrainConfig(**selected[method])
        assert selected[method]["method"] == method
    gain = summary["adam_minus_and_mask"]
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert coinrun("search", "--from", searched, "--out", tmp_path) == 0
    for name in ("best.png", "figure18.png"):
        assert imread(searched / name).std() > 0.01
        assert (tmp_path / name).read_bytes() == (searched / name).read_bytes()
    assert coinrun(*SHORT, "--out", searched) == 0
    out = capsys.readouterr().out
    assert "adam: 3 trials, 0 diverged; the best 2:" in out
    one_shown = tmp_path / "one"
    shutil.copytree(searched, one_shown)
    assert coinrun(*SHORT, "--top", 1, "--out", one_shown) == 0
    assert len(read_csv(one_shown / "best.csv")) == len(METHODS)
    assert (one_shown / "trials.csv").read_bytes() == (
        searched / "trials.csv"
    ).read_bytes()
    assert coinrun(*SHORT, "--trials", 2, "--out", searched) == 2
    assert "has 3 finished trials already" in capsys.readouterr().err


def test_search_killed_at_random_moments_and_resumed_has_every_trial_once(tmp_path):
    path = tmp_path / "run"
    arguments = (*SHORT, "--methods", "adam", "--sampler", "random", "--out", path)
    command = [sys.executable, "-m", "experiments.coinrun", *map(str, arguments)]

    def start():
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert kill_at_random(start, path / "study.journal", 2) >= 1
    assert coinrun(*arguments) == 0
    trials = read_csv(path / "trials.csv")
    assert [int(trial["number"]) for trial in trials] == [0, 1, 2]
    study = open_study(
        study_of(
            dataclasses.replace(SMOKE, epochs=1, sampler="random"),
            "adam",
            path,
            None,
            "generated",
        )
    )
    finished = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert sorted(t.user_attrs["index"] for t in finished) == [0, 1, 2]
    assert {t.state.name for t in study.trials} <= {"COMPLETE", "FAIL"}


def test_search_data_that_are_not_there_are_refused(tmp_path, capsys):
    arguments = ("search", "--data", tmp_path, "--out", tmp_path / "run")
    assert coinrun(*arguments) == 2
    assert "holds no complete dataset" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_search_overwrite_of_a_shared_storage_is_refused(tmp_path, capsys):
    arguments = ("--out", tmp_path / "run", "--overwrite", "--storage", tmp_path / "j")
    assert coinrun(*SHORT, *arguments) == 2
    assert "--overwrite leaves the trials in --storage" in capsys.readouterr().err
