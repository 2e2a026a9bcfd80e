"""Parameters in no use at all, in several, and beside the model."""

import jax
import jax.numpy as jnp

from tests.zoo.blocks import (
    conv,
    ids,
    inputs,
    mlp,
    mlp_params,
    mse,
    normal,
    pairs,
    regression,
    tanh_layer,
    weight,
)
from tests.zoo.model import model


@model
def unused_parameter(rng):
    params = {"used": weight(rng, 5, 3), "unused": normal(rng, 2, 2), "none": None}
    return params, regression(lambda p, x: x @ p["used"]), pairs(rng, (5,), (3,))


@model
def parameter_without_components(rng):
    params = {"w": weight(rng, 5, 3), "empty": jnp.zeros((0, 3)), "more": jnp.zeros(0)}

    def predict(p, x):
        w = jnp.concatenate([p["w"], p["empty"]])
        return x @ w + jnp.sum(p["more"])

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def parameter_used_but_without_effect(rng):
    # It reaches the output through an integer, a comparison and a product with zero.
    params = {"w": weight(rng, 5, 3), "t": normal(rng, 3)}

    def predict(p, x):
        y = x @ p["w"]
        steps = jnp.floor(p["t"]).astype(jnp.int32).astype(jnp.float32)
        y = jnp.where(y > p["t"][None], y, 0.5 * y)
        return y + steps[None] + 0.0 * p["t"][None]

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def dense_used_twice(rng):
    params = {"w": weight(rng, 5, 5), "b": normal(rng, 5)}

    def predict(p, x):
        y = tanh_layer(p, x)
        return y @ p["w"] + p["b"]

    return params, regression(predict), pairs(rng, (5,), (5,))


@model
def dense_used_twice_beside_each_other(rng):
    # A siamese net: both uses see inputs of their own, at one row each.
    def loss_fn(params, batch):
        left, right = mlp(params, batch["x"]), mlp(params, batch["y"])
        return jnp.sum(jnp.square(left - right)) - 0.1 * jnp.sum(left * right)

    return mlp_params(rng, [5, 4, 3]), loss_fn, pairs(rng, (5,), (5,))


@model
def dense_used_transposed_as_well(rng):
    params = {"w": weight(rng, 5, 3), "b": normal(rng, 5)}

    def predict(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T + p["b"]

    return params, regression(predict), pairs(rng, (5,), (5,))


@model
def conv_used_twice(rng):
    params = {"k": weight(rng, 3, 3, 2, 2)}

    def predict(p, x):
        return conv(jnp.tanh(conv(x, p["k"])), p["k"])

    return params, regression(predict), pairs(rng, (2, 4, 4, 2), (2, 4, 4, 2))


@model
def embedding_used_as_output_too(rng):
    params = {"table": normal(rng, 6, 4)}

    def loss_fn(p, tokens):
        logits = jnp.tanh(p["table"][tokens[:-1]]) @ p["table"].T
        target = jax.nn.one_hot(tokens[1:], 6, dtype=jnp.float32)
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), axis=-1))

    return params, loss_fn, ids(rng, 6, 5)


@model
def parameter_shared_by_aliasing(rng):
    # One array under two names is two parameters.
    shared = weight(rng, 4, 4)
    params = {"one": shared, "two": shared}

    def predict(p, x):
        return jnp.tanh(x @ p["one"]) @ p["two"]

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def regulariser_beside_the_model(rng):
    def loss_fn(params, batch):
        penalty = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
        return mse(mlp(params, batch["x"]), batch["y"]) + 0.05 * penalty

    return mlp_params(rng, [5, 7, 3]), loss_fn, pairs(rng, (5,), (3,))


@model
def regulariser_only(rng):
    # The gradient is the same in all environments and nothing depends on the batch.
    def loss_fn(params, batch):
        del batch
        return jnp.sum(jnp.square(params["w"])) + jnp.sum(jnp.abs(params["b"]))

    return {"w": normal(rng, 3, 4), "b": normal(rng, 4)}, loss_fn, inputs(rng, 2)


@model
def regulariser_weighed_by_the_batch(rng):
    def loss_fn(params, strength):
        return strength * jnp.sum(jnp.square(params["w"]))

    return {"w": normal(rng, 3, 4)}, loss_fn, inputs(rng)
