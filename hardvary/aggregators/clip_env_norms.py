"""The mean of gradients that are no longer than a bound."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary import _hyperparams, _validate
from hardvary._env_grads.forms import Gradients
from hardvary._env_grads.products import total_square_norms
from hardvary._typing import AxisName, ScalarOrSchedule
from hardvary.aggregators.weighting import build


def clip_env_norms(
    max_norm: ScalarOrSchedule, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens every environment's gradient to a norm, and takes the mean.

    .. math:: u = \sum_e p_e \min\Big(1, \frac{c}{\|g_e\|}\Big) \, g_e

    Clipping per example, where an environment is one. The norms are over all parameters
    that the transformation sees, and need no gradient to be stacked. The weights
    :math:`p` are `env_weights` with the sum 1, equal unless given. For differential
    privacy add noise to the sum, and leave its accounting to a library that is made for
    it.

    Args:
      max_norm: c, > 0; possibly traced, or a schedule.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `weighting`.

    Raises:
      TypeError: a max_norm that is no real scalar or schedule; (tracing) as
        `weighting`.
      ValueError: a max_norm that is not positive, infinite or NaN; (tracing) as
        `weighting`.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in a present environment: everything is NaN
      an environment of weight 0  as if it were not there, whatever it holds
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.clip_env_norms(max_norm=1.0)
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[30.0, 40.0], [0.0, 0.5]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates.tolist()]
      [0.3, 0.65]

    References:
      Abadi et al., `Deep Learning with Differential Privacy
      <https://arxiv.org/abs/1607.00133>`_, CCS 2016.

      Goodfellow, `Efficient Per-Example Gradient Computations
      <https://arxiv.org/abs/1510.01799>`_, 2015.

    Warning:
      Must come first in an `optax.chain`.
    """
    number = _hyperparams.check_number("max_norm", max_norm)
    if number is not None:
        _validate.finite_at_least("max_norm", number, 0.0, strict=True)

    def weights_of(
        grads: Gradients, given: dict[str, Any], memory: None
    ) -> tuple[jax.Array, None]:
        norms = jnp.sqrt(total_square_norms(grads))
        env_weights = grads.env_weights()
        here = env_weights > 0
        shares = jnp.where(here, env_weights, 0).astype(norms.dtype)
        bound = jnp.asarray(given["max_norm"], norms.dtype)
        factors = jnp.where(norms > bound, bound / jnp.where(norms > 0, norms, 1), 1)
        known = jnp.all(jnp.isfinite(jnp.where(here, norms, 0)))
        weights = shares / jnp.sum(shares) * factors
        return jnp.where(known, weights, jnp.nan), memory

    return build(
        weights_of,
        name="clip_env_norms",
        axis_name=axis_name,
        hyperparams={"max_norm": max_norm},
    )
