"""What rules share that take directions of disagreement out of the mean."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary._env_grads.disagreement import (
    Directions,
    Scaled,
    directions,
    of_logarithms,
    scaled,
)
from hardvary._env_grads.forms import Gradients
from hardvary._typing import AxisName
from hardvary.aggregators.weighting import build

LOSSES = {"env_losses": "the losses [env] that value_and_env_grads returned"}


def of_directions(
    kept: Callable[..., jax.Array],
    *,
    name: str,
    log_losses: bool,
    axis_name: AxisName | None,
    hyperparams: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:
    """The mean without its components along some directions of disagreement.

    Args:
      kept: `(directions, shares, **hyperparams) -> [direction]`, boolean: whether the
        component stays.
      name: for messages.
      log_losses: whether the gradients are first divided by their losses.
      axis_name: see `and_mask`.
      hyperparams: see `weighting`, checked.
    """
    if not isinstance(log_losses, bool):
        raise TypeError(f"log_losses must be True or False, got {log_losses!r}")

    def weights_of(
        grads: Gradients, given: dict[str, Any], memory: None
    ) -> tuple[Any, ...]:
        losses = given.pop("env_losses", None)
        factors = None if losses is None else of_logarithms(grads, losses)
        inner = scaled(grads, factors)
        found = directions(inner.gramian, inner.shares)
        stays = kept(found, inner.shares, **given)
        there = found.spectrum > 0
        weights = without(found, inner.shares, jnp.where(stays, 0, found.mean))
        fraction = jnp.sum(stays & there) / jnp.maximum(jnp.sum(there), 1)
        fraction = jnp.where(jnp.any(there), fraction, 1)
        return in_own_units(weights, inner), memory, fraction

    return build(
        weights_of,
        name=name,
        axis_name=axis_name,
        hyperparams=hyperparams,
        asks=LOSSES if log_losses else {},
    )


def without(found: Directions, weights: jax.Array, components: jax.Array) -> jax.Array:
    """`[env]`, weights of a sum of gradients less `components: [direction]` of it."""
    return weights - jnp.sum(found.coefficients * components[None, :], axis=1)


def in_own_units(weights: jax.Array, inner: Scaled) -> jax.Array:
    """Weights of the gradients as they are, from those of the scaled ones."""
    result = weights * inner.scale * inner.length
    return jnp.where(inner.known, result, jnp.nan)
