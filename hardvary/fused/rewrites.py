"""Equations in a form at which XLA on CPU is faster, to the same result."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from hardvary import _compat, sharding
from hardvary.fused.equations import INLINED, bind_mapped, inexact, open_jaxpr

# Output features of a convolution with an odd number of input features, such as the
# colours of an image, at which one more takes a third of the time: more than the first,
# up to the second. Measured with 3 x 3 and 5 x 5, with AVX2 and AVX-512.
_SLOW = (16, 32)
# Operations whose derivatives need the operands.
_NEEDED_AGAIN = ("max", "min", "mul", "div")
# Elements of an environment's part of what is broadcast, from which on it matters.
_LARGE = 2**10
# Features of data and of output, and multiplications of an environment, from which on
# both cores are worth a wider output; numbers in a kernel from which on XLA takes all
# cores of its own accord.
_FEATURES, _WORK, _LARGE_KERNEL = 16, 2**19, 120_000
_CALLS = {**INLINED, "custom_jvp_call": "call_jaxpr"}


def run(eqn: Any, arguments: Sequence[Any], mapped: Sequence[bool]) -> list[Any]:
    """As `equations.bind_mapped`."""
    if not sharding.on_cpu():
        return bind_mapped(eqn, arguments, mapped)
    spread = not jax.sharding.get_abstract_mesh().empty
    if _compat.NEW_CPU_LIBRARY and not spread:
        result = _with_own_operands(eqn, arguments, mapped)
        if result is not None:
            return result
    if (
        eqn.primitive.name != "conv_general_dilated"
        or not _compat.NEW_CPU_CONVOLUTIONS
        or eqn.params["feature_group_count"] * eqn.params["batch_group_count"] > 1
    ):
        return bind_mapped(eqn, arguments, mapped)
    arguments = _with_even_features(eqn, arguments)
    # A mapped kernel makes groups, whose gradients are slower in this form.
    if mapped[1] or spread:
        return bind_mapped(eqn, arguments, mapped)
    return [_in_standard_layout(eqn.params, *arguments)]


def _only_equation(
    eqn: Any, arguments: Sequence[Any]
) -> tuple[Any, Sequence[Any]] | None:
    """What a call holds, as `jax.nn.relu` is one, and that one's arguments."""
    while (key := _CALLS.get(eqn.primitive.name)) is not None:
        jaxpr = open_jaxpr(eqn.params[key])
        if len(jaxpr.eqns) != 1 or jaxpr.constvars:
            return None
        given = dict(zip(jaxpr.invars, arguments, strict=True))
        (eqn,) = jaxpr.eqns
        if list(eqn.outvars) != list(jaxpr.outvars):
            return None
        arguments = [
            var.val if isinstance(var, jex.Literal) else given[var]
            for var in eqn.invars
        ]
    return eqn, arguments


def _is_broadcast(eqn: Any) -> list[bool]:
    """Which operands are given to `_with_own_operands` as its own."""
    (out,) = (var.aval for var in eqn.outvars)
    if not inexact(out) or out.size < _LARGE:
        return [False]
    return [
        var.aval.size < out.size
        # XLA multiplies by the inverse of a number that it knows.
        and not (isinstance(var, jex.Literal) and eqn.primitive.name in ("mul", "div"))
        for var in eqn.invars
    ]


def _with_own_operands(
    eqn: Any, arguments: Sequence[Any], mapped: Sequence[bool]
) -> list[Any] | None:
    """An operation of which the derivative does not use what it is broadcast from.

    XLA on CPU makes one operation of a sum, or a pool, and what is summed. A broadcast
    inside of that it makes as it goes, unless something else needs the same: then all
    of it is written down before the program begins. Derivatives of products need both
    factors again, and that of a ReLU the zeros.
    """
    found = _only_equation(eqn, arguments)
    if found is None or found[0].primitive.name not in _NEEDED_AGAIN:
        return None
    inner = found[0]
    own, shape = _is_broadcast(inner), inner.outvars[0].aval.shape
    if not any(own):
        return None
    places = [i for i, var in enumerate(eqn.invars) if not isinstance(var, jex.Literal)]

    def filled(values: Sequence[Any]) -> list[Any]:
        given = dict(zip(places, values, strict=True))
        return [given.get(i, argument) for i, argument in enumerate(arguments)]

    def apply(*values: Any) -> jax.Array:
        _, operands = cast(Any, _only_equation(eqn, filled(values)))
        operands = [jnp.asarray(x, inner.outvars[0].aval.dtype) for x in operands]
        operands = [
            jax.lax.optimization_barrier(x) if is_own else x
            for x, is_own in zip(operands, own, strict=True)
        ]
        operands = [x if x.ndim else jnp.broadcast_to(x, shape) for x in operands]
        return cast(jax.Array, inner.primitive.bind(*operands, **inner.params))

    def tangent(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        moving = [i for i, x in enumerate(tangents) if not _is_zero(x)]

        def as_given(*values: Any) -> jax.Array:
            changed = dict(zip(moving, values, strict=True))
            operands = [changed.get(i, x) for i, x in enumerate(primals)]
            (result,) = bind_mapped(eqn, filled(operands), mapped)
            return cast(jax.Array, result)

        directions = [tangents[i] for i in moving]
        _, of_result = jax.jvp(as_given, [primals[i] for i in moving], directions)
        return result(*primals), of_result

    result = jax.custom_jvp(apply)
    result.defjvp(tangent, symbolic_zeros=True)
    return [result(*(arguments[i] for i in places))]


def _is_zero(tangent: Any) -> bool:
    # In numbers, it would make a NaN of an infinity that it meets.
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _with_even_features(eqn: Any, arguments: Sequence[Any]) -> Sequence[Any]:
    """What to apply a convolution to in place of its arguments."""
    data, kernel = arguments
    numbers = eqn.params["dimension_numbers"]
    axes = numbers.lhs_spec[1], numbers.rhs_spec[1]
    outputs, inputs = (kernel.shape[axis] for axis in numbers.rhs_spec[:2])
    odd = inputs % 2 == 1 and inputs > 1
    images = data.ndim == 4 and data.dtype == jnp.float32
    if not odd or not images or not _SLOW[0] < outputs <= _SLOW[1]:
        return arguments

    def with_a_zero(array: Any, axis: int) -> Any:
        return jnp.pad(array, [(0, int(i == axis)) for i in range(array.ndim)])

    return [with_a_zero(*pair) for pair in zip(arguments, axes, strict=True)]


def _in_standard_layout(
    params: dict[str, Any], data: jax.Array, kernel: jax.Array
) -> jax.Array:
    """A convolution, and the gradient of its data, in the layout of XLA's fast code.

    That is [batch, *space, feature] with a kernel [*window, in, out]. XLA brings others
    into it, but not inside of loops, where these take ten times as long; and as JAX
    writes the gradient of the data, it is another.
    """
    numbers = params["dimension_numbers"]
    out, into, *window = numbers.rhs_spec
    kernel = jnp.transpose(kernel, (*window, into, out))
    data = features_last(data, numbers.lhs_spec)
    result = _standard_convolution(params)(data, kernel)
    batch, feature, *space = numbers.out_spec
    return jnp.transpose(result, np.argsort([batch, *space, feature]).tolist())


def features_last(array: jax.Array, spec: Sequence[int]) -> jax.Array:
    """`[batch, *space, feature]`, of a convolution's data or output.

    Args:
      array: in the convolution's layout.
      spec: where it has batch, feature and space.
    """
    batch, feature, *space = spec
    return jnp.transpose(array, (batch, *space, feature))


def _columns(
    params: dict[str, Any], data: jax.Array, kernel: jax.Array
) -> tuple[int, int]:
    """Columns of zeros with which a convolution, and its data's gradient, are faster.

    XLA on CPU has two libraries for images. With jax 0.10 the one that it prefers works
    on one core, unless the kernel is large; to the other, which works on all cores, it
    hands what is wider behind than in front.

    Args:
      params: of the primitive.
      data: `[batch, *space, feature]`.
      kernel: `[*window, in, out]`.

    Returns:
      So many more behind the data, and behind the cotangent of the output.
    """
    *window, into, out = kernel.shape
    strides, dilations = params["window_strides"], params["rhs_dilation"]
    if (
        not _compat.ONE_CORE_CONVOLUTIONS
        or data.ndim != 4
        or data.dtype != jnp.float32
        or sharding.cpu_threads() == 1
        or not _FEATURES <= min(into, out) <= max(into, out)
        or max(into, out) == _FEATURES
        or kernel.size >= _LARGE_KERNEL
        or max(*strides, *params["lhs_dilation"]) > 1
    ):
        return 0, 0
    sizes = data.shape[1:-1]
    outs = [
        size + low + high - (width - 1) * step
        for size, (low, high), width, step in zip(
            sizes, params["padding"], window, dilations, strict=True
        )
    ]
    work = data.shape[0] * math.prod(outs) * kernel.size
    if min(*outs, *sizes) < 1 or work < _WORK:
        return 0, 0

    def more(before: Sequence[int], after: Sequence[int]) -> int:
        # Up to a sixth of what there is to do, where it is not wider as it is.
        lacking = before[-1] + 1 - after[-1]
        narrower = all(x >= y for x, y in zip(before, after, strict=True))
        return lacking if narrower and 6 * lacking <= after[-1] else 0

    return more(sizes, outs), more(outs, sizes)


def _padded(params: dict[str, Any], columns: int) -> list[tuple[int, int]]:
    """The padding of images, with so many more columns behind."""
    *rows, (low, high) = params["padding"]
    return [*rows, (low, high + columns)]


def _standard_convolution(
    params: dict[str, Any],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    names = ["window_strides", "lhs_dilation", "rhs_dilation", "precision"]
    settings = {name: params[name] for name in (*names, "preferred_element_type")}

    def convolve(
        data: jax.Array, kernel: jax.Array, padding: Any, *, turned: bool
    ) -> jax.Array:
        """With `turned`, the kernel is [*window, out, in]."""
        rank = data.ndim
        images = (0, rank - 1, *range(1, rank - 1))
        into, out = rank - 2, rank - 1
        window = tuple(range(rank - 2))
        kernels = (into, out, *window) if turned else (out, into, *window)
        numbers = jax.lax.ConvDimensionNumbers(images, kernels, images)
        return jax.lax.conv_general_dilated(
            data, kernel, padding=padding, **settings, dimension_numbers=numbers
        )

    def straight(data: jax.Array, kernel: jax.Array) -> jax.Array:
        more, _ = _columns(params, data, kernel)
        result = convolve(data, kernel, _padded(params, more), turned=False)
        if not more:
            return result
        return jax.lax.slice_in_dim(result, 0, result.shape[-2] - more, axis=-2)

    def tangent(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (data, kernel), (of_data, of_kernel) = primals, tangents
        result = standard(data, kernel)
        total = jnp.zeros_like(result)
        if not _is_zero(of_data):
            # The gradient is the transpose of this one, which turns the kernel back.
            turned = jnp.swapaxes(kernel, -1, -2)
            _, more = _columns(params, data, kernel)
            columns = [
                (0, more if i == of_data.ndim - 2 else 0) for i in range(of_data.ndim)
            ]
            padding = _padded(params, -more)
            total = convolve(jnp.pad(of_data, columns), turned, padding, turned=True)
        if not _is_zero(of_kernel):
            total += straight(data, of_kernel)
        return result, total

    standard = jax.custom_jvp(straight)
    standard.defjvp(tangent, symbolic_zeros=True)
    return cast(Callable[[jax.Array, jax.Array], jax.Array], standard)
