"""A step that lowers the mean loss and makes relative losses equal."""

from typing import Any

import jax.numpy as jnp
import optax

from hardvary import _hyperparams, _validate
from hardvary._env_grads.disagreement import directions, scaled
from hardvary._env_grads.forms import Gradients
from hardvary._typing import AxisName, ScalarOrSchedule
from hardvary.aggregators.removal import LOSSES, in_own_units, without
from hardvary.aggregators.weighting import build

_BASELINES = {
    "baseline_losses": "the losses [env] of the best constant prediction in each "
    "environment"
}


def relative_gauss_newton(
    strength: ScalarOrSchedule = 30.0,
    *,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A Gauss-Newton step on the mean and the variance of relative losses.

    .. math::
      u = \Big(I + \lambda \sum_e p_e d_e d_e^\top\Big)^{-1}
      \sum_e p_e (1 + \lambda r_e) \, h_e, \qquad
      h_e = \frac{g_e}{L^0_e}, \quad d_e = h_e - \bar h, \quad
      r_e = \frac{L_e}{L^0_e} - \sum_f p_f \frac{L_f}{L^0_f}

    The gradient of the mean of relative losses plus :math:`\lambda / 2` times their
    variance, V-REx on another scale, preconditioned with the curvature that the
    variance has: along a direction in which environments differ with variance
    :math:`\mu` the step is divided by :math:`1 + \lambda \mu`. The first of the three
    rules here that look at losses, not at signs: it moves what environments disagree
    on until their relative losses are equal. It assumes that the solution which is the
    same everywhere explains the same share of :math:`L^0_e` everywhere. Depends on no
    basis. :math:`\lambda = \text{strength} / \sum_i \mu_i`.

    Args:
      strength: >= 0; 0 is the mean of relative gradients, 10 to 100 is what linear
        problems want. Possibly traced, or a schedule.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `weighting`, whose `update` takes
      `env_losses` and `baseline_losses`, `[env]` and positive: the losses, and those of
      the best constant prediction in each environment (the variance of the targets for
      squared errors, the entropy of the labels for a cross-entropy).

    Raises:
      TypeError: a strength that is no real scalar or schedule; (tracing) as
        `weighting`, losses that are missing or not real.
      ValueError: a negative, infinite or NaN strength; (tracing) as `weighting`, losses
        of another shape.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in a present environment or its losses: everything is
                                  NaN
      an environment of weight 0  as if it were not there, whatever it holds
      losses that are not         NaN: a baseline has to be positive, too
      positive
      gradients that are equal    the mean of relative gradients
      gradients nearly equal,     a step as long as strength * difference / spread, at
      losses that differ          most 1 / eps times the mean: clip it, inside the
                                  whitening or behind
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.relative_gauss_newton(strength=9.0)
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 2.0], [1.0, 4.0]])  # [env, 2]
      >>> ones = jnp.ones(2)
      >>> updates, state = tx.update(
      ...     grads, tx.init(params), params, env_losses=ones, baseline_losses=ones
      ... )
      >>> [round(x, 4) for x in updates.tolist()]
      [1.0, 0.3]

    Warning:
      Must come first in an `optax.chain`.
    """
    number = _hyperparams.check_number("strength", strength)
    if number is not None:
        _validate.finite_at_least("strength", number, 0.0)

    def weights_of(
        grads: Gradients, given: dict[str, Any], memory: None
    ) -> tuple[Any, ...]:
        here = grads.env_weights() > 0
        losses, baselines = given["env_losses"], given["baseline_losses"]
        fine = ((losses >= 0) & (baselines > 0)) | ~here
        baselines = jnp.where(fine, baselines, jnp.nan)
        relative = losses / baselines
        inner = scaled(grads, 1 / baselines)
        found, shares = directions(inner.gramian, inner.shares), inner.shares
        relative = jnp.where(shares > 0, relative, 0)
        known = inner.known & jnp.all(jnp.isfinite(relative))
        residuals = jnp.where(shares > 0, relative - jnp.sum(shares * relative), 0)
        variance = jnp.sum(found.spectrum)
        safe = jnp.where(variance > 0, variance, 1)
        strength = jnp.asarray(given["strength"]).astype(safe.dtype)
        strength = jnp.where(variance > 0, strength, 0)
        # In the gradients' own units: what weighs losses against gradients has one.
        factor = strength / safe / inner.length / inner.length
        # Where gradients vanish and losses differ it has no bound; beyond this one the
        # mean is rounding next to it.
        largest = jnp.max(jnp.abs(residuals))
        bound = 1 / (jnp.finfo(safe.dtype).eps * jnp.where(largest > 0, largest, 1))
        factor = jnp.where(largest > 0, jnp.minimum(factor, bound), 0)
        pull = factor * shares * residuals
        components = found.mean + jnp.sum(pull[:, None] * found.deviations, axis=0)
        damped = strength * found.spectrum / safe
        weights = without(found, shares + pull, components * damped / (1 + damped))
        result = in_own_units(weights, inner)
        return jnp.where(known, result, jnp.nan), memory

    return build(
        weights_of,
        name="relative_gauss_newton",
        axis_name=axis_name,
        hyperparams={"strength": strength},
        asks=LOSSES | _BASELINES,
    )
