"""Measuring PyTorch for the subcommands, in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.cli import RunOptions
from experiments.common.run_dir import RunDirError

# First losses that are further apart, relatively, are not rounding.
LOSS_TOLERANCE = 1e-3

# Sends a request to the process and returns its answer.
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class PeerOptions(RunOptions):
    """Where to write, and the other interpreter."""

    torch_python: Path | None = None
    """Interpreter with PyTorch; without it the PyTorch peers are left out. `make bench`
    installs one and passes it."""


@contextlib.contextmanager
def torch_process(python: Path, script: str) -> Iterator[Ask]:
    """Runs a script of this directory with another interpreter, while it is needed."""
    path = Path(__file__).with_name(script)
    flag = f"--torch-python {python}"
    with peer_process([str(python), str(path)], flag, "PyTorch") as ask:
        yield ask


@contextlib.contextmanager
def peer_process(command: Sequence[str], flag: str, name: str) -> Iterator[Ask]:
    """Runs a command that answers lines, while it is needed.

    Args:
      command: the program and its arguments.
      flag: where the program came from, for messages.
      name: what it runs, likewise.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        raise RunDirError(f"{flag}: {error.strerror}") from None

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise RunDirError(
                f"the {name} process ended early: see its message above; "
                "`make bench` installs what it needs"
            ) from None
        return answer

    with process:
        try:
            yield ask
        finally:
            process.kill()
            # A process that died early left a request behind, which closing the pipe
            # would try to send once more.
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def require_same_losses(losses: dict[str, float], unit: str) -> None:
    """Refuses contestants whose first losses differ.

    Args:
      losses: what each reported of its first `unit`.
      unit: epoch or step, for the message.

    Raises:
      RunDirError: they do not train the same, so that the seconds say nothing.
    """
    require_close(losses, f"losses of the first {unit}", LOSS_TOLERANCE)


def require_close(values: Mapping[str, float], what: str, tolerance: float) -> None:
    """Refuses contestants whose values are relatively further apart than that.

    Raises:
      RunDirError: they are.
    """
    numbers = list(values.values())
    if not np.ptp(numbers) <= tolerance * np.max(numbers):  # also if one is NaN
        raise RunDirError(
            f"the contestants do not train the same; {what}: "
            + ", ".join(f"{name} {value:.6f}" for name, value in values.items())
        )
