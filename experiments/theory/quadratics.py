"""Pairs of quadratic landscapes (paper, section 2, figures 3, 11 and 12).

Landscapes are Hessians [env, 2, 2], A's and B's, of losses x^T H x / 2.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hardvary
from experiments.theory.landscapes import rotated


class Scores(NamedTuple):
    """How inconsistent a pair is, and two bounds on that.

    `paper_bound` is proposition 3 to the letter, which the inconsistency may exceed.
    """

    inconsistency: float
    bound: float
    paper_bound: float


@jax.jit
def geometric_mean(pair: jax.Array) -> jax.Array:
    """Geometric mean [n, n] of two Hessians [2, n, n]."""
    return hardvary.consistency.karcher_mean(pair)


def scores(pair: jax.Array, epsilon: float) -> Scores:
    """Scores of two Hessians [2, n, n]."""
    return Scores(*(float(score) for score in _scores(pair, epsilon)))


@jax.jit
def _scores(pair: jax.Array, epsilon: float) -> tuple[jax.Array, ...]:
    consistency = hardvary.consistency
    arithmetic = jnp.linalg.det(pair.mean(axis=0))
    ratio = arithmetic / jnp.linalg.det(geometric_mean(pair))
    return (
        consistency.quadratic_inconsistency(pair, epsilon),
        consistency.determinant_bound(pair, epsilon),
        2 * epsilon * ratio**2,
    )


def turned_pair(
    first: tuple[float, float], second: tuple[float, float], angle: float
) -> jax.Array:
    """Hessians [2, 2, 2] with given eigenvalues.

    Args:
      first: eigenvalues of A, along the axes.
      second: eigenvalues of B, along axes that are turned.
      angle: by how many degrees, counter-clockwise.
    """
    return jnp.stack([rotated(*first, 0.0), rotated(*second, angle)])


def equal_mean_pair(ratio: float, axes: Literal[1, 2]) -> jax.Array:
    """Hessians [2, 2, 2] on the same axes, whose arithmetic mean is the identity.

    Args:
      ratio: curvature of A over that of B along the first axis.
      axes: 1 for equal curvatures along the second axis, 2 for the reverse ratio.
    """
    high, low = 2 * ratio / (ratio + 1), 2 / (ratio + 1)
    second = (low, high) if axes == 2 else (1.0, 1.0)
    return jnp.stack(
        [jnp.diag(jnp.array(d)) for d in ((high, second[0]), (low, second[1]))]
    )


def level_set(hessian: np.ndarray, level: float, points: int = 400) -> np.ndarray:
    """Points [2, point] on the ellipse x^T H x / 2 = level, closed."""
    angles = np.linspace(0, 2 * np.pi, points)
    circle = math.sqrt(2 * level) * np.stack([np.cos(angles), np.sin(angles)])
    return np.linalg.solve(np.linalg.cholesky(hessian).T, circle)
