"""Comparison of any loss's fused gradients with the definition."""

import jax
import jax.numpy as jnp
import numpy as np

import hardvary
from tests.zoo import blocks, compile_quickly


def floats(*shape, seed=0):
    return blocks.normal(np.random.default_rng(seed), *shape)


def assert_equals_stacked(loss, params, batch, has_aux=False, env_axis_name=None):
    """Holds the fused oracle to `vmap(grad)`: gradients, their sums, losses, aux.

    Args:
      loss: of one environment.
      params: its parameters.
      batch: leaves `[env, ...]`.
      has_aux: see `grad_stats`.
      env_axis_name: see `grad_stats`.

    Returns:
      The gradients, leaves `[env, ...]`.
    """
    oracle = hardvary.value_and_env_grads(
        loss, has_aux=has_aux, env_axis_name=env_axis_name
    )

    @compile_quickly
    def fused(params, batch):
        value, grads = oracle(params, batch)
        # Pulled by every environment at once, and in the way of the parameter's rule.
        stacked = jax.tree.map(lambda grad: grad.stack(), grads)
        sums = jax.tree.map(lambda grad: grad.stats(("abs",)).abs_mean, grads)
        return value, stacked, sums

    @compile_quickly
    def definition(params, batch):
        one = jax.value_and_grad(loss, has_aux=has_aux)
        value, grads = jax.vmap(one, (None, 0), axis_name=env_axis_name)(params, batch)
        return value, grads, jax.tree.map(lambda grad: jnp.abs(grad).mean(0), grads)

    actual, expected = fused(params, batch), definition(params, batch)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for leaf, other in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        scale = np.nanmax(np.abs(other), initial=0)
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=2e-6 * scale)
    return actual[1]
