"""Where the AND-mask acts: the chains, against loops in NumPy, and the command."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from experiments.common.cli import main
from experiments.common.figures import read_table
from experiments.synthetic.__main__ import COMMANDS
from experiments.synthetic.config import (
    PLACEMENT_PRESETS,
    PLACEMENTS,
    PRESETS,
    PlacementConfig,
    TrainConfig,
)
from experiments.synthetic.training import make_optimizer

RATE, B1, B2, EPS = 1e-2, 0.8, 0.9, 1e-8
STEPS, ENVS, SIZE = 3, 4, 200


def config(**changes):
    adam = {"learning_rate": RATE, "b1": B1, "b2": B2, "eps": EPS, "l2": 0.0}
    settings = {**PRESETS["smoke"], **adam, "oracle": "vmap", **changes}
    return TrainConfig(**settings)


@pytest.fixture(scope="module")
def grads():
    """[step, env, component], a third of which agree."""
    noise = np.random.default_rng(0).normal(size=(STEPS, ENVS, SIZE))
    return (noise + 0.7).astype(np.float32)


def updates_of(config, grads):
    """[step, component] updates, and the kept fractions, of parameters at 1."""
    optimizer = make_optimizer(config, jax.random.key(0))
    params = np.ones(SIZE, np.float32)
    state, updates, kept = optimizer.init(params), [], []
    for gradient in grads:
        update, state = optimizer.update(gradient, state, params)
        updates.append(update)
        kept.append(float(optax.tree.get(state, "kept_fraction", 1.0)))
    return np.array(updates), kept


def agreed(values):
    """Where all environments, the axis before the last, have the same sign."""
    return np.abs(np.sign(values).sum(axis=-2)) == ENVS


def test_moments_are_averages_of_each_environment_that_vote_and_are_normalised(grads):
    first, second = np.zeros((ENVS, SIZE)), np.zeros(SIZE)
    updates, kept = updates_of(config(placement="moments"), grads)
    for t, gradient in enumerate(grads, 1):
        first = B1 * first + (1 - B1) * gradient
        averages = first / (1 - B1**t)
        passed = agreed(averages)
        masked = np.where(passed, averages.mean(axis=0), 0)
        second = B2 * second + (1 - B2) * masked**2
        step = masked / (np.sqrt(second / (1 - B2**t)) + EPS)
        np.testing.assert_allclose(updates[t - 1], -RATE * step, rtol=1e-4, atol=1e-7)
        assert kept[t - 1] == pytest.approx(passed.mean(), abs=1e-6)
        assert 0.1 < passed.mean() < 0.9


def test_update_is_adam_of_the_mean_where_the_gradients_of_the_step_agree(grads):
    updates, kept = updates_of(config(placement="update", l2=0.1), grads)
    plain, _ = updates_of(config(method="erm", l2=0.1), grads.mean(axis=1))
    np.testing.assert_allclose(
        updates, np.where(agreed(grads), plain, 0), rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(kept, agreed(grads).mean(axis=1), atol=1e-6)


def test_moments_without_memory_are_the_gradients(grads):
    gradients, _ = updates_of(config(b1=0.0, l2=0.1), grads)
    moments, _ = updates_of(config(b1=0.0, l2=0.1, placement="moments"), grads)
    np.testing.assert_allclose(moments, gradients, rtol=1e-5)


@pytest.mark.parametrize("placement", ["moments", "update"])
def test_weight_decay_is_past_the_mask_at_every_placement(placement, grads):
    opposed = np.where(np.arange(ENVS) % 2, 1, -1)[:, None] * np.abs(grads[:1])
    updates, kept = updates_of(config(placement=placement, weight_decay=0.5), opposed)
    assert kept == [0]
    np.testing.assert_allclose(updates, -RATE * 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "last"}, "placement must be one of gradients, moments, update"),
        ({"method": "erm"}, "placement must be gradients for all but and_mask"),
        ({"optimizer": "sgd"}, "and_mask with adam and without rescale"),
        ({"rescale": True}, "and_mask with adam and without rescale"),
        ({"oracle": "fused"}, "oracle must be vmap for placement=moments.*got 'fused'"),
    ],
    ids=str,
)
def test_train_config_placements_that_there_are_none_of_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**{"placement": "moments", **changes})


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("placements", ("last",), "one of gradients, moments, update"),
        ("placements", (), "one or more different placements"),
        ("thresholds", (1.5,), "in [0, 1]"),
        ("weight_decays", (0.0, 0.0), "one or more different numbers"),
        ("weight_decays", (-1.0,), "non-negative and finite"),
        ("seeds", (1, 0), "in ascending order"),
    ],
)
def test_placement_config_invalid_value_names_field_and_rule(field, value, rule):
    with pytest.raises(ValueError, match=f"{field} must be") as error:
        PlacementConfig(**{field: value})
    assert rule in str(error.value)


def test_train_configs_differ_in_nothing_else():
    runs = PLACEMENT_PRESETS["cpu"].train_configs()
    assert len(set(runs)) == len(runs) == 3 * 2 * 2 * 3
    same = {"placement": "gradients", "threshold": 1.0, "weight_decay": 0.0, "seed": 0}
    assert len({dataclasses.replace(run, **same) for run in runs}) == 1


def test_placement_trains_every_placement_and_is_not_done_twice(tmp_path, capsys):
    path = tmp_path / "run"
    command = ["placement", "--preset", "smoke", "--epochs", "2", "--out", str(path)]
    for _ in range(2):
        assert main("python -m experiments.synthetic", COMMANDS, command) == 0
        printed = capsys.readouterr().out
        assert all(placement in printed for placement in PLACEMENTS)
    assert "finished" in printed
    rows = read_table(path / "placement.csv")
    expected = [(placement, seed) for placement in PLACEMENTS for seed in (0, 1)]
    assert [(row["placement"], row["seed"]) for row in rows] == expected
    assert len({row["loss"] for row in rows}) == len(rows)
    assert all(0 < row["kept_fraction"] < 1 for row in rows)
