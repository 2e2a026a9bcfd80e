"""Proximal policy optimisation: advantages, loss and optimizer, as pure functions.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; advantages by Schulman et al.
2016, https://arxiv.org/abs/1506.02438.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.coinrun.expert.config import PpoConfig
from experiments.coinrun.expert.policy import Output

# Of JAX, or of NumPy before it.
Array = jax.Array | np.ndarray


class Samples(NamedTuple):
    """Samples to learn from, besides the frames; all arrays are [n].

    `actions` int32 that were taken; `log_probs` and `values` float32 by the network
    that took them; `advantages` float32, normalised; `returns` float32.
    """

    actions: Array
    log_probs: Array
    values: Array
    advantages: Array
    returns: Array


class Terms(NamedTuple):
    """Parts of the loss and what to watch, scalars: means over the samples."""

    policy_loss: jax.Array
    value_loss: jax.Array
    entropy: jax.Array
    kl: jax.Array
    clip_fraction: jax.Array


def advantages_and_returns(
    rewards: jax.Array,
    done: jax.Array,
    values: jax.Array,
    last_values: jax.Array,
    gamma: float,
    gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates and the returns that they imply.

    `advantage[t] = delta[t] + gamma * gae_lambda * (1 - done[t]) * advantage[t + 1]`
    with `delta[t] = reward[t] + gamma * (1 - done[t]) * value[t + 1] - value[t]`;
    a return is advantage plus value.

    Args:
      rewards: float32 [step, env], for the action of each step.
      done: bool [step, env], whether that action done the episode.
      values: float32 [step, env], estimated before it.
      last_values: float32 [env], after the last step.
      gamma: worth of a reward one step later.
      gae_lambda: lambda.

    Returns:
      Two arrays [step, env].
    """
    after = jnp.concatenate([values[1:], last_values[None]])
    going = 1 - done.astype(jnp.float32)
    deltas = rewards + gamma * going * after - values

    def back(
        later: jax.Array, step: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        delta, going = step
        advantage = delta + gamma * gae_lambda * going * later
        return advantage, advantage

    start = jnp.zeros_like(last_values)
    _, advantages = jax.lax.scan(back, start, (deltas, going), reverse=True)
    return advantages, advantages + values


def normalize(advantages: jax.Array) -> jax.Array:
    """Advantages with mean 0 and standard deviation 1; zeros where all are the same."""
    centred = advantages - advantages.mean()
    std = jnp.sqrt(jnp.mean(centred**2))
    return centred / (std + 1e-8)


def loss(
    output: Output, samples: Samples, config: PpoConfig
) -> tuple[jax.Array, Terms]:
    """PPO's loss: clipped policy and value losses, less the entropy bonus.

    Per sample, with ratio r of the new to the old probability of the action:
    `max(-A r, -A clip(r, 1 - c, 1 + c))` for the policy and
    `max((v - R)^2, (v_old + clip(v - v_old, -c, c) - R)^2) / 2` for the value.

    Args:
      output: of the network that learns, for the samples' frames.
      samples: what it learns from.
      config: weights and clips.

    Returns:
      The loss and its terms. `kl` estimates KL(old, new) by `r - 1 - log r`
      (Schulman 2020, http://joschu.net/blog/kl-approx.html).
    """
    clip_eps = config.clip_eps
    log_probs = jax.nn.log_softmax(output.logits)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
    taken = jnp.take_along_axis(log_probs, samples.actions[:, None], 1)[:, 0]
    log_ratio = taken - samples.log_probs
    ratio = jnp.exp(log_ratio)
    policy_loss = jnp.maximum(
        -samples.advantages * ratio,
        -samples.advantages * jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps),
    )
    moved = jnp.clip(output.values - samples.values, -clip_eps, clip_eps)
    value_loss = 0.5 * jnp.maximum(
        (output.values - samples.returns) ** 2,
        (samples.values + moved - samples.returns) ** 2,
    )
    terms = Terms(
        policy_loss.mean(),
        value_loss.mean(),
        entropy.mean(),
        jnp.mean(ratio - 1 - log_ratio),
        jnp.mean(jnp.abs(ratio - 1) > clip_eps),
    )
    total = (
        terms.policy_loss
        + config.vf_coef * terms.value_loss
        - config.ent_coef * terms.entropy
    )
    return total, terms


def make_optimizer(config: PpoConfig) -> optax.GradientTransformation:
    """From a gradient to a direction; the learning rate is no part of it."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(eps=config.eps),
    )


def learning_rate(config: PpoConfig, share: float) -> float:
    """The learning rate after a `share` of the training."""
    return config.learning_rate * (1 - (1 - config.final_rate) * share)


def step(
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    gradient: Any,
    rate: jax.Array,
) -> tuple[Any, Any]:
    """One step of `optimizer` with learning rate `rate`: new params and state."""
    direction, opt_state = optimizer.update(gradient, opt_state, params)
    params = jax.tree.map(lambda param, leaf: param - rate * leaf, params, direction)
    return params, opt_state
