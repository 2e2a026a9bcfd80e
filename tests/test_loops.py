"""Loops over parts of the environments, and when they take memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardvary
from hardvary import _loops
from tests.zoo import compile_quickly

NUM_ENVS = 7
W = np.linspace(-2, 3, NUM_ENVS * 5, dtype=np.float32).reshape(NUM_ENVS, 5)
N = np.arange(NUM_ENVS, dtype=np.int32)


def rows_of(part):
    """A row for each of some environments."""
    w, n = part
    return {"sum": jnp.sum(w, axis=-1), "twice": [2 * n], "half": w.astype("bfloat16")}


def sums_of(w, n):
    return {"w": jnp.sum(w, axis=0), "n": jnp.sum(n, axis=0)}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for own, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert own.dtype == other.dtype
        np.testing.assert_allclose(
            np.float32(own), np.float32(other), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    "arrays",
    [
        [np.zeros(3, np.float32)],
        [np.array([np.nan, 1.0], np.float32), np.zeros((), np.float16)],
        [np.array([np.inf]), np.array([-np.inf])],
        [np.array([np.nan], jnp.bfloat16), N, np.zeros(2, bool), np.zeros((0, 2))],
        [jax.random.key(0), np.complex64(1j)],
        [],
    ],
    ids=["zeros", "NaN", "infinities", "dtypes", "no numbers", "nothing"],
)
def test_zeros_after_are_zeros_whatever_the_arrays_hold(arrays):
    like = [
        jax.ShapeDtypeStruct((2, 3), "float32"),
        jax.ShapeDtypeStruct((), "bfloat16"),
        jax.ShapeDtypeStruct((4,), "int8"),
        jax.ShapeDtypeStruct((1,), "bool"),
    ]
    zeros = jax.jit(functools.partial(_loops.zeros_after, like))(arrays)
    for own, wanted in zip(zeros, like, strict=True):
        assert (own.shape, own.dtype) == (wanted.shape, wanted.dtype)
        assert not np.any(np.float32(own))


@pytest.mark.parametrize("size", [1, NUM_ENVS])
def test_results_of_parts_are_those_of_everything(size):
    inputs = jax.tree.map(jnp.asarray, (W, N))
    run = jax.jit(lambda inputs: _loops.in_parts(rows_of, inputs, size))
    assert_same(run(inputs), rows_of(inputs))


def test_results_of_parts_of_several_are_those_of_everything():
    inputs = jnp.asarray(W[:6]), jnp.asarray(N[:6])
    for size in (2, 3):
        assert_same(_loops.in_parts(rows_of, inputs, size), rows_of(inputs))


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4, NUM_ENVS, 100])
def test_sums_in_parts_are_those_of_everything(size, unroll):
    inputs = jnp.asarray(W), jnp.asarray(N)
    run = jax.jit(lambda *inputs: _loops.sum_in_parts(sums_of, inputs, size, unroll))
    assert_same(run(*inputs), sums_of(*inputs))


def test_loops_are_differentiated_and_mapped():
    def by_loops(w):
        squares = _loops.mapped(lambda row: jnp.sum(row**2), w)
        total = _loops.sum_in_parts(lambda w: jnp.sum(w**3, axis=0), [w], 2)
        return jnp.sum(squares**2) + jnp.sum(total)

    def at_once(w):
        return jnp.sum(jnp.sum(w**2, axis=1) ** 2) + jnp.sum(w**3)

    batch = jnp.stack([W, 2 * W + 1])
    found = jax.jit(jax.vmap(jax.value_and_grad(by_loops)))(batch)
    expected = jax.vmap(jax.value_and_grad(at_once))(batch)
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5)


def test_what_is_known_of_results_saves_a_trace():
    traced = []

    def function(row):
        traced.append(row)
        return jnp.sum(row)

    _loops.mapped(function, W)
    assert len(traced) == 2
    _loops.mapped(function, W, jax.ShapeDtypeStruct((), "float32"))
    assert len(traced) == 3


# Memory.


def temporary_bytes(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    compiled = compile_quickly(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_results_take_no_memory_before_the_loop_begins():
    """Twice 64 kB for a product, then 64 kB of results, never at the same time."""
    size = 128

    def run(x, map_over):
        large = jnp.tanh(x[:, None] * x[None, :])
        rows = jnp.sum(jnp.cos(large @ large), axis=0)
        results = map_over(lambda row: jnp.full(size, jnp.sin(row)), rows)
        return jnp.sum(jnp.tanh(results), axis=0)

    late, early = (
        temporary_bytes(functools.partial(run, map_over=map_over), (size,))
        for map_over in (_loops.mapped, jax.lax.map)
    )
    assert late < early - 4 * size * size / 2


def test_inner_products_of_convolutions_take_no_memory_in_the_forward_pass():
    """Nor in the backward pass of layers in front of theirs."""
    shapes = {"a": (8, 3, 3, 3), "b": (16, 8, 3, 3), "c": (32, 16, 3, 3)}
    params = {name: jax.ShapeDtypeStruct(s, "float32") for name, s in shapes.items()}
    batch = jax.ShapeDtypeStruct((32, 1, 3, 16, 16), "float32")
    param_bytes = 4 * sum(map(np.prod, shapes.values()))

    def loss_fn(params, x):
        for name in "abc":
            x = jax.nn.relu(jax.lax.conv(x, params[name], (1, 1), "SAME"))
            size = (1, 1, 2, 2)
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, size, size, "VALID")
        return jnp.mean(x**2)

    def plain(params, batch):
        losses = lambda params: jax.vmap(loss_fn, (None, 0))(params, batch)  # noqa: E731
        return jax.grad(lambda params: jnp.mean(losses(params)))(params)

    tx = hardvary.upgrad()

    def upgrad(params, batch):
        grads = hardvary.env_grads(loss_fn)(params, batch)
        return tx.update(grads, tx.init(params), params)[0]

    base, ours = (
        compile_quickly(step).lower(params, batch).compile().memory_analysis()
        for step in (plain, upgrad)
    )
    above = ours.temp_size_in_bytes - base.temp_size_in_bytes
    assert above <= 2 * param_bytes, above / param_bytes
