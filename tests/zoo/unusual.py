"""Unusual values, batches, parameters and results."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from tests.zoo.blocks import (
    inputs,
    mlp,
    mlp_params,
    mse,
    normal,
    pairs,
    regression,
    weight,
)
from tests.zoo.dense import dense_one_row, dense_several_rows
from tests.zoo.model import NUM_ENVS, model


@model
def logsumexp_and_norms(rng):
    params = {"w": weight(rng, 5, 4), "centres": normal(rng, 3, 4)}

    def loss_fn(p, x):
        y = x @ p["w"]
        distances = jnp.sum(jnp.square(y[:, None] - p["centres"][None]), axis=-1)
        return -jnp.mean(jax.nn.logsumexp(-distances, axis=1)) + jnp.linalg.norm(y)

    return params, loss_fn, inputs(rng, 3, 5)


@model(decided=0.0)
def inputs_of_zeros(rng):
    # No weight of the first layer has a gradient, in any environment.
    _, loss_fn, batch = dense_several_rows(rng)
    batch["x"] = jnp.zeros_like(batch["x"])
    return mlp_params(rng, [5, 7, 3]), loss_fn, batch


@model
def inputs_with_zero_components(rng):
    # Signs of zero: a bag of words leaves most rows of the weight alone.
    params, loss_fn, batch = dense_one_row(rng)
    mask = rng.integers(0, 2, size=batch["x"].shape).astype(np.float32)
    return params, loss_fn, {**batch, "x": batch["x"] * mask}


@model
def environment_with_a_gradient_of_zero(rng):
    params, plain, batch = dense_several_rows(rng)

    def loss_fn(params, batch):
        return batch["on"] * plain(params, batch)

    on = jnp.asarray([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    return params, loss_fn, {**batch, "on": on}


@model
def environments_that_cancel(rng):
    # One row each, in pairs of opposite gradients.
    def loss_fn(params, batch):
        return batch["side"] * jnp.sum(mlp(params, batch["x"]))

    x = normal(rng, NUM_ENVS // 2, 5)
    batch = {"x": jnp.repeat(x, 2, axis=0), "side": jnp.tile(jnp.array([1.0, -1]), 3)}
    return mlp_params(rng, [5, 7, 3]), loss_fn, batch


@model
def gradients_of_tiny_and_huge_environments(rng):
    # The smallest still votes.
    def loss_fn(params, batch):
        y = jnp.tanh(batch["x"] @ params["w"])
        return batch["size"] * jnp.sum(y * batch["y"])

    size = jnp.asarray([0.1, 1.0, 30.0, 0.1, 1.0, 0.1])
    return {"w": weight(rng, 5, 3)}, loss_fn, {**pairs(rng, (5,), (3,)), "size": size}


@model
def batch_of_numpy_integers_and_booleans(rng):
    params = {"w": weight(rng, 5, 3), "b": normal(rng, 3)}

    def loss_fn(p, batch):
        x = batch["count"].astype(jnp.float32) @ p["w"]
        return jnp.mean(jnp.where(batch["mask"], jnp.tanh(x + p["b"]), 0.1 * x))

    batch = {
        "count": rng.integers(-3, 4, size=(NUM_ENVS, 5)),
        "mask": rng.integers(0, 2, size=(NUM_ENVS, 3)).astype(bool),
    }
    return params, loss_fn, batch


@model
def random_keys_as_a_batch(rng):
    params = mlp_params(rng, [5, 4, 3])

    def loss_fn(params, batch):
        x = batch["x"] + 0.1 * jax.random.normal(batch["key"], batch["x"].shape)
        keep = jax.random.bernoulli(jax.random.fold_in(batch["key"], 1), 0.7, x.shape)
        return mse(mlp(params, jnp.where(keep, x / 0.7, 0)), batch["y"])

    keys = jax.random.split(jax.random.key(0), NUM_ENVS)
    return params, loss_fn, {**pairs(rng, (3, 5), (3, 3)), "key": keys}


@model(has_aux=True)
def loss_with_aux(rng):
    params = mlp_params(rng, [5, 4, 3])

    def loss_fn(params, batch):
        y = mlp(params, batch["x"])
        aux = {"y": y, "norm": jnp.sum(jnp.square(params[0]["w"])), "three": 3}
        return mse(y, batch["y"]), aux

    return params, loss_fn, pairs(rng, (2, 5), (2, 3))


@model(has_aux=True)
def loss_with_parameters_in_aux(rng):
    params = {"w": weight(rng, 5, 3)}

    def loss_fn(p, batch):
        y = batch["x"] @ p["w"]
        return mse(y, batch["y"]), {"w": p["w"], "key": batch["x"], "none": None}

    return params, loss_fn, pairs(rng, (5,), (3,))


Point = collections.namedtuple("Point", ["w", "b"])


@model
def parameters_in_named_tuples(rng):
    params = (Point(weight(rng, 5, 3), normal(rng, 3)), [Point(normal(rng, 3), None)])

    def predict(p, x):
        return jnp.tanh(x @ p[0].w + p[0].b) * p[1][0].w

    return params, regression(predict), pairs(rng, (5,), (3,))
