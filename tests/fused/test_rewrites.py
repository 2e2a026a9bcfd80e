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
    monkeypatch.setattr(_compat, "NEW_CPU_LIBRARY", True)


def barriers(function, *arguments):
    equations = equations_of(jax.make_jaxpr(function)(*arguments).jaxpr)
    return sum(eqn.primitive.name == "optimization_barrier" for eqn in equations)


def again(function, kernel=None):
    """`function`, a single equation, as the fused oracle runs it.

    Args:
      function: of arrays that all have environments, besides the one called kernel.
      kernel: its position.
    """

    def run(*arguments):
        (eqn,) = jax.make_jaxpr(function)(*arguments).eqns
        given = iter(arguments)
        filled = [var.val if hasattr(var, "val") else next(given) for var in eqn.invars]
        mapped = [i != kernel for i in range(len(filled))]
        (result,) = rewrites.run(eqn, filled, mapped)
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


@pytest.mark.parametrize("name", [k for k, (_, args) in BROADCAST.items() if args[1:]])
def test_an_operand_that_stays_adds_nothing_to_a_tangent(name):
    function, arguments = BROADCAST[name]
    if not _implicit():
        pytest.skip("this jax writes every broadcast down")
    for i, moving in enumerate(arguments):

        def along(way, i=i, moving=moving):
            def of(x):
                return way(*arguments[:i], x, *arguments[i + 1 :])

            return jax.jvp(of, (moving,), (jnp.ones_like(moving),))[1]

        np.testing.assert_array_equal(along(again(function)), along(function))


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
        monkeypatch.setattr(_compat, "NEW_CPU_LIBRARY", rewriting)
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


@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "float16"])
def test_only_products_that_were_measured_are_swapped(dtype):
    left, right, numbers = PRODUCTS["rows first"]
    pair = jnp.ones(left, dtype), jnp.ones(right, dtype)
    assert barriers(lambda *pair: multiply_rows(*pair, numbers), *pair) == 0


def sizes_of_convolutions(function, *arguments):
    """Width before and after, of every convolution of images."""
    equations = equations_of(jax.make_jaxpr(function)(*arguments).jaxpr)
    found = []
    for eqn in equations:
        if eqn.primitive.name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            before = eqn.invars[0].aval.shape[numbers.lhs_spec[3]]
            found.append((before, eqn.outvars[0].aval.shape[numbers.out_spec[3]]))
    return found


CONVOLUTIONS = {
    "same": ({"padding": "SAME"}, [(12, 13), (12, 13)]),
    # Wider in one direction as they are, and would take a third more in the other.
    "valid": ({"padding": "VALID"}, [(12, 10), (10, 12)]),
    "full": ({"padding": [(2, 2), (2, 2)]}, [(12, 14), (14, 12)]),
    # Fewer rows than before, and so more of them in the other direction.
    "uneven": ({"padding": [(0, 1), (2, 0)]}, [(12, 13), (12, 12)]),
    "dilated": ({"padding": "SAME", "rhs_dilation": (2, 3)}, [(12, 13), (12, 13)]),
    "strided": ({"padding": "SAME", "window_strides": (2, 2)}, [(12, 6), (6, 12)]),
    "narrower": ({"padding": [(1, 1), (0, 1)]}, [(12, 11), (11, 12)]),
}
LAYOUTS = {"last": ("NHWC", "HWIO", "NHWC"), "first": ("NCHW", "OIHW", "NCHW")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_with_more_columns_is_the_same(name, layout, monkeypatch):
    monkeypatch.setattr(_compat, "NEW_CPU_CONVOLUTIONS", True)
    monkeypatch.setattr(_compat, "ONE_CORE_CONVOLUTIONS", True)
    monkeypatch.setattr(sharding, "cpu_threads", lambda: 2)
    settings, widths = CONVOLUTIONS[name]
    image, kernel = floats(2, 12, 12, 16), floats(3, 3, 16, 24, seed=1)
    if layout == "first":
        image, kernel = jnp.moveaxis(image, 3, 1), jnp.transpose(kernel, (3, 2, 0, 1))

    def convolve(image, kernel):
        given = {"window_strides": (1, 1), **settings}
        return lax.conv_general_dilated(
            image, kernel, **given, dimension_numbers=LAYOUTS[layout]
        )

    def pulled(way):
        def pull(image, kernel):
            result, back = jax.vjp(way, image, kernel)
            return back(floats(*result.shape, seed=2))

        return pull

    def tangent(way):
        return lambda *pair: jax.jvp(way, pair, tuple(map(jnp.sin, pair)))[1]

    mine = again(convolve, kernel=1)
    for derivative in (lambda way: way, pulled, tangent, lambda f: tangent(tangent(f))):
        actual, expected = (
            jax.tree.leaves(jax.jit(derivative(way))(image, kernel))
            for way in (mine, convolve)
        )
        for one, other in zip(actual, expected, strict=True):
            scale = float(jnp.abs(other).max())
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * scale)

    def gradient_of_data(image):
        result, back = jax.vjp(lambda image: mine(image, kernel), image)
        return back(result)

    found = sizes_of_convolutions(gradient_of_data, image)
    assert sorted(found) == sorted(widths)


def many(side, into, out, window=3, examples=2):
    return floats(examples, side, side, into), floats(window, window, into, out)


@pytest.mark.parametrize(
    ("threads", "pair"),
    [
        (1, many(12, 16, 24)),
        (2, many(12, 3, 24)),
        (2, many(12, 16, 16)),
        (2, many(12, 128, 128)),
        (2, many(4, 32, 64)),
        (2, many(8, 16, 24, examples=1)),
    ],
    ids=["one core", "colours", "narrow", "large kernel", "small image", "little work"],
)
def test_other_convolutions_get_no_columns(threads, pair, monkeypatch):
    monkeypatch.setattr(_compat, "NEW_CPU_CONVOLUTIONS", True)
    monkeypatch.setattr(_compat, "ONE_CORE_CONVOLUTIONS", True)
    monkeypatch.setattr(sharding, "cpu_threads", lambda: threads)

    def convolve(image, kernel):
        return lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=LAYOUTS["last"]
        )

    mine = again(convolve, kernel=1)
    ((before, after),) = sizes_of_convolutions(mine, *pair)
    assert before == after
