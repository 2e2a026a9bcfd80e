"""The AND-mask, and the XOR-mask that keeps what the AND-mask drops."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary import _validate
from hardvary._env_grads.statistics import AxisName, GradStats
from hardvary.aggregators import masked


def and_mask(
    threshold: Any = 1.0,
    *,
    rescale: bool = False,
    max_rescale: Any = None,
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
      threshold: :math:`\tau` in [0, 1]. 0 is plain averaging, 1 asks for unanimity.
        May be traced (`optax.inject_hyperparams`). The comparison is exact: a
        component whose agreement equals the threshold is kept, also for values
        such as 0.2, 0.6 and 0.8 that floating point cannot represent.
      rescale: multiply the surviving components of each leaf by
        (components in the leaf) / (components kept); a leaf with nothing kept
        stays 0.
      max_rescale: cap of that factor, >= 1; None for none. Unused without `rescale`.
      axis_name: name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which
        environments are spread; sums cross it with `jax.lax.psum`. Give it here or to
        the gradient oracle: what the oracle has summed is not summed again.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `AggregatorState`. Its
      `update(updates, state, params=None, *, env_weights=None)` takes stacked
      gradients, leaves `[env, *param.shape]`, or a `GradStats` with the statistics
      `"mean"` and `"sign"`, and returns leaves `param.shape` in the gradients' dtype.
      `env_weights: [env]` (stacked form only) weights mean and votes.

    Raises:
      TypeError: (construction) a threshold that is no real scalar; (tracing)
        integer, boolean or complex gradients.
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
    _validate.in_unit_interval("threshold", threshold)

    def leaf_rule(leaf: GradStats) -> tuple[jax.Array, jax.Array]:
        return (
            masked.reaches(leaf.sign_sum, leaf.num_envs, threshold),
            leaf.mean,
        )

    return masked.build(
        "and_mask",
        ("mean", "sign"),
        leaf_rule,
        rescale=rescale,
        max_rescale=max_rescale,
        axis_name=axis_name,
    )


def xor_mask(
    threshold: Any = 1.0,
    *,
    rescale: bool = False,
    max_rescale: Any = None,
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
    _validate.in_unit_interval("threshold", threshold)

    def leaf_rule(leaf: GradStats) -> tuple[jax.Array, jax.Array]:
        agreed = masked.reaches(leaf.sign_sum, leaf.num_envs, threshold)
        return ~agreed & ~jnp.isnan(leaf.sign_sum), leaf.mean

    return masked.build(
        "xor_mask",
        ("mean", "sign"),
        leaf_rule,
        rescale=rescale,
        max_rescale=max_rescale,
        axis_name=axis_name,
    )
