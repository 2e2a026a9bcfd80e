"""The subcommands on linear problems: linear-choose and linear."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
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
from experiments.shifts.config import (
    LinearChooseConfig,
    LinearConfig,
    LinearSettings,
    MethodName,
    Problem,
    linear_settings,
)
from experiments.shifts.figures import draw_linear
from experiments.shifts.linear import data_for, train
from experiments.shifts.methods import METHODS, Setting

EXPERIMENT = "shifts"
RUN = f"{EXPERIMENT} linear run"
RESULTS = "results.csv"
TRIALS = "trials.csv"
CHOSEN = "chosen.json"
FIGURE = "linear"
DRAWINGS: Drawings = {FIGURE: draw_linear}
# What settings are chosen by; among the splits, as it is one number of each run.
SHARE = "held_out_share"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunConfig(LinearSettings):
    """One method on one problem: every setting on every seed."""

    problem: Problem = "example1"
    num_envs: int = 2
    method: MethodName = "averaging"
    settings: tuple[Setting, ...] = ()
    seeds: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Name among the runs of a command; also its directory."""
        return f"{self.method}-envs{self.num_envs}-{self.problem}"


def run_configs(
    config: LinearConfig | LinearChooseConfig,
    settings: dict[MethodName, tuple[Setting, ...]],
) -> list[RunConfig]:
    """All runs; those of a method and a number of environments in a row, as they share
    what is compiled.
    """
    return [
        RunConfig(
            **linear_settings(config),
            problem=problem,
            num_envs=num_envs,
            method=method,
            settings=settings[method],
            seeds=config.seeds,
        )
        for method, num_envs, problem in itertools.product(
            config.methods, config.num_envs, config.problems
        )
    ]


def linear_choose(call: Invocation[LinearChooseConfig, WorkerOptions]) -> None:
    """Chooses a setting for each method on held-out environments."""
    config, options = call.config, call.options
    path = call.run_path(EXPERIMENT, f"linear-choose-{options.preset}")
    settings = {
        method: tuple(
            Setting(*pair)
            for pair in itertools.product(
                config.learning_rates, METHODS[method].numbers
            )
        )
        for method in config.methods
    }
    with entered(
        call,
        path,
        f"{EXPERIMENT} linear-choose",
        outputs=(RESULTS, TRIALS, CHOSEN),
        parts=RUN,
    ) as run:
        if not run.finished:
            rows = [
                row
                for row in _run_all(run, config, settings, call)
                if row["split"] == SHARE
            ]
            trials = summarize_trials(rows)
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


def linear(call: Invocation[LinearConfig, FigureOptions]) -> None:
    """All methods on the linear unit tests; a table and a figure."""
    if redraw(call.options, DRAWINGS, (FIGURE,)):
        return
    config, options = call.config, call.options
    path = call.run_path(EXPERIMENT, f"linear-{options.preset}")
    settings = load_chosen(config.chosen, config.methods)
    identity = {
        **dataclasses.asdict(config),
        "chosen": {method: list(own[0]) for method, own in settings.items()},
    }
    with figure_dir(
        path, f"{EXPERIMENT} linear", call, identity, (FIGURE, "results"), RUN
    ) as run:
        if not run.finished:
            rows = [
                {name: row[name] for name in RESULT_COLUMNS}
                for row in _run_all(run, config, settings, call)
            ]
            run.write_metrics(rows, RESULTS)
            table = summarize(rows)
            finish_figures(run, DRAWINGS, {FIGURE: table}, {"results": table})
        print(format_summary(run.summary()["results"]))
        print(f"Every environment and seed: {run.path / RESULTS}")
        print(f"Figure: {run.path / FIGURE}.png")


RESULT_COLUMNS = ("problem", "num_envs", "method", "seed", "split", "error")


def load_chosen(
    source: str, methods: Sequence[MethodName]
) -> dict[MethodName, tuple[Setting, ...]]:
    """Each method's setting from the chosen.json of linear-choose.

    Raises:
      RunDirError: there is no such file, or not each method in it.
    """
    mend = "make it with linear-choose"
    try:
        chosen = json.loads(Path(source).read_text())
        return {
            method: (
                Setting(
                    float(chosen[method]["learning_rate"]),
                    float(chosen[method]["number"]),
                ),
            )
            for method in methods
        }
    except (OSError, ValueError) as error:
        raise RunDirError(f"chosen {source!r} cannot be read ({error}): {mend}") from (
            None
        )
    except (KeyError, TypeError) as error:
        raise RunDirError(f"chosen {source!r} lacks {error}: {mend}") from None


def _run_all(
    run: RunDir,
    config: LinearConfig | LinearChooseConfig,
    settings: dict[MethodName, tuple[Setting, ...]],
    call: Invocation[Any, Any],
) -> list[Row]:
    jobs = [
        (run.path / each.name, each, call.command)
        for each in run_configs(config, settings)
    ]
    parts = train_parts(
        run, run_one, jobs, call.options.workers, one_worker_is_here=True
    )
    return [row for rows in parts for row in rows]


def run_one(path: Path, config: RunConfig, command: str) -> list[Row]:
    """The rows of a run: errors by setting, seed and split."""
    with RunDir(path, RUN, config, command=command) as run:
        if not run.finished:
            run.write_metrics(list(_rows(config)), RESULTS)
            run.finish({})
        names = {
            "problem": config.problem,
            "num_envs": config.num_envs,
            "method": config.method,
        }
        return [{**names, **row} for row in read_table(run.path / RESULTS)]


def _rows(config: RunConfig) -> Iterator[Row]:
    first, last = config.seeds
    for seed in range(first, last + 1):
        data = data_for(config, config.problem, config.num_envs, config.method, seed)
        for setting in config.settings:
            errors, share = train(config, config.problem, config.method, setting, data)
            row = {**setting._asdict(), "seed": seed}
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
    """
    errors: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in rows:
        if row["split"] in ("test_mean", "test_worst"):
            key = row["problem"], row["num_envs"], row["method"]
            own = errors.setdefault(key, {"test_mean": [], "test_worst": []})
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
