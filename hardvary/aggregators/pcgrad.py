"""Gradients projected off those that they conflict with, one after the other."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hardvary import _validate
from hardvary._typing import AxisName
from hardvary.aggregators.weighting import of_gramian


def pcgrad(
    seed: ArrayLike, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Each gradient, projected off the ones that it conflicts with; their sum.

    .. math::
      u = \sum_e h_e, \qquad h_e \leftarrow h_e -
      \frac{\min(\langle h_e, g_f \rangle, 0)}{\|g_f\|^2} \, g_f
      \quad\text{for all } f \ne e \text{ in random order}, \qquad
      h_e = g_e \text{ at first}

    Projecting conflicting gradients ("gradient surgery"). Every gradient has an order
    of its own, drawn anew in every update. With more than two environments conflicts
    may be left. A sum, as in the paper.

    Args:
      seed: an integer >= 0 or a key (`jax.random.key`), possibly traced. Every update
        draws anew, the same on all devices.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `weighting`; the state's `mask_count` counts
      the updates.

    Raises:
      TypeError: a seed that is neither an integer nor a key; (tracing) as `weighting`.
      ValueError: a negative seed; (tracing) as `weighting`.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in a present environment: everything is NaN
      an environment of weight 0  as if it were not there, whatever it holds
      env_weights                 tell who is there; their size changes nothing
      no conflict                 the sum
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.pcgrad(seed=0)
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates.tolist()
      [0.5, 1.5]

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, NeurIPS 2020.

    Warning:
      Must come first in an `optax.chain`.
    """
    _validate.prng_key("seed", seed)

    def rule(
        gramian: jax.Array, shares: jax.Array, size: Any, key: jax.Array
    ) -> jax.Array:
        del size
        here = (shares > 0).astype(gramian.dtype)
        number = len(gramian)
        squares = jnp.diagonal(gramian)
        order = jax.vmap(lambda k: jax.random.permutation(k, number))(
            jax.random.split(key, number)
        )
        rows = jnp.arange(number)

        def off(h: jax.Array, other: jax.Array) -> tuple[jax.Array, None]:
            # <h_e, g_f>, where f is another one for every e.
            product = jnp.sum(h * gramian[other], axis=1)
            square = squares[other]
            counts = (product < 0) & (other != rows) & (square > 0)
            share = jnp.where(counts, product / jnp.where(square > 0, square, 1), 0)
            return h.at[rows, other].add(-share), None

        coefficients, _ = jax.lax.scan(off, jnp.diag(here), order.T)
        # No matrix product: on accelerators it would round to fewer digits.
        return jnp.sum(here[:, None] * coefficients, axis=0)

    return of_gramian(rule, name="pcgrad", axis_name=axis_name, seed=seed)
