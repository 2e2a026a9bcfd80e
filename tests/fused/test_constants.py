"""Constants that a loss makes reach the user's own functions as JAX arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.fused._stacked import assert_equals_stacked, floats

KNOTS = (1.0, 2.0)


@jax.custom_vjp
def weigh(x, knots):
    return jnp.sum(x) * jnp.sum(knots)


def weigh_forward(x, knots):
    # As an ODE solver does with its times.
    first = lax.fori_loop(0, 1, lambda i, total: total + knots.ravel()[i], 0.0)
    return weigh(x, knots), (x, knots.at[...].add(0.0), first)


def weigh_backward(residuals, g):
    x, knots, _ = residuals
    total = lax.fori_loop(0, knots.size, lambda i, s: s + knots.ravel()[i], 0.0)
    return g * total * jnp.ones_like(x), knots.at[...].set(0.0)


weigh.defvjp(weigh_forward, weigh_backward)


@jax.custom_jvp
def stretch(x, knots):
    return x * knots.at[0].get()


@stretch.defjvp
def _(primals, tangents):
    x, knots = primals
    return stretch(x, knots), tangents[0] * knots.at[0].get() * 2


def of_scan(w, x):
    step = lambda h, x: (h + weigh(jnp.tanh(w @ x), jnp.array(KNOTS)), None)  # noqa: E731
    return lax.scan(step, 0.0, jnp.stack([x, x + 1]))[0]


LOSSES = {
    "beside_the_batch": lambda w, x: weigh(w @ x, jnp.array(KNOTS)),
    "beside_parameters": lambda w, x: weigh(w, jnp.array(KNOTS)) * x[0],
    "of_numpy": lambda w, x: weigh(w, jnp.asarray(np.array(KNOTS, np.float32))) * x[0],
    "single_number": lambda w, x: weigh(w @ x, jnp.float32(2)),
    "single_number_beside_parameters": lambda w, x: weigh(w, jnp.float32(2)) * x[0],
    "in_jit": jax.jit(lambda w, x: weigh(w @ x, jnp.array(KNOTS))),
    "in_jit_beside_parameters": lambda w, x: (
        jax.jit(lambda w: weigh(w, jnp.array(KNOTS)))(w) * x[0]
    ),
    "in_remat": lambda w, x: jax.checkpoint(
        lambda w, x: weigh(w @ x, jnp.array(KNOTS))
    )(w, x),
    "in_scan": of_scan,
    "in_cond": lambda w, x: lax.cond(
        x[0] > 0, lambda: weigh(w @ x, jnp.array(KNOTS)), lambda: jnp.sum(w)
    ),
    "jvp_beside_the_batch": lambda w, x: jnp.sum(stretch(w @ x, jnp.array(KNOTS))),
    "jvp_beside_parameters": lambda w, x: (
        jnp.sum(stretch(w, jnp.array([KNOTS])[0])) * x[0]
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_constant_of_a_loss_reaches_a_rule_of_its_own_as_an_array(loss):
    assert_equals_stacked(loss, floats(2, 2), floats(3, 2, seed=1))
