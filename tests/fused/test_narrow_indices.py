"""Indices of a type that cannot count the rows of what they index."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hardvary
from hardvary.fused import rules
from tests.fused._stacked import floats
from tests.zoo import compile_quickly

ROWS, LENGTH = 300, 4
# Compiled quickly, XLA's scatter compares narrow indices with a size that has wrapped
# around in their type: the definition is asked with wide ones.
IDS = np.array([[3, 43, 44, 127], [120, 120, 7, 0], [1, 99, 43, 3]])


def looked_up(mode):
    return lambda p, ids: jnp.sum(jnp.sin(jnp.take(p, ids, axis=0, mode=mode)))


def looked_up_and_decayed(p, ids):
    return looked_up("clip")(p, ids) + 0.1 * jnp.sum(jnp.square(p))


def columns(p, ids):
    return jnp.sum(jnp.sin(jnp.take(p.T, ids, axis=1, mode="clip")))


def in_a_loop(p, ids):
    step = lambda total, i: (total + jnp.sum(jnp.sin(jnp.take(p, i, axis=0))), None)  # noqa: E731
    return lax.scan(step, 0.0, ids)[0]


def a_slice(p, ids):
    start = (ids[0], jnp.zeros((), ids.dtype))
    return jnp.sum(jnp.sin(lax.dynamic_slice(p, start, (5, 2))))


LOSSES = {
    "default": looked_up(None),
    "clip": looked_up("clip"),
    "fill": looked_up("fill"),
    "decayed": looked_up_and_decayed,
    "columns": columns,
    "in_a_loop": in_a_loop,
    "slice": a_slice,
}


@pytest.mark.parametrize("name", LOSSES)
def test_narrow_indices_give_the_gradients_of_wide_ones(name):
    loss, table = LOSSES[name], floats(ROWS, 2)
    weights = jnp.array([1.0, -2.0, 0.5])

    @compile_quickly
    def fused(table, ids, weights):
        grads = hardvary.env_grads(loss)(table, ids)
        mean = grads.stats(("mean", "abs")).mean
        return grads.stack(), mean, grads.combine(weights)

    wide = jax.vmap(jax.grad(loss), (None, 0))(table, jnp.asarray(IDS, jnp.int32))
    expected = wide, wide.mean(0), jnp.tensordot(weights, wide, 1)
    for dtype in ("int8", "uint8", "int16"):
        with mock.patch.object(rules, "SMALL", 0):
            found = fused(table, jax.device_put(IDS.astype(dtype)), weights)
        for leaf, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
