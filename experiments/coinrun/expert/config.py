"""Settings of the expert at CoinRun: PPO, its size, and its evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from experiments.coinrun.game import EVALUATION_LEVELS, GameMode
from experiments.common.choices import Preset
from experiments.common.cli import RunOptions
from experiments.common.validation import (
    require,
    require_at_least,
    require_kinds,
    require_non_negative,
    require_positive,
    require_seeds,
    require_share,
)

# Frames that a network takes at a time; XLA's CPU code is fastest where what a layer
# computes fits into the cache.
MICROBATCH = 64
MOST_EVALUATED = len(EVALUATION_LEVELS)
# Trained by the command expert with its default settings.
EXPERT = Path(__file__).parents[3] / "docs" / "results" / "coinrun" / "expert.npz"


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """Proximal policy optimisation (Schulman et al. 2017): the hyperparameters."""

    gamma: float = 0.999
    """Worth of a reward one step later."""
    gae_lambda: float = 0.95
    """Lambda of the generalised advantage estimate (Schulman et al. 2016)."""
    clip_eps: float = 0.2
    """Farthest that a probability ratio, or a value, gets credit for moving."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Gradients with a larger norm are shortened to it."""
    learning_rate: float = 5e-4
    """Adam's learning rate at the start; it falls linearly."""
    final_rate: float = 0.1
    """Share of the learning rate that is left at the end."""
    eps: float = 1e-5
    """Added to Adam's denominator."""
    update_epochs: int = 2
    """How often each frame is learnt from."""
    minibatch_size: int = 1024
    """Frames in a step of Adam."""

    def __post_init__(self) -> None:
        require_share(self, "gamma", "gae_lambda", "final_rate")
        require_positive(self, "clip_eps", "max_grad_norm", "learning_rate")
        require_non_negative(self, "vf_coef", "ent_coef", "eps")
        require_at_least(self, 1, "update_epochs", "minibatch_size")


@dataclasses.dataclass(frozen=True)
class ExpertConfig(PpoConfig):
    """Training of an expert."""

    # As the fields were called in runs that may go on and in files of settings.
    FORMER_NAMES: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "discount": "gamma",
            "gae_decay": "gae_lambda",
            "clip": "clip_eps",
            "value_weight": "vf_coef",
            "entropy_weight": "ent_coef",
            "max_gradient_norm": "max_grad_norm",
            "passes": "update_epochs",
            "environments": "num_envs",
            "steps": "num_steps",
        }
    )

    mode: GameMode = "easy"
    """Which levels CoinRun makes: easy or hard (the paper's)."""
    width: int = 16
    """Channels of the first convolution; the others have twice as many."""
    hidden: int = 256
    """Units of the dense layer."""
    frames: int = 16_777_216
    """Frames to train on, of all environments together: whole blocks."""
    num_envs: int = 128
    """Games at a time."""
    num_steps: int = 64
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
        require_kinds(self, mode=GameMode)
        require_at_least(
            self,
            1,
            "width",
            "hidden",
            "num_envs",
            "num_steps",
            "workers",
            "block",
            "checkpoint_every",
        )
        require_evaluation_levels("evaluation_levels", self.evaluation_levels)
        require_seeds(self, "seed")
        parts = self.workers
        require(
            "num_envs",
            self.num_envs,
            self.num_envs % parts == 0,
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
            f"a divisor of num_envs x num_steps ({self.update_frames})",
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
        return self.num_envs * self.num_steps

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
        require_seeds(self, "seed")


@dataclasses.dataclass(frozen=True)
class ExpertFileOptions(RunOptions):
    """Which expert, and where to write."""

    expert: Path | None = None
    """The expert's file, expert.npz of a run of the command expert; without it the one
    for easy levels that the repository has."""

    @property
    def expert_file(self) -> Path:
        """The file to use."""
        return self.expert or EXPERT


def require_evaluation_levels(field: str, levels: int) -> None:
    """Raises ValueError unless so many levels are set aside for evaluation."""
    good = 2 <= levels <= MOST_EVALUATED
    require(field, levels, good, f"between 2 and {MOST_EVALUATED}")


EXPERT_PRESETS: dict[Preset, ExpertConfig] = {
    "smoke": ExpertConfig(
        width=2,
        hidden=8,
        frames=512,
        num_envs=8,
        num_steps=16,
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
        num_envs=256,
        num_steps=128,
        block=4,
        minibatch_size=4096,
    ),
}
EVALUATE_PRESETS: dict[Preset, EvaluateConfig] = {
    "smoke": EvaluateConfig(levels=4),
    "cpu": EvaluateConfig(),
    "paper": EvaluateConfig(levels=MOST_EVALUATED),
}
