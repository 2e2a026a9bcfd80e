"""Settings of the comparison; presets change its size."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal, get_args

from experiments.common.choices import Preset
from experiments.common.settings import fields_of
from experiments.common.validation import (
    require,
    require_at_least,
    require_distinct,
    require_each,
    require_kinds,
    require_seeds,
)

MethodName = Literal[
    "averaging",
    "averaging_whitened",
    "and_mask",
    "and_mask_whitened",
    "soft_and_mask",
    "sand_mask",
    "geometric_mean",
    "spectral_and_mask",
    "spectral_and_mask_whitened",
    "drop_disagreement",
    "drop_disagreement_whitened",
    "relative_gauss_newton",
    "relative_gauss_newton_whitened",
    "upgrad_whitened",
    "mgda_whitened",
    "pcgrad_whitened",
    "cagrad_whitened",
    "irm",
    "irm_whitened",
    "vrex",
    "vrex_whitened",
    "group_dro",
    "oracle",
]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)
Problem = Literal[
    "example1", "example1s", "example2", "example2s", "example3", "example3s"
]
PROBLEMS: tuple[Problem, ...] = get_args(Problem)
SCRAMBLED: tuple[Problem, ...] = ("example1s", "example2s", "example3s")


SpiralsProblem = Literal["spirals", "spirals_rotated"]
SPIRALS: tuple[SpiralsProblem, ...] = get_args(SpiralsProblem)
# Those that make sense in a network of several layers.
NETWORK_METHODS: tuple[MethodName, ...] = (
    "averaging",
    "averaging_whitened",
    "and_mask",
    "and_mask_whitened",
    "spectral_and_mask_whitened",
    "drop_disagreement_whitened",
    "relative_gauss_newton_whitened",
    "upgrad_whitened",
)
# By method: pairs of a learning rate and the method's own number.
Settings = Mapping[MethodName, tuple[tuple[float, float], ...]]


@dataclasses.dataclass(frozen=True)
class LinearSettings:
    """Data and training of the linear unit tests; all that a run depends on besides
    problem, number of environments, method, its setting and seed.
    """

    examples: int = 10_000
    """Examples in each environment, of the training set and of the test set."""
    steps: int = 500
    """Steps on all examples; the learning rate falls to 0 as a cosine."""
    damping: float = 1e-6
    """Of the whitening, relative to the mean eigenvalue of the inputs' moment."""

    def __post_init__(self) -> None:
        require_at_least(self, 2, "examples")
        even = self.examples % 2 == 0
        require("examples", self.examples, even, "even: half of each class")
        require_at_least(self, 1, "steps")
        require_each(self, ["damping"], lambda v: 0 <= v < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class LinearRun(LinearSettings):
    """One method on one problem: every setting on every seed."""

    problem: Problem = "example1"
    num_envs: int = 2
    method: MethodName = "averaging"
    settings: tuple[tuple[float, float], ...] = ()
    seeds: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Name among the runs of a command; also its directory."""
        return f"{self.method}-envs{self.num_envs}-{self.problem}"


@dataclasses.dataclass(frozen=True)
class LinearConfig(LinearSettings):
    """All methods on the linear unit tests."""

    problems: tuple[Problem, ...] = PROBLEMS
    """The problems; a name that ends in s is the scrambled twin."""
    num_envs: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 10)
    """Numbers of training environments."""
    methods: tuple[MethodName, ...] = METHOD_NAMES
    """The methods."""
    seeds: tuple[int, int] = (0, 9)
    """First and last seed of a problem and its examples, both included."""
    chosen: str = "docs/results/shifts/linear_chosen.json"
    """File with the setting of each method: the chosen.json of linear-choose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_linear(self)

    def run_configs(self, settings: Settings) -> list[LinearRun]:
        """All runs; see `_linear_runs`."""
        return _linear_runs(self, settings)


@dataclasses.dataclass(frozen=True)
class LinearChooseConfig(LinearSettings):
    """What chooses a setting for each method, one for all problems.

    On held-out environments of seeds that are not reported.
    """

    examples: int = 2000
    """Examples in each environment, of the training set and of the held-out one."""
    problems: tuple[Problem, ...] = SCRAMBLED
    """The problems, which count alike."""
    num_envs: tuple[int, ...] = (6, 10)
    """Numbers of training environments, which count alike."""
    methods: tuple[MethodName, ...] = METHOD_NAMES
    """The methods."""
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Initial learning rates to choose from, with each value of a method's own
    number."""
    seeds: tuple[int, int] = (1000, 1001)
    """First and last seed of a problem and its examples, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_linear(self)
        _require_rates(self)

    def run_configs(self, settings: Settings) -> list[LinearRun]:
        """All runs; see `_linear_runs`."""
        return _linear_runs(self, settings)


@dataclasses.dataclass(frozen=True)
class SpiralsSettings:
    """Data, network and training; all that a run depends on besides rotation, method,
    its setting and seed.
    """

    num_envs: int = 24
    """Training environments, each with a shortcut of its own."""
    examples_per_env: int = 512
    """Training examples in each environment."""
    shortcut_dims: int = 8
    """Input dimensions of the shortcut, beside the two of the spirals."""
    shortcut_std: float = 1.0
    """Standard deviation of the shortcut's components; the spirals' is 1."""
    revolutions: float = 1.0
    """Turns of each spiral from centre to rim."""
    hidden_units: int = 64
    """Width of the MLP's hidden layers."""
    hidden_layers: int = 2
    """Number of the MLP's hidden layers."""
    epochs: int = 150
    """Passes over the training data; the learning rate falls to 0 as a cosine."""
    batch_size: int = 128
    """Examples per step from each environment."""
    damping: float = 1e-3
    """Of the whitening, relative to the mean eigenvalue of a layer's inputs' moment."""

    def __post_init__(self) -> None:
        require_at_least(
            self,
            1,
            "examples_per_env",
            "shortcut_dims",
            "hidden_units",
            "hidden_layers",
            "epochs",
            "batch_size",
        )
        require_at_least(self, 2, "num_envs")
        require_each(self, ["revolutions"], lambda v: 0 < v < 100, "positive")
        require_each(self, ["shortcut_std"], lambda v: 0 <= v < 100, "non-negative")
        require_each(self, ["damping"], lambda v: 0 <= v < 1, "in [0, 1)")
        require(
            "batch_size",
            self.batch_size,
            self.batch_size <= self.examples_per_env,
            f"at most examples_per_env ({self.examples_per_env})",
        )


@dataclasses.dataclass(frozen=True)
class SpiralsRun(SpiralsSettings):
    """One method on one problem: every setting on every seed."""

    problem: SpiralsProblem = "spirals"
    method: MethodName = "averaging"
    settings: tuple[tuple[float, float], ...] = ()
    seeds: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Name among the runs of a command; also its directory."""
        return f"{self.method}-{self.problem}"


@dataclasses.dataclass(frozen=True)
class SpiralsConfig(SpiralsSettings):
    """Methods on the spirals, as they are and with rotated inputs."""

    problems: tuple[SpiralsProblem, ...] = SPIRALS
    """The inputs: spirals, as they are; spirals_rotated."""
    methods: tuple[MethodName, ...] = NETWORK_METHODS
    """The methods."""
    seeds: tuple[int, int] = (0, 2)
    """First and last seed of data and initial weights, both included."""
    chosen: str = "docs/results/shifts/spirals_chosen.json"
    """File with the setting of each method: the chosen.json of spirals-choose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_spirals(self)

    def run_configs(self, settings: Settings) -> list[SpiralsRun]:
        """All runs; see `_spirals_runs`."""
        return _spirals_runs(self, settings)


@dataclasses.dataclass(frozen=True)
class SpiralsChooseConfig(SpiralsSettings):
    """What chooses a setting for each method, one for plain and rotated inputs.

    On held-out environments of seeds that are not reported.
    """

    problems: tuple[SpiralsProblem, ...] = SPIRALS
    """The inputs, which count alike."""
    methods: tuple[MethodName, ...] = NETWORK_METHODS
    """The methods."""
    learning_rates: tuple[float, ...] = (0.01, 0.03)
    """Initial learning rates to choose from, with each value of a method's own
    number."""
    seeds: tuple[int, int] = (1000, 1000)
    """First and last seed of data and initial weights, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_spirals(self)
        _require_rates(self)

    def run_configs(self, settings: Settings) -> list[SpiralsRun]:
        """All runs; see `_spirals_runs`."""
        return _spirals_runs(self, settings)


def _require_linear(config: LinearConfig | LinearChooseConfig) -> None:
    require_kinds(config, problems=Problem, methods=MethodName)
    require_distinct(config, "problems", "problems")
    require_distinct(config, "methods", "methods")
    require_distinct(config, "numbers", "num_envs")
    require_at_least(config, 2, "num_envs")
    require_seeds(config, "seeds")


def _require_spirals(config: SpiralsConfig | SpiralsChooseConfig) -> None:
    require_kinds(config, problems=SpiralsProblem, methods=MethodName)
    require_distinct(config, "problems", "problems")
    require_distinct(config, "methods", "methods")
    has_oracle = "oracle" in config.methods
    rule = "without oracle, which linear alone has"
    require("methods", config.methods, not has_oracle, rule)
    require_seeds(config, "seeds")


def _require_rates(config: LinearChooseConfig | SpiralsChooseConfig) -> None:
    require_distinct(config, "values", "learning_rates")
    require_each(config, ["learning_rates"], lambda v: 0 < v < 100, "positive")


def _linear_runs(
    config: LinearConfig | LinearChooseConfig, settings: Settings
) -> list[LinearRun]:
    """Those of a method and a number of environments in a row: they share what is
    compiled.
    """
    return [
        LinearRun(
            **fields_of(config, LinearSettings),
            problem=problem,
            num_envs=num_envs,
            method=method,
            settings=settings[method],
            seeds=config.seeds,
        )
        for method, num_envs, problem in itertools.product(
            config.methods, config.num_envs, config.problems
        )
    ]


def _spirals_runs(
    config: SpiralsConfig | SpiralsChooseConfig, settings: Settings
) -> list[SpiralsRun]:
    """Those of a method in a row: they share what is compiled."""
    return [
        SpiralsRun(
            **fields_of(config, SpiralsSettings),
            problem=problem,
            method=method,
            settings=settings[method],
            seeds=config.seeds,
        )
        for method, problem in itertools.product(config.methods, config.problems)
    ]


_SMOKE: dict[str, Any] = {
    "examples": 100,
    "steps": 2,
    "problems": ("example1s", "example3"),
    "num_envs": (2,),
    "methods": ("averaging", "oracle"),
}
LINEAR_PRESETS: dict[Preset, LinearConfig] = {
    "smoke": LinearConfig(**_SMOKE, seeds=(0, 1)),
    "cpu": LinearConfig(),
    "paper": LinearConfig(steps=10_000, seeds=(0, 49)),
}
LINEAR_CHOOSE_PRESETS: dict[Preset, LinearChooseConfig] = {
    "smoke": LinearChooseConfig(**_SMOKE, learning_rates=(0.1,), seeds=(1000, 1000)),
    "cpu": LinearChooseConfig(),
    "paper": LinearChooseConfig(examples=10_000, steps=10_000),
}
_SMALL: dict[str, Any] = {
    "num_envs": 2,
    "examples_per_env": 8,
    "shortcut_dims": 2,
    "hidden_units": 4,
    "epochs": 1,
    "batch_size": 8,
    "methods": ("spectral_and_mask_whitened",),
}
SPIRALS_PRESETS: dict[Preset, SpiralsConfig] = {
    "smoke": SpiralsConfig(**_SMALL, seeds=(0, 0)),
    "cpu": SpiralsConfig(),
    "paper": SpiralsConfig(
        num_envs=32,
        examples_per_env=1280,
        shortcut_dims=32,
        revolutions=3.0,
        hidden_units=256,
        hidden_layers=3,
        seeds=(0, 9),
    ),
}
SPIRALS_CHOOSE_PRESETS: dict[Preset, SpiralsChooseConfig] = {
    "smoke": SpiralsChooseConfig(**_SMALL, learning_rates=(0.1,)),
    "cpu": SpiralsChooseConfig(),
    "paper": SpiralsChooseConfig(
        **fields_of(SPIRALS_PRESETS["paper"], SpiralsSettings)
    ),
}
