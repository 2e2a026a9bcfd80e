"""What the families' models are made of, beside the zoo's blocks."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.blocks import mix, normal, one_of

KEY = jax.random.key(0)


def stir(rng, params, scale=0.1):
    """Initial parameters, each moved a little.

    What starts at zero, such as biases and last layers, would hide what is below.
    """
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale, leaf.dtype) * normal(rng, *leaf.shape),
        params,
    )


def case(rng, predict, params, batch):
    """A loss in which every component of what is predicted counts differently.

    Args:
      rng: draws the loss.
      predict: `predict(params, env_batch)`, a tree of real arrays.
      params: parameters.
      batch: leaves `[env, ...]`.
    """
    shapes = jax.eval_shape(predict, params, one_of(batch))
    tops = jax.tree.map(lambda leaf: mix(rng, leaf.shape), shapes)

    def loss_fn(params, env_batch):
        parts = jax.tree.map(
            lambda top, leaf: top(leaf), tops, predict(params, env_batch)
        )
        return sum(jax.tree.leaves(parts))

    return params, loss_fn, batch


def linen(rng, module, batch, **settings):
    """A Linen module; variables other than parameters stay as they are."""

    def init(key, x):
        return module.init(key, x, **settings)

    example = jax.tree.map(lambda leaf: leaf[0], batch)
    variables = jax.jit(init)(KEY, example)
    params = stir(rng, variables.pop("params"))

    def predict(params, x):
        out = module.apply(
            {"params": params, **variables}, x, mutable=list(variables), **settings
        )
        return out[0]

    return case(rng, predict, params, batch)


def haiku(rng, function, batch):
    """What `hk.transform_with_state` makes of a function; state stays as it is."""
    import haiku as hk

    made = hk.transform_with_state(function)
    example = jax.tree.map(lambda leaf: leaf[0], batch)
    params, state = jax.jit(made.init)(KEY, example)

    def predict(params, x):
        return made.apply(params, state, KEY, x)[0]

    return case(rng, predict, stir(rng, params), batch)


def equinox(rng, make, call, batch, scale=0.1):
    """A module that `make(key)` makes; `call(module, env_batch)` predicts."""
    params, static = eqx.partition(eqx.filter_jit(make)(KEY), eqx.is_inexact_array)

    def predict(params, x):
        return call(eqx.combine(params, static), x)

    return case(rng, predict, stir(rng, params, scale), batch)


def flax_nnx(rng, module, call, batch, scale=0.1):
    """An NNX module; state other than parameters stays as it is."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def predict(params, x):
        # NNX refuses to change variables that are from outside of a trace.
        return call(nnx.merge(graph, params, rest, copy=True), x)

    return case(rng, predict, stir(rng, params, scale), batch)
