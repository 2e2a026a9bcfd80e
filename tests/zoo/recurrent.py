"""Recurrence, and scans of every other sort."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.blocks import (
    mlp,
    mlp_params,
    normal,
    pairs,
    regression,
    tanh_layer,
    weight,
)
from tests.zoo.model import model


def gru_params(rng, features=3, width=4):
    return {
        "in": weight(rng, features, 3 * width),
        "hidden": weight(rng, width, 3 * width),
        "b": normal(rng, 3 * width),
        "out": weight(rng, width, 2),
    }


def gru_cell(p, h, x):
    gates_x, gates_h = x @ p["in"] + p["b"][None], h @ p["hidden"]
    rx, zx, nx = jnp.split(gates_x, 3, axis=-1)
    rh, zh, nh = jnp.split(gates_h, 3, axis=-1)
    r, z = jax.nn.sigmoid(rx + rh), jax.nn.sigmoid(zx + zh)
    return (1 - z) * jnp.tanh(nx + r * nh) + z * h


@model
def gru_by_scan(rng):
    def predict(p, x):
        def step(h, x):
            h = gru_cell(p, h, x)
            return h, h

        _, hs = lax.scan(step, jnp.zeros((x.shape[1], 4)), x)
        return hs @ p["out"]

    return gru_params(rng), regression(predict), pairs(rng, (5, 2, 3), (5, 2, 2))


@model
def gru_by_reversed_scan_with_remat(rng):
    def predict(p, x):
        @jax.checkpoint
        def step(h, x):
            return gru_cell(p, h, x), None

        h, _ = lax.scan(step, jnp.zeros((x.shape[1], 4)), x, reverse=True, unroll=2)
        return h @ p["out"]

    return gru_params(rng), regression(predict), pairs(rng, (5, 1, 3), (1, 2))


@model
def recurrence_unrolled(rng):
    params = {"in": weight(rng, 3, 4), "hidden": weight(rng, 4, 4)}

    def predict(p, x):
        h = jnp.zeros(4)
        for step in x:
            h = jnp.tanh(step @ p["in"] + h @ p["hidden"])
        return h

    return params, regression(predict), pairs(rng, (4, 3), (4,))


@model
def linear_recurrence_by_associative_scan(rng):
    params = {"decay": normal(rng, 3), "in": weight(rng, 3, 3)}

    def predict(p, x):
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), x.shape)

        def combine(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        return lax.associative_scan(combine, (decay, x @ p["in"]))[1]

    return params, regression(predict), pairs(rng, (5, 3), (5, 3))


@model
def scan_over_stacked_layers(rng):
    params = {"w": weight(rng, 3, 4, 4, fan_in=4), "b": normal(rng, 3, 4)}

    def predict(p, x):
        def body(x, layer):
            return tanh_layer(layer, x), None

        return lax.scan(body, x, p)[0]

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def scan_with_parameters_in_the_carry(rng):
    params = {"w": weight(rng, 4, 4), "b": normal(rng, 4)}

    def predict(p, x):
        def body(carry, _):
            p, x = carry
            x = jnp.tanh(x @ p["w"] + p["b"][None])
            # The weight changes on the way.
            return ({"w": 0.9 * p["w"], "b": p["b"]}, x), None

        return lax.scan(body, (p, x), length=3)[0][1]

    return params, regression(predict), pairs(rng, (2, 4), (2, 4))


@model
def scan_with_an_unchanged_parameter_in_the_carry(rng):
    params = {"w": weight(rng, 4, 4)}

    def predict(p, x):
        def body(carry, x):
            return carry, jnp.tanh(x @ carry)

        return lax.scan(body, p["w"], x)[1]

    return params, regression(predict), pairs(rng, (3, 4), (3, 4))


@model
def scan_over_examples_of_one_use_each(rng):
    # One use in the program, as many as there are examples when it runs.
    params = {"w": weight(rng, 4, 3)}

    def loss_fn(p, batch):
        def body(total, pair):
            return total + jnp.sum(jnp.abs(pair["x"] @ p["w"] - pair["y"])), None

        return lax.scan(body, jnp.float32(0), batch)[0]

    return params, loss_fn, pairs(rng, (3, 4), (3, 3))


@model
def scan_of_length_one(rng):
    params = {"w": weight(rng, 1, 4, 3, fan_in=4), "v": weight(rng, 3, 3)}

    def predict(p, x):
        def body(_, w):
            return None, jnp.tanh(x @ w) @ p["v"]

        return lax.scan(body, None, p["w"])[1][0]

    return params, regression(predict), pairs(rng, (4,), (3,))


@model
def nested_scans(rng):
    params = {"outer": weight(rng, 2, 4, 4, fan_in=4), "inner": weight(rng, 4, 4)}

    def predict(p, x):
        def inner(h, _):
            return jnp.tanh(h @ p["inner"]), None

        def outer(h, w):
            h, _ = lax.scan(inner, h @ w, length=2)
            return h, None

        return lax.scan(outer, x, p["outer"])[0]

    return params, regression(predict), pairs(rng, (2, 4), (2, 4))


@model
def lax_map_over_examples(rng):
    def predict(params, x):
        return lax.map(functools.partial(mlp, params), x)

    return mlp_params(rng, [4, 5, 3]), regression(predict), pairs(rng, (3, 4), (3, 3))
