"""Equations and products that are written as XLA on CPU likes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hardvary
from hardvary import _compat, sharding
from hardvary.fused import rewrites
from hardvary.fused.rules.multiply import multiply_rows
from tests._compat import enable_x64, equations_of
from tests.fused._stacked import floats

pytestmark = pytest.mark.skipif(
    not sharding.on_cpu(), reason="nothing is rewritten on other devices"
)

ROW, COLUMN = (1, 64), (32, 1)
# Zeros, for a maximum that two reach at once, and one of either infinity and a NaN.
IMAGE = floats(32, 64).at[::3].set(0).at[1, :3].set([jnp.inf, -jnp.inf, jnp.nan])


@pytest.fixture(autouse=True)
def rewriting(monkeypatch):
    monkeypatch.setattr(_compat, "NEW_CPU_SUMS", True)


def barriers(function, *arguments):
    equations = equations_of(jax.make_jaxpr(function)(*arguments).jaxpr)
    return sum(eqn.primitive.name == "optimization_barrier" for eqn in equations)


def again(function):
    """`function`, a single equation, as the fused oracle runs it."""

    def run(*arguments):
        (eqn,) = jax.make_jaxpr(function)(*arguments).eqns
        given = iter(arguments)
        filled = [var.val if hasattr(var, "val") else next(given) for var in eqn.invars]
        (result,) = rewrites.run(eqn, filled, [True] * len(filled))
        return result

    return run


BROADCAST = {
    "relu": (jax.nn.relu, (IMAGE,)),
    "maximum with a number": (lambda x: lax.max(x, 0.0), (IMAGE,)),
    "maximum of columns": (lax.max, (IMAGE, floats(*COLUMN))),
    "minimum with a row": (lax.min, (floats(*ROW), IMAGE)),
    "times a row": (lax.mul, (IMAGE, floats(*ROW))),
    "a row times columns": (lax.mul, (floats(*ROW), floats(*COLUMN))),
    "over columns": (lax.div, (IMAGE, 2 + floats(*COLUMN) ** 2)),
    "a row over an image": (lax.div, (floats(*ROW), 2 + IMAGE**2)),
    "complex": (lax.mul, (IMAGE * (1 + 2j), floats(*ROW) * (1 - 1j))),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_an_operation_with_operands_of_its_own_is_the_same(name):
    function, arguments = BROADCAST[name]
    if len({x.ndim and x.shape for x in arguments}) > 1 and not _implicit():
        pytest.skip("this jax writes every broadcast down")
    mine = again(function)
    assert barriers(mine, *arguments) > 0 == barriers(function, *arguments)
    np.testing.assert_array_equal(mine(*arguments), function(*arguments))

    directions = tuple(jnp.cos(x) for x in map(jnp.nan_to_num, arguments))

    def tangent(way):
        return lambda *points: jax.jvp(way, points, directions)[1]

    def pulled(way):
        def pull(*points):
            result, back = jax.vjp(way, *points)
            return back(jnp.ones_like(result))

        return pull

    for derivative in (tangent, pulled):
        expected = derivative(function)(*arguments)
        actual = derivative(mine)(*arguments)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    # Second derivatives, and many at once.
    both = [tangent(tangent(way))(*arguments) for way in (mine, function)]
    np.testing.assert_array_equal(*both)
    several = tuple(jnp.stack([x, -x, 2 * x]) for x in arguments)
    both = [jax.vmap(pulled(way))(*several) for way in (mine, function)]
    jax.tree.map(np.testing.assert_array_equal, *both)


def _implicit():
    try:
        jax.eval_shape(lax.mul, floats(*ROW), floats(*COLUMN))
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_operands_of_ones_own_keep_the_dtype(dtype):
    with enable_x64(dtype == "float64"):
        x = IMAGE.astype(dtype)
        result = again(jax.nn.relu)(x)
        assert result.dtype == x.dtype
        # NumPy does not know that a NaN of bfloat16 is one.
        both = [np.asarray(y, np.float64) for y in (result, jax.nn.relu(x))]
        np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2.0,
        lambda x: x / 3.0,
        lambda x: x * x,
        lambda x: x + 1.0,
        jax.nn.softplus,
        lambda x: jnp.maximum(x[:4, :4], 0.0),
        lambda x: jnp.maximum(x.astype("int32"), 0),
    ],
    ids=["times", "over", "squared", "plus", "softplus", "small", "integers"],
)
def test_everything_else_stays_as_it_is(function):
    def run(x):
        (*_, eqn) = jax.make_jaxpr(function)(x).eqns
        inputs = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        return rewrites.run(eqn, inputs, [True] * len(inputs))

    assert barriers(run, IMAGE) == 0


def test_zeros_of_a_relu_before_a_pool_are_not_written_down(monkeypatch):
    if jax.__version_info__ < (0, 10):
        pytest.skip("sums are not one with what is summed")
    side, channels, num_envs = 16, 32, 8
    kernel, bias = floats(3, 3, 3, channels), floats(channels)
    images = floats(num_envs, 1, side, side, 3)

    def loss(params, image):
        kernel, bias = params
        layout = ("NHWC", "HWIO", "NHWC")
        out = lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=layout
        )
        window = (1, 2, 2, 1)
        out = jax.nn.relu(out + bias[None, None, None])
        pooled = lax.reduce_window(out, 0.0, lax.add, window, window, "VALID")
        return jnp.sum(pooled**2)

    def step(params, images):
        grads = hardvary.env_grads(loss)(params, images)
        return [grad.mean() for grad in grads]

    sizes = {}
    for rewriting in (True, False):
        monkeypatch.setattr(_compat, "NEW_CPU_SUMS", rewriting)
        compiled = jax.jit(lambda *args: step(*args)).lower((kernel, bias), images)
        sizes[rewriting] = compiled.compile().memory_analysis().temp_size_in_bytes
    written = 4 * num_envs * side * side * channels
    assert sizes[True] <= sizes[False] - 0.9 * written


# Axes of rows, of components and of what both have, in any order.
PRODUCTS = {
    "rows first": ((80, 512), (80, 10), (((0,), (0,)), ((), ()))),
    "rows last": ((512, 80), (10, 80), (((1,), (1,)), ((), ()))),
    "many rows": ((2048, 256), (2048, 100), (((0,), (0,)), ((), ()))),
    "batches": ((3, 128, 512), (3, 128, 10), (((1,), (1,)), ((0,), (0,)))),
    "batches behind": ((128, 512, 3), (10, 3, 128), (((0,), (2,)), ((2,), (1,)))),
    "two of each": (
        (16, 2, 8, 32, 16),
        (16, 2, 8, 5, 2),
        (((0, 2), (0, 2)), ((1,), (1,))),
    ),
}
ALIKE = {
    "as wide": ((80, 64), (80, 64), (((0,), (0,)), ((), ()))),
    "wider": ((80, 10), (80, 512), (((0,), (0,)), ((), ()))),
    "few rows": ((16, 512), (16, 10), (((0,), (0,)), ((), ()))),
    "a vector": ((80, 512), (80,), (((0,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("name", [*PRODUCTS, *ALIKE])
def test_a_product_of_rows_is_dot_general(name):
    left, right, numbers = {**PRODUCTS, **ALIKE}[name]
    pair = floats(*left), floats(*right, seed=1)

    def multiply(left, right):
        return multiply_rows(left, right, numbers, precision=lax.Precision.HIGHEST)

    expected = lax.dot_general(*pair, numbers, precision=lax.Precision.HIGHEST)
    actual = jax.jit(multiply)(*pair)
    assert actual.shape == expected.shape
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * scale)
    assert barriers(multiply, *pair) == (name in PRODUCTS)
    # A user may differentiate statistics.
    gradients = [
        jax.grad(lambda pair, way=way: jnp.sum(way(*pair) ** 2))(pair)
        for way in (multiply, lambda *pair: lax.dot_general(*pair, numbers))
    ]
    for mine, other in zip(*gradients, strict=True):
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", ["int32", "bfloat16"])
def test_only_products_that_were_measured_are_swapped(dtype):
    left, right, numbers = PRODUCTS["rows first"]
    pair = jnp.ones(left, dtype), jnp.ones(right, dtype)
    assert barriers(lambda *pair: multiply_rows(*pair, numbers), *pair) == 0
