"""`python -m experiments.vision`: the AND-mask does not memorise random labels."""

from __future__ import annotations

import sys
from typing import Any

from experiments.common.cli import Command, Group, Invocation, main
from experiments.vision.config import (
    BATCH_NORM_PRESETS,
    COST_PRESETS,
    LABEL_NOISE_PRESETS,
    MEMORIZE_PRESETS,
    BatchNormConfig,
    CostConfig,
    LabelNoiseConfig,
    MemorizeConfig,
)
from experiments.vision.options import VisionOptions

# The commands are imported when they run: --help need not wait for JAX.


def memorize(call: Invocation[MemorizeConfig, VisionOptions]) -> None:
    """Train at several thresholds on random and on true labels; figures 8 and 16."""
    from experiments.vision import commands

    commands.memorize(call)


def label_noise(call: Invocation[LabelNoiseConfig, VisionOptions]) -> None:
    """Train with and without the mask on partly wrong labels; figure 9."""
    from experiments.vision import commands

    commands.label_noise(call)


def batch_norm(call: Invocation[BatchNormConfig, VisionOptions]) -> None:
    """Compare the readings of a gradient behind batch norm, on one batch."""
    from experiments.vision import batch_norm

    batch_norm.run(call)


def cost(call: Invocation[CostConfig, VisionOptions]) -> None:
    """Time epochs with and without the mask, side by side."""
    from experiments.vision import cost

    cost.run(call)


def figure_8(call: Invocation[MemorizeConfig, VisionOptions]) -> None:
    """Final accuracies against the threshold; the runs of memorize."""
    from experiments.vision import commands

    commands.figure(call, 8)


def figure_9(call: Invocation[LabelNoiseConfig, VisionOptions]) -> None:
    """Learning curves with partly wrong labels; the runs of label-noise."""
    from experiments.vision import commands

    commands.figure(call, 9)


def figure_16(call: Invocation[MemorizeConfig, VisionOptions]) -> None:
    """Learning curves at every threshold; the runs of memorize."""
    from experiments.vision import commands

    commands.figure(call, 16)


FIGURES: dict[str, Command[Any, Any]] = {
    "8": Command(MEMORIZE_PRESETS, VisionOptions, figure_8),
    "9": Command(LABEL_NOISE_PRESETS, VisionOptions, figure_9),
    "16": Command(MEMORIZE_PRESETS, VisionOptions, figure_16),
}
COMMANDS: dict[str, Command[Any, Any] | Group] = {
    "memorize": Command(MEMORIZE_PRESETS, VisionOptions, memorize),
    "label-noise": Command(LABEL_NOISE_PRESETS, VisionOptions, label_noise),
    "batch-norm": Command(BATCH_NORM_PRESETS, VisionOptions, batch_norm),
    "cost": Command(COST_PRESETS, VisionOptions, cost),
    "figure": Group("Draw figure 8, 9 or 16 of the paper.", FIGURES),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.vision", COMMANDS, sys.argv[1:]))
