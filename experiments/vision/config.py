"""Settings of the vision experiment; its defaults are the paper's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments.common.choices import Preset
from experiments.common.cli import FigureOptions
from experiments.common.settings import fields_of
from experiments.common.validation import (
    require,
    require_at_least,
    require_decay,
    require_distinct,
    require_kinds,
    require_max_rescale,
    require_non_negative,
    require_positive,
    require_positive_share,
    require_seeds,
    require_share,
)

DatasetName = Literal["cifar10", "fashion_mnist", "mnist", "generated"]
Norm = Literal["batch", "group"]
BatchNorm = Literal["path", "coupled"]
Oracle = Literal["fused", "vmap"]
DecayOrder = Literal["coupled", "decoupled"]
Labels = Literal["true", "random"]
Method = Literal["baseline", "and_mask"]

NUM_CLASSES = 10
# What shrinks an image: three poolings by two.
POOLING = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """Data, network and training; all that a run depends on besides labels, mask,
    learning rate and seed.
    """

    dataset: DatasetName = "cifar10"
    """cifar10, fashion_mnist, mnist, or generated: tiny images for tests."""
    train_examples: int | None = None
    """Size of a subset with as many examples of each class; None for all."""
    test_examples: int | None = None
    """Likewise of the test set."""
    width: int = 64
    """Channels after FastResNet's first convolution; the last has eight times as
    many."""
    norm: Norm = "batch"
    """batch norm, whose statistics all examples of a batch share, or group norm, with
    statistics of each example's own."""
    batch_norm: BatchNorm = "path"
    """An example's gradient when statistics are shared. path: through its own copy of
    the parameters, one backward pass for all. coupled: of its loss, also through the
    others' part in the statistics (the authors' reading), a backward pass for each."""
    epochs: int = 80
    """Passes over the training data."""
    batch_size: int = 80
    """Examples in a step, each an environment; a last incomplete batch is dropped."""
    drops: tuple[int, ...] = (40, 60)
    """Epochs after which the learning rate falls to a tenth."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.999
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 1e-6
    """Strength of the weight decay."""
    decay_order: DecayOrder = "coupled"
    """coupled: added to the masked gradient, before Adam's moments (the authors'
    default). decoupled: added to Adam's update."""
    rescale: bool = True
    """Scale what passes the mask by (components of the layer) / (those that passed)."""
    max_rescale: float | None = None
    """Upper limit of that factor; only with rescale."""
    oracle: Oracle = "fused"
    """How gradients are reduced, coupled apart: fused (layer by layer) or vmap
    (stacked; not on CPU)."""
    microbatch_size: int = 1
    """Backward passes at a time for coupled: speed against memory."""
    checkpoint_every: int = 5
    """Epochs between checkpoints."""

    def __post_init__(self) -> None:
        require_kinds(
            self,
            dataset=DatasetName,
            norm=Norm,
            batch_norm=BatchNorm,
            decay_order=DecayOrder,
            oracle=Oracle,
        )
        require_at_least(
            self,
            1,
            "width",
            "epochs",
            "batch_size",
            "microbatch_size",
            "checkpoint_every",
        )
        for field in ("train_examples", "test_examples"):
            value = getattr(self, field)
            good = value is None or (value >= 1 and value % NUM_CLASSES == 0)
            require(field, value, good, f"a multiple of {NUM_CLASSES}, or None")
        require_decay(self, "b1", "b2")
        require_non_negative(self, "eps", "weight_decay")
        rising = all(a < b for a, b in zip((0, *self.drops), self.drops, strict=False))
        require("drops", self.drops, rising, "positive and in ascending order")
        require_max_rescale(self)
        if self.train_examples is not None:
            require(
                "batch_size",
                self.batch_size,
                self.batch_size <= self.train_examples,
                f"at most train_examples ({self.train_examples})",
            )
        require(
            "microbatch_size",
            self.microbatch_size,
            self.batch_size % self.microbatch_size == 0,
            f"a divisor of batch_size ({self.batch_size})",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """One run."""

    redrawn: float = 0.0
    """Share of the training labels that is redrawn uniformly."""
    threshold: float = 0.0
    """Agreement needed to pass the AND-mask; 0 is plain training."""
    learning_rate: float = 5e-4
    """Initial learning rate."""
    seed: int = 0
    """Seed of the redrawn labels, the initial weights and the order of examples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, "redrawn", "threshold")
        require_positive(self, "learning_rate")
        require_seeds(self, "seed")

    @property
    def name(self) -> str:
        """Name among the runs of a command; also its directory."""
        return (
            f"redrawn{self.redrawn}-threshold{self.threshold}"
            f"-lr{self.learning_rate}-seed{self.seed}"
        )


@dataclasses.dataclass(frozen=True)
class MemorizeConfig(Settings):
    """Thresholds against true and random labels: figures 8 and 16."""

    thresholds: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    """Thresholds of the AND-mask; 0 is plain training."""
    labels: tuple[Labels, ...] = ("random", "true")
    """random: every label redrawn; true: none."""
    learning_rate: float = 5e-4
    """Initial learning rate."""
    seeds: tuple[int, int] = (0, 1)
    """First and last seed, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_distinct(self, "values", "thresholds")
        require_share(self, "thresholds")
        require_distinct(self, "values", "labels")
        require_kinds(self, labels=Labels)
        require_positive(self, "learning_rate")
        require_seeds(self, "seeds")

    def train_configs(self) -> list[TrainConfig]:
        """The config of every run; all of one seed before the next seed."""
        first, last = self.seeds
        return [
            TrainConfig(
                **shared_settings(self),
                redrawn=1.0 if labels == "random" else 0.0,
                threshold=threshold,
                learning_rate=self.learning_rate,
                seed=seed,
            )
            for seed in range(first, last + 1)
            for labels in self.labels
            for threshold in self.thresholds
        ]


@dataclasses.dataclass(frozen=True)
class LabelNoiseConfig(Settings):
    """Plain training and the AND-mask on partly wrong labels: figure 9."""

    drops: tuple[int, ...] = (60,)
    """Epochs after which the learning rate falls to a tenth."""
    fraction: float = 0.25
    """Share of the training labels that is redrawn uniformly."""
    methods: tuple[Method, ...] = ("baseline", "and_mask")
    """baseline: plain training; and_mask."""
    threshold: float = 0.2
    """Agreement needed to pass the AND-mask."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 5e-3)
    """Initial learning rates, each with each method."""
    seeds: tuple[int, int] = (0, 2)
    """First and last seed, both included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_share(self, "fraction")
        require_distinct(self, "values", "methods")
        require_kinds(self, methods=Method)
        require_positive_share(self, "threshold")
        require_distinct(self, "values", "learning_rates")
        require_positive(self, "learning_rates")
        require_seeds(self, "seeds")

    def train_configs(self) -> list[TrainConfig]:
        """The config of every run; all of one seed before the next seed."""
        first, last = self.seeds
        return [
            TrainConfig(
                **shared_settings(self),
                redrawn=self.fraction,
                threshold=0.0 if method == "baseline" else self.threshold,
                learning_rate=rate,
                seed=seed,
            )
            for seed in range(first, last + 1)
            for method in self.methods
            for rate in self.learning_rates
        ]


@dataclasses.dataclass(frozen=True)
class BatchNormConfig(Settings):
    """Two readings of a gradient behind shared statistics, on one batch.

    The network is trained without a mask; with its weights after some epochs the votes
    of one batch are taken both ways, and those of a network with group norm.
    `batch_norm` and `norm` are what is compared, so their settings say nothing here.
    """

    drops: tuple[int, ...] = ()
    """Epochs after which the learning rate falls to a tenth."""
    looks: tuple[int, ...] = (0, 5, 80)
    """Epochs of training after which the readings are compared."""
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    """Thresholds of the AND-mask."""
    redrawn: float = 0.0
    """Share of the training labels that is redrawn uniformly."""
    learning_rate: float = 5e-4
    """Initial learning rate."""
    rounds: int = 5
    """How often each way is timed, one after the other in every round."""
    seed: int = 0
    """Seed of the initial weights, the redrawn labels and the order of examples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_distinct(self, "values", "looks")
        rising = sorted(self.looks) == list(self.looks)
        in_range = rising and self.looks[0] >= 0 and self.looks[-1] <= self.epochs
        rule = f"in ascending order, between 0 and epochs ({self.epochs})"
        require("looks", self.looks, in_range, rule)
        # The figure has a line style for each.
        require("looks", self.looks, len(self.looks) <= 4, "at most 4")
        require_distinct(self, "values", "thresholds")
        require_positive_share(self, "thresholds")
        require_at_least(self, 1, "rounds")
        # The rest of what is asked of a training.
        self.train_config("batch")

    def train_config(self, norm: Norm) -> TrainConfig:
        """The training, with one of the two norms."""
        return TrainConfig(
            **{**shared_settings(self), "norm": norm},
            redrawn=self.redrawn,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )


@dataclasses.dataclass(frozen=True)
class CostConfig(Settings):
    """Epochs with and without the mask, side by side."""

    threshold: float = 0.2
    """Agreement needed to pass the AND-mask."""
    rounds: int = 9
    """Timed epochs of each, one after the other in every round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_share(self, "threshold")
        require_at_least(self, 1, "rounds")

    def train_config(self, norm: Norm, threshold: float) -> TrainConfig:
        """One of the trainings."""
        return TrainConfig(
            **{**shared_settings(self), "norm": norm}, threshold=threshold
        )


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where the data are."""

    data_dir: Path | None = None
    """Folder with the official files of the dataset; without it they are looked for
    where Debian installs them, then asked of tensorflow-datasets."""


@dataclasses.dataclass(frozen=True)
class VisionOptions(DataOptions, FigureOptions):
    """Where the data are and where to write, and with how many processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_dir is not None and self.results is not None:
            raise ValueError("data_dir is not read with --from, which trains nothing")


def shared_settings(config: Settings) -> dict[str, Any]:
    """The fields of `config` that all runs have."""
    return fields_of(config, Settings)


SMOKE: dict[str, Any] = {
    "dataset": "generated",
    "train_examples": 80,
    "test_examples": 40,
    "width": 2,
    "epochs": 2,
    "batch_size": 20,
    "drops": (1,),
    "checkpoint_every": 1,
}
CPU: dict[str, Any] = {
    "dataset": "fashion_mnist",
    "train_examples": 2000,
    "test_examples": 1000,
    "width": 8,
    "epochs": 40,
    "drops": (20, 30),
}
MEMORIZE_PRESETS: dict[Preset, MemorizeConfig] = {
    "smoke": MemorizeConfig(**SMOKE, thresholds=(0.0, 0.2), seeds=(0, 0)),
    # A higher learning rate for 1000 steps, where the paper has 50,000.
    "cpu": MemorizeConfig(**CPU, learning_rate=2e-3),
    "paper": MemorizeConfig(),
}
LABEL_NOISE_PRESETS: dict[Preset, LabelNoiseConfig] = {
    "smoke": LabelNoiseConfig(**SMOKE, learning_rates=(1e-3,), seeds=(0, 1)),
    "cpu": LabelNoiseConfig(**{**CPU, "drops": (30,)}),
    "paper": LabelNoiseConfig(),
}
BATCH_NORM_PRESETS: dict[Preset, BatchNormConfig] = {
    "smoke": BatchNormConfig(
        **{**SMOKE, "drops": ()}, looks=(0, 1), thresholds=(0.2, 0.6), rounds=1
    ),
    "cpu": BatchNormConfig(
        **{**CPU, "drops": (), "epochs": 10}, looks=(0, 2, 10), learning_rate=2e-3
    ),
    "paper": BatchNormConfig(),
}
COST_PRESETS: dict[Preset, CostConfig] = {
    "smoke": CostConfig(**SMOKE, rounds=2),
    "cpu": CostConfig(**CPU),
    "paper": CostConfig(),
}
