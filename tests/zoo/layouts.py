"""Parameters cut, joined and reshaped on their way into a layer."""

import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from tests.zoo.blocks import (
    ids,
    mlp,
    mlp_params,
    mse,
    normal,
    pairs,
    regression,
    weight,
)
from tests.zoo.model import model


@model
def reshaped_parameter(rng):
    params = {
        "flat": weight(rng, 15, fan_in=5),
        "square": weight(rng, 2, 2, 3, fan_in=3),
    }

    def predict(p, x):
        hidden = jnp.tanh(x @ p["flat"].reshape(5, 3))
        return hidden @ p["square"].reshape(4, 3).T

    return params, regression(predict), pairs(rng, (5,), (4,))


@model
def everything_in_one_flat_vector(rng):
    tree = mlp_params(rng, [4, 5, 3])
    flat, unravel = ravel_pytree(tree)

    def predict(p, x):
        return mlp(unravel(p), x)

    return flat, regression(predict), pairs(rng, (4,), (3,))


@model
def concatenated_parameters(rng):
    params = {
        "left": weight(rng, 5, 2),
        "right": weight(rng, 5, 2),
        "b": normal(rng, 2),
    }

    def predict(p, x):
        w = jnp.concatenate([p["left"], p["right"]], axis=1)
        b = jnp.concatenate([p["b"], jnp.ones(2)])
        return x @ w + b

    return params, regression(predict), pairs(rng, (5,), (4,))


@model
def stacked_parameters(rng):
    params = [weight(rng, 4, 4), weight(rng, 4, 4), weight(rng, 4, 4)]

    def predict(p, x):
        for w in jnp.stack(p):
            x = jnp.tanh(x @ w)
        return x

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def bias_as_an_extra_row(rng):
    params = {"w": weight(rng, 5, 3)}

    def predict(p, x):
        return jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1) @ p["w"]

    return params, regression(predict), pairs(rng, (3, 4), (3, 3))


@model
def sliced_parameter(rng):
    params = {"w": weight(rng, 6, 5)}

    def predict(p, x):
        # Two disjoint parts, each used once, and a row that nobody uses.
        return jnp.tanh(x @ p["w"][:4, :3]) @ p["w"][4:5, 2:].T

    return params, regression(predict), pairs(rng, (4,), (1,))


@model
def dynamic_slice_of_a_parameter(rng):
    params = {"w": normal(rng, 6, 3)}

    def loss_fn(p, batch):
        part = lax.dynamic_slice_in_dim(p["w"], batch["start"], 2, axis=0)
        return mse(batch["x"] @ part, batch["y"])

    batch = {**pairs(rng, (3, 2), (3, 3)), "start": ids(rng, 5)}
    return params, loss_fn, batch


@model
def padded_parameter(rng):
    params = {"w": normal(rng, 3, 2)}

    def predict(p, x):
        return x @ jnp.pad(p["w"], ((1, 1), (0, 1)), constant_values=0.5)

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))
