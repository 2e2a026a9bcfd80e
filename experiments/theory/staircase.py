"""Two sigmoids that fit a staircase as a patchwork (paper, appendix A.1, figure 10).

Environment A sees the left half of a staircase with two steps, B the right half. At
theta* each step has a sigmoid of its own, so the second one's height, theta6, is for B
alone to care about.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

STAR = (100.0, -45.0, 100.0, -75.0, 1.0, 1.0)
RUINED_HEIGHT = -0.5
_KNOTS = (0.0, 0.4, 0.5, 0.7, 0.8, 1.0)
_HEIGHTS = (0.0, 0.0, 1.0, 1.0, 2.0, 2.0)


class Examples(NamedTuple):
    """inputs and targets, both [example], with [env, ...] in front for several."""

    inputs: jax.Array
    targets: jax.Array


def target(inputs: jax.Array) -> jax.Array:
    """The staircase: 0, a ramp to 1 at 0.4 to 0.5, 1, a ramp to 2 at 0.7 to 0.8, 2."""
    return jnp.interp(inputs, jnp.asarray(_KNOTS), jnp.asarray(_HEIGHTS))


def model(params: jax.Array, inputs: jax.Array) -> jax.Array:
    """theta5 sigmoid(theta1 x + theta2) + theta6 sigmoid(theta3 x + theta4).

    Args:
      params: theta, [6].
      inputs: x, [example].
    """
    first = params[4] * jax.nn.sigmoid(params[0] * inputs + params[1])
    return first + params[5] * jax.nn.sigmoid(params[2] * inputs + params[3])


def make_environments(points: int) -> Examples:
    """A in [0, 0.5] and B in [0.5, 1], leaves [2, points], equally spaced."""
    inputs = jnp.stack([jnp.linspace(0.0, 0.5, points), jnp.linspace(0.5, 1.0, points)])
    return Examples(inputs, target(inputs))


def loss(params: jax.Array, env: Examples) -> jax.Array:
    """Mean squared error of one environment, leaves [example]."""
    return jnp.mean((model(params, env.inputs) - env.targets) ** 2)


def with_height(height: jax.Array | float) -> jax.Array:
    """theta* with another theta6."""
    return jnp.asarray(STAR).at[5].set(height)


def losses_along(envs: Examples, heights: jax.Array) -> jax.Array:
    """Losses [env, height] at theta* with each theta6 of `heights`."""
    by_env = jax.vmap(loss, (None, 0))
    return jax.vmap(lambda h: by_env(with_height(h), envs), out_axes=1)(heights)
