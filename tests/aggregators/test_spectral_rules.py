"""`imtl_g`, `aligned_mtl` and `config` by their definitions, whatever the sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hardvary
from tests._compat import enable_x64

RULES = {
    "imtl_g": hardvary.imtl_g,
    "aligned_mtl": hardvary.aligned_mtl,
    "config": hardvary.config,
}
every_rule = pytest.mark.parametrize("name", RULES)
# Powers of 2: they multiply gradients without rounding.
SIZES = {"equal": [0, 0, 0, 0], "apart": [14, 0, 0, 7], "far": [-12, 0, 12, 0]}
ORDERS = st.permutations(range(4))
POWERS = st.lists(st.integers(-12, 12), min_size=4, max_size=4)
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@functools.cache
def jitted(name):
    tx = RULES[name]()
    return jax.jit(lambda grads: tx.update(grads, tx.init(None))[0])


def draw(sizes, seed=0, dtype=np.float32):
    """Gradients `[4, 9]`; every one times 2 to the power of its size."""
    grads = np.random.default_rng(seed).normal(size=(len(sizes), 9)).astype(dtype)
    return grads * 2.0 ** np.asarray(sizes, dtype)[:, None]


def projections(grads, update):
    """The update's products with gradients of length 1, in float64."""
    rows = np.asarray(grads, np.float64)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units @ np.asarray(update, np.float64)


def aligned(grads):
    """The rule from the gradients themselves, which squares nothing."""
    rows = np.asarray(grads, np.float64)
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    inside = values > 1e-12 * values.max()
    polar = left[:, inside] @ right[inside]
    return values[inside].min() * polar.mean(0)


@every_size
@pytest.mark.parametrize("name", ["imtl_g", "config"])
def test_update_projects_on_every_gradient_alike(name, sizes):
    grads = draw(sizes)
    found = projections(grads, jitted(name)(grads))
    np.testing.assert_allclose(found, found[0], rtol=2e-4)
    if name == "config":
        assert found.min() > 0


def test_imtl_g_can_go_against_gradients_that_have_no_conflict():
    # By hand: (1, 1, -1) projects on each as 1, with weights 3, 3 and -3 / 0.45.
    grads = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.3, 0.3, 0.15]])
    np.testing.assert_allclose(jitted("imtl_g")(grads), [-1.5, -1.5, 1.5], rtol=1e-4)
    assert (grads @ jitted("config")(grads)).min() > 0


@every_size
def test_imtl_g_has_weights_with_the_sum_1(sizes):
    grads = draw(sizes)
    update = np.asarray(jitted("imtl_g")(grads), np.float64)
    scaled = np.asarray(grads, np.float64) / 2.0 ** np.asarray(sizes)[:, None]
    weights = np.linalg.lstsq(scaled.T, update, rcond=None)[0]
    total = np.sum(weights / 2.0 ** np.asarray(sizes))
    np.testing.assert_allclose(total, 1, rtol=1e-4)


@every_size
def test_config_is_as_long_as_all_gradients_project_on_it(sizes):
    grads = draw(sizes)
    update = np.asarray(jitted("config")(grads), np.float64)
    length = np.linalg.norm(update)
    expected = np.sum(np.asarray(grads, np.float64) @ update) / length
    np.testing.assert_allclose(length, expected, rtol=1e-4)


@every_size
def test_aligned_mtl_is_the_mean_of_the_polar_factor(sizes):
    grads = draw(sizes)
    expected = aligned(grads)
    allowed = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(jitted("aligned_mtl")(grads), expected, atol=allowed)


@given(ORDERS, POWERS)
def test_aligned_mtl_of_any_sizes_in_any_order_is_the_polar_factor(order, sizes):
    grads = draw(sizes)[np.asarray(order)]
    expected = aligned(grads)
    allowed = 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(jitted("aligned_mtl")(grads), expected, atol=allowed)


@given(ORDERS, POWERS)
def test_imtl_g_of_any_sizes_in_any_order_projects_alike(order, sizes):
    grads = draw(sizes)[np.asarray(order)]
    found = projections(grads, jitted("imtl_g")(grads))
    np.testing.assert_allclose(found, np.mean(found), rtol=1e-3)


def test_sizes_apart_in_float64_are_as_precise():
    with enable_x64(True):
        grads = draw([40, 0, 0, -40], dtype=np.float64)
        found = projections(grads, jitted("imtl_g")(jnp.asarray(grads)))
        np.testing.assert_allclose(found, found[0], rtol=1e-10)


def test_a_short_gradient_beside_two_that_are_one_is_heard():
    # By hand: singular values 3000 and 1/sqrt(2), weights 1/3000 to 1 to 1.
    grads = jnp.asarray([[3000.0, 0.0], [0.0, 0.5], [0.0, 0.5]])
    both = 1 / (2 + 1 / 3000)
    np.testing.assert_allclose(jitted("imtl_g")(grads), [both, both], rtol=1e-4)
    np.testing.assert_allclose(
        jitted("aligned_mtl")(grads), [0.5**0.5 / 3, 1 / 3], rtol=1e-4
    )


@every_rule
def test_one_gradient_alone_is_the_update(name):
    for size in (-40, 0, 40):
        grads = draw([size])
        np.testing.assert_allclose(jitted(name)(grads), grads[0], rtol=1e-5)


@every_rule
def test_a_zero_gradient_has_no_say_where_lengths_do_not_count(name):
    grads = draw([0, 0, 0])
    grads[1] = 0
    factor = 2 / 3 if name == "aligned_mtl" else 1
    expected = factor * jitted(name)(grads[[0, 2]])
    np.testing.assert_allclose(jitted(name)(grads), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(jitted(name)(0 * grads), np.zeros(9))


@every_rule
def test_opposed_gradients_cancel_out(name):
    grads = draw([0, 0])
    grads[1] = -grads[0]
    np.testing.assert_allclose(jitted(name)(grads), np.zeros(9), atol=1e-5)


@every_rule
def test_rules_under_vmap_equal_each(name):
    grads = np.stack([draw([0, 3, 0, 0], seed) for seed in range(3)])
    found = jax.jit(jax.vmap(jitted(name)))(grads)
    for update, each in zip(found, grads, strict=True):
        np.testing.assert_allclose(update, jitted(name)(each), rtol=1e-4, atol=1e-5)
