"""The L1 counterpart of `optax.add_decayed_weights`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hardvary import _validate
from hardvary._typing import PyTree, ScalarOrSchedule


class AddL1DecayState(NamedTuple):
    """State of `add_l1_decay` with a schedule.

    Attributes:
      count: int32 scalar, number of updates so far; named as in the state of
        `optax.add_decayed_weights`.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax


def add_l1_decay(
    strength: ScalarOrSchedule,
    mask: PyTree | Callable[[optax.Params], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of an L1 penalty, `strength * sign(param)`.

    .. math:: u \leftarrow u + \lambda \operatorname{sign}(\theta)

    Behind an aggregator and before an optimizer it acts like an L1 term in the loss
    that no environment votes on; behind the optimizer it is a decoupled pull of every
    weight towards 0, masked ones included (paper, section 3: L1 or L2 help to suppress
    units that start out tuned to shortcuts). `sign(0) = 0`.

    Args:
      strength: :math:`\lambda` >= 0, a scalar or a schedule (a function of the number
        of updates so far); may be traced. What a schedule returns is not checked to
        be >= 0.
      mask: tree of booleans, a prefix of params, or a function from params to one;
        True where the decay applies. None decays everything.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose `update` needs `params`. Sums
      are computed in at least float32 and keep the dtype of the updates.

    Raises:
      TypeError: a strength that is no real scalar; (tracing) updates that are not
        real floating.
      ValueError: a strength that is negative or not finite; (tracing) `update`
        without params.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.add_l1_decay(0.5)
      >>> params = jnp.array([2.0, 0.0, -3.0])
      >>> updates, _ = tx.update(jnp.zeros(3), tx.init(params), params)
      >>> updates.tolist()
      [0.5, 0.0, -0.5]
    """
    if not callable(strength):
        _validate.finite_at_least("strength", strength, 0.0)

    def init_fn(params: PyTree) -> optax.OptState:
        del params
        if callable(strength):
            return AddL1DecayState(count=jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.OptState]:
        del extra_args
        if params is None:
            raise ValueError(
                "add_l1_decay needs the parameters: call update(updates, state, params)"
            )
        _validate.real_floating(updates, "add_l1_decay: updates")
        value = strength
        if callable(strength):
            value = strength(state.count)
            _validate.scalar(
                "what the schedule strength returns", value, rule="that is >= 0"
            )
            state = AddL1DecayState(count=optax.safe_increment(state.count))

        def add(update: Any, param: Any) -> jax.Array:
            dtype = jnp.result_type(update)
            wide = _validate.wide(dtype)
            pull = jnp.asarray(value).astype(wide) * jnp.sign(param).astype(wide)
            return (jnp.asarray(update).astype(wide) + pull).astype(dtype)

        return jax.tree.map(add, updates, params), state

    transform = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return transform if mask is None else optax.masked(transform, mask)
