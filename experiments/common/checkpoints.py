"""Orbax checkpoints that are trusted only after their checksums were compared."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from experiments.common.files import (
    NOT_WRITTEN,
    atomic_write,
    file_sha256,
    remove_temporaries,
)

State = TypeVar("State")


class Checkpoints:
    """The last `keep` checkpoints of a run in `directory`.

    Beside each Orbax checkpoint `STEP/` lies `STEP.sha256`, written once the
    checkpoint is complete, in the format that `sha256sum --check` reads. One that
    was cut short or damaged therefore never passes for a good one.
    """

    def __init__(self, directory: Path, keep: int = 2):
        self._directory = Path(directory).absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self._directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: Any) -> None:
        """Saves a pytree of arrays; returns when it is complete on disk.

        Raises:
          OSError: it could not be written.
        """
        try:
            with _threads_quiet():
                self._manager.save(step, args=ocp.args.StandardSave(state))
        except Exception as error:
            # Which exception it is depends on what Orbax wrote, its text does not.
            codes = [code for code in NOT_WRITTEN if os.strerror(code) in str(error)]
            if not codes:
                raise
            path = str(self._directory / str(step))
            raise OSError(codes[0], os.strerror(codes[0]), path) from error
        atomic_write(self._checksum_file(step), self._checksums(step))
        kept = set(self._manager.all_steps())
        for file in self._directory.glob("*.sha256"):
            if int(file.stem) not in kept:
                file.unlink()

    def restore_latest(self, like: State) -> tuple[int, State] | None:
        """The newest intact checkpoint as (step, state), None if there is none.

        Damaged ones are reported on stderr and removed, so that the steps after
        the one restored can be saved again.

        Args:
          like: a state of the same structure, shapes and dtypes.

        Raises:
          ValueError: an intact checkpoint cannot be restored, because it holds
            another structure or shapes.
        """
        abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
        for step in sorted(self._manager.all_steps(), reverse=True):
            defect = self._defect(step)
            if defect is None:
                return step, self._restore(step, abstract)
            print(
                f"warning: checkpoint {self._directory / str(step)} is not usable "
                f"({defect}): going back to the one before",
                file=sys.stderr,
            )
            self._remove(step)
        return None

    def clear(self) -> None:
        """Removes all checkpoints."""
        for step in self._manager.all_steps():
            self._remove(step)

    def close(self) -> None:
        """Lets go of Orbax's resources."""
        self._manager.close()

    def _restore(self, step: int, abstract: State) -> State:
        try:
            args = ocp.args.StandardRestore(abstract)
            restored: State = self._manager.restore(step, args=args)
        except Exception as error:
            # It is what was saved, so this program asks for something else; which
            # exception says so depends on what Orbax came upon first.
            raise ValueError(str(error)) from error
        return restored

    def _remove(self, step: int) -> None:
        self._checksum_file(step).unlink(missing_ok=True)
        self._manager.delete(step)

    def _checksum_file(self, step: int) -> Path:
        return self._directory / f"{step}.sha256"

    def _checksums(self, step: int) -> str:
        files = (self._directory / str(step)).rglob("*")
        lines = [
            f"{file_sha256(file)}  {file.relative_to(self._directory).as_posix()}\n"
            for file in sorted(files)
            if file.is_file()
        ]
        return "".join(lines)

    def _defect(self, step: int) -> str | None:
        try:
            expected = self._checksum_file(step).read_bytes()
        except FileNotFoundError:
            return "it has no checksums"
        if expected != self._checksums(step).encode():
            return "its files and its checksums do not agree"
        return None


@contextlib.contextmanager
def _threads_quiet() -> Iterator[None]:
    """Keeps Orbax's threads from logging, each with traceback, what is raised too."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
