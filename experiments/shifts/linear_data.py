"""The linear unit tests of Aubin et al. 2021 (arXiv 2102.10867), section 3.

Five features have the same law given the label in every environment, five do not:

    example1    regression; the target's causes and its effects, noise of a size of the
                environment's own
    example2    cows and camels: background and animal go together more or less often,
                and what tells the animal is a hundredth of the size of the background
    example3    a small margin that is the same everywhere, and a large one whose
                direction is the environment's own

`example1s` and so on are their scrambled twins: inputs multiplied by a random rotation.
In test examples the features that vary, the spurious ones, are shuffled within each
environment, so that they say nothing about the label.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.shifts.config import Problem
from experiments.shifts.training import REGRESSION, TWO_CLASSES, Data, Examples, Task

INVARIANT = 5
SPURIOUS = 5
FEATURES = INVARIANT + SPURIOUS
HELD_OUT_ENVS = 4

# The first environments' noise of example 1, and the further ones' as powers of ten.
_NOISE = (0.1, 1.5, 2.0)
_NOISE_POWERS = (-2.0, 1.0)
# Likewise of example 2: how often animal and background go together, and the share of
# cows.
_TOGETHER = (0.95, 0.97, 0.99)
_TOGETHER_RANGE = (0.9, 1.0)
_COWS = (0.3, 0.5, 0.7)
_COWS_RANGE = (0.3, 0.7)
_ANIMAL_SIZE = 0.01
_SPREAD = 0.1**0.5
# Of example 3: half the distance between classes, and the noise.
_MARGIN = 0.1
_MARGIN_NOISE = 0.1


class _Laws(NamedTuple):
    """What a problem draws once: for all environments, and a list with each one's."""

    shared: Any
    envs: list[Any]


def task_of(problem: Problem) -> Task:
    """How predictions are judged."""
    return REGRESSION if _kind(problem) == 1 else TWO_CLASSES


def _kind(problem: Problem) -> int:
    return int(problem.removesuffix("s")[-1])


def make_data(
    seed: int, problem: Problem, num_envs: int, examples: int, oracle: bool = False
) -> Data:
    """Draws a problem; the same seed and arguments give the same one.

    Args:
      seed: of everything; a problem and its scrambled twin differ in the rotation
        alone.
      problem: which.
      num_envs: training environments.
      examples: examples in each environment, an even number.
      oracle: shuffle the spurious features of all sets, not of the test set alone.

    Returns:
      float32 arrays: features [env, example, FEATURES], labels [env, example]. The
      environments of the test are the training ones.
    """
    streams = np.random.SeedSequence(seed).spawn(5)
    law_rng, train_rng, test_rng, held_out_rng, turn_rng = map(
        np.random.default_rng, streams
    )
    laws = _LAWS[_kind(problem)](law_rng, num_envs + HELD_OUT_ENVS)
    rotation = np.eye(FEATURES)
    if problem.endswith("s"):
        rotation = random_rotation(turn_rng, FEATURES)

    def split(rng: np.random.Generator, envs: list[Any], shuffled: bool) -> Examples:
        drawn = []
        for law in envs:
            features, labels = _SAMPLES[_kind(problem)](rng, laws.shared, law, examples)
            if shuffled:
                order = rng.permutation(examples)
                features[:, INVARIANT:] = features[order, INVARIANT:]
            drawn.append((features @ rotation, labels))
        features, labels = (
            np.stack(arrays).astype(np.float32) for arrays in zip(*drawn, strict=True)
        )
        return Examples(features, labels)

    training, others = laws.envs[:num_envs], laws.envs[num_envs:]
    return Data(
        split(train_rng, training, oracle),
        split(test_rng, training, True),
        split(held_out_rng, others, oracle),
    )


def random_rotation(rng: np.random.Generator, size: int) -> np.ndarray:
    """An orthogonal matrix [size, size], uniformly drawn."""
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    return q * np.sign(np.diagonal(r))


def _first_or_drawn(
    rng: np.random.Generator,
    first: tuple[float, ...],
    between: tuple[float, float],
    count: int,
) -> list[float]:
    """The values that the problem names, then uniform draws."""
    return [*first, *rng.uniform(*between, count)][:count]


def _laws1(rng: np.random.Generator, count: int) -> _Laws:
    first = tuple(math.log10(noise) for noise in _NOISE)
    powers = _first_or_drawn(rng, first, _NOISE_POWERS, count)
    causes = rng.normal(size=(INVARIANT, INVARIANT)) / INVARIANT
    effects = rng.normal(size=(INVARIANT, SPURIOUS)) / SPURIOUS
    return _Laws((causes, effects), [10**power for power in powers])


def _sample1(
    rng: np.random.Generator, shared: Any, noise: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    causes, effects = shared
    x = noise * rng.normal(size=(count, INVARIANT))
    y = x @ causes + noise * rng.normal(size=x.shape)
    z = y @ effects + rng.normal(size=(count, SPURIOUS))
    return np.concatenate([x, z], axis=1), y.sum(axis=1)


def _laws2(rng: np.random.Generator, count: int) -> _Laws:
    together = _first_or_drawn(rng, _TOGETHER, _TOGETHER_RANGE, count)
    cows = _first_or_drawn(rng, _COWS, _COWS_RANGE, count)
    return _Laws(None, list(zip(together, cows, strict=True)))


def _sample2(
    rng: np.random.Generator, shared: None, law: tuple[float, float], count: int
) -> tuple[np.ndarray, np.ndarray]:
    together, cows = law
    animal = np.where(rng.uniform(size=(count, 1)) < cows, 1.0, -1.0)
    usual = rng.uniform(size=(count, 1)) < together
    background = np.where(usual, animal, -animal)
    noise = _SPREAD * rng.normal(size=(count, FEATURES))
    x = _ANIMAL_SIZE * (animal + noise[:, :INVARIANT])
    z = background + noise[:, INVARIANT:]
    return np.concatenate([x, z], axis=1), x.sum(axis=1) > 0


def _laws3(rng: np.random.Generator, count: int) -> _Laws:
    return _Laws(None, list(rng.normal(size=(count, SPURIOUS))))


def _sample3(
    rng: np.random.Generator, shared: None, center: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(count) >= count // 2
    side = np.where(labels, -1.0, 1.0)[:, None]
    centers = np.concatenate([np.full(INVARIANT, _MARGIN), center])
    noise = _MARGIN_NOISE * rng.normal(size=(count, FEATURES))
    return side * centers + noise, labels


_LAWS = {1: _laws1, 2: _laws2, 3: _laws3}
# From a stream, what is shared, an environment's own and a number of examples.
_SAMPLES: dict[int, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    1: _sample1,
    2: _sample2,
    3: _sample3,
}
