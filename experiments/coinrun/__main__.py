"""`python -m experiments.coinrun`: an expert at a game, and its imitators."""

from __future__ import annotations

import sys
from typing import Any

from experiments.coinrun.expert.config import (
    EVALUATE_PRESETS,
    EXPERT_PRESETS,
    ExpertFileOptions,
)
from experiments.coinrun.student.config import (
    DATASET_PRESETS,
    PLAY_PRESETS,
    RERUN_PRESETS,
    SEARCH_PRESETS,
    TRAIN_PRESETS,
    DataOptions,
    PlayOptions,
    RerunOptions,
    SearchOptions,
)
from experiments.common.cli import Command, Group, RunOptions, later, main

EXPERT = "experiments.coinrun.expert.commands"
STUDENT = "experiments.coinrun.student.commands"

COMMANDS: dict[str, Command[Any, Any] | Group] = {
    "expert": later(
        f"{EXPERT}:expert",
        "Train an expert by PPO and compare it with simpler policies on unseen levels.",
        EXPERT_PRESETS,
        RunOptions,
    ),
    "evaluate": later(
        f"{EXPERT}:evaluate_expert",
        "Compare a saved expert with simpler policies on unseen levels.",
        EVALUATE_PRESETS,
        ExpertFileOptions,
    ),
    "dataset": later(
        f"{STUDENT}:dataset",
        "Collect states and the expert's action probabilities from its own episodes.",
        DATASET_PRESETS,
        ExpertFileOptions,
    ),
    "train": later(
        f"{STUDENT}:train",
        "Train one student to imitate the expert.",
        TRAIN_PRESETS,
        DataOptions,
    ),
    "play": later(
        f"{STUDENT}:play",
        "Let a trained student and the expert play the same unseen levels.",
        PLAY_PRESETS,
        PlayOptions,
    ),
    "search": later(
        f"{STUDENT}:search",
        "Search the settings of both optimizers; table 3, figure 18 and the ten best.",
        SEARCH_PRESETS,
        SearchOptions,
    ),
    "rerun": later(
        "experiments.coinrun.student.rerun:rerun",
        "Train the best settings of a search again, with seeds that it has not seen.",
        RERUN_PRESETS,
        RerunOptions,
    ),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.coinrun", COMMANDS, sys.argv[1:]))
