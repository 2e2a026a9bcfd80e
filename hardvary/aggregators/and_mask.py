"""The AND-mask."""

from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from hardvary import _hyperparams
from hardvary._env_grads import statistics as st
from hardvary._env_grads.agreement import reaches
from hardvary._env_grads.grad_stats import GradStats
from hardvary._typing import AxisName, Threshold
from hardvary.aggregators.aggregator import build


def and_mask(
    threshold: Threshold = 1.0,
    *,
    rescale: bool = False,
    max_rescale: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages over environments where enough of them agree on the sign.

    .. math::
      u_j = m_j \, \tfrac1d \sum_e [g_e]_j, \qquad
      m_j = 1\left[\,\left|\sum_e \operatorname{sign}([g_e]_j)\right|
            \ge \tau d\,\right]

    The environments vote with the sign of their gradient on every component; a zero
    gradient abstains. An AND where plain averaging is an OR (paper, section 3).

    Args:
      threshold: :math:`\tau` in [0, 1]. 0 is plain averaging, 1 asks for unanimity. A
        number, possibly traced; an optax schedule, from the number of updates so far to
        a threshold; or a tree prefix of params with these, for thresholds that differ
        by layer. The comparison is exact: a component whose agreement equals the
        threshold is kept, also for values such as 0.2, 0.6 and 0.8 that floating point
        cannot represent.
      rescale: multiply the surviving components of each leaf by
        (components in the leaf) / (components kept); a leaf with nothing kept
        stays 0.
      max_rescale: cap of that factor, >= 1; None for none. Unused without `rescale`.
      axis_name: name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which
        environments are spread; sums cross it with `jax.lax.psum`. Give it to the
        gradient oracle. Statistics and stacked gradients may leave it to this instead;
        what the oracle has summed is not summed again.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `AggregatorState`. Its
      `update(updates, state, params=None, *, env_weights=None)` takes gradients in any
      form: a tree of `EnvGrad`, a tree of `GradStats` with the statistics `"mean"` and
      `"sign"`, or stacked ones, leaves `[env, *param.shape]`. It returns leaves
      `param.shape` in the gradients' dtype. `env_weights: [env]` (stacked form only)
      weights mean and votes.

    Raises:
      TypeError: (construction) a threshold that is no real scalar, schedule or tree of
        these; (tracing) integer, boolean or complex gradients, arithmetic on what is no
        array.
      ValueError: (construction) threshold outside [0, 1] or NaN, max_rescale < 1;
        (tracing) gradients without an environment axis, environments that disagree
        in number, zero environments, trees that do not match, a statistic that is
        missing, bad env_weights.

    Edge cases:
      ==========================  ==================================================
      threshold 0                 exactly the mean over environments
      one environment             every non-zero component agrees with itself
      a zero gradient             no vote: it lowers the agreement
      nothing passes in a leaf    a zero update, also with `rescale`
      NaN or infinity             that component's update is NaN, whatever the vote
      an environment of weight 0  as if it were not there, whatever it holds
      only weights 0 (traced)     NaN: there is no mean (a ValueError if concrete)
      a tree without leaves       an empty update, kept fraction 0
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.and_mask(threshold=1.0)
      >>> params = jnp.zeros(3)
      >>> grads = jnp.array([[1.0, 2.0, 0.0], [3.0, -1.0, 1.0]])  # [env, 3]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates.tolist()
      [2.0, 0.0, 0.0]

    References:
      Parascandolo et al., `Learning explanations that are hard to vary
      <https://arxiv.org/abs/2009.00329>`_, ICLR 2021, section 3.

    Warning:
      Must come first in an `optax.chain`: what enters has an environment axis that no
      other transformation expects.
    """
    _hyperparams.check_unit_interval("threshold", threshold)

    def rule(leaf: GradStats, threshold: Any) -> tuple[jax.Array, jax.Array]:
        return (
            reaches(leaf.sign_sum, leaf.num_envs, threshold),
            leaf.mean,
        )

    return build(
        rule,
        st.named(("mean", "sign")),
        name="and_mask",
        rescale=rescale,
        max_rescale=max_rescale,
        axis_name=axis_name,
        hyperparams={"threshold": threshold},
    )
