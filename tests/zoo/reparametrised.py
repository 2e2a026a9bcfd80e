"""Weights that are functions of parameters."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.blocks import (
    conv,
    floats,
    inputs,
    mse,
    normal,
    normalise,
    pairs,
    regression,
    weight,
)
from tests.zoo.model import model


@model
def weight_norm(rng):
    params = {"v": normal(rng, 5, 4), "g": normal(rng, 4)}

    def predict(p, x):
        norm = jnp.sqrt(jnp.sum(jnp.square(p["v"]), axis=0, keepdims=True))
        return x @ (p["g"][None] * p["v"] / norm)

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


@model
def weight_standardised_conv(rng):
    params = {"k": normal(rng, 3, 3, 2, 3)}

    def predict(p, x):
        return conv(x, normalise(p["k"], (0, 1, 2)))

    return params, regression(predict), pairs(rng, (2, 4, 4, 2), (2, 4, 4, 3))


@model
def spectral_norm_by_power_iteration(rng):
    params = {"w": normal(rng, 5, 4)}

    def predict(p, x):
        u = jnp.ones(5) / jnp.sqrt(5.0)
        for _ in range(3):
            v = p["w"].T @ u
            v = v / jnp.linalg.norm(v)
            u = p["w"] @ v
            u = u / jnp.linalg.norm(u)
        u, v = lax.stop_gradient((u, v))
        return x @ (p["w"] / (u @ p["w"] @ v))

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


@model
def softplus_of_a_parameter(rng):
    params = {"w": normal(rng, 5, 3), "b": normal(rng, 3)}

    def predict(p, x):
        return x @ jax.nn.softplus(p["w"]) + jnp.square(p["b"])[None]

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def weight_scaled_by_a_constant(rng):
    # Linear in the parameter, one use: equalised learning rate, and a mask.
    params = {"w": normal(rng, 5, 3), "v": normal(rng, 3, 2)}
    mask = floats(rng.integers(0, 2, size=(3, 2)))

    def predict(p, x):
        return jnp.tanh(x @ (p["w"] * -0.3)) @ (p["v"] * mask)

    return params, regression(predict), pairs(rng, (5,), (2,))


@model
def orthogonal_by_cayley(rng):
    params = {"w": normal(rng, 4, 4)}

    def predict(p, x):
        # Not `w - w.T`: the gradient of its diagonal is a difference of equals, which
        # is zero only where the compiler rounds both alike.
        upper = 0.3 * jnp.triu(p["w"], 1)
        skew = upper - upper.T
        return x @ jnp.linalg.solve(jnp.eye(4) + skew, jnp.eye(4) - skew)

    return params, regression(predict), pairs(rng, (3, 4), (3, 4))


@model
def gaussian_likelihood_by_cholesky(rng):
    params = {"root": normal(rng, 3, 3), "mean": normal(rng, 3)}

    def loss_fn(p, x):
        covariance = p["root"] @ p["root"].T + jnp.eye(3)
        root = jnp.linalg.cholesky(covariance)
        white = jax.scipy.linalg.solve_triangular(
            root, (x - p["mean"][None]).T, lower=True
        )
        log_det = jnp.sum(jnp.log(jnp.diagonal(root)))
        return 0.5 * jnp.mean(jnp.sum(jnp.square(white), axis=0)) + log_det

    return params, loss_fn, inputs(rng, 4, 3)


@model
def low_rank_adapter(rng):
    params = {"w": weight(rng, 5, 4), "a": weight(rng, 5, 2), "b": normal(rng, 2, 4)}

    def predict(p, x):
        return x @ (p["w"] + 0.5 * p["a"] @ p["b"])

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


@model
def hypernetwork(rng):
    params = {"generator": weight(rng, 3, 20), "bias": normal(rng, 20)}

    def loss_fn(p, batch):
        w = jnp.tanh(batch["task"] @ p["generator"] + p["bias"]).reshape(5, 4)
        return mse(batch["x"] @ w, batch["y"])

    batch = {**pairs(rng, (3, 5), (3, 4)), "task": inputs(rng, 3)}
    return params, loss_fn, batch


@model
def cumulative_sum_of_a_parameter(rng):
    params = {"steps": normal(rng, 5)}

    def predict(p, x):
        return jnp.sum(jax.nn.relu(x[:, None] - jnp.cumsum(p["steps"])[None]), axis=1)

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def sorted_parameter(rng):
    params = {"w": normal(rng, 5)}
    return params, regression(lambda p, x: jnp.sort(p["w"]) * x), pairs(rng, (5,), (5,))


@model
def sorted_activations(rng):
    params = {"w": weight(rng, 5, 6)}

    def predict(p, x):
        return jnp.sort(x @ p["w"], axis=-1)

    return params, regression(predict), pairs(rng, (3, 5), (3, 6))


@model
def stopped_gradient(rng):
    params = {"w": weight(rng, 5, 5), "target": weight(rng, 5, 5)}

    def loss_fn(p, x):
        online = jnp.tanh(x @ p["w"])
        target = lax.stop_gradient(jnp.tanh(x @ p["target"]))
        frozen = x @ lax.stop_gradient(p["w"])
        return mse(online, target) + 0.1 * jnp.mean(online * frozen)

    return params, loss_fn, inputs(rng, 3, 5)


@model
def straight_through_quantisation(rng):
    params = {"w": normal(rng, 5, 3)}

    def predict(p, x):
        rounded = jnp.round(2 * p["w"]) / 2
        return x @ (p["w"] + lax.stop_gradient(rounded - p["w"]))

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def polynomial_of_a_scalar(rng):
    def loss_fn(w, batch):
        return mse(w**3 - 2 * w**2 * batch["x"] + w, batch["y"])

    return jnp.float32(0.7), loss_fn, pairs(rng, (4,), (4,))
