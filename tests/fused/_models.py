"""Models of the zoo, what they must give, and what the fused oracle gives for them."""

import functools

import jax
import numpy as np

import hardvary
from tests.zoo import (
    ZOO,
    Stacked,
    assert_stats_match,
    compile_quickly,
    fields_by_path,
)

METHOD = "fused"


@functools.cache
def build(name):
    return ZOO[name](np.random.default_rng(0))


@functools.cache
def definition(name):
    params, loss_fn, batch = build(name)
    entry = ZOO[name]
    return Stacked(loss_fn, params, batch, entry.has_aux, entry.promotion)


def make_oracle(name, **settings):
    """`(params, batch, env_weights=None) -> (losses, aux, stats)`."""
    entry = ZOO[name]
    oracle = hardvary.value_and_grad_stats(
        build(name)[1], method=METHOD, has_aux=entry.has_aux, **settings
    )

    def run(params, batch, env_weights=None):
        with entry.promotion():
            value, stats = oracle(params, batch, env_weights=env_weights)
        losses, aux = value if entry.has_aux else (value, None)
        return losses, aux, stats

    return run


@functools.cache
def compiled_oracle(name, **settings):
    return compile_quickly(make_oracle(name, **settings))


def check_values(name, losses, aux, weights=None):
    """Compares the losses and what comes with them."""
    entry, expected = ZOO[name], definition(name)
    present = slice(None) if weights is None else weights > 0
    scale = np.abs(expected.losses).max()
    np.testing.assert_allclose(
        np.asarray(losses, np.float64)[present],
        expected.losses[present],
        rtol=0,
        atol=2 * entry.rounding * scale,
    )
    assert jax.tree.structure(aux) == jax.tree.structure(expected.aux)
    for leaf, other in zip(
        jax.tree.leaves(aux), jax.tree.leaves(expected.aux), strict=True
    ):
        np.testing.assert_allclose(leaf[present], other[present], rtol=1e-5, atol=1e-6)


def check(name, result, weights=None):
    """Compares what an oracle gave; returns the share of decided signs."""
    losses, aux, stats = result
    check_values(name, losses, aux, weights)
    params, _, _ = build(name)
    fields = fields_by_path(stats, params)
    expected, rounding = definition(name), ZOO[name].rounding
    return assert_stats_match(fields, params, expected, weights, rounding)
