"""`python -m experiments.vision`: the AND-mask does not memorise random labels."""

from __future__ import annotations

import sys
from typing import Any

from experiments.common.cli import Command, Group, later, main
from experiments.vision.config import (
    BATCH_NORM_PRESETS,
    COST_PRESETS,
    LABEL_NOISE_PRESETS,
    MEMORIZE_PRESETS,
    VisionOptions,
)

HERE = "experiments.vision.commands"

FIGURES: dict[str, Command[Any, Any]] = {
    "8": later(
        f"{HERE}:figure",
        "Final accuracies against the threshold; the runs of memorize, trained if "
        "missing.",
        MEMORIZE_PRESETS,
        VisionOptions,
        8,
    ),
    "9": later(
        f"{HERE}:figure",
        "Learning curves with partly wrong labels; the runs of label-noise, trained if "
        "missing.",
        LABEL_NOISE_PRESETS,
        VisionOptions,
        9,
    ),
    "16": later(
        f"{HERE}:figure",
        "Learning curves at every threshold; the runs of memorize, trained if missing.",
        MEMORIZE_PRESETS,
        VisionOptions,
        16,
    ),
}
COMMANDS: dict[str, Command[Any, Any] | Group] = {
    "memorize": later(
        f"{HERE}:memorize",
        "Train at several thresholds on random and on true labels; figures 8 and 16.",
        MEMORIZE_PRESETS,
        VisionOptions,
    ),
    "label-noise": later(
        f"{HERE}:label_noise",
        "Train with and without the mask on partly wrong labels; figure 9.",
        LABEL_NOISE_PRESETS,
        VisionOptions,
    ),
    "batch-norm": later(
        "experiments.vision.batch_norm:run",
        "Compare the readings of a gradient behind batch norm, on one batch.",
        BATCH_NORM_PRESETS,
        VisionOptions,
    ),
    "cost": later(
        "experiments.vision.cost:run",
        "Time epochs with and without the mask, side by side.",
        COST_PRESETS,
        VisionOptions,
    ),
    "figure": Group("Draw figure 8, 9 or 16 of the paper.", FIGURES),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.vision", COMMANDS, sys.argv[1:]))
