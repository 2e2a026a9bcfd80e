"""Settings of the comparison on CoinRun's levels; presets change its size."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar, Literal

from experiments.coinrun.student.config import DataOptions
from experiments.coinrun.student.config import Source as DatasetName
from experiments.common.choices import Preset
from experiments.common.cli import FigureOptions, WorkerOptions
from experiments.common.settings import fields_of
from experiments.common.validation import (
    require,
    require_at_least,
    require_distinct,
    require_each,
    require_kinds,
    require_seeds,
)
from experiments.shifts.config import (
    MethodName,
    Settings,
    require_network_methods,
    require_rates,
)

LevelsProblem = Literal["levels"]


@dataclasses.dataclass(frozen=True)
class LevelsSettings:
    """Data, network and training; all that a run depends on besides the number of
    levels in a step, method, its setting and seed.
    """

    dataset: DatasetName = "coinrun"
    """coinrun: a directory that experiments.coinrun dataset has made; generated: tiny
    images for tests."""
    data_sha256: str = ""
    """SHA-256 of the dataset's manifest, to be sure which it is; without it whatever
    --data holds when the command begins."""
    held_out_levels: int = 8
    """Training levels that nothing is trained on, drawn by the seed; settings are
    chosen on them."""
    width: int = 8
    """Channels of the ResNet's first stage; the last has eight times as many."""
    blocks: int = 2
    """Blocks in each of four stages; 2 makes it ResNet-18."""
    states_per_step: int = 64
    """States in a step, of all its levels together."""
    steps: int = 400
    """Steps; the learning rate falls to a tenth after 1/2 and again after 3/4 of them.
    """
    evaluated_states: int = 25
    """States of each training level that batch norm's final statistics and the training
    error are of."""

    def __post_init__(self) -> None:
        require_kinds(self, dataset=DatasetName)
        require_at_least(
            self,
            1,
            "held_out_levels",
            "width",
            "blocks",
            "states_per_step",
            "steps",
            "evaluated_states",
        )


@dataclasses.dataclass(frozen=True)
class LevelsRun(LevelsSettings):
    """One method with one setting and one seed."""

    problem: LevelsProblem = "levels"
    num_envs: int = 8
    method: MethodName = "averaging"
    settings: tuple[tuple[float, float], ...] = ((0.01, 0.0),)
    seeds: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Name among the runs of a command; also its directory."""
        [(rate, number)], (seed, _) = self.settings, self.seeds
        setting = f"rate{rate:g}-number{number:g}"
        return f"{self.method}-envs{self.num_envs}-{setting}-seed{seed}"


@dataclasses.dataclass(frozen=True)
class LevelsConfig(LevelsSettings):
    """Methods on CoinRun's levels, several in a step."""

    by_problem: ClassVar[bool] = False
    problems: ClassVar[tuple[LevelsProblem, ...]] = ("levels",)
    num_envs: tuple[int, ...] = (8,)
    """Levels in a step."""
    methods: tuple[MethodName, ...] = ("averaging", "and_mask", "temporal_and_mask")
    """The methods."""
    seeds: tuple[int, int] = (0, 2)
    """First and last seed of held-out levels, initial weights and order of states, both
    included."""
    chosen: str = "docs/results/shifts/levels_chosen.json"
    """File with the setting of each method: the chosen.json of levels-choose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_levels(self)

    def run_configs(self, settings: Settings) -> list[LevelsRun]:
        """All runs; see `_levels_runs`."""
        return _levels_runs(self, settings)


@dataclasses.dataclass(frozen=True)
class LevelsChooseConfig(LevelsSettings):
    """What chooses a setting for each method.

    On held-out levels of seeds that are not reported.
    """

    by_problem: ClassVar[bool] = False
    problems: ClassVar[tuple[LevelsProblem, ...]] = ("levels",)
    num_envs: tuple[int, ...] = (8,)
    """Levels in a step; several numbers count alike."""
    methods: tuple[MethodName, ...] = ("averaging", "and_mask", "temporal_and_mask")
    """The methods."""
    learning_rates: tuple[float, ...] = (0.003, 0.01)
    """Initial learning rates to choose from, with each value of a method's own
    number."""
    thresholds: tuple[float, ...] = (0.25, 0.5)
    """Values of a threshold, for methods whose number is one."""
    seeds: tuple[int, int] = (1000, 1000)
    """First and last seed of held-out levels, initial weights and order of states, both
    included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_levels(self)
        require_rates(self)
        require_distinct(self, "values", "thresholds")
        require_each(self, ["thresholds"], lambda v: 0 <= v <= 1, "in [0, 1]")

    def run_configs(self, settings: Settings) -> list[LevelsRun]:
        """All runs; see `_levels_runs`."""
        return _levels_runs(self, settings)


@dataclasses.dataclass(frozen=True)
class LevelsOptions(DataOptions, FigureOptions):
    """Where the data are, where to write, and with how many processes."""


@dataclasses.dataclass(frozen=True)
class LevelsChooseOptions(DataOptions, WorkerOptions):
    """Where the data are, where to write, and with how many processes."""


def _require_levels(config: LevelsConfig | LevelsChooseConfig) -> None:
    require_network_methods(config)
    require_distinct(config, "numbers", "num_envs")
    require_at_least(config, 1, "num_envs")
    for size in config.num_envs:
        rule = f"a multiple of each of num_envs, also of {size}"
        whole = config.states_per_step % size == 0
        require("states_per_step", config.states_per_step, whole, rule)
    require_seeds(config, "seeds")


def _levels_runs(
    config: LevelsConfig | LevelsChooseConfig, settings: Settings
) -> list[LevelsRun]:
    """Those of a method and a number of levels in a row: they share what is compiled.

    Each trains once, so that little is lost when a command is stopped.
    """
    first, last = config.seeds
    return [
        LevelsRun(
            **fields_of(config, LevelsSettings),
            num_envs=num_envs,
            method=method,
            settings=(setting,),
            seeds=(seed, seed),
        )
        for method, num_envs in itertools.product(config.methods, config.num_envs)
        for setting in settings[method]
        for seed in range(first, last + 1)
    ]


_SMOKE: dict[str, Any] = {
    "dataset": "generated",
    "held_out_levels": 2,
    "width": 2,
    "blocks": 1,
    "states_per_step": 4,
    "steps": 4,
    "evaluated_states": 4,
    "num_envs": (2,),
    "methods": ("and_mask",),
}
# The size of the student's paper preset.
_PAPER: dict[str, Any] = {
    "width": 64,
    "states_per_step": 1000,
    "steps": 1920,
    "evaluated_states": 1000,
}
LEVELS_PRESETS: dict[Preset, LevelsConfig] = {
    "smoke": LevelsConfig(**_SMOKE, seeds=(0, 1)),
    "cpu": LevelsConfig(),
    "paper": LevelsConfig(**_PAPER),
}
LEVELS_CHOOSE_PRESETS: dict[Preset, LevelsChooseConfig] = {
    "smoke": LevelsChooseConfig(**_SMOKE, learning_rates=(0.01,)),
    "cpu": LevelsChooseConfig(),
    "paper": LevelsChooseConfig(**_PAPER),
}
