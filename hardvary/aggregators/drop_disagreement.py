"""The mean without the directions in which environments differ most."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hardvary import _hyperparams
from hardvary._env_grads.disagreement import Directions
from hardvary._typing import AxisName, ScalarOrSchedule
from hardvary.aggregators.removal import of_directions


def drop_disagreement(
    energy: ScalarOrSchedule = 0.99,
    *,
    log_losses: bool = True,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The mean gradient, without the directions that carry most of the disagreement.

    .. math::
      u = \bar g - \sum_{i \le k} \langle \bar g, v_i \rangle \, v_i, \qquad
      k = \min\Big\{k : \sum_{i \le k} \mu_i \ge \gamma \sum_i \mu_i\Big\}

    with the principal axes :math:`v_i` of the gradients around their mean, and the
    variances :math:`\mu_i` along them, falling. As `spectral_and_mask`, but whoever
    disagrees about a direction, even in size alone, takes it away: no chance unanimity
    gets through. What is left at `energy = 1` is what all environments have in common,
    as far as their dtype can tell.

    Args:
      energy: :math:`\gamma` in [0, 1], share of the variance that is taken out; 0 is
        the mean. Possibly traced, or a schedule.
      log_losses: see `spectral_and_mask`.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `spectral_and_mask`.

    Raises:
      TypeError: an energy that is no real scalar or schedule, a log_losses that is no
        bool; (tracing) as `spectral_and_mask`.
      ValueError: an energy outside [0, 1]; (tracing) as `spectral_and_mask`.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in a present environment or its loss: everything is
                                  NaN
      a negative loss             NaN: it has no logarithm
      an environment of weight 0  as if it were not there, whatever it holds
      gradients that are equal    the mean: there is no disagreement
      one environment             its gradient
      a loss of 0                 counts as the rounding of the largest loss
      axes in rounding            with less than sqrt(env * eps) of the longest
                                  gradient, 1e-3 of it in float32, are not seen: a
                                  layer with far smaller gradients wants a chain of its
                                  own (`optax.partition`)
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.drop_disagreement(log_losses=False)
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 2.0], [1.0, 3.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [abs(round(x, 4)) for x in updates.tolist()]
      [1.0, 0.0]

    Warning:
      Must come first in an `optax.chain`.
    """
    what = "the variance between environments that is taken out"
    _hyperparams.check_share("energy", energy, what)

    def kept(found: Directions, shares: jax.Array, energy: ArrayLike) -> jax.Array:
        del shares
        total = jnp.cumsum(found.spectrum)
        before = total - found.spectrum
        # Up to the last one at energy 1, however their sum is rounded.
        whole = jnp.asarray(energy).astype(total.dtype) >= 1
        return ~whole & (before >= jnp.asarray(energy).astype(total.dtype) * total[-1])

    return of_directions(
        kept,
        name="drop_disagreement",
        log_losses=log_losses,
        axis_name=axis_name,
        hyperparams={"energy": energy},
    )
