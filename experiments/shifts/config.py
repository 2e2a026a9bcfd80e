"""Settings of the comparison; presets change its size."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from experiments.common.choices import Preset
from experiments.common.cli import RunOptions, WorkerOptions
from experiments.common.settings import fields_of
from experiments.common.validation import (
    require,
    require_at_least,
    require_choice,
    require_distinct,
    require_each,
    require_kinds,
    require_positive,
    require_seeds,
)
from experiments.vision.config import DataOptions, DatasetName, VisionOptions

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
    "temporal_and_mask",
    "fishr",
    "iga",
    "oracle",
]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)
# A gradient of all examples has no noise for the temporal form to see.
LINEAR_METHODS: tuple[MethodName, ...] = tuple(
    name for name in METHOD_NAMES if name != "temporal_and_mask"
)
Problem = Literal[
    "example1", "example1s", "example2", "example2s", "example3", "example3s"
]
PROBLEMS: tuple[Problem, ...] = get_args(Problem)
SCRAMBLED: tuple[Problem, ...] = ("example1s", "example2s", "example3s")


SpiralsProblem = Literal["spirals", "spirals_rotated"]
SPIRALS: tuple[SpiralsProblem, ...] = get_args(SpiralsProblem)
ImagesProblem = Literal["own_shortcut", "coloured_labels", "rotated", "mixed_labels"]
IMAGES: tuple[ImagesProblem, ...] = get_args(ImagesProblem)
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
# What fits in a network and is no ceiling; IRM and V-REx as their authors have them.
IMAGES_METHODS: tuple[MethodName, ...] = tuple(
    name
    for name in METHOD_NAMES
    if name not in ("irm_whitened", "vrex_whitened", "temporal_and_mask", "oracle")
)
# Pairs of a learning rate and the method's own number, by what `setting_name` gives.
Settings = Mapping[str, tuple[tuple[float, float], ...]]


def _require_batch(config: SpiralsSettings | ImagesSettings) -> None:
    """Raises ValueError unless an environment has the examples of a step."""
    require(
        "batch_size",
        config.batch_size,
        config.batch_size <= config.examples_per_env,
        f"at most examples_per_env ({config.examples_per_env})",
    )


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
    """Damping of methods that whiten: a share of the mean eigenvalue of the inputs'
    second moment."""
    l2: float = 0.0
    """Weight decay of methods with Adam: this times the weights, added to the gradient
    before its moments."""

    def __post_init__(self) -> None:
        require_at_least(self, 2, "examples")
        even = self.examples % 2 == 0
        require("examples", self.examples, even, "even: half of each class")
        require_at_least(self, 1, "steps")
        require_each(self, ["damping", "l2"], lambda v: 0 <= v < 1, "in [0, 1)")


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

    by_problem: ClassVar[bool] = False
    problems: tuple[Problem, ...] = PROBLEMS
    """The problems; a name that ends in s is the scrambled twin."""
    num_envs: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 10)
    """Numbers of training environments."""
    methods: tuple[MethodName, ...] = LINEAR_METHODS
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
    by_problem: ClassVar[bool] = False
    problems: tuple[Problem, ...] = SCRAMBLED
    """The problems, which count alike."""
    num_envs: tuple[int, ...] = (6, 10)
    """Numbers of training environments, which count alike."""
    methods: tuple[MethodName, ...] = LINEAR_METHODS
    """The methods."""
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Initial learning rates to choose from, with each value of a method's own
    number."""
    seeds: tuple[int, int] = (1000, 1001)
    """First and last seed of a problem and its examples, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_linear(self)
        require_rates(self)

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
    """Damping of methods that whiten: a share of the mean eigenvalue of the second
    moment of a layer's inputs."""

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
        _require_batch(self)


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

    by_problem: ClassVar[bool] = False
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

    by_problem: ClassVar[bool] = False
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
        require_rates(self)

    def run_configs(self, settings: Settings) -> list[SpiralsRun]:
        """All runs; see `_spirals_runs`."""
        return _spirals_runs(self, settings)


@dataclasses.dataclass(frozen=True)
class SpiralsLookConfig(SpiralsSettings):
    """A look at the gradients of averaging on the spirals, layer by layer."""

    problems: tuple[SpiralsProblem, ...] = SPIRALS
    """The inputs: spirals, as they are; spirals_rotated."""
    epochs: int = 2
    """Passes over the training data before the second look; the first is at initial
    weights."""
    learning_rate: float = 0.01
    """Initial learning rate of these passes."""
    seed: int = 1000
    """Seed of data and initial weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_problems(self, SpiralsProblem)
        require_positive(self, "learning_rate")
        require_seeds(self, "seed")


@dataclasses.dataclass(frozen=True)
class ImagesSettings:
    """Data, network and training; all that a run depends on besides the shift, method,
    its setting and seed.
    """

    dataset: DatasetName = "fashion_mnist"
    """fashion_mnist, mnist, or generated: tiny images for tests. Colours are added, so
    cifar10 is refused."""
    num_envs: int = 8
    """Training environments."""
    examples_per_env: int = 512
    """Training examples in each environment, and in each held-out one."""
    test_examples: int = 2000
    """Test examples, the same ones in every test environment."""
    width: int = 8
    """Channels after the first convolution; after the second twice as many."""
    epochs: int = 20
    """Passes over the training data; the learning rate falls to 0 as a cosine."""
    batch_size: int = 32
    """Examples per step from each environment."""
    damping: float = 1e-3
    """Damping of methods that whiten: a share of the mean eigenvalue of the second
    moment of a layer's inputs."""

    def __post_init__(self) -> None:
        kinds = get_args(DatasetName)
        gray = [kind for kind in kinds if kind != "cifar10"]
        require_choice("dataset", self.dataset, gray)
        require_at_least(
            self,
            1,
            "examples_per_env",
            "test_examples",
            "width",
            "epochs",
            "batch_size",
        )
        require_at_least(self, 2, "num_envs")
        require_each(self, ["damping"], lambda v: 0 <= v < 1, "in [0, 1)")
        _require_batch(self)


@dataclasses.dataclass(frozen=True)
class ImagesRun(ImagesSettings):
    """One method on one shift: every setting on every seed."""

    problem: ImagesProblem = "own_shortcut"
    method: MethodName = "averaging"
    settings: tuple[tuple[float, float], ...] = ()
    seeds: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Name among the runs of a command; also its directory."""
        return f"{self.method}-{self.problem}"


@dataclasses.dataclass(frozen=True)
class ImagesConfig(ImagesSettings):
    """Methods on shifts of real images."""

    by_problem: ClassVar[bool] = True
    problems: tuple[ImagesProblem, ...] = IMAGES
    """The shifts: own_shortcut, a pattern of each environment's own for either class;
    coloured_labels, colours beside labels of which a quarter is wrong; rotated, by
    another angle in each; mixed_labels, 0 to 40 % wrong ones."""
    methods: tuple[MethodName, ...] = IMAGES_METHODS
    """The methods."""
    seeds: tuple[int, int] = (0, 4)
    """First and last seed of images, shift and initial weights, both included."""
    chosen: str = "docs/results/shifts/images_chosen.json"
    """File with the settings of each method on each shift: the chosen.json of
    images-choose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_images(self)

    def run_configs(self, settings: Settings) -> list[ImagesRun]:
        """All runs; see `_images_runs`."""
        return _images_runs(self, settings)


@dataclasses.dataclass(frozen=True)
class ImagesChooseConfig(ImagesSettings):
    """What chooses a setting for each method on each shift.

    On held-out environments of seeds that are not reported; and, to be shown beside,
    on the test.
    """

    by_problem: ClassVar[bool] = True
    problems: tuple[ImagesProblem, ...] = IMAGES
    """The shifts, each with a choice of its own: own_shortcut, a pattern of each
    environment's own for either class;
    coloured_labels, colours beside labels of which a quarter is wrong; rotated, by
    another angle in each; mixed_labels, 0 to 40 % wrong ones."""
    methods: tuple[MethodName, ...] = IMAGES_METHODS
    """The methods."""
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Initial learning rates to choose from, with each of the numbers."""
    most_numbers: int = 3
    """How many values of a method's own number to choose from, at most: evenly from
    its list."""
    seeds: tuple[int, int] = (1000, 1001)
    """First and last seed of images, shift and initial weights, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_images(self)
        require_rates(self)
        require_at_least(self, 1, "most_numbers")

    def run_configs(self, settings: Settings) -> list[ImagesRun]:
        """All runs; see `_images_runs`."""
        return _images_runs(self, settings)


@dataclasses.dataclass(frozen=True)
class ImagesLookConfig(ImagesSettings):
    """A look at the gradients of averaging on each shift, layer by layer."""

    problems: tuple[ImagesProblem, ...] = IMAGES
    """The shifts: own_shortcut, a pattern of each environment's own for either class;
    coloured_labels, colours beside labels of which a quarter is wrong; rotated, by
    another angle in each; mixed_labels, 0 to 40 % wrong ones."""
    epochs: int = 2
    """Passes over the training data before the second look; the first is at initial
    weights."""
    learning_rate: float = 0.003
    """Initial learning rate of these passes."""
    seed: int = 1000
    """Seed of images, shift and initial weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_problems(self, ImagesProblem)
        require_positive(self, "learning_rate")
        require_seeds(self, "seed")


@dataclasses.dataclass(frozen=True)
class ImagesOptions(VisionOptions):
    """Where the data are and where to write, and with how many processes."""


@dataclasses.dataclass(frozen=True)
class ImagesChooseOptions(DataOptions, WorkerOptions):
    """Where the data are and where to write, and with how many processes."""


@dataclasses.dataclass(frozen=True)
class ImagesLookOptions(DataOptions, RunOptions):
    """Where the data are and where to write."""


def setting_name(config: Any, method: MethodName, problem: str) -> str:
    """The name of a method's setting: one for all problems, or for each of them."""
    return f"{method}-{problem}" if config.by_problem else method


def _require_linear(config: LinearConfig | LinearChooseConfig) -> None:
    require_kinds(config, problems=Problem, methods=MethodName)
    require_distinct(config, "problems", "problems")
    require_distinct(config, "methods", "methods")
    require_distinct(config, "numbers", "num_envs")
    require_at_least(config, 2, "num_envs")
    require_seeds(config, "seeds")


def _require_spirals(config: SpiralsConfig | SpiralsChooseConfig) -> None:
    _require_problems(config, SpiralsProblem)
    require_network_methods(config)
    require_seeds(config, "seeds")


def _require_images(config: ImagesConfig | ImagesChooseConfig) -> None:
    _require_problems(config, ImagesProblem)
    require_network_methods(config)
    require_seeds(config, "seeds")


def _require_problems(config: Any, kind: Any) -> None:
    require_kinds(config, problems=kind)
    require_distinct(config, "problems", "problems")


def require_network_methods(config: Any) -> None:
    """Raises ValueError unless the methods are different ones that networks have."""
    require_kinds(config, methods=MethodName)
    require_distinct(config, "methods", "methods")
    has_oracle = "oracle" in config.methods
    rule = "without oracle, which linear alone has"
    require("methods", config.methods, not has_oracle, rule)


def require_rates(config: Any) -> None:
    """Raises ValueError unless the learning rates are different positive numbers."""
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
            settings=settings[setting_name(config, method, problem)],
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
            settings=settings[setting_name(config, method, problem)],
            seeds=config.seeds,
        )
        for method, problem in itertools.product(config.methods, config.problems)
    ]


def _images_runs(
    config: ImagesConfig | ImagesChooseConfig, settings: Settings
) -> list[ImagesRun]:
    """Those of a method in a row: they share what is compiled, as all shifts have
    arrays of the same shapes.
    """
    return [
        ImagesRun(
            **fields_of(config, ImagesSettings),
            problem=problem,
            method=method,
            settings=settings[setting_name(config, method, problem)],
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
SPIRALS_LOOK_PRESETS: dict[Preset, SpiralsLookConfig] = {
    "smoke": SpiralsLookConfig(
        **{name: value for name, value in _SMALL.items() if name != "methods"}
    ),
    "cpu": SpiralsLookConfig(),
    "paper": SpiralsLookConfig(
        **fields_of(SPIRALS_PRESETS["paper"], SpiralsSettings) | {"epochs": 2}
    ),
}
_TINY: dict[str, Any] = {
    "dataset": "generated",
    "num_envs": 2,
    "examples_per_env": 16,
    "test_examples": 20,
    "width": 2,
    "epochs": 1,
    "batch_size": 8,
}
_TWO: dict[str, Any] = {
    "problems": ("own_shortcut", "coloured_labels"),
    "methods": ("averaging",),
}
# More examples and a wider network than two cores have time for.
_LARGER: dict[str, Any] = {
    "examples_per_env": 4096,
    "test_examples": 10_000,
    "width": 32,
    "batch_size": 64,
}
IMAGES_PRESETS: dict[Preset, ImagesConfig] = {
    "smoke": ImagesConfig(**_TINY, **_TWO, seeds=(0, 1)),
    "cpu": ImagesConfig(),
    "paper": ImagesConfig(**_LARGER, seeds=(0, 9)),
}
IMAGES_CHOOSE_PRESETS: dict[Preset, ImagesChooseConfig] = {
    "smoke": ImagesChooseConfig(
        **_TINY, **_TWO, learning_rates=(0.01, 0.03), seeds=(1000, 1000)
    ),
    "cpu": ImagesChooseConfig(),
    "paper": ImagesChooseConfig(**_LARGER),
}
IMAGES_LOOK_PRESETS: dict[Preset, ImagesLookConfig] = {
    "smoke": ImagesLookConfig(**_TINY, problems=("own_shortcut", "rotated")),
    "cpu": ImagesLookConfig(),
    "paper": ImagesLookConfig(**_LARGER),
}
