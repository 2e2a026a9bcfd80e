"""The subcommands: train, compare, rerun."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.common.cli import Invocation, RunOptions, announce
from experiments.common.run_dir import METRICS as METRICS_FILE
from experiments.common.run_dir import RunDir, RunDirError
from experiments.synthetic.config import (
    CompareConfig,
    RerunConfig,
    RerunOptions,
    TrainConfig,
)
from experiments.synthetic.data import Dataset
from experiments.synthetic.figures import Trained, draw, draw_seeds
from experiments.synthetic.training import METRICS, dataset_for
from experiments.synthetic.training import train as train_to_the_end

EXPERIMENT = "synthetic"
TRAIN = f"{EXPERIMENT} train"
TRAIN_FIGURE = "train.png"
COMPARE_FIGURE = "compare.png"
COMPARE_TABLE = "compare.csv"
SEEDS_TABLE = "seeds.csv"
SEEDS_FIGURE = "seeds.png"
SOLVED = 0.98  # of the o.o.d. test set


def train(call: Invocation[TrainConfig, RunOptions]) -> None:
    """One method, one seed: trains it, draws it, prints the result."""
    config = call.config
    name = f"{config.method}-{call.options.preset}-seed{config.seed}"
    path = call.run_path(EXPERIMENT, name, ("method", "seed"))
    overwrite = call.options.overwrite
    with _train_dir(path, config, call.command, overwrite) as run:
        announce(run)
        if not run.finished:
            _train(run, config, dataset_for(config, config.seed))
        print(format_table([_result(run)]))
        print(f"Figure: {run.path / TRAIN_FIGURE}")


def compare(call: Invocation[CompareConfig, RunOptions]) -> None:
    """Several methods on the same data: a table, and the figure."""
    config = call.config
    name = f"compare-{call.options.preset}-seed{config.seed}"
    path = call.run_path(EXPERIMENT, name, ("seed",))
    with RunDir(
        path,
        f"{EXPERIMENT} compare",
        config,
        seed=config.seed,
        command=call.command,
        overwrite=call.options.overwrite,
        outputs=(COMPARE_FIGURE, COMPARE_TABLE, TRAIN_FIGURE),
        parts=TRAIN,
    ) as run:
        announce(run)
        if not run.finished:
            _compare(run, config, call.command)
        print(format_table(run.summary()["results"]))
        print(f"Figure: {run.path / COMPARE_FIGURE}")


def _compare(run: RunDir, config: CompareConfig, command: str) -> None:
    dataset = dataset_for(config, config.seed)
    trained: dict[str, Trained] = {}
    results = []
    for method in config.methods:
        method_config = config.train_config(method)
        path = run.path / method
        with _train_dir(path, method_config, command) as method_run:
            trained[method] = _train(method_run, method_config, dataset)
            results.append(_result(method_run))
    rows = [
        {"method": method, **row}
        for method, result in trained.items()
        for row in result.history
    ]
    run.write_metrics(rows, COMPARE_TABLE)
    run.save_figure(COMPARE_FIGURE, draw(config, dataset, trained))
    run.finish({"seed": config.seed, "results": results})


def rerun(call: Invocation[RerunConfig, RerunOptions]) -> None:
    """One method on many seeds: every seed's result, and how many solve the task."""
    config, options = call.config, call.options
    first, last = config.seeds
    name = f"rerun-{config.method}-{options.preset}-seeds{first}-{last}"
    path = call.run_path(EXPERIMENT, name, ("method", "seeds"))
    with RunDir(
        path,
        f"{EXPERIMENT} rerun",
        config,
        command=call.command,
        overwrite=options.overwrite,
        outputs=(SEEDS_TABLE, SEEDS_FIGURE, TRAIN_FIGURE),
        parts=TRAIN,
    ) as run:
        announce(run)
        if not run.finished:
            jobs = [
                (run.path / f"seed{c.seed}", c, call.command)
                for c in config.train_configs()
            ]
            outcomes = _run_jobs(jobs, options.workers)
            results = [outcome.result for outcome in outcomes]
            run.write_metrics(results, SEEDS_TABLE)
            curves = [outcome.test_accuracy for outcome in outcomes]
            run.save_figure(SEEDS_FIGURE, draw_seeds(config.method, curves, SOLVED))
            run.finish({"method": config.method, **summarize_seeds(results)})
        for name, value in run.summary().items():
            print(f"{name:>24}  {value}")
        print(f"Every seed: {run.path / SEEDS_TABLE}")
        print(f"Figure: {run.path / SEEDS_FIGURE}")


Job = tuple[Path, TrainConfig, str]


class Outcome(NamedTuple):
    """What one seed came to: its summary, and o.o.d. test accuracy by epoch."""

    result: dict[str, Any]
    test_accuracy: list[float]


def _run_jobs(jobs: Sequence[Job], workers: int) -> list[Outcome]:
    """Outcomes of all jobs, by seed."""
    outcomes: list[Outcome] = []
    with tqdm(total=len(jobs), unit="seed", smoothing=0) as bar:
        for outcome in _outcomes_as_they_come(jobs, min(workers, len(jobs))):
            outcomes.append(outcome)
            final = [outcome.result["test_accuracy"] for outcome in outcomes]
            solved = sum(accuracy >= SOLVED for accuracy in final)
            shown = {"solved": f"{solved}/{len(final)}", "worst": f"{min(final):.1%}"}
            bar.set_postfix(shown, refresh=False)
            bar.update()
    return sorted(outcomes, key=lambda outcome: outcome.result["seed"])


def _outcomes_as_they_come(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    waiting = iter(jobs)
    running: set[Future[Outcome]] = set()
    spawn = multiprocessing.get_context("spawn")
    with _workers_ended(), ProcessPoolExecutor(workers, spawn, _begin_worker) as pool:
        while True:
            # No more than the workers can take: after Ctrl-C none is left in a queue.
            for job in itertools.islice(waiting, workers - len(running)):
                with _interrupts_held():
                    running.add(pool.submit(_run_job, *job))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


@contextlib.contextmanager
def _workers_ended() -> Iterator[None]:
    """Ends workers that are left: a second Ctrl-C interrupts the pool's own shutdown.

    Killing them is safe at any moment, and waiting for them could take forever.
    """
    try:
        yield
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()


# Ctrl-C reaches every process of the terminal. Within a job it means what it means in
# `train`. Between jobs it would kill the worker with a traceback: there it is noted,
# and ends a job that the worker had already been given.
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
    """Ends a worker whose parent was killed, so that it frees its directory."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_job(path: Path, config: TrainConfig, command: str) -> Outcome:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _interrupted.is_set():
            raise KeyboardInterrupt
        return _train_seed(path, config, command)
    finally:
        signal.signal(signal.SIGINT, _note_interrupt)


def _train_seed(path: Path, config: TrainConfig, command: str) -> Outcome:
    with _train_dir(path, config, command) as run:
        if not run.finished:
            _train(run, config, dataset_for(config, config.seed), quiet=True)
        rows = run.read_metrics()
        if len(rows) != config.epochs or "test_accuracy" not in rows[0]:
            raise RunDirError(
                f"{run.path / METRICS_FILE} is missing or damaged: remove {run.path} "
                "and start again, which trains this seed anew"
            )
        return Outcome(_result(run), [row["test_accuracy"] for row in rows])


def summarize_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of the final o.o.d. test accuracy over seeds."""
    accuracies = [result["test_accuracy"] for result in results]
    solved = sum(accuracy >= SOLVED for accuracy in accuracies)
    return {
        "seeds": len(results),
        "mean_test_accuracy": sum(accuracies) / len(accuracies),
        "min_test_accuracy": min(accuracies),
        "solved_from": SOLVED,
        "solved": solved,
        "solved_share": solved / len(accuracies),
    }


def _train_dir(
    path: Path, config: TrainConfig, command: str, overwrite: bool = False
) -> RunDir:
    return RunDir(
        path,
        TRAIN,
        config,
        seed=config.seed,
        command=command,
        overwrite=overwrite,
        outputs=(TRAIN_FIGURE,),
    )


def _train(
    run: RunDir, config: TrainConfig, dataset: Dataset, *, quiet: bool = False
) -> Trained:
    """Trains unless that is done, and leaves a finished run."""
    trained = Trained(*train_to_the_end(config, run, dataset, quiet=quiet))
    if not run.finished:
        figure = draw(config, dataset, {config.method: trained})
        run.save_figure(TRAIN_FIGURE, figure)
        final = trained.history[-1]
        run.finish(
            {
                "method": config.method,
                "seed": config.seed,
                "epochs": config.epochs,
                **{name: final[name] for name in METRICS},
            }
        )
    return trained


def _result(run: RunDir) -> dict[str, Any]:
    return {**run.summary(), "seconds": run.wall_time}


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as text, one line per method."""
    columns = {
        "method": ("method", "<16", "<16"),
        "train": ("train_accuracy", ">9", ">9.1%"),
        "held out": ("held_out_accuracy", ">9", ">9.1%"),
        "o.o.d. test": ("test_accuracy", ">12", ">12.1%"),
        "loss": ("loss", ">8", ">8.4f"),
        "kept": ("kept_fraction", ">9", ">9.3%"),
        "seconds": ("seconds", ">8", ">8.1f"),
    }
    header = " ".join(format(title, width) for title, (_, width, _) in columns.items())
    lines = [
        " ".join(format(result[name], spec) for name, _, spec in columns.values())
        for result in results
    ]
    return "\n".join([header, "-" * len(header), *lines])
