"""The smoothed AND-mask."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hardvary import _hyperparams, _validate
from hardvary._env_grads import statistics as st
from hardvary._env_grads.grad_stats import GradStats
from hardvary._typing import AxisName, ScalarOrSchedule, Threshold
from hardvary.aggregators.aggregator import build


def sand_mask(
    threshold: Threshold,
    sharpness: ScalarOrSchedule,
    *,
    rescale: bool = True,
    max_rescale: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights the mean by a smooth mask of agreement over variance.

    .. math::
      u_j = \frac{m_j}{\operatorname{mean}(m)} \, \tfrac1d \sum_e [g_e]_j, \qquad
      m_j = \max\Big(0, \tanh\Big(k \frac{a_j - \tau}{\sigma^2_j}\Big)\Big)

    where :math:`a` is the agreement of `and_mask`, :math:`\sigma^2` the unbiased
    variance of the gradient over environments and the mean of the mask is taken over
    each leaf. Components just above the threshold fade in instead of switching on.

    Args:
      threshold: :math:`\tau`, see `and_mask`.
      sharpness: :math:`k` > 0, the slope, in units of a squared gradient; may be
        traced, or a schedule.
      rescale: divide by the mean of the mask, leaf by leaf, as published. A leaf whose
        mask is all zero stays 0.
      max_rescale: cap of that factor, >= 1; None for none.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `and_mask`; a `GradStats` must hold the
      statistics `"mean"`, `"sign"` and `"square"`. `kept_fraction` is the mean of the
      mask over all components.

    Raises:
      TypeError: as `and_mask`; a sharpness that is no real scalar.
      ValueError: as `and_mask`; sharpness <= 0.

    Edge cases:
      ==========================  ==================================================
      no variance                 the mask is the step: 1 above the threshold, else 0
      total weight <= 1           no variance can be estimated: likewise the step
      agreement = threshold       0, unlike `and_mask`
      env_weights                 count as multiplicities in the unbiased variance
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.sand_mask(threshold=0.5, sharpness=1.0, rescale=False)
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 2.0], [3.0, -1.0]])  # [env, 2]; variance 2 and 4.5
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(u, 4) for u in updates.tolist()]  # 2 tanh(0.5 / 2)
      [0.4898, 0.0]

    References:
      Shahtalebi et al., `SAND-mask: An Enhanced Gradient Masking Strategy for the
      Discovery of Invariances in Domain Generalization
      <https://arxiv.org/abs/2106.02266>`_, 2021.

    Warning:
      Must come first in an `optax.chain`. The variance is a difference of two means:
      where it is below 1e-6 of the mean square (6e-2 for a `GradStats` whose mean is
      bfloat16, 8e-3 for float16) it may be rounding and counts as none.
    """
    _hyperparams.check_unit_interval("threshold", threshold)
    if not _hyperparams.is_scheduled(sharpness):
        _validate.at_least("sharpness", sharpness, 0.0, strict=True)

    def rule(
        leaf: GradStats, threshold: Any, sharpness: Any
    ) -> tuple[jax.Array, jax.Array]:
        dtype = leaf.square_mean.dtype
        num_envs = leaf.num_envs.astype(dtype)
        mean = leaf.mean.astype(dtype)
        biased = jnp.maximum(leaf.square_mean - jnp.square(mean), 0)
        # What rounding leaves of the difference is no variance.
        eps = float(jnp.finfo(leaf.mean.dtype).eps)
        biased = jnp.where(biased <= 8 * eps * leaf.square_mean, 0, biased)
        spare = num_envs - 1
        variance = jnp.where(
            spare > 0, biased * num_envs / jnp.where(spare > 0, spare, 1), 0
        )
        above = jnp.abs(leaf.sign_sum).astype(dtype) / num_envs - jnp.asarray(
            threshold
        ).astype(dtype)
        # At equality the margin is rounding noise, which a small variance would turn
        # into a full step.
        above = jnp.where(jnp.abs(above) < 1e-6, 0, above)
        slope = jnp.asarray(sharpness).astype(dtype)
        smooth = jnp.tanh(slope * above / jnp.where(variance > 0, variance, 1))
        mask = jnp.where(variance > 0, smooth, jnp.sign(above))
        mask = jnp.where(jnp.isnan(mask), 0, jnp.maximum(mask, 0))
        return mask, mean

    return build(
        rule,
        st.named(("mean", "sign", "square")),
        name="sand_mask",
        rescale=rescale,
        max_rescale=max_rescale,
        axis_name=axis_name,
        hyperparams={"threshold": threshold, "sharpness": sharpness},
    )
