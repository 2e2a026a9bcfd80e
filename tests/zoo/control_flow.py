"""Transformations and control flow inside the loss."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.zoo.blocks import (
    ids,
    mlp,
    mlp_params,
    mse,
    normal,
    pairs,
    regression,
    tanh_layer,
    two_weights,
    weight,
)
from tests.zoo.model import model


@model
def nested_jit(rng):
    layer = jax.jit(tanh_layer)

    @jax.jit
    def predict(params, x):
        # The same cached function for two layers of equal shapes.
        for p in params:
            x = layer(p, x)
        return x

    return mlp_params(rng, [4, 4, 4, 4]), regression(predict), pairs(rng, (4,), (4,))


@model
def nested_jit_used_twice(rng):
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    params = {"w": weight(rng, 4, 4), "v": weight(rng, 4, 4)}

    def predict(p, x):
        return layer(p["v"], layer(p["w"], layer(p["w"], x)))

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def jit_that_returns_parameters(rng):
    # The parameter passes through a call and comes out as it was, beside a function.
    @jax.jit
    def prepare(p):
        return p["w"], jnp.square(p["w"]), p["b"]

    params = {"w": weight(rng, 5, 3), "b": normal(rng, 3)}

    def loss_fn(p, batch):
        w, squares, b = prepare(p)
        return mse(batch["x"] @ w + b, batch["y"]) + 0.1 * jnp.sum(squares)

    return params, loss_fn, pairs(rng, (5,), (3,))


@model
def remat_blocks(rng):
    block = jax.checkpoint(tanh_layer)

    def predict(params, x):
        for p in params:
            x = block(p, x)
        return x

    return mlp_params(rng, [5, 4, 3]), regression(predict), pairs(rng, (5,), (3,))


@model
def remat_with_a_policy_and_a_closure(rng):
    params = two_weights(rng, 5, 4, 3)

    def predict(p, x):
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

        @functools.partial(jax.checkpoint, policy=policy)
        def block(x):
            return jnp.tanh(x @ p["one"]) @ p["two"]

        return block(x)

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def cond_on_the_batch(rng):
    params = {"one": weight(rng, 5, 3), "two": weight(rng, 5, 3)}

    def predict(p, x):
        return lax.cond(
            jnp.sum(x) > 0,
            lambda: jnp.tanh(x @ p["one"]),
            lambda: x @ p["two"] - 0.1 * (x @ p["one"]),
        )

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def cond_on_a_parameter(rng):
    params = {"w": weight(rng, 5, 3), "switch": jnp.float32(0.3)}

    def predict(p, x):
        return lax.cond(
            p["switch"] > 0,
            lambda w, x: p["switch"] * jnp.tanh(x @ w),
            lambda w, x: x @ w,
            p["w"],
            x,
        )

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def switch_between_experts(rng):
    params = [weight(rng, 5, 3), weight(rng, 5, 3), weight(rng, 5, 3)]

    def loss_fn(p, batch):
        branches = [lambda x, w=w: jnp.tanh(x @ w) for w in p]
        return mse(lax.switch(batch["i"], branches, batch["x"]), batch["y"])

    return params, loss_fn, {**pairs(rng, (2, 5), (2, 3)), "i": ids(rng, 3)}


@model
def fori_loop_with_static_bounds(rng):
    params = {"w": weight(rng, 4, 4), "b": normal(rng, 3, 4)}

    def predict(p, x):
        def body(i, x):
            return jnp.tanh(x @ p["w"] + p["b"][i])

        return lax.fori_loop(0, 3, body, x)

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def while_loop_on_values_without_gradient(rng):
    params = {"w": weight(rng, 4, 4)}

    def predict(p, x):
        # How long depends on batch and parameters; the result counts as a constant.
        w = lax.stop_gradient(p["w"])
        x = lax.while_loop(
            lambda state: (state[0] < 5) & (jnp.sum(jnp.square(state[1])) > 0.5),
            lambda state: (state[0] + 1, jnp.tanh(state[1] @ w)),
            (jnp.int32(0), lax.stop_gradient(x)),
        )[1]
        return x @ p["w"]

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def vmap_over_examples(rng):
    def predict(params, x):
        return jax.vmap(functools.partial(mlp, params))(x)

    return mlp_params(rng, [5, 4, 3]), regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def vmap_over_an_ensemble(rng):
    params = {"w": weight(rng, 3, 5, 4, fan_in=5), "b": normal(rng, 3, 4)}

    def predict(p, x):
        each = jax.vmap(tanh_layer, (0, None))(p, x)
        return jnp.mean(each, axis=0)

    return params, regression(predict), pairs(rng, (5,), (4,))


@model
def vmap_with_a_collective(rng):
    params = {"w": weight(rng, 5, 4), "scale": normal(rng, 4)}

    def predict(p, x):
        def one(x):
            y = x @ p["w"]
            return (y - lax.pmean(y, "example")) * p["scale"]

        return jax.vmap(one, axis_name="example")(x)

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


@model
def optimization_barrier_and_names(rng):
    params = {"w": weight(rng, 5, 4), "v": weight(rng, 4, 3)}

    def predict(p, x):
        with jax.named_scope("block"):
            w, x = lax.optimization_barrier((p["w"], x))
            y = checkpoint_name(jnp.tanh(x @ w), "hidden")
        return y @ checkpoint_name(p["v"], "v")

    return params, regression(predict), pairs(rng, (5,), (3,))
