"""The subcommands: a choice of settings, and then all methods, on each shift."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.bootstrap import bootstrap
from experiments.common.cli import FigureOptions, Invocation, WorkerOptions, entered
from experiments.common.figures import (
    Drawings,
    figure_dir,
    finish_figures,
    read_table,
    redraw,
)
from experiments.common.files import write_json
from experiments.common.parts import train_parts
from experiments.common.run_dir import RunDir, RunDirError
from experiments.common.tables import format_rows
from experiments.shifts import linear as linear_training
from experiments.shifts import spirals as spirals_training
from experiments.shifts.config import (
    LinearChooseConfig,
    LinearConfig,
    LinearRun,
    MethodName,
    Settings,
    SpiralsChooseConfig,
    SpiralsConfig,
    SpiralsRun,
)
from experiments.shifts.figures import draw_linear, draw_spirals
from experiments.shifts.methods import METHODS

EXPERIMENT = "shifts"
RESULTS = "results.csv"
TRIALS = "trials.csv"
CHOSEN = "chosen.json"
DRAWINGS: Drawings = {"linear": draw_linear, "spirals": draw_spirals}
# What settings are chosen by; among the splits, as it is one number of each run.
SHARE = "held_out_share"

Row = dict[str, Any]
RunConfig = LinearRun | SpiralsRun
# Trains a run's settings on a seed; for each the errors [env] by split, and the share
# that selection goes by.
Train = Callable[[Any, int], Iterable[tuple[Mapping[str, Any], Any]]]
TRAIN: dict[str, Train] = {
    "linear": linear_training.train,
    "spirals": spirals_training.train,
}


def linear_choose(call: Invocation[LinearChooseConfig, WorkerOptions]) -> None:
    """Chooses a setting for each method on the linear unit tests."""
    _choose(call, "linear")


def linear(call: Invocation[LinearConfig, FigureOptions]) -> None:
    """All methods on the linear unit tests; a table and a figure."""
    _compare(call, "linear")


def spirals_choose(call: Invocation[SpiralsChooseConfig, WorkerOptions]) -> None:
    """Chooses a setting for each method on the spirals."""
    _choose(call, "spirals")


def spirals(call: Invocation[SpiralsConfig, FigureOptions]) -> None:
    """All methods on the spirals; a table and a figure."""
    _compare(call, "spirals")


def _run_name(shift: str) -> str:
    return f"{EXPERIMENT} {shift} run"


def _choose(call: Invocation[Any, WorkerOptions], shift: str) -> None:
    config, options = call.config, call.options
    name = f"{shift}-choose"
    path = call.run_path(EXPERIMENT, f"{name}-{options.preset}")
    settings: Settings = {
        method: tuple(itertools.product(config.learning_rates, METHODS[method].numbers))
        for method in config.methods
    }
    with entered(
        call,
        path,
        f"{EXPERIMENT} {name}",
        outputs=(RESULTS, TRIALS, CHOSEN),
        parts=_run_name(shift),
    ) as run:
        if not run.finished:
            rows = _run_all(run, config, settings, call, shift)
            trials = summarize_trials([r for r in rows if r["split"] == SHARE])
            run.write_metrics(trials, TRIALS)
            chosen = choose(trials)
            write_json(run.path / CHOSEN, chosen)
            run.finish(chosen)
        chosen_rows = [{"method": m, **row} for m, row in run.summary().items()]
        columns = {
            "method": ("method", "<31"),
            "rate": ("learning_rate", ">7g"),
            "number": ("number", ">8g"),
            "share": (SHARE, ">8.4f"),
        }
        print(format_rows(columns, chosen_rows))
        print(f"Every setting: {run.path / TRIALS}")
        print(f"Chosen settings: {run.path / CHOSEN}")


def summarize_trials(rows: Sequence[Row]) -> list[Row]:
    """The mean share of each setting over problems, environments and seeds."""
    shares: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        key = row["method"], row["learning_rate"], row["number"]
        # What has diverged is as bad as can be.
        share = row["error"] if np.isfinite(row["error"]) else 1.0
        shares.setdefault(key, []).append(share)
    return [
        {
            "method": method,
            "learning_rate": rate,
            "number": number,
            SHARE: float(np.mean(values)),
        }
        for (method, rate, number), values in shares.items()
    ]


def choose(trials: Sequence[Row]) -> dict[str, Row]:
    """Each method's setting with the lowest share; the first of equal ones."""
    best: dict[str, Row] = {}
    for trial in trials:
        method = trial["method"]
        if method not in best or trial[SHARE] < best[method][SHARE]:
            best[method] = trial
    return {
        method: {name: row[name] for name in ("learning_rate", "number", SHARE)}
        for method, row in best.items()
    }


def _compare(call: Invocation[Any, FigureOptions], shift: str) -> None:
    if redraw(call.options, DRAWINGS, (shift,)):
        return
    config, options = call.config, call.options
    path = call.run_path(EXPERIMENT, f"{shift}-{options.preset}")
    settings = load_chosen(config.chosen, config.methods, shift)
    identity = {**dataclasses.asdict(config), "chosen": settings}
    with figure_dir(
        path,
        f"{EXPERIMENT} {shift}",
        call,
        identity,
        (shift, f"{shift}_seeds", "results"),
        _run_name(shift),
    ) as run:
        if not run.finished:
            rows = [
                {name: row[name] for name in RESULT_COLUMNS}
                for row in _run_all(run, config, settings, call, shift)
            ]
            run.write_metrics(rows, RESULTS)
            seeds = [row for row in rows if row["split"] in TESTED]
            run.write_metrics(seeds, f"{shift}_seeds.csv")
            table = summarize(seeds)
            finish_figures(run, DRAWINGS, {shift: table}, {"results": table})
        print(format_summary(run.summary()["results"]))
        print(f"Every environment and seed: {run.path / RESULTS}")
        print(f"Figure: {run.path / shift}.png")


TESTED = ("test_mean", "test_worst")
RESULT_COLUMNS = ("problem", "num_envs", "method", "seed", "split", "error")


def load_chosen(source: str, methods: Sequence[MethodName], shift: str) -> Settings:
    """Each method's setting from the chosen.json of the shift's choose.

    Raises:
      RunDirError: there is no such file, or not each method in it.
    """
    mend = f"make it with {shift}-choose"
    try:
        chosen = json.loads(Path(source).read_text())
        return {
            method: (
                (
                    float(chosen[method]["learning_rate"]),
                    float(chosen[method]["number"]),
                ),
            )
            for method in methods
        }
    except (OSError, ValueError) as error:
        message = f"chosen {source!r} cannot be read ({error}): {mend}"
    except (KeyError, TypeError) as error:
        message = f"chosen {source!r} lacks {error}: {mend}"
    raise RunDirError(message)


def _run_all(
    run: RunDir,
    config: Any,
    settings: Settings,
    call: Invocation[Any, Any],
    shift: str,
) -> list[Row]:
    jobs = [
        (run.path / each.name, each, call.command, shift)
        for each in config.run_configs(settings)
    ]
    parts = train_parts(
        run, run_one, jobs, call.options.workers, one_worker_is_here=True
    )
    return [row for rows in parts for row in rows]


def run_one(path: Path, config: RunConfig, command: str, shift: str) -> list[Row]:
    """The rows of a run: errors by setting, seed and split."""
    with RunDir(path, _run_name(shift), config, command=command) as run:
        if not run.finished:
            run.write_metrics(list(_rows(config, TRAIN[shift])), RESULTS)
            run.finish({})
        names = {
            "problem": config.problem,
            "num_envs": config.num_envs,
            "method": config.method,
        }
        return [{**names, **row} for row in read_table(run.path / RESULTS)]


def _rows(config: RunConfig, train: Train) -> Iterator[Row]:
    first, last = config.seeds
    for seed in range(first, last + 1):
        for setting, (errors, share) in zip(
            config.settings, train(config, seed), strict=True
        ):
            row = {"learning_rate": setting[0], "number": setting[1], "seed": seed}
            for split, values in errors.items():
                own = np.asarray(values, float)
                named = {f"{split}_{env}": error for env, error in enumerate(own)}
                named |= {f"{split}_mean": own.mean(), f"{split}_worst": own.max()}
                for name, error in named.items():
                    yield {**row, "split": name, "error": float(error)}
            yield {**row, "split": SHARE, "error": float(share)}


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Test errors by problem, number of environments and method: means over seeds.

    With the mean over environments a bootstrap interval over seeds, and its ratio to
    the oracle's where that was trained.

    Args:
      rows: of each seed those with the splits `TESTED`.
    """
    errors: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in rows:
        key = row["problem"], row["num_envs"], row["method"]
        own = errors.setdefault(key, {split: [] for split in TESTED})
        own[row["split"]].append(row["error"])
    table = []
    for (problem, num_envs, method), own in errors.items():
        means = np.array(own["test_mean"])
        interval = bootstrap(means)
        oracle = errors.get((problem, num_envs, "oracle"))
        ratio: float | str = ""
        if oracle is not None and min(oracle["test_mean"]) > 0:
            ratio = float(np.mean(means / np.array(oracle["test_mean"])))
        table.append(
            {
                "problem": problem,
                "num_envs": int(num_envs),
                "method": method,
                "seeds": len(means),
                "error": float(interval.mean),
                "low": float(interval.low),
                "high": float(interval.high),
                "worst_seed": float(means.max()),
                "worst_env": float(np.mean(own["test_worst"])),
                "over_oracle": ratio,
            }
        )
    return table


def format_summary(table: Sequence[Row]) -> str:
    """The summary as text."""
    columns = {
        "problem": ("problem", "<10"),
        "envs": ("num_envs", ">4"),
        "method": ("method", "<31"),
        "error": ("error", ">9.4f"),
        "low": ("low", ">9.4f"),
        "high": ("high", ">9.4f"),
        "worst env": ("worst_env", ">9.4f"),
        "/ oracle": ("over_oracle", ">8.3f"),
    }
    return format_rows(columns, table)


def format_markdown(table: Sequence[Row], problem: str, value: str = "error") -> str:
    """Of one problem a line for each method and a column for each number of
    environments: the value, and for errors the interval.
    """
    own = [row for row in table if row["problem"] == problem]
    sizes = sorted({row["num_envs"] for row in own})
    lines = [
        "| method | " + " | ".join(f"{size:g} envs" for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in own):
        cells = {row["num_envs"]: row for row in own if row["method"] == method}
        shown = [
            f"{cells[size][value]:.3f}"
            if value == "over_oracle"
            else "{error:.4f} ({low:.4f} to {high:.4f})".format(**cells[size])
            for size in sizes
        ]
        lines.append(f"| {METHODS[method].label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
