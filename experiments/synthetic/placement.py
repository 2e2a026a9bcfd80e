"""Where in the chain a mask acts: before Adam's moments, between them, or last.

Roulet and Agarwala (arXiv 2510.00236) ask it of the sign of single examples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hardvary


class MaskUpdateState(NamedTuple):
    """State of `mask_update`.

    Attributes:
      kept_fraction: float32 scalar, share of all components that passed last; 0 before.
      inner_state: of the transformation whose update is masked.
    """

    kept_fraction: jax.Array
    inner_state: optax.OptState


def per_env(
    inner: optax.GradientTransformation, num_envs: int
) -> optax.GradientTransformation:
    """`inner` for each environment: gradients and updates are `[env, *param.shape]`.

    What it keeps of a parameter it keeps `num_envs` times.

    Args:
      inner: works component by component, and does not look at parameters.
      num_envs: number of environments.
    """

    def init(params: Any) -> optax.OptState:
        return inner.init(
            jax.tree.map(lambda p: jnp.zeros((num_envs, *p.shape), p.dtype), params)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return inner.update(updates, state)

    return optax.GradientTransformation(init, update)


def mask_update(
    inner: optax.GradientTransformation, threshold: float
) -> optax.GradientTransformation:
    """What `inner` makes of the mean gradient, where the gradients' signs agree.

    First in a chain, for gradients in any form that has signs.

    Args:
      inner: sees the mean alone.
      threshold: as for `hardvary.and_mask`.
    """
    mean = hardvary.and_mask(threshold=0.0)

    def init(params: Any) -> MaskUpdateState:
        return MaskUpdateState(jnp.zeros(()), inner.init(params))

    def update(
        grads: Any, state: MaskUpdateState, params: Any = None
    ) -> tuple[Any, MaskUpdateState]:
        passed = hardvary.mask(grads, threshold)
        means, _ = mean.update(grads, mean.init(params), params)
        updates, inner_state = inner.update(means, state.inner_state, params)
        kept = optax.tree.sum(passed) / optax.tree.size(passed)
        masked = jax.tree.map(lambda p, u: jnp.where(p, u, 0), passed, updates)
        return masked, MaskUpdateState(kept, inner_state)

    return optax.GradientTransformation(init, update)
