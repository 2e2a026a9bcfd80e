"""Derivatives inside the loss, and rules for them that are not the true ones."""

import functools

import jax
import jax.numpy as jnp

from tests.zoo.blocks import (
    inputs,
    mlp_params,
    mse,
    normal,
    pairs,
    regression,
    two_weights,
    weight,
)
from tests.zoo.model import model


@model
def custom_jvp_activation(rng):
    @jax.custom_jvp
    def activation(x, slope):
        return jnp.where(x > 0, x, slope * x)

    @activation.defjvp
    def _(primals, tangents):
        (x, slope), (dx, dslope) = primals, tangents
        # Not the true derivative: whoever differentiates the body is found out.
        return activation(x, slope), jnp.where(x > 0, 2 * dx, slope * dx + x * dslope)

    params = {"w": weight(rng, 5, 4), "slope": normal(rng)}

    def predict(p, x):
        return activation(x @ p["w"], p["slope"])

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


@model
def custom_vjp_dense(rng):
    @jax.custom_vjp
    def dense(w, x):
        return x @ w

    def forward(w, x):
        return dense(w, x), (w, x)

    def backward(residuals, cotangent):
        w, x = residuals
        # Not the true derivative, as above: clipped.
        return x.T @ jnp.clip(cotangent, -0.1, 0.1), cotangent @ w.T

    dense.defvjp(forward, backward)
    params = two_weights(rng, 5, 4, 3)

    def predict(p, x):
        return dense(p["two"], jnp.tanh(dense(p["one"], x)))

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def custom_vjp_with_static_arguments(rng):
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def scaled_gradient(x, scale):
        return x

    scaled_gradient.defvjp(
        lambda x, scale: (x, None), lambda scale, _, ct: (scale * ct,)
    )
    params = two_weights(rng, 5, 4, 3)

    def predict(p, x):
        # The gradient of the first weight is turned around, of the second doubled.
        hidden = jnp.tanh(x @ scaled_gradient(p["one"], -1.0))
        return hidden @ scaled_gradient(p["two"], 2.0)

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def gradient_penalty(rng):
    params = mlp_params(rng, [5, 4, 1])

    def loss_fn(p, batch):
        def score(x):
            hidden = jnp.tanh(x @ p[0]["w"] + p[0]["b"])
            return (hidden @ p[1]["w"] + p[1]["b"])[0]

        values, slopes = jax.vmap(jax.value_and_grad(score))(batch)
        norms = jnp.sqrt(jnp.sum(jnp.square(slopes), axis=1))
        return jnp.mean(values) + jnp.mean(jnp.square(norms - 1))

    return params, loss_fn, inputs(rng, 3, 5)


@model
def hamiltonian_by_jvp(rng):
    params = {"w": weight(rng, 4, 4)}

    def loss_fn(p, batch):
        value, slope = jax.jvp(
            lambda x: jnp.tanh(x @ p["w"]), (batch["x"],), (batch["y"],)
        )
        return jnp.mean(jnp.square(value - slope))

    return params, loss_fn, pairs(rng, (2, 4), (2, 4))


@model
def penalty_on_the_parameters_gradient(rng):
    # As in IRM: the gradient of the loss with respect to a parameter, in the loss.
    params = {"w": weight(rng, 5, 3), "scale": jnp.float32(1.0)}

    def loss_fn(p, batch):
        def risk(scale):
            return mse(scale * jnp.tanh(batch["x"] @ p["w"]), batch["y"])

        return risk(p["scale"]) + jnp.square(jax.grad(risk)(p["scale"]))

    return params, loss_fn, pairs(rng, (3, 5), (3, 3))


@model
def model_of_an_inner_gradient_step(rng):
    # As in MAML: the adapted weight is a function of parameter and batch together.
    params = {"w": weight(rng, 5, 3)}

    def loss_fn(p, batch):
        def inner(w):
            return mse(jnp.tanh(batch["x"][:2] @ w), batch["y"][:2])

        adapted = p["w"] - 0.1 * jax.grad(inner)(p["w"])
        return mse(jnp.tanh(batch["x"][2:] @ adapted), batch["y"][2:])

    return params, loss_fn, pairs(rng, (4, 5), (4, 3))
