"""Averaged and masked gradients that are pure noise (paper, proposition 2, figure 4).

Every component of every environment's gradient is an independent standard Gaussian. A
component passes the mask if at least t of the d environments share its sign. Given the
number k of positive signs, the magnitudes are independent half-normals h_i, so with the
sum of the signs s_i, D = 2k - d, the sum S of the gradients is

    S = sum_i s_i h_i = D E[h] + sum_i s_i (h_i - E[h])

and with the central moments v, c and q (second to fourth) of a half-normal

    E[S^2 | k] = D^2 E[h]^2 + d v
    E[S^4 | k] = D^4 E[h]^4 + 6 D^2 E[h]^2 d v + 4 D^2 E[h] c + d q + 3 d (d - 1) v^2

The masked mean is S / d for the k that pass and else 0. Its moments are sums over k
with binomial weights.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hardvary
from experiments.theory.config import NormsConfig

# Columns of estimates, and of the expectation of each.
ESTIMATES = {
    "average": "average_exact",
    "masked": "masked_exact",
    "conditional": "masked_exact",
}

# Of |z| for a standard Gaussian z: the mean, then the central moments.
HALF_NORMAL_MEAN = math.sqrt(2 / math.pi)
HALF_NORMAL_VARIANCE = 1 - 2 / math.pi
HALF_NORMAL_THIRD = HALF_NORMAL_MEAN * (4 / math.pi - 1)
HALF_NORMAL_FOURTH = 3 - 4 / math.pi - 12 / math.pi**2


class Exact(NamedTuple):
    """Expectation and standard deviation of one draw of a squared norm."""

    mean: float
    std: float


class Simulated(NamedTuple):
    """Squared norms [repetition] of simulated gradients, and how much passed.

    `passed` is the number of components, int32 [repetition].
    """

    average: jax.Array
    masked: jax.Array
    passed: jax.Array


def needed_signs(num_envs: int, threshold: float) -> int:
    """The least t with 2 t - d >= threshold d, and t >= d / 2: equal signs to pass."""
    # As in the library, a threshold of k/d counts as the exact fraction.
    return math.ceil(num_envs * (1 + threshold) / 2 - 1e-6)


def passing(num_envs: int, needed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of signs D that pass, and the logarithms of their probabilities."""
    positive = np.arange(num_envs + 1)
    total = 2 * positive - num_envs
    binomial = [log_choose(num_envs, int(k)) for k in positive]
    log_probability = np.array(binomial) - num_envs * math.log(2)
    passes = np.abs(total) >= 2 * needed - num_envs
    return total[passes], log_probability[passes]


def log_choose(n: int, k: int) -> float:
    """Logarithm of the binomial coefficient."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def exact_average(num_envs: int, components: int) -> Exact:
    """||mean gradient||^2, a sum of squares of Gaussians of variance 1 / d."""
    return Exact(components / num_envs, math.sqrt(2 * components) / num_envs)


def exact_masked(num_envs: int, needed: int, components: int) -> Exact:
    """||masked mean gradient||^2.

    Args:
      num_envs: environments, d.
      needed: equal signs that a component needs to pass, t.
      components: components of the gradient, n.
    """
    total, log_probability = passing(num_envs, needed)
    d, m, v = num_envs, HALF_NORMAL_MEAN, HALF_NORMAL_VARIANCE
    squares = total.astype(np.float64) ** 2
    second = squares * m**2 + d * v
    fourth = (
        squares**2 * m**4
        + 6 * squares * m**2 * d * v
        + 4 * squares * m * HALF_NORMAL_THIRD
        + d * HALF_NORMAL_FOURTH
        + 3 * d * (d - 1) * v**2
    )

    def expectation(values: np.ndarray, power: int) -> float:
        logs = log_probability + np.log(values) - power * math.log(d)
        return math.exp(np.logaddexp.reduce(logs))

    mean = expectation(second, 2)
    variance = expectation(fourth, 4) - mean**2
    return Exact(components * mean, math.sqrt(components * variance))


def pass_probability(num_envs: int, needed: int) -> float:
    """Probability that a component passes the mask."""
    return math.exp(np.logaddexp.reduce(passing(num_envs, needed)[1]))


def proof_bound(num_envs: int, needed: int, components: int) -> float:
    """The bound in the proof of proposition 2: n (d - t) C(d, t) (1/2)^(d - 1).

    It is 0 for t = d, where the masked norm is not.
    """
    if needed == num_envs:
        return 0.0
    logs = math.log(components * (num_envs - needed))
    logs += log_choose(num_envs, needed) - (num_envs - 1) * math.log(2)
    return math.exp(logs)


@functools.partial(
    jax.jit, static_argnames=("num_envs", "components", "repetitions", "threshold")
)
def simulate(
    key: jax.Array, num_envs: int, components: int, repetitions: int, threshold: float
) -> Simulated:
    """Draws gradients [env, component], one at a time, and masks them.

    Args:
      key: source of the draws.
      num_envs: environments.
      components: components of the gradient.
      repetitions: number of gradients.
      threshold: of the AND-mask.
    """
    mask = hardvary.and_mask(threshold)

    def draw(key: jax.Array) -> Simulated:
        gradients = jax.random.normal(key, (num_envs, components))
        masked, state = mask.update(gradients, mask.init(None))
        return Simulated(
            jnp.sum(gradients.mean(axis=0) ** 2),
            jnp.sum(masked**2),
            jnp.round(state.kept_fraction * components).astype(jnp.int32),
        )

    return jax.lax.map(draw, jax.random.split(key, repetitions))


def simulate_passing(
    key: jax.Array, num_envs: int, needed: int, draws: int
) -> jax.Array:
    """Squares [draw] of masked means, drawn given that they pass.

    Their mean times `pass_probability` estimates the square of a component: unlike
    `simulate`, this has something to average however rare passing is.

    Args:
      key: source of the draws.
      num_envs: environments.
      needed: equal signs that a component needs to pass.
      draws: number of components.
    """
    total, log_probability = passing(num_envs, needed)
    positive = jnp.asarray((total + num_envs) // 2)
    logits = jnp.asarray(log_probability - log_probability.max(), jnp.float32)
    return _simulate_passing(key, positive, logits, num_envs, draws)


@functools.partial(jax.jit, static_argnames=("num_envs", "draws"))
def _simulate_passing(
    key: jax.Array, positive: jax.Array, logits: jax.Array, num_envs: int, draws: int
) -> jax.Array:
    sign_key, magnitude_key = jax.random.split(key)
    chosen = positive[jax.random.categorical(sign_key, logits, shape=(draws,))]
    magnitudes = jnp.abs(jax.random.normal(magnitude_key, (draws, num_envs)))
    # Which environments are positive does not matter: the magnitudes are exchangeable.
    signs = jnp.where(jnp.arange(num_envs) < chosen[:, None], 1.0, -1.0)
    return (signs * magnitudes).mean(axis=1) ** 2


def norms_row(config: NormsConfig, num_envs: int, key: jax.Array) -> dict[str, Any]:
    """Squared norms at one number of environments: estimated, exact, bounded.

    Standard errors of `average` and `masked` come from the exact standard deviations:
    where few components or none have passed, those of the draws say nothing. Passing is
    no rare event for `conditional`, which has the one of its draws.

    Args:
      config: settings; `num_envs` and `seed` in it are not looked at.
      num_envs: number of environments.
      key: source of all draws.
    """
    components, repetitions = config.components, config.repetitions
    needed = needed_signs(num_envs, config.threshold)
    average = exact_average(num_envs, components)
    masked = exact_masked(num_envs, needed, components)
    probability = pass_probability(num_envs, needed)
    plain_key, passing_key = jax.random.split(key)
    plain = simulate(plain_key, num_envs, components, repetitions, config.threshold)
    squares = simulate_passing(passing_key, num_envs, needed, config.conditional_draws)
    # In float64: squares of small probabilities leave the range of float32.
    scaled = components * probability * np.asarray(squares, np.float64)
    return {
        "num_envs": num_envs,
        "needed_signs": needed,
        "average": float(np.asarray(plain.average, np.float64).mean()),
        "average_std_error": average.std / math.sqrt(repetitions),
        "average_exact": average.mean,
        "masked": float(np.asarray(plain.masked, np.float64).mean()),
        "masked_std_error": masked.std / math.sqrt(repetitions),
        "conditional": float(scaled.mean()),
        "conditional_std_error": float(scaled.std(ddof=1)) / math.sqrt(len(scaled)),
        "masked_exact": masked.mean,
        "bound": proof_bound(num_envs, needed, components),
        "passed": int(plain.passed.sum()),
        "passed_expected": components * repetitions * probability,
    }
