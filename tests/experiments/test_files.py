import errno
import json
import os

import pytest

from experiments.common.files import atomic_write, remove_temporaries, write_json


def test_atomic_write_new_file_holds_the_content(tmp_path):
    atomic_write(tmp_path / "a.txt", "käse")
    atomic_write(tmp_path / "b.bin", b"\x00\x01")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "käse"
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\x01"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_atomic_write_failure_keeps_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_write_is_complete_before_it_takes_the_name(tmp_path, monkeypatch):
    seen = []
    replace = os.replace

    def spy(source, target):
        seen.append((source.read_text(), source.parent == target.parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    atomic_write(tmp_path / "a.txt", "content")
    assert seen == [("content", True)]


def test_remove_temporaries_leaves_other_files(tmp_path):
    for name in (".a.txt.12.tmp", "b.tmp", ".hidden"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "b.tmp"]


def test_write_json_non_finite_numbers_stays_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "a.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5], "c": (1, None)})
    value = json.loads(path.read_text(), parse_constant=refuse)
    assert value == {"a": "nan", "b": ["inf", 1.5], "c": [1, None]}


def test_atomic_write_on_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*file\.json'"):
        atomic_write(tmp_path / "file.json", b"{}")
    assert not any(tmp_path.iterdir())
