"""Settings of the expert at CoinRun: PPO, its size, and its evaluation."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from experiments.common.choices import Preset
from experiments.common.validation import require, require_choice, require_seed

GameMode = Literal["easy", "hard"]

# Frames that a network takes at a time; XLA's CPU code is fastest where what a layer
# computes fits into the cache.
MICROBATCH = 64
# Levels that are reserved for evaluation.
MOST_EVALUATED = 10_000


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """Proximal policy optimisation (Schulman et al. 2017): the hyperparameters."""

    discount: float = 0.999
    """Worth of a reward one step later."""
    gae_decay: float = 0.95
    """Lambda of the generalised advantage estimate (Schulman et al. 2016)."""
    clip: float = 0.2
    """Farthest that a probability ratio, or a value, gets credit for moving."""
    value_weight: float = 0.5
    """Weight of the value loss."""
    entropy_weight: float = 0.01
    """Weight of the entropy bonus."""
    max_gradient_norm: float = 0.5
    """Gradients with a larger norm are shortened to it."""
    learning_rate: float = 5e-4
    """Adam's learning rate at the start; it falls linearly."""
    final_rate: float = 0.1
    """Share of the learning rate that is left at the end."""
    eps: float = 1e-5
    """Added to Adam's denominator."""
    passes: int = 2
    """How often each frame is learnt from."""
    minibatch_size: int = 1024
    """Frames in a step of Adam."""

    def __post_init__(self) -> None:
        for field in ("discount", "gae_decay", "final_rate"):
            value = getattr(self, field)
            require(field, value, 0 <= value <= 1, "in [0, 1]")
        for field in ("clip", "max_gradient_norm", "learning_rate"):
            value = getattr(self, field)
            require(field, value, 0 < value < math.inf, "positive and finite")
        for field in ("value_weight", "entropy_weight", "eps"):
            value = getattr(self, field)
            require(field, value, 0 <= value < math.inf, "non-negative and finite")
        for field in ("passes", "minibatch_size"):
            value = getattr(self, field)
            require(field, value, value >= 1, "at least 1")


@dataclasses.dataclass(frozen=True)
class ExpertConfig(PpoConfig):
    """Training of an expert."""

    mode: GameMode = "easy"
    """Which levels CoinRun makes: easy or hard (the paper's)."""
    width: int = 16
    """Channels of the first convolution; the others have twice as many."""
    hidden: int = 256
    """Units of the dense layer."""
    frames: int = 16_777_216
    """Frames to train on, of all environments together: whole blocks."""
    environments: int = 128
    """Games at a time."""
    steps: int = 64
    """Steps of each game between two updates."""
    workers: int = 2
    """Threads, each with its part of the games and of every minibatch."""
    block: int = 8
    """Updates that make one row of metrics.csv."""
    checkpoint_every: int = 8
    """Blocks between checkpoints."""
    evaluation_levels: int = 1000
    """Unseen levels for the evaluation at the end."""
    seed: int = 0
    """Seed of levels, initial weights, actions and the order of frames."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("mode", self.mode, get_args(GameMode))
        for field in (
            "width",
            "hidden",
            "environments",
            "steps",
            "workers",
            "block",
            "checkpoint_every",
        ):
            value = getattr(self, field)
            require(field, value, value >= 1, "at least 1")
        require_evaluation_levels("evaluation_levels", self.evaluation_levels)
        require_seed("seed", self.seed)
        parts = self.workers
        require(
            "environments",
            self.environments,
            self.environments % parts == 0,
            f"a multiple of workers ({parts})",
        )
        require(
            "minibatch_size",
            self.minibatch_size,
            self.minibatch_size % (parts * MICROBATCH) == 0,
            f"a multiple of {MICROBATCH} for each of {parts} workers",
        )
        require(
            "minibatch_size",
            self.minibatch_size,
            self.update_frames % self.minibatch_size == 0,
            f"a divisor of environments x steps ({self.update_frames})",
        )
        require(
            "frames",
            self.frames,
            self.frames > 0 and self.frames % self.block_frames == 0,
            f"a positive multiple of a block's frames ({self.block_frames})",
        )

    @property
    def update_frames(self) -> int:
        """Frames between two updates."""
        return self.environments * self.steps

    @property
    def block_frames(self) -> int:
        """Frames of a row of metrics.csv."""
        return self.update_frames * self.block

    @property
    def blocks(self) -> int:
        """Rows of metrics.csv."""
        return self.frames // self.block_frames


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of a saved expert."""

    levels: int = 1000
    """Unseen levels that each policy plays once."""
    seed: int = 0
    """Seed of what policies draw."""

    def __post_init__(self) -> None:
        require_evaluation_levels("levels", self.levels)
        require_seed("seed", self.seed)


def require_evaluation_levels(field: str, levels: int) -> None:
    """Raises ValueError unless so many levels are set aside for evaluation."""
    good = 2 <= levels <= MOST_EVALUATED
    require(field, levels, good, f"between 2 and {MOST_EVALUATED}")


EXPERT_PRESETS: dict[Preset, ExpertConfig] = {
    "smoke": ExpertConfig(
        width=2,
        hidden=8,
        frames=512,
        environments=8,
        steps=16,
        block=2,
        minibatch_size=128,
        checkpoint_every=1,
        evaluation_levels=4,
    ),
    "cpu": ExpertConfig(),
    "paper": ExpertConfig(
        mode="hard",
        width=32,
        hidden=512,
        frames=400_031_744,
        environments=256,
        steps=128,
        block=4,
        minibatch_size=4096,
    ),
}
EVALUATE_PRESETS: dict[Preset, EvaluateConfig] = {
    "smoke": EvaluateConfig(levels=4),
    "cpu": EvaluateConfig(),
    "paper": EvaluateConfig(levels=MOST_EVALUATED),
}
