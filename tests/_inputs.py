"""Inputs that several test files share."""

import functools
import math

import jax
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import hardvary
from tests.zoo.blocks import floats

STATISTICS = ("mean", "sign", "square", "log_abs", "abs", "nonzero")
DTYPES = ("float32", "bfloat16", "float16", "float64")

# What a leaf of parameters can look like; None is a subtree without leaves.
SHAPES = {
    "array": (7,),
    "scalar": (),
    "nested": {"dense": {"kernel": (3, 4), "bias": (4,)}, "scale": (), "none": None},
    "zero_size": [(0,), (2, 0, 3), (5,)],
    "only_zero_size": {"kernel": (0, 4)},
    "no_leaves": {},
}

# From zero to where float32 still holds the square.
SCALES = (0.0, 1e-15, 1e-6, 1.0, 1e4, 1e15)

# Every aggregator as a function of its threshold.
AGGREGATORS = {
    "and_mask": hardvary.and_mask,
    "xor_mask": hardvary.xor_mask,
    "geometric_mean": hardvary.geometric_mean,
    "sand_mask": functools.partial(hardvary.sand_mask, sharpness=2.0),
    "soft_and_mask": hardvary.soft_and_mask,
}
# Those whose mask is a function of the agreement alone.
VOTE_MASKS = ("and_mask", "xor_mask", "geometric_mean", "soft_and_mask")

# Those without a threshold, as functions of keywords such as `axis_name`.
PLAIN_AGGREGATORS = {
    "grad_drop": functools.partial(hardvary.grad_drop, 0),
    "disjoint_mean": hardvary.disjoint_mean,
    "majority_sign": hardvary.majority_sign,
    "agr_rand": functools.partial(hardvary.agr_rand, 0),
}


def map_shapes(function, name):
    return jax.tree.map(
        function, SHAPES[name], is_leaf=lambda node: isinstance(node, tuple)
    )


def make_params(name, dtype="float32"):
    """Parameters away from zero, with a value of their own in every component."""
    return map_shapes(
        lambda shape: floats(1 + np.arange(math.prod(shape)).reshape(shape) / 8, dtype),
        name,
    )


def make_grads(name, num_envs, seed=0, dtype="float32", scale=1.0):
    """Stacked gradients on a grid of 1/4, so that all agreements and zeros occur.

    Sums over a few environments are exact on the grid, in bfloat16 too.
    """
    rng = np.random.default_rng(seed)

    def leaf(shape):
        # A drift of each component's own: some agree everywhere, some nowhere.
        drift = rng.integers(-6, 7, size=shape)
        noise = rng.integers(-4, 5, size=(num_envs, *shape))
        return floats(scale * (drift + noise) / 4, dtype)

    return map_shapes(leaf, name)


@st.composite
def stacked_grads(draw, cases=(("array", 1), ("nested", 3), ("zero_size", 8))):
    """Stacked gradients on the grid of `make_grads`.

    Few shapes: every new one costs a compilation, and shapes are other tests' matter.
    """
    name, num_envs = draw(st.sampled_from(cases))
    element = st.integers(-16, 16).map(lambda quarters: quarters / 4)

    def leaf(shape):
        values = draw(hnp.arrays(np.float32, (num_envs, *shape), elements=element))
        return floats(values)

    return map_shapes(leaf, name)


def num_envs_of(grads):
    return jax.tree.leaves(grads)[0].shape[0]


# Weights whose sums are exact, so that agreements are as well.
def weights_for(num_envs):
    weight = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])
    return (
        st.lists(weight, min_size=num_envs, max_size=num_envs)
        .filter(any)
        .map(lambda weights: np.array(weights, np.float32))
    )


@functools.cache
def jitted_aggregator(name, *, rescale=False, max_rescale=None):
    """`(grads, threshold, env_weights=None) -> (updates, kept_fraction)`, compiled.

    The threshold is traced: one compilation serves every value.
    """

    @jax.jit
    def run(grads, threshold, env_weights=None):
        tx = AGGREGATORS[name](threshold, rescale=rescale, max_rescale=max_rescale)
        extra = {} if env_weights is None else {"env_weights": env_weights}
        updates, state = tx.update(grads, tx.init(None), None, **extra)
        return updates, state.kept_fraction

    return run


@functools.cache
def jitted_plain(name):
    """`(grads, env_weights=None) -> (updates, kept_fraction)`, compiled."""

    @jax.jit
    def run(grads, env_weights=None):
        extra = {} if env_weights is None else {"env_weights": env_weights}
        return aggregate(PLAIN_AGGREGATORS[name](), grads, **extra)

    return run


def aggregate(tx, grads, params=None, **extra_args):
    """One eager update from a fresh state: `(updates, kept_fraction)`."""
    updates, state = tx.update(grads, tx.init(params), params, **extra_args)
    return updates, state.kept_fraction
