"""The comparisons with the definition accept what is right, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardvary import GradStats
from tests.zoo import ZOO, Stacked, assert_stats_match, fields_by_path
from tests.zoo.blocks import floats
from tests.zoo.compare import (
    FIELDS,
    assert_combinations_match,
    assert_gramians_match,
    assert_norms_match,
)

ENV_WEIGHTS = np.array([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])
SIGNED = np.array([1.0, -2.0, 5.0, 0.0, 0.5, 1.0])


@functools.cache
def case():
    params, loss_fn, batch = ZOO["dense_one_row"](np.random.default_rng(0))
    return params, Stacked(loss_fn, params, batch)


def fields_of(stacked, weights):
    """Statistics in float32, from the gradients themselves."""
    found = {}
    for path, grad in stacked.grads.items():
        grad = np.where(weights.reshape(-1, *[1] * (grad.ndim - 1)) > 0, grad, 0)
        total = functools.partial(np.tensordot, weights, axes=1)
        sums = {
            "mean": total(grad) / weights.sum(),
            "sign_sum": total(np.sign(grad)),
            "square_mean": total(grad**2) / weights.sum(),
            "log_abs_mean": total(np.log(np.abs(grad) + 1e-10)) / weights.sum(),
            "abs_mean": total(np.abs(grad)) / weights.sum(),
            "nonzero_sum": total(1.0 * (grad != 0)),
            "num_envs": weights.sum(),
        }
        found[path] = {k: np.asarray(v, np.float32) for k, v in sums.items()}
    return found


@pytest.mark.parametrize("weights", [None, ENV_WEIGHTS], ids=["plain", "weighted"])
def test_comparisons_accept_the_definition_in_float32(weights):
    params, stacked = case()
    fields = fields_of(stacked, np.ones(6) if weights is None else weights)
    assert assert_stats_match(fields, params, stacked, weights) > 0.9

    def single(answers):
        return {path: np.asarray(leaf, np.float32) for path, leaf in answers.items()}

    assert_gramians_match(single(stacked.gramian(weights)), stacked, weights)
    assert_norms_match(single(stacked.norms(weights)), stacked, weights)
    combined = single(stacked.combine(SIGNED, weights))
    assert_combinations_match(combined, stacked, SIGNED, weights)


@pytest.mark.parametrize("field", [*FIELDS.values(), "num_envs"])
@pytest.mark.parametrize("wrong", [lambda x: x + 0.25, lambda x: x * np.nan])
def test_comparison_of_statistics_rejects_what_is_off_or_nan(field, wrong):
    params, stacked = case()
    fields = fields_of(stacked, ENV_WEIGHTS)
    # The parameter whose statistic is smallest: shares of it are smallest as well.
    path = min(fields, key=lambda path: np.abs(fields[path][field]).max())
    fields[path][field] = wrong(fields[path][field])
    with pytest.raises(AssertionError):
        assert_stats_match(fields, params, stacked, ENV_WEIGHTS)


def votes_where_gradients_are_zero(loss_fn, params, batch):
    """Compares statistics in which zeros are votes, as rounding would cast them."""
    stacked = Stacked(loss_fn, params, batch)
    weights = np.ones(len(stacked.losses))
    fields = fields_of(stacked, weights)
    assert_stats_match(fields, params, stacked)
    zero = {path: grad == 0 for path, grad in stacked.grads.items()}
    assert any(every.any() for every in zero.values())
    for path, every in zero.items():
        fields[path]["nonzero_sum"] += every.sum(0)
        fields[path]["sign_sum"] -= every.sum(0)
    assert_stats_match(fields, params, stacked)


def test_comparison_accepts_votes_of_gradients_that_cancel():
    def loss_fn(params, x):
        # Each is divided by its own norm: nothing is left but its sign.
        signs = params["w"] / jnp.sqrt(params["w"] * params["w"])
        return jnp.vdot(signs, x) + 100 * jnp.vdot(params["v"], x)

    rng = np.random.default_rng(0)
    x = floats(rng.normal(size=(6, 5)))
    w, v = floats(rng.normal(size=(2, 5)))
    votes_where_gradients_are_zero(loss_fn, {"w": w, "v": v}, x)


@pytest.mark.parametrize("kind", ["masked", "dead", "absent"])
def test_comparison_rejects_votes_of_gradients_that_the_model_has_not(kind):
    def loss_fn(params, x):
        masked = params * jnp.float32([0, 0, 1, 1, 1]) if kind == "masked" else params
        dead = jax.nn.relu(masked + 3 * jnp.sign(x)) if kind == "dead" else masked
        used = dead[:3] if kind == "absent" else dead
        return jnp.vdot(used, x[: len(used)])

    x = floats(np.random.default_rng(0).normal(size=(6, 5)))
    with pytest.raises(AssertionError, match="off by"):
        votes_where_gradients_are_zero(loss_fn, jnp.ones(5), x)


@pytest.mark.parametrize("wrong", [lambda x: x * 1.001, lambda x: x * np.nan])
@pytest.mark.parametrize(
    ("answer", "check"),
    [
        ("gramian", assert_gramians_match),
        ("norms", assert_norms_match),
        ("combine", assert_combinations_match),
    ],
)
def test_comparison_of_products_rejects_what_is_off_or_nan(answer, check, wrong):
    _, stacked = case()
    asked = (SIGNED,) if answer == "combine" else ()
    answers = getattr(stacked, answer)(*asked, ENV_WEIGHTS)
    for path in answers:
        with pytest.raises(AssertionError, match="off by"):
            check({**answers, path: wrong(answers[path])}, stacked, *asked, ENV_WEIGHTS)


@pytest.mark.parametrize("answer", ["gramian", "norms"])
def test_absent_environments_have_products_of_zero(answer):
    _, stacked = case()
    check = {"gramian": assert_gramians_match, "norms": assert_norms_match}[answer]
    with pytest.raises(AssertionError, match="off by"):
        check(getattr(stacked, answer)(), stacked, ENV_WEIGHTS)


def test_fields_of_another_tree_are_refused():
    params = {"a": jnp.zeros(2), "b": [jnp.zeros(()), None]}
    a, b = (GradStats(mean=leaf, num_envs=3.0) for leaf in jax.tree.leaves(params))
    fields = fields_by_path({"a": a, "b": [b, None]}, params)
    assert list(fields) == ["['a']", "['b'][0]"]
    assert fields["['a']"].keys() == {"mean", "num_envs"}
    for stats in ({"a": a, "b": [b]}, {"a": a, "b": [b, a]}, [a, b]):
        with pytest.raises(AssertionError):
            fields_by_path(stats, params)
