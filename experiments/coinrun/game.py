"""CoinRun from procgen2: an endless stream of levels, and given levels once each.

A level is known by its seed and is the same whatever else the game does. The ranges
of seeds below keep apart what must not be seen twice.

Source: Cobbe et al. 2020, https://github.com/openai/procgen, in the package procgen2.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.common.run_dir import RunDirError

GameMode = Literal["easy", "hard"]

FRAME = (64, 64, 3)
REWARD = 10.0
"""Worth of the coin; an episode ends there, and no other step gives anything."""
MAX_STEPS = 1000
"""Steps after which an episode ends without success."""

# Keys of each action. The last six are for other games: CoinRun does nothing then.
ACTIONS = (
    "left+down",
    "left",
    "left+up",
    "down",
    "none",
    "up",
    "right+down",
    "right",
    "right+up",
    "d",
    "a",
    "w",
    "s",
    "q",
    "e",
)
NUM_ACTIONS = len(ACTIONS)
RIGHT = ACTIONS.index("right")
RIGHT_UP = ACTIONS.index("right+up")

STUDENT_TRAIN_LEVELS = range(64)
STUDENT_TEST_LEVELS = range(10_000, 12_000)
EVALUATION_LEVELS = range(100_000, 110_000)
EXPERT_TRAIN_LEVELS = range(1_000_000, 2**31 - 1)

MAX_SLOTS = 64
# Room for a saved game; those of hard levels take up to some 60 KB.
STATE_BYTES = 2**17


class GameError(RunDirError):
    """The game cannot be used; the message says the mend."""


class Observation(NamedTuple):
    """The view of all environments after a step.

    `rewards` float32 [n] of the step before; `frames` uint8 [n, 64, 64, 3]; `first`
    bool [n], where a frame is the first of an episode.
    """

    rewards: np.ndarray
    frames: np.ndarray
    first: np.ndarray


class SavedGames(NamedTuple):
    """The whole state of n games.

    `data` uint8 [n, STATE_BYTES], zeros after the end; `lengths` int32 [n].
    """

    data: np.ndarray
    lengths: np.ndarray


@functools.cache
def _library() -> Any:
    """Procgen's environment class.

    Raises:
      GameError: it is not installed, or not for this platform.
    """
    try:
        # gym says on import that it is unmaintained, on stderr, and warns besides.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            from procgen import ProcgenGym3Env
    except (ImportError, OSError, AssertionError) as error:
        raise GameError(
            f"CoinRun cannot be imported ({error}): install it with `make coinrun`, "
            "which needs Python 3.11 on Linux (x86-64); all other experiments do "
            "without it"
        ) from error
    return ProcgenGym3Env


def require_game() -> None:
    """Raises GameError unless the game can be used."""
    _library()


class LevelStream:
    """Environments that go from one level of a range to another, at random, forever.

    Args:
      num_envs: how many games, n.
      mode: easy or hard.
      levels: range of seeds from which levels are drawn.
      seed: what is drawn depends on it alone.

    Raises:
      GameError: the game is not installed.
    """

    def __init__(self, num_envs: int, mode: GameMode, levels: range, seed: int):
        if not 0 <= levels.start < levels.stop <= 2**31 - 1 or levels.step != 1:
            raise ValueError(
                f"levels must be a range without gaps in [0, 2**31 - 1), got {levels!r}"
            )
        self.num_envs = num_envs
        with warnings.catch_warnings():
            # gym3 leaves some conversions of types to NumPy.
            warnings.simplefilter("ignore")
            self._games = _library()(
                num=num_envs,
                env_name="coinrun",
                distribution_mode=mode,
                start_level=levels.start,
                num_levels=len(levels),
                rand_seed=seed,
                num_threads=0,
            )

    def observe(self) -> Observation:
        """The present view."""
        rewards, frames, first = self._games.observe()
        return Observation(rewards, frames["rgb"], first)

    def act(self, actions: np.ndarray) -> None:
        """Makes one step in each environment.

        Args:
          actions: int [n], indices in `ACTIONS`.
        """
        if actions.shape != (self.num_envs,):
            raise ValueError(
                f"actions must have the shape ({self.num_envs},), got {actions.shape}"
            )
        if actions.min() < 0 or actions.max() >= len(ACTIONS):
            raise ValueError(f"actions must be in [0, {len(ACTIONS)}), got {actions}")
        self._games.act(actions)

    def levels(self) -> np.ndarray:
        """Seed int64 [n] of the level in each environment."""
        return np.array([info["level_seed"] for info in self._games.get_info()], int)

    def save(self) -> SavedGames:
        """All that the games depend on, the observation included."""
        data = np.zeros((self.num_envs, STATE_BYTES), np.uint8)
        states = self._games.get_state()
        for row, state in zip(data, states, strict=True):
            if len(state) > STATE_BYTES:
                raise GameError(
                    f"a saved game has {len(state)} bytes, more than {STATE_BYTES}: "
                    "increase STATE_BYTES in experiments/coinrun/game.py"
                )
            row[: len(state)] = np.frombuffer(state, np.uint8)
        return SavedGames(data, np.array([len(state) for state in states], np.int32))

    def restore(self, saved: SavedGames) -> None:
        """Goes on from what `save` returned, here or in another stream."""
        rows = zip(np.asarray(saved.data), np.asarray(saved.lengths), strict=True)
        self._games.set_state([row[:length].tobytes() for row, length in rows])

    def place(self, environment: int, saved: bytes) -> None:
        """Puts one saved game into one environment; the others are not touched."""
        self._games.call_c_func("set_state", environment, saved, len(saved))

    def close(self) -> None:
        """Lets go of the games."""
        self._games.close()


def fresh_game(level: int, mode: GameMode) -> bytes:
    """The saved game of a level before its first step, for `LevelStream.place`."""
    stream = LevelStream(1, mode, range(level, level + 1), 0)
    try:
        saved: bytes = stream._games.get_state()[0]
    finally:
        stream.close()
    return saved


class Turn(NamedTuple):
    """Games that wait for actions, one in each slot.

    `frames` uint8 [slot, 64, 64, 3]; `levels` int64 [slot], seeds; `steps` int64
    [slot], from 0 in each episode; `active` bool [slot]: False where no level is left,
    and whatever is done there is no matter.
    """

    frames: np.ndarray
    levels: np.ndarray
    steps: np.ndarray
    active: np.ndarray


# Actions int [slot] for a turn.
Choose = Callable[[Turn], np.ndarray]


class Episode(NamedTuple):
    """One level, played once to the end."""

    level: int
    total_reward: float
    solved: bool
    steps: int


def play(
    levels: Sequence[int], choose: Choose, mode: GameMode, slots: int = MAX_SLOTS
) -> Iterator[Episode]:
    """Plays each level once, several at a time.

    What happens in a level depends on the actions alone, not on its slot. So a policy
    that draws from (level, step) plays the same whatever the number of slots.

    Args:
      levels: their seeds.
      choose: the policy. It may record what it sees; the arrays are its to keep.
      mode: easy or hard.
      slots: the most levels at a time.

    Yields:
      Each episode when it ends.
    """
    slots = min(slots, len(levels))
    if slots < 1:
        return
    waiting = iter(levels)
    held = np.array([next(waiting) for _ in range(slots)], np.int64)
    steps = np.zeros(slots, np.int64)
    totals = np.zeros(slots)
    active = np.ones(slots, bool)
    stream = LevelStream(slots, mode, range(1), 0)
    with contextlib.closing(stream):
        for slot in range(slots):
            stream.place(slot, fresh_game(int(held[slot]), mode))
        frames = stream.observe().frames
        while active.any():
            turn = Turn(frames, held.copy(), steps.copy(), active.copy())
            stream.act(np.asarray(choose(turn)))
            rewards, frames, first = stream.observe()
            steps += active
            totals += rewards
            ended = np.flatnonzero(first & active).tolist()
            for slot in ended:
                total = float(totals[slot])
                yield Episode(int(held[slot]), total, total > 0, int(steps[slot]))
                after = next(waiting, None)
                if after is None:
                    active[slot] = False
                    continue
                held[slot], steps[slot], totals[slot] = after, 0, 0
                stream.place(slot, fresh_game(int(after), mode))
            if ended:
                frames = stream.observe().frames
