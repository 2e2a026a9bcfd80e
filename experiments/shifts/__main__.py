"""`python -m experiments.shifts`: which rule helps on which shift."""

from __future__ import annotations

import sys
from typing import Any

from experiments.common.cli import (
    Command,
    FigureOptions,
    Group,
    WorkerOptions,
    later,
    main,
)
from experiments.shifts.config import (
    LINEAR_CHOOSE_PRESETS,
    LINEAR_PRESETS,
    SPIRALS_CHOOSE_PRESETS,
    SPIRALS_PRESETS,
)

HERE = "experiments.shifts.commands"

COMMANDS: dict[str, Command[Any, Any] | Group] = {
    "linear-choose": later(
        f"{HERE}:linear_choose",
        "Choose a setting for each method on the linear unit tests.",
        LINEAR_CHOOSE_PRESETS,
        WorkerOptions,
    ),
    "linear": later(
        f"{HERE}:linear",
        "All methods on the linear unit tests, with the settings chosen.",
        LINEAR_PRESETS,
        FigureOptions,
    ),
    "spirals-choose": later(
        f"{HERE}:spirals_choose",
        "Choose a setting for each method on the spirals.",
        SPIRALS_CHOOSE_PRESETS,
        WorkerOptions,
    ),
    "spirals": later(
        f"{HERE}:spirals",
        "Methods on the spirals as they are and rotated, with the settings chosen.",
        SPIRALS_PRESETS,
        FigureOptions,
    ),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.shifts", COMMANDS, sys.argv[1:]))
