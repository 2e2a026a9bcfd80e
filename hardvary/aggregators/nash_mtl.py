"""The bargain that environments strike by Nash."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary._typing import AxisName
from hardvary.aggregators.quadratic import balanced, cosines
from hardvary.aggregators.weighting import of_gramian


def nash_mtl(
    *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The update on which environments agree in Nash's bargaining game.

    .. math:: u = \sum_e w_e g_e, \qquad \langle u, g_e \rangle = 1 / w_e

    It maximizes the product of what environments gain, :math:`\langle u, g_e \rangle`,
    among the updates of its length: the scale of a loss changes nothing. The length is
    :math:`\sqrt d` for :math:`d` environments whatever the gradients are, so a learning
    rate is a step length: expect a smaller one, or `optax.clip_by_global_norm` behind.
    Solved exactly by Newton's method in every update, where the paper's code solves a
    sequence of approximations and clips its result.

    Args:
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `weighting`.

    Raises:
      TypeError: (tracing) as `weighting`.
      ValueError: (tracing) as `weighting`.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in a present environment: everything is NaN
      an environment of weight 0  as if it were not there, whatever it holds
      env_weights                 tell who is there; their size changes nothing
      a zero gradient             left out
      no direction helps all      large weights and an update that is rounding
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.nash_mtl()
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[100.0, 0.0], [0.0, 0.1]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates.tolist()]
      [1.0, 1.0]

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, ICML 2022.

    Warning:
      Must come first in an `optax.chain`.
    """

    def rule(gramian: jax.Array, shares: jax.Array, size: Any) -> jax.Array:
        del shares
        matrix, lengths = cosines(gramian)
        inverse = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
        return balanced(matrix, 1.0) * inverse / jnp.sqrt(size)

    return of_gramian(rule, name="nash_mtl", axis_name=axis_name)
