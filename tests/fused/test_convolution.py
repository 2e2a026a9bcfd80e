"""Kernel gradients of convolutions of every form, and what they cost."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import hardvary
from hardvary import _compat
from hardvary.fused.rules import convolution
from hardvary.fused.rules.convolution import PIECES, kernel_gradient, times_patches
from tests._compat import equations_of, subjaxprs
from tests.fused._precision import allowed
from tests.fused._stacked import assert_equals_stacked, floats
from tests.zoo import compile_quickly

LAST = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC")}
LAST[3] = ("NHWDC", "HWDIO", "NHWDC")
FIRST = {1: ("NCH", "OIH", "NCH"), 2: ("NCHW", "OIHW", "NCHW")}
FIRST[3] = ("NCHWD", "OIHWD", "NCHWD")


def convolve(x, kernel, strides, padding, features_last=True, **settings):
    layout = (LAST if features_last else FIRST)[x.ndim - 2]
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout, **settings
    )


def check(x, kernel, *args, **settings):
    """Holds `kernel_gradient`, and patches times a matrix, to JAX's own gradient."""

    def run(kernel):
        return convolve(x, kernel, *args, **settings)

    (eqn,) = jax.make_jaxpr(run)(kernel).eqns
    shape = eqn.outvars[0].aval.shape
    cotangent = floats(*shape, seed=2).astype(eqn.outvars[0].aval.dtype)
    if jnp.issubdtype(cotangent.dtype, jnp.complexfloating):
        cotangent = cotangent * (1 + 0.5j)

    @compile_quickly
    def both(x, kernel, cotangent):
        _, vjp = jax.vjp(lambda kernel: convolve(x, kernel, *args, **settings), kernel)
        with pytest.MonkeyPatch.context() as patch:
            # As a convolution wherever it may be one.
            patch.setattr(convolution, "PLACES", 0)
            patch.setattr(convolution, "OUTPUTS", 0)
            patch.setattr(convolution, "OUTPUTS_OF_MANY", 0)
            patch.setattr(_compat, "NEW_CPU_CONVOLUTIONS", True)
            actual = [
                kernel_gradient(x, cotangent, eqn.params, kernel.shape, alone)
                for alone in (False, True)
            ]
        expected = vjp(cotangent)[0]
        return actual, expected, through_patches(x, cotangent, expected, eqn.params)

    gradients, expected, (actual_columns, expected_columns) = both(x, kernel, cotangent)
    for actual in actual_columns:
        scale = np.abs(expected_columns).max(initial=1)
        np.testing.assert_allclose(actual, expected_columns, rtol=0, atol=1e-5 * scale)
    scale = np.abs(expected).max(initial=1)
    for actual in gradients:
        assert actual.shape == kernel.shape
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale)
    return shape


def through_patches(x, cotangent, gradient, params):
    """Columns times a kernel's gradient: by `times_patches`, and as they are."""
    one_group = params["feature_group_count"] == 1
    if not one_group or gradient.dtype != jnp.float32 or 0 in (x.size, cotangent.size):
        return [], jnp.zeros(())
    numbers = params["dimension_numbers"]
    out, *inputs = numbers.rhs_spec[0], *numbers.rhs_spec[2:], numbers.rhs_spec[1]
    matrix = jnp.transpose(gradient, (*inputs, out)).reshape(-1, gradient.shape[out])
    columns = floats(len(matrix), 3, seed=3)
    batch, feature, *space = numbers.out_spec
    right = jnp.transpose(cotangent, (batch, *space, feature))
    right = right.reshape(-1, right.shape[-1])

    def run(x, columns):
        return times_patches(x, cotangent, columns, params, gradient.shape)

    # Mapped it multiplies.
    patches = [run(x, columns), jax.vmap(run)(x[None], columns[None])[0]]
    highest = lax.Precision.HIGHEST
    actual = [jnp.matmul(rows.T, right, precision=highest) for rows in patches]
    return actual, jnp.matmul(columns.T, matrix, precision=highest)


# name: (input's space, window, strides, padding, further settings)
FORMS = {
    "patches": ((8, 8), (2, 2), (2, 2), "VALID", {}),
    "patches_of_an_uneven_image": ((9, 7), (3, 2), (3, 2), "VALID", {}),
    "patches_padded": ((7, 7), (3, 3), (3, 3), "SAME", {}),
    "patches_apart": ((11, 11), (2, 3), (4, 4), [(1, 2), (0, 1)], {}),
    "patches_in_groups": ((8, 8), (4, 4), (4, 4), "VALID", {"groups": 2}),
    "patches_of_a_dilated_window": ((9,), (2,), (3,), "VALID", {"rhs_dilation": (2,)}),
    "patches_of_a_dilated_input": ((5,), (3,), (3,), [(0, 0)], {"lhs_dilation": (2,)}),
    "patches_cropped": ((12, 12), (3, 3), (3, 3), [(-2, -1), (-1, 0)], {}),
    "patches_along_one_axis": ((12, 9), (4, 3), (4, 1), "SAME", {}),
    "one_place": ((5, 5), (1, 1), (2, 2), "VALID", {}),
    "whole_image": ((5, 4), (5, 4), (1, 1), "VALID", {}),
    "whole_image_of_a_dilated_window": (
        (9, 7),
        (4, 3),
        (1, 2),
        "VALID",
        {"rhs_dilation": (2, 3)},
    ),
    "whole_image_padded": ((3, 4), (6, 5), (2, 1), [(1, 2), (0, 1)], {}),
    "whole_image_cropped": ((7, 6), (4, 3), (1, 1), [(-2, -1), (-3, 0)], {}),
    "whole_image_in_groups": ((4, 4), (4, 4), (1, 1), "VALID", {"groups": 2}),
    "one_place_in_a_row": ((6, 5), (3, 5), (1, 1), "VALID", {}),
    "small_window": ((6, 6), (3, 3), (1, 1), "SAME", {}),
    "small_window_strided": ((7, 7), (3, 3), (2, 2), "SAME", {}),
    "large_window": ((8, 8), (5, 4), (1, 1), "SAME", {}),
    "large_window_strided": ((9, 9), (5, 5), (2, 3), "SAME", {}),
    "large_window_in_groups": ((6, 6), (4, 4), (1, 1), "SAME", {"groups": 3}),
    "large_window_dilated": (
        (9, 8),
        (4, 3),
        (1, 2),
        [(5, 4), (2, 3)],
        {"rhs_dilation": (2, 2), "lhs_dilation": (1, 3)},
    ),
    "large_window_cropped": ((12, 12), (4, 4), (1, 1), [(-2, -1), (3, -3)], {}),
    "long_filter": ((40,), (23,), (1,), "SAME", {}),
    "longer_than_the_sequence": ((5,), (17,), (1,), "SAME", {}),
    "three_axes": ((4, 5, 4), (3, 3, 3), (1, 1, 1), "SAME", {}),
    "three_axes_of_patches": ((4, 4, 6), (2, 2, 3), (2, 2, 3), "VALID", {}),
}


@pytest.mark.parametrize("features_last", [True, False], ids=["last", "first"])
@pytest.mark.parametrize("name", FORMS)
def test_kernel_gradient_equals_that_of_jax(name, features_last):
    space, window, strides, padding, settings = FORMS[name]
    settings = dict(settings)
    groups = settings.pop("groups", 1)
    x, kernel = inputs(space, window, groups, 2, 2 * groups, features_last)
    shape = check(
        x,
        kernel,
        strides,
        padding,
        features_last,
        feature_group_count=groups,
        **settings,
    )
    assert 0 not in shape


def inputs(space, window, groups, per_group, out, features_last, rows=2):
    features = groups * per_group
    if features_last:
        x, kernel = (rows, *space, features), (*window, per_group, out)
    else:
        x, kernel = (rows, features, *space), (out, per_group, *window)
    return floats(*x), floats(*kernel, seed=1)


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    most = {1: 20, 2: 6, 3: 4}[rank]
    window = tuple(draw(st.integers(1, most)) for _ in range(rank))
    settings = {
        "strides": tuple(draw(st.sampled_from([1, 1, 2, w, w + 1])) for w in window),
        "padding": draw(st.sampled_from(["SAME", "VALID", None])),
        "rhs_dilation": tuple(draw(st.integers(1, 2)) for _ in window),
    }
    if settings["padding"] is None:
        ends = st.integers(-2, 4)
        settings["padding"] = [(draw(ends), draw(ends)) for _ in window]
        settings["lhs_dilation"] = tuple(draw(st.integers(1, 3)) for _ in window)
    settings["feature_group_count"] = groups = draw(st.integers(1, 3))
    space = tuple(draw(st.integers(1, most + 3)) for _ in window)
    settings["features_last"] = draw(st.booleans())
    out = groups * draw(st.integers(1, 2))
    x, kernel = inputs(
        space, window, groups, draw(st.integers(1, 2)), out, settings["features_last"]
    )
    return x, kernel, settings


@given(convolutions())
def test_kernel_gradient_of_a_random_convolution_equals_that_of_jax(drawn):
    x, kernel, settings = drawn
    check(x, kernel, settings.pop("strides"), settings.pop("padding"), **settings)


def of_an_image(kernel, image):
    """A loss whose kernel's gradient is taken as a convolution."""
    return jnp.mean(jnp.tanh(convolve(image[None], kernel, (1, 1), "SAME")))


def images():
    return floats(3, 3, 2, 20), floats(3, 12, 12, 2, seed=1)


@pytest.fixture
def convolved(monkeypatch):
    """Has XLA's convolutions be fast; counts how often they are taken."""
    taken = []
    by_convolution = convolution._by_convolution
    monkeypatch.setattr(_compat, "NEW_CPU_CONVOLUTIONS", True)
    monkeypatch.setattr(
        convolution,
        "_by_convolution",
        lambda *args: taken.append(args) or by_convolution(*args),
    )
    return taken


def test_statistics_and_norms_of_images_are_convolved(convolved):
    kernel, x = images()

    @compile_quickly
    def run(kernel, x):
        grad = hardvary.env_grads(of_an_image)(kernel, x)
        return grad.stats(("mean", "sign")), grad.norms()

    stats, norms = run(kernel, x)
    assert len(convolved) == 2
    grads = compile_quickly(jax.vmap(jax.grad(of_an_image), (None, 0)))(kernel, x)
    np.testing.assert_allclose(stats.mean, grads.mean(0), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(stats.sign_sum, jnp.sign(grads).sum(0))
    expected = jnp.sqrt(jnp.sum(grads**2, (1, 2, 3, 4)))
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


@pytest.mark.skipif(
    not _compat.NEW_CPU_CONVOLUTIONS,
    reason="never convolved with this jax, of which 0.7 differentiates to 0 here",
)
def test_convolved_gradients_are_differentiated_and_mapped_over(convolved):
    kernel, x = images()

    def length(kernel, x, method):
        stats = hardvary.grad_stats(of_an_image, method=method)(kernel, x)
        return jnp.sum(stats.mean**2)

    both = jnp.stack([kernel, 2 * kernel])
    actual, expected = (
        compile_quickly(
            jax.vmap(
                jax.value_and_grad(functools.partial(length, method=method)), (0, None)
            )
        )(both, x)
        for method in ("fused", "vmap")
    )
    assert convolved
    for leaf, other in zip(actual, expected, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-4 * scale)


def test_a_vmap_of_steps_has_no_convolution_in_groups(convolved):
    kernel, x = images()
    oracle = jax.vmap(hardvary.grad_stats(of_an_image), (0, None))
    text = str(jax.make_jaxpr(oracle)(jnp.stack([kernel, kernel]), x))
    assert convolved
    assert "feature_group_count=1" in text
    assert not re.search(r"feature_group_count=(?!1\b)", text)
    assert not re.search(r"batch_group_count=(?!1\b)", text)


# What it costs.


def counted(jaxpr):
    """Equations of a jaxpr, those inside included, and entries of its largest array."""
    sizes = [math.prod(var.aval.shape) for eqn in jaxpr.eqns for var in eqn.outvars]
    inner = [counted(inner) for inner in subjaxprs(jaxpr)]
    return (
        len(jaxpr.eqns) + sum(number for number, _ in inner),
        max([*sizes, *(size for _, size in inner)], default=0),
    )


def cost(space, window, strides, features=(3, 8), padding="SAME"):
    inside, out = features
    x = jax.ShapeDtypeStruct((2, *space, inside), jnp.float32)
    kernel = jax.ShapeDtypeStruct((*window, inside, out), jnp.float32)

    def run(kernel, x):
        return convolve(x, kernel, strides, padding)

    (eqn,) = jax.make_jaxpr(run)(kernel, x).eqns
    cotangent = eqn.outvars[0].aval
    jaxpr = jax.make_jaxpr(
        lambda x, g: kernel_gradient(x, g, eqn.params, kernel.shape)
    )(x, cotangent).jaxpr
    number, largest = counted(jaxpr)
    return number, largest / max(
        math.prod(leaf.shape) for leaf in (x, kernel, cotangent)
    )


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("patches", [(4, 4), (16, 16), (32, 32)]),
        ("large", [(4, 4), (7, 7), (16, 16)]),
        ("long", [(64,), (512,)]),
        ("whole", [(4, 4), (16, 16), (64, 64)]),
    ],
)
def test_program_of_a_convolution_does_not_grow_with_its_window(name, windows):
    spaces = {"long": [(1024,)] * len(windows), "whole": windows}
    costs = [
        cost(
            space,
            window,
            window if name == "patches" else (1,) * len(window),
            padding="VALID" if name == "whole" else "SAME",
        )
        for space, window in zip(
            spaces.get(name, [(64, 64)] * len(windows)), windows, strict=True
        )
    ]
    numbers = [number for number, _ in costs]
    assert max(numbers) <= min(numbers) + PIECES
    assert max(numbers) <= 100
    # Nor is there an array of many times the layer.
    limit = 1.5 if name in ("patches", "whole") else PIECES + 1
    assert max(size for _, size in costs) <= limit


@pytest.mark.parametrize("ask", ["gramian", "norms", "whitened"])
def test_program_of_inner_products_does_not_grow_with_the_window(ask):
    def run(kernel, x):
        grads = hardvary.env_grads(
            lambda kernel, x: jnp.sum(jnp.sin(convolve(x, kernel, (1,), "VALID")))
        )(kernel, x)
        if ask == "whitened":
            tx = hardvary.whiten_inputs(hardvary.and_mask(), max_inputs=4000)
            return tx.update(grads, tx.init(kernel), kernel)
        return getattr(grads, ask)()

    # Two places of the output are few enough for products row by row. The root of few
    # inputs is made in fewer blocks, and few components are counted at once.
    numbers = [
        counted(
            jax.make_jaxpr(run)(
                jax.ShapeDtypeStruct((window, 2, 24), jnp.float32),
                jax.ShapeDtypeStruct((3, 1, window + 1, 2), jnp.float32),
            ).jaxpr
        )[0]
        for window in (500, 2000)
    ]
    assert numbers[0] == numbers[1]


# Through the oracle.


@pytest.mark.parametrize(
    ("window", "strides"),
    [((4, 4), (4, 4)), ((5, 5), (1, 1)), ((3, 3), (2, 2))],
    ids=["patches", "large", "small"],
)
def test_gradients_of_a_convolution_by_the_scan_rule(window, strides):
    def loss(kernel, x):
        return jnp.mean(jnp.sin(convolve(x, kernel, strides, "SAME")))

    assert_equals_stacked(loss, floats(*window, 2, 3), floats(4, 1, 8, 8, 2, seed=1))


@pytest.mark.parametrize(
    ("size", "window", "stride", "dilation"),
    [(3, 3, 1, 2), (3, 3, 2, 2), (1, 3, 2, 1), (5, 3, 1, 3), (0, 3, 1, 1)],
)
@pytest.mark.parametrize("loops", [False, True], ids=["plain", "loop"])
def test_convolution_without_output_has_no_gradient(
    size, window, stride, dilation, loops
):
    def run(x, kernel):
        return convolve(x, kernel, (stride,), "VALID", rhs_dilation=(dilation,))

    def loss(p, x):
        if loops:
            out = lax.scan(lambda c, k: (c, run(x, k)), 0.0, p["kernel"][None])[1]
        else:
            out = run(x, p["kernel"])
        assert out.size == 0
        return jnp.sum(jnp.sin(out)) + jnp.sum(x) * p["scale"] + p["scale"]

    params = {"kernel": floats(window, 2, 3), "scale": jnp.float32(1)}
    grads = assert_equals_stacked(loss, params, floats(3, 1, size, 2, seed=1))
    assert not np.any(grads["kernel"])
    (row, _) = hardvary.explain(loss, params, floats(3, 1, size, 2)).parameters
    assert row.rule == "unused"


@pytest.mark.parametrize(
    ("x", "kernel"),
    [
        ((1, 0, 2), (3, 2, 3)),  # all of the output is padding
        ((1, 5, 0), (3, 0, 3)),
        ((1, 5, 2), (3, 2, 0)),
        ((0, 5, 2), (3, 2, 3)),
    ],
    ids=["no_space", "no_inputs", "no_features", "no_examples"],
)
@pytest.mark.parametrize("loops", [0, 1, 2])
def test_convolution_of_nothing_has_no_gradient(x, kernel, loops):
    def run(x, kernel):
        return jnp.sum(jnp.cos(convolve(x, kernel, (1,), [(3, 3)])))

    def loss(p, x):
        of = functools.partial(run, kernel=p["kernel"])
        rows = x
        for _ in range(loops):
            of = functools.partial(jax.lax.map, of)
            rows = jnp.stack([rows, 2 * rows])
        return jnp.sum(of(rows)) + p["scale"] * (1 + jnp.sum(x))

    params = {"kernel": floats(*kernel), "scale": jnp.float32(2)}
    assert_equals_stacked(loss, params, floats(4, *x, seed=1))


# name: (input's space, window, strides, padding, further settings), where places of
# the window see nothing but padding.
NOTHING_TO_SEE = {
    "patches_padded": ((3,), (4,), (4,), "SAME", {}),
    "larger_than_the_image": ((3, 3), (7, 7), (1, 1), "SAME", {}),
    "in_groups": ((3, 3), (7, 7), (1, 1), "SAME", {"feature_group_count": 2}),
    "between_entries": ((4, 4), (3, 3), (2, 2), [(1, 1)] * 2, {"lhs_dilation": (2, 2)}),
    "three_axes": ((2, 3, 2), (1, 4, 2), (1, 4, 2), "SAME", {}),
}


@pytest.mark.parametrize("features_last", [True, False], ids=["last", "first"])
@pytest.mark.parametrize("name", NOTHING_TO_SEE)
def test_broken_kernel_gradient_is_zero_where_the_window_sees_padding_alone(
    name, features_last
):
    space, window, strides, padding, settings = NOTHING_TO_SEE[name]
    groups = settings.get("feature_group_count", 1)
    x, kernel = inputs(space, window, groups, 2 // groups, 2, features_last, rows=1)
    x = jnp.stack([jnp.full_like(x, jnp.nan), x, jnp.ones_like(x)])

    def loss(kernel, x):
        out = convolve(x, kernel, strides, padding, features_last, **settings)
        return jnp.sum(jnp.square(out))

    @compile_quickly
    def run(kernel, x):
        grads = hardvary.env_grads(loss)(kernel, x)
        # One environment after the other: mapped over, XLA multiplies padding by NaN.
        one_by_one = lax.map(lambda x: jax.grad(loss)(kernel, x), x)
        return grads.mean(), grads.stack(), one_by_one

    mean, stacked, expected = run(kernel, x)
    nothing = np.asarray(expected[2] == 0)
    assert 0 < nothing.sum() < nothing.size
    np.testing.assert_array_equal(np.isfinite(expected[0]), nothing)
    np.testing.assert_array_equal(np.isfinite(mean), nothing)
    np.testing.assert_array_equal(np.isfinite(stacked[0]), nothing)
    assert not np.any(np.where(nothing, mean, 0))


# Complex values on the way.


@pytest.mark.parametrize("name", ["small_window", "patches", "large_window"])
def test_kernel_gradient_of_complex_values_equals_that_of_jax(name):
    space, window, strides, padding, _ = FORMS[name]
    x, kernel = inputs(space, window, 1, 2, 2, True)
    x, kernel = lax.complex(x, jnp.sin(x)), lax.complex(kernel, jnp.cos(kernel))
    check(x, kernel, strides, padding)


@pytest.mark.parametrize("real", ["kernel", "both"])
def test_gradients_of_a_complex_convolution(real):
    def loss(w, x):
        field = x.astype(jnp.complex64) * jnp.exp(0.7j * x)
        kernel = w.astype(jnp.complex64)
        if real == "both":
            kernel = lax.complex(w, jnp.flip(w, 0))
        return jnp.mean(jnp.square(jnp.abs(convolve(field, kernel, (1, 1), "SAME"))))

    w, x = floats(3, 3, 2, 3), floats(6, 1, 5, 5, 2, seed=1)
    with jax.numpy_dtype_promotion("standard"):
        assert_equals_stacked(loss, w, x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_kernel_gradient_of_half_precision_is_summed_in_float32(dtype):
    x, kernel = inputs((6, 6), (3, 3), 1, 2, 2, True)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    (eqn,) = jax.make_jaxpr(lambda k: convolve(x, k, (1, 1), "SAME"))(kernel).eqns
    cotangent = jnp.ones(eqn.outvars[0].aval.shape, dtype)
    actual = kernel_gradient(x, cotangent, eqn.params, kernel.shape)
    assert actual.dtype == jnp.float32
    wide = kernel_gradient(
        x.astype(jnp.float32),
        cotangent.astype(jnp.float32),
        eqn.params,
        kernel.shape,
    )
    np.testing.assert_array_equal(actual, wide)


# The loss itself.


@pytest.mark.parametrize("features_last", [True, False], ids=["last", "first"])
@pytest.mark.parametrize(
    ("inside", "out", "padded"), [(3, 20, 4), (3, 8, 3), (4, 20, 4)]
)
def test_convolution_of_colours_has_an_even_number_of_features(
    inside, out, padded, features_last, monkeypatch
):
    monkeypatch.setattr(_compat, "NEW_CPU_CONVOLUTIONS", True)
    x, kernel = inputs((6, 6), (3, 3), 1, inside, out, features_last)
    x = jnp.stack([x, 2 * x, -x])

    def loss(kernel, x):
        return jnp.mean(jnp.tanh(convolve(x, kernel, (1, 1), "SAME", features_last)))

    assert_equals_stacked(loss, kernel, x)
    oracle = hardvary.grad_stats(loss)
    kernels = {
        eqn.invars[1].aval.shape
        for eqn in equations_of(jax.make_jaxpr(oracle)(kernel, x).jaxpr)
        if eqn.primitive.name == "conv_general_dilated"
    }
    assert (3, 3, padded, out) in kernels


LAYERS = {
    "one axis": ((9,), (3,), {}),
    "images": ((6, 5), (3, 2), {}),
    "strided": ((7, 6), (3, 3), {"strides": (2, 1)}),
    "spread kernel": ((7, 6), (2, 3), {"rhs_dilation": (2, 1)}),
    "spread data": (
        (4, 3),
        (3, 3),
        {"padding": [(1, 1), (2, 0)], "lhs_dilation": (2, 2)},
    ),
    "volumes": ((4, 3, 4), (2, 3, 2), {}),
}


def two_layers(params, x, features_last, settings):
    kernel, second = params
    once = (1,) * (x.ndim - 2)
    settings = {"strides": once, "padding": "SAME", **settings}
    hidden = convolve(x, kernel, features_last=features_last, **settings)
    out = convolve(jnp.tanh(hidden), second, once, "VALID", features_last)
    return jnp.mean(jnp.sin(out))


def of_two_layers(layer, features_last):
    """A loss of two convolutions, its kernels, and a batch."""
    size, window, settings = LAYERS[layer]
    x, kernel = inputs(size, window, 1, 2, 4, features_last)
    _, second = inputs(size, (1,) * len(size), 1, 4, 2, features_last)
    loss = functools.partial(two_layers, features_last=features_last, settings=settings)
    return loss, (kernel, second), jnp.stack([x, 2 * x, -x])


@pytest.mark.parametrize("features_last", [True, False], ids=["last", "first"])
@pytest.mark.parametrize("layer", LAYERS)
def test_convolutions_have_the_layout_that_is_fast_in_loops(
    layer, features_last, monkeypatch
):
    """XLA on CPU brings others into it outside of loops only."""
    monkeypatch.setattr(_compat, "NEW_CPU_CONVOLUTIONS", True)
    loss, params, batch = of_two_layers(layer, features_last)
    assert_equals_stacked(loss, params, batch)
    jaxpr = jax.make_jaxpr(hardvary.grad_stats(loss))(params, batch).jaxpr
    found = [
        eqn.params["dimension_numbers"]
        for eqn in equations_of(jaxpr)
        if eqn.primitive.name == "conv_general_dilated"
    ]
    # Two forward, and one back to the data of the second.
    assert len(found) >= 3
    rank = batch.ndim - 1
    images = (0, rank - 1, *range(1, rank - 1))
    kernels = (rank - 1, rank - 2, *range(rank - 2))
    assert set(found) == {lax.ConvDimensionNumbers(images, kernels, images)}


@pytest.mark.parametrize("features_last", [True, False], ids=["last", "first"])
@pytest.mark.parametrize("layer", LAYERS)
def test_derivatives_of_convolutions_gradients(layer, features_last, monkeypatch):
    monkeypatch.setattr(_compat, "NEW_CPU_CONVOLUTIONS", True)
    loss, params, batch = of_two_layers(layer, features_last)
    direction = jax.tree.map(jnp.cos, params)

    def mean(method):
        def of(params, batch):
            oracle = hardvary.grad_stats(loss, method=method)
            return [stats.mean for stats in oracle(params, batch)]

        return of

    def forward(method):
        return jax.jvp(
            mean(method), (params, batch), (direction, jnp.ones_like(batch))
        )[1]

    def backward(method):
        def total(params, batch):
            grads = mean(method)(params, batch)
            return sum(jnp.sum(x * x) for x in jax.tree.leaves(grads))

        return jax.grad(total, argnums=(0, 1))(params, batch)

    for derivative in (forward, backward):
        actual, expected = derivative("fused"), derivative("vmap")
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            actual,
            expected,
        )


# In loops.


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("loops", [1, 2])
def test_kernel_of_a_loop_meets_all_of_its_steps(loops, groups):
    x, kernel = inputs((4, 5), (3, 2), groups, 2, 2 * groups, features_last=False)
    steps = jnp.stack([x, 0.5 * x[::-1], 2 * x])

    def step(carry, row):
        out = convolve(row, carry[0], (2, 1), "SAME", False, feature_group_count=groups)
        return carry, jnp.sum(jnp.tanh(out))

    def loss(kernel, x):
        run = functools.partial(lax.scan, step, (kernel,))
        if loops == 2:
            return jnp.sum(lax.scan(lambda c, row: (c, run(row)[1]), 0.0, x[None])[1])
        return jnp.sum(run(x)[1])

    assert_equals_stacked(loss, kernel, jnp.stack([steps, 2 * steps[::-1], -steps]))


def grouped(kernel, row):
    groups = row.shape[-1] // kernel.shape[1]
    out = convolve(row, kernel, (1,), "SAME", feature_group_count=groups)
    return jnp.sum(jnp.tanh(out))


@jax.custom_vjp
def with_own_rule(kernel, row):
    return grouped(kernel, row)


with_own_rule.defvjp(
    lambda *args: (grouped(*args), args),
    lambda args, slope: jax.vjp(grouped, *args)[1](slope),
)


def branching(kernel, row):
    return lax.cond(
        jnp.sum(row) > 0, grouped, lambda *args: -grouped(*args), kernel, row
    )


def looped(function):
    def over_rows(kernel, x):
        def step(carry, row):
            return carry, function(kernel, row)

        return jnp.sum(lax.scan(step, 0.0, x)[1])

    return over_rows


def once(function):
    return lambda kernel, x: function(kernel, x[0])


@pytest.mark.parametrize(
    "loss",
    [
        once(grouped),
        looped(grouped),
        once(jax.checkpoint(grouped)),
        once(branching),
        once(with_own_rule),
        looped(branching),
        looped(with_own_rule),
        lambda kernel, x: jax.checkpoint(branching)(kernel, x[0]),
    ],
    ids=[
        "plain",
        "loop",
        "remat",
        "branch",
        "rule",
        "branch in a loop",
        "rule in a loop",
        "branch in remat",
    ],
)
@pytest.mark.parametrize(
    ("groups", "dtype"), [(2, "float32"), (1, "float64")], ids=["groups", "float64"]
)
def test_convolution_keeps_environments_apart(loss, groups, dtype):
    with allowed(dtype):
        assert_environments_are_apart(loss, groups, dtype)


def assert_environments_are_apart(loss, groups, dtype):
    x, kernel = inputs((6,), (3,), groups, 1, 2 * groups, features_last=True)
    kernel = kernel.astype(dtype)
    x = jnp.stack([x, 2 * x, -x])[:, None].astype(dtype)
    without = jnp.array([1.0, 0.0, 2.0])

    @compile_quickly
    def ask(kernel, x):
        found = []
        for weights in (without, None):
            oracle = hardvary.value_and_env_grads(loss)
            losses, grads = oracle(kernel, x, env_weights=weights)
            all_of_them = losses, grads.norms(), grads.stack(), grads.gramian()[:, ::2]
            two = [answer[::2] for answer in all_of_them]
            found.append((two, grads.mean(), grads.stats().sign_sum))
        return found

    whole, broken = ask(kernel, x), ask(kernel, x.at[1, 0, 0, 2].set(jnp.nan))
    assert np.isnan(broken[1][1]).any()  # there without weights
    assert np.isfinite(jax.tree.leaves(whole[0])[0]).all()
    for mine, other in ((whole[0], broken[0]), (whole[1][0], broken[1][0])):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine, other
        )


def test_branches_that_environments_take_apart_have_integers_and_keys_and_slopes():
    x, kernel = inputs((6,), (3,), 2, 1, 4, features_last=True)
    batch = (
        jnp.stack([x, 2 * x, -x]),
        jax.random.split(jax.random.key(0), 3),
        jnp.array([1, 2, 3]),
    )

    def dropped(kernel, x, key, times):
        out = convolve(x, kernel, (1,), "SAME", feature_group_count=2)
        kept = jax.random.bernoulli(key, 0.5, out.shape)
        return jnp.sum(jnp.tanh(times * out * kept)), jnp.argmax(out), kept

    def negated(*args):
        out, index, kept = dropped(*args)
        return -out, index, kept

    def loss(kernel, batch):
        out, index, kept = lax.cond(
            jnp.sum(batch[0]) > 0, dropped, negated, kernel, *batch
        )
        return out * (1 + index % 3) * jnp.mean(kept)

    def length(gradients):
        return lambda kernel: jnp.sum(gradients(kernel).mean(0) ** 2)

    def fused(kernel):
        return hardvary.env_grads(loss)(kernel, batch).stack()

    def stacked(kernel):
        return jax.vmap(jax.grad(loss), (None, 0))(kernel, batch)

    slopes = [jax.grad(length(gradients)) for gradients in (fused, stacked)]
    with jax.numpy_dtype_promotion("standard"):
        for ours, theirs in ((fused, stacked), slopes):
            np.testing.assert_allclose(
                compile_quickly(ours)(kernel),
                compile_quickly(theirs)(kernel),
                rtol=1e-4,
            )


def test_branch_that_all_environments_take_together_is_mapped():
    x, kernel = inputs((6,), (3,), 2, 1, 4, features_last=True)
    batch = jnp.stack([x, 2 * x, -x])

    def loss(kernel, x):
        late = jnp.sum(kernel) > 0  # of the parameters alone
        return lax.cond(late, grouped, lambda *args: -grouped(*args), kernel, x)

    def losses_of(kernel, x):
        return hardvary.value_and_env_grads(loss)(kernel, x)[0]

    losses = jax.make_jaxpr(losses_of)(kernel, batch)
    names = [eqn.primitive.name for eqn in equations_of(losses.jaxpr)]
    assert "cond" in names
    assert "scan" not in names
    assert_equals_stacked(loss, kernel, batch)
