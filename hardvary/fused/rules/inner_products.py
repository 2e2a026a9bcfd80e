"""Inner products of gradients that are sums of outer products, without stacking them.

With `g_e = sum_r a_er d_er^T`, `a` from the data and `d` from the cotangents,

    <g_e, g_f> = sum_rs (a_er . a_fs) (d_er . d_fs),

which needs no gradient at all: the best way where environments have few rows. Where
they have many, a tile of the gradients is made at a time, for all environments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import sharding
from hardvary._env_grads.source import flat
from hardvary._loops import divisor, in_parts, sum_over
from hardvary._typing import AxisName

# Elements of a product of rows cost more than their two factors: two more passes.
_PER_PAIR = 4
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a parameter's factors.

    Attributes:
      num_envs: number of environments.
      batch: entries of the parameter's axes that data and cotangents have, too.
      rows: outer products in an environment's gradient.
      inputs, outputs: rows and columns of each.
      pieces: parameters of these sizes, with other data each.
    """

    num_envs: int
    batch: int
    rows: int
    inputs: int
    outputs: int
    pieces: int = 1

    def by_rows(self, pairs: int) -> int:
        """Multiplications for that many pairs of environments, row by row."""
        per_pair = self.pieces * self.inputs + self.outputs + _PER_PAIR
        return pairs * self.batch * self.rows**2 * per_pair

    def by_tiles(self, pairs: int) -> int:
        """Multiplications for that many pairs of environments, tile by tile."""
        size = self.pieces * self.batch * self.inputs * self.outputs
        return size * (self.num_envs * self.rows + pairs)


Form = Literal["rows", "tiles"]


def gramian_form(sizes: Sizes) -> tuple[Form, int]:
    """The way of `gramian` with fewer multiplications, and their number."""
    return _cheaper(sizes, sizes.num_envs**2)


def norms_form(sizes: Sizes) -> tuple[Form, int]:
    """The way of `square_norms` with fewer multiplications, and their number."""
    return _cheaper(sizes, sizes.num_envs)


def _cheaper(sizes: Sizes, pairs: int) -> tuple[Form, int]:
    by_rows, by_tiles = sizes.by_rows(pairs), sizes.by_tiles(pairs)
    return ("rows", by_rows) if by_rows <= by_tiles else ("tiles", by_tiles)


def gramian_by_rows(left: jax.Array, right: jax.Array, elements: int) -> jax.Array:
    """`[env, env]` from `[env, batch, row, input]` and `[env, batch, row, output]`.

    Args:
      left: of the data, in the dtype of the result.
      right: of the cotangents.
      elements: number of elements that may be held at once.
    """
    num_envs, batch, rows, _ = left.shape
    pairs = batch * rows * rows * num_envs
    size = divisor(num_envs, elements // max(2 * pairs, 1))

    def products(mine: jax.Array, theirs: jax.Array) -> jax.Array:
        """`[batch, env of mine, row, env, row]`."""
        shape = (batch, len(mine), rows, num_envs, rows)
        if batch > 1:
            return _einsum("ebri,fbsi->berfs", mine, theirs).reshape(shape)
        # As of a parameter that is its own row, such as a bias beside these weights:
        # then it is the same product, which is computed once.
        mine, theirs = (x.reshape(-1, x.shape[-1]) for x in (mine, theirs))
        return jnp.matmul(mine, theirs.T, precision=_HIGHEST).reshape(shape)

    def some(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        both = products(part[0], left) * products(part[1], right)
        return jnp.sum(both, axis=(0, 2, 4))

    return in_parts(some, (left, right), size)


def gramian_by_tiles(
    left: jax.Array,
    right: jax.Array,
    elements: int,
    root: jax.Array | None = None,
) -> jax.Array:
    """As `gramian_by_rows`, of gradients times the transpose of `root`, if given."""

    def of_tile(tile: jax.Array) -> jax.Array:
        if root is not None:
            tile = _einsum("ij,ebio->ebjo", root.astype(tile.dtype), tile)
        flat = tile.reshape(len(tile), -1)
        return jnp.matmul(flat, flat.T, precision=_HIGHEST)

    return _over_tiles(of_tile, left, right, elements, by_outputs=root is not None)


def gramian_by_blocks(
    grads_of: Callable[[Any], list[jax.Array]],
    inputs: Any,
    size: int,
    axis_name: AxisName | None,
) -> list[jax.Array]:
    """`[env, env]`, a parameter each: a block of environments with another.

    Args:
      grads_of: stacked gradients from what `size` environments have of `inputs`; it is
        asked again for each pair of blocks.
      inputs: leaves `[env, ...]`.
      size: a divisor of the number of environments.
      axis_name: mapped axis over which further environments are spread.
    """

    def rows(block: Any) -> list[jax.Array]:
        mine = [flat(grad) for grad in grads_of(block)]

        def columns(other: Any) -> list[jax.Array]:
            """[other env, device, env of the block]."""
            result = []
            for a, grad in zip(mine, grads_of(other), strict=True):
                theirs = sharding.all_rows(flat(grad), axis_name)
                product = jnp.matmul(theirs, a.T, precision=_HIGHEST)
                product = product.reshape(-1, len(grad), len(a))
                result.append(jnp.swapaxes(product, 0, 1))
            return result

        return [jnp.transpose(part) for part in in_parts(columns, inputs, size)]

    result = []
    for part in in_parts(rows, inputs, size):
        # [env, device, env of the device] -> all with all.
        result.append(sharding.all_rows(part.reshape(len(part), -1), axis_name))
    return result


def square_norms_by_rows(left: jax.Array, right: jax.Array, elements: int) -> jax.Array:
    """The diagonal of `gramian_by_rows`, `[env]`."""
    num_envs, batch, rows, _ = left.shape
    size = divisor(num_envs, elements // max(2 * batch * rows * rows, 1))

    def some(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        if rows == 1:
            of_left, of_right = (jnp.sum(x * x, axis=3) for x in part)
            return jnp.sum(of_left * of_right, axis=(1, 2))
        of_left, of_right = (_einsum("ebri,ebsi->ebrs", x, x) for x in part)
        return jnp.sum(of_left * of_right, axis=(1, 2, 3))

    return in_parts(some, (left, right), size)


def square_norms_by_tiles(
    left: jax.Array, right: jax.Array, elements: int
) -> jax.Array:
    """As `square_norms_by_rows`."""

    def of_tile(tile: jax.Array) -> jax.Array:
        return jnp.sum(tile * tile, axis=range(1, tile.ndim))

    return _over_tiles(of_tile, left, right, elements)


def _over_tiles(
    function: Callable[[jax.Array], jax.Array],
    left: jax.Array,
    right: jax.Array,
    elements: int,
    by_outputs: bool = False,
) -> jax.Array:
    """Sums `function` of `[env, ...]`, of all tiles of the gradients.

    The longer side is cut or, `by_outputs`, tiles are `[env, batch, input, output]`
    with all inputs.
    """
    if left.shape[3] > right.shape[3] and not by_outputs:
        left, right = right, left
    num_envs, batch, _, inputs = left.shape
    outputs = right.shape[3]
    at_most = elements // max(num_envs * batch * inputs, 1)
    num_tiles = -(-outputs // min(max(at_most, 1), outputs))

    size = -(-outputs // num_tiles)

    def of(columns: jax.Array) -> jax.Array:
        return function(_einsum("ebri,ebro->ebio", left, columns))

    def at(start: jax.Array) -> jax.Array:
        return of(jax.lax.dynamic_slice_in_dim(right, start, size, axis=3))

    # Cut where they are: tiles in a row of their own would be a copy of everything.
    whole, rest = divmod(outputs, size)
    if whole == 1 and not rest:
        return of(right)
    total = sum_over(at, np.arange(whole, dtype=np.uint32) * size, (left, right))
    return total + of(right[..., whole * size :]) if rest else total


def _einsum(formula: str, left: jax.Array, right: jax.Array) -> jax.Array:
    # The default of accelerators rounds the factors.
    return jnp.einsum(formula, left, right, precision=_HIGHEST)
