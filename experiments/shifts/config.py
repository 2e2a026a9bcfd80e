"""Settings of the comparison; presets change its size."""

from __future__ import annotations

import dataclasses
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
        _require_parts(self)


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
        _require_parts(self)
        require_distinct(self, "values", "learning_rates")
        require_each(self, ["learning_rates"], lambda v: 0 < v < 100, "positive")


def _require_parts(config: Any) -> None:
    require_kinds(config, problems=Problem, methods=MethodName)
    require_distinct(config, "problems", "problems")
    require_distinct(config, "methods", "methods")
    require_distinct(config, "numbers", "num_envs")
    require_at_least(config, 2, "num_envs")
    require_seeds(config, "seeds")


def linear_settings(config: LinearSettings) -> dict[str, Any]:
    """The fields that all commands on linear problems have."""
    return fields_of(config, LinearSettings)


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
