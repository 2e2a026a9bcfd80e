"""CoinRun: streams of levels, their saved states, and given levels once each."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from experiments.coinrun import game
from experiments.coinrun.expert.config import MOST_EVALUATED
from experiments.coinrun.game import (
    ACTIONS,
    EVALUATION_LEVELS,
    EXPERT_TRAIN_LEVELS,
    MAX_STEPS,
    REWARD,
    RIGHT_UP,
    STATE_BYTES,
    STUDENT_TEST_LEVELS,
    STUDENT_TRAIN_LEVELS,
    GameError,
    LevelStream,
    fresh_game,
    play,
)
from tests.experiments._game import needs_game
from tests.experiments.conftest import ROOT


def test_reserved_levels_are_disjoint_and_as_many_as_needed():
    ranges = [
        STUDENT_TRAIN_LEVELS,
        STUDENT_TEST_LEVELS,
        EVALUATION_LEVELS,
        EXPERT_TRAIN_LEVELS,
    ]
    assert [len(each) for each in ranges[:3]] == [64, 2000, MOST_EVALUATED]
    for one, other in itertools.combinations(ranges, 2):
        assert one.stop <= other.start or other.stop <= one.start


def test_actions_are_procgens():
    assert len(ACTIONS) == 15
    assert ACTIONS[RIGHT_UP] == "right+up"


def test_require_game_missing_says_the_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "procgen", None)
    game._library.cache_clear()
    try:
        with pytest.raises(GameError, match="make coinrun"):
            game.require_game()
    finally:
        game._library.cache_clear()


def test_import_of_the_wrapper_loads_neither_game_nor_flax():
    code = (
        "import sys, experiments.coinrun.game; "
        "sys.exit(any(m in sys.modules for m in ('procgen', 'gym', 'flax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@needs_game
def test_import_of_the_game_is_silent():
    code = "from experiments.coinrun.game import require_game; require_game()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_game
def test_library_actions_are_those_on_record():
    keys = game._library()(num=1, env_name="coinrun").get_combos()
    assert ["+".join(each).lower() or "none" for each in keys] == list(ACTIONS)


def drive(stream, steps, seed):
    """Everything that a stream shows while it runs to the right with jumps."""
    rng = np.random.default_rng(seed)
    seen = []
    for _ in range(steps):
        stream.act(np.where(rng.random(stream.num_envs) < 0.7, RIGHT_UP, 7))
        seen.append((*stream.observe(), stream.levels()))
    return [np.stack(each) for each in zip(*seen, strict=True)]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@needs_game
def test_level_stream_same_seed_same_frames_another_seed_others():
    runs = [
        drive(LevelStream(4, "easy", EXPERT_TRAIN_LEVELS, seed), 60, 0)
        for seed in (3, 3, 4)
    ]
    assert_same(runs[0], runs[1])
    rewards, frames, first, levels = runs[0]
    assert frames.dtype == np.uint8
    assert frames.shape == (60, 4, 64, 64, 3)
    assert not np.array_equal(levels, runs[2][3])
    assert all(level in EXPERT_TRAIN_LEVELS for level in levels.ravel().tolist())
    # What the rest of the code builds on: a reward only at an episode's end.
    assert set(np.unique(rewards)) <= {0.0, REWARD}
    assert first.any()
    assert not rewards[~first].any()


@needs_game
def test_level_stream_stays_within_its_levels_and_draws_all():
    levels = drive(LevelStream(8, "easy", range(5, 8), 0), 250, 0)[3]
    assert set(levels.ravel().tolist()) == {5, 6, 7}


@needs_game
def test_level_stream_modes_differ():
    easy, hard = (
        LevelStream(2, mode, range(5, 7), 0).observe().frames
        for mode in ("easy", "hard")
    )
    assert not np.array_equal(easy, hard)


@needs_game
@pytest.mark.parametrize("mode", ["easy", "hard"])
def test_level_stream_restore_goes_on_bit_for_bit(mode):
    stream = LevelStream(6, mode, EXPERT_TRAIN_LEVELS, 1)
    # Until an episode has just ended with a reward: that is part of what is saved.
    for seed in itertools.count():
        drive(stream, 1, seed)
        if stream.observe().rewards.any():
            break
    now, saved = stream.observe(), stream.save()
    assert saved.data.shape == (6, STATE_BYTES)
    after = drive(stream, 80, 2)
    assert after[2].any()
    other = LevelStream(6, mode, range(3), 9)
    drive(other, 5, 0)
    other.restore(saved)
    assert_same(other.observe(), now)
    assert_same(drive(other, 80, 2), after)
    stream.restore(saved)
    assert_same(drive(stream, 80, 2), after)


@needs_game
def test_level_stream_place_changes_one_environment_alone():
    stream = LevelStream(3, "easy", range(10), 0)
    drive(stream, 10, 0)
    before = stream.observe()
    stream.place(1, fresh_game(77, "easy"))
    frames = stream.observe().frames
    alone = LevelStream(1, "easy", range(77, 78), 5)
    np.testing.assert_array_equal(frames[1], alone.observe().frames[0])
    np.testing.assert_array_equal(frames[[0, 2]], before.frames[[0, 2]])
    assert stream.levels()[1] == 77


@needs_game
@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros(3, np.int32), r"actions must have the shape \(2,\), got \(3,\)"),
        (np.array([0, 15]), r"actions must be in \[0, 15\)"),
        (np.array([-1, 0]), r"actions must be in \[0, 15\)"),
    ],
)
def test_level_stream_act_wrong_actions_are_refused(actions, message):
    with pytest.raises(ValueError, match=message):
        LevelStream(2, "easy", range(3), 0).act(actions)


@pytest.mark.parametrize("levels", [range(-1, 3), range(3, 3), range(0, 9, 2)])
def test_level_stream_wrong_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels must be a range without gaps"):
        LevelStream(2, "easy", levels, 0)


def jump(turn):
    """A policy whose choice depends on the level and the step alone."""
    hash_ = (turn.levels * 31 + turn.steps * 17) % 10
    return np.where(hash_ < 7, RIGHT_UP, 7)


@needs_game
@pytest.mark.parametrize("slots", [1, 5, 64])
def test_play_each_level_once_whatever_the_slots(slots):
    levels = list(range(200, 212))
    turns = []

    def choose(turn):
        turns.append(turn)
        return jump(turn)

    episodes = list(play(levels, choose, "easy", slots))
    assert sorted(episode.level for episode in episodes) == levels
    assert 0 < sum(episode.solved for episode in episodes) < len(levels)
    for episode in episodes:
        assert episode.total_reward == REWARD * episode.solved
        assert 0 < episode.steps <= MAX_STEPS
    # Every frame of every level was shown, from the first on, and no other.
    shown = [
        (level, step)
        for turn in turns
        for level, step in zip(
            turn.levels[turn.active], turn.steps[turn.active], strict=True
        )
    ]
    expected = [(e.level, step) for e in episodes for step in range(e.steps)]
    assert sorted(shown) == sorted(expected)
    assert sorted(play(levels, jump, "easy", 3)) == sorted(episodes)


@needs_game
def test_play_shows_the_frames_of_the_level_alone():
    shown = []

    def choose(turn):
        shown.extend(
            turn.frames[i] for i in np.flatnonzero(turn.active & (turn.levels == 203))
        )
        return jump(turn)

    list(play(range(200, 206), choose, "easy", 2))
    alone = LevelStream(1, "easy", range(203, 204), 0)
    for step, frame in enumerate(shown):
        np.testing.assert_array_equal(frame, alone.observe().frames[0])
        alone.act(np.where((203 * 31 + np.array([step]) * 17) % 10 < 7, RIGHT_UP, 7))
    assert alone.observe().first[0]


@needs_game
def test_play_without_success_ends_after_the_most_steps():
    [episode] = play([5], lambda turn: np.full(len(turn.levels), 4), "easy")
    assert episode == (5, 0.0, False, MAX_STEPS)


@needs_game
def test_play_no_levels_is_nothing():
    assert list(play([], jump, "easy")) == []
