"""Values that parameters determine and no gradient reaches, beside those that it does.

They are computed once, outside of the mapped pass, and every use that reads them finds
them there: in loops, in loops in loops, under remat, behind rules of the user's own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hardvary
from tests.fused._stacked import assert_equals_stacked, floats


@jax.custom_vjp
def quantise(w):
    return jnp.round(4 * w) / 4


quantise.defvjp(lambda w: (quantise(w), None), lambda _, g: (g,))


@jax.custom_jvp
def softened(w):
    return jnp.tanh(w)


softened.defjvp(lambda primals, tangents: (softened(*primals), tangents[0]))

# How a value loses its gradient.
FREEZE = {
    "stop_gradient": lax.stop_gradient,
    "rounded": lambda w: jnp.floor(3 * w),
    "sign": jnp.sign,
    "to_integers": lambda w: (8 * w).astype(jnp.int32).astype(jnp.float32),
    "argmax": lambda w: jax.nn.one_hot(jnp.argmax(w, -1), w.shape[-1]),
    "relu_behind": lambda w: jax.nn.relu(lax.stop_gradient(w)),
    "quantised_behind": lambda w: quantise(lax.stop_gradient(w)),
    "softened_behind": lambda w: softened(lax.stop_gradient(w)),
    "inside_of_jit": jax.jit(lambda w: lax.stop_gradient(w) * 2),
    "inside_of_remat": jax.checkpoint(lambda w: jnp.sin(lax.stop_gradient(w))),
}
freezes = pytest.mark.parametrize("freeze", FREEZE.values(), ids=FREEZE)
SOME = ("stop_gradient", "argmax", "quantised_behind")
some_freezes = pytest.mark.parametrize(
    "freeze", [FREEZE[name] for name in SOME], ids=SOME
)


@pytest.fixture
def layers():
    return {
        "base": floats(3, 4, 4),
        "down": floats(3, 4, 2, seed=1),
        "up": floats(3, 2, 4, seed=2),
    }


@pytest.fixture
def x():
    return floats(5, 2, 4, seed=3)


@freezes
def test_frozen_slices_of_scanned_layers(freeze, layers, x):
    def loss(p, x):
        def layer(h, q):
            return jnp.tanh(h @ freeze(q["base"]) + (h @ q["down"]) @ q["up"]), None

        return jnp.sum(lax.scan(layer, x, p)[0] ** 2)

    grads = assert_equals_stacked(loss, layers, x)
    assert not np.any(grads["base"])
    assert np.all(np.any(grads["up"], axis=(1, 2, 3)))


@some_freezes
def test_frozen_slices_of_rematerialised_scanned_layers(freeze, layers, x):
    @jax.checkpoint
    def block(h, base, down, up):
        return jnp.tanh(h @ base + (h @ down) @ up)

    def loss(p, x):
        def layer(h, q):
            return block(h, freeze(q["base"]), q["down"], q["up"]), None

        return jnp.sum(lax.scan(layer, x, p)[0] ** 2)

    assert_equals_stacked(loss, layers, x)


@some_freezes
def test_frozen_value_before_a_loop_that_adds_a_trained_one(freeze, x):
    def loss(p, x):
        base = freeze(p["base"])
        step = lambda h, _: (jnp.tanh(h @ (base + p["w"])), None)  # noqa: E731
        return jnp.sum(lax.scan(step, x, None, length=3)[0] ** 2)

    assert_equals_stacked(loss, {"base": floats(4, 4), "w": floats(4, 4, seed=1)}, x)


@some_freezes
def test_frozen_part_of_a_parameter_that_is_trained_as_well(freeze, x):
    # The same parameter, frozen and not, in one use.
    def loss(w, x):
        step = lambda h, w: (jnp.tanh(h @ (freeze(w) * jnp.cos(w))), None)  # noqa: E731
        return jnp.sum(lax.scan(step, x, w)[0] ** 2)

    assert_equals_stacked(loss, floats(3, 4, 4), x)


@some_freezes
def test_frozen_value_in_remat(freeze, x):
    block = jax.checkpoint(lambda w, x, gain: jnp.tanh(x @ w) * gain)

    def loss(p, x):
        return jnp.sum(block(p["w"], x, freeze(p["gain"])) ** 2)

    assert_equals_stacked(loss, {"w": floats(4, 4), "gain": floats(1, 4, seed=1)}, x)


@some_freezes
def test_frozen_value_in_a_branch(freeze, x):
    def loss(p, x):
        base = freeze(p["base"])
        return jnp.sum(
            lax.cond(
                x[0, 0] > 0,
                lambda: jnp.tanh(x @ (base + p["w"])),
                lambda: jnp.sin(x @ p["w"]) * base[:1],
            )
        )

    assert_equals_stacked(loss, {"base": floats(4, 4), "w": floats(4, 4, seed=1)}, x)


@some_freezes
@pytest.mark.parametrize("outer", ["scanned", "the same"])
def test_frozen_value_in_a_loop_in_a_loop(freeze, outer, x):
    def loss(p, x):
        def inner(frozen, h, q):
            return jnp.tanh(h @ (frozen + q["w"]) + freeze(q["bias"])), None

        def layer(h, q):
            frozen = freeze(q["base"])
            return lax.scan(functools.partial(inner, frozen), h, q["inner"])[0], None

        if outer == "scanned":
            return jnp.sum(lax.scan(layer, x, p)[0] ** 2)
        first = jax.tree.map(lambda leaf: leaf[0], p)
        step = lambda h, _: layer(h, first)  # noqa: E731
        return jnp.sum(lax.scan(step, x, None, length=2)[0] ** 2)

    params = {
        "base": floats(2, 4, 4),
        "inner": {"w": floats(2, 3, 4, 4, seed=1), "bias": floats(2, 3, 1, 4, seed=2)},
    }
    assert_equals_stacked(loss, params, x)


def test_index_that_parameters_choose_in_a_loop(x):
    # An integer inside of the loop's body, of what it runs over.
    def loss(p, x):
        def layer(h, q):
            row = jnp.argmax(q["choice"])
            return jnp.tanh(h @ q["w"] + q["table"][row][None]), None

        return jnp.sum(lax.scan(layer, x, p)[0] ** 2)

    params = {
        "choice": floats(3, 5),
        "w": floats(3, 4, 4, seed=1),
        "table": floats(3, 5, 4, seed=2),
    }
    assert not np.any(assert_equals_stacked(loss, params, x)["choice"])


def test_order_of_parameters_in_a_loop(x):
    # One equation with a value that gradients reach and one that they do not.
    def loss(w, x):
        def layer(h, w):
            values, places = lax.top_k(w, 2)
            return jnp.tanh(h[:, :2] @ values.T + w[0, places[0, 0]]), None

        return jnp.sum(lax.scan(layer, x, w)[0] ** 2)

    assert_equals_stacked(loss, floats(3, 4, 4), x)


SCALE = np.array([[0.5, 1.0, 2.0, -1.0]], np.float32)


@pytest.mark.parametrize(
    "function",
    [jax.nn.relu, jax.nn.silu, quantise, softened, jnp.tanh],
    ids=["relu", "silu", "quantise", "softened", "tanh"],
)
@pytest.mark.parametrize("place", ["loop", "remat", "beside"])
def test_constant_behind_a_rule_of_its_own(function, place, x):
    def loss(w, x):
        gain = function(jnp.array(SCALE))
        if place == "loop":
            step = lambda h, _: (jnp.tanh(h @ (w * gain)), None)  # noqa: E731
            return jnp.sum(lax.scan(step, x, None, length=3)[0] ** 2)
        if place == "remat":
            block = jax.checkpoint(lambda w, x, gain: jnp.tanh(x @ w) * gain)
            return jnp.sum(block(w, x, gain) ** 2)
        return jnp.sum(jnp.tanh(x @ (w * gain)) ** 2)

    assert_equals_stacked(loss, floats(4, 4), x)


@pytest.mark.parametrize("function", [quantise, softened], ids=["vjp", "jvp"])
def test_parameter_behind_a_rule_of_its_own_in_a_loop(function, x):
    def loss(p, x):
        shared = function(p["shared"])
        step = lambda h, w: (jnp.tanh(h @ function(w) + shared), None)  # noqa: E731
        return jnp.sum(lax.scan(step, x, p["w"])[0] ** 2)

    assert_equals_stacked(
        loss, {"shared": floats(1, 4), "w": floats(3, 4, 4, seed=1)}, x
    )


def test_frozen_parameter_is_unused():
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ lax.stop_gradient(p["base"]) + p["bias"]))

    params = {"base": floats(4, 4), "bias": floats(4)}
    rows = hardvary.explain(loss, params, floats(5, 4)).parameters
    assert [row.rule for row in rows] == ["unused", "stack"]
