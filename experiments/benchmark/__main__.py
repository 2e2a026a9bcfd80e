"""`python -m experiments.benchmark`: training steps and epochs, side by side."""

from __future__ import annotations

import sys
from typing import Any

from experiments.benchmark import epoch_profile, epochs, gramian, growth, loops, steps
from experiments.benchmark.peer import PeerOptions
from experiments.common.cli import Command, RunOptions, main

PROG = "python -m experiments.benchmark"

COMMANDS: dict[str, Command[Any, Any]] = {
    "epochs": Command(epochs.configs(), PeerOptions, epochs.run_benchmark),
    "profile": Command(epoch_profile.PROFILES, RunOptions, epoch_profile.run_profile),
    "steps": Command(steps.PRESETS, PeerOptions, steps.run_steps),
    "gramian": Command(gramian.PRESETS, gramian.GramianOptions, gramian.run_gramian),
    "growth": Command(growth.PRESETS, RunOptions, growth.run_growth),
    "loops": Command(loops.PRESETS, RunOptions, loops.run_loops),
}

if __name__ == "__main__":
    sys.exit(main(PROG, COMMANDS, sys.argv[1:]))
