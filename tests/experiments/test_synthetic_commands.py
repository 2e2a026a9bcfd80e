"""The commands as a user types them, killed and interrupted for real."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from matplotlib.image import imread

from experiments.common.cli import main
from experiments.common.run_dir import RunDir, RunDirError
from experiments.synthetic import commands
from experiments.synthetic.__main__ import COMMANDS
from experiments.synthetic.commands import format_table, summarize_seeds
from experiments.synthetic.config import (
    PRESETS,
    CompareConfig,
    RerunConfig,
    TrainConfig,
)
from experiments.synthetic.figures import draw_seeds
from experiments.synthetic.training import METRICS, fitted
from tests.experiments.conftest import ROOT, read_csv

# Long enough to be killed in, checkpoints close enough to be killed in one.
LONG = ("--preset", "smoke", "--epochs", "40", "--checkpoint-every", "2")


def synthetic(*arguments):
    """Runs a command in this process; returns its exit code."""
    return main("python -m experiments.synthetic", COMMANDS, list(map(str, arguments)))


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """Directory of a run that nothing happened to."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start("train", *LONG, "--out", path))
    return path


def modified(file):
    return file.stat().st_mtime_ns if file.exists() else None


def wait_for_progress(process, path):
    """Waits until the process has saved something, or has ended."""
    before = modified(path / "metrics.csv")
    while modified(path / "metrics.csv") == before and process.poll() is None:
        time.sleep(0.005)


def wait_until(process, condition):
    """Waits for something that the process does before it ends."""
    while not condition():
        assert process.poll() is None
        time.sleep(0.01)


def test_train_killed_again_and_again_ends_bit_identical(start, undisturbed, tmp_path):
    path, moment, kills = tmp_path / "run", random.Random(0), 0
    for attempt in range(4):
        process = start("train", *LONG, "--out", path)
        if attempt == 0:
            time.sleep(moment.uniform(0, 3))  # somewhere in the start
        else:
            wait_for_progress(process, path)
            time.sleep(moment.uniform(0, 0.2))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3
    finish(start("train", *LONG, "--out", path))
    for name in ("metrics.csv", "summary.json", "config.json"):
        assert (path / name).read_bytes() == (undisturbed / name).read_bytes()
    assert not list(path.rglob("*.tmp"))
    sessions = json.loads((path / "manifest.json").read_text())["sessions"]
    assert sessions > 1


def test_train_interrupted_and_then_damaged_ends_bit_identical(
    start, undisturbed, tmp_path
):
    path = tmp_path / "run"
    process = start("train", *LONG, "--out", path)
    for _ in range(3):
        wait_for_progress(process, path)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=130)
    assert f"in {path}: the same command goes on from what is saved" in err
    assert "Traceback" not in err
    assert not (path / "summary.json").exists()

    steps = [int(p.name) for p in (path / "checkpoint").iterdir() if p.name.isdigit()]
    files = (path / "checkpoint" / str(max(steps))).rglob("*")
    largest = max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    _, err = finish(start("train", *LONG, "--out", path))
    assert f"{max(steps)} is not usable" in err
    expected = (undisturbed / "metrics.csv").read_bytes()
    assert (path / "metrics.csv").read_bytes() == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directory of `train --preset smoke --seed 1`."""
    path = tmp_path_factory.mktemp("trained") / "run"
    assert synthetic("train", "--preset", "smoke", "--seed", 1, "--out", path) == 0
    return path


def test_train_writes_the_documented_files(trained):
    names = {p.name for p in trained.iterdir()} - {".lock"}
    assert names == {
        "config.json",
        "manifest.json",
        "metrics.csv",
        "summary.json",
        "train.png",
        "checkpoint",
    }
    rows = read_csv(trained / "metrics.csv")
    assert list(rows[0]) == ["epoch", *METRICS]
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    summary = json.loads((trained / "summary.json").read_text())
    assert summary == {
        "method": "and_mask",
        "seed": 1,
        "epochs": 12,
        **{name: float(rows[-1][name]) for name in METRICS},
    }
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["seed"] == 1
    assert manifest["command"].startswith("python -m experiments.synthetic train")
    assert manifest["wall_time_s"] > 0


def test_train_finished_is_not_computed_again(trained, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    assert synthetic("train", "--preset", "smoke", "--seed", 1, "--out", trained) == 0
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before
    out = capsys.readouterr().out
    assert "--overwrite" in out
    assert "and_mask" in out


def test_train_overwrite_discards_the_finished_run(tmp_path, monkeypatch, capsys):
    with RunDir(tmp_path, "synthetic train", TrainConfig()) as run:
        run.finish({"from": "an older version of the program"})

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_train", stop)
    assert synthetic("train", "--preset", "smoke", "--out", tmp_path) == 2
    assert run.finished
    code = synthetic("train", "--preset", "smoke", "--out", tmp_path, "--overwrite")
    assert code == 130
    assert "without --overwrite, goes on" in capsys.readouterr().err
    assert not run.finished
    assert '"num_envs": 4' in (tmp_path / "config.json").read_text()


def test_train_other_config_is_refused_with_exit_2(trained, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    code = synthetic("train", "--preset", "smoke", "--seed", 2, "--out", trained)
    assert code == 2
    assert "seed: 1 there, 2 asked for" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_train_foreign_directory_is_refused_with_exit_2(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    code = synthetic("train", "--preset", "smoke", "--out", tmp_path, "--overwrite")
    assert code == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_train_directory_in_use_is_refused_with_exit_2(start, tmp_path):
    config = TrainConfig(**PRESETS["smoke"])
    with RunDir(tmp_path / "run", "synthetic train", config):
        process = start("train", "--preset", "smoke", "--out", tmp_path / "run")
        _, err = finish(process, code=2)
    assert "in use by another process" in err
    assert "Traceback" not in err


def test_compare_writes_table_figure_and_a_run_for_each_method(tmp_path, capsys):
    methods = ("erm", "and_mask", "geometric_mean")
    path = tmp_path / "run"
    arguments = ("compare", "--preset", "smoke", "--methods", *methods, "--out", path)
    assert synthetic(*arguments) == 0
    printed = capsys.readouterr().out
    rows = read_csv(path / "compare.csv")
    results = json.loads((path / "summary.json").read_text())["results"]
    for method, result in zip(methods, results, strict=True):
        assert method in printed
        history = read_csv(path / method / "metrics.csv")
        assert [row for row in rows if row["method"] == method] == [
            {"method": method, **row} for row in history
        ]
        assert result["test_accuracy"] == float(history[-1]["test_accuracy"])
        assert (path / method / "train.png").stat().st_size > 0
    image = imread(path / "compare.png")
    assert (path / "compare.png").stat().st_size < 600_000
    assert image.shape[1] > image.shape[0] > 800

    # A second call finds it finished, sub-runs and all.
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert synthetic(*arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    assert capsys.readouterr().out.splitlines()[1:] == printed.splitlines()[1:]

    # Without its summary it is put together again from the methods' runs.
    table, summary = (path / "compare.csv").read_bytes(), path / "summary.json"
    expected = json.loads(summary.read_text())
    for name in ("compare.csv", "summary.json"):
        (path / name).unlink()
    before = {p: p.stat().st_mtime_ns for p in (path / "erm" / "checkpoint").rglob("*")}
    assert synthetic(*arguments) == 0
    assert (path / "compare.csv").read_bytes() == table
    assert json.loads(summary.read_text()) == expected
    assert {
        p: p.stat().st_mtime_ns for p in (path / "erm" / "checkpoint").rglob("*")
    } == before


def test_rerun_gives_each_seed_what_train_gives_it(start, trained, tmp_path):
    path = tmp_path / "rerun"
    arguments = ("rerun", "--preset", "smoke", "--seeds", 0, 2, "--workers", 2)
    out, _ = finish(start(*arguments, "--out", path))
    for name in ("metrics.csv", "summary.json", "config.json"):
        assert (path / "seed1" / name).read_bytes() == (trained / name).read_bytes()

    rows = read_csv(path / "seeds.csv")
    assert [int(row["seed"]) for row in rows] == [0, 1, 2]
    accuracies = [float(row["test_accuracy"]) for row in rows]
    summary = json.loads((path / "summary.json").read_text())
    assert summary["seeds"] == 3
    assert summary["min_test_accuracy"] == min(accuracies)
    assert summary["mean_test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert "min_test_accuracy" in out
    assert (path / "seeds.png").read_bytes().startswith(b"\x89PNG")


COMPARE = CompareConfig(**PRESETS["smoke"])
RERUN = RerunConfig(**PRESETS["smoke"], seeds=(0, 1))


@pytest.mark.parametrize(
    ("command", "config", "parts", "narrower"),
    [
        (
            "compare",
            COMPARE,
            {m: COMPARE.train_config(m) for m in COMPARE.methods},
            ["--methods", "erm"],
        ),
        (
            "rerun",
            RERUN,
            {f"seed{c.seed}": c for c in RERUN.train_configs()},
            ["--seeds", 0, 0],
        ),
    ],
    ids=["compare", "rerun"],
)
def test_overwrite_discards_every_part_before_it_trains(
    command, config, parts, narrower, tmp_path, monkeypatch
):
    path = tmp_path / "run"
    with RunDir(path, f"synthetic {command}", config):
        for name, part in parts.items():
            with RunDir(path / name, "synthetic train", part) as run:
                (path / name / "train.png").touch()
                run.finish({"from": "an older version of the program"})

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_train", stop)
    monkeypatch.setattr(commands, "_train_all", stop)
    # Another subcommand changes nothing.
    assert synthetic("train", "--out", path, "--overwrite") == 2
    assert len(list(path.rglob("summary.json"))) == len(parts)
    arguments = [command, "--preset", "smoke", *narrower, "--out", path]
    assert synthetic(*arguments, "--overwrite") == 130
    assert not list(path.rglob("summary.json"))
    assert not list(path.rglob("train.png"))


@pytest.mark.parametrize("damage", ["missing", "short", "garbled"])
def test_rerun_finished_seed_without_its_metrics_is_refused_naming_them(
    tmp_path, damage
):
    config = TrainConfig(**PRESETS["smoke"])
    path = tmp_path / "seed0"
    metrics = path / "metrics.csv"
    rows = [{"epoch": 1.0 + e, "test_accuracy": 1.0} for e in range(config.epochs)]
    with RunDir(path, "synthetic train", config) as run:
        run.write_metrics(rows)
        run.finish({"seed": 0, "epochs": config.epochs, "test_accuracy": 1.0})
    outcome = commands._train_seed(path, config, "")
    assert outcome.curve("test_accuracy") == [1.0] * len(rows)
    if damage == "missing":
        metrics.unlink()
    elif damage == "short":
        metrics.write_text("".join(metrics.read_text().splitlines(True)[:-1]))
    else:
        metrics.write_text(metrics.read_text().replace("test", "x"))
    with pytest.raises(RunDirError, match=f"{metrics} is missing or damaged: remove"):
        commands._train_seed(path, config, "")


def test_rerun_of_seeds_that_have_fitted_ends_early_and_can_be_read_again(tmp_path):
    config = RerunConfig(
        **{**PRESETS["smoke"], "epochs": 200},
        method="erm",
        seeds=(0, 1),
        fitted_epochs=2,
    )
    jobs = [(tmp_path / f"seed{c.seed}", c) for c in config.train_configs()]
    for _ in range(2):
        outcomes = [commands._train_seed(path, c, "") for path, c in jobs]
        for outcome in outcomes:
            assert outcome.result["epochs"] == len(outcome.history) < 200
            assert fitted(outcome.history, 2)
            assert not fitted(outcome.history[:-1], 2)
    curves = [outcome.curve("test_accuracy") for outcome in outcomes]
    (axes,) = draw_seeds("erm", [*curves, curves[0][:2]], 0.98).axes
    ends = [line.get_ydata()[-1] for line in axes.lines[:3]]
    assert ends == [curves[0][-1], curves[1][-1], curves[0][1]]


def rerun_in_a_terminal(start, path):
    """Starts a rerun without end in a process group of its own, as a shell does."""
    endless = ("--preset", "smoke", "--epochs", 10**6, "--checkpoint-every", 10**6)
    return start(
        *("rerun", *endless, "--seeds", 0, 1, "--workers", 2, "--out", path),
        start_new_session=True,
    )


def ctrl_c(process, times=1):
    """Sends Ctrl-C to all the processes, and waits for their end."""
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    _, err = finish(process, code=130)
    assert "the same command goes on" in err
    assert "Traceback" not in err
    return err


def test_rerun_interrupted_saves_the_epoch_of_every_worker(start, tmp_path):
    path = tmp_path / "rerun"
    process = rerun_in_a_terminal(start, path)
    seeds = [path / "seed0", path / "seed1"]
    wait_until(process, lambda: all((seed / "checkpoint").exists() for seed in seeds))
    time.sleep(1)  # now they are in the loop over epochs
    err = ctrl_c(process)
    assert err.count("Ctrl-C again stops at once") == 2
    for seed in seeds:
        epochs = len(read_csv(seed / "metrics.csv"))
        assert (seed / "checkpoint" / str(epochs)).exists()
    assert not list(path.rglob("summary.json"))


@pytest.mark.parametrize("times", [1, 2])
def test_rerun_interrupted_outside_of_the_loop_stops_at_once(start, tmp_path, times):
    path = tmp_path / "rerun"
    process = rerun_in_a_terminal(start, path)
    wait_until(process, (path / "manifest.json").exists)
    time.sleep(0.3)  # while the workers start
    ctrl_c(process, times)
    assert not list(path.rglob("metrics.csv"))


def test_rerun_killed_goes_on_with_the_seeds_that_are_left(start, tmp_path):
    path = tmp_path / "rerun"
    arguments = ("rerun", "--preset", "smoke", "--seeds", 0, 1, "--out", path)
    process = start(*arguments)
    wait_until(process, (path / "seed0" / "summary.json").exists)
    process.kill()
    process.communicate()
    done = modified(path / "seed0" / "metrics.csv")
    time.sleep(0.5)  # the worker notices that its parent is gone
    finish(start(*arguments))
    assert modified(path / "seed0" / "metrics.csv") == done
    assert json.loads((path / "summary.json").read_text())["seeds"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--threshold", "1.5"], "threshold must be in [0, 1], got 1.5"),
        (["train", "--threshold", "nan"], "threshold must be in [0, 1], got nan"),
        (["train", "--epochs", "-3"], "epochs must be at least 1, got -3"),
        (
            ["compare", "--methods", "erm", "erm"],
            "methods must be one or more different",
        ),
        (["rerun", "--seeds", "5", "1"], "seeds must be in ascending order"),
        (["rerun", "--workers", "0"], "workers must be at least 1, got 0"),
    ],
)
def test_command_line_invalid_value_exits_2_before_anything(
    arguments, message, tmp_path, capsys
):
    assert synthetic(*arguments, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--method", "magic"],
        ["compare", "--methods", "magic"],
        ["search", "--sampler", "magic"],
        ["figure", "8"],
        ["magic"],
    ],
)
def test_command_line_unknown_choice_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        synthetic(*arguments)
    assert exit_.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_command_line_help_needs_no_jax(start):
    out, _ = finish(start("compare", "--help"))
    assert "--methods" in out
    assert "--preset" in out
    code = "import experiments.synthetic.__main__, sys; print('jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "False\n"


def test_summarize_seeds_counts_those_at_the_bar():
    results = [{"test_accuracy": a} for a in (0.5, 0.98, 1.0, 0.9799)]
    summary = summarize_seeds(results)
    assert summary["solved"] == 2
    assert summary["solved_share"] == 0.5
    assert summary["min_test_accuracy"] == 0.5
    assert summary["mean_test_accuracy"] == pytest.approx(0.864975)


def test_format_table_columns_line_up():
    result = dict.fromkeys(METRICS, 0.5) | {"method": "erm", "seconds": 12.34}
    lines = format_table([result, result | {"method": "geometric_mean"}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "50.0%" in lines[2]
    assert "12.3" in lines[2]
