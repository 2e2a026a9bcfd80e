"""States from the expert's trajectories, with its action probabilities.

    dataset.json              levels, expert, seed; shape and SHA-256 of each array
    train_images.npy          uint8 [level, state, height, width, channel]
    train_probabilities.npy   float32 [level, state, action]
    test_images.npy           uint8 [state, height, width, channel]
    test_probabilities.npy    float32 [state, action]

The arrays are not compressed, because then they could not be memory-mapped: NumPy opens
them in place. dataset.json is written last, and nothing counts as a dataset without it
or with an array that is not the one it describes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.coinrun.expert.actors import Probabilities, draw_actions
from experiments.coinrun.game import NUM_ACTIONS, Choose, Episode, Turn
from experiments.coinrun.student.config import (
    DATASET_PRESETS,
    DatasetConfig,
    Source,
)
from experiments.common.files import atomic_write, file_sha256, write_json
from experiments.common.run_dir import RunDirError

MANIFEST = "dataset.json"
FORMAT = 1
SHOWN_LEVELS = 6
SHOWN_STATES = 8

# What a generator is for, so that no two have the same seed.
_STATES, _GENERATED = range(2)

# The game: plays each of different levels once, with a policy.
Play = Callable[[Sequence[int], Choose], Iterable[Episode]]
# Called with a level, a frame of it and the action probabilities there.
Visit = Callable[[int, np.ndarray, np.ndarray], None]
# Plays each of the levels once; the number says which episode of theirs it is.
PlayOnce = Callable[[Sequence[int], int, Visit], None]


class DataError(RunDirError, ValueError):
    """A dataset that is missing or not what it should be; the message says the mend."""


class States(NamedTuple):
    """`images` uint8 [..., height, width, channel]; `probabilities` float32 [...,
    action].
    """

    images: np.ndarray
    probabilities: np.ndarray


class Dataset(NamedTuple):
    """`train` has axes [level, state], `test` has [state], each of another level."""

    train: States
    test: States

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the names of their files."""
        return {
            f"{part}_{field}.npy": array
            for part, states in self._asdict().items()
            for field, array in states._asdict().items()
        }


ARRAYS = (
    "train_images.npy",
    "train_probabilities.npy",
    "test_images.npy",
    "test_probabilities.npy",
)


class Opened(NamedTuple):
    """A dataset on disk, its arrays memory-mapped and read-only.

    `digest` is the SHA-256 of its manifest, which has those of the arrays.
    """

    dataset: Dataset
    manifest: dict[str, Any]
    digest: str


def collect(
    play: Play,
    probabilities: Probabilities,
    config: DatasetConfig,
    train_levels: Sequence[int],
    test_levels: Sequence[int],
) -> Dataset:
    """Plays with the expert's sampled actions, and draws from the states it visits.

    Of a training level the expert plays `config.episodes_per_level` episodes, or more
    until these have `config.states_per_level` states; of all that they visited as many
    as wanted are drawn uniformly without replacement. Of a test level it plays one
    episode and any of its states is drawn. Actions and draws depend on the seed, the
    level and the number of its episode only, not on what is played beside.

    Raises:
      DataError: a level is in both lists, or twice in one.
    """
    if len({*train_levels, *test_levels}) != len(train_levels) + len(test_levels):
        raise DataError("every level has to be another one, in training and test alike")

    def play_once(levels: Sequence[int], number: int, visit: Visit) -> None:
        key = jax.random.fold_in(jax.random.key(config.seed), number)

        def choose(turn: Turn) -> np.ndarray:
            chances = np.asarray(probabilities(turn.frames), np.float32)
            for slot in np.flatnonzero(turn.active):
                visit(int(turn.levels[slot]), turn.frames[slot], chances[slot])
            return draw_actions(key, turn, chances)

        for _ in play(levels, choose):
            pass

    return Dataset(
        _collect_train(play_once, config, train_levels),
        _collect_test(play_once, config, test_levels),
    )


def _collect_train(
    play_once: PlayOnce, config: DatasetConfig, levels: Sequence[int]
) -> States:
    wanted = config.states_per_level
    pools: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {n: [] for n in levels}

    def visit(level: int, frame: np.ndarray, chances: np.ndarray) -> None:
        pools[level].append((frame.copy(), chances))

    for number in itertools.count():
        if number >= config.episodes_per_level:
            levels_left = [level for level in levels if len(pools[level]) < wanted]
        else:
            levels_left = list(levels)
        if not levels_left:
            break
        play_once(levels_left, number, visit)
    images, targets = [], []
    for level in levels:
        pool = pools.pop(level)
        rows = _generator(config, level).choice(len(pool), wanted, replace=False)
        # In this order, so that the first of them are no earlier in their episodes.
        images.append(np.stack([pool[row][0] for row in rows]))
        targets.append(np.stack([pool[row][1] for row in rows]))
    return States(np.stack(images), np.stack(targets))


def _collect_test(
    play_once: PlayOnce, config: DatasetConfig, levels: Sequence[int]
) -> States:
    draws = {level: _generator(config, level) for level in levels}
    seen = dict.fromkeys(levels, 0)
    kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def visit(level: int, frame: np.ndarray, chances: np.ndarray) -> None:
        seen[level] += 1
        # Of t states so far each is the one that is kept with probability 1 / t.
        if draws[level].random() * seen[level] < 1:
            kept[level] = frame.copy(), chances

    play_once(levels, 0, visit)
    chosen = [kept[level] for level in levels]
    return States(*(np.stack(column) for column in zip(*chosen, strict=True)))


def _generator(config: DatasetConfig, level: int) -> np.random.Generator:
    return np.random.default_rng([_STATES, config.seed, level])


def generate(config: DatasetConfig) -> Dataset:
    """A tiny dataset without the game.

    The colour of a square, which is anywhere, says what the expert does. The
    background's colour is each level's own and says the same within a training level
    only as far as chance has it.
    """
    side, square, kinds = 32, 16, 3
    rng = np.random.default_rng([_GENERATED, config.seed])
    policies = np.full((kinds, NUM_ACTIONS), 0.1 / (NUM_ACTIONS - 1))
    policies[np.arange(kinds), [1, 4, 7]] = 0.9

    def states(levels: int, each: int) -> States:
        backgrounds = rng.integers(0, 256, (levels, 1, 1, 1, 3))
        shape = (levels, each, side, side, 3)
        images = np.broadcast_to(backgrounds // 2, shape).astype(np.uint8)
        kind = rng.integers(0, kinds, (levels, each))
        corners = rng.integers(0, side - square, (levels, each, 2))
        for place in np.ndindex(levels, each):
            top, left = corners[place]
            inside = images[place][top : top + square, left : left + square]
            inside[...] = 0
            inside[..., kind[place]] = 255
        images ^= rng.integers(0, 8, shape, np.uint8)
        return States(images, policies[kind].astype(np.float32))

    train = states(config.levels, config.states_per_level)
    test = states(config.test_levels, 1)
    return Dataset(train, States(*(array[:, 0] for array in test)))


def save(directory: Path, dataset: Dataset, about: Mapping[str, Any]) -> None:
    """Writes a dataset; `about` goes into its manifest."""
    (directory / MANIFEST).unlink(missing_ok=True)
    described = {}
    for name, array in dataset.arrays().items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        atomic_write(directory / name, buffer.getvalue())
        described[name] = {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "bytes": buffer.tell(),
            "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
        }
    manifest = {"format": FORMAT, **about, "arrays": described}
    write_json(directory / MANIFEST, manifest)


def load(
    source: Source, directory: Path, expected: str | None = None
) -> tuple[Dataset, str]:
    """The dataset that a config names, and what tells it from others.

    Args:
      source: coinrun, or generated, which is made anew and needs no directory.
      directory: of the former.
      expected: what tells the wanted one from others, if that is known.

    Raises:
      DataError: see `open_dataset`; or the directory holds generated images, or another
        dataset than the expected one.
    """
    if source == "generated":
        return generate(DATASET_PRESETS["smoke"]), "generated"
    opened = open_dataset(directory)
    if opened.manifest.get("source") != source:
        raise DataError(
            f"{directory} holds a dataset of source {opened.manifest.get('source')!r}, "
            f"not {source!r}: choose another with --data"
        )
    if expected not in (None, opened.digest):
        raise DataError(
            f"{directory} holds another dataset than when this command began: begin "
            "again, in another run directory"
        )
    return opened.dataset, opened.digest


def open_dataset(directory: Path) -> Opened:
    """Opens a dataset, after comparing every file with the manifest.

    Raises:
      DataError: there is none, or a file is missing, truncated or damaged.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path} is not there, so {directory} holds no complete dataset: make one "
            f"with `python -m experiments.coinrun dataset --out {directory}`, and with "
            "the same --preset"
        ) from None
    mend = (
        "make the dataset again with `python -m experiments.coinrun dataset "
        f"--overwrite --out {directory}` and the settings that it was made with"
    )
    try:
        manifest = json.loads(text)
        described = {name: dict(manifest["arrays"][name]) for name in ARRAYS}
        known = manifest["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: {mend}") from None
    if not known:
        raise DataError(
            f"{path} has format {manifest['format']!r}, expected {FORMAT}: {mend}"
        )
    for name in ARRAYS:
        _require_intact(directory / name, described[name], mend)
    arrays = [
        np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in ARRAYS
    ]
    dataset = Dataset(States(*arrays[:2]), States(*arrays[2:]))
    return Opened(dataset, manifest, hashlib.sha256(text).hexdigest())


def _require_intact(path: Path, described: Mapping[str, Any], mend: str) -> None:
    try:
        size = path.stat().st_size
        digest = file_sha256(path)
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path} is not there: {mend}") from None
    if size != described.get("bytes"):
        raise DataError(
            f"{path} has {size} bytes, expected {described.get('bytes')}: it is "
            f"truncated or another file; {mend}"
        )
    if digest != described.get("sha256"):
        raise DataError(
            f"{path} is damaged: it has SHA-256 {digest}, expected "
            f"{described.get('sha256')}; {mend}"
        )


def contact_sheet(images: np.ndarray) -> np.ndarray:
    """One image uint8 [height, width, channel] of six levels, each in a row.

    Args:
      images: uint8 [level, state, height, width, channel].
    """
    shown = np.asarray(images[:SHOWN_LEVELS, :SHOWN_STATES])
    framed = np.pad(
        shown, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255
    )
    levels, states, height, width, channels = framed.shape
    return framed.transpose(0, 2, 1, 3, 4).reshape(
        levels * height, states * width, channels
    )
