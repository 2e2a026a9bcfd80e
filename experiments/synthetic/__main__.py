"""`python -m experiments.synthetic`: averaging memorises, the AND-mask does not."""

from __future__ import annotations

import sys
from typing import Any

from experiments.common.cli import Command, Invocation, RunOptions, main
from experiments.synthetic.config import (
    PRESETS,
    CompareConfig,
    RerunConfig,
    RerunOptions,
    TrainConfig,
)

# The commands are imported when they run: --help need not wait for JAX.


def train(call: Invocation[TrainConfig, RunOptions]) -> None:
    """Train one method on one seed."""
    from experiments.synthetic import commands

    commands.train(call)


def compare(call: Invocation[CompareConfig, RunOptions]) -> None:
    """Train several methods on the same data; print a table and draw the figure."""
    from experiments.synthetic import commands

    commands.compare(call)


def rerun(call: Invocation[RerunConfig, RerunOptions]) -> None:
    """Train one method on many seeds; each result is what `train --seed` gives."""
    from experiments.synthetic import commands

    commands.rerun(call)


COMMANDS: dict[str, Command[Any, Any]] = {
    "train": Command(
        {name: TrainConfig(**values) for name, values in PRESETS.items()},
        RunOptions,
        train,
    ),
    "compare": Command(
        {name: CompareConfig(**values) for name, values in PRESETS.items()},
        RunOptions,
        compare,
    ),
    "rerun": Command(
        {name: RerunConfig(**values) for name, values in PRESETS.items()},
        RerunOptions,
        rerun,
    ),
}

if __name__ == "__main__":
    sys.exit(main("python -m experiments.synthetic", COMMANDS, sys.argv[1:]))
