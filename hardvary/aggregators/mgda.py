"""The shortest vector between the gradients of all environments."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary._typing import AxisName
from hardvary.aggregators.quadratic import cosines, shortest_reaching
from hardvary.aggregators.weighting import of_gramian


def mgda(*, axis_name: AxisName | None = None) -> optax.GradientTransformationExtraArgs:
    r"""The point of the convex hull of all gradients that is closest to 0.

    .. math::
      u = \sum_e w_e g_e, \qquad
      w = \arg\min_{w \ge 0, \, \sum_e w_e = 1} \Big\| \sum_e w_e g_e \Big\|^2

    The multiple gradient descent algorithm. The update has the same product with every
    gradient that takes part, and a larger one with the others; it is 0 where no
    direction helps all. Small gradients rule: one environment that is done stops all of
    them. Solved exactly, not by a few steps of Frank-Wolfe.

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
      env_weights                 tell who is there; their size changes nothing
      a zero gradient             has all the weight: the update is 0
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.mgda()
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[2.0, 0.0], [0.0, 1.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates.tolist()]
      [0.4, 0.8]

    References:
      Desideri, `Multiple-gradient descent algorithm (MGDA) for multiobjective
      optimization <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012.

      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018.

    Warning:
      Must come first in an `optax.chain`.
    """

    def rule(gramian: jax.Array, shares: jax.Array, size: Any) -> jax.Array:
        del size
        here = shares > 0
        matrix, lengths = cosines(gramian)
        zero = here & (lengths == 0)
        # The shortest vector with a product >= 1 with each points the same way.
        least = jnp.min(jnp.where(lengths > 0, lengths, jnp.inf))
        least = jnp.where(jnp.isfinite(least), least, 1)
        inverse = jnp.where(lengths > 0, least / jnp.where(lengths > 0, lengths, 1), 0)
        weights = shortest_reaching(matrix, inverse)[0] * inverse
        weights = jnp.where(jnp.any(zero), zero.astype(weights.dtype), weights)
        return weights / jnp.sum(weights)

    return of_gramian(rule, name="mgda", axis_name=axis_name)
