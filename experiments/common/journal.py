"""A search's journal: one JSON record in a line, which damage does not pass unnoticed.

Optuna's storage replays the records. Its own file backend knows neither which file nor
which line it cannot read, and would go on without a line that is missing: trials are
known by the order in which they begin, so what follows would count for others. Here
each record has its number, which Optuna does not look at; those of earlier journals
have none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from experiments.common.run_dir import RunDirError

_NUMBER = "number"
# As every record begins.
_BEGINNING = b'{"op_code":'


class JournalError(RunDirError):
    """A journal that is damaged; the message says where, and the mend."""


def open_journal(path: Path) -> JournalStorage:
    """The storage that a journal makes up, begun if it is not there.

    Raises:
      JournalError: a line is damaged or missing.
    """
    journal = Journal(path)
    try:
        return JournalStorage(journal)
    except (OSError, JournalError):
        raise
    except Exception as error:
        # What Optuna raises depends on what the record lacks.
        raise journal.damaged(f"cannot be replayed ({error!r})") from error


class _Place(NamedTuple):
    """Where a record begins: its number, and that of its line, from 1."""

    record: int = 0
    offset: int = 0
    line: int = 1


class Journal(BaseJournalBackend):
    """A journal's records. Blank lines, which hold none, are passed over.

    Args:
      path: of the file; made, with its directory, if it is not there.
    """

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._next = _Place()
        self._line = 1  # of the record that was handed out last

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Records from a number on, as far as their lines are whole.

        Raises:
          JournalError: a line is damaged, or one before it is missing.
        """
        start = self._next if self._next.record == log_number_from else _Place()
        for record, place, after in self._records(start):
            if place.record >= log_number_from:
                self._line, self._next = place.line, after
                yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes records, in place of what a killed worker wrote half of."""
        with self.locked() as file:
            # Behind what other workers have written since.
            ends = (after for _, _, after in self._records(self._next))
            end = max(ends, default=self._next)
            file.seek(end.offset)
            if not file.read().isspace():
                file.truncate(end.offset)
            text = "".join(
                json.dumps({**log, _NUMBER: number}, separators=(",", ":")) + "\n"
                for number, log in enumerate(logs, end.record)
            )
            with open(self._path, "ab") as appending:
                appending.write(text.encode())
                appending.flush()
                os.fsync(appending.fileno())

    @contextlib.contextmanager
    def locked(self) -> Iterator[BinaryIO]:
        """The file, with an flock on it, which ends with the process that holds it.

        Optuna's own locks are files that a killed holder leaves behind: everybody
        waits for half a minute and then takes them away, from a slow holder too.
        """
        with open(self._path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def damaged(self, problem: str, line: int | None = None) -> JournalError:
        """An error that names a line, of the last record unless another is given.

        Lines cannot be taken out one by one: trials are known by their order.
        """
        line = self._line if line is None else line
        mend = "choose another journal, or begin anew"
        if line > 1:
            mend = (
                f"put a copy in its place, or keep the {line - 1} lines before it "
                f"(`head -n {line - 1}`), after which the trials recorded since run "
                "again"
            )
        return JournalError(f"{self._path}, line {line}, {problem}: {mend}")

    def _records(
        self, start: _Place
    ) -> Iterator[tuple[dict[str, Any], _Place, _Place]]:
        """Each record from `start` on, with its own place and that of the next."""
        number, offset, line = start
        with open(self._path, "rb") as file:
            file.seek(offset)
            for text in file:
                place = _Place(number, offset, line)
                if not text.endswith(b"\n"):  # being written, or never finished
                    self._require_beginning(text, place)
                    return
                offset, line = offset + len(text), line + 1
                if text.isspace():
                    continue
                record = self._record(text, place)
                number += 1
                yield record, place, _Place(number, offset, line)

    def _require_beginning(self, text: bytes, place: _Place) -> None:
        """Refuses what may be anything, and must not be cut off."""
        # A file system may leave zeros of what it had not written.
        begun = text.rstrip(b"\0")[: len(_BEGINNING)]
        if not _BEGINNING.startswith(begun):
            raise self.damaged("is not a record of a search", place.line)

    def _record(self, text: bytes, place: _Place) -> dict[str, Any]:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise self.damaged(f"is damaged ({reason})", place.line) from None
        if not isinstance(record, dict) or type(record.get("op_code")) is not int:
            raise self.damaged("is not a record of a search", place.line)
        number = record.get(_NUMBER)
        # Machines whose locks do not reach each other may give a number twice.
        if type(number) is int and number > place.record:
            problem = (
                f"is record {number}, where {place.record} was to be expected, so "
                "lines before it are missing"
            )
            raise self.damaged(problem, place.line)
        return record
