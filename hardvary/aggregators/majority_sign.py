"""The vote of the environments, and nothing else."""

import jax
import jax.numpy as jnp
import optax

from hardvary._env_grads import statistics as st
from hardvary._env_grads.agreement import ROUNDING
from hardvary._env_grads.grad_stats import GradStats
from hardvary._typing import AxisName
from hardvary.aggregators.aggregator import build


def majority_sign(
    *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The sign that most environments vote for.

    .. math:: u_j = \operatorname{sign}\Big(\sum_e \operatorname{sign}([g_e]_j)\Big)

    signSGD with majority vote. No environment has more than one vote, however large
    its gradient, so that a few that are wrong or hostile cannot carry a component.
    Every component moves by the same length: expect a learning rate as for
    `optax.lion`, and no slowing down near a minimum.

    Args:
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `and_mask`, updates 1, -1 and 0; a
      `GradStats` must hold the statistic `"sign"`, and with `"mean"` it knows the
      gradients' dtype. `kept_fraction` is the share of components that are decided.

    Raises:
      TypeError: (tracing) as `and_mask`.
      ValueError: (tracing) as `and_mask`.

    Edge cases:
      ==========================  ==================================================
      a tie                       0
      a zero gradient             no vote
      env_weights                 the weight of a vote
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.majority_sign()
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 2.0], [3.0, -1.0], [-9.0, 0.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates.tolist()
      [1.0, 0.0]

    References:
      Bernstein et al., `signSGD with Majority Vote is Communication Efficient And Fault
      Tolerant <https://arxiv.org/abs/1810.05291>`_, ICLR 2019.

    Warning:
      Must come first in an `optax.chain`.
    """

    def rule(leaf: GradStats) -> tuple[jax.Array, jax.Array]:
        # Shares of the total: 0/0, not 0, where no environment is present.
        lead = leaf.sign_sum / leaf.num_envs.astype(leaf.sign_sum.dtype)
        tie = jnp.abs(lead) <= ROUNDING
        return ~tie & ~jnp.isnan(leaf.sign_sum), jnp.sign(lead)

    return build(rule, st.named(("sign",)), name="majority_sign", axis_name=axis_name)
