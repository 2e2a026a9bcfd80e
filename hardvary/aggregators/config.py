"""One direction at the same angle to all gradients, conflict-free."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary._typing import AxisName
from hardvary.aggregators.quadratic import cosines, pseudo_inverse_times
from hardvary.aggregators.weighting import of_gramian


def config(
    *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The direction at the same angle to every gradient, as long as all project on it.

    .. math::
      u = \Big(\sum_e \langle g_e, v \rangle\Big) v, \qquad
      v = \frac{U^+ 1}{\|U^+ 1\|}, \qquad U_e = g_e / \|g_e\|

    Conflict-free inverse gradients. Where the gradients are linearly independent
    :math:`\langle v, U_e \rangle` is positive and the same for all. A sum over
    environments, as in the paper: compare its length with `d` means.

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
      opposed gradients           0
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.config()
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[3.0, 0.0], [0.0, 1.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates.tolist()]
      [2.0, 2.0]

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural
      Networks <https://arxiv.org/abs/2408.11104>`_, ICLR 2025.

    Warning:
      Must come first in an `optax.chain`.
    """

    def rule(gramian: jax.Array, shares: jax.Array, size: Any) -> jax.Array:
        del shares, size
        matrix, lengths = cosines(gramian)
        there = (lengths > 0).astype(gramian.dtype)
        direction = pseudo_inverse_times(matrix, there)
        image = jnp.matmul(matrix, direction, precision=jax.lax.Precision.HIGHEST)
        # No matrix products: on accelerators they would round to fewer digits.
        square = jnp.sum(direction * image)
        known = square > len(lengths) * jnp.finfo(gramian.dtype).eps
        total = jnp.sum(lengths * image)
        factor = jnp.where(known, total / jnp.where(known, square, 1), 0)
        return jnp.where(
            lengths > 0, factor * direction / jnp.where(lengths > 0, lengths, 1), 0
        )

    return of_gramian(rule, name="config", axis_name=axis_name)
