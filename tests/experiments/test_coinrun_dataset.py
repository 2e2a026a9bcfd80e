"""Datasets: the states asked for, the same ones every time, and whole on disk."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from experiments.coinrun import dataset
from experiments.coinrun.__main__ import COMMANDS
from experiments.coinrun.dataset import (
    ARRAYS,
    MANIFEST,
    DataError,
    collect,
    contact_sheet,
    generate,
    load,
    open_dataset,
    save,
)
from experiments.coinrun.expert.policy import Architecture, init_params
from experiments.coinrun.expert.saved import Expert, save_expert
from experiments.coinrun.game import Episode, Turn, play
from experiments.coinrun.student.commands import levels_of
from experiments.coinrun.student.config import DATASET_PRESETS, DatasetConfig
from experiments.common.cli import main
from tests.experiments._game import needs_game

CONFIG = DatasetConfig(
    levels=3, states_per_level=20, episodes_per_level=2, test_levels=5
)
TRAIN_LEVELS, TEST_LEVELS = [4, 9, 300], [1000, 1001, 1002, 1003, 1004]


def coinrun(*arguments):
    return main("python -m experiments.coinrun", COMMANDS, [*map(str, arguments)])


class FakeGame:
    """Episodes of 3 to 7 steps; frames show level, try and step, and the action."""

    def __init__(self, slots=4):
        self.slots = slots
        self.played = []

    def __call__(self, levels, choose):
        self.played.append(list(levels))
        waiting = list(levels)
        number = len(self.played)
        levels = np.array([waiting.pop(0) for _ in range(min(self.slots, len(levels)))])
        steps, actions = np.zeros_like(levels), np.zeros_like(levels)
        active = np.ones(len(levels), bool)
        while active.any():
            frames = np.zeros((len(levels), 4, 4, 3), np.uint8)
            frames[:, 0, 0] = np.stack([levels // 256, levels % 256, levels * 0], 1)
            frames[:, 0, 1] = np.stack([steps, actions, levels * 0 + number], 1)
            turn = Turn(frames, levels.copy(), steps.copy(), active.copy())
            actions = np.array(choose(turn))
            steps += active
            frames[...] = 99  # as a game that reuses its memory
            for slot in np.flatnonzero(active & (steps == 3 + levels % 5)):
                yield Episode(int(levels[slot]), 0.0, False, int(steps[slot]))
                if waiting:
                    levels[slot], steps[slot], actions[slot] = waiting.pop(0), 0, 0
                else:
                    active[slot] = False


def expert(frames):
    """Probabilities that depend on the frame."""
    logits = np.outer(frames.sum((1, 2, 3)) % 7, np.linspace(-1, 1, 15))
    chances = np.exp(logits)
    return (chances / chances.sum(1, keepdims=True)).astype(np.float32)


def level_of(images):
    return images[..., 0, 0, 0].astype(int) * 256 + images[..., 0, 0, 1]


@pytest.fixture(scope="module")
def collected():
    return collect(FakeGame(), expert, CONFIG, TRAIN_LEVELS, TEST_LEVELS)


def test_collect_has_the_states_asked_for_of_the_levels_asked_for(collected):
    (images, chances), (test_images, test_chances) = collected
    assert images.shape == (3, 20, 4, 4, 3)
    assert images.dtype == np.uint8
    assert chances.shape == (3, 20, 15)
    assert chances.dtype == np.float32
    assert test_images.shape == (5, 4, 4, 3)
    assert test_chances.shape == (5, 15)
    for level, row in zip(TRAIN_LEVELS, level_of(images), strict=True):
        assert set(row) == {level}
    assert level_of(test_images).tolist() == TEST_LEVELS


def test_collect_probabilities_are_the_experts_and_sum_to_1(collected):
    for images, chances in collected:
        np.testing.assert_allclose(chances.sum(-1), 1, atol=1e-6)
        frames = images.reshape(-1, 4, 4, 3)
        np.testing.assert_array_equal(expert(frames), chances.reshape(-1, 15))


def test_collect_draws_without_replacement_from_as_many_episodes_as_needed():
    play = FakeGame()
    train, _ = collect(play, expert, CONFIG, TRAIN_LEVELS, TEST_LEVELS)
    *tries, test = play.played
    assert tries[:2] == [TRAIN_LEVELS] * 2
    # Of 7, 7 and 3 states.
    assert tries[2:] == [[4, 9, 300]] + [[300]] * 4
    assert test == TEST_LEVELS
    for images in train.images:
        places = images[:, 0, 1, ::2]  # step and try
        assert len(np.unique(places, axis=0)) == 20
    exact = dataclasses.replace(CONFIG, states_per_level=7, episodes_per_level=1)
    train, _ = collect(FakeGame(), expert, exact, [4], TEST_LEVELS)
    assert sorted(train.images[0, :, 0, 1, 0]) == list(range(7))


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        for array, expected in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, expected)


def test_collect_is_a_function_of_the_seed_and_not_of_what_runs_beside(collected):
    again = collect(FakeGame(slots=1), expert, CONFIG, TRAIN_LEVELS, TEST_LEVELS)
    assert_same(again, collected)
    other = dataclasses.replace(CONFIG, seed=1)
    changed = collect(FakeGame(), expert, other, TRAIN_LEVELS, TEST_LEVELS)
    assert (changed.train.images != collected.train.images).any()


def test_collect_test_state_is_uniform_in_its_episode():
    levels = list(range(4, 5 + 5 * 800, 5))  # all of 7 steps
    config = dataclasses.replace(CONFIG, states_per_level=1, test_levels=len(levels))
    _, test = collect(
        FakeGame(64), lambda f: np.full((len(f), 15), 1 / 15), config, [3], levels
    )
    counts = np.bincount(test.images[:, 0, 1, 0], minlength=7)
    expected = len(levels) / 7
    # Chi-squared with 6 degrees of freedom: 22.5 is beyond 99.9 %.
    assert ((counts - expected) ** 2 / expected).sum() < 22.5


@pytest.mark.parametrize(
    ("train", "test"), [([1, 2], [2, 3]), ([1, 1], [2]), ([1], [2, 2])]
)
def test_collect_level_that_is_listed_twice_is_refused(train, test):
    with pytest.raises(DataError, match="every level has to be another one"):
        collect(FakeGame(), expert, CONFIG, train, test)


def write(directory, data=None):
    directory.mkdir(exist_ok=True)
    save(directory, data or generate(DATASET_PRESETS["smoke"]), {"source": "coinrun"})
    return directory


def test_open_dataset_maps_what_save_wrote(tmp_path, collected):
    opened = open_dataset(write(tmp_path / "data", collected))
    assert_same(opened.dataset, collected)
    for array in opened.dataset.arrays().values():
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
    described = opened.manifest["arrays"]["train_images.npy"]
    assert described["shape"] == [3, 20, 4, 4, 3]
    data, digest = load("coinrun", tmp_path / "data")
    assert_same(data, collected)
    assert digest == opened.digest


def test_save_twice_gives_identical_files(tmp_path, collected):
    first, second = (write(tmp_path / name, collected) for name in ("a", "b"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted([MANIFEST, *ARRAYS])
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def damage(directory, kind):
    path = directory / "train_images.npy"
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "damaged":
        content[-1] ^= 1
        path.write_bytes(content)
    elif kind == "half-written":
        (directory / MANIFEST).unlink()
    elif kind == "no manifest":
        (directory / MANIFEST).write_text("{")
    else:
        manifest = json.loads((directory / MANIFEST).read_text())
        (directory / MANIFEST).write_text(json.dumps(manifest | {"format": 0}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"train_images.npy is not there: make the dataset again with"),
        ("truncated", r"train_images.npy has \d+ bytes, expected \d+: it is truncated"),
        ("empty", r"train_images.npy has 0 bytes"),
        ("damaged", r"train_images.npy is damaged: it has SHA-256"),
        ("half-written", r"holds no complete dataset: make one with"),
        ("no manifest", r"dataset.json is damaged"),
        ("format", r"dataset.json has format 0, expected 1"),
    ],
)
def test_open_dataset_what_is_not_whole_is_refused(tmp_path, kind, message):
    directory = write(tmp_path / "data")
    damage(directory, kind)
    with pytest.raises(DataError, match=message) as info:
        open_dataset(directory)
    assert f"--out {directory}" in str(info.value)


def test_load_another_dataset_than_expected_is_refused(tmp_path):
    directory = write(tmp_path / "data")
    with pytest.raises(DataError, match="holds another dataset than when"):
        load("coinrun", directory, "0" * 64)
    digest = open_dataset(directory).digest
    assert load("coinrun", directory, digest)[1] == digest


@pytest.mark.parametrize("writes", range(4))
def test_save_killed_half_way_leaves_no_dataset(tmp_path, writes, monkeypatch):
    directory = write(tmp_path / "data")
    count, whole = 0, dataset.atomic_write

    def killed(path, content):
        nonlocal count
        if count == writes:
            raise KeyboardInterrupt
        count += 1
        whole(path, content)

    monkeypatch.setattr(dataset, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        write(directory)
    with pytest.raises(DataError, match="holds no complete dataset"):
        open_dataset(directory)


def test_generate_is_deterministic_and_colours_decide():
    config = DATASET_PRESETS["smoke"]
    first = generate(config)
    assert_same(first, generate(config))
    assert first.train.images.shape == (8, 16, 32, 32, 3)
    assert first.test.images.shape == (64, 32, 32, 3)
    for images, chances in first:
        np.testing.assert_allclose(chances.sum(-1), 1, atol=1e-6)
        kind = (images > 240).sum((-3, -2)).argmax(-1)
        assert (chances.argmax(-1) == np.array([1, 4, 7])[kind]).all()
    other = generate(dataclasses.replace(config, seed=1))
    assert (other.test.images != first.test.images).any()


def test_contact_sheet_has_six_levels_in_rows():
    images = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1, 1)
    sheet = contact_sheet(np.broadcast_to(images, (7, 9, 5, 4, 3)))
    assert sheet.shape == (6 * 7, 8 * 6, 3)
    for level in range(6):
        assert (sheet[7 * level + 1 : 7 * level + 6, 1:5] == level).all()


def test_dataset_smoke_writes_a_dataset_and_a_sheet(tmp_path, capsys):
    paths = tmp_path / "a", tmp_path / "b"
    for path in paths:
        assert coinrun("dataset", "--preset", "smoke", "--out", path) == 0
    assert "train_states: 128" in capsys.readouterr().out
    for name in (MANIFEST, *ARRAYS, "levels.png"):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()
    opened = open_dataset(paths[0])
    manifest = opened.manifest
    assert not set(manifest["train_levels"]) & set(manifest["test_levels"])
    assert len(manifest["test_levels"]) == len(opened.dataset.test.images)
    assert imread(paths[0] / "levels.png").std() > 0.1
    with pytest.raises(DataError, match="source 'generated', not 'coinrun'"):
        load("coinrun", paths[0])
    (paths[0] / ARRAYS[0]).write_bytes(b"")
    assert coinrun("dataset", "--preset", "smoke", "--out", paths[0]) == 2
    assert "train_images.npy has 0 bytes" in capsys.readouterr().err


@needs_game
def test_collect_from_the_game_is_deterministic():
    config = dataclasses.replace(
        CONFIG, levels=2, states_per_level=30, episodes_per_level=1, test_levels=3
    )
    train, test = levels_of(config)

    def run_right(frames):
        # Sees the frame, so that what is recorded has to be what was decided on.
        chances = np.full((len(frames), 15), 0.02, np.float32)
        chances[np.arange(len(frames)), 7 + frames[:, 32, 32, 0] % 2] = 0.72
        return chances

    def make(slots):
        def in_game(levels, choose):
            return play(levels, choose, "easy", slots)

        return collect(in_game, run_right, config, train, test)

    first = make(64)
    assert first.train.images.shape == (2, 30, 64, 64, 3)
    assert first.test.images.shape == (3, 64, 64, 3)
    for images, chances in first:
        expected = run_right(images.reshape(-1, 64, 64, 3)).reshape(chances.shape)
        np.testing.assert_array_equal(chances, expected)
    assert len(np.unique(first.train.images.reshape(60, -1), axis=0)) > 30
    assert_same(first, make(2))


@needs_game
def test_dataset_command_collects_from_an_expert_and_refuses_other_levels(
    tmp_path, capsys
):
    architecture = Architecture(width=2, hidden=8)
    params = init_params(jax.random.key(0), architecture)
    path = tmp_path / "expert.npz"
    save_expert(path, Expert(architecture, params, {"mode": "easy"}))
    arguments = ("--expert", path, "--levels", 2, "--states-per-level", 5)
    arguments += ("--episodes-per-level", 1, "--test-levels", 3)
    outs = tmp_path / "a", tmp_path / "b"
    for out in outs:
        assert coinrun("dataset", *arguments, "--out", out) == 0
    for name in (MANIFEST, *ARRAYS, "levels.png"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    opened = open_dataset(outs[0])
    assert opened.dataset.train.images.shape == (2, 5, 64, 64, 3)
    assert opened.manifest["train_levels"] == [0, 1]
    assert opened.manifest["test_levels"] == [10_000, 10_001, 10_002]
    assert coinrun("dataset", *arguments, "--mode", "hard", "--out", outs[0]) == 2
    assert "was trained on easy levels, not on hard ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "mnist"}, "source must be one of coinrun, generated, got 'mnist'"),
        ({"mode": "exploration"}, "mode must be one of easy, hard"),
        ({"states_per_level": 0}, "states_per_level must be at least 1, got 0"),
        ({"seed": -1}, "seed must be between 0"),
    ],
)
def test_dataset_config_invalid_value_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig(**changes)


def test_levels_of_more_than_are_set_aside_is_refused():
    with pytest.raises(DataError, match="levels must be at most 64"):
        levels_of(DatasetConfig(levels=65))
    train, test = levels_of(DATASET_PRESETS["paper"])
    assert (len(train), len(test)) == (64, 2000)
    assert not set(train) & set(test)
