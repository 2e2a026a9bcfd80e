"""`python -m experiments.synthetic`: averaging memorises, the AND-mask does not."""

from __future__ import annotations

import sys
from typing import Any

from experiments.common.cli import (
    Command,
    FigureOptions,
    Group,
    RunOptions,
    SearchOptions,
    WorkerOptions,
    later,
    main,
)
from experiments.synthetic.config import (
    CONSISTENCY_PRESETS,
    CORRELATIONS_PRESETS,
    ENVS_PRESETS,
    PLACEMENT_PRESETS,
    PRESETS,
    SEARCH_PRESETS,
    SELECTED_PRESETS,
    CompareConfig,
    RerunConfig,
    TrainConfig,
)

HERE = "experiments.synthetic.commands"

FIGURES: dict[str, Command[Any, Any]] = {
    "6": later(
        f"{HERE}:selected_figure",
        "Accuracies of all methods with their chosen settings, as bars.",
        SELECTED_PRESETS,
        FigureOptions,
        6,
    ),
    "7": later(
        f"{HERE}:correlations_figure",
        "Masked gradients beside those of the mechanism and of the shortcuts.",
        CORRELATIONS_PRESETS,
        FigureOptions,
    ),
    "14": later(
        f"{HERE}:selected_figure",
        "Learning curves of all methods with their chosen settings; the runs of 6.",
        SELECTED_PRESETS,
        FigureOptions,
        14,
    ),
    "15": later(
        f"{HERE}:envs_figure",
        "Accuracy against the number of training environments.",
        ENVS_PRESETS,
        FigureOptions,
    ),
}
COMMANDS: dict[str, Command[Any, Any] | Group] = {
    "train": later(
        f"{HERE}:train",
        "Train one method on one seed.",
        {name: TrainConfig(**values) for name, values in PRESETS.items()},
        RunOptions,
    ),
    "compare": later(
        f"{HERE}:compare",
        "Train several methods on the same data; print a table and draw the figure.",
        {name: CompareConfig(**values) for name, values in PRESETS.items()},
        RunOptions,
    ),
    "rerun": later(
        f"{HERE}:rerun",
        "Train one method on many seeds; each result is what `train --seed` gives.",
        {name: RerunConfig(**values) for name, values in PRESETS.items()},
        WorkerOptions,
    ),
    "search": later(
        f"{HERE}:search",
        "Search the settings of a method; see what each rule of selection chooses.",
        SEARCH_PRESETS,
        SearchOptions,
    ),
    "consistency": later(
        f"{HERE}:consistency",
        "Search for the inconsistency of what training finds; estimate the ILC.",
        CONSISTENCY_PRESETS,
        FigureOptions,
    ),
    "placement": later(
        f"{HERE}:placement",
        "Let the AND-mask act on gradients, on moments or on updates; print a table.",
        PLACEMENT_PRESETS,
        WorkerOptions,
    ),
    "figure": Group("Draw figure 6, 7, 14 or 15 of the paper.", FIGURES),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.synthetic", COMMANDS, sys.argv[1:]))
