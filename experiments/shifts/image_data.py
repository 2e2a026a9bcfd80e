"""Shifts of real images: what environments do to them, and what the test does.

Two classes, the first five of ten and the last five, on images of half the size with
two colour channels, alike in gray images:

    own_shortcut     each environment paints a pattern of its own for either class, in
                     the second channel; the tests have none, or those of another
    coloured_labels  labels that are wrong at times, and a colour that goes with them
                     more often than the image does, how often is the environment's own;
                     in the test it goes against them
    rotated          each environment turns its images by an angle of its own; the test
                     by one that is left out
    mixed_labels     each environment has its own share of wrong labels, the test none

Coloured labels are those of Arjovsky et al. 2019 (arXiv 1907.02893), section 5.1, in
more environments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shifts.config import ImagesProblem, ImagesSettings
from experiments.shifts.training import Data, Examples
from experiments.vision.config import NUM_CLASSES, DatasetName
from experiments.vision.data import load

CHANNELS = 2
HELD_OUT_ENVS = 2
# Of own_shortcut: how many of the test environments have patterns.
_FRESH = 3
# Of own_shortcut: the share of pixels that a pattern paints.
_PAINTED = 0.1
# Of coloured_labels: how often the label is wrong; between what the environments'
# colours are; and how often they are in the test.
_WRONG_LABELS = 0.25
_WRONG_COLOURS = (0.05, 0.25)
_WRONG_COLOURS_IN_TEST = 0.9
# Of rotated: degrees from one environment to the next.
_TURN = 10.0
# Of mixed_labels: between what the environments' shares of wrong labels are.
_NOISE = (0.0, 0.4)


class _Source(NamedTuple):
    """Images float32 [example, height, width] in [0, 1], labels bool [example]."""

    images: np.ndarray
    labels: np.ndarray


# What an environment does: images and labels to features [example, height, width,
# CHANNELS] and labels.
_Law = Callable[
    [np.random.Generator, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]
]


class _Laws(NamedTuple):
    """Of the environments of each split."""

    train: Sequence[_Law]
    test: Sequence[_Law]
    held_out: Sequence[_Law]


def make_data(
    seed: int,
    problem: ImagesProblem,
    settings: ImagesSettings,
    data_dir: Path | None = None,
) -> Data:
    """Draws a problem; the same arguments give the same one.

    No image is in two environments, but that those of the test all show the same ones,
    which are of the official test set.

    Args:
      seed: of everything; all problems have the same images.
      problem: which.
      settings: the dataset and sizes.
      data_dir: where the dataset's files are; see `experiments.vision.data.load`.

    Returns:
      float32 arrays: features [env, example, height, width, CHANNELS], labels
      [env, example].

    Raises:
      DataError: no such data, or fewer images than are asked for.
    """
    streams = np.random.SeedSequence(seed).spawn(5)
    image_rng, law_rng, *split_rngs = map(np.random.default_rng, streams)
    source, test_source = _source(settings.dataset, data_dir)
    num_envs, examples = settings.num_envs, settings.examples_per_env
    laws = _LAWS[problem](law_rng, num_envs, source.images.shape[1:])
    rows = image_rng.permutation(len(source.labels))
    rows = rows[: (num_envs + HELD_OUT_ENVS) * examples].reshape(-1, examples)
    test_rows = image_rng.permutation(len(test_source.labels))
    test_rows = test_rows[: settings.test_examples]

    def split(
        rng: np.random.Generator,
        laws: Sequence[_Law],
        source: _Source,
        rows: Iterable[np.ndarray],
    ) -> Examples:
        drawn = [
            law(rng, source.images[own], source.labels[own])
            for law, own in zip(laws, rows, strict=True)
        ]
        features, labels = zip(*drawn, strict=True)
        return Examples(np.stack(features), np.stack(labels).astype(np.float32))

    train_rng, test_rng, held_out_rng = split_rngs
    return Data(
        split(train_rng, laws.train, source, rows[:num_envs]),
        split(test_rng, laws.test, test_source, [test_rows] * len(laws.test)),
        split(held_out_rng, laws.held_out, source, rows[num_envs:]),
    )


@functools.lru_cache(maxsize=2)
def _source(dataset: DatasetName, data_dir: Path | None) -> tuple[_Source, _Source]:
    train, test = (
        _Source(_halved(split.images[..., 0]), split.labels >= NUM_CLASSES // 2)
        for split in load(dataset, data_dir)
    )
    return train, test


def _halved(images: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels, in [0, 1]."""
    count, height, width = images.shape
    blocks = images.reshape(count, height // 2, 2, width // 2, 2)
    return blocks.mean(axis=(2, 4), dtype=np.float32) / np.float32(255)


def _gray(images: np.ndarray) -> np.ndarray:
    return np.stack([images] * CHANNELS, axis=-1)


def _own_shortcut(
    rng: np.random.Generator, num_envs: int, size: tuple[int, int]
) -> _Laws:
    def none(
        rng: np.random.Generator, images: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return _gray(images), labels

    def painted(patterns: np.ndarray) -> _Law:
        def law(
            rng: np.random.Generator, images: np.ndarray, labels: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray]:
            features = _gray(images)
            features[..., 1][patterns[labels.astype(int)]] = 1.0
            return features, labels

        return law

    count = num_envs + _FRESH + HELD_OUT_ENVS
    patterns = rng.uniform(size=(count, 2, *size)) < _PAINTED
    laws = list(map(painted, patterns))
    last = num_envs + _FRESH
    return _Laws(laws[:num_envs], [none, *laws[num_envs:last]], laws[last:])


def _coloured_labels(
    rng: np.random.Generator, num_envs: int, size: tuple[int, int]
) -> _Laws:
    def coloured(wrong: float) -> _Law:
        def law(
            rng: np.random.Generator, images: np.ndarray, labels: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray]:
            given = labels ^ (rng.uniform(size=labels.shape) < _WRONG_LABELS)
            colours = given ^ (rng.uniform(size=labels.shape) < wrong)
            seen = np.stack([~colours, colours], axis=-1)[:, None, None, :]
            return _gray(images) * seen.astype(np.float32), given

        return law

    return _Laws(
        [coloured(wrong) for wrong in np.linspace(*_WRONG_COLOURS, num_envs)],
        [coloured(_WRONG_COLOURS_IN_TEST)],
        [coloured(wrong) for wrong in rng.uniform(*_WRONG_COLOURS, HELD_OUT_ENVS)],
    )


def _rotated(rng: np.random.Generator, num_envs: int, size: tuple[int, int]) -> _Laws:
    def turned(steps: float) -> _Law:
        def law(
            rng: np.random.Generator, images: np.ndarray, labels: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray]:
            return _gray(rotate(images, steps * _TURN)), labels

        return law

    return _Laws(
        [turned(env) for env in range(num_envs)],
        [turned(num_envs)],
        # As far outside as the test, at the other end; and between two.
        [turned(-1), turned(0.5)],
    )


def rotate(images: np.ndarray, degrees: float) -> np.ndarray:
    """Images [example, height, width] turned around their middle; 0 outside."""
    height, width = images.shape[1:]
    angle = np.deg2rad(degrees)
    middle = np.array([height - 1, width - 1]) / 2
    places = np.moveaxis(np.indices((height, width)), 0, -1) - middle
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    rows, columns = np.moveaxis(places @ turn + middle, -1, 0).astype(np.float32)
    return np.asarray(_sample(images, rows, columns))


@jax.jit
def _sample(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    def of_image(image: jax.Array) -> jax.Array:
        return jax.scipy.ndimage.map_coordinates(image, [rows, columns], order=1)

    return jax.vmap(of_image)(jnp.asarray(images))


def _mixed_labels(
    rng: np.random.Generator, num_envs: int, size: tuple[int, int]
) -> _Laws:
    def noisy(share: float) -> _Law:
        def law(
            rng: np.random.Generator, images: np.ndarray, labels: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray]:
            return _gray(images), labels ^ (rng.uniform(size=labels.shape) < share)

        return law

    return _Laws(
        [noisy(share) for share in np.linspace(*_NOISE, num_envs)],
        [noisy(0.0)],
        [noisy(share) for share in rng.uniform(*_NOISE, HELD_OUT_ENVS)],
    )


_LAWS: dict[
    ImagesProblem, Callable[[np.random.Generator, int, tuple[int, int]], _Laws]
] = {
    "own_shortcut": _own_shortcut,
    "coloured_labels": _coloured_labels,
    "rotated": _rotated,
    "mixed_labels": _mixed_labels,
}
