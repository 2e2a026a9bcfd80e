"""The directory that a run writes, and the rules for entering one again.

    config.json     what was asked for; identifies the run
    manifest.json   device, versions, git revision, command, wall time; a copy of
                    config.json, should that be damaged
    metrics.csv     one row per epoch; the same bytes however often it was resumed
    summary.json    the result; its presence marks the run as finished
    *.png           figures
    checkpoint/     the last two checkpoints, with their checksums

The same command on the same directory resumes an unfinished run and leaves a
finished one alone, which it shows where nothing can be written, too. A directory that
holds another config, or that is no run directory at all, is refused. A run of several
parts keeps each of them as a run in a directory of its own below.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl  # POSIX only, and with it all experiments
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from experiments.common.files import atomic_write, remove_temporaries, write_json
from experiments.common.manifest import describe_environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG = "config.json"
MANIFEST = "manifest.json"
METRICS = "metrics.csv"
SUMMARY = "summary.json"
CHECKPOINT = "checkpoint"
_LOCK = ".lock"

# What a result may depend on besides the config, and what a warning calls it.
_SURROUNDINGS = {
    "device": "device",
    "cpu": "CPU",
    "cores": "number of cores",
    "python": "Python",
    "packages": "set of packages",
    "xla_flags": "XLA_FLAGS",
    "glibc_tunables": "GLIBC_TUNABLES",
    "git": "git revision",
}

# What a later session goes on with, and its kinds.
_CARRIED = {"wall_time_s": float, "sessions": int, "earlier_environments": list}

Row = Mapping[str, Any]


class RunDirError(Exception):
    """A run cannot go ahead as asked; the message is for the user."""


class StoppedError(Exception):
    """A run was stopped from outside, and the same command goes on.

    The message is for the user, and says by what.
    """


class RunDir:
    """A locked run directory. Use it as a context manager.

    Args:
      path: the directory; made, with its parents, if it is not there.
      experiment: name of the experiment and its subcommand, part of the identity.
      config: what defines the run's result: a dataclass, or a mapping to JSON values.
      seed: recorded in the manifest.
      command: the command line, recorded in the manifest.
      overwrite: start again, whatever config the directory holds.
      outputs: names of further files that the experiment writes here and in its
        parts (figures, tables), so that `overwrite` can remove them.
      parts: name of the experiment whose runs are this one's parts. `overwrite`
        discards all of them, also those that `config` no longer asks for.

    Raises:
      RunDirError: the directory holds another experiment, another config or
        foreign files, it cannot be made or written to, or another process is using it
        or a part to be discarded. Nothing was changed then.
    """

    def __init__(
        self,
        path: Path,
        experiment: str,
        config: Any,
        *,
        seed: int | None = None,
        command: str | None = None,
        overwrite: bool = False,
        outputs: Sequence[str] = (),
        parts: str | None = None,
    ):
        self.path = Path(path)
        self._refuse_foreign()
        _make_directory(self.path)
        self._lock: int | None = None
        if overwrite or not self.finished or os.access(self.path, os.W_OK):
            self._lock = _lock(self.path)
        try:
            self._enter(experiment, config, overwrite, outputs, parts)
            self._seed, self._command = seed, command
            self._begin_session()
        except BaseException:
            self.close()
            raise

    def _refuse_foreign(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunDirError(f"{self.path} is a file, not a directory: choose another")
        if _read_identity(self.path) is not None:
            return
        ours = (_LOCK, f".{CONFIG}.")  # killed before config.json was there
        foreign = [p.name for p in self.path.iterdir() if not p.name.startswith(ours)]
        if {CONFIG, MANIFEST} <= set(foreign):
            raise RunDirError(
                f"{self.path / CONFIG}, which says what run this is, is damaged, and "
                f"{MANIFEST} has no copy of it: put there the {CONFIG} that the same "
                "command makes in another directory (--out); nothing was changed"
            )
        if foreign:
            raise RunDirError(
                f"{self.path} is not empty and not a run directory (it holds "
                f"{sorted(foreign)[0]!r}): choose another; nothing was changed"
            )

    def _enter(
        self,
        experiment: str,
        config: Any,
        overwrite: bool,
        outputs: Sequence[str],
        parts: str | None,
    ) -> None:
        fields = config if isinstance(config, Mapping) else dataclasses.asdict(config)
        identity = {"experiment": experiment, "config": dict(fields)}
        identity = json.loads(json.dumps(identity))
        held = _identity_in(self.path / CONFIG)
        if held is None and (copied := _read_identity(self.path)) is not None:
            _warn(f"{self.path / CONFIG} is damaged; {MANIFEST} has a copy")
            held = copied
            if self._lock is not None:
                write_json(self.path / CONFIG, held)
        written = held
        if held is not None:
            if held["config"] is not None:
                present = with_present_names(held["config"], config)
                held = {**held, "config": present}
            same = held["experiment"] == experiment
            open_to_any = overwrite or held["config"] is None
            if not same or (held != identity and not open_to_any):
                raise RunDirError(_describe_conflict(self.path, held, identity))
            if overwrite:
                self._discard(outputs, parts)
        self._identity = identity
        if self._lock is None:
            return
        remove_temporaries(self.path)
        if written != identity:
            write_json(self.path / CONFIG, identity)

    def _discard(self, outputs: Sequence[str], parts: str | None) -> None:
        """Removes the results of the run and its parts; config.json stays.

        The parts go first: a kill in between leaves the run that was there, which a
        new one can replace, and never lets a new run find a part of the old one.
        """
        found = [
            directory
            for directory in sorted(self.path.iterdir())
            if (identity := _read_identity(directory)) is not None
            and identity["experiment"] == parts
        ]
        with contextlib.ExitStack() as locks:
            for directory in found:
                locks.callback(os.close, _lock(directory))
            for directory in found:
                _clear(directory, outputs)
                # Still a run directory, whatever else lies in it, and for any config.
                identity = {"experiment": parts, "config": None}
                write_json(directory / CONFIG, identity)
        _clear(self.path, outputs)

    def _begin_session(self) -> None:
        self._started = time.monotonic()
        self._manifest = self.manifest()
        self._wall_time = float(self._manifest.get("wall_time_s", 0.0))
        if self.finished:
            return
        environment = describe_environment()
        before = self._manifest
        earlier = before.get("earlier_environments", [])
        changed = [
            label
            for name, label in _SURROUNDINGS.items()
            if before and before.get(name) != environment[name]
        ]
        if changed:
            earlier = [*earlier, {name: before.get(name) for name in environment}]
            _warn(
                f"{self.path} was begun under another {', '.join(changed)}: the result "
                "may differ from an uninterrupted run's"
            )
        self._manifest = {
            **environment,
            "seed": self._seed,
            "command": self._command,
            "run": self._identity,
            "sessions": before.get("sessions", 0) + 1,
        }
        if earlier:
            self._manifest["earlier_environments"] = earlier
        self.save_manifest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def finished(self) -> bool:
        """Whether the run's summary is there, which is the last thing written."""
        return (self.path / SUMMARY).exists()

    @property
    def wall_time(self) -> float:
        """Seconds spent on the run in all its sessions so far."""
        if self.finished:
            return float(self._manifest.get("wall_time_s", 0.0))
        return self._wall_time + time.monotonic() - self._started

    def contents(self) -> list[str]:
        """Files of the run, then directories; its parts are only counted."""
        shown = [p for p in sorted(self.path.iterdir()) if not p.name.startswith(".")]
        parts = [p for p in shown if (p / CONFIG).exists()]
        files = [p.name for p in shown if not p.is_dir()]
        others = [f"{p.name}/" for p in shown if p.is_dir() and p not in parts]
        counted = [f"{len(parts)} parts" if len(parts) > 1 else "1 part"]
        return [*files, *others, *counted[: len(parts)]]

    def summary(self) -> dict[str, Any]:
        """The result of a finished run."""
        path = self.path / SUMMARY
        try:
            summary = json.loads(path.read_text())
            if not isinstance(summary, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise RunDirError(
                f"{path} is damaged ({error}): remove it, and the same command makes "
                "it again from what is saved"
            ) from None
        return summary

    def manifest(self) -> dict[str, Any]:
        """The record of the run's surroundings; empty before the first.

        One that is damaged is no reason to stop: nothing is computed from it.
        """
        path = self.path / MANIFEST
        manifest = _read_manifest(path)
        if manifest is None:
            _warn(f"{path} is damaged: what it recorded of the run is lost")
        return manifest or {}

    def save_manifest(self) -> None:
        """Brings the manifest's wall time up to date."""
        self._manifest["wall_time_s"] = round(self.wall_time, 3)
        write_json(self.path / MANIFEST, self._manifest)

    def write_metrics(self, rows: Sequence[Row], name: str = METRICS) -> None:
        """Replaces a CSV file; see `format_csv`."""
        atomic_write(self.path / name, format_csv(rows))

    def read_metrics(self) -> list[dict[str, float]]:
        """Rows of metrics.csv as far as it is readable, none if it is not there."""
        try:
            text = (self.path / METRICS).read_text()
            rows = csv.DictReader(io.StringIO(text))
            return [{name: float(row[name]) for name in row} for row in rows]
        except (FileNotFoundError, ValueError, TypeError):
            return []

    def save_figure(self, name: str, figure: Figure) -> None:
        """Writes a Matplotlib figure as PNG."""
        save_png(self.path / name, figure)

    def reopen(self) -> None:
        """Takes the summary away, so that a finished run may go on."""
        (self.path / SUMMARY).unlink(missing_ok=True)
        self._begin_session()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary; after this the run counts as finished."""
        self.save_manifest()
        write_json(self.path / SUMMARY, dict(summary))


def with_present_names(settings: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """`settings` under the names that the fields of `config` have now.

    A config whose fields were renamed has the mapping `FORMER_NAMES`, so that earlier
    runs and files of settings stay readable.
    """
    names = getattr(config, "FORMER_NAMES", {})
    return {names.get(name, name): value for name, value in settings.items()}


def save_png(path: Path, figure: Figure) -> None:
    """Writes a Matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())


def _clear(path: Path, outputs: Sequence[str]) -> None:
    # The summary goes first: what a kill in between leaves is an unfinished run.
    (path / SUMMARY).unlink(missing_ok=True)
    shutil.rmtree(path / CHECKPOINT, ignore_errors=True)
    for name in (METRICS, MANIFEST, *outputs):
        (path / name).unlink(missing_ok=True)
    remove_temporaries(path)


def nine_digits(value: float) -> float:
    """`value` as `format_csv` writes it."""
    return float(f"{float(value):.9g}")


def format_csv(rows: Sequence[Row]) -> str:
    """CSV text of `rows`; the columns are the first row's keys.

    Floats have nine significant digits, which identifies every float32.
    """
    if not rows:
        return ""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(
            f"{row[name]:.9g}" if isinstance(row[name], float) else row[name]
            for name in rows[0]
        )
    return buffer.getvalue()


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        links = [part for part in (path, *path.parents) if part.is_symlink()]
        reason = error.strerror
        if links and not links[0].exists():
            reason = f"{links[0]} is a link to nothing"
        raise RunDirError(
            f"{path} cannot be made ({reason}): choose another directory with --out"
        ) from None


def _lock(path: Path) -> int:
    try:
        handle = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise RunDirError(
            f"{path} cannot be written to ({error.strerror}): choose another directory "
            "with --out"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            problem = "is in use by another process: wait for it, or"
        else:
            problem = f"lies in a file system without locks ({error.strerror}):"
        raise RunDirError(
            f"{path} {problem} choose another directory with --out"
        ) from None
    return handle


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest, empty if there is none; None if it is damaged."""
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return None
    sound = isinstance(manifest, dict) and all(
        isinstance(manifest.get(name, kind()), kind) for name, kind in _CARRIED.items()
    )
    return manifest if sound else None


def _read_identity(path: Path) -> dict[str, Any] | None:
    """The experiment and config that a directory holds, None if it is not ours."""
    held = _identity_in(path / CONFIG)
    if held is None:
        held = _identity_of((_read_manifest(path / MANIFEST) or {}).get("run"))
    return held


def _identity_in(path: Path) -> dict[str, Any] | None:
    try:
        return _identity_of(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _identity_of(value: Any) -> dict[str, Any] | None:
    ours = isinstance(value, dict) and set(value) == {"experiment", "config"}
    return value if ours else None


def _describe_conflict(path: Path, held: dict[str, Any], asked: dict[str, Any]) -> str:
    mend = "choose another directory with --out"
    if held["experiment"] != asked["experiment"]:
        return (
            f"{path} holds a run of {held['experiment']}, not of "
            f"{asked['experiment']}: {mend}; nothing was changed"
        )
    return (
        f"{path} holds another config: {mend}, or replace it with --overwrite\n"
        + describe_differences(held["config"], asked["config"])
    )


def describe_differences(held: dict[str, Any], asked: dict[str, Any]) -> str:
    """One line for each setting that is not the same in both."""
    return "\n".join(
        f"  {name}: {_show(held, name)} there, {_show(asked, name)} asked for"
        for name in sorted(held.keys() | asked.keys())
        if name not in held or name not in asked or held[name] != asked[name]
    )


def _show(config: dict[str, Any], name: str) -> str:
    return repr(config[name]) if name in config else "nothing"
