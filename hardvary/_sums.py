"""Sums over the first axis, where environments are, that are fast on a CPU."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _lax, sharding
from hardvary._loops import divisor

# Terms of at most two sums, and of more, that XLA on CPU adds up for many components at
# once; beyond, it makes a loop over terms for each component.
TERMS, _TERMS_OF_MORE = 16, 8
# Components from which on it pays, measured with 4 to 256 terms.
_LARGE = 2**14


def over_first_axis(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """`jnp.sum(array, axis=0)` of floating arrays of one shape.

    Since jax 0.10 XLA on CPU hands such a sum to a library that goes through large
    arrays component by component, which takes forty times as long as reading them
    (`findings/xla_cpu_sums_of_few_long_rows.sh`), and writes down what is added up. It
    does neither where several sums are one reduction.
    """
    shape = arrays[0].shape
    spread = not jax.sharding.get_abstract_mesh().empty
    if spread or not sharding.on_cpu() or math.prod(shape[1:]) < _LARGE:
        return _plainly(arrays)
    if shape[0] == 1:
        return [jnp.squeeze(array, 0) for array in arrays]
    # One would not be several.
    totals = _together([*arrays, arrays[0]] if len(arrays) == 1 else list(arrays))
    return totals[: len(arrays)]


def _plainly(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [_lax.sum_first(array) for array in arrays]


@jax.custom_jvp
def _together(arrays: list[jax.Array]) -> list[jax.Array]:
    return sums_and_minima(arrays, [])


@_together.defjvp
def _tangent(primals: Any, tangents: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    return _together(*primals), _plainly(*tangents)


@jax.jit
def sums_and_minima(
    summed: Sequence[jax.Array], least: Sequence[jax.Array]
) -> list[jax.Array]:
    """Sums, then minima, over the first axis of floating arrays, all in one pass.

    Whatever they are made of is made in that pass, too. Of one shape.
    """
    arrays, combine = [*summed, *least], _combining(len(summed))
    starts = [
        np.asarray(0 if i < len(summed) else np.inf, array.dtype)
        for i, array in enumerate(arrays)
    ]

    def reduced(arrays: list[jax.Array], axis: int) -> list[jax.Array]:
        return jax.lax.reduce(arrays, starts, combine, (axis,))

    terms = TERMS if len(arrays) <= 2 else _TERMS_OF_MORE
    while 1 < (few := divisor(len(arrays[0]), terms)) < len(arrays[0]):
        arrays = [x.reshape(-1, few, *x.shape[1:]) for x in arrays]
        arrays = reduced(arrays, 1)
    return reduced(arrays, 0)


@functools.cache
def _combining(num_sums: int) -> Any:
    """A function that is one and the same: for another one JAX compiles anew."""

    def combine(one: Any, other: Any) -> Any:
        pairs = list(zip(one, other, strict=True))
        sums = [x + y for x, y in pairs[:num_sums]]
        return sums + [jax.lax.min(x, y) for x, y in pairs[num_sums:]]

    return combine
