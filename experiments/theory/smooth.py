"""Masked gradient descent on a smooth problem (paper, proposition 1).

The losses are log cosh of residuals of a linear model: smooth, not quadratic, and with
a curvature of at most 1 in the prediction, so that the Lipschitz constant of the
gradient is known.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

import hardvary
from experiments.theory.config import DescentConfig


class Problem(NamedTuple):
    """features [env, example, dim], targets [env, example]."""

    features: jax.Array
    targets: jax.Array


class Descent(NamedTuple):
    """At the parameters before each step: [step].

    `loss` is the mean over environments, `masked` the squared norm of its masked
    gradient, `kept` the share of components that passed.
    """

    loss: jax.Array
    masked: jax.Array
    kept: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def make_problem(config: DescentConfig, key: jax.Array) -> Problem:
    """Gaussian features; targets of a common solution plus one of each environment."""
    feature_key, solution_key = jax.random.split(key)
    shape = config.num_envs, config.examples_per_env, config.dims
    features = jax.random.normal(feature_key, shape)
    drawn = jax.random.normal(solution_key, (config.num_envs + 1, config.dims))
    solutions = drawn[0] + config.shift_std * drawn[1:]
    return Problem(features, jnp.einsum("ejd,ed->ej", features, solutions))


def loss(params: jax.Array, env: Problem) -> jax.Array:
    """Mean loss of one environment: features [example, dim], targets [example]."""
    residuals = env.features @ params - env.targets
    # log cosh, without overflow.
    return jnp.mean(jnp.logaddexp(residuals, -residuals) - jnp.log(2.0))


def lipschitz_constant(problem: Problem) -> jax.Array:
    """A Lipschitz constant of the mean loss's gradient.

    The largest eigenvalue of the mean outer product of features: log cosh has a second
    derivative of at most 1.
    """
    features = problem.features.reshape(-1, problem.features.shape[-1])
    return jnp.linalg.eigvalsh(features.T @ features / len(features))[-1]


@functools.partial(jax.jit, static_argnames="steps")
def descend(
    problem: Problem, threshold: float, learning_rate: float, steps: int
) -> Descent:
    """Masked gradient descent from 0.

    Args:
      problem: all environments.
      threshold: of the AND-mask; 0 is plain descent.
      learning_rate: step size.
      steps: number of steps.
    """
    gradients = hardvary.value_and_per_env_grad(loss)
    mask = hardvary.and_mask(threshold)

    def step(params: jax.Array, _: None) -> tuple[jax.Array, Descent]:
        losses, stacked = gradients(params, problem)
        masked, state = mask.update(stacked, mask.init(params), params)
        seen = Descent(losses.mean(), jnp.sum(masked**2), state.kept_fraction)
        return params - learning_rate * masked, seen

    start = jnp.zeros(problem.features.shape[-1])
    return jax.lax.scan(step, start, length=steps)[1]


def rate_bound(
    initial_loss: jax.Array, learning_rate: float, steps: jax.Array
) -> jax.Array:
    """2 L(start) / (step size * steps), above the least squared norm within them."""
    return 2 * initial_loss / (learning_rate * steps)
