"""`python -m experiments.theory`: the paper's arguments, drawn and checked."""

from __future__ import annotations

import sys
from typing import Any

from experiments.common.cli import Command, Group, RunOptions, later, main
from experiments.theory.config import (
    DESCENT_PRESETS,
    LANDSCAPES_PRESETS,
    MEANS_PRESETS,
    NORMS_PRESETS,
    PAIRS_PRESETS,
    REGRESSION_PRESETS,
    STAIRCASE_PRESETS,
)

RUN = "experiments.theory.commands:run"

FIGURES: dict[str, Command[Any, Any]] = {
    "1": later(
        RUN,
        "A consistent minimum, a patchwork one, and which of them descent reaches.",
        LANDSCAPES_PRESETS,
        RunOptions,
        "figure1",
    ),
    "3": later(
        RUN,
        "Two Hessians, their arithmetic and their geometric mean, as ellipses.",
        MEANS_PRESETS,
        RunOptions,
        "figure3",
    ),
    "4": later(
        RUN,
        "Norms of averaged and of masked noise against the number of environments.",
        NORMS_PRESETS,
        RunOptions,
        "figure4",
    ),
    "10": later(
        RUN,
        "Two sigmoids that fit a staircase as a patchwork.",
        STAIRCASE_PRESETS,
        RunOptions,
        "figure10",
    ),
    "11": later(
        RUN,
        "Pairs of quadratic landscapes, their inconsistency and its bound.",
        PAIRS_PRESETS,
        RunOptions,
        "figure11",
    ),
    "12": later(
        RUN,
        "Figure 3 under its number in the paper's appendix.",
        MEANS_PRESETS,
        RunOptions,
        "figure3",
    ),
}
COMMANDS: dict[str, Command[Any, Any] | Group] = {
    "figure": Group("Draw figure 1, 3, 4, 10, 11 or 12 of the paper.", FIGURES),
    "regression": later(
        RUN,
        "Four examples, each an environment: which weights three methods find.",
        REGRESSION_PRESETS,
        RunOptions,
        "regression",
    ),
    "descent": later(
        RUN,
        "Masked gradient descent beside the rate of the paper's proposition 1.",
        DESCENT_PRESETS,
        RunOptions,
        "descent",
    ),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.theory", COMMANDS, sys.argv[1:]))
