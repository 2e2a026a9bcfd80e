"""Losses that the fused oracle cannot take apart: its error names a way that does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hardvary
from tests.fused._stacked import floats

GROUPS = jnp.array([[2, 3, 1], [6, 0, 0], [1, 1, 4]])


def ragged(w, env):
    return jnp.sum(jnp.sin(lax.ragged_dot(env["x"], w, env["groups"])))


def ragged_rows(w, env):
    weights = jnp.broadcast_to(env["x"][0, :, None], (3, 4, 5))
    return jnp.sum(jnp.sin(lax.ragged_dot(w[0], weights, env["groups"])))


def ragged_in_a_loop(w, env):
    step = lambda h, _: (jnp.sin(lax.ragged_dot(h, w, env["groups"])), None)  # noqa: E731
    return jnp.sum(lax.scan(step, env["x"], None, length=2)[0])


def ragged_in_remat(w, env):
    return jax.checkpoint(ragged)(w, env)


def ragged_of_the_same_groups(w, env):
    return ragged(w, {"x": env["x"], "groups": jnp.array([2, 3, 1])})


@pytest.mark.parametrize(
    "loss",
    [ragged, ragged_rows, ragged_in_a_loop, ragged_in_remat, ragged_of_the_same_groups],
)
def test_ragged_product_is_right_or_names_the_way_out(loss):
    # jax.vmap does not take all of them in every version of JAX.
    w, batch = floats(3, 4, 4), {"x": floats(3, 6, 4, seed=1), "groups": GROUPS}
    if loss is ragged_rows:
        w = floats(1, 6, 4)
    expected = [
        jax.grad(loss)(w, jax.tree.map(lambda leaf, i=i: leaf[i], batch))
        for i in range(3)
    ]
    by_method = {}
    for method in ("fused", "scan"):
        try:
            by_method[method] = hardvary.grad_stats(loss, method=method)(w, batch).mean
        except ValueError as error:
            if method == "scan" or "method='scan') takes it" not in str(error):
                raise
    for mean in by_method.values():
        np.testing.assert_allclose(mean, sum(expected) / 3, rtol=1e-4, atol=1e-5)


def closing(kind, place):
    """A loss with a function that closes over the batch, with a rule of its own."""

    def loss(w, x):
        if kind == "jvp":
            scaled = jax.custom_jvp(lambda y: y * x[0])
            scaled.defjvp(lambda y, dy: (scaled(y[0]), dy[0] * x[0]))
        else:
            scaled = jax.custom_vjp(lambda y: y * x[0])
            scaled.defvjp(lambda y: (scaled(y), None), lambda _, g: (g * x[0],))

        def step(h, _):
            return jnp.tanh(scaled(w @ h)), None

        branches = (lambda w, x: w @ x, lambda w, x: scaled(w @ x))
        h = {
            "activations": lambda: scaled(w @ x),
            "weights": lambda: scaled(w) @ x,
            "remat": lambda: jax.checkpoint(lambda w, x: scaled(w @ x))(w, x),
            "vmap": lambda: jax.vmap(scaled)(w @ x[:, None]),
            "loop": lambda: lax.scan(step, x, None, length=2)[0],
            "jit": lambda: jax.jit(lambda w, x: scaled(w @ x))(w, x),
            "cond of the batch": lambda: lax.cond(x[1] > 0, *branches, w, x),
            "cond of weights": lambda: lax.cond(w[0, 0] > 0, *branches, w, x),
            "switch": lambda: lax.switch(1, branches, w, x),
        }[place]()
        return jnp.sum(jnp.square(h))

    return loss


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
@pytest.mark.parametrize("place", ["activations", "weights", "remat", "vmap"])
def test_rule_that_closes_over_the_batch_names_the_mend_and_the_way_out(kind, place):
    loss, w, x = closing(kind, place), floats(2, 2), floats(3, 2, seed=1)
    asks = {
        "stats": lambda: hardvary.grad_stats(loss)(w, x),
        "gramian": lambda: hardvary.env_grads(loss)(w, x).gramian(),
        "combine": lambda: hardvary.env_grads(loss)(w, x).combine(jnp.ones(3)),
    }
    for ask in asks.values():
        with pytest.raises(ValueError, match=r"take as an argument.*method='vmap'"):
            ask()
    mean = hardvary.grad_stats(loss, method="vmap")(w, x).mean
    expected = jax.vmap(jax.grad(loss), (None, 0))(w, x).mean(0)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("vjp", "loop"),
        ("jvp", "jit"),
        ("vjp", "jit"),
        ("jvp", "cond of the batch"),
        ("vjp", "cond of weights"),
        ("jvp", "switch"),
    ],
)
def test_rule_that_closes_over_the_batch_is_promised_no_way_that_fails(kind, place):
    loss, w, x = closing(kind, place), floats(2, 2), floats(3, 2, seed=1)
    # JAX traces it and cannot run it, and says so in other words in every version.
    with pytest.raises(Exception):  # noqa: B017, PT011
        hardvary.grad_stats(loss, method="vmap")(w, x)
    with pytest.raises(ValueError, match=r"take as an argument$"):
        hardvary.grad_stats(loss)(w, x)


def test_fault_of_the_loss_is_said_as_jax_says_it():
    def loss(w, x):
        return jnp.sum(w @ x[:1])

    with pytest.raises(TypeError, match="dot_general"):
        hardvary.grad_stats(loss)(floats(2, 2), floats(3, 2, seed=1))
