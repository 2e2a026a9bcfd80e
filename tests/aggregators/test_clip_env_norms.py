"""`clip_env_norms` with every kind of bound, and with weights of environments."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary

GRADS = np.array([[3.0, 4.0], [0.0, 0.5], [-6.0, 8.0]], np.float32)


def update_of(max_norm, grads=GRADS, **extra):
    tx = hardvary.clip_env_norms(max_norm)
    return tx.update(jnp.asarray(grads), tx.init(None), **extra)[0]


def by_loop(grads, bound, weights):
    total = np.zeros(2)
    for grad, weight in zip(np.asarray(grads, np.float64), weights, strict=True):
        norm = np.linalg.norm(grad)
        total += weight * grad * (bound / norm if norm > bound else 1)
    return total / np.sum(weights)


@pytest.mark.parametrize("bound", [0.1, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("weights", [(1, 1, 1), (2.0, 0.5, 0.0)])
def test_clip_env_norms_equals_a_loop(bound, weights):
    actual = update_of(bound, env_weights=np.array(weights, np.float32))
    np.testing.assert_allclose(actual, by_loop(GRADS, bound, weights), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_clip_env_norms_of_scaled_gradients_and_bound_is_scaled(scale):
    expected = scale * by_loop(GRADS, 2.0, (1, 1, 1))
    actual = update_of(2 * scale, np.float32(scale) * GRADS)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_clip_env_norms_of_zeros_and_of_one_is_as_it_should_be():
    np.testing.assert_array_equal(update_of(1.0, 0 * GRADS), [0, 0])
    np.testing.assert_allclose(update_of(1.0, GRADS[:1]), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(update_of(9.0, GRADS[:1]), GRADS[0])


def test_clip_env_norms_hears_an_absent_environment_not_at_all():
    weights = np.array([1, 0, 1], np.float32)
    for value in (np.nan, np.inf, 1e30):
        grads = GRADS.copy()
        grads[1] = value
        actual = update_of(1.0, grads, env_weights=weights)
        np.testing.assert_allclose(actual, by_loop(GRADS, 1, weights), rtol=1e-6)
        # Of one that is there, 1e30 has a square that is infinite.
        assert np.isnan(update_of(1.0, grads)).all()


def test_clip_env_norms_takes_schedules_with_numbers_of_their_own():
    # A Partial is a tree, with what it was given as its leaves.
    def rising(start, count):
        return start + count.astype(jnp.float32)

    partial = jax.tree_util.Partial(rising, 0.0)
    for schedule in (optax.linear_schedule(0.0, 3.0, 3), partial):
        tx = hardvary.clip_env_norms(schedule)
        state = tx.init(None)
        for bound in (0.0, 1.0, 2.0):
            update, state = tx.update(jnp.asarray(GRADS), state)
            expected = by_loop(GRADS, bound, (1, 1, 1))
            np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_clip_env_norms_under_vmap_over_bounds_is_that_of_each():
    bounds = jnp.array([0.5, 2.0, 7.0])
    for bound, update in zip(bounds, jax.vmap(update_of)(bounds), strict=True):
        expected = by_loop(GRADS, float(bound), (1, 1, 1))
        np.testing.assert_allclose(update, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, "must be finite and > 0, got 0"),
        (-1, ValueError, "must be finite and > 0, got -1"),
        (np.inf, ValueError, "must be finite and > 0, got inf"),
        (np.float32("nan"), ValueError, "must be finite and > 0, got nan"),
        (None, TypeError, "must be a real scalar or a schedule, got None"),
        (True, TypeError, "must be a real scalar or a schedule, got True"),
        ({"w": 1.0}, TypeError, "must be a real scalar or a schedule, got {'w': 1.0}"),
        (jnp.ones(2), TypeError, "must be a real scalar or a schedule, got"),
    ],
)
def test_clip_env_norms_of_a_bad_bound_is_refused(value, error, message):
    with pytest.raises(error, match=re.escape(f"max_norm {message}")):
        hardvary.clip_env_norms(value)
