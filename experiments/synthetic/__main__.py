"""`python -m experiments.synthetic`: averaging memorises, the AND-mask does not."""

from __future__ import annotations

import sys
from typing import Any

from experiments.common.cli import (
    Command,
    FigureOptions,
    Group,
    Invocation,
    RunOptions,
    WorkerOptions,
    main,
)
from experiments.synthetic.config import (
    CONSISTENCY_PRESETS,
    CORRELATIONS_PRESETS,
    ENVS_PRESETS,
    PRESETS,
    SEARCH_PRESETS,
    SELECTED_PRESETS,
    CompareConfig,
    ConsistencyConfig,
    CorrelationsConfig,
    EnvsConfig,
    RerunConfig,
    SearchConfig,
    SearchOptions,
    SelectedConfig,
    TrainConfig,
)

# The commands are imported when they run: --help need not wait for JAX.


def train(call: Invocation[TrainConfig, RunOptions]) -> None:
    """Train one method on one seed."""
    from experiments.synthetic import commands

    commands.train(call)


def compare(call: Invocation[CompareConfig, RunOptions]) -> None:
    """Train several methods on the same data; print a table and draw the figure."""
    from experiments.synthetic import commands

    commands.compare(call)


def rerun(call: Invocation[RerunConfig, WorkerOptions]) -> None:
    """Train one method on many seeds; each result is what `train --seed` gives."""
    from experiments.synthetic import commands

    commands.rerun(call)


def search(call: Invocation[SearchConfig, SearchOptions]) -> None:
    """Search the settings of a method; see what each rule of selection chooses."""
    from experiments.synthetic import commands

    commands.search(call)


def consistency(call: Invocation[ConsistencyConfig, FigureOptions]) -> None:
    """Search for the inconsistency of what training finds; estimate the ILC."""
    from experiments.synthetic import commands

    commands.consistency(call)


def figure_6(call: Invocation[SelectedConfig, FigureOptions]) -> None:
    """Accuracies of all methods with their chosen settings, as bars."""
    from experiments.synthetic import commands

    commands.selected_figure(call, 6)


def figure_7(call: Invocation[CorrelationsConfig, FigureOptions]) -> None:
    """Masked gradients beside those of the mechanism and of the shortcuts."""
    from experiments.synthetic import commands

    commands.correlations_figure(call)


def figure_14(call: Invocation[SelectedConfig, FigureOptions]) -> None:
    """Learning curves of all methods with their chosen settings; the runs of 6."""
    from experiments.synthetic import commands

    commands.selected_figure(call, 14)


def figure_15(call: Invocation[EnvsConfig, FigureOptions]) -> None:
    """Accuracy against the number of training environments."""
    from experiments.synthetic import commands

    commands.envs_figure(call)


FIGURES: dict[str, Command[Any, Any]] = {
    "6": Command(SELECTED_PRESETS, FigureOptions, figure_6),
    "7": Command(
        CORRELATIONS_PRESETS,
        FigureOptions,
        figure_7,
    ),
    "14": Command(SELECTED_PRESETS, FigureOptions, figure_14),
    "15": Command(ENVS_PRESETS, FigureOptions, figure_15),
}
COMMANDS: dict[str, Command[Any, Any] | Group] = {
    "train": Command(
        {name: TrainConfig(**values) for name, values in PRESETS.items()},
        RunOptions,
        train,
    ),
    "compare": Command(
        {name: CompareConfig(**values) for name, values in PRESETS.items()},
        RunOptions,
        compare,
    ),
    "rerun": Command(
        {name: RerunConfig(**values) for name, values in PRESETS.items()},
        WorkerOptions,
        rerun,
    ),
    "search": Command(SEARCH_PRESETS, SearchOptions, search),
    "consistency": Command(CONSISTENCY_PRESETS, FigureOptions, consistency),
    "figure": Group("Draw figure 6, 7, 14 or 15 of the paper.", FIGURES),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.synthetic", COMMANDS, sys.argv[1:]))
