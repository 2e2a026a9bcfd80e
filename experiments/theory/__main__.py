"""`python -m experiments.theory`: the paper's arguments, drawn and checked."""

from __future__ import annotations

import sys
from typing import Any

from experiments.common.cli import Command, Group, Invocation, RunOptions, main
from experiments.theory.config import (
    DESCENT_PRESETS,
    LANDSCAPES_PRESETS,
    MEANS_PRESETS,
    NORMS_PRESETS,
    PAIRS_PRESETS,
    REGRESSION_PRESETS,
    STAIRCASE_PRESETS,
    DescentConfig,
    LandscapesConfig,
    MeansConfig,
    NormsConfig,
    PairsConfig,
    RegressionConfig,
    StaircaseConfig,
)

# The commands are imported when they run: --help need not wait for JAX.


def figure_1(call: Invocation[LandscapesConfig, RunOptions]) -> None:
    """A consistent minimum, a patchwork one, and which of them descent reaches."""
    from experiments.theory import commands

    commands.draw_landscapes(call)


def figure_3(call: Invocation[MeansConfig, RunOptions]) -> None:
    """Two Hessians, their arithmetic and their geometric mean, as ellipses."""
    from experiments.theory import commands

    commands.draw_means(call)


def figure_4(call: Invocation[NormsConfig, RunOptions]) -> None:
    """Norms of averaged and of masked noise against the number of environments."""
    from experiments.theory import commands

    commands.draw_norms(call)


def figure_10(call: Invocation[StaircaseConfig, RunOptions]) -> None:
    """Two sigmoids that fit a staircase as a patchwork."""
    from experiments.theory import commands

    commands.draw_staircase(call)


def figure_11(call: Invocation[PairsConfig, RunOptions]) -> None:
    """Pairs of quadratic landscapes, their inconsistency and its bound."""
    from experiments.theory import commands

    commands.draw_pairs(call)


def figure_12(call: Invocation[MeansConfig, RunOptions]) -> None:
    """Figure 3 under its number in the paper's appendix."""
    from experiments.theory import commands

    commands.draw_means(call)


def regression(call: Invocation[RegressionConfig, RunOptions]) -> None:
    """Four examples, each an environment: which weights three methods find."""
    from experiments.theory import commands

    commands.run_regression(call)


def descent(call: Invocation[DescentConfig, RunOptions]) -> None:
    """Masked gradient descent beside the rate of the paper's proposition 1."""
    from experiments.theory import commands

    commands.run_descent(call)


FIGURES: dict[str, Command[Any, Any]] = {
    "1": Command(LANDSCAPES_PRESETS, RunOptions, figure_1),
    "3": Command(MEANS_PRESETS, RunOptions, figure_3),
    "4": Command(NORMS_PRESETS, RunOptions, figure_4),
    "10": Command(STAIRCASE_PRESETS, RunOptions, figure_10),
    "11": Command(PAIRS_PRESETS, RunOptions, figure_11),
    "12": Command(MEANS_PRESETS, RunOptions, figure_12),
}
COMMANDS: dict[str, Command[Any, Any] | Group] = {
    "figure": Group("Draw figure 1, 3, 4, 10, 11 or 12 of the paper.", FIGURES),
    "regression": Command(REGRESSION_PRESETS, RunOptions, regression),
    "descent": Command(DESCENT_PRESETS, RunOptions, descent),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.theory", COMMANDS, sys.argv[1:]))
