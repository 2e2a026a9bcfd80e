"""add_l1_decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from tests._asserts import assert_trees_close, assert_trees_equal
from tests._inputs import make_params


def test_add_l1_decay_is_the_gradient_of_the_l1_norm():
    params = {"w": jnp.array([2.0, -3.0]), "b": jnp.array(-0.5)}
    updates = jax.tree.map(lambda p: 10 * p, params)
    tx = hardvary.add_l1_decay(0.25)
    actual, _ = tx.update(updates, tx.init(params), params)

    def penalty(params):
        return 0.25 * sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params))

    expected = jax.tree.map(jnp.add, updates, jax.grad(penalty)(params))
    assert_trees_close(actual, expected, rtol=1e-7)


def test_add_l1_decay_on_zero_parameters_adds_nothing():
    tx = hardvary.add_l1_decay(0.25)
    updates, _ = tx.update(jnp.ones(3), tx.init(jnp.zeros(3)), jnp.zeros(3))
    np.testing.assert_array_equal(updates, np.ones(3))


@pytest.mark.parametrize(
    "mask",
    [
        {"dense": True, "scale": False, "none": None},
        lambda _: {
            "dense": {"kernel": True, "bias": True},
            "scale": False,
            "none": None,
        },
    ],
    ids=["prefix", "callable"],
)
def test_add_l1_decay_mask_decays_only_what_it_names(mask):
    params = make_params("nested")
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = hardvary.add_l1_decay(0.25, mask=mask)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert float(updates["scale"]) == 0
    np.testing.assert_array_equal(updates["dense"]["kernel"], np.full((3, 4), 0.25))


def test_add_l1_decay_with_a_schedule_follows_it_under_jit():
    # One compilation: the count is traced.
    tx = hardvary.add_l1_decay(lambda count: jnp.where(count < 2, 0.5, 0.25))
    params, traces = jnp.array([2.0, -3.0]), []

    @jax.jit
    def step(state):
        traces.append(1)
        return tx.update(jnp.ones(2), state, params)

    state, seen = tx.init(params), []
    for _ in range(4):
        updates, state = step(state)
        seen.append(updates.tolist())
    assert seen == [[1.5, 0.5]] * 2 + [[1.25, 0.75]] * 2
    assert len(traces) == 1
    assert int(optax.tree.get(state, "count")) == 4


def test_add_l1_decay_with_a_schedule_and_a_mask_follows_both():
    params = make_params("nested")
    zeros = jax.tree.map(jnp.zeros_like, params)
    mask = {"dense": True, "scale": False, "none": None}
    tx = hardvary.add_l1_decay(
        lambda count: jnp.where(count == 0, 0.25, 0.5), mask=mask
    )
    state = tx.init(params)
    for strength in (0.25, 0.5):
        updates, state = tx.update(zeros, state, params, unknown="x")
        np.testing.assert_array_equal(updates["dense"]["bias"], np.full(4, strength))
        assert float(updates["scale"]) == 0


def test_add_l1_decay_state_without_a_schedule_is_empty():
    tx = hardvary.add_l1_decay(0.25)
    assert tx.init(jnp.ones(2)) == optax.EmptyState()


def test_add_l1_decay_with_a_schedule_of_no_scalar_raises():
    tx = hardvary.add_l1_decay(lambda count: jnp.ones(2))
    with pytest.raises(TypeError, match="what the schedule strength returns must be"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))


@pytest.mark.parametrize("value", [np.inf, np.nan, -1e-3])
def test_add_l1_decay_strength_that_is_not_finite_raises(value):
    with pytest.raises(
        ValueError, match=f"strength must be finite and >= 0, got {value}"
    ):
        hardvary.add_l1_decay(value)


def test_add_l1_decay_in_float16_rounds_the_sum_once():
    tx = hardvary.add_l1_decay(0.1)
    params = jnp.ones(2, jnp.float16)
    updates = jnp.array([0.001, 6e4], jnp.float16)
    actual, _ = tx.update(updates, tx.init(params), params)
    expected = (updates.astype(jnp.float32) + 0.1).astype(jnp.float16)
    assert_trees_equal(actual, expected)
    # 0.1 rounded first comes out elsewhere.
    assert float(actual[0]) != float(updates[0] + jnp.float16(0.1))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("update_dtype", ["float32", "bfloat16"])
def test_add_l1_decay_of_mixed_precision_keeps_the_update_dtype(
    update_dtype, param_dtype
):
    params = jnp.array([2.0, -3.0], param_dtype)
    tx = hardvary.add_l1_decay(0.25)
    updates, _ = tx.update(jnp.zeros(2, update_dtype), tx.init(params), params)
    assert_trees_equal(updates, jnp.array([0.25, -0.25], update_dtype))


def test_add_l1_decay_behind_the_optimizer_moves_masked_weights():
    # The order of the chain decides: a closed AND-mask must not stop the decay.
    params = jnp.array([1.0, -1.0])
    grads = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
    tx = optax.chain(hardvary.and_mask(1.0), hardvary.add_l1_decay(0.5), optax.sgd(1.0))
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates, [-0.5, 0.5])
