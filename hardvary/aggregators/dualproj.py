"""The mean, projected on the cone of what helps all environments."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary._typing import AxisName
from hardvary.aggregators.quadratic import complementary, cosines
from hardvary.aggregators.weighting import of_gramian


def dualproj(
    *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Projects the mean gradient on the cone of updates that hurt no environment.

    .. math::
      u = \arg\min_{v} \|v - \textstyle\sum_e p_e g_e\|^2 \quad\text{subject to}\quad
      \langle v, g_f \rangle \ge 0 \text{ for all } f

    Gradient episodic memory's projection, of the mean of all environments. The weights
    :math:`p` are `env_weights` with the sum 1, equal unless given. See `upgrad` for
    what projects each gradient.

    Args:
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `weighting`.

    Raises:
      TypeError: (tracing) as `weighting`.
      ValueError: (tracing) as `weighting`.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in a present environment: everything is NaN
      an environment of weight 0  as if it were not there, whatever it holds
      no conflict with the mean   the mean
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.dualproj()
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 0.0], [-3.0, 2.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(abs(x), 4) for x in updates.tolist()]
      [0.0, 1.0]

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, NeurIPS 2017.

      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024.

    Warning:
      Must come first in an `optax.chain`.
    """

    def rule(gramian: jax.Array, shares: jax.Array, size: Any) -> jax.Array:
        del size
        matrix, lengths = cosines(gramian)
        mean = shares * lengths
        # Of size 1, so that the solver's tolerance is relative.
        largest = jnp.max(mean)
        largest = jnp.where(largest > 0, largest, 1)
        slack = jnp.matmul(matrix, mean / largest, precision=jax.lax.Precision.HIGHEST)
        weights = mean + largest * complementary(matrix, slack)
        safe = jnp.where(lengths > 0, lengths, 1)
        return jnp.where(lengths > 0, weights / safe, shares)

    return of_gramian(rule, name="dualproj", axis_name=axis_name)
