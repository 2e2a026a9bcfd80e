"""Commands that train several runs, each a part of theirs in a directory below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, TypeVarTuple

from tqdm import tqdm

from experiments.common.pool import run_jobs
from experiments.common.run_dir import METRICS, RunDir, RunDirError

Arguments = TypeVarTuple("Arguments")
Outcome = TypeVar("Outcome")


def train_parts(
    run: RunDir,
    train: Callable[[*Arguments], Outcome],
    jobs: Sequence[tuple[*Arguments]],
    workers: int,
    *,
    unit: str = "run",
    show: Callable[[Iterable[Outcome]], Mapping[str, str]] = lambda outcomes: {},
    one_worker_is_here: bool = False,
) -> list[Outcome]:
    """The outcome of each part, in the order of `jobs`.

    Args:
      run: whose parts they are.
      train: trains a part, or finds it trained; importable by its name.
      jobs: the arguments of each call.
      workers: parts at a time, each in a process of its own.
      unit: what a part is called.
      show: what the progress bar shows of the outcomes so far.
      one_worker_is_here: a single worker is this process: a second one could not have
        the accelerator that this one has taken.
    """
    numbered = [(train, index, job) for index, job in enumerate(jobs)]
    results: Iterator[tuple[int, Outcome]]
    if workers == 1 and one_worker_is_here:
        results = (_train_numbered(*job) for job in numbered)
    else:
        results = run_jobs(_train_numbered, numbered, workers)
    outcomes: dict[int, Outcome] = {}
    with tqdm(total=len(jobs), unit=unit, smoothing=0) as bar:
        for index, outcome in results:
            outcomes[index] = outcome
            bar.set_postfix(show(outcomes.values()), refresh=False)
            bar.update()
            run.save_manifest()
    return [outcomes[index] for index in range(len(jobs))]


def _train_numbered(
    train: Callable[[*Arguments], Outcome], index: int, job: tuple[*Arguments]
) -> tuple[int, Outcome]:
    return index, train(*job)


def metrics_of(
    part: RunDir, epochs: int, columns: Iterable[str]
) -> list[dict[str, Any]]:
    """metrics.csv of a finished part.

    Raises:
      RunDirError: it has other than `epochs` rows, or lacks one of `columns`.
    """
    rows = part.read_metrics()
    if len(rows) != epochs or not rows[0].keys() >= set(columns):
        raise RunDirError(
            f"{part.path / METRICS} is missing or damaged: remove {part.path} and "
            "start again, which trains this run anew"
        )
    return rows
