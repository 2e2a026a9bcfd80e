import dataclasses
import errno
import json
import os
import pathlib
import shutil
import subprocess
from typing import ClassVar

import jax
import numpy as np
import pytest

from experiments.common import manifest
from experiments.common.run_dir import RunDir, RunDirError, format_csv
from tests.experiments.conftest import ToyConfig


def contents(directory):
    return {
        p.relative_to(directory): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


def test_run_dir_new_directory_records_config_and_surroundings(open_run):
    with open_run(seed=7, command="python -m toy") as run:
        config = json.loads((run.path / "config.json").read_text())
        recorded = json.loads((run.path / "manifest.json").read_text())
    assert config == {
        "experiment": "toy train",
        "config": {"rate": 0.5, "sizes": [1, 2], "name": "toy"},
    }
    assert recorded["seed"] == 7
    assert recorded["command"] == "python -m toy"
    assert recorded["device"]["platform"] == "cpu"
    assert recorded["cores"] >= 1
    assert recorded["memory_bytes"] > 2**28
    assert recorded["packages"]["jax"] == jax.__version__
    assert recorded["cpu"]
    assert recorded["xla_flags"] == os.environ.get("XLA_FLAGS")
    assert recorded["glibc_tunables"] == os.environ.get("GLIBC_TUNABLES")
    assert recorded["wall_time_s"] >= 0


def test_run_dir_second_session_adds_up_wall_time(open_run, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with open_run() as run:
        clock[0] += 5
        run.save_manifest()
    clock[0] += 1000
    with open_run() as run:
        clock[0] += 3
        run.finish({"loss": 1.0})
        assert run.wall_time == 8
    with open_run() as run:
        clock[0] += 50
        assert run.wall_time == 8
        assert run.manifest()["sessions"] == 2
        assert run.manifest()["wall_time_s"] == 8


def test_run_dir_finished_run_keeps_its_files(open_run):
    with open_run(command="first") as run:
        assert not run.finished
        run.finish({"loss": 1.5})
    before = contents(run.path)
    with open_run(command="second") as run:
        assert run.finished
        assert run.summary() == {"loss": 1.5}
    assert contents(run.path) == before


def test_run_dir_other_config_is_refused_listing_the_fields(open_run):
    with open_run() as run:
        pass
    before = contents(run.path)
    with pytest.raises(RunDirError) as error:
        open_run(ToyConfig(rate=0.25, sizes=(1, 2, 3)))
    message = str(error.value)
    assert "rate: 0.5 there, 0.25 asked for" in message
    assert "sizes: [1, 2] there, [1, 2, 3] asked for" in message
    assert "name" not in message.split("\n", 1)[1]
    assert "--out" in message
    assert "--overwrite" in message
    assert contents(run.path) == before


def test_run_dir_config_of_an_older_version_is_refused_naming_the_new_field(open_run):
    with open_run() as run:
        pass
    identity = json.loads((run.path / "config.json").read_text())
    del identity["config"]["rate"]
    (run.path / "config.json").write_text(json.dumps(identity))
    with pytest.raises(RunDirError, match=r"rate: nothing there, 0\.5 asked for"):
        open_run()


@dataclasses.dataclass(frozen=True)
class RenamedConfig:
    """`ToyConfig` after a change of names."""

    FORMER_NAMES: ClassVar = {"rate": "learning_rate"}

    learning_rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    name: str = "toy"


def test_run_dir_config_under_former_names_is_entered_and_renamed(open_run):
    with open_run() as run:
        run.finish({"loss": 1.5})
    with pytest.raises(RunDirError, match=r"learning_rate: 0\.5 there, 0\.25 asked"):
        open_run(RenamedConfig(learning_rate=0.25))
    with open_run(RenamedConfig()) as run:
        assert run.finished
    identity = json.loads((run.path / "config.json").read_text())
    assert identity["config"] == {"learning_rate": 0.5, "sizes": [1, 2], "name": "toy"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_run_dir_other_experiment_is_refused_and_untouched(open_run, overwrite):
    with open_run() as run:
        run.finish({"loss": 1.0})
    before = contents(run.path)
    with pytest.raises(RunDirError, match="a run of toy train, not of toy compare"):
        open_run(experiment="toy compare", overwrite=overwrite)
    assert contents(run.path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.txt", "mine"),
        ("config.json", '{"model_type": "another program"}'),
        ("config.json", "{ cut short"),
        (".hidden", "mine"),
    ],
)
def test_run_dir_foreign_directory_is_refused_and_untouched(
    open_run, tmp_path, overwrite, name, text
):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / name).write_text(text)
    with pytest.raises(RunDirError, match="not a run directory"):
        open_run(overwrite=overwrite)
    assert contents(directory) == {
        (directory / name).relative_to(directory): text.encode()
    }


def test_run_dir_path_of_a_file_is_refused(open_run, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunDirError, match="is a file"):
        open_run(overwrite=True)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("leftover", [None, ".lock", ".config.json.17.tmp"])
def test_run_dir_killed_before_its_config_can_be_entered(open_run, tmp_path, leftover):
    (tmp_path / "run").mkdir()
    if leftover is not None:
        (tmp_path / "run" / leftover).touch()
    with open_run() as run:
        assert (run.path / "config.json").exists()
        assert not list(run.path.glob("*.tmp"))


def test_run_dir_overwrite_removes_the_run_and_nothing_else(open_run):
    with open_run(outputs=("figure.png",)) as run:
        run.write_metrics([{"epoch": 1.0}])
        (run.path / "figure.png").write_bytes(b"old")
        (run.path / "checkpoint").mkdir()
        (run.path / "checkpoint" / "1").touch()
        run.finish({"loss": 1.0})
    (run.path / "notes.txt").write_text("mine")
    other = ToyConfig(rate=0.25)
    with open_run(other, overwrite=True, outputs=("figure.png",)) as run:
        assert not run.finished
        names = sorted(p.name for p in run.path.iterdir())
    assert names == [".lock", "config.json", "manifest.json", "notes.txt"]
    assert (run.path / "notes.txt").read_text() == "mine"


OUTPUTS = ("figure.png",)


@pytest.fixture
def open_whole(open_run):
    """Opens tmp_path/run as a run whose parts are runs of `toy train`."""

    def open_whole(**kwargs):
        return open_run(
            experiment="toy compare", outputs=OUTPUTS, parts="toy train", **kwargs
        )

    return open_whole


def finish_part(directory):
    with RunDir(directory, "toy train", ToyConfig(), outputs=OUTPUTS) as run:
        run.write_metrics([{"epoch": 1.0}])
        (directory / "figure.png").write_bytes(b"old")
        run.finish({"loss": 1.0})


@pytest.fixture
def whole(open_whole):
    """Directory of a finished run with two parts, and others beside them."""
    with open_whole() as run:
        finish_part(run.path / "a")
        finish_part(run.path / "b")
        (run.path / "a" / "notes.txt").write_text("mine")
        (run.path / "mine").mkdir()
        (run.path / "mine" / "config.json").write_text("{}")
        with RunDir(run.path / "other", "other train", ToyConfig()) as other:
            other.finish({"loss": 1.0})
        run.finish({"loss": 1.0})
    return run.path


def test_run_dir_overwrite_discards_every_part_and_nothing_else(whole, open_whole):
    foreign = {p: contents(whole / p) for p in ("mine", "other")}
    with open_whole(overwrite=True) as run:
        assert not run.finished
    assert sorted(p.name for p in (whole / "a").iterdir()) == [
        ".lock",
        "config.json",
        "notes.txt",
    ]
    assert sorted(p.name for p in (whole / "b").iterdir()) == [".lock", "config.json"]
    assert {p: contents(whole / p) for p in foreign} == foreign
    # The part can be another run now.
    with RunDir(whole / "a", "toy train", ToyConfig(rate=0.1)) as part:
        assert '"rate": 0.1' in (part.path / "config.json").read_text()


def test_run_dir_overwrite_with_a_part_in_use_changes_nothing(whole, open_whole):
    with RunDir(whole / "b", "toy train", ToyConfig()):
        before = contents(whole)
        with pytest.raises(RunDirError, match=r"b is in use by another process"):
            open_whole(overwrite=True)
        assert contents(whole) == before


def test_run_dir_without_overwrite_keeps_the_parts(whole, open_whole):
    (whole / "summary.json").unlink()
    before = contents(whole / "a")
    with open_whole():
        pass
    assert contents(whole / "a") == before


class KilledError(Exception):
    pass


@pytest.mark.parametrize("moment", range(12))
def test_run_dir_overwrite_killed_halfway_can_be_entered_and_mixes_nothing(
    whole, open_whole, monkeypatch, moment
):
    """`moment`: how many removals and renames happen before the kill."""
    count = 0

    def until_killed(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > moment:
                raise KilledError
            return function(*args, **kwargs)

        return call

    new = ToyConfig(rate=0.25)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "unlink", until_killed(pathlib.Path.unlink))
        patch.setattr(os, "replace", until_killed(os.replace))
        with pytest.raises(KilledError):
            open_whole(config=new, overwrite=True)
    held = json.loads((whole / "config.json").read_text())["config"]["rate"]
    if held == 0.25:
        assert not list(whole.glob("[ab]/*.csv"))
    with open_whole(config=ToyConfig(rate=held)) as run:
        assert run.finished == (whole / "summary.json").exists()
    with open_whole(config=new, overwrite=True) as run:
        assert not run.finished
        assert not list(whole.glob("[ab]/*.csv"))


def test_run_dir_in_use_is_refused_until_closed(open_run):
    with open_run() as run:
        before = contents(run.path)
        with pytest.raises(RunDirError, match="in use by another process"):
            open_run(overwrite=True)
        assert contents(run.path) == before
    with open_run():
        pass


def test_run_dir_file_system_without_locks_says_so(open_run, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(RunDirError, match=r"without locks \(No locks available\)"):
        open_run()


def test_run_dir_refused_config_frees_the_lock(open_run):
    with open_run():
        pass
    with pytest.raises(RunDirError):
        open_run(ToyConfig(rate=0.1))
    with open_run() as run:
        assert not run.finished


@pytest.mark.parametrize("text", ["{", "", "[1]", "\0\0"])
def test_run_dir_damaged_summary_says_what_to_do(open_run, text):
    with open_run() as run:
        run.finish({"loss": 1.0})
    (run.path / "summary.json").write_text(text)
    with open_run() as run, pytest.raises(RunDirError, match="remove it, and the same"):
        run.summary()
    (run.path / "summary.json").unlink()
    with open_run() as run:
        assert not run.finished


DAMAGED_MANIFESTS = [
    "{",
    "",
    "\0\0",
    "[1]",
    '{"wall_time_s": "long"}',
    '{"sessions": [2]}',
    '{"earlier_environments": 3}',
]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("text", DAMAGED_MANIFESTS)
def test_run_dir_damaged_manifest_costs_the_record_alone(
    open_run, text, finished, capsys
):
    with open_run() as run:
        run.write_metrics([{"epoch": 1.0}])
        if finished:
            run.finish({"loss": 1.0})
    (run.path / "manifest.json").write_text(text)
    with open_run() as run:
        assert run.finished == finished
        assert run.read_metrics() == [{"epoch": 1.0}]
        assert run.wall_time >= 0
        assert finished or run.manifest()["sessions"] == 1
    err = capsys.readouterr().err
    assert f"warning: {run.path}/manifest.json is damaged: what it recorded" in err
    assert "begun under" not in err


@pytest.mark.parametrize("text", [None, "{", "", "\0\0", "{}", '{"experiment": 1}'])
def test_run_dir_damaged_config_is_restored_from_the_manifest(open_run, text, capsys):
    with open_run() as run:
        config = (run.path / "config.json").read_bytes()
        run.finish({"loss": 1.0})
    path = run.path / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(RunDirError, match=r"rate: 0\.5 there, 0\.25 asked for"):
        open_run(ToyConfig(rate=0.25))
    assert f"{path} is damaged; manifest.json has a copy" in capsys.readouterr().err
    with open_run() as run:
        assert run.summary() == {"loss": 1.0}
    assert path.read_bytes() == config
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["{", json.dumps({"sessions": 1})])
def test_run_dir_config_and_its_copy_damaged_is_refused_naming_the_mend(
    open_run, tmp_path, text
):
    with open_run() as run:
        run.finish({"loss": 1.0})
    (run.path / "config.json").write_text("{")
    (run.path / "manifest.json").write_text(text)
    before = contents(run.path)
    with pytest.raises(RunDirError, match=r"put there the config\.json that the same"):
        open_run()
    assert contents(run.path) == before
    with RunDir(tmp_path / "elsewhere", "toy train", ToyConfig()) as other:
        os.replace(other.path / "config.json", run.path / "config.json")
    with open_run() as run:
        assert run.finished


def test_run_dir_finished_run_is_shown_where_nothing_can_be_written(
    open_run, monkeypatch
):
    with open_run() as run:
        run.finish({"loss": 1.0})
    (run.path / ".lock").unlink()
    before = contents(run.path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with open_run() as run:
        assert run.summary() == {"loss": 1.0}
    assert contents(run.path) == before


@pytest.mark.parametrize("name", ["unfinished", "overwritten"])
def test_run_dir_where_nothing_can_be_written_is_refused(open_run, monkeypatch, name):
    with open_run() as run:
        if name == "overwritten":
            run.finish({"loss": 1.0})

    def refuse(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunDirError, match=r"to \(Read-only file system\): choose ano"):
        open_run(overwrite=name == "overwritten")


@pytest.mark.parametrize("below", ["", "a/b"])
@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to itself"])
def test_run_dir_that_cannot_be_made_is_refused(kind, below, tmp_path):
    path = tmp_path / "there"
    if kind == "file":
        path.touch()
    else:
        path.symlink_to("nowhere" if "nothing" in kind else "there")
    reason = "link to nothing" if "link" in kind else "Not a directory"
    if kind == "file" and not below:
        reason = "is a file"
    with pytest.raises(RunDirError, match=reason):
        RunDir(path / below, "toy", ToyConfig())
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("name", "value", "label"),
    [
        ("cpu", "another", "CPU"),
        ("python", "3.99.0", "Python"),
        ("xla_flags", "--xla_cpu_max_isa=AVX2", "XLA_FLAGS"),
        ("glibc_tunables", "glibc.malloc.hugetlb=1", "GLIBC_TUNABLES"),
        ("git", {"revision": "0" * 40, "dirty": False}, "git revision"),
    ],
)
def test_run_dir_changed_surroundings_warn_and_stay_in_the_manifest(
    open_run, capsys, name, value, label
):
    with open_run() as run:
        recorded = run.manifest()
    assert "earlier_environments" not in recorded
    (run.path / "manifest.json").write_text(json.dumps({**recorded, name: value}))
    for _ in range(2):  # the second time nothing changes
        with open_run() as run:
            resumed = run.manifest()
    assert capsys.readouterr().err.count(f"begun under another {label}:") == 1
    assert resumed[name] == recorded[name]
    (earlier,) = resumed["earlier_environments"]
    assert earlier[name] == value
    assert earlier["packages"] == recorded["packages"]


def test_format_csv_float32_survives_the_round_trip(open_run):
    values = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    values = np.concatenate([values * 1e-20, values, np.float32([np.nan, np.inf, 0])])
    rows = [{"epoch": float(i + 1), "x": float(v)} for i, v in enumerate(values)]
    with open_run() as run:
        run.write_metrics(rows)
        text = (run.path / "metrics.csv").read_text()
        read = run.read_metrics()
    assert np.array_equal(np.float32([r["x"] for r in read]), values, equal_nan=True)
    assert format_csv(read) == text


def test_format_csv_mixed_columns_keeps_order_and_text():
    rows = [
        {"method": "erm", "seed": 3, "x": 0.1},
        {"x": 1.0, "method": "b", "seed": 4},
    ]
    assert format_csv(rows) == "method,seed,x\nerm,3,0.1\nb,4,1\n"


def test_read_metrics_unreadable_row_gives_nothing(open_run):
    with open_run() as run:
        assert run.read_metrics() == []
        (run.path / "metrics.csv").write_text("epoch,x\n1,2\n2\n")
        assert run.read_metrics() == []


def test_git_revision_outside_of_git_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert manifest.git_revision(tmp_path) is None


@pytest.mark.parametrize("changed", ["a", "new"])
def test_git_revision_changed_or_new_file_is_dirty(tmp_path, changed):
    author = ("-c", "user.name=a", "-c", "user.email=a@b")

    def git(*arguments):
        command = ["git", "-C", tmp_path, *author, *arguments]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    clean = manifest.git_revision(tmp_path)
    (tmp_path / changed).write_text("2")
    dirty = manifest.git_revision(tmp_path)
    assert clean["dirty"] is False
    assert dirty == {"revision": clean["revision"], "dirty": True}
    assert len(clean["revision"]) == 40


def test_run_dir_contents_are_its_files_directories_and_number_of_parts(whole):
    with RunDir(whole, "toy compare", ToyConfig()) as run:
        (whole / "checkpoint").mkdir()
        files = ["config.json", "manifest.json", "summary.json"]
        assert run.contents() == [*files, "checkpoint/", "4 parts"]
        for name in ("b", "mine", "other"):
            shutil.rmtree(whole / name)
        assert run.contents() == [*files, "checkpoint/", "1 part"]
        shutil.rmtree(whole / "a")
        assert run.contents() == [*files, "checkpoint/"]


def test_run_dir_two_paths_do_not_disturb_each_other(tmp_path):
    with (
        RunDir(tmp_path / "a", "toy", ToyConfig()),
        RunDir(tmp_path / "b", "toy", ToyConfig(rate=0.1)) as second,
    ):
        assert not second.finished
