"""The mean of gradients made orthogonal and equally long."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary._typing import AxisName
from hardvary.aggregators.spectral import singular_values
from hardvary.aggregators.weighting import of_gramian


def aligned_mtl(
    *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The mean of the gradients, made orthogonal and as long as their least direction.

    .. math::
      u = \sigma_{\min} \, J^\top V \Sigma^{-1} V^\top p, \qquad
      J J^\top = V \Sigma^2 V^\top

    where row e of :math:`J` is :math:`g_e`: the nearest matrix whose singular values
    are all the smallest one of :math:`J` that is not 0. Neither conflicts nor one long
    gradient are left. The weights :math:`p` are `env_weights` with the sum 1, equal
    unless given.

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
      fewer dimensions than rows  only directions that they span
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.aligned_mtl()
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[100.0, 0.0], [0.0, 1.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates.tolist()]
      [0.5, 0.5]

    References:
      Senushkin et al., `Independent Component Alignment for Multi-Task Learning
      <https://arxiv.org/abs/2305.19000>`_, CVPR 2023.

    Warning:
      Must come first in an `optax.chain`.
    """

    def rule(gramian: jax.Array, shares: jax.Array, size: Any) -> jax.Array:
        del size
        values, vectors = singular_values(gramian)
        least = jnp.min(jnp.where(values > 0, values, jnp.inf))
        ratio = jnp.where(values > 0, least / jnp.where(values > 0, values, 1), 0)
        highest = jax.lax.Precision.HIGHEST
        rotated = jnp.matmul(vectors.T, shares, precision=highest)
        return jnp.matmul(vectors, ratio * rotated, precision=highest)

    return of_gramian(rule, name="aligned_mtl", axis_name=axis_name)
