"""No conflict with any environment: projections on the cone of what helps all."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary._typing import AxisName
from hardvary.aggregators.quadratic import cone_projections, cosines
from hardvary.aggregators.weighting import of_gramian


def upgrad(
    *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The mean of gradients, each projected on the cone of what hurts no environment.

    .. math::
      u = \sum_e p_e \, \arg\min_{v \in C} \|v - g_e\|^2, \qquad
      C = \{v : \langle v, g_f \rangle \ge 0 \text{ for all } f\}

    To first order no loss rises. What an environment says counts in proportion to its
    gradient, unlike in `dualproj`, which projects the mean. The weights :math:`p` are
    `env_weights` with the sum 1, equal unless given. Where no two gradients have a
    negative product, it is the mean.

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
      opposed gradients           cancel: the cone has nothing between them
      a zero gradient             counts as 0 in the mean
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.upgrad()
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates.tolist()]
      [0.25, 0.75]

    References:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024.

    Warning:
      Must come first in an `optax.chain`.
    """

    def rule(gramian: jax.Array, shares: jax.Array, size: Any) -> jax.Array:
        del size
        matrix, lengths = cosines(gramian)
        weights = jnp.matmul(
            shares * lengths,
            cone_projections(matrix),
            precision=jax.lax.Precision.HIGHEST,
        )
        safe = jnp.where(lengths > 0, lengths, 1)
        return jnp.where(lengths > 0, weights / safe, shares)

    return of_gramian(rule, name="upgrad", axis_name=axis_name)
