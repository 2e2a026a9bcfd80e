"""The benchmark without PyTorch, and what it says when PyTorch is not there."""

import json

import pytest

from experiments.benchmark.__main__ import COMMANDS, PROG
from experiments.benchmark.epoch_profile import (
    DUES,
    PROFILES,
    ProfileConfig,
    due_seconds,
    format_table,
    parts_of,
)
from experiments.benchmark.epochs import measure
from experiments.common.cli import main
from experiments.common.run_dir import RunDirError
from tests.experiments.conftest import only_error


def run(*arguments):
    argv = ["epochs", "--preset", "smoke", "--rounds", "3", *map(str, arguments)]
    return main(PROG, COMMANDS, argv)


def test_epochs_without_torch_measures_every_oracle(tmp_path, capsys):
    assert run("--out", tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["median_seconds_per_epoch"]) == {
        "jax_fused",
        "jax_scan",
        "jax_vmap",
    }
    assert all(t > 0 for t in summary["median_seconds_per_epoch"].values())
    losses = summary["first_epoch_loss"]
    for oracle in ("fused", "scan"):
        assert losses[f"jax_{oracle}"] == pytest.approx(losses["jax_vmap"], rel=1e-5)
    assert len((tmp_path / "epochs.csv").read_text().splitlines()) == 1 + 3
    assert (tmp_path / "epochs.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert f"{tmp_path}: running" in out
    assert "| hardvary, scan over environments |" in out
    assert "times as fast" not in out

    assert run("--out", tmp_path) == 0
    assert f"{tmp_path}: finished; --overwrite" in capsys.readouterr().out
    # A run with PyTorch is another run, not another config of this one.
    code = run("--out", tmp_path, "--torch-python", "python", "--overwrite")
    assert code == 2
    assert "not of benchmark epochs with PyTorch" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_epochs_with_an_interpreter_that_is_not_there_says_so(tmp_path, capsys):
    missing = tmp_path / "python"
    assert run("--out", tmp_path / "run", "--torch-python", missing) == 2
    assert f"--torch-python {missing}: No such file" in capsys.readouterr().err


def test_epochs_with_an_interpreter_without_torch_says_so(tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert run("--out", tmp_path / "run", "--torch-python", python) == 2
    assert "the PyTorch process ended early" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
    ],
)
def test_epochs_invalid_value_is_one_line_and_exit_2(arguments, message, capsys):
    assert run(*arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--optimizer", "sgd"),
        ("--schedule", "cosine"),
        ("--l1", "0.1"),
        ("--weight-decay", "0.1"),
    ],
)
def test_epochs_setting_that_the_peers_lack_is_refused(tmp_path, capsys, flag, value):
    out = tmp_path / "run"
    assert run("--out", out, "--torch-python", "python", flag, value) == 2
    error = only_error(capsys.readouterr().err)
    assert f"{flag[2:].replace('-', '_')} must be" in error
    assert not out.exists()


@pytest.mark.parametrize("flag", ["--torch", "--no-torch"])
def test_epochs_torch_is_not_a_flag(flag, capsys):
    with pytest.raises(SystemExit):
        run(flag)
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("loss", [0.7 * 1.002, float("nan")])
def test_measure_other_losses_are_refused(loss):
    def contestant(loss):
        return lambda: {"seconds": 1.0, "loss": loss}

    contestants = {"a": contestant(0.7), "b": contestant(0.7 * 1.0005)}
    assert len(measure(contestants, 2)[1]) == 2
    with pytest.raises(RunDirError, match="do not train the same"):
        measure({**contestants, "c": contestant(loss)}, 2)


def profile(*arguments):
    argv = ["profile", "--preset", "smoke", *map(str, arguments)]
    return main(PROG, COMMANDS, argv)


def test_profile_has_every_part_of_both_trainings(tmp_path, capsys):
    assert profile("--out", tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = [(row["method"], row["part"]) for row in summary["rows"]]
    averaged = [part for part in DUES if part != "signs and mask"]
    assert found == [("erm", part) for part in averaged] + [
        ("and_mask", part) for part in DUES
    ]
    assert all(row["due_milliseconds"] >= 0 for row in summary["rows"])
    for per_method in (summary["epoch_milliseconds"], summary["compile_seconds"]):
        assert set(per_method) == {"erm", "and_mask"}
        assert all(value > 0 for value in per_method.values())
    lines = (tmp_path / "profile.csv").read_text().splitlines()
    assert lines[0] == "method,part,milliseconds,due_milliseconds"
    assert len(lines) == 1 + len(found)
    # What was timed on the way is gone.
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert format_table(summary) in capsys.readouterr().out


def test_profile_parts_add_up_to_what_was_timed():
    seconds = {
        "order": 1.0,
        "batches": 2.0,
        "forward": 10.0,
        "gradients": 30.0,
        "steps, erm": 35.0,
        "steps, and_mask": 42.0,
        "evaluation": 5.0,
        "call, erm": 0.5,
        "call, and_mask": 0.75,
        "metrics, erm": 0.25,
        "metrics, and_mask": 0.5,
        "save": 20.0,
    }
    averaged = parts_of("erm", seconds, checkpoint_every=10)
    masked = parts_of("and_mask", seconds, checkpoint_every=10)
    assert averaged["backward"] == 20
    assert masked["signs and mask"] == 7
    assert sum(averaged.values()) == 35 + 1 + 5 + 0.5 + 0.25 + 2
    assert sum(masked.values()) == 42 + 1 + 5 + 0.75 + 0.5 + 2


def test_profile_dues_are_those_of_a_count_by_hand():
    config = PROFILES["smoke"]  # 4 x 64 examples of 6 inputs, 16 and 16 units
    seconds = {"products": 1e-3, "passes": 1e-3, "sort": 7.0, "bytes": 4.0}
    dues = due_seconds(config, seconds)
    rate = 32 * 2 * (4 * 32) * 16 * 16 / 1e-3
    kernels = 6 * 16 + 16 * 16 + 16
    assert dues["forward"] == pytest.approx(2 * kernels * 4 * 64 / rate)
    backward = 2 * (2 * kernels - 6 * 16) * 4 * 64
    assert dues["backward"] == pytest.approx(backward / rate)
    evaluated = 4 * 64 + 4 * 128 + 128 * 16 + 2000
    assert dues["evaluation"] == pytest.approx(2 * kernels * evaluated / rate)
    bandwidth = 32 * 2 * 16 * 16 * 4 / 1e-3
    params = kernels + 16 + 16 + 1
    adam = 2 * 7 * params * 4 / bandwidth
    assert dues["decay, Adam, parameters"] == pytest.approx(adam)
    assert dues["order of the examples"] == 7
    assert dues["checkpoints"] == 4 / config.checkpoint_every


def test_profile_invalid_value_is_one_line_and_exit_2(capsys):
    assert profile("--rounds", "0") == 2
    error = only_error(capsys.readouterr().err)
    assert error == "error: rounds must be at least 1, got 0"
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ProfileConfig(batch_size=0)
