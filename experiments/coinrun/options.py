"""Options of the commands; apart from the config, which does without tyro."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.common.cli import FigureOptions, RunOptions

RUNS = Path("runs") / "coinrun"
SELECTED = "selected.json"
# Trained by the command expert with its default settings.
EXPERT = Path(__file__).parents[2] / "docs" / "results" / "coinrun" / "expert.npz"


@dataclasses.dataclass(frozen=True)
class ExpertFileOptions(RunOptions):
    """Which expert, and where to write."""

    expert: Path | None = None
    """The expert's file, expert.npz of a run of the command expert; without it the one
    for easy levels that the repository has."""

    @property
    def expert_file(self) -> Path:
        """The file to use."""
        return self.expert or EXPERT


@dataclasses.dataclass(frozen=True)
class DataOptions(RunOptions):
    """Where the data are and where to write."""

    data: Path | None = None
    """Directory of the dataset; without it the one that the command dataset makes with
    this preset."""

    @property
    def data_dir(self) -> Path:
        """The directory to use."""
        return self.data or RUNS / f"dataset-{self.preset}"


@dataclasses.dataclass(frozen=True)
class SearchOptions(DataOptions, FigureOptions):
    """Where the data are, where to write, and with how many processes."""

    storage: str | None = None
    """Database URL or journal file that several commands share, each with an --out of
    its own; without it a journal in the run directory."""


@dataclasses.dataclass(frozen=True)
class RerunOptions(DataOptions, FigureOptions):
    """What to train, where the data are, where to write, with how many processes."""

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
