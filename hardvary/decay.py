"""The L1 counterpart of `optax.add_decayed_weights`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary import _validate

PyTree = Any


def add_l1_decay(
    strength: Any, mask: PyTree | None = None
) -> optax.GradientTransformation:
    r"""Adds the gradient of an L1 penalty, `strength * sign(param)`.

    .. math:: u \leftarrow u + \lambda \operatorname{sign}(\theta)

    Behind an aggregator and before an optimizer it acts like an L1 term in the loss
    that no environment votes on; behind the optimizer it is a decoupled pull of every
    weight towards 0, masked ones included (paper, section 3: L1 or L2 help to suppress
    units that start out tuned to shortcuts). `sign(0) = 0`.

    Args:
      strength: :math:`\lambda` >= 0; may be traced.
      mask: tree of booleans, a prefix of params, or a function from params to one;
        True where the decay applies. None decays everything.

    Returns:
      An `optax.GradientTransformation` whose `update` needs `params`.

    Raises:
      TypeError: a strength that is no real scalar.
      ValueError: strength < 0; (tracing) `update` without params.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.add_l1_decay(0.5)
      >>> params = jnp.array([2.0, 0.0, -3.0])
      >>> updates, _ = tx.update(jnp.zeros(3), tx.init(params), params)
      >>> updates.tolist()
      [0.5, 0.0, -0.5]
    """
    _validate.at_least("strength", strength, 0.0)

    def add(updates: PyTree, params: PyTree | None) -> PyTree:
        if params is None:
            raise ValueError(
                "add_l1_decay needs the parameters: call update(updates, state, params)"
            )
        return jax.tree.map(
            lambda u, p: (
                u + jnp.asarray(strength).astype(u.dtype) * jnp.sign(p).astype(u.dtype)
            ),
            updates,
            params,
        )

    transform = optax.with_extra_args_support(optax.stateless(add))
    return transform if mask is None else optax.masked(transform, mask)
