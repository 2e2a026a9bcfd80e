"""`python -m experiments.coinrun`: learn from an expert at a game."""

from __future__ import annotations

import sys
from typing import Any

from experiments.coinrun.config import (
    EVALUATE_PRESETS,
    EXPERT_PRESETS,
    EvaluateConfig,
    ExpertConfig,
)
from experiments.coinrun.options import EvaluateOptions
from experiments.common.cli import Command, Group, Invocation, RunOptions, main

# The commands are imported when they run: --help need not wait for JAX.


def expert(call: Invocation[ExpertConfig, RunOptions]) -> None:
    """Train an expert by PPO and compare it with simpler policies on unseen levels."""
    from experiments.coinrun import commands

    commands.expert(call)


def evaluate(call: Invocation[EvaluateConfig, EvaluateOptions]) -> None:
    """Compare a saved expert with simpler policies on unseen levels."""
    from experiments.coinrun import commands

    commands.evaluate_expert(call)


COMMANDS: dict[str, Command[Any, Any] | Group] = {
    "expert": Command(EXPERT_PRESETS, RunOptions, expert),
    "evaluate": Command(EVALUATE_PRESETS, EvaluateOptions, evaluate),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.coinrun", COMMANDS, sys.argv[1:]))
