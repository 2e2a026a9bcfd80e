"""Weight gradients of convolutions, one environment at a time.

XLA's convolutions on CPU are made for many examples and small windows. The gradient of
the weights is one with a window as large as the image; there it is several times
faster to line up shifted slices of the input and multiply matrices. On a GPU, those of
several environments at once would be a convolution in as many groups, and slow too.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hardvary import _validate
from hardvary.fused.tracing import Bindings, Use


def applies(use: Use) -> bool:
    """Whether `pull` is right for `use`, and the faster way."""
    return (
        use.primitive == "conv_general_dilated"
        and use.side == 1
        and not use.steps
        and use.eqn.params["batch_group_count"] == 1
    )


def pull(
    use: Use, operands: Sequence[Any], env: Bindings, saved: Any, cotangents: Any
) -> Any:
    """As `Use.pull`."""
    del env
    (kernel,), (data,), (cotangent,) = operands, saved, cotangents
    result = kernel_gradient(data, cotangent, use.eqn.params, kernel.shape)
    return (result.astype(kernel.dtype),)


def kernel_gradient(
    data: jax.Array, cotangent: jax.Array, params: dict[str, Any], shape: Sequence[int]
) -> jax.Array:
    """Gradient of `jax.lax.conv_general_dilated` with respect to its kernel.

    Args:
      data: the convolution's left argument.
      cotangent: of its output.
      params: of the primitive; `batch_group_count` must be 1.
      shape: the kernel's.

    Returns:
      An array of `shape`, at least float32.
    """
    dtype = _validate.wide(data.dtype)
    data, cotangent = data.astype(dtype), cotangent.astype(dtype)
    numbers = params["dimension_numbers"]
    groups: int = params["feature_group_count"]
    window = [shape[axis] for axis in numbers.rhs_spec[2:]]
    # From here on: data [n, *space, group, in], cotangent [n, *space, group, out].
    data = _features_last(data, numbers.lhs_spec)
    cotangent = _features_last(cotangent, numbers.out_spec)
    zero = jnp.zeros((), data.dtype)
    padding = zip(params["padding"], params["lhs_dilation"], strict=True)
    data = jax.lax.pad(
        data,
        zero,
        [(0, 0, 0), *((low, high, d - 1) for (low, high), d in padding), (0, 0, 0)],
    )
    space = cotangent.shape[1:-1]

    def shift(offsets: Sequence[int]) -> jax.Array:
        start = [o * d for o, d in zip(offsets, params["rhs_dilation"], strict=True)]
        stop = [
            first + (size - 1) * stride + 1
            for first, size, stride in zip(
                start, space, params["window_strides"], strict=True
            )
        ]
        return jax.lax.slice(
            data,
            (0, *start, 0),
            (data.shape[0], *stop, data.shape[-1]),
            (1, *params["window_strides"], 1),
        )

    slices = [shift(o) for o in itertools.product(*map(range, window))]
    rows = math.prod(cotangent.shape[:-1])
    inputs = data.shape[-1] // groups
    left = jnp.stack(
        [piece.reshape(rows, groups, inputs) for piece in slices], axis=2
    ).reshape(rows, groups, len(slices) * inputs)
    right = cotangent.reshape(rows, groups, -1)
    if groups == 1:
        contract = (((0,), (0,)), ((), ()))
        product = jax.lax.dot_general(
            left[:, 0], right[:, 0], contract, precision=params["precision"]
        )[None]
    else:
        product = jax.lax.dot_general(
            left, right, (((0,), (0,)), ((1,), (1,))), precision=params["precision"]
        )
    # [group, *window, in, out] -> window, in, (group out) -> the kernel's layout.
    product = product.reshape(groups, *window, inputs, -1)
    product = jnp.moveaxis(product, 0, -2).reshape(*window, inputs, -1)
    out_axis, in_axis, *window_axes = numbers.rhs_spec
    order = [*window_axes, in_axis, out_axis]
    return jnp.transpose(product, [order.index(axis) for axis in range(len(order))])


def _features_last(array: jax.Array, spec: Sequence[int]) -> jax.Array:
    batch, feature, *space = spec
    return jnp.transpose(array, (batch, *space, feature))
