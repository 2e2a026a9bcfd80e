"""Jobs in worker processes, which end after Ctrl-C and with their parent."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import FrameType
from typing import TypeVar, TypeVarTuple

from experiments.common.run_dir import StoppedError

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[*Arguments], Result],
    jobs: Sequence[tuple[*Arguments]],
    workers: int,
) -> Iterator[Result]:
    """Calls `function` once for each of `jobs`; yields the results as they come.

    After Ctrl-C no further job begins, and KeyboardInterrupt is raised once the jobs
    under way have ended, which they do as they would in this process. An exception
    in a job is raised here, likewise.

    Args:
      function: what the workers call; importable by its name.
      jobs: the arguments of each call.
      workers: how many jobs run at the same time, each in a process of its own.

    Raises:
      StoppedError: a worker was killed.
    """
    if not jobs:
        return
    workers = min(workers, len(jobs))
    waiting = iter(jobs)
    running: set[Future[Result]] = set()
    spawn = multiprocessing.get_context("spawn")
    with _workers_ended(), ProcessPoolExecutor(workers, spawn, _begin_worker) as pool:
        while True:
            # No more than the workers can take: after Ctrl-C none is left in a queue.
            for job in itertools.islice(waiting, workers - len(running)):
                with _interrupts_held():
                    running.add(pool.submit(_run_job, function, job))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    result = future.result()
                except BrokenProcessPool:
                    raise StoppedError(
                        "A worker process was killed, as the system does when memory "
                        "runs out (fewer --workers need less)"
                    ) from None
                yield result


@contextlib.contextmanager
def _workers_ended() -> Iterator[None]:
    """Ends workers that are left: a second Ctrl-C interrupts the pool's own shutdown.

    Killing them is safe at any moment, and waiting for them could take forever.
    """
    others = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()


# Ctrl-C reaches every process of the terminal. Within a job it means what it means in
# a process of its own. Between jobs it would kill the worker with a traceback: there it
# is noted, and ends a job that the worker had already been given.
_interrupted = threading.Event()


def _note_interrupt(signum: int, frame: FrameType | None) -> None:
    _interrupted.set()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delays Ctrl-C, also in processes started here, until they take it themselves."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, _note_interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed, so that it frees what it has locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_job(
    function: Callable[[*Arguments], Result], arguments: tuple[*Arguments]
) -> Result:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _interrupted.is_set():
            raise KeyboardInterrupt
        return function(*arguments)
    finally:
        signal.signal(signal.SIGINT, _note_interrupt)
