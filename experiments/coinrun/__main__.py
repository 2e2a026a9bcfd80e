"""`python -m experiments.coinrun`: an expert at a game, and its imitators."""

from __future__ import annotations

import sys
from typing import Any

from experiments.coinrun.expert.config import (
    EVALUATE_PRESETS,
    EXPERT_PRESETS,
    EvaluateConfig,
    ExpertConfig,
    ExpertFileOptions,
)
from experiments.coinrun.student.config import (
    DATASET_PRESETS,
    PLAY_PRESETS,
    RERUN_PRESETS,
    SEARCH_PRESETS,
    TRAIN_PRESETS,
    DataOptions,
    DatasetConfig,
    PlayConfig,
    PlayOptions,
    RerunConfig,
    RerunOptions,
    SearchConfig,
    SearchOptions,
    TrainConfig,
)
from experiments.common.cli import Command, Group, Invocation, RunOptions, main

# The commands are imported when they run: --help need not wait for JAX.


def expert(call: Invocation[ExpertConfig, RunOptions]) -> None:
    """Train an expert by PPO and compare it with simpler policies on unseen levels."""
    from experiments.coinrun.expert import commands

    commands.expert(call)


def evaluate(call: Invocation[EvaluateConfig, ExpertFileOptions]) -> None:
    """Compare a saved expert with simpler policies on unseen levels."""
    from experiments.coinrun.expert import commands

    commands.evaluate_expert(call)


def dataset(call: Invocation[DatasetConfig, ExpertFileOptions]) -> None:
    """Collect states and the expert's action probabilities from its own episodes."""
    from experiments.coinrun.student import commands

    commands.dataset(call)


def train(call: Invocation[TrainConfig, DataOptions]) -> None:
    """Train one student to imitate the expert."""
    from experiments.coinrun.student import commands

    commands.train(call)


def play(call: Invocation[PlayConfig, PlayOptions]) -> None:
    """Let a trained student and the expert play the same unseen levels."""
    from experiments.coinrun.student import commands

    commands.play(call)


def search(call: Invocation[SearchConfig, SearchOptions]) -> None:
    """Search the settings of both optimizers; table 3, figure 18 and the ten best."""
    from experiments.coinrun.student import commands

    commands.search(call)


def rerun(call: Invocation[RerunConfig, RerunOptions]) -> None:
    """Train the best settings of a search again, with seeds that it has not seen."""
    from experiments.coinrun.student.rerun import rerun as run

    run(call)


COMMANDS: dict[str, Command[Any, Any] | Group] = {
    "expert": Command(EXPERT_PRESETS, RunOptions, expert),
    "evaluate": Command(EVALUATE_PRESETS, ExpertFileOptions, evaluate),
    "dataset": Command(DATASET_PRESETS, ExpertFileOptions, dataset),
    "train": Command(TRAIN_PRESETS, DataOptions, train),
    "play": Command(PLAY_PRESETS, PlayOptions, play),
    "search": Command(SEARCH_PRESETS, SearchOptions, search),
    "rerun": Command(RERUN_PRESETS, RerunOptions, rerun),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.coinrun", COMMANDS, sys.argv[1:]))
