"""Loops: what every step uses by an operation without a rule is copied outside."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hardvary
from hardvary.fused.traced import Traced
from tests._compat import subjaxprs
from tests.fused._stacked import assert_equals_stacked, floats

STEPS, WIDTH = 5, 4


@jax.custom_vjp
def cell(w, h, x):
    return jnp.tanh(h @ w + x)


def cell_backward(residuals, g):
    w, h, out = residuals
    g = g * (1 - out**2)
    return jnp.outer(h, g), g @ w.T, g


cell.defvjp(lambda w, h, x: (cell(w, h, x), (w, h, cell(w, h, x))), cell_backward)


def over(step, x):
    """The last state of a loop over `x`."""
    return lax.scan(lambda h, x: (step(h, x), None), jnp.zeros(WIDTH), x)[0]


def plain(p, x):
    return over(functools.partial(cell, p["w"]), x)


def derived_outside(p, x):
    w = jnp.sin(p["w"]) * p["scale"]
    return over(lambda h, x: cell(w, h, x), x)


def derived_inside(p, x):
    # Of constants that the body holds, too.
    mask = jnp.asarray(np.tri(WIDTH, dtype=np.float32))
    return over(lambda h, x: cell(jnp.sin(p["w"] * mask) * p["scale"], h, x), x)


def derived_inside_of_jit(p, x):
    weight = jax.jit(lambda p: jnp.sin(p["w"]) * p["scale"])
    return over(lambda h, x: cell(weight(p), h, x), x)


def in_two_ways(p, x):
    # Once by a rule, once without one.
    return over(lambda h, x: cell(p["w"], jnp.tanh(h @ p["w"]), x), x)


def twice(p, x):
    return over(lambda h, x: cell(p["w"], cell(p["w"], h, x), x * p["scale"]), x)


def branch(p, x):
    def step(h, x):
        return lax.cond(
            x[0] > 0, lambda: jnp.tanh(h @ p["w"] + x), lambda: h * p["scale"]
        )

    return over(step, x)


def bias(p, x):
    return over(lambda h, x: jnp.tanh(h + x + p["b"]), x)


def loop_in_a_loop(p, x):
    def outer(h, x):
        inner = lambda h, _: (cell(p["w"] * p["scale"], h, x), None)  # noqa: E731
        return lax.scan(inner, h, None, length=3)[0]

    return over(outer, x)


def changed_by_the_outer_loop(p, x):
    # The inner loop's weight is another one at each step of the outer one.
    def outer(h, inputs):
        x, gain = inputs
        inner = lambda h, _: (cell(p["w"] * gain, h, x), None)  # noqa: E731
        return lax.scan(inner, h, None, length=3)[0], None

    return lax.scan(outer, jnp.zeros(WIDTH), (x, p["gains"]))[0]


def layers(p, x):
    return lax.scan(lambda h, w: (cell(w, h, x[0]), None), x[1], p["layers"])[0]


def carried_along(p, x):
    def step(carry, x):
        w, h = carry
        return (w, cell(w, h, x)), None

    return lax.scan(step, (p["w"], jnp.zeros(WIDTH)), x)[0][1]


def changed_by_the_loop(p, x):
    def step(carry, x):
        w, h = carry
        return (0.5 * w, cell(w, h, x)), None

    return lax.scan(step, (p["w"], jnp.zeros(WIDTH)), x)[0][1]


def put_out(p, x):
    # What the body puts out at each step, and hands on, is the parameter's alone.
    def step(h, x):
        return jnp.sin(p["b"]), (h * x, jnp.cos(p["b"]))

    last, (first, second) = lax.scan(step, jnp.zeros(WIDTH), x)
    return last + jnp.sum(first * second, 0)


def backwards(p, x):
    step = lambda h, x: (cell(p["w"], h, x), h)  # noqa: E731
    h, every = lax.scan(step, jnp.zeros(WIDTH), x, reverse=True, unroll=2)
    return h + every[1]


def rematerialised(p, x):
    block = jax.checkpoint(lambda w, h, x: cell(jnp.sin(w), h, x))
    return over(lambda h, x: block(p["w"], h, x), x)


def counted(p, x):
    return lax.fori_loop(0, 3, lambda i, h: cell(p["w"], h, x[0]) + h[i], x[1])


PROGRAMS = {
    f.__name__: f
    for f in (
        plain,
        derived_outside,
        derived_inside,
        derived_inside_of_jit,
        in_two_ways,
        twice,
        branch,
        bias,
        loop_in_a_loop,
        changed_by_the_outer_loop,
        layers,
        carried_along,
        changed_by_the_loop,
        put_out,
        backwards,
        rematerialised,
        counted,
    )
}


@pytest.fixture
def params():
    return {
        "w": floats(WIDTH, WIDTH),
        "scale": jnp.float32(0.7),
        "b": floats(WIDTH, seed=1),
        "gains": floats(STEPS, seed=2),
        "layers": floats(3, WIDTH, WIDTH, seed=3),
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_of_a_loop(name, params):
    def loss(p, x):
        return jnp.sum(jnp.square(PROGRAMS[name](p, x) - 0.1))

    assert_equals_stacked(loss, params, floats(3, STEPS, WIDTH, seed=4))


def largest(jaxpr):
    """Entries of the largest array that is computed anywhere in a jaxpr."""
    sizes = [math.prod(var.aval.shape) for eqn in jaxpr.eqns for var in eqn.outvars]
    inner = [largest(inner) for inner in subjaxprs(jaxpr)]
    return max([*sizes, *inner], default=0)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "derived_inside",
        "derived_inside_of_jit",
        "in_two_ways",
        "loop_in_a_loop",
        "carried_along",
    ],
)
def test_weight_of_a_loop_has_a_copy_for_each_environment_and_not_each_step(
    name, params
):
    num_envs, steps = 3, 1000
    x = jax.ShapeDtypeStruct((num_envs, steps, WIDTH), jnp.float32)
    oracle = hardvary.grad_stats(lambda p, x: jnp.sum(PROGRAMS[name](p, x)))
    jaxpr = jax.make_jaxpr(oracle)(params, x).jaxpr
    # Activations of every step, three of an inner loop, and no weights.
    assert largest(jaxpr) <= 3 * num_envs * steps * WIDTH


def test_layers_of_a_loop_have_a_copy_each(params):
    num_envs = 3
    x = jax.ShapeDtypeStruct((num_envs, STEPS, WIDTH), jnp.float32)
    oracle = hardvary.grad_stats(lambda p, x: jnp.sum(layers(p, x)))
    jaxpr = jax.make_jaxpr(oracle)(params, x).jaxpr
    assert largest(jaxpr) == num_envs * params["layers"].size


@pytest.mark.parametrize(
    ("name", "steps"),
    [("plain", ()), ("loop_in_a_loop", ()), ("layers", (3,))],
)
def test_copy_names_its_reason_and_the_loops_around_it(name, steps, params):
    x = jnp.zeros((3, STEPS, WIDTH))
    found = []

    def uses(params, x):
        loss = lambda p, x: (jnp.sum(PROGRAMS[name](p, x)), None)  # noqa: E731
        found.extend(Traced(loss, params, x, None).program.uses)

    jax.eval_shape(uses, params, x)
    assert {(use.primitive, use.steps) for use in found} == {("copy", steps)}
    assert {use.reason for use in found} == {"custom_vjp_call"}


def test_layers_that_share_a_norm_over_environments_keep_their_rule():
    def loss(p, x):
        def layer(h, q):
            h = h @ q["w"]
            h = h - lax.pmean(h, "env")
            return jnp.tanh(h * q["scale"]), None

        return jnp.sum(lax.scan(layer, x, p)[0] ** 2)

    params = {"w": floats(3, WIDTH, WIDTH), "scale": floats(3, 1, WIDTH, seed=1)}
    x = floats(5, 2, WIDTH, seed=2)
    explanation = hardvary.explain(loss, params, x, env_axis_name="env")
    assert "dot_general" in explanation.parameters[1].reason

    # The definition: every environment has its own copy of the parameters.
    def total(copies):
        return jnp.sum(jax.vmap(loss, axis_name="env")(copies, x))

    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), params)
    expected = jax.jit(jax.grad(total))(copies)
    actual = hardvary.env_grads(loss, env_axis_name="env")(params, x)
    for grad, other in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(grad.stack(), other, rtol=1e-4, atol=1e-5)


def test_loop_that_prints_keeps_its_rule(capfd):
    def loss(w, x):
        def layer(h, w):
            jax.debug.print("seen {}", h[0])
            return jnp.tanh(h @ w), None

        return jnp.sum(lax.scan(layer, x, w)[0])

    w, x = floats(3, WIDTH, WIDTH), floats(2, WIDTH, seed=1)
    (row,) = hardvary.explain(loss, w, x).parameters
    assert row.reason == "in dot_general"
    capfd.readouterr()
    stats = jax.jit(hardvary.grad_stats(loss))(w, x)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("seen") == 2 * 3
    expected = hardvary.grad_stats(loss, method="vmap")(w, x)
    np.testing.assert_allclose(stats.mean, expected.mean, rtol=1e-5, atol=1e-6)
