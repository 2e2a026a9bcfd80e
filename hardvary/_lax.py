"""Operations as those of `jax.numpy`, traced in a fraction of the time.

`jax.numpy` traces each of its functions as one of its own, which `jax.lax` does not: it
tells where every parameter takes some (docs/results/benchmark.md#compilation).
"""

from typing import Any

import jax
import numpy as np


def where(condition: jax.Array, x: Any, y: Any) -> jax.Array:
    """`jnp.where` of arrays of one shape and dtype, or an array and an int or float."""
    like = y if isinstance(x, int | float) else x
    x, y = (
        jax.lax.full_like(condition, value, like.dtype)
        if isinstance(value, int | float)
        else value
        for value in (x, y)
    )
    return jax.lax.select(condition, x, y)


def isnan(x: jax.Array) -> jax.Array:
    """`jnp.isnan` of floating numbers."""
    return jax.lax.ne(x, x)


def sum_first(x: jax.Array) -> jax.Array:
    """`jnp.sum(x, axis=0)` of numbers of at least 32 bits."""
    return jax.lax.reduce(x, np.zeros((), x.dtype), jax.lax.add, (0,))
