"""What all aggregators share: the environment axis, masks, rescaling, the state."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hardvary import _validate
from hardvary._env_grads.statistics import (
    FIELDS,
    LOG_EPS,
    AxisName,
    GradStats,
    as_grad_stats,
)

PyTree = Any

# From the statistics of one parameter (a GradStats of arrays) to the mask in [0, 1]
# (boolean or floating) and the direction that it is to scale, both `param.shape`.
LeafRule = Callable[[GradStats], tuple[jax.Array, jax.Array]]


class AggregatorState(NamedTuple):
    """State of an aggregator.

    Attributes:
      kept_fraction: float32 scalar, share of all components that passed the mask in
        the last update (the mean of a soft mask); 0 before the first. Read it with
        `optax.tree.get(opt_state, "kept_fraction")`.
    """

    kept_fraction: jax.Array


def reaches(sign_sum: jax.Array, num_envs: Any, threshold: Any) -> jax.Array:
    """Whether `|sign_sum| >= threshold * num_envs`, exact at equality.

    A threshold k/d arrives rounded to its dtype, and weighted votes are sums of
    floats, so the comparison allows for both: the threshold's rounding, at most half
    a vote, and 2e-6 of the total. Up to some 250,000 environments of weight 1 that is
    less than the step between two sums of votes. NaN signs do not pass.
    """
    dtype = _validate.wide(sign_sum.dtype)
    sign_sum = sign_sum.astype(dtype)
    threshold = jnp.asarray(threshold)
    rounding = 0.0
    if jnp.issubdtype(threshold.dtype, jnp.floating):
        rounding = float(jnp.finfo(threshold.dtype).eps)
    threshold = threshold.astype(dtype)
    num_envs = jnp.asarray(num_envs).astype(dtype)
    slack = jnp.minimum(rounding * threshold * num_envs, 0.5)
    slack += 16 * float(jnp.finfo(jnp.float32).eps) * num_envs
    return jnp.abs(sign_sum) >= threshold * num_envs - slack


def build(
    name: str,
    statistics: Sequence[str],
    leaf_rule: LeafRule,
    *,
    rescale: bool,
    max_rescale: Any,
    axis_name: AxisName | None,
    log_eps: Any = LOG_EPS,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that applies `leaf_rule` to every parameter.

    Args:
      name: public name, for messages.
      statistics: what the rule reads, keys of `_statistics.FIELDS`.
      leaf_rule: see `LeafRule`.
      rescale: multiply what survived in a leaf by size / (sum of its mask).
      max_rescale: cap of that factor, or None.
      axis_name: mapped axis over which environments are spread, or None.
      log_eps: offset of the `log_abs` statistic of stacked gradients.
    """
    if not isinstance(rescale, bool):
        raise TypeError(f"rescale must be True or False, got {rescale!r}")
    if max_rescale is not None:
        _validate.at_least("max_rescale", max_rescale, 1.0)

    def init_fn(params: PyTree) -> AggregatorState:
        del params
        return AggregatorState(kept_fraction=jnp.zeros((), jnp.float32))

    def factor(kept: jax.Array, size: int) -> jax.Array:
        value = jnp.where(kept > 0, size / jnp.where(kept > 0, kept, 1), 0)
        if max_rescale is None:
            return value
        return jnp.minimum(value, jnp.asarray(max_rescale).astype(value.dtype))

    def update_leaf(leaf: GradStats, dtype: Any) -> tuple[jax.Array, jax.Array]:
        mask, direction = leaf_rule(leaf)
        kept = jnp.sum(mask, dtype=jnp.float32)
        if rescale:
            wide = _validate.wide(direction.dtype)
            direction = direction.astype(wide) * factor(kept, mask.size).astype(wide)
        if mask.dtype == jnp.bool_:
            update = jnp.where(mask, direction, 0)
        else:
            update = mask.astype(direction.dtype) * direction
        update = jnp.where(jnp.isnan(leaf.sign_sum), jnp.nan, update)
        return update.astype(dtype), kept

    def update_fn(
        updates: PyTree,
        state: AggregatorState,
        params: PyTree | None = None,
        *,
        env_weights: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, AggregatorState]:
        del state, extra_args
        stats = as_grad_stats(
            updates, params, statistics, env_weights, axis_name, name, log_eps
        )
        treedef = jax.tree.structure(stats.mean)
        fields = {
            FIELDS[statistic]: jax.tree.leaves(getattr(stats, FIELDS[statistic]))
            for statistic in statistics
        }
        leaves = [
            GradStats(num_envs=stats.num_envs, **dict(zip(fields, values, strict=True)))
            for values in zip(*fields.values(), strict=True)
        ]
        given = updates.mean if isinstance(updates, GradStats) else updates
        results = [
            update_leaf(leaf, jnp.result_type(like))
            for leaf, like in zip(leaves, jax.tree.leaves(given), strict=True)
        ]
        size = sum(leaf.mean.size for leaf in leaves)
        kept = sum((kept for _, kept in results), jnp.zeros((), jnp.float32))
        return (
            jax.tree.unflatten(treedef, [update for update, _ in results]),
            AggregatorState(kept_fraction=kept / max(size, 1)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
