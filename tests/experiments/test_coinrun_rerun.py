"""Chosen settings with other seeds: what is trained, the means, and the command."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.image import imread

from experiments.coinrun.__main__ import COMMANDS
from experiments.coinrun.student.config import (
    METHODS,
    RERUN_PRESETS,
    RerunConfig,
    TrainConfig,
    shared_settings,
)
from experiments.coinrun.student.rerun import load_selected, summarize, train_configs
from experiments.common.cli import main
from experiments.common.run_dir import RunDirError
from tests.experiments.conftest import read_csv

SMOKE = RERUN_PRESETS["smoke"]
CHOSEN = {
    "adam": {
        "method": "adam",
        "learning_rate": 0.01,
        "b1": 0.5,
        "weight_decay": 0.0,
        "decay": "off",
    },
    "and_mask": {
        "method": "and_mask",
        "learning_rate": 0.02,
        "b1": 0.4,
        "b3": 0.5,
        "threshold": 0.3,
        "weight_decay": 0.01,
        "decay": "coupled",
    },
}


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """A search's choice, as it writes it."""
    path = tmp_path_factory.mktemp("search") / "selected.json"
    path.write_text(json.dumps(CHOSEN))
    return path


def rerun(*arguments):
    arguments = ["rerun", "--preset", "smoke", "--epochs", "1", *map(str, arguments)]
    return main("python -m experiments.coinrun", COMMANDS, arguments)


def test_train_configs_are_the_choice_at_the_shared_size_with_every_seed(selected):
    configs = train_configs(SMOKE, load_selected(selected))
    assert [(config.seed, config.method) for config in configs] == [
        (seed, method) for seed in (1, 2) for method in METHODS
    ]
    for config in configs:
        assert shared_settings(config) == shared_settings(SMOKE)
        for name, value in CHOSEN[config.method].items():
            assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{}", "has no 'adam'"),
        (json.dumps({"adam": CHOSEN["adam"]}), "has no 'and_mask'"),
        (json.dumps({**CHOSEN, "adam": {"tau": 1}}), "has tau, which"),
        (json.dumps({**CHOSEN, "adam": {"b1": 2.0}}), r"b1 must be in \[0, 1\)"),
        (json.dumps({**CHOSEN, "adam": CHOSEN["and_mask"]}), "method must be one of"),
    ],
)
def test_load_selected_what_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "selected.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RunDirError, match=f"{message}.*--selected takes selected.json"):
        load_selected(path)


def rows_with(adam, and_mask):
    """Summaries of runs with these test KLs, by seed."""
    return [
        {
            "method": method,
            "seed": seed,
            "test_kl": kl,
            "min_test_kl": float(kl) / 2,
            "train_kl": float(kl) / 4,
            "test_accuracy": 0.5,
            "open_fraction": 1.0,
        }
        for method, kls in (("adam", adam), ("and_mask", and_mask))
        for seed, kl in enumerate(kls)
    ]


def test_summarize_is_means_over_seeds_and_their_difference():
    rows = rows_with((3.0, 5.0), (1.0, 2.0))
    summary = summarize(rows[::-1])
    assert summary == summarize(rows)
    adam = summary["methods"]["adam"]
    assert adam["seeds"] == 2
    assert adam["test_kl"] == {"mean": 4.0, "low": 3.0, "high": 5.0}
    assert adam["min_test_kl"]["mean"] == 2.0
    gain = summary["adam_minus_and_mask"]
    assert gain["mean"] == 2.5
    # Of the seeds' differences, which are 2 and 3.
    assert (gain["low"], gain["high"]) == (2.0, 3.0)


def test_summarize_counts_seeds_that_diverged_and_leaves_them_out():
    # As a summary.json has it.
    summary = summarize(rows_with(("nan", 5.0, 4.0), (1.0, 2.0, "nan")))
    adam, masked = (summary["methods"][method] for method in METHODS)
    assert (adam["seeds"], adam["diverged"]) == (3, 1)
    assert adam["test_kl"]["mean"] == 4.5
    assert masked["test_kl"]["mean"] == 1.5
    assert summary["adam_minus_and_mask"]["mean"] == 3.0
    with pytest.raises(RunDirError, match="no seed with which neither method diverged"):
        summarize(rows_with(("nan", 5.0), (1.0, "nan")))


def test_rerun_smoke_trains_all_and_goes_on_where_it_was_stopped(
    selected, tmp_path, capsys
):
    path = tmp_path / "run"
    arguments = ("--selected", selected, "--out", path)
    assert rerun(*arguments) == 0
    rows = read_csv(path / "reruns.csv")
    assert [(row["method"], row["seed"], row["epoch"]) for row in rows] == [
        (method, str(seed), "1") for seed in (1, 2) for method in METHODS
    ]
    assert len({row["test_kl"] for row in rows}) == 4
    summary = json.loads((path / "summary.json").read_text())
    for method in METHODS:
        own = [float(row["test_kl"]) for row in rows if row["method"] == method]
        assert summary["methods"][method]["test_kl"]["mean"] == np.mean(own)
    config = json.loads((path / "and_mask-seed2" / "config.json").read_text())
    settings = config["config"]
    assert settings.pop("data_sha256") == "generated"
    assert TrainConfig(**settings).threshold == 0.3
    assert imread(path / "reruns.png").std() > 0.01
    table = (path / "reruns.csv").read_bytes()
    (path / "summary.json").unlink()
    (path / "adam-seed2" / "summary.json").unlink()
    kept = (path / "adam-seed1" / "metrics.csv").stat().st_mtime_ns
    assert rerun(*arguments) == 0
    assert (path / "reruns.csv").read_bytes() == table
    assert (path / "adam-seed1" / "metrics.csv").stat().st_mtime_ns == kept
    out = capsys.readouterr().out
    assert "adam: 2 seeds, 0 diverged; last epoch: test KL" in out
    assert "adam minus and_mask: " in out
    redrawn = tmp_path / "redrawn"
    assert rerun("--from", path, "--out", redrawn) == 0
    assert (redrawn / "reruns.png").read_bytes() == (path / "reruns.png").read_bytes()


def test_rerun_of_other_settings_in_the_same_directory_is_refused(
    selected, tmp_path, capsys
):
    path = tmp_path / "run"
    path.mkdir()
    other = tmp_path / "selected.json"
    changed = {**CHOSEN, "adam": {**CHOSEN["adam"], "b1": 0.6}}
    other.write_text(json.dumps(changed))
    identity = dataclasses.asdict(dataclasses.replace(SMOKE, epochs=1))
    identity |= {"selected": CHOSEN, "data_sha256": "generated"}
    (path / "config.json").write_text(
        json.dumps({"experiment": "coinrun rerun", "config": identity})
    )
    assert rerun("--selected", other, "--out", path) == 2
    assert "selected" in capsys.readouterr().err
    assert rerun("--selected", tmp_path / "none.json", "--out", tmp_path / "new") == 2
    assert "finished search" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_rerun_config_invalid_seeds_are_refused():
    with pytest.raises(ValueError, match="seeds must be in ascending order"):
        RerunConfig(seeds=(3, 2))
