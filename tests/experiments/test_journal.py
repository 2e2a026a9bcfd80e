"""Journals as a full disk, a power failure or an editor leaves them."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from experiments.common import search as searches
from experiments.common.journal import Journal, JournalError
from experiments.common.search import Search, open_study, run_trial
from tests.experiments.conftest import ROOT
from tests.experiments.toy_search import Toy, finish


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Lines of the journal of a search with two trials, and more studies in it."""
    search = Search("toy", tmp_path_factory.mktemp("search"), trials=2)
    finish(search, Toy())
    return search.journal.read_bytes().splitlines(keepends=True)


@pytest.fixture
def search(tmp_path):
    return Search("toy", tmp_path, trials=3)


def halved(line):
    return line[: len(line) // 2]


def replaced(lines, index, *others):
    return [*lines[:index], *others, *lines[index + 1 :]]


@pytest.mark.parametrize("index", [1, 7, -1])
@pytest.mark.parametrize(
    "damage",
    {
        "cut short": lambda line: [halved(line) + b"\n"],
        "two records in one line": lambda line: [line.rstrip() + line],
        "a comma too many": lambda line: [line.rstrip() + b",\n"],
        "other JSON": lambda line: [b"[1, 2]\n"],
        "JSON of something else": lambda line: [b'{"op_code": "four"}\n'],
        "an operation that is none": lambda line: [b'{"op_code": 99}\n'],
        "an operation without arguments": lambda line: [
            b'{"op_code": 4, "worker_id": "x"}\n'
        ],
        "zeros": lambda line: [b"\0" * 40 + b"\n"],
        "binary": lambda line: [b"\x89\xfe\xff\n"],
        "nested without an end": lambda line: [b"[" * 100_000 + b"\n"],
    }.items(),
    ids=lambda damage: damage[0],
)
def test_open_study_damaged_line_is_refused_naming_it(damage, index, lines, search):
    index %= len(lines)
    damaged = b"".join(replaced(lines, index, *damage[1](lines[index])))
    search.journal.write_bytes(damaged)
    where = re.escape(f"{search.journal}, line {index + 1}, ")
    with pytest.raises(JournalError, match=where) as error:
        open_study(search)
    assert search.journal.read_bytes() == damaged
    # The mend that it names.
    keep = int(re.search(r"head -n (\d+)", str(error.value))[1])
    search.journal.write_bytes(b"".join(damaged.splitlines(keepends=True)[:keep]))
    assert [row["number"] for row in finish(search, Toy())] == [0, 1, 2]


@pytest.mark.parametrize("index", [0, 1, 7, -2])
def test_open_study_missing_line_is_refused_naming_the_next(index, lines, search):
    index %= len(lines)
    search.journal.write_bytes(b"".join(replaced(lines, index)))
    where = re.escape(f"{search.journal}, line {index + 1}, is record {index + 1}, wh")
    with pytest.raises(JournalError, match=where):
        open_study(search)


@pytest.mark.parametrize(
    "spoil",
    {
        "blank lines": lambda lines: [*lines[:3], b"\n", b" \t\r\n", *lines[3:]],
        "a blank line in front": lambda lines: [b"\n", *lines],
        "a blank line at the end": lambda lines: [*lines, b"\n"],
        "lines of another system": lambda lines: [
            line.rstrip() + b"\r\n" for line in lines
        ],
        "half a line": lambda lines: [*lines, halved(lines[-1])],
        "the first letter of a line": lambda lines: [*lines, b"{"],
        "zeros that were to be a line": lambda lines: [*lines, b"\0" * 100],
        "half a line behind a blank one": lambda lines: [
            *lines,
            b"\n",
            halved(lines[-1]),
        ],
        "nothing": lambda lines: [],
    }.items(),
    ids=lambda spoil: spoil[0],
)
def test_search_goes_on_where_nothing_is_lost(spoil, lines, search):
    search.journal.write_bytes(b"".join(spoil[1](lines)))
    assert [row["number"] for row in finish(search, Toy())] == [0, 1, 2]
    written = search.journal.read_bytes()
    assert b"\0" not in written
    records = [json.loads(line) for line in written.splitlines() if line.strip()]
    assert [record["number"] for record in records] == list(range(len(records)))


def test_search_goes_on_with_a_journal_without_numbers(lines, search):
    bare = [{**json.loads(line)} for line in lines]
    for record in bare:
        del record["number"]
    search.journal.write_text("".join(json.dumps(record) + "\n" for record in bare))
    assert [row["number"] for row in finish(search, Toy())] == [0, 1, 2]
    last = search.journal.read_bytes().splitlines()[-1]
    assert json.loads(last)["number"] > len(lines)


@pytest.mark.parametrize(
    "content", [b"SQLite format 3\0", b"\x89PNG\r\n\x1a\n", b"x,y\n1,2\n"]
)
def test_open_study_of_a_foreign_file_is_refused_and_leaves_it(content, search):
    file = search.directory / "mine"
    file.write_bytes(content)
    with pytest.raises(JournalError, match=re.escape(f"{file}, line 1, is")):
        open_study(dataclasses.replace(search, storage=file))
    assert file.read_bytes() == content


def test_run_trial_journal_damaged_meanwhile_is_refused_naming_the_line(search):
    def spoil(trial):
        with open(search.journal, "ab") as journal:
            journal.write(b"\0\0\n")
        return Toy()(trial)

    with pytest.raises(JournalError, match=re.escape(f"{search.journal}, line ")):
        run_trial(search, spoil)


def test_journal_lock_ends_with_the_process_that_is_killed(search):
    open_study(search)
    code = (
        "import pathlib, sys, time; from experiments.common.journal import Journal\n"
        "with Journal(pathlib.Path(sys.argv[1])).locked():\n"
        "    print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, search.journal]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        unlocked = searches._is_unlocked(search.journal)
        holder.kill()
    assert not unlocked
    assert searches._is_unlocked(search.journal)
    with Journal(search.journal).locked():
        assert not searches._is_unlocked(search.journal)
