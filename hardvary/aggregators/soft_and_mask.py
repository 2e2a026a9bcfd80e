"""The AND-mask that weakens what it does not keep."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hardvary import _hyperparams
from hardvary._env_grads import statistics as st
from hardvary._env_grads.agreement import reaches
from hardvary._env_grads.grad_stats import GradStats
from hardvary._typing import AxisName, Threshold
from hardvary.aggregators.aggregator import build


def soft_and_mask(
    threshold: Threshold = 1.0,
    *,
    rescale: bool = False,
    max_rescale: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages over environments, in full where enough agree, else by their agreement.

    .. math::
      u_j = m_j \, \tfrac1d \sum_e [g_e]_j, \qquad
      m_j = \begin{cases} 1 & a_j \ge \tau \\ a_j & \text{else} \end{cases}, \qquad
      a_j = \tfrac1d \left|\sum_e \operatorname{sign}([g_e]_j)\right|

    Gradient-masked averaging. What the AND-mask stops, this slows down, so no
    component is dead unless as many environments vote for as against.

    Args:
      threshold: :math:`\tau`, see `and_mask`. 0 is plain averaging, 1 weights every
        component by its agreement.
      rescale: multiply each leaf by (components in the leaf) / (sum of the mask).
      max_rescale: see `and_mask`.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `and_mask`. `kept_fraction` is the mean of
      the mask over all components.

    Raises:
      TypeError: as `and_mask`.
      ValueError: as `and_mask`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.soft_and_mask(threshold=1.0)
      >>> params = jnp.zeros(3)
      >>> grads = jnp.array([[1.0, 2.0, 0.0], [3.0, -1.0, 1.0]])  # [env, 3]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates.tolist()  # agreement 1, 0 and 1/2
      [2.0, 0.0, 0.25]

    References:
      Tenison et al., `Gradient Masked Averaging for Federated Learning
      <https://arxiv.org/abs/2201.11986>`_, 2022.

    Warning:
      Must come first in an `optax.chain`.
    """
    _hyperparams.check_unit_interval("threshold", threshold)

    def rule(leaf: GradStats, threshold: Any) -> tuple[jax.Array, jax.Array]:
        votes = leaf.sign_sum
        agreement = jnp.minimum(jnp.abs(votes) / leaf.num_envs.astype(votes.dtype), 1)
        mask = jnp.where(reaches(votes, leaf.num_envs, threshold), 1, agreement)
        return jnp.where(jnp.isnan(votes), 0, mask), leaf.mean.astype(votes.dtype)

    return build(
        rule,
        st.named(("mean", "sign")),
        name="soft_and_mask",
        rescale=rescale,
        max_rescale=max_rescale,
        axis_name=axis_name,
        hyperparams={"threshold": threshold},
    )
