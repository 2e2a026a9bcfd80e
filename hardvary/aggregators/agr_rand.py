"""The mean where environments agree, noise where they do not."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from hardvary import _hyperparams, _validate
from hardvary._env_grads import statistics as st
from hardvary._env_grads.agreement import reaches
from hardvary._env_grads.grad_stats import GradStats
from hardvary._typing import AxisName, ScalarOrSchedule
from hardvary.aggregators.aggregator import build


def agr_rand(
    seed: ArrayLike,
    *,
    std: ScalarOrSchedule | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The mean where all environments agree on the sign, and noise elsewhere.

    .. math::
      u_j = \begin{cases}
        \tfrac1d \sum_e [g_e]_j & \text{all } \operatorname{sign}([g_e]_j)
          \text{ equal and not } 0 \\
        \sigma z_j, \; z_j \sim N(0, 1) & \text{else}
      \end{cases}

    Agr-Rand: `and_mask` with a threshold of 1, whose closed components walk at random
    instead of standing still.

    The paper adds the gradients up. Here they are averaged, and the noise with them, so
    that learning rates are those of the other aggregators; `optax.scale(d)` behind it
    gives the paper's update.

    Args:
      seed: see `grad_drop`.
      std: :math:`\sigma` >= 0, possibly traced, or a schedule. None takes that of the
        authors' code, which is no constant: the mean of :math:`|u_j|` over all
        components, of all parameters, that agree.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `and_mask`. The state's `mask_count` counts
      the updates. `kept_fraction` is the share of components that agree, the rest being
      noise.

    Raises:
      TypeError: (construction) a seed that is neither an integer nor a key, a `std`
        that is no real scalar or schedule; (tracing) as `and_mask`.
      ValueError: (construction) a negative seed, a `std` that is negative or not
        finite; (tracing) as `and_mask`.

    Edge cases:
      ==========================  ==================================================
      std 0                       `and_mask` with a threshold of 1
      a zero gradient             no vote: the component gets noise, also if all are
                                  zero
      nobody agrees anywhere      a zero update with `std=None`: there is no scale
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.agr_rand(seed=0)
      >>> params = jnp.zeros(3)
      >>> grads = jnp.array([[1.0, 2.0, 0.0], [3.0, -1.0, 1.0]])  # [env, 3]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates[0].item(), bool((updates[1:] != 0).all())  # 2, and N(0, 2²) twice
      (2.0, True)

    References:
      Mansilla et al., `Domain Generalization via Gradient Surgery
      <https://arxiv.org/abs/2108.01621>`_, ICCV 2021, and `its code
      <https://github.com/lucasmansilla/DGvGS>`_.

    Warning:
      Must come first in an `optax.chain`. The noise does not fade as training converges
      unless the gradients that agree do; behind `optax.adam` it keeps the full step.
    """
    _validate.prng_key("seed", seed)
    if std is not None and not _hyperparams.is_scheduled(std):
        _validate.finite_at_least("std", std, 0.0)

    def of_all(leaves: Sequence[GradStats]) -> dict[str, Any]:
        dtype = np.result_type(*(leaf.sign_sum.dtype for leaf in leaves))
        size, number = jnp.zeros((), dtype), jnp.zeros((), dtype)
        for leaf in leaves:
            agreed = reaches(leaf.sign_sum, leaf.num_envs, 1.0)
            agreed &= jnp.isfinite(leaf.mean)
            sizes = jnp.where(agreed, jnp.abs(leaf.mean), 0)
            size += jnp.sum(sizes, dtype=dtype)
            number += jnp.sum(agreed, dtype=dtype)
        return {"std": size / jnp.maximum(number, 1)}

    def rule(
        leaf: GradStats, key: jax.Array, std: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        dtype = leaf.sign_sum.dtype
        # float32 whatever the dtype, and so the same draws.
        drawn = jax.random.normal(key, leaf.mean.shape, jnp.float32).astype(dtype)
        agreed = reaches(leaf.sign_sum, leaf.num_envs, 1.0)
        # By the mask, which lies on an explicit mesh as the parameter does.
        scale = jnp.where(agreed, 0, jnp.asarray(std).astype(dtype))
        return agreed, leaf.mean.astype(dtype), scale * drawn

    return build(
        rule,
        st.named(("mean", "sign")),
        name="agr_rand",
        axis_name=axis_name,
        hyperparams={} if std is None else {"std": std},
        seed=seed,
        of_all=of_all if std is None else None,
    )
