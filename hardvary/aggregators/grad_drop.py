"""One sign per component, drawn by its share."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hardvary import _validate
from hardvary._env_grads import statistics as st
from hardvary._env_grads.grad_stats import GradStats
from hardvary._typing import AxisName
from hardvary.aggregators.aggregator import build


def grad_drop(
    seed: ArrayLike, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the gradients of one sign per component, drawn by their share.

    .. math::
      u_j = \tfrac1d \sum_e [g_e]_j \,
            1\left[\operatorname{sign}([g_e]_j) = s_j\right], \qquad
      s_j = \begin{cases} +1 & P_j > U_j \\ -1 & \text{else} \end{cases}, \qquad
      P_j = \tfrac12 \Big(1 + \frac{\sum_e [g_e]_j}{\sum_e |[g_e]_j|}\Big)

    with :math:`U_j` uniform in [0, 1). Gradient sign dropout. In expectation the update
    is the mean over all environments; the noise is zero where they agree, and drives
    the parameters to where they do.

    The paper adds the kept gradients up. Here they are divided by the number of all
    environments, dropped ones included, so that learning rates are those of the other
    aggregators; `optax.scale(d)` behind it gives the paper's update. The paper drops
    gradients of activations, this those of parameters, as its other users do.

    Args:
      seed: an integer >= 0 or a key (`jax.random.key`), possibly traced. Every update
        and every parameter draws anew, the same on all devices. In an `optax.partition`
        each group needs a seed of its own.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `and_mask`; a `GradStats` must hold the
      statistics `"mean"` and `"abs"`. The state's `mask_count` counts the updates.
      `kept_fraction` is the share of :math:`\sum_e |[g_e]_j|` that is kept, on average
      over all components: 1 where all agree.

    Raises:
      TypeError: (construction) a seed that is neither an integer nor a key; (tracing)
        as `and_mask`.
      ValueError: (construction) a negative seed; (tracing) as `and_mask`.

    Edge cases:
      ==========================  ==================================================
      one sign only               :math:`P` is 0 or 1 and the update the mean, whatever
                                  is drawn; also if the other sign has a share below
                                  1e-6 (2e-3 for a `GradStats` whose mean is bfloat16),
                                  which may be rounding
      only zeros                  0, and nothing kept
      env_weights                 weight all sums
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.grad_drop(seed=0)
      >>> params = jnp.zeros(3)
      >>> grads = jnp.array([[1.0, 3.0, 0.0], [3.0, -1.0, 1.0]])  # [env, 3]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates[1].item() in (1.5, -0.5)  # with probabilities 3/4 and 1/4
      True
      >>> updates[::2].tolist()  # no one disagrees
      [2.0, 0.5]

    References:
      Chen et al., `Just Pick a Sign: Optimizing Deep Multitask Models with Gradient
      Sign Dropout <https://arxiv.org/abs/2010.06808>`_, NeurIPS 2020, algorithm 1.

    Warning:
      Must come first in an `optax.chain`.
    """
    _validate.prng_key("seed", seed)

    def rule(leaf: GradStats, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = leaf.abs_mean
        dtype = total.dtype
        ratio = leaf.mean.astype(dtype) / jnp.where(total > 0, total, 1)
        # What rounding leaves of the side that nobody is on is no gradient.
        slack = 16 * float(jnp.finfo(dtype).eps)
        slack += float(jnp.finfo(leaf.mean.dtype).eps) / 2
        ratio = jnp.where(jnp.abs(ratio) >= 1 - slack, jnp.sign(ratio), ratio)
        # float32 whatever the dtype, and so the same draws.
        drawn = jax.random.uniform(key, total.shape, jnp.float32).astype(dtype)
        sign = jnp.where((1 + ratio) / 2 > drawn, 1, -1).astype(dtype)
        kept = jnp.where(total > 0, (1 + sign * ratio) / 2, 0)
        return jnp.where(jnp.isfinite(leaf.mean), kept, 0), sign * total

    return build(
        rule,
        st.named(("mean", "abs")),
        name="grad_drop",
        axis_name=axis_name,
        seed=seed,
    )
