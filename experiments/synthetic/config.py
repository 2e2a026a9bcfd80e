"""Settings of the synthetic experiment, and the recipe that its presets share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from experiments.common.cli import Preset, RunOptions
from experiments.common.validation import require, require_choice

Method = Literal["erm", "and_mask", "geometric_mean"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Data, model and training; all that a run depends on besides method and seed."""

    num_envs: int = 16
    """Training environments, each with a shortcut of its own."""
    examples_per_env: int = 1024
    """Training examples in each environment."""
    shortcut_dims: int = 16
    """Input dimensions of the shortcut, beside the two of the spirals."""
    shortcut_std: float = 1.0
    """Standard deviation of the shortcut's components; the spirals' is 1."""
    revolutions: float = 3.0
    """Turns of each spiral from centre to rim."""
    hidden_units: int = 256
    """Width of the MLP's hidden layers."""
    hidden_layers: int = 3
    """Number of the MLP's hidden layers."""
    epochs: int = 300
    """Passes over the training data."""
    batch_size: int = 128
    """Examples per step from each environment."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """adam, or sgd with momentum 0.9."""
    learning_rate: float = 1e-2
    """Initial learning rate."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """step: a tenth at 1/2 and again at 3/4 (the paper's); cosine, to 0; constant."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.9
    """Adam's decay of the second moment."""
    eps: float = 1e-15
    """Added to Adam's denominator."""
    threshold: float = 1.0
    """Agreement needed to pass: 0 (all pass) to 1 (unanimity). erm always uses 0."""
    rescale: bool = False
    """Scale what passes by (components of the layer) / (those that passed)."""
    max_rescale: float | None = None
    """Upper limit of that factor; only with rescale."""
    l2: float = 1e-7
    """L2 decay added to the aggregated gradient, before the optimizer's moments."""
    l1: float = 0.0
    """L1 decay added to the aggregated gradient, before the optimizer's moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay, added to the optimizer's update."""
    oracle: Literal["fused", "scan", "vmap"] = "fused"
    """How gradients are reduced: fused (layer by layer), scan (few environments at a
    time), vmap (stacked)."""
    microbatch_size: int = 1
    """Environments at a time for scan: speed against memory. Sums are rounded
    differently."""
    checkpoint_every: int = 10
    """Epochs between checkpoints."""

    def __post_init__(self) -> None:
        for field in (
            "num_envs",
            "examples_per_env",
            "shortcut_dims",
            "hidden_units",
            "hidden_layers",
            "epochs",
            "batch_size",
            "microbatch_size",
            "checkpoint_every",
        ):
            value = getattr(self, field)
            require(field, value, value >= 1, "at least 1")
        for field in ("revolutions", "learning_rate"):
            value = getattr(self, field)
            require(field, value, 0 < value < math.inf, "positive and finite")
        for field in ("shortcut_std", "eps", "l2", "l1", "weight_decay"):
            value = getattr(self, field)
            require(field, value, 0 <= value < math.inf, "non-negative and finite")
        for field in ("b1", "b2"):
            value = getattr(self, field)
            require(field, value, 0 <= value < 1, "in [0, 1)")
        require("threshold", self.threshold, 0 <= self.threshold <= 1, "in [0, 1]")
        cap = self.max_rescale
        require("max_rescale", cap, cap is None or cap >= 1, "at least 1, or None")
        if cap is not None and not self.rescale:
            raise ValueError(f"max_rescale needs rescale=True, got {cap!r} without it")
        require_choice("optimizer", self.optimizer, ("adam", "sgd"))
        require_choice("schedule", self.schedule, ("step", "cosine", "constant"))
        require_choice("oracle", self.oracle, ("fused", "scan", "vmap"))
        require(
            "batch_size",
            self.batch_size,
            self.batch_size <= self.examples_per_env,
            f"at most examples_per_env ({self.examples_per_env})",
        )
        require(
            "microbatch_size",
            self.microbatch_size,
            self.num_envs % self.microbatch_size == 0,
            f"a divisor of num_envs ({self.num_envs})",
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; an incomplete last batch is dropped."""
        return self.examples_per_env // self.batch_size


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """One method, one seed."""

    method: Method = "and_mask"
    """erm averages gradients; the others mask, then average or take geometric means."""
    seed: int = 0
    """Seed of the data, the initial weights and the order of examples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("method", self.method, METHODS)
        _require_seed("seed", self.seed)


@dataclasses.dataclass(frozen=True)
class CompareConfig(Settings):
    """Several methods on the same data, from the same initial weights."""

    methods: tuple[Method, ...] = ("erm", "and_mask")
    """The methods, in the order of the table and the figure."""
    seed: int = 0
    """Seed of the data, the initial weights and the order of examples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in self.methods:
            require_choice("methods", method, METHODS)
        distinct = len(set(self.methods)) == len(self.methods) > 0
        require("methods", self.methods, distinct, "one or more different methods")
        _require_seed("seed", self.seed)

    def train_config(self, method: Method) -> TrainConfig:
        """The config of one method's run."""
        return TrainConfig(**shared_settings(self), method=method, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class RerunConfig(Settings):
    """One method, many seeds."""

    method: Method = "and_mask"
    """The method, as for train."""
    seeds: tuple[int, int] = (0, 49)
    """First and last seed, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("method", self.method, METHODS)
        first, last = self.seeds
        _require_seed("seeds", first)
        _require_seed("seeds", last)
        require("seeds", self.seeds, first <= last, "in ascending order")

    def train_configs(self) -> list[TrainConfig]:
        """The config of every seed's run."""
        first, last = self.seeds
        return [
            TrainConfig(**shared_settings(self), method=self.method, seed=seed)
            for seed in range(first, last + 1)
        ]


@dataclasses.dataclass(frozen=True)
class RerunOptions(RunOptions):
    """Where to write, and with how many processes."""

    workers: int = 1
    """Seeds trained at the same time, each in a process of its own."""

    def __post_init__(self) -> None:
        require("workers", self.workers, self.workers >= 1, "at least 1")


def _require_seed(field: str, seed: int) -> None:
    require(field, seed, 0 <= seed < 2**32, "between 0 and 2**32 - 1")


def shared_settings(config: Settings) -> dict[str, Any]:
    """The fields of `config` that all subcommands have."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(Settings)}


# The recipe, the same for every method, is the defaults of `Settings`. Presets change
# the size of the problem and what has to follow from it. So `paper` is the paper's size
# (32 environments of 1280 examples, 32 shortcut dimensions), not its recipe: threshold
# 0.8 and 280 epochs, where the paper has 1 and 93.
PRESETS: dict[Preset, dict[str, Any]] = {
    "smoke": {
        "num_envs": 4,
        "examples_per_env": 64,
        "shortcut_dims": 4,
        "hidden_units": 16,
        "hidden_layers": 2,
        "epochs": 12,
        "batch_size": 32,
        "checkpoint_every": 2,
    },
    "cpu": {},
    "paper": {
        "num_envs": 32,
        "examples_per_env": 1280,
        "shortcut_dims": 32,
        "epochs": 280,
        "threshold": 0.8,
    },
}
