"""The rule for looking up rows of a table."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hardvary import _validate
from hardvary._env_grads.statistics import EnvWeights, Statistic, Sums, present
from hardvary.fused.rules.base import Rule
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
        # A narrow type may be too small for the table's size.
        indices = saved[0].reshape(self.num_envs, -1)
        if jnp.iinfo(indices.dtype).bits < 32:
            indices = indices.astype(jnp.int32)
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

    def gramian(self) -> list[jax.Array]:
        (use,) = self.group.uses
        indices, rows = self._rows()
        num_envs, num_rows, _ = rows.shape
        # What gathered nothing has no gradient, also where the cotangent is not zero.
        in_range = indices < use.eqn.invars[0].aval.shape[0]
        rows = jnp.where(in_range[..., None], rows, 0)
        flat = rows.reshape(num_envs * num_rows, -1)
        products = jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
        same = indices.reshape(-1, 1) == indices.reshape(1, -1)
        products = jnp.where(same, products, 0)
        pairs = products.reshape(num_envs, num_rows, num_envs, num_rows)
        return [jnp.sum(pairs, axis=(1, 3))]

    def _in_layout(self, total: jax.Array) -> jax.Array:
        (use,), (leaf,) = self.group.uses, self.group.leaves
        return in_layout(self.traced, use.operands[0], leaf, total)
