"""Options of the commands; apart from the config, which does without tyro."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.common.cli import FigureOptions


@dataclasses.dataclass(frozen=True)
class VisionOptions(FigureOptions):
    """Where the data are and where to write, and with how many processes."""

    data_dir: Path | None = None
    """Folder with the official files of the dataset; without it they are looked for
    where Debian installs them, then asked of tensorflow-datasets."""
