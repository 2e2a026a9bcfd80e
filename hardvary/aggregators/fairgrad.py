"""Fair shares of the gain, from the largest sum to the least unequal."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary import _hyperparams, _validate
from hardvary._typing import AxisName, ScalarOrSchedule
from hardvary.aggregators.quadratic import balanced
from hardvary.aggregators.weighting import of_gramian


def fairgrad(
    alpha: ScalarOrSchedule = 2.0, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The update whose gains for the environments are alpha-fair.

    .. math::
      u = \sum_e w_e g_e, \qquad \langle u, g_e \rangle = w_e^{-1/\alpha}

    :math:`\alpha = 1` is proportional fairness, the update of `nash_mtl`; :math:`\alpha
    \to 0` comes near the sum of all gains, :math:`\alpha \to \infty` near the smallest
    gain. The length of the update depends on that of the gradients only for other alpha
    than 1. Solved exactly by Newton's method.

    Args:
      alpha: > 0; possibly traced, or a schedule.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `weighting`.

    Raises:
      TypeError: an alpha that is no real scalar or schedule; (tracing) as `weighting`.
      ValueError: an alpha that is not positive, infinite or NaN; (tracing) as
        `weighting`.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in a present environment: everything is NaN
      an environment of weight 0  as if it were not there, whatever it holds
      env_weights                 tell who is there; their size changes nothing
      a zero gradient             left out
      no direction helps all      large weights and an update that is rounding
      alpha outside [0.1, 10]     not to the last digit where lengths differ by much
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.fairgrad(alpha=1.0)
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[4.0, 0.0], [0.0, 0.25]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates.tolist()]
      [1.0, 1.0]

    References:
      Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
      <https://arxiv.org/abs/2402.15638>`_, ICML 2024.

    Warning:
      Must come first in an `optax.chain`.
    """
    number = _hyperparams.check_number("alpha", alpha)
    if number is not None:
        _validate.finite_at_least("alpha", number, 0.0, strict=True)

    def rule(gramian: jax.Array, shares: jax.Array, size: Any, alpha: Any) -> jax.Array:
        del shares
        power = 1 / jnp.asarray(alpha, gramian.dtype)
        return balanced(gramian, power) * size ** (-1 / (1 + power))

    return of_gramian(
        rule, name="fairgrad", axis_name=axis_name, hyperparams={"alpha": alpha}
    )
