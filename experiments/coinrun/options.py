"""Options of the commands; apart from the config, which does without tyro."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.common.cli import RunOptions


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(RunOptions):
    """Which expert, and where to write."""

    expert: Path | None = None
    """The expert's file, expert.npz of a run."""
