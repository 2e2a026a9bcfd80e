"""The benchmark without PyTorch, and what it says when PyTorch is not there."""

import json

import pytest

from experiments.benchmark.__main__ import COMMANDS, PROG
from experiments.common.cli import main


def run(*arguments):
    argv = ["epochs", "--preset", "smoke", "--rounds", "3", *map(str, arguments)]
    return main(PROG, COMMANDS, argv)


def test_epochs_without_torch_measures_both_oracles(tmp_path, capsys):
    assert run("--out", tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["median_seconds_per_epoch"]) == {"jax_scan", "jax_vmap"}
    assert all(t > 0 for t in summary["median_seconds_per_epoch"].values())
    losses = summary["first_epoch_loss"]
    assert losses["jax_scan"] == pytest.approx(losses["jax_vmap"], rel=1e-5)
    assert len((tmp_path / "epochs.csv").read_text().splitlines()) == 1 + 3
    assert (tmp_path / "epochs.png").read_bytes().startswith(b"\x89PNG")
    assert "| hardvary, scan over environments |" in capsys.readouterr().out


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
