"""What models of several kinds are made of."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.zoo.model import NUM_ENVS


def floats(values, dtype=jnp.float32):
    # `jnp.asarray` would compile a program for every shape.
    return jax.device_put(np.asarray(values, dtype))


def normal(rng, *shape, dtype=jnp.float32):
    return floats(rng.normal(size=shape), dtype)


def weight(rng, *shape, fan_in=None):
    fan_in = math.prod(shape[:-1]) if fan_in is None else fan_in
    return floats(rng.normal(size=shape) / math.sqrt(fan_in))


def inputs(rng, *shape, num_envs=NUM_ENVS):
    return normal(rng, num_envs, *shape)


def ids(rng, high, *shape, low=0):
    values = rng.integers(low, high, size=(NUM_ENVS, *shape))
    return jax.device_put(np.asarray(values, np.int32))


def pairs(rng, x_shape, y_shape):
    """A regression batch."""
    return {"x": inputs(rng, *x_shape), "y": inputs(rng, *y_shape)}


def mse(prediction, target):
    assert prediction.shape == target.shape
    return jnp.mean(jnp.square(prediction - target))


def regression(predict):
    return lambda params, batch: mse(predict(params, batch["x"]), batch["y"])


def one_of(batch):
    """Shapes and dtypes of a single environment."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch
    )


def mix(rng, shape):
    """A loss for outputs of any shape that treats all components differently."""
    factors = normal(rng, *shape)
    return lambda y: jnp.mean(jnp.sin(y * factors) + 0.3 * jnp.square(y))


def mlp_params(rng, sizes, bias=True):
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layer = {"w": weight(rng, fan_in, fan_out)}
        if bias:
            layer["b"] = normal(rng, fan_out)
        layers.append(layer)
    return layers


def mlp(params, x):
    """`x`: [features] or [row, features]."""
    for i, layer in enumerate(params):
        bias = layer["b"] if x.ndim == 1 else layer["b"][None]
        x = x @ layer["w"] + bias
        if i < len(params) - 1:
            x = jax.nn.relu(x)
    return x


def conv(x, kernel, strides=None, padding="SAME", **settings):
    """Channels last, any number of spatial axes."""
    rank = x.ndim - 2
    spatial = "DHW"[-rank:]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides or (1,) * rank,
        padding,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        **settings,
    )


def normalise(x, axis, eps=1e-5):
    mean = jnp.mean(x, axis=axis, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=axis, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + eps)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def tanh_layer(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def two_weights(rng, first, hidden, last):
    return {"one": weight(rng, first, hidden), "two": weight(rng, hidden, last)}


def per_channel(p):
    """`p: [channel]` for images, channels last."""
    return p.reshape(1, 1, 1, -1)
