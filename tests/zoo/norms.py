"""Biases, scales, normalisation."""

import jax.numpy as jnp
from jax import lax

from tests.zoo.blocks import (
    conv,
    inputs,
    normal,
    normalise,
    pairs,
    per_channel,
    regression,
    weight,
)
from tests.zoo.model import model


@model
def bias_only(rng):
    return (
        normal(rng, 4),
        regression(lambda b, x: jnp.tanh(x + b)),
        pairs(rng, (4,), (4,)),
    )


@model
def bias_and_scale_broadcast(rng):
    params = {"scale": normal(rng, 4), "bias": normal(rng, 1, 4), "row": normal(rng, 3)}

    def predict(p, x):
        y = x * p["scale"][None] + p["bias"]
        return jnp.tanh(y + p["row"][:, None])

    return params, regression(predict), pairs(rng, (3, 4), (3, 4))


@model
def scale_under_explicit_broadcasts(rng):
    params = {"scale": normal(rng, 4), "shift": normal(rng, 3)}

    def predict(p, x):
        y = x * jnp.broadcast_to(p["scale"], (2, 3, 4))
        y = y - lax.broadcast_in_dim(p["shift"], (2, 3, 4), (1,))
        return jnp.tanh(y)

    return params, regression(predict), pairs(rng, (2, 3, 4), (2, 3, 4))


@model
def division_by_a_parameter(rng):
    params = {"scale": 2 + jnp.abs(normal(rng, 4)), "shift": normal(rng, 4)}

    def predict(p, x):
        return jnp.tanh((p["shift"][None] - x) / p["scale"][None])

    return params, regression(predict), pairs(rng, (3, 4), (3, 4))


@model
def scalar_parameters(rng):
    params = {"a": jnp.float32(0.5), "b": jnp.float32(-0.2), "log_c": jnp.float32(0.1)}

    def predict(p, x):
        return p["a"] * jnp.tanh(x + p["b"]) + jnp.exp(p["log_c"])

    return params, regression(predict), pairs(rng, (3,), (3,))


@model
def scalar_parameter_and_scalar_example(rng):
    def loss_fn(w, x):
        return jnp.sin(w * x)

    return jnp.float32(0.5), loss_fn, inputs(rng)


def norm_case(rng, axis, scale_shape, x_shape=(3, 4, 6)):
    features = x_shape[-1]
    params = {
        "in": weight(rng, features, features),
        "scale": normal(rng, *scale_shape),
        "bias": normal(rng, *scale_shape),
        "out": weight(rng, features, 2),
    }

    def predict(p, x):
        lead = (None,) * (len(x_shape) - len(scale_shape))
        y = normalise(x @ p["in"], axis) * p["scale"][lead] + p["bias"][lead]
        return jnp.tanh(y) @ p["out"]

    return params, regression(predict), pairs(rng, x_shape, (*x_shape[:-1], 2))


@model
def layer_norm(rng):
    return norm_case(rng, -1, (6,))


@model
def layer_norm_one_row(rng):
    return norm_case(rng, -1, (6,), (6,))


@model
def layer_norm_of_two_axes(rng):
    return norm_case(rng, (-2, -1), (4, 6))


@model
def batch_norm_of_own_examples(rng):
    return norm_case(rng, (0, 1), (6,))


@model
def group_norm(rng):
    params = {
        "k": weight(rng, 3, 3, 2, 4),
        "scale": normal(rng, 4),
        "b": normal(rng, 4),
    }

    def predict(p, x):
        y = conv(x, p["k"])
        grouped = normalise(y.reshape(*y.shape[:3], 2, 2), (1, 2, 4))
        y = grouped.reshape(y.shape)
        return jnp.tanh(y * per_channel(p["scale"]) + per_channel(p["b"]))

    return params, regression(predict), pairs(rng, (2, 4, 4, 2), (2, 4, 4, 4))


@model
def rms_norm(rng):
    params = {"scale": normal(rng, 6), "w": weight(rng, 6, 3)}

    def predict(p, x):
        size = lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return (x * size * (1 + p["scale"][None])) @ p["w"]

    return params, regression(predict), pairs(rng, (4, 6), (4, 3))


@model
def prelu(rng):
    params = {"w": weight(rng, 5, 4), "alpha": normal(rng, 4)}

    def predict(p, x):
        y = x @ p["w"]
        return jnp.where(y > 0, y, p["alpha"][None] * y)

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))
