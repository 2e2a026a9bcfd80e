"""The subcommands: a choice of settings, and then all methods, on each shift."""

from __future__ import annotations

import dataclasses
import functools
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
from experiments.shifts import images as images_training
from experiments.shifts import levels as levels_training
from experiments.shifts import linear as linear_training
from experiments.shifts import spirals as spirals_training
from experiments.shifts.config import (
    ImagesChooseConfig,
    ImagesChooseOptions,
    ImagesConfig,
    ImagesOptions,
    ImagesRun,
    LinearChooseConfig,
    LinearConfig,
    LinearRun,
    MethodName,
    Settings,
    SpiralsChooseConfig,
    SpiralsConfig,
    SpiralsRun,
    setting_name,
)
from experiments.shifts.figures import (
    draw_images,
    draw_levels,
    draw_linear,
    draw_spirals,
)
from experiments.shifts.levels_config import (
    LevelsChooseConfig,
    LevelsChooseOptions,
    LevelsConfig,
    LevelsOptions,
    LevelsRun,
)
from experiments.shifts.methods import METHODS

EXPERIMENT = "shifts"
RESULTS = "results.csv"
TRIALS = "trials.csv"
CHOSEN = "chosen.json"
DRAWINGS: Drawings = {
    "linear": draw_linear,
    "spirals": draw_spirals,
    "images": draw_images,
    "levels": draw_levels,
}
# What settings are chosen by; among the splits, as it is one number of each run.
SHARE = "held_out_share"
TESTED = ("test_mean", "test_worst")
# Likewise with the setting that was chosen on the test, for comparison.
ORACLE = "oracle_test_mean"

Row = dict[str, Any]
RunConfig = LinearRun | SpiralsRun | ImagesRun | LevelsRun
# Trains a run's settings on a seed; for each the errors [env] by split, and the share
# that selection goes by. `images` and `levels` take the folder of the data too.
Train = Callable[..., Iterable[tuple[Mapping[str, Any], Any]]]
TRAIN: dict[str, Train] = {
    "linear": linear_training.train,
    "spirals": spirals_training.train,
    "images": images_training.train,
    "levels": levels_training.train,
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


def images_choose(call: Invocation[ImagesChooseConfig, ImagesChooseOptions]) -> None:
    """Chooses a setting for each method on each shift of real images."""
    _choose(call, "images", call.options.data_dir)


def images(call: Invocation[ImagesConfig, ImagesOptions]) -> None:
    """All methods on shifts of real images; a table and a figure."""
    _compare(call, "images", call.options.data_dir)


def levels_choose(call: Invocation[LevelsChooseConfig, LevelsChooseOptions]) -> None:
    """Chooses a setting for each method on CoinRun's levels."""
    folder = call.options.data_dir(call.config.dataset)
    _choose(levels_training.with_digest(call), "levels", folder)


def levels(call: Invocation[LevelsConfig, LevelsOptions]) -> None:
    """Methods on CoinRun's levels; a table and a figure."""
    if call.options.results is None:
        call = levels_training.with_digest(call)
    _compare(call, "levels", call.options.data_dir(call.config.dataset))


def _run_name(shift: str) -> str:
    return f"{EXPERIMENT} {shift} run"


def _choose(
    call: Invocation[Any, Any], shift: str, data_dir: Path | None = None
) -> None:
    config, options = call.config, call.options
    name = f"{shift}-choose"
    path = call.run_path(EXPERIMENT, f"{name}-{options.preset}")
    numbers = {
        method: evenly(_numbers(config, method), getattr(config, "most_numbers", None))
        for method in config.methods
    }
    settings: Settings = {
        setting_name(config, method, problem): tuple(
            itertools.product(config.learning_rates, numbers[method])
        )
        for method in config.methods
        for problem in config.problems
    }
    with entered(
        call,
        path,
        f"{EXPERIMENT} {name}",
        outputs=(RESULTS, TRIALS, CHOSEN),
        parts=_run_name(shift),
    ) as run:
        if not run.finished:
            rows = _run_all(run, config, settings, call, shift, data_dir)
            trials = summarize_trials(rows, config.by_problem)
            run.write_metrics(trials, TRIALS)
            chosen = choose(trials)
            write_json(run.path / CHOSEN, chosen)
            run.finish(chosen)
        chosen_rows = [{"method": m, **row} for m, row in run.summary().items()]
        columns = {
            "method": ("method", "<46" if config.by_problem else "<31"),
            "rate": ("learning_rate", ">7g"),
            "number": ("number", ">8g"),
            "share": (SHARE, ">8.4f"),
        }
        print(format_rows(columns, chosen_rows))
        print(f"Every setting: {run.path / TRIALS}")
        print(f"Chosen settings: {run.path / CHOSEN}")


def _numbers(config: Any, method: MethodName) -> tuple[float, ...]:
    """Values of a method's own number: the config's thresholds if it has any."""
    own = METHODS[method]
    if own.name_of_number == "threshold":
        return getattr(config, "thresholds", own.numbers)
    return own.numbers


def evenly(values: Sequence[float], most: int | None) -> tuple[float, ...]:
    """As many of `values`, evenly from the first to the last; None for all."""
    if most is None or most >= len(values):
        return tuple(values)
    places = np.linspace(0, len(values) - 1, most).round().astype(int)
    return tuple(values[place] for place in places)


def summarize_trials(rows: Sequence[Row], by_problem: bool = False) -> list[Row]:
    """The mean share of each setting over environments and seeds, and problems.

    Args:
      rows: errors by setting, seed and split.
      by_problem: each problem by itself, and with the mean error on its test, which
        nothing but the oracle's choice looks at.
    """
    errors: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in rows:
        if row["split"] not in (SHARE, "test_mean"):
            continue
        key = row["method"], row["learning_rate"], row["number"]
        key += (row["problem"],) if by_problem else ()
        # What has diverged is as bad as can be.
        error = row["error"] if np.isfinite(row["error"]) else 1.0
        own = errors.setdefault(key, {SHARE: [], "test_mean": []})
        own[row["split"]].append(error)
    trials = []
    for (method, rate, number, *problem), own in errors.items():
        trial = {"method": method, "learning_rate": rate, "number": number}
        trial |= {SHARE: float(np.mean(own[SHARE]))}
        if by_problem:
            trial |= {
                "problem": problem[0],
                "test_mean": float(np.mean(own["test_mean"])),
            }
        trials.append(trial)
    return trials


def choose(trials: Sequence[Row]) -> dict[str, Row]:
    """Each method's setting with the lowest share, the first of equal ones; of trials
    by problem one for each, under METHOD-PROBLEM, with the oracle's choice: the setting
    with the lowest error on the test.
    """
    best: dict[str, list[Row]] = {}
    for trial in trials:
        name = "-".join(trial[key] for key in ("method", "problem") if key in trial)
        best.setdefault(name, []).append(trial)
    chosen = {}
    for name, own in best.items():
        row = min(own, key=lambda trial: trial[SHARE])
        chosen[name] = {key: row[key] for key in ("learning_rate", "number", SHARE)}
        if "test_mean" in row:
            row = min(own, key=lambda trial: trial["test_mean"])
            keys = ("learning_rate", "number", "test_mean")
            chosen[name]["oracle"] = {key: row[key] for key in keys}
    return chosen


def _compare(
    call: Invocation[Any, Any], shift: str, data_dir: Path | None = None
) -> None:
    if redraw(call.options, DRAWINGS, (shift,)):
        return
    config, options = call.config, call.options
    path = call.run_path(EXPERIMENT, f"{shift}-{options.preset}")
    names = [
        setting_name(config, method, problem)
        for method in config.methods
        for problem in config.problems
    ]
    settings = load_chosen(config.chosen, list(dict.fromkeys(names)), shift)
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
                for row in _reported(
                    config,
                    settings,
                    _run_all(run, config, settings, call, shift, data_dir),
                )
            ]
            run.write_metrics(rows, RESULTS)
            seeds = [row for row in rows if row["split"] in (*TESTED, ORACLE)]
            run.write_metrics(seeds, f"{shift}_seeds.csv")
            table = summarize(seeds)
            finish_figures(run, DRAWINGS, {shift: table}, {"results": table})
        print(format_summary(run.summary()["results"]))
        print(f"Every environment and seed: {run.path / RESULTS}")
        print(f"Figure: {run.path / shift}.png")


RESULT_COLUMNS = ("problem", "num_envs", "method", "seed", "split", "error")


def load_chosen(source: str, names: Sequence[str], shift: str) -> Settings:
    """Settings by name from the chosen.json of the shift's choose.

    Where the oracle has chosen another, that one comes second.

    Raises:
      RunDirError: there is no such file, or not each name in it.
    """

    def pair(row: Mapping[str, Any]) -> tuple[float, float]:
        return float(row["learning_rate"]), float(row["number"])

    mend = f"make it with {shift}-choose"
    try:
        chosen = json.loads(Path(source).read_text())
        return {
            name: tuple(
                dict.fromkeys(
                    pair(row)
                    for row in (
                        chosen[name],
                        chosen[name].get("oracle", chosen[name]),
                    )
                )
            )
            for name in names
        }
    except (OSError, ValueError) as error:
        message = f"chosen {source!r} cannot be read ({error}): {mend}"
    except (KeyError, TypeError) as error:
        message = f"chosen {source!r} lacks {error}: {mend}"
    raise RunDirError(message)


def _reported(config: Any, settings: Settings, rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of the setting that was chosen, and the oracle's mean error as `ORACLE`."""
    for row in rows:
        own = settings[setting_name(config, row["method"], row["problem"])]
        setting = row["learning_rate"], row["number"]
        if np.allclose(setting, own[0]):
            yield row
        on_test = config.by_problem and row["split"] == "test_mean"
        if on_test and np.allclose(setting, own[-1]):
            yield {**row, "split": ORACLE}


def _run_all(
    run: RunDir,
    config: Any,
    settings: Settings,
    call: Invocation[Any, Any],
    shift: str,
    data_dir: Path | None,
) -> list[Row]:
    jobs = [
        (run.path / each.name, each, call.command, shift, data_dir)
        for each in config.run_configs(settings)
    ]
    parts = train_parts(
        run, run_one, jobs, call.options.workers, one_worker_is_here=True
    )
    return [row for rows in parts for row in rows]


def run_one(
    path: Path,
    config: RunConfig,
    command: str,
    shift: str,
    data_dir: Path | None = None,
) -> list[Row]:
    """The rows of a run: errors by setting, seed and split."""
    with RunDir(path, _run_name(shift), config, command=command) as run:
        if not run.finished:
            train = TRAIN[shift]
            if data_dir is not None:
                train = functools.partial(train, data_dir=data_dir)
            run.write_metrics(list(_rows(config, train)), RESULTS)
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
    the oracle's where that was trained; and, where the oracle has chosen settings, the
    mean error with those.

    Args:
      rows: of each seed those with the splits `TESTED`, and `ORACLE` if any.
    """
    errors: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in rows:
        key = row["problem"], row["num_envs"], row["method"]
        own = errors.setdefault(key, {split: [] for split in (*TESTED, ORACLE)})
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
        if own[ORACLE]:
            table[-1]["oracle_chosen"] = float(np.mean(own[ORACLE]))
    return table


def format_summary(table: Sequence[Row]) -> str:
    """The summary as text."""
    columns = {
        "problem": ("problem", "<15"),
        "envs": ("num_envs", ">4"),
        "method": ("method", "<31"),
        "error": ("error", ">9.4f"),
        "low": ("low", ">9.4f"),
        "high": ("high", ">9.4f"),
        "worst env": ("worst_env", ">9.4f"),
        "/ oracle": ("over_oracle", ">8.3f"),
    }
    return format_rows(columns, table)


_ERROR_CELL = "{error:.4f} ({low:.4f} to {high:.4f})"


def format_markdown(table: Sequence[Row], problem: str, value: str = "error") -> str:
    """Of one problem a line for each method and a column for each number of
    environments: the value, and for errors the interval; a dash for what was not run.
    """
    own = [row for row in table if row["problem"] == problem]
    sizes = sorted({row["num_envs"] for row in own})
    shown = "{over_oracle:.3f}" if value == "over_oracle" else _ERROR_CELL
    lines = [
        "| method | " + " | ".join(f"{size:g} envs" for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in own):
        rows = {row["num_envs"]: row for row in own if row["method"] == method}
        cells = [shown.format(**rows[n]) if n in rows else "-" for n in sizes]
        lines.append(f"| {METHODS[method].label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_shifts(table: Sequence[Row], value: str = "error") -> str:
    """Markdown with a line for each method and a column for each problem: errors with
    intervals, or another value.
    """
    problems = list(dict.fromkeys(row["problem"] for row in table))
    titles = [problem.replace("_", " ") for problem in problems]
    lines = ["| method | " + " | ".join(titles) + " |"]
    lines.append("|---" * (len(problems) + 1) + "|")
    for method in dict.fromkeys(row["method"] for row in table):
        cells = {row["problem"]: row for row in table if row["method"] == method}
        shown = [
            "{error:.3f} ({low:.3f} to {high:.3f})".format(**cells[problem])
            if value == "error"
            else f"{cells[problem][value]:.3f}"
            for problem in problems
        ]
        lines.append(f"| {METHODS[method].label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
