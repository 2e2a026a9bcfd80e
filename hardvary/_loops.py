"""Loops over parts of the environments, which take memory when their turn comes.

What depends on nothing, like the zeros that a loop starts with, XLA on CPU makes before
all else that a program does, and keeps until the loop is there. Between a forward pass
and the gradients these zeros would lie beside everything that the pass leaves behind.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import sharding
from hardvary._typing import PyTree


def zeros_after(like: PyTree, arrays: PyTree) -> PyTree:
    """Zeros that are not there before all of `arrays` are.

    They vary over the mapped axes that these vary over.

    Args:
      like: what they are shaped like: anything with a shape and a dtype.
      arrays: of which those of floating-point numbers are waited for.
    """
    late = [
        leaf
        for leaf in jax.tree.leaves(arrays)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and np.size(leaf)
    ]
    total = sum(map(_first_entry, late), jnp.zeros((), jnp.float32))
    # No number is both, which no compiler knows.
    never = jnp.isnan(total) & (total == 0)

    def make(leaf: Any) -> jax.Array:
        return jnp.broadcast_to(never.astype(leaf.dtype), leaf.shape)

    return sharding.vary_like(jax.tree.map(make, like), arrays)


def _first_entry(array: Any) -> jax.Array:
    first = jax.lax.slice(array, (0,) * np.ndim(array), (1,) * np.ndim(array))
    return first.reshape(()).astype(jnp.float32)


def mapped(function: Callable[[Any], Any], inputs: Any, like: Any = None) -> Any:
    """As `jax.lax.map`.

    Args:
      function: from leaves without their first axis to a tree of arrays.
      inputs: leaves `[part, ...]`.
      like: shapes and dtypes of what `function` returns, where they are known without
        tracing it.
    """
    length = len(jax.tree.leaves(inputs)[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape), leaf.dtype),
        _of_a_part(function, inputs) if like is None else like,
    )

    def body(results: Any, at: Any) -> tuple[Any, None]:
        step, part = at

        def put(result: jax.Array, one: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(result, one, step, 0)

        return jax.tree.map(put, results, function(part)), None

    steps = np.arange(length, dtype=np.uint32)
    start = zeros_after(like, inputs)
    results, _ = jax.lax.scan(body, start, (steps, inputs))
    return results


def _of_a_part(function: Callable[[Any], Any], parts: Any) -> Any:
    """Shapes and dtypes of what `function` returns for one of `parts`."""
    return jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], parts))


def in_parts(
    function: Callable[[Any], Any], inputs: Any, size: int, like: Any = None
) -> Any:
    """`function` of `size` environments at a time, results `[env, ...]` joined.

    Args:
      function: from leaves `[size, ...]` to a tree of arrays `[size, ...]`.
      inputs: leaves `[env, ...]`.
      size: a divisor of the number of environments.
      like: see `mapped`.
    """
    num_envs = len(jax.tree.leaves(inputs)[0])
    if size == num_envs:
        return function(inputs)

    if size == 1:
        # XLA on CPU copies what is reshaped in front of a loop.
        one = lambda part: function(jax.tree.map(lambda x: x[None], part))  # noqa: E731
        return jax.tree.map(lambda x: jnp.squeeze(x, 1), mapped(one, inputs, like))

    def split(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(num_envs // size, size, *leaf.shape[1:])

    def join(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(num_envs, *leaf.shape[2:])

    return jax.tree.map(join, mapped(function, jax.tree.map(split, inputs), like))


def sum_in_parts(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    size: int,
    unroll: int = 1,
    like: Any = None,
) -> Any:
    """`function(*inputs)`, a sum over environments, of `size` of them at a time.

    Args:
      function: from inputs of some environments to a tree of sums.
      inputs: trees with leaves `[env, ...]`.
      size: of a part; the first one may be smaller.
      unroll: see `sum_over`.
      like: see `mapped`.
    """
    num_envs = len(jax.tree.leaves(inputs)[0])
    if num_envs <= size:
        return function(*inputs)

    def cut(start: Any, size: int) -> Any:
        # Where they are: XLA on CPU copies what is reshaped in front of a loop.
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), inputs
        )

    whole, rest = divmod(num_envs, size)
    starts = rest + np.arange(whole, dtype=np.uint32) * size
    some = lambda start: function(*cut(start, size))  # noqa: E731
    # What begins a sum takes no memory beside it.
    first = function(*cut(np.uint32(0), rest)) if rest else None
    return sum_over(some, starts, inputs, unroll, like, first)


def sum_over(
    function: Callable[[Any], Any],
    parts: Any,
    others: Any,
    unroll: int = 1,
    like: Any = None,
    first: Any = None,
) -> Any:
    """The sum of `function` over axis 0 of `parts`, one after the other.

    Args:
      function: from a part to an array, or a tree of arrays.
      parts: leaves with one more axis in front.
      others: arrays that it closes over.
      unroll: parts in a row that are added in one pass over the sum.
      like: see `mapped`.
      first: what it begins with, in place of zeros.
    """

    def body(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    if first is None:
        like = _of_a_part(function, parts) if like is None else like
        first = zeros_after(like, (parts, others))
    start = sharding.vary_like(first, (parts, others))
    total, _ = jax.lax.scan(body, start, parts, unroll=unroll)
    return total


def divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` up to a bound, at least 1."""
    sizes = range(min(number, at_most), 1, -1)
    return next((size for size in sizes if number % size == 0), 1)
