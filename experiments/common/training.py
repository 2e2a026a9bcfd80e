"""The loop over epochs: resume, progress bar, metrics, checkpoints, Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TypeVar

import jax
from tqdm import tqdm

from experiments.common.checkpoints import Checkpoints
from experiments.common.run_dir import CHECKPOINT, RunDir, RunDirError, nine_digits

State = TypeVar("State")
Metrics = Mapping[str, jax.Array]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved; the message says where."""


def run_epochs(
    run: RunDir,
    epoch_fn: Callable[[State, int], tuple[State, Metrics]],
    state: State,
    num_epochs: int,
    *,
    metrics: Sequence[str] | None = None,
    checkpoint_every: int = 1,
    progress: Mapping[str, tuple[str, str]] | None = None,
    title: str = "",
    done: Callable[[Sequence[Mapping[str, float]]], bool] | None = None,
) -> tuple[State, list[dict[str, float]]]:
    """Trains from the last checkpoint, if any, to the end of the last epoch.

    metrics.csv is written before the checkpoint that it belongs to and cut back to
    the epoch that was restored, so that it ends byte for byte the same however
    often the run was killed, given that `epoch_fn` is deterministic.

    Args:
      run: the run directory.
      epoch_fn: pure; takes the state and the epoch's index from 0, returns the new
        state and scalar metrics. It may donate the state that it is given.
      state: the initial state, a pytree of arrays.
      num_epochs: how many epochs the whole run has.
      metrics: which ones to keep, in this order; jit sorts the keys of dictionaries.
        By default all.
      checkpoint_every: epochs between checkpoints; the last is always saved.
      progress: what the progress bar shows: label -> (metric, format); no bar
        without it.
      title: what the progress bar is called.
      done: whether a run ends with the last of these epochs, before `num_epochs`.

    Returns:
      The final state, and one row per epoch: `epoch` (from 1) and the metrics.

    Raises:
      Interrupted: after Ctrl-C, once the epoch under way was saved. A second
        Ctrl-C raises KeyboardInterrupt at once; the last checkpoint stays good.
    """
    checkpoints = Checkpoints(run.path / CHECKPOINT)
    first, state, history = _restore(run, checkpoints, state)

    def ends() -> bool:
        return len(history) == num_epochs or (done is not None and done(history))

    bar = tqdm(
        total=num_epochs,
        initial=first,
        desc=title,
        disable=progress is None,
        unit="epoch",
        # A log file wants a line now and then, not ten a second.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
    with bar, contextlib.closing(checkpoints), _interrupt_flag() as interrupted:
        last = first > 0 and ends()
        for epoch in range(first, num_epochs):
            if last:
                break
            state, found = epoch_fn(state, epoch)
            values = jax.device_get(dict(found))
            # As metrics.csv has them: resumed or not, the history is the same.
            row = {name: nine_digits(values[name]) for name in metrics or found}
            history.append({"epoch": float(epoch + 1), **row})
            shown = {
                label: format(row[metric], spec)
                for label, (metric, spec) in (progress or {}).items()
            }
            bar.set_postfix(shown, refresh=False)
            bar.update()
            last = ends()
            if interrupted.is_set() and not last:
                tqdm.write(
                    f"Saving epoch {epoch + 1}; Ctrl-C again stops at once.",
                    file=sys.stderr,
                )
            if last or interrupted.is_set() or (epoch + 1) % checkpoint_every == 0:
                run.write_metrics(history)
                checkpoints.save(epoch + 1, state)
                run.save_manifest()
            if interrupted.is_set() and not last:
                raise Interrupted(
                    f"Stopped after epoch {epoch + 1} of {num_epochs} in {run.path}"
                )
    return state, history


def _restore(
    run: RunDir, checkpoints: Checkpoints, state: State
) -> tuple[int, State, list[dict[str, float]]]:
    try:
        restored = checkpoints.restore_latest(state)
    except ValueError as error:
        raise RunDirError(
            f"the checkpoint in {run.path} does not fit this version of the program: "
            f"start again with --overwrite ({error})"
        ) from error
    if restored is None:
        return 0, state, []
    done, restored_state = restored
    history = run.read_metrics()[:done]
    if [row.get("epoch") for row in history] != list(range(1, done + 1)):
        print(
            f"warning: {run.path} has a checkpoint of epoch {done} but not the "
            "metrics up to it: starting again",
            file=sys.stderr,
        )
        checkpoints.clear()
        return 0, state, []
    run.write_metrics(history)
    return done, restored_state, history


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into a flag; the next one interrupts as usual."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # signals are the main thread's business
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: FrameType | None) -> None:
        flag.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
