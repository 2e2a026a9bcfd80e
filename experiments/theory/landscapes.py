"""A loss with a consistent and a patchwork minimum (paper, section 1 and figure 1).

Both environments have loss 0 at both minima. At the consistent one their Hessians are
equal, at the patchwork they are narrow valleys that cross. The averaged Hessian is the
same at both, so the average tells nothing apart there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hardvary

CONSISTENT = (-1.0, 0.6)
PATCHWORK = (1.0, -0.6)
EXTENT = (2.4, 2.0)  # of what the figure shows, from 0 to either side
MINIMA = {"consistent": CONSISTENT, "patchwork": PATCHWORK}
REACHED = 0.05


class Environments(NamedTuple):
    """The differences between environments, leaves [env, 2, 2]; [2, 2] for one of them.

    The Hessians of the loss at the two minima, symmetric and positive definite.
    """

    consistent: jax.Array
    patchwork: jax.Array


class Paths(NamedTuple):
    """Descents from several starts: params [start, steps + 1, 2], kept [start, steps].

    `kept` is the share of components that passed the mask.
    """

    params: jax.Array
    kept: jax.Array


def make_environments(sharpness: float, angle: float) -> Environments:
    """Environments A and B.

    Both valleys of the patchwork lie in the first quadrant as seen from it. With
    valleys along the axes, all signs of the two gradients would agree around the
    patchwork, and no mask could tell it from a consistent minimum.

    Args:
      sharpness: curvature across a valley; along it, it is 1.
      angle: degrees from the first axis to A's valley and from the second to B's.
    """
    valleys = jnp.stack(
        [rotated(1.0, sharpness, degrees) for degrees in (angle, 90 - angle)]
    )
    mean = valleys.mean(axis=0)
    return Environments(jnp.stack([mean, mean]), valleys)


def rotated(first: float, second: float, degrees: float) -> jax.Array:
    """The symmetric matrix [2, 2] with these eigenvalues.

    Args:
      first: eigenvalue along the direction at `degrees` to the first axis.
      second: eigenvalue across it.
      degrees: angle, counter-clockwise.
    """
    radians = jnp.deg2rad(degrees)
    along = jnp.stack([jnp.cos(radians), jnp.sin(radians)])
    across = jnp.stack([-jnp.sin(radians), jnp.cos(radians)])
    return first * jnp.outer(along, along) + second * jnp.outer(across, across)


def loss(params: jax.Array, env: Environments) -> jax.Array:
    """The loss of one environment: a scalar, 0 at both minima and positive elsewhere.

    q r / (q + r) of the quadratic losses q and r around the minima: near the zero of
    either it is that one, up to fourth order.

    Args:
      params: [2].
      env: one environment, leaves [2, 2].
    """
    from_consistent = params - jnp.asarray(CONSISTENT)
    from_patchwork = params - jnp.asarray(PATCHWORK)
    q = 0.5 * from_consistent @ env.consistent @ from_consistent
    r = 0.5 * from_patchwork @ env.patchwork @ from_patchwork
    return q * r / (q + r)


def start_grid(per_side: int) -> jax.Array:
    """Starting points [per_side**2, 2], spread over most of what is shown."""
    x, y = (jnp.linspace(-0.85 * end, 0.85 * end, per_side) for end in EXTENT)
    return jnp.stack(jnp.meshgrid(x, y), axis=-1).reshape(-1, 2)


@functools.partial(jax.jit, static_argnames="steps")
def descend(
    envs: Environments,
    starts: jax.Array,
    threshold: float,
    learning_rate: float,
    steps: int,
) -> Paths:
    """AND-masked gradient descent; threshold 0 is descent on the average.

    Args:
      envs: leaves [env, 2, 2].
      starts: [start, 2].
      threshold: agreement needed to pass the mask.
      learning_rate: step size.
      steps: number of steps.
    """
    gradients = hardvary.per_env_grad(loss)
    tx = optax.chain(hardvary.and_mask(threshold), optax.sgd(learning_rate))

    def step(
        carry: tuple[jax.Array, optax.OptState], _: None
    ) -> tuple[tuple[jax.Array, optax.OptState], tuple[jax.Array, jax.Array]]:
        params, state = carry
        updates, state = tx.update(gradients(params, envs), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, optax.tree.get(state, "kept_fraction"))

    def from_start(start: jax.Array) -> Paths:
        _, (params, kept) = jax.lax.scan(step, (start, tx.init(start)), length=steps)
        return Paths(jnp.concatenate([start[None], params]), kept)

    return jax.vmap(from_start)(starts)


def reached(params: np.ndarray | jax.Array) -> str:
    """The minimum that `params` [2] lie next to, or "neither"."""
    for name, minimum in MINIMA.items():
        if np.linalg.norm(np.asarray(params) - np.array(minimum)) < REACHED:
            return name
    return "neither"
