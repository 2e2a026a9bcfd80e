"""An update that means the same to every environment."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary._typing import AxisName
from hardvary.aggregators.spectral import singular_values
from hardvary.aggregators.weighting import of_gramian


def imtl_g(
    *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The update with the same projection on every environment's gradient.

    .. math::
      u = \sum_e w_e g_e, \qquad
      \langle u, g_e \rangle / \|g_e\| \text{ equal for all } e, \qquad \sum_e w_e = 1

    Impartial multi-task learning, its part for gradients. Weights may be negative, and
    so may be the projections: three gradients without a conflict, a short one amid two
    long ones, can have an update against them all. `config` has the same direction with
    the sign that helps. Where the gradients span too little for equal projections, the
    pseudo-inverse's compromise.

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
      weights with the sum 0      0
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.imtl_g()
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[3.0, 0.0], [0.0, 1.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates.tolist()]
      [0.75, 0.75]

    References:
      Liu et al., `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021.

    Warning:
      Must come first in an `optax.chain`.
    """

    def rule(gramian: jax.Array, shares: jax.Array, size: Any) -> jax.Array:
        del shares, size
        values, vectors = singular_values(gramian)
        inverse = jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0)
        highest = jax.lax.Precision.HIGHEST
        lengths = jnp.sqrt(jnp.diagonal(gramian))
        rotated = jnp.matmul(vectors.T, lengths, precision=highest)
        # The pseudo-inverse of the Gramian times the lengths, without a square.
        weights = jnp.matmul(vectors, inverse * (inverse * rotated), precision=highest)
        total = jnp.sum(weights)
        # What is left of a sum of 0 is rounding.
        bound = len(weights) * jnp.finfo(weights.dtype).eps * jnp.sum(jnp.abs(weights))
        known = jnp.abs(total) > bound
        return jnp.where(known, weights / jnp.where(known, total, 1), 0)

    return of_gramian(rule, name="imtl_g", axis_name=axis_name)
