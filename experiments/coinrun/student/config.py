"""Settings of the student's part of the CoinRun experiment; defaults are the paper's.

The paper (section 3.3 and appendix) leaves open: the batch size, Adam's second moment,
the ranges of the search, the stem and the initial weights of the network and what is
done about batch norm's running statistics. Unlike its Algorithm 1 both optimizers
correct the bias of their moments, as Adam does. A decay that is decoupled is scaled by
the learning rate, as in AdamW; any decay is of all weights, batch norm's included.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.coinrun.expert.config import (
    MOST_EVALUATED,
    ExpertFileOptions,
    require_evaluation_levels,
)
from experiments.coinrun.game import GameMode
from experiments.common import cli
from experiments.common.choices import Preset, Sampler
from experiments.common.cli import FigureOptions, RunOptions
from experiments.common.run_dir import RunDirError
from experiments.common.settings import fields_of
from experiments.common.validation import (
    require,
    require_at_least,
    require_decay,
    require_distinct,
    require_kinds,
    require_non_negative,
    require_positive,
    require_seeds,
    require_share,
)

Source = Literal["coinrun", "generated"]
Method = Literal["adam", "and_mask"]
Decay = Literal["off", "decoupled", "coupled"]
Actions = Literal["sampled", "greedy"]

METHODS: tuple[Method, ...] = get_args(Method)
RUNS = Path("runs") / "coinrun"
SELECTED = "selected.json"


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """States from the expert's own trajectories."""

    source: Source = "coinrun"
    """coinrun, or generated: tiny images for tests, without the game."""
    mode: GameMode = "easy"
    """Distribution of the levels."""
    levels: int = 64
    """Training levels."""
    states_per_level: int = 1000
    """States of each training level."""
    episodes_per_level: int = 8
    """Episodes of a training level that its states are drawn from; more where they have
    fewer states than are wanted."""
    test_levels: int = 2000
    """Test states, each of a level of its own."""
    seed: int = 0
    """Seed of the expert's actions and of the choice of states."""

    def __post_init__(self) -> None:
        require_kinds(self, source=Source, mode=GameMode)
        require_at_least(
            self, 1, "levels", "states_per_level", "episodes_per_level", "test_levels"
        )
        require_seeds(self, "seed")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Network and training; all that runs of both methods have in common."""

    dataset: Source = "coinrun"
    """coinrun: a directory that the command dataset has made; generated: tiny images
    for tests."""
    width: int = 64
    """Channels of ResNet-18's first stage; the last has eight times as many."""
    blocks: int = 2
    """Blocks in each of four stages; 2 makes it ResNet-18."""
    norm_momentum: float = 0.9
    """Share of batch norm's running statistics that a batch leaves as they were."""
    epochs: int = 30
    """Passes over the levels; the learning rate falls to a tenth after 1/2 and again
    after 3/4 of them."""
    batch_size: int | None = None
    """States in a step, all of one level; None for all that the level has."""
    evaluated_states: int | None = None
    """States of each level that training metrics are taken on; None for all."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to Adam's denominator."""

    def __post_init__(self) -> None:
        require_kinds(self, dataset=Source)
        require_at_least(self, 1, "width", "blocks", "epochs")
        for field in ("batch_size", "evaluated_states"):
            value = getattr(self, field)
            require(field, value, value is None or value >= 1, "at least 1, or None")
        require_decay(self, "norm_momentum", "b2")
        require_non_negative(self, "eps")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """One run."""

    method: Method = "and_mask"
    """adam, or and_mask: the temporal AND-mask Adam (Algorithm 1)."""
    learning_rate: float = 0.0078
    """Initial learning rate."""
    b1: float = 0.21
    """Decay of the first moment."""
    b3: float = 0.79
    """Decay of the average of signs; only for and_mask."""
    threshold: float = 0.36
    """Agreement over time that opens a weight; only for and_mask."""
    weight_decay: float = 0.057
    """Strength of the weight decay."""
    decay: Decay = "decoupled"
    """decoupled: an update of its own, which no mask stops (AdamW). coupled: added to
    the gradient, before moments and signs. off: none."""
    seed: int = 0
    """Seed of the initial weights and of the order of levels and states."""
    checkpoint_every: int = 5
    """Epochs between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kinds(self, method=Method, decay=Decay)
        require_positive(self, "learning_rate")
        require_decay(self, "b1", "b3")
        require_share(self, "threshold")
        require_non_negative(self, "weight_decay")
        require_seeds(self, "seed")
        require_at_least(self, 1, "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class SearchConfig(Settings):
    """Settings that all trials share; the rest is drawn (see `search.RANGES`)."""

    methods: tuple[Method, ...] = METHODS
    """Methods to search for, one after the other."""
    trials: int = 1024
    """Finished trials of each method; those that diverged count."""
    sampler: Sampler = "tpe"
    """tpe, which looks at the test KL as the paper does, at all settings together;
    univariate_tpe, as searches of the paper's time, at one after the other; random."""
    top: int = 10
    """Best trials of each method that the figures show."""
    seed: int = 0
    """Seed of the initial weights and the order of states, in all trials."""
    search_seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kinds(self, methods=Method)
        require_distinct(self, "methods", "methods")
        require_at_least(self, 1, "trials", "top")
        require_kinds(self, sampler=Sampler)
        require_seeds(self, "seed", "search_seed")


@dataclasses.dataclass(frozen=True)
class RerunConfig(Settings):
    """Settings that all runs share; methods and their settings come from a search."""

    seeds: tuple[int, int] = (1, 5)
    """First and last seed of the initial weights and the order of states."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seeds(self, "seeds")


@dataclasses.dataclass(frozen=True)
class PlayConfig:
    """A trained student and an expert on the same levels, which neither has seen."""

    levels: int = 1000
    """Levels that each of them plays once."""
    actions: Actions = "sampled"
    """sampled from the policy's distribution, as for the dataset, or greedy."""
    shown: int = 3
    """Levels in the animation."""
    max_frames: int = 150
    """Steps of a level in the animation."""
    seed: int = 0
    """Seed of the actions."""

    def __post_init__(self) -> None:
        require_kinds(self, actions=Actions)
        require_evaluation_levels("levels", self.levels)
        require_at_least(self, 1, "shown", "max_frames")
        rule = f"at most levels ({self.levels})"
        require("shown", self.shown, self.shown <= self.levels, rule)
        require_seeds(self, "seed")


@dataclasses.dataclass(frozen=True)
class DataOptions(RunOptions):
    """Where the data are and where to write."""

    data: Path | None = None
    """Directory of the dataset; without it the one that the command dataset makes with
    this preset."""

    def data_dir(self, source: Source) -> Path:
        """The directory to use.

        Raises:
          RunDirError: one is given that a dataset of this source is not read from.
        """
        if source == "generated" and self.data is not None:
            raise RunDirError(
                "--data is not read: the dataset 'generated' is made anew; leave it "
                "out, or choose another with --dataset"
            )
        return self.data or RUNS / f"dataset-{self.preset}"


@dataclasses.dataclass(frozen=True)
class SearchOptions(DataOptions, FigureOptions, cli.SearchOptions):
    """Where the data are, where to write, and with how many processes."""


@dataclasses.dataclass(frozen=True)
class RerunOptions(DataOptions, FigureOptions):
    """The choice to train, where the data are, where to write, with how many
    processes.
    """

    selected: Path | None = None
    """File with the settings of each method, selected.json of a run of the command
    search; without it that of the search with this preset."""

    @property
    def selected_file(self) -> Path:
        """The file to use."""
        return self.selected or RUNS / f"search-{self.preset}-seed0" / SELECTED


@dataclasses.dataclass(frozen=True)
class PlayOptions(ExpertFileOptions):
    """Who plays, and where to write."""

    student: Path | None = None
    """Directory of a finished training run; without it the one that the command train
    makes with this preset."""

    @property
    def student_dir(self) -> Path:
        """The directory to use."""
        return self.student or RUNS / f"train-and_mask-{self.preset}-seed0"


def shared_settings(config: Settings) -> dict[str, Any]:
    """The fields of `config` that training and search have in common."""
    return fields_of(config, Settings)


SMOKE: dict[str, Any] = {
    "dataset": "generated",
    "width": 2,
    "blocks": 1,
    "epochs": 2,
    "batch_size": 8,
}
# A tenth of the states, an eighth of the channels, two thirds of the epochs.
CPU: dict[str, Any] = {
    "width": 8,
    "epochs": 20,
    "batch_size": 64,
    "evaluated_states": 16,
}

DATASET_PRESETS: dict[Preset, DatasetConfig] = {
    "smoke": DatasetConfig(
        source="generated", levels=8, states_per_level=16, test_levels=64
    ),
    "cpu": DatasetConfig(states_per_level=100),
    "paper": DatasetConfig(mode="hard"),
}
TRAIN_PRESETS: dict[Preset, TrainConfig] = {
    "smoke": TrainConfig(**SMOKE, checkpoint_every=1),
    "cpu": TrainConfig(**CPU),
    "paper": TrainConfig(),
}
SEARCH_PRESETS: dict[Preset, SearchConfig] = {
    "smoke": SearchConfig(**SMOKE, trials=3, top=2),
    "cpu": SearchConfig(**CPU, trials=25),
    "paper": SearchConfig(sampler="univariate_tpe"),
}
RERUN_PRESETS: dict[Preset, RerunConfig] = {
    "smoke": RerunConfig(**SMOKE, seeds=(1, 2)),
    "cpu": RerunConfig(**CPU),
    "paper": RerunConfig(),
}
PLAY_PRESETS: dict[Preset, PlayConfig] = {
    "smoke": PlayConfig(levels=4, shown=2, max_frames=20),
    "cpu": PlayConfig(),
    "paper": PlayConfig(levels=MOST_EVALUATED),
}
