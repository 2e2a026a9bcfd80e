"""The AND-mask along the directions in which environments disagree."""

import jax
import optax
from jax.typing import ArrayLike

from hardvary import _hyperparams
from hardvary._env_grads.agreement import reaches
from hardvary._env_grads.disagreement import Directions, sign_sums
from hardvary._typing import AxisName, ScalarOrSchedule
from hardvary.aggregators.removal import of_directions


def spectral_and_mask(
    threshold: ScalarOrSchedule = 1.0,
    *,
    log_losses: bool = True,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The mean gradient, without the directions whose sign environments dispute.

    .. math::
      u = \bar g - \sum_{i:\, |\sum_e p_e \operatorname{sign}\langle g_e, v_i\rangle|
      < \tau} \langle \bar g, v_i \rangle \, v_i, \qquad
      \bar g = \sum_e p_e g_e

    where :math:`v_i` are the principal axes of the gradients around their mean, at most
    env - 1, and all gradients are those of the losses' logarithms: divided by their
    losses. An AND-mask that does not depend on the basis: a rotation of all parameters
    rotates the update, where `and_mask` compares signs coordinate by coordinate. Around
    the mean, because in the basis of second moments no more than one direction can be
    unanimous. The weights :math:`p` are `env_weights` with the sum 1, equal unless
    given.

    What is chosen is a basis of the parameters that the data pick, so it wants inputs
    without a scale of their own (`whiten_inputs`), and an optimizer that does not look
    at single weights behind it: momentum, not Adam.

    Args:
      threshold: share of environments, in [0, 1], that have to have the same sign
        along a direction; possibly traced, or a schedule. Signs drawn at random are
        unanimous along one direction in 2**(env - 1), and reach a weaker threshold
        far more often.
      log_losses: whether `update` takes `env_losses` and divides gradients by them;
        without, the environment with the largest residuals decides.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `weighting`, whose `update` takes
      `env_losses`, `[env]` and positive. `kept_fraction` is the share of directions
      that stay.

    Raises:
      TypeError: a threshold that is no real scalar or schedule, a log_losses that is
        no bool; (tracing) as `weighting`, losses that are missing or not real.
      ValueError: a threshold outside [0, 1]; (tracing) as `weighting`, losses of
        another shape.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in a present environment or its loss: everything is
                                  NaN
      a negative loss             NaN: it has no logarithm
      an environment of weight 0  as if it were not there, whatever it holds
      gradients that are equal    the mean: there is no disagreement
      one environment             its gradient
      a zero gradient             votes for nothing: at threshold 1 every direction goes
      a loss of 0                 counts as the rounding of the largest loss
      axes in rounding            with less than sqrt(env * eps) of the longest
                                  gradient, 1e-3 of it in float32, are not seen: a
                                  layer with far smaller gradients wants a chain of its
                                  own (`optax.partition`)
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.spectral_and_mask(log_losses=False)
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 2.0], [1.0, -3.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [abs(round(x, 4)) for x in updates.tolist()]
      [1.0, 0.0]

    Warning:
      Must come first in an `optax.chain`.
    """
    number = _hyperparams.check_number("threshold", threshold)
    if number is not None:
        _hyperparams.check_unit_interval("threshold", number)

    def kept(found: Directions, shares: jax.Array, threshold: ArrayLike) -> jax.Array:
        return reaches(*sign_sums(found, shares), threshold)

    return of_directions(
        kept,
        name="spectral_and_mask",
        log_losses=log_losses,
        axis_name=axis_name,
        hyperparams={"threshold": threshold},
    )
