"""Products of matrices in the order in which XLA on CPU is faster."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from hardvary import _compat, sharding


def multiply_rows(
    left: jax.Array, right: jax.Array, dimension_numbers: Any, **settings: Any
) -> jax.Array:
    """`jax.lax.dot_general` of factors, contracted over rows.

    XLA on CPU takes up to ten times as long where the second has few components beside
    the first, as the gradient of a layer of ten classes: the other product is as fast
    as it should be, and is transposed.
    """
    contract, batch = dimension_numbers
    sizes = _sizes(left, contract[0], batch[0]), _sizes(right, contract[1], batch[1])
    (rows, inputs), (_, outputs) = sizes
    spread = not jax.sharding.get_abstract_mesh().empty
    if spread or not is_swapped(rows, inputs, outputs, left.dtype):
        return jax.lax.dot_general(left, right, dimension_numbers, **settings)
    swapped = (tuple(reversed(contract)), tuple(reversed(batch)))
    product = jax.lax.dot_general(right, left, swapped, **settings)
    # Or XLA makes it the slower product again.
    product = jax.lax.optimization_barrier(product)
    axes = range(len(batch[0]), right.ndim - len(contract[1]))
    return jnp.moveaxis(product, axes, range(product.ndim - len(axes), product.ndim))


def _sizes(array: jax.Array, contract: Any, batch: Any) -> tuple[int, int]:
    """Numbers of rows, and of what every row of every batch entry has."""
    rows = math.prod(array.shape[axis] for axis in contract)
    rest = [n for i, n in enumerate(array.shape) if i not in (*contract, *batch)]
    return rows, math.prod(rest)


def is_swapped(rows: int, inputs: int, outputs: int, dtype: Any) -> bool:
    """Whether a product of `[row, output]` and `[row, input]` is faster on a CPU.

    With what it takes to transpose it. Measured in float32, with 16 to 2048 rows, 128
    to 2048 inputs and 1 to 128 outputs.
    """
    return (
        _compat.NEW_CPU_LIBRARY
        and sharding.on_cpu()
        and dtype == jnp.float32
        and 1 < outputs <= min(inputs, rows) // 2
        and rows >= 64
        and rows * inputs >= 2**15
    )
