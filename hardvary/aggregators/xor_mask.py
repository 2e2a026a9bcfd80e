"""The XOR-mask, which keeps what the AND-mask drops."""

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


def xor_mask(
    threshold: Threshold = 1.0,
    *,
    rescale: bool = False,
    max_rescale: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages over environments where they disagree: the AND-mask's complement.

    .. math::
      u_j = (1 - m_j) \, \tfrac1d \sum_e [g_e]_j

    with the mask :math:`m` of `and_mask`. It isolates what the AND-mask throws away,
    to study the two learning signals apart (paper, section 4.1 and figure 7); nothing
    one would train with.

    Args:
      threshold: in [0, 1]; components with an agreement below it are kept. 0 keeps
        nothing; 1 keeps everything that is not unanimous.
      rescale: see `and_mask`.
      max_rescale: see `and_mask`.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `and_mask`.

    Raises:
      TypeError: as `and_mask`.
      ValueError: as `and_mask`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.xor_mask(threshold=1.0)
      >>> params = jnp.zeros(3)
      >>> grads = jnp.array([[1.0, 2.0, 0.0], [3.0, -1.0, 1.0]])  # [env, 3]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates.tolist()
      [0.0, 0.5, 0.5]

    References:
      Parascandolo et al., `Learning explanations that are hard to vary
      <https://arxiv.org/abs/2009.00329>`_, ICLR 2021.

    Warning:
      Must come first in an `optax.chain`.
    """
    _hyperparams.check_unit_interval("threshold", threshold)

    def rule(leaf: GradStats, threshold: Any) -> tuple[jax.Array, jax.Array]:
        agreed = reaches(leaf.sign_sum, leaf.num_envs, threshold)
        return ~agreed & ~jnp.isnan(leaf.sign_sum), leaf.mean

    return build(
        rule,
        st.named(("mean", "sign")),
        name="xor_mask",
        rescale=rescale,
        max_rescale=max_rescale,
        axis_name=axis_name,
        hyperparams={"threshold": threshold},
    )
