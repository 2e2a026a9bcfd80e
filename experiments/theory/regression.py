"""The authors' linear regression: a strong feature per example or a shared weak one.

Example e of four has 3 in feature e, 0 in the three others of the first four, 0.3 in
the fifth, and the label 1. Each example is an environment with the loss
(x . weights - 1)^2 / 2. A third on every strong feature is the patchwork, 10/3 on the
shared one the solution that all environments have in common.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import hardvary
from experiments.theory.config import Method, RegressionConfig

NUM_ENVS = 4
NUM_WEIGHTS = NUM_ENVS + 1


class Start(NamedTuple):
    """Initial weights [5], features [env, 5], and the key of noise at every step."""

    weights: jax.Array
    features: jax.Array
    key: jax.Array


class Trajectory(NamedTuple):
    """weights [seed, steps + 1, 5], losses [seed, steps + 1]; test is NaN without it.

    Losses are means over environments, without decay.
    """

    weights: jax.Array
    train_loss: jax.Array
    test_loss: jax.Array


def make_features(key: jax.Array, noise: float) -> jax.Array:
    """Features [env, 5], with uniform noise on the first four."""
    strong = 3 * jnp.eye(NUM_ENVS)
    strong += jax.random.uniform(key, strong.shape, minval=-noise, maxval=noise)
    return jnp.concatenate([strong, jnp.full((NUM_ENVS, 1), 0.3)], axis=1)


def loss(weights: jax.Array, features: jax.Array) -> jax.Array:
    """Loss of one environment, whose example has `features` [5]."""
    return 0.5 * (features @ weights - 1) ** 2


def make_optimizer(
    config: RegressionConfig, method: Method
) -> optax.GradientTransformationExtraArgs:
    """Aggregation, decay where `config.decay` says after, and descent."""
    aggregator = {
        "erm": lambda: hardvary.and_mask(0.0),
        "and_mask": lambda: hardvary.and_mask(config.threshold),
        "geometric_mean": lambda: hardvary.geometric_mean(config.threshold),
    }[method]()
    after = config.weight_decay if config.decay == "after" else 0.0
    schedule = optax.exponential_decay(
        config.learning_rate, 1, config.learning_rate_decay
    )
    return optax.chain(
        aggregator, optax.add_decayed_weights(after), optax.sgd(schedule)
    )


@functools.partial(jax.jit, static_argnames="config")
def draw_starts(config: RegressionConfig, seeds: jax.Array) -> Start:
    """Starts that the methods share, for `seeds` [seed] rather than `config`'s."""

    def draw(seed: jax.Array) -> Start:
        weight_key, noise_key, step_key = jax.random.split(jax.random.key(seed), 3)
        weights = config.initial_std * jax.random.normal(weight_key, (NUM_WEIGHTS,))
        return Start(weights, make_features(noise_key, config.noise), step_key)

    return jax.vmap(draw)(seeds)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def train(config: RegressionConfig, method: Method, starts: Start) -> Trajectory:
    """Runs of all steps, each in one scan, for all seeds at once.

    Args:
      config: settings.
      method: erm averages.
      starts: leaves [seed, ...].
    """
    tx = make_optimizer(config, method)
    before = config.weight_decay if config.decay == "before" else 0.0

    def regularized(weights: jax.Array, features: jax.Array) -> jax.Array:
        return loss(weights, features) + 0.5 * before * jnp.sum(weights**2)

    gradients = hardvary.per_env_grad(regularized)
    losses = jax.vmap(loss, (None, 0))

    def run(start: Start) -> Trajectory:
        def step(
            carry: tuple[jax.Array, optax.OptState], index: jax.Array
        ) -> tuple[tuple[jax.Array, optax.OptState], jax.Array]:
            weights, state = carry
            features = start.features
            if config.fresh_noise:
                key = jax.random.fold_in(start.key, index)
                features = make_features(key, config.noise)
            stacked = gradients(weights, features[: config.train_envs])
            updates, state = tx.update(stacked, state, weights)
            weights = optax.apply_updates(weights, updates)
            return (weights, state), weights

        carry = start.weights, tx.init(start.weights)
        _, later = jax.lax.scan(step, carry, jnp.arange(config.steps))
        path = jnp.concatenate([start.weights[None], later])
        each = jax.vmap(losses, (0, None))(path, start.features)
        # The mean over no environments is the NaN that stands for no test.
        return Trajectory(
            path,
            each[:, : config.train_envs].mean(axis=1),
            each[:, config.train_envs :].mean(axis=1),
        )

    return jax.vmap(run)(starts)
