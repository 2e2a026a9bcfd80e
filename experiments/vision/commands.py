"""The subcommands: memorize, label-noise, figure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.common.cli import Invocation
from experiments.common.figures import (
    Drawings,
    figure_dir,
    finish_figures,
    redraw,
)
from experiments.common.parts import metrics_of, train_parts
from experiments.common.run_dir import RunDir
from experiments.common.tables import format_rows
from experiments.vision.config import (
    LabelNoiseConfig,
    MemorizeConfig,
    TrainConfig,
    VisionOptions,
)
from experiments.vision.data import load, require_read
from experiments.vision.figures import (
    draw_label_noise,
    draw_threshold_curves,
    draw_thresholds,
)
from experiments.vision.training import METRICS, train

EXPERIMENT = "vision"
TRAIN = f"{EXPERIMENT} train"
DRAWINGS: Drawings = {
    "figure8": draw_thresholds,
    "figure9": draw_label_noise,
    "figure16": draw_threshold_curves,
}
MEMORIZE_FIGURES = ("figure8", "figure16")
LABEL_NOISE_FIGURES = ("figure9",)


class Outcome(NamedTuple):
    """One run: its config, what it took, and its metrics by epoch."""

    config: TrainConfig
    seconds: float
    history: list[dict[str, float]]


def memorize(
    call: Invocation[MemorizeConfig, VisionOptions],
    figures: Sequence[str] = MEMORIZE_FIGURES,
) -> None:
    """Trains at every threshold on random and on true labels; figures 8 and 16."""

    def tables(outcomes: Sequence[Outcome]) -> dict[str, list[dict[str, Any]]]:
        def labels(outcome: Outcome) -> dict[str, Any]:
            return {"labels": "random" if outcome.config.redrawn else "true"}

        return {
            "figure8": [_final_row(outcome, labels) for outcome in outcomes],
            "figure16": [
                row for outcome in outcomes for row in _epoch_rows(outcome, labels)
            ],
        }

    _run(call, "memorize", MEMORIZE_FIGURES, figures, tables)


def label_noise(
    call: Invocation[LabelNoiseConfig, VisionOptions],
    figures: Sequence[str] = LABEL_NOISE_FIGURES,
) -> None:
    """Trains with and without the mask on partly wrong labels; figure 9."""

    def tables(outcomes: Sequence[Outcome]) -> dict[str, list[dict[str, Any]]]:
        def method(outcome: Outcome) -> dict[str, Any]:
            masked = outcome.config.threshold > 0
            return {"method": "and_mask" if masked else "baseline"}

        return {
            "figure9": [
                row for outcome in outcomes for row in _epoch_rows(outcome, method)
            ]
        }

    _run(call, "label-noise", LABEL_NOISE_FIGURES, figures, tables)


def figure(call: Invocation[Any, VisionOptions], number: Literal[8, 9, 16]) -> None:
    """Draws a figure from an earlier run, or makes the run that it needs."""
    name = f"figure{number}"
    if redraw(call.options, DRAWINGS, (name,)):
        return
    if number == 9:
        label_noise(call, (name,))
    else:
        memorize(call, (name,))


Describe = Callable[[Outcome], dict[str, Any]]


def _run(
    call: Invocation[Any, VisionOptions],
    name: str,
    figures: Sequence[str],
    shown: Sequence[str],
    tables_of: Callable[[Sequence[Outcome]], dict[str, list[dict[str, Any]]]],
) -> None:
    """Trains what a config lists, in one directory, and draws all `figures`."""
    if redraw(call.options, DRAWINGS, figures):
        return
    config, options = call.config, call.options
    require_read(config.dataset, options.data_dir)
    path = call.run_path(EXPERIMENT, f"{name}-{options.preset}")
    with figure_dir(path, f"{EXPERIMENT} {name}", call, config, figures, TRAIN) as run:
        if not run.finished:
            jobs = [
                (
                    run.path / each.name,
                    each,
                    call.command,
                    options.data_dir,
                    options.workers > 1,
                )
                for each in config.train_configs()
            ]
            outcomes = train_parts(
                run, _train_one, jobs, options.workers, one_worker_is_here=True
            )
            summary = {"runs": [summarize(outcome) for outcome in outcomes]}
            finish_figures(run, DRAWINGS, tables_of(outcomes), summary)
        print(format_runs(run.summary()["runs"]))
        for figure_name in shown:
            print(f"Figure: {run.path / f'{figure_name}.png'}")


def _train_one(
    path: Path,
    config: TrainConfig,
    command: str,
    data_dir: Path | None,
    quiet: bool,
) -> Outcome:
    with RunDir(path, TRAIN, config, seed=config.seed, command=command) as run:
        if not run.finished:
            sizes = (config.train_examples, config.test_examples)
            images = _load(config.dataset, data_dir, *sizes)
            history = train(config, run, images, quiet=quiet)
            run.finish({name: history[-1][name] for name in METRICS})
        rows = metrics_of(run, config.epochs, METRICS)
        return Outcome(config, run.wall_time, rows)


# Runs of a command share their dataset.
_load = functools.lru_cache(maxsize=1)(load)


def summarize(outcome: Outcome) -> dict[str, Any]:
    """The result of a run, for the command's summary."""
    config, final = outcome.config, outcome.history[-1]
    settings = ("redrawn", "threshold", "learning_rate", "seed")
    return {
        **{name: getattr(config, name) for name in settings},
        **{name: final[name] for name in METRICS if name != "learning_rate"},
        "best_test_accuracy": max(row["test_accuracy"] for row in outcome.history),
        "seconds": round(outcome.seconds, 1),
    }


def _settings_of(outcome: Outcome, describe: Describe) -> dict[str, Any]:
    config = outcome.config
    return {
        **describe(outcome),
        "threshold": config.threshold,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
    }


def _final_row(outcome: Outcome, describe: Describe) -> dict[str, Any]:
    return _epoch_rows(outcome, describe)[-1]


def _epoch_rows(outcome: Outcome, describe: Describe) -> list[dict[str, Any]]:
    settings = _settings_of(outcome, describe)
    return [
        # The rate that a run began with, by which it is known, not the epoch's.
        {**settings, **row, "learning_rate": settings["learning_rate"]}
        for row in outcome.history
    ]


def format_runs(rows: Sequence[dict[str, Any]]) -> str:
    """Final accuracies of every run, as text."""
    columns = {
        "redrawn": ("redrawn", ">7.0%"),
        "threshold": ("threshold", ">9g"),
        "lr": ("learning_rate", ">7g"),
        "seed": ("seed", ">4"),
        "train": ("train_accuracy", ">7.1%"),
        "test": ("test_accuracy", ">7.1%"),
        "wrong": ("mislabelled_given_accuracy", ">7.1%"),
        "true": ("mislabelled_true_accuracy", ">7.1%"),
        "kept": ("kept_fraction", ">8.2%"),
        "seconds": ("seconds", ">8.1f"),
    }
    return format_rows(columns, rows)
