"""`consistency`: the search from trained networks, and its command."""

import csv
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.cli import main
from experiments.common.figures import read_table
from experiments.synthetic.__main__ import COMMANDS
from experiments.synthetic.commands import summarize_consistency
from experiments.synthetic.config import (
    CONSISTENCY_PRESETS,
    PRESETS,
    ConsistencyConfig,
)
from experiments.synthetic.consistency import VARIATIONS, draw_pairs, measure
from experiments.synthetic.training import dataset_for, make_keys, make_trainer

SMOKE = CONSISTENCY_PRESETS["smoke"]


def consistency(*arguments):
    command = ["consistency", "--preset", "smoke", *map(str, arguments)]
    return main("python -m experiments.synthetic", COMMANDS, command)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Directory of a finished run."""
    path = tmp_path_factory.mktemp("consistency") / "run"
    assert consistency("--out", path) == 0
    return path


def test_command_writes_a_row_for_every_network_variation_and_distance(path):
    rows = list(csv.DictReader((path / "consistency.csv").read_text().splitlines()))
    keys = [(r["method"], r["seed"], r["variation"], r["distance"]) for r in rows]
    assert len(set(keys)) == len(rows) == 2 * 2 * 2 * 2
    for row in rows:
        assert float(row["mean_pair_score"]) <= float(row["score"])
        assert float(row["max_deviation"]) <= SMOKE.epsilon
        assert 0 <= float(row["other_accuracy"]) <= 1
    assert (path / "consistency.png").stat().st_size > 10_000
    summary = json.loads((path / "summary.json").read_text())
    scores = [
        float(r["score"])
        for r in rows
        if (r["method"], r["variation"], r["distance"]) == ("erm", "scales", "0.3")
    ]
    measured = summary["scales, erm"]
    assert math.isclose(measured["ilc"][1], -np.mean(scores), rel_tol=1e-6)
    error = abs(scores[0] - scores[1]) / 2
    assert math.isclose(measured["standard_error"][1], error, rel_tol=1e-6)


def test_command_finished_is_not_run_again(path, capsys):
    before = (path / "consistency.csv").stat().st_mtime_ns
    assert consistency("--out", path) == 0
    assert "finished; --overwrite runs it again" in capsys.readouterr().out
    assert (path / "consistency.csv").stat().st_mtime_ns == before


def test_command_draws_again_from_its_table(path, tmp_path):
    assert consistency("--from", path, "--out", tmp_path) == 0
    name = "consistency.png"
    assert (tmp_path / name).read_bytes() == (path / name).read_bytes()


def test_command_interrupted_goes_on_with_the_networks_that_are_missing(path, capsys):
    whole = (path / "consistency.csv").read_bytes()
    first = path / "erm-seed0" / "searches.csv"
    before = first.stat().st_mtime_ns
    # As a kill in the middle of the last network leaves it.
    (path / "and_mask-seed1" / "searches.csv").unlink()
    for name in ("summary.json", "consistency.csv", "consistency.png"):
        (path / name).unlink()
    assert consistency("--out", path) == 0
    assert (path / "consistency.csv").read_bytes() == whole
    assert first.stat().st_mtime_ns == before


def test_summary_of_a_single_seed_has_no_error(path):
    rows = [r for r in read_table(path / "consistency.csv") if r["seed"] == 0]
    summary = summarize_consistency(rows, VARIATIONS)
    assert summary["weights, erm"]["standard_error"] == [0.0, 0.0]


def test_pairs_are_different_environments_without_repetition():
    config = dataclasses.replace(SMOKE, num_pairs=12)
    pairs = np.asarray(draw_pairs(config))
    assert len({tuple(pair) for pair in pairs}) == 12
    assert (pairs[:, 0] != pairs[:, 1]).all()
    np.testing.assert_array_equal(draw_pairs(SMOKE), pairs[:2])


def test_scales_cannot_take_up_what_a_network_ignores():
    """A network of zeros gives every example the loss log 2, whatever its scales."""
    config = dataclasses.replace(SMOKE, distances=(0.3,))
    train_config = config.train_configs()[0]
    trainer, keys = make_trainer(train_config), make_keys(0)
    variables = trainer.init(keys).variables
    variables = jax.tree.map(jnp.zeros_like, variables)
    dataset = dataset_for(train_config, 0)
    measured = measure(config, "scales", variables, dataset.train)
    np.testing.assert_allclose(measured.scores, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be positive and finite"),
        ({"distances": ()}, "distances must be one or more"),
        ({"distances": (0.3, 0.1)}, "ascending order"),
        ({"distances": (-0.1,)}, "distances must be positive"),
        ({"num_pairs": 0}, "num_pairs must be between 1 and 12"),
        ({"num_pairs": 13}, "num_pairs must be between 1 and 12"),
        ({"examples": 65}, r"examples must be between 1 and examples_per_env \(64\)"),
        ({"search_steps": 0}, "search_steps must be at least 1"),
        ({"search_starts": 0}, "search_starts must be at least 1"),
        ({"searches_at_once": 0}, "searches_at_once must be at least 1"),
        ({"seeds": (1, 0)}, "seeds must be in ascending order"),
        ({"methods": ("erm", "erm")}, "methods must be one or more different"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyConfig(**{**PRESETS["smoke"], "examples": 16, **changes})
