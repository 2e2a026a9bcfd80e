"""The mean over the environments that have the elected sign."""

import jax
import jax.numpy as jnp
import optax

from hardvary._env_grads import statistics as st
from hardvary._env_grads.grad_stats import GradStats
from hardvary._typing import AxisName
from hardvary.aggregators.aggregator import build


def disjoint_mean(
    *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Mean over the environments whose gradient has the sign of the sum.

    .. math::
      u_j = \frac{1}{|E_j|} \sum_{e \in E_j} [g_e]_j, \qquad
      E_j = \Big\{e : \operatorname{sign}([g_e]_j)
            = \operatorname{sign}\Big(\sum_{e'} [g_{e'}]_j\Big) \ne 0\Big\}

    TIES merging of task vectors, applied to gradients and without trimming. The sign
    is elected by mass, not by votes: one large gradient outweighs many small ones. No
    component is cancelled or stopped by those who disagree; they are left out.

    Args:
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `and_mask`; a `GradStats` must hold the
      statistics `"mean"`, `"sign"`, `"abs"` and `"nonzero"`. `kept_fraction` is the
      share of components that elect a sign.

    Raises:
      TypeError: (tracing) as `and_mask`.
      ValueError: (tracing) as `and_mask`.

    Edge cases:
      ==========================  ==================================================
      a tie                       0: a sum within 2e-6 of :math:`\sum_e |g_e|` of zero,
                                  which may be rounding
      a zero gradient             on neither side, and not counted
      one sign only               the mean over the gradients that are not zero
      env_weights                 weight the sum and the mean
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.disjoint_mean()
      >>> params = jnp.zeros(3)
      >>> grads = jnp.array([[1.0, 2.0, 0.0], [3.0, -9.0, 5.0]])  # [env, 3]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates.tolist()
      [2.0, -9.0, 5.0]

    References:
      Yadav et al., `TIES-Merging: Resolving Interference When Merging Models
      <https://arxiv.org/abs/2306.01708>`_, NeurIPS 2023, steps 2 and 3 of section 4.

    Warning:
      Must come first in an `optax.chain`.
    """

    def rule(leaf: GradStats) -> tuple[jax.Array, jax.Array]:
        dtype = leaf.abs_mean.dtype
        eps = float(jnp.finfo(dtype).eps)
        mean, num_envs = leaf.mean.astype(dtype), leaf.num_envs.astype(dtype)
        elected = jnp.sign(mean)
        # Twice what the elected side adds up to, and twice its weight. It is the larger
        # side, so nothing cancels in the first; what may be left of the second, where
        # its weights are tiny, is rounding.
        mass = leaf.abs_mean + jnp.abs(mean)
        weight = (leaf.nonzero_sum + elected * leaf.sign_sum) / num_envs
        tie = jnp.abs(mean) <= 16 * eps * leaf.abs_mean
        return (
            ~tie & ~jnp.isnan(leaf.sign_sum),
            elected * mass / jnp.maximum(weight, eps),
        )

    return build(
        rule,
        st.named(("mean", "sign", "abs", "nonzero")),
        name="disjoint_mean",
        axis_name=axis_name,
    )
