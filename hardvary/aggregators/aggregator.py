"""The way to write an aggregator that works component by component."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hardvary import _hyperparams, _lax, _validate
from hardvary._env_grads import forms
from hardvary._env_grads import statistics as st
from hardvary._env_grads.grad_stats import GradStats, StatName
from hardvary._typing import AxisName, PyTree

# From the statistics of one parameter to the mask in [0, 1] (boolean or floating), the
# direction that it is to scale and, unless that is 0, what stands where the mask is
# closed; all `param.shape`.
Rule = Callable[..., tuple[jax.Array, ...]]


class AggregatorState(NamedTuple):
    """State of an aggregator.

    Attributes:
      kept_fraction: float32 scalar, share of all components that passed the mask in
        the last update (the mean of a soft mask; 1 where nothing is masked); 0 before
        the first. Read it with `optax.tree.get(opt_state, "kept_fraction")`.
      mask_count: int32 scalar, number of updates so far, where a hyperparameter is a
        schedule or the rule draws at random; None elsewhere.
    """

    kept_fraction: jax.Array
    mask_count: Any = None


def initial_state(counted: bool) -> AggregatorState:
    """The state before the first update, with a count if schedules or draws need it."""
    count = jnp.zeros((), jnp.int32) if counted else None
    return AggregatorState(jnp.zeros((), jnp.float32), count)


def next_state(kept_fraction: jax.Array, count: Any) -> AggregatorState:
    """The state after an update; `count` is None where nothing counts."""
    return AggregatorState(
        kept_fraction, None if count is None else optax.safe_increment(count)
    )


def aggregator(
    rule: Rule,
    *,
    stats: Sequence[StatName] = ("mean", "sign"),
    rescale: bool = False,
    max_rescale: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
    name: str | None = None,
    seed: jax.typing.ArrayLike | None = None,
    **hyperparams: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""An aggregator from a rule for one parameter.

    .. math:: u_j = m_j \, v_j, \qquad (m, v) = \mathrm{rule}(\text{statistics})

    `and_mask` and its relatives are made with it. All forms of gradients, weights,
    devices, NaN, dtypes, rescaling and the state are taken care of.

    Args:
      rule: `rule(stats, **hyperparams) -> (mask, direction)` with a `GradStats` of one
        parameter, all arrays in at least float32; mask in [0, 1], boolean or floating,
        and direction have the shape of the parameter. Pure, traced. A third array, if
        it returns one, stands where the mask is closed, instead of 0.
      stats: names of the statistics that the rule reads, see `grad_stats`.
      rescale: multiply the direction of each leaf by
        (components in the leaf) / (sum of the mask); a leaf with nothing kept stays 0.
      max_rescale: cap of that factor, >= 1; None for none. Unused without `rescale`.
      axis_name: see `and_mask`.
      name: for messages; the rule's own unless given.
      seed: for a rule that draws at random, an integer >= 0 or a key, possibly traced.
        The rule is then given `key`, another one for every parameter and update and
        the same on all devices.
      hyperparams: numbers for the rule, each possibly traced, a schedule, or a tree
        prefix of params with these: the rule gets the number for its parameter and
        step.

    Returns:
      A transformation with the contract of `and_mask` and state `AggregatorState`.

    Raises:
      TypeError: a rule that is not callable or takes something else, `stats` that is
        no sequence of names, a hyperparameter that is no real scalar, schedule or tree
        of these, one named `key` beside a seed, a seed that is neither an integer nor
        a key; (tracing) a rule that does not return two or three arrays.
      ValueError: unknown statistics, max_rescale < 1, a negative seed; (tracing) as
        `and_mask`, a mask or direction of another shape.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> def rule(stats, quorum):  # the mean, where enough have a gradient at all
      ...     return stats.nonzero_sum >= quorum, stats.mean
      >>> tx = hardvary.aggregator(rule, stats=("mean", "nonzero"), quorum=2.0)
      >>> grads = jnp.array([[1.0, 2.0], [3.0, 0.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> updates.tolist()
      [2.0, 0.0]

    Warning:
      Must come first in an `optax.chain`.
    """
    name = getattr(rule, "__name__", "aggregator") if name is None else name
    drawn = [] if seed is None else ["key"]
    gets = "the statistics of a parameter"
    _validate.takes(name, rule, gets, dict.fromkeys([*hyperparams, *drawn]))
    statistics = st.named(_validate.names("stats", stats, tuple(st.STATISTICS)))
    if seed is not None:
        _validate.prng_key("seed", seed)
        if "key" in hyperparams:
            raise TypeError("key is what the rule is given for its seed; rename yours")
    for key, value in hyperparams.items():
        _hyperparams.check_scalars(key, value)
    return build(
        rule,
        statistics,
        name=name,
        rescale=rescale,
        max_rescale=max_rescale,
        axis_name=axis_name,
        hyperparams=hyperparams,
        seed=seed,
    )


def build(
    rule: Rule,
    statistics: Sequence[st.Statistic],
    *,
    name: str,
    axis_name: AxisName | None,
    rescale: bool = False,
    max_rescale: Any = None,
    hyperparams: dict[str, Any] | None = None,
    seed: Any = None,
    of_all: Callable[[Sequence[GradStats]], dict[str, Any]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """As `aggregator`, of `Statistic`s and hyperparameters that are checked.

    Args:
      rule: see `aggregator`.
      statistics: that the rule reads.
      name: for messages.
      axis_name: see `and_mask`.
      rescale: see `aggregator`.
      max_rescale: see `aggregator`.
      hyperparams: see `aggregator`.
      seed: see `aggregator`.
      of_all: from the statistics of all parameters to keywords for the rule, for what
        it has to know of the others.
    """
    if not isinstance(rescale, bool):
        raise TypeError(f"rescale must be True or False, got {rescale!r}")
    if max_rescale is not None:
        _validate.at_least("max_rescale", max_rescale, 1.0)
    hyperparams = hyperparams or {}
    counted = seed is not None or any(
        map(_hyperparams.is_scheduled, hyperparams.values())
    )

    def init_fn(params: PyTree) -> AggregatorState:
        del params
        return initial_state(counted)

    def factor(kept: jax.Array, size: int) -> jax.Array:
        value = jnp.where(kept > 0, size / jnp.where(kept > 0, kept, 1), 0)
        if max_rescale is None:
            return value
        return jnp.minimum(value, jnp.asarray(max_rescale).astype(value.dtype))

    def update_leaf(
        leaf: GradStats, given: dict[str, Any], dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        mask, direction, *closed = _answer(name, rule, leaf, given)
        _check_shapes(name, leaf, mask, direction, *closed)
        passing = mask
        if rescale:
            passing = kept = st.sum_of_mask(mask)
            wide = _validate.wide(direction.dtype)
            direction = direction.astype(wide) * factor(kept, mask.size).astype(wide)
        closed = [value.astype(direction.dtype) for value in closed]
        if mask.dtype == jnp.bool_:
            update = _lax.where(mask, direction, closed[0] if closed else 0)
        else:
            mask = mask.astype(direction.dtype)
            update = mask * direction
            if closed:
                update += (1 - mask) * closed[0]
        return _lax.where(_broken(leaf), np.nan, update).astype(dtype), passing

    def update_fn(
        updates: PyTree,
        state: AggregatorState,
        params: PyTree | None = None,
        *,
        env_weights: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, AggregatorState]:
        del extra_args
        grads = forms.read(updates, name, params, env_weights, axis_name)
        count = state.mask_count if counted else None
        values: dict[str, Any] = {
            key: _hyperparams.per_leaf(key, value, updates, count, forms.is_leaf)
            for key, value in hyperparams.items()
        }
        stats = grads.stats(statistics)
        if seed is not None and stats:
            values["key"] = _keys(seed, count, len(stats))
        common = of_all(stats) if of_all is not None and stats else {}
        results = [
            update_leaf(
                leaf, {key: value[i] for key, value in values.items()} | common, dtype
            )
            for i, (leaf, dtype) in enumerate(zip(stats, grads.dtypes, strict=True))
        ]
        size = sum(update.size for update, _ in results)
        kept = st.sum_of_masks([mask for _, mask in results])
        return (
            grads.unflatten([update for update, _ in results]),
            next_state(kept / max(size, 1), count),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _keys(seed: Any, count: Any, num_leaves: int) -> jax.Array:
    """A key for every parameter, of one update."""
    key = jax.random.fold_in(_validate.prng_key("seed", seed), count)
    # One operation for all: compiling one for each would take long.
    return jax.vmap(jax.random.fold_in, (None, 0))(
        key, jnp.arange(num_leaves, dtype=jnp.uint32)
    )


def _broken(leaf: GradStats) -> jax.Array:
    """Where a present environment's gradient is not finite, as far as can be told."""
    if leaf.sign_sum is not None:
        return _lax.isnan(leaf.sign_sum)
    if leaf.mean is not None:
        return jax.lax.bitwise_not(jax.lax.is_finite(leaf.mean))
    values = [getattr(leaf, s.field) for s in st.STATISTICS.values()]
    broken = [jnp.isnan(value) for value in values if value is not None]
    result = broken[0]
    for other in broken[1:]:
        result |= other
    return result


def _answer(
    name: str, rule: Rule, leaf: GradStats, given: dict[str, Any]
) -> tuple[jax.Array, ...]:
    """What a rule returns for one parameter."""
    try:
        returned: Any = rule(leaf, **given)
    except (AttributeError, TypeError) as error:
        absent = [
            f"{statistic.field} ({key!r})"
            for key, statistic in st.STATISTICS.items()
            if getattr(leaf, statistic.field) is None
        ]
        if absent and "NoneType" in str(error):
            error.add_note(
                f"{name}: None for want of being named in stats: {', '.join(absent)}"
            )
        raise
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        if _validate.is_array(returned):
            found = f"an array of shape {jnp.shape(returned)}"
        else:
            found = _validate.a_or_an(type(returned).__name__)
            found += (
                f" of {len(returned)}" if isinstance(returned, tuple | list) else ""
            )
        raise TypeError(
            f"{name}: the rule must return (mask, direction), or with a third array "
            f"for where the mask is closed, got {found}"
        )
    mask, *others = (
        x if isinstance(x, jax.Array) else jnp.asarray(x) for x in returned
    )
    # Whole numbers have no NaN.
    floating = [
        x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
        for x in others
    ]
    return mask, *floating


def _check_shapes(name: str, leaf: GradStats, *arrays: jax.Array) -> None:
    held = [getattr(leaf, s.field) for s in st.STATISTICS.values()]
    shape = next(np.shape(value) for value in held if value is not None)
    names = ("mask", "direction", "value where the mask is closed")
    for what, array in zip(names, arrays, strict=False):
        if jnp.shape(array) != shape:
            raise ValueError(
                f"{name}: the rule's {what} must have the shape {shape} of its "
                f"parameter, got {jnp.shape(array)}"
            )
