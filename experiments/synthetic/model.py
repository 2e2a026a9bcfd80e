"""The MLP of the synthetic experiment, and its use through pure functions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = Any
Apply = Callable[[Params, jax.Array], jax.Array]


class MLP(nnx.Module):
    """Dense layers with LeakyReLU between them, one logit at the end.

    Weights are He-normal over the fan-in, biases 0.01, as in the authors' script.
    """

    def __init__(
        self, inputs: int, hidden_units: int, hidden_layers: int, *, rngs: nnx.Rngs
    ):
        sizes = [inputs, *[hidden_units] * hidden_layers, 1]
        # he_normal would cut the normal distribution off at two deviations.
        weights = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        self.layers = nnx.List(
            nnx.Linear(
                fan_in,
                fan_out,
                kernel_init=weights,
                bias_init=nnx.initializers.constant(0.01),
                rngs=rngs,
            )
            for fan_in, fan_out in itertools.pairwise(sizes)
        )

    def __call__(self, features: jax.Array) -> jax.Array:
        """Logits [...] for features [..., inputs]."""
        for layer in self.layers[:-1]:
            features = nnx.leaky_relu(layer(features))
        return self.layers[-1](features)[..., 0]


def init_params(
    key: jax.Array, inputs: int, hidden_units: int, hidden_layers: int
) -> Params:
    """Initial parameters as a pytree."""
    model = MLP(inputs, hidden_units, hidden_layers, rngs=nnx.Rngs(key))
    return nnx.state(model, nnx.Param)


@functools.lru_cache(maxsize=16)
def make_apply(inputs: int, hidden_units: int, hidden_layers: int) -> Apply:
    """A pure function from parameters and features [..., inputs] to logits [...].

    The same sizes give the same function, so that what is compiled for it once
    serves all methods and seeds.
    """
    model = nnx.eval_shape(
        lambda: MLP(inputs, hidden_units, hidden_layers, rngs=nnx.Rngs(0))
    )
    graph = nnx.graphdef(model)

    def apply(params: Params, features: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(features)

    return apply
