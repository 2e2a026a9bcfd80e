"""The rule for looking up rows of a table."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hardvary import _validate, sharding
from hardvary._env_grads.source import inner_products
from hardvary._env_grads.statistics import EnvWeights, Statistic, Sums, present
from hardvary._loops import divisor, in_parts, sum_over
from hardvary._typing import AxisName
from hardvary.fused.equations import wide_indices
from hardvary.fused.rules.base import GramianForm, Rule
from hardvary.fused.rules.layout import in_layout
from hardvary.fused.uses import Use


def lookups(use: Use) -> int | None:
    """Rows that an environment looks up, None if it is not rows that it gathers."""
    params, (table, indices) = use.eqn.params, use.eqn.invars
    numbers = params["dimension_numbers"]
    rows = indices.aval.ndim - 1
    out_ndim = rows + table.aval.ndim - 1
    whole_rows = (
        use.side == 0
        and table.aval.ndim > 0
        and numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and not numbers.start_indices_batching_dims
        and numbers.offset_dims == tuple(range(rows, out_ndim))
        and params["slice_sizes"] == (1, *table.aval.shape[1:])
        and indices.aval.shape[-1] == 1
    )
    return math.prod(indices.aval.shape[:-1]) if whole_rows else None


def _times_zero(rows: jax.Array) -> jax.Array:
    """Inner products of the last axis with zeros: 0, or NaN."""
    return jnp.where(jnp.isfinite(rows).all(-1), 0, jnp.nan).astype(rows.dtype)


class Lookup(Rule):
    """Touches only the rows of a table that were looked up."""

    def _rows(self) -> tuple[jax.Array, jax.Array]:
        """Indices `[env, row]` and gradients `[env, row, feature]` of the rows.

        A row that an environment looked up more than once has its sum at the first
        place and zeros at the others. An index that gathers nothing is the table's
        size.
        """
        (use,) = self.group.uses
        (saved,), (cotangents,) = self.left_behind()
        (cotangent,) = cotangents
        num_rows = use.eqn.invars[0].aval.shape[0]
        dtype = _validate.wide(self.leaves[0].dtype)
        indices = wide_indices(saved[0].reshape(self.num_envs, -1))
        rows = cotangent.reshape(self.num_envs, indices.shape[1], -1).astype(dtype)
        if use.eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP:
            indices = jnp.clip(indices, 0, num_rows - 1)
        # An index out of range gathers nothing: a negative one would count from the
        # end.
        indices = jnp.where(indices < 0, num_rows, indices)
        if indices.shape[1] > 1:
            first = jnp.argmax(indices[:, :, None] == indices[:, None, :], axis=2)
            rows = jax.vmap(lambda i, r: jnp.zeros_like(r).at[i].add(r))(first, rows)
        return indices, rows

    def sums(self, statistics: Sequence[Statistic], weights: EnvWeights | None) -> Sums:
        (use,) = self.group.uses
        shape = use.eqn.invars[0].aval.shape
        indices, rows = self._rows()
        result: Sums = {}
        for statistic in statistics:
            base = statistic.function(jnp.zeros((), rows.dtype))
            values = statistic.function(rows) - base
            count = jnp.asarray(self.num_envs, rows.dtype)
            if weights is not None:
                weight = weights.of(statistic).astype(rows.dtype)
                values = weight[:, None, None] * present(values, weights)
                count = jnp.sum(weight)
            total = jnp.full((shape[0], rows.shape[-1]), base * count)
            total = total.at[indices].add(values, mode="drop")
            result[statistic] = [self._in_layout(total.reshape(shape))]
        return result

    def gramian(self, axis_name: AxisName | None = None) -> list[jax.Array]:
        (use,) = self.group.uses
        table_rows = use.eqn.invars[0].aval.shape[0]
        indices, rows = self._rows()
        # What gathered nothing has no gradient, also where the cotangent is not zero.
        rows = jnp.where((indices < table_rows)[..., None], rows, 0)
        indices, rows = (sharding.all_rows(x, axis_name) for x in (indices, rows))
        num_envs, num_rows, features = rows.shape
        if self.gramian_form()[0] == "matching rows":
            return [self._matching(indices, rows)]

        def of_tile(tile: jax.Array) -> jax.Array:
            zeros = jnp.zeros((table_rows, tile.shape[-1]), tile.dtype)
            add = lambda i, r: zeros.at[i].add(r, mode="drop")  # noqa: E731
            return inner_products(jax.vmap(add)(indices, tile))

        at_most = self.elements() // max(num_envs * table_rows, 1)
        size = divisor(features, at_most)
        tiles = rows.reshape(num_envs, num_rows, features // size, size)
        return [sum_over(of_tile, jnp.moveaxis(tiles, 2, 0), indices)]

    def gramian_form(self) -> tuple[GramianForm, int]:
        (use,) = self.group.uses
        num_rows, (table_rows, *features) = lookups(use), use.eqn.invars[0].aval.shape
        pairs = self.num_envs**2 * math.prod(features)
        matching, tiles = (num_rows or 0) ** 2 * pairs, table_rows * pairs
        return ("matching rows", matching) if matching <= tiles else ("tiles", tiles)

    def _matching(self, indices: jax.Array, rows: jax.Array) -> jax.Array:
        """`[env, env]`, of the rows that two environments both looked up."""
        num_envs, num_rows, _ = rows.shape

        def some(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            index, row = part
            highest = jax.lax.Precision.HIGHEST
            products = jnp.einsum("erk,fsk->erfs", row, rows, precision=highest)
            same = index[:, :, None, None] == indices[None, None]
            total = jnp.sum(jnp.where(same, products, 0), axis=(1, 3))
            # A row that only one of the two has meets zeros, which keep what is not
            # finite.
            mine = jnp.where(same.any(3), 0, _times_zero(row)[..., None]).sum(1)
            other = jnp.where(same.any(1), 0, _times_zero(rows)).sum(2)
            return total + mine + other

        at_most = self.elements() // max(num_envs * num_rows**2, 1)
        return in_parts(some, (indices, rows), divisor(num_envs, at_most))

    def square_norms(self) -> list[jax.Array]:
        (use,) = self.group.uses
        indices, rows = self._rows()
        in_range = indices < use.eqn.invars[0].aval.shape[0]
        return [jnp.sum(jnp.where(in_range[..., None], rows * rows, 0), axis=(1, 2))]

    def _in_layout(self, total: jax.Array) -> jax.Array:
        (use,), (leaf,) = self.group.uses, self.group.leaves
        return in_layout(self.traced, use.operands[0], leaf, total)
