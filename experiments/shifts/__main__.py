"""`python -m experiments.shifts`: which rule helps on which shift."""

from __future__ import annotations

import sys
from typing import Any

from experiments.common.cli import (
    Command,
    FigureOptions,
    Group,
    RunOptions,
    WorkerOptions,
    later,
    main,
)
from experiments.shifts.config import (
    IMAGES_CHOOSE_PRESETS,
    IMAGES_LOOK_PRESETS,
    IMAGES_PRESETS,
    LINEAR_CHOOSE_PRESETS,
    LINEAR_PRESETS,
    SPIRALS_CHOOSE_PRESETS,
    SPIRALS_LOOK_PRESETS,
    SPIRALS_PRESETS,
    ImagesChooseOptions,
    ImagesLookOptions,
    ImagesOptions,
)
from experiments.shifts.levels_config import (
    LEVELS_CHOOSE_PRESETS,
    LEVELS_PRESETS,
    LevelsChooseOptions,
    LevelsOptions,
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
    "spirals-look": later(
        "experiments.shifts.look:spirals_look",
        "Where gradients of averaging agree and differ, layer by layer.",
        SPIRALS_LOOK_PRESETS,
        RunOptions,
    ),
    "images-choose": later(
        f"{HERE}:images_choose",
        "Choose a setting for each method on each shift of real images.",
        IMAGES_CHOOSE_PRESETS,
        ImagesChooseOptions,
    ),
    "images": later(
        f"{HERE}:images",
        "All methods on shifts of real images, with the settings chosen.",
        IMAGES_PRESETS,
        ImagesOptions,
    ),
    "images-look": later(
        "experiments.shifts.look:images_look",
        "Where gradients of averaging agree and differ, layer by layer.",
        IMAGES_LOOK_PRESETS,
        ImagesLookOptions,
    ),
    "levels-choose": later(
        f"{HERE}:levels_choose",
        "Choose a setting for each method on CoinRun's levels.",
        LEVELS_CHOOSE_PRESETS,
        LevelsChooseOptions,
    ),
    "levels": later(
        f"{HERE}:levels",
        "Methods on CoinRun's levels, several in a step, with the settings chosen.",
        LEVELS_PRESETS,
        LevelsOptions,
    ),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.shifts", COMMANDS, sys.argv[1:]))
