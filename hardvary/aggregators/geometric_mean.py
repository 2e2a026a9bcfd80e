"""The masked geometric mean of gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hardvary import _hyperparams, _validate
from hardvary._env_grads import statistics as st
from hardvary._env_grads.agreement import reaches
from hardvary._env_grads.grad_stats import GradStats
from hardvary._typing import AxisName, Threshold
from hardvary.aggregators.aggregator import build


def geometric_mean(
    threshold: Threshold = 1.0,
    *,
    rescale: bool = False,
    max_rescale: ArrayLike | None = None,
    eps: ArrayLike = st.LOG_EPS,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Geometric mean of the magnitudes, where environments agree on the sign.

    .. math::
      u_j = m_j \, \operatorname{sign}\Big(\tfrac1d \sum_e [g_e]_j\Big)
            \exp\Big(\tfrac1d \sum_e \log(|[g_e]_j| + \epsilon)\Big)

    with the mask :math:`m` of `and_mask`. One environment with a small gradient
    shrinks the whole component, where a mean would be carried by the others. The
    paper (section 3) recommends it for noise and few environments; updates are small,
    so expect a larger learning rate or an optimizer that normalises.

    Args:
      threshold: see `and_mask`.
      rescale: see `and_mask`.
      max_rescale: see `and_mask`.
      eps: offset inside the logarithm, > 0. A `GradStats` holds logarithms with the
        offset 1e-10, so another value needs one of the other forms.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `and_mask`; a `GradStats` must hold the
      statistics `"mean"`, `"sign"` and `"log_abs"`.

    Raises:
      TypeError: as `and_mask`.
      ValueError: as `and_mask`; eps <= 0, or another eps than 1e-10 with a
        `GradStats`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.geometric_mean(threshold=1.0)
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 2.0], [4.0, -1.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(u, 5) for u in updates.tolist()]
      [2.0, 0.0]

    References:
      Parascandolo et al., `Learning explanations that are hard to vary
      <https://arxiv.org/abs/2009.00329>`_, ICLR 2021, section 3.

    Warning:
      Must come first in an `optax.chain`.
    """
    _hyperparams.check_unit_interval("threshold", threshold)
    # An array is inject_hyperparams' doing: eps in the parameters' dtype, where it may
    # have been rounded, in float16 even to 0.
    if isinstance(eps, int | float):
        _validate.at_least("eps", eps, 0.0, strict=True)
        usual = eps == st.LOG_EPS
    else:
        _validate.scalar("eps", eps, rule="> 0")
        usual = True
    logs = st.STATISTICS["log_abs"] if usual else st.log_abs(eps)

    def rule(leaf: GradStats, threshold: Any) -> tuple[jax.Array, jax.Array]:
        sign = jnp.sign(leaf.mean).astype(leaf.log_abs_mean.dtype)
        return (
            reaches(leaf.sign_sum, leaf.num_envs, threshold),
            sign * jnp.exp(leaf.log_abs_mean),
        )

    return build(
        rule,
        (st.MEAN, st.SIGN, logs),
        name="geometric_mean",
        rescale=rescale,
        max_rescale=max_rescale,
        axis_name=axis_name,
        hyperparams={"threshold": threshold},
    )
