import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.checkpoints import Checkpoints
from experiments.common.run_dir import RunDir, RunDirError
from experiments.common.training import Interrupted, run_epochs
from tests.experiments.conftest import ToyConfig, toy_epoch, toy_state

EPOCHS = 9


def train(open_run, epoch_fn=toy_epoch, epochs=EPOCHS, every=2, done=None):
    with open_run() as run:
        state, history = run_epochs(
            run, epoch_fn, toy_state(), epochs, checkpoint_every=every, done=done
        )
        return run.path, state, history


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """metrics.csv of an undisturbed run."""
    with RunDir(tmp_path_factory.mktemp("expected") / "run", "toy", ToyConfig()) as run:
        run_epochs(run, toy_epoch, toy_state(), EPOCHS, checkpoint_every=2)
        return (run.path / "metrics.csv").read_bytes()


class CrashError(Exception):
    pass


def done_after(epochs):
    return lambda history: len(history) >= epochs


def crash_at(epoch):
    def epoch_fn(state, index):
        if index == epoch:
            raise CrashError
        return toy_epoch(state, index)

    return epoch_fn


def largest_file(directory):
    files = [p for p in directory.rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_run_epochs_undisturbed_gives_every_row(open_run):
    path, state, history = train(open_run)
    assert [row["epoch"] for row in history] == list(range(1, EPOCHS + 1))
    assert int(state["count"]) == EPOCHS
    assert np.float32(history[-1]["loss"]) == state["x"]
    assert len((path / "metrics.csv").read_text().splitlines()) == EPOCHS + 1


def test_run_epochs_keeps_the_last_two_checkpoints_with_checksums(open_run):
    path, _, _ = train(open_run)
    names = sorted(p.name for p in (path / "checkpoint").iterdir())
    assert names == ["8", "8.sha256", "9", "9.sha256"]


def test_run_epochs_finished_training_runs_no_epoch(open_run):
    _, first, history = train(open_run)
    _, second, again = train(open_run, epoch_fn=crash_at(0))
    assert again == history
    assert jax.tree.map(float, first) == jax.tree.map(float, second)


@pytest.mark.parametrize("epochs", [1, 4, 5])
def test_run_epochs_that_is_done_early_saves_and_stays_there(open_run, epochs):
    path, state, history = train(open_run, done=done_after(epochs))
    assert len(history) == int(state["count"]) == epochs
    assert len((path / "metrics.csv").read_text().splitlines()) == epochs + 1
    _, state, again = train(
        open_run, epoch_fn=crash_at(epochs), done=done_after(epochs)
    )
    assert again == history
    assert int(state["count"]) == epochs


@pytest.mark.parametrize("crash", [0, 1, 2, 5, 8])
def test_run_epochs_crashed_and_resumed_writes_the_same_bytes(
    open_run, expected, crash
):
    with pytest.raises(CrashError):
        train(open_run, epoch_fn=crash_at(crash))
    run_again = []

    def epoch_fn(state, index):
        run_again.append(index)
        return toy_epoch(state, index)

    path, state, _ = train(open_run, epoch_fn=epoch_fn)
    assert (path / "metrics.csv").read_bytes() == expected
    assert int(state["count"]) == EPOCHS
    assert run_again[0] == crash // 2 * 2  # the last checkpoint before


def test_run_epochs_killed_between_metrics_and_checkpoint_cuts_the_metrics(
    open_run, expected, monkeypatch
):
    save = Checkpoints.save

    def dies(self, step, state):
        if step == 6:
            raise CrashError
        save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", dies)
    with pytest.raises(CrashError):
        train(open_run)
    monkeypatch.setattr(Checkpoints, "save", save)
    with open_run() as run:
        assert len(run.read_metrics()) == 6
    with pytest.raises(CrashError):
        train(open_run, epoch_fn=crash_at(4))
    with open_run() as run:
        assert len(run.read_metrics()) == 4
    path, _, _ = train(open_run)
    assert (path / "metrics.csv").read_bytes() == expected


def truncate(step_dir):
    file = largest_file(step_dir)
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(step_dir):
    file = largest_file(step_dir)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove_a_file(step_dir):
    largest_file(step_dir).unlink()


def remove_checksums(step_dir):
    step_dir.with_suffix(".sha256").unlink()


def empty_checksums(step_dir):
    step_dir.with_suffix(".sha256").write_text("")


def truncate_checksums(step_dir):
    file = step_dir.with_suffix(".sha256")
    file.write_bytes(file.read_bytes()[:-90])


def cut_checksums_at_a_line(step_dir):
    file = step_dir.with_suffix(".sha256")
    file.write_text("".join(file.read_text().splitlines(True)[:-1]))


DAMAGES = [
    truncate,
    flip_a_bit,
    remove_a_file,
    remove_checksums,
    empty_checksums,
    truncate_checksums,
    cut_checksums_at_a_line,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_run_epochs_damaged_checkpoint_uses_the_one_before(
    open_run, expected, capsys, damage
):
    path, _, _ = train(open_run)
    damage(path / "checkpoint" / "9")
    run_again = []

    def epoch_fn(state, index):
        run_again.append(index)
        return toy_epoch(state, index)

    train(open_run, epoch_fn=epoch_fn)
    assert run_again == [8]
    assert (path / "metrics.csv").read_bytes() == expected
    error = capsys.readouterr().err
    assert f"checkpoint {path / 'checkpoint' / '9'} is not usable" in error
    # It was saved again, and is whole now.
    train(open_run, epoch_fn=crash_at(8))


def test_run_epochs_no_intact_checkpoint_starts_again(open_run, expected, capsys):
    path, _, _ = train(open_run)
    for step in ("8", "9"):
        truncate(path / "checkpoint" / step)
    _, state, _ = train(open_run)
    assert int(state["count"]) == EPOCHS
    assert (path / "metrics.csv").read_bytes() == expected
    assert capsys.readouterr().err.count("not usable") == 2


@pytest.mark.parametrize("damage", ["missing", "short", "garbled"])
def test_run_epochs_metrics_lost_starts_again(open_run, expected, capsys, damage):
    with pytest.raises(CrashError):
        train(open_run, epoch_fn=crash_at(6))
    with open_run() as run:
        metrics = run.path / "metrics.csv"
    if damage == "missing":
        metrics.unlink()
    elif damage == "short":
        metrics.write_text("".join(metrics.read_text().splitlines(True)[:-1]))
    else:
        metrics.write_text(metrics.read_text().replace("3,", "x,", 1))
    path, _, _ = train(open_run)
    assert (path / "metrics.csv").read_bytes() == expected
    assert "starting again" in capsys.readouterr().err


@pytest.mark.parametrize("state", [{"x": jnp.zeros((3, 2))}, {"y": 0.0}, [1.0]])
def test_run_epochs_checkpoint_of_another_structure_is_refused(open_run, state):
    path, _, _ = train(open_run)
    with open_run() as run, pytest.raises(RunDirError, match="--overwrite"):
        run_epochs(run, toy_epoch, state, EPOCHS)
    assert (path / "checkpoint" / "9").exists()


def test_run_epochs_interrupt_saves_the_epoch_and_resumes(open_run, expected, capsys):
    def epoch_fn(state, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return toy_epoch(state, index)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"^Stopped after epoch 3 of 9 in .*run$"):
        train(open_run, epoch_fn=epoch_fn, every=100)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Saving epoch 3; Ctrl-C again stops at once." in capsys.readouterr().err
    path, _, _ = train(open_run, epoch_fn=crash_before(3), every=100)
    assert (path / "metrics.csv").read_bytes() == expected


def crash_before(epoch):
    def epoch_fn(state, index):
        assert index >= epoch
        return toy_epoch(state, index)

    return epoch_fn


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where a shell has started the tests in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_run_epochs_second_interrupt_stops_at_once(open_run, expected):
    def epoch_fn(state, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # two that wait together are one signal
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            pytest.fail("went on after the second interrupt")
        return toy_epoch(state, index)

    with pytest.raises(KeyboardInterrupt) as interrupt:
        train(open_run, epoch_fn=epoch_fn)
    assert not isinstance(interrupt.value, Interrupted)
    path, _, _ = train(open_run, epoch_fn=crash_before(4))
    assert (path / "metrics.csv").read_bytes() == expected


def test_run_epochs_interrupt_in_the_last_epoch_ends_normally(open_run, expected):
    def epoch_fn(state, index):
        if index == EPOCHS - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return toy_epoch(state, index)

    path, _, history = train(open_run, epoch_fn=epoch_fn)
    assert len(history) == EPOCHS
    assert (path / "metrics.csv").read_bytes() == expected


def test_run_epochs_progress_shows_the_chosen_metrics(open_run, capsys):
    with open_run() as run:
        run_epochs(
            run,
            toy_epoch,
            toy_state(),
            3,
            progress={"the loss": ("loss", ".1f")},
            title="toy",
        )
    bar = capsys.readouterr().err
    assert "toy: 100%" in bar
    assert "3/3" in bar
    assert "the loss=1.4" in bar


def test_run_epochs_without_progress_is_silent(open_run, capsys):
    train(open_run)
    assert capsys.readouterr().err == ""


def test_checkpoints_that_cannot_be_written_say_where_and_why(tmp_path, monkeypatch):
    text = "RESOURCE_EXHAUSTED: Failed to write 7 bytes: No space left on device [28]"

    def fail(*arguments, **settings):
        raise ValueError(text)

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/1'"):
        checkpoints.save(1, toy_state())
    text = "another matter"
    with pytest.raises(ValueError, match=text):
        checkpoints.save(1, toy_state())
    checkpoints.close()
