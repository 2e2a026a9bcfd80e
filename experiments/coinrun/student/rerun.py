"""The subcommand rerun: what a search has chosen, with seeds that it has not seen.

A search reports the lowest of many numbers, each of which it has looked at on the test
set. Other seeds of the chosen settings, at their last epoch, have less of such luck:
what is left of it is the settings' own, which were chosen on the same states.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.coinrun import dataset as data
from experiments.coinrun.student.commands import (
    EXPERIMENT,
    TRAIN,
    train_dir,
    train_in,
)
from experiments.coinrun.student.config import (
    METHODS,
    Method,
    RerunConfig,
    RerunOptions,
    TrainConfig,
    shared_settings,
)
from experiments.coinrun.student.figures import draw_reruns
from experiments.coinrun.student.training import METRICS
from experiments.common.bootstrap import bootstrap
from experiments.common.cli import Invocation
from experiments.common.figures import (
    Drawings,
    figure_dir,
    finish_figures,
    redraw,
)
from experiments.common.parts import metrics_of, train_parts
from experiments.common.run_dir import RunDirError
from experiments.common.settings import load_chosen

RERUNS = "reruns"
DRAWINGS: Drawings = {RERUNS: draw_reruns}
REPORTED = ("test_kl", "min_test_kl", "train_kl", "test_accuracy", "open_fraction")

Row = dict[str, Any]


def rerun(call: Invocation[RerunConfig, RerunOptions]) -> None:
    """Trains each method's chosen settings with every seed; table, figure, means."""
    config, options = call.config, call.options
    if redraw(options, DRAWINGS, (RERUNS,)):
        return
    directory = options.data_dir(config.dataset).absolute()
    _, digest = data.load(config.dataset, directory)
    chosen = load_selected(options.selected_file)
    configs = train_configs(config, chosen)
    identity = dataclasses.asdict(config)
    identity |= {"selected": chosen, "data_sha256": digest}
    first, last = config.seeds
    name = f"rerun-{options.preset}-seeds{first}-{last}"
    path = call.run_path(EXPERIMENT, name, ("seeds",))
    parts = f"{EXPERIMENT} rerun"
    with figure_dir(path, parts, call, identity, (RERUNS,), TRAIN) as run:
        if not run.finished:
            jobs = [
                (
                    run.path / f"{each.method}-seed{each.seed}",
                    each,
                    directory,
                    digest,
                    call.command,
                )
                for each in configs
            ]
            outcomes = train_parts(run, _train_one, jobs, options.workers)
            rows = [
                {"method": each.method, "seed": each.seed, **row}
                for each, (_, history) in zip(configs, outcomes, strict=True)
                for row in history
            ]
            summaries = [summary for summary, _ in outcomes]
            finish_figures(run, DRAWINGS, {RERUNS: rows}, summarize(summaries))
        print(format_reruns(run.summary()))
        print(f"Figure: {run.path / f'{RERUNS}.png'}")


def load_selected(path: Path) -> dict[str, dict[str, Any]]:
    """Fields of `TrainConfig` that a search has chosen, by method.

    Raises:
      RunDirError: there is no such file, or it is not one of a search.
    """
    mend = "--selected takes selected.json of a finished search with both methods"
    return {
        method: load_chosen(f"{path}:{method}", TrainConfig(), method, mend)
        for method in METHODS
    }


def train_configs(
    config: RerunConfig, chosen: Mapping[str, Mapping[str, Any]]
) -> list[TrainConfig]:
    """One for each method and seed; all methods of a seed before the next seed."""
    first, last = config.seeds
    return [
        TrainConfig(**{**shared_settings(config), **settings, "seed": seed})
        for seed in range(first, last + 1)
        for settings in chosen.values()
    ]


def _train_one(
    path: Path, config: TrainConfig, directory: Path, digest: str, command: str
) -> tuple[Row, list[Row]]:
    """The summary and the history of a run, trained or found."""
    with train_dir(path, config, digest, command) as run:
        if not run.finished:
            train_in(
                run, config, _load(config.dataset, directory, digest)[0], quiet=True
            )
        rows = metrics_of(run, config.epochs, METRICS)
        summary = {"method": config.method, "seed": config.seed, **run.summary()}
        return summary, rows


# The runs of a worker share their dataset.
_load = functools.lru_cache(maxsize=1)(data.load)


def summarize(summaries: Sequence[Mapping[str, Any]]) -> Row:
    """Means over seeds with 95 % bootstrap intervals, and Adam's excess of test KL.

    Seeds with which a method diverged are counted, and left out: the excess is of the
    seeds with which neither did, the mean of the differences of one seed.

    Raises:
      RunDirError: a method diverged with every seed.
    """
    ordered = sorted(summaries, key=lambda row: row["seed"])

    def values(method: str, name: str) -> np.ndarray:
        # JSON has words in place of NaN.
        return np.array(
            [float(row[name]) for row in ordered if row["method"] == method]
        )

    good = {method: np.isfinite(values(method, "test_kl")) for method in METHODS}
    both = np.logical_and(*good.values())
    if not both.any():
        raise RunDirError(
            "there is no seed with which neither method diverged: see metrics.csv of "
            "each run, and search for other settings"
        )

    def means(method: Method) -> Row:
        return {
            "seeds": len(good[method]),
            "diverged": int((~good[method]).sum()),
            **{
                name: bootstrap(values(method, name)[good[method]]).as_row()
                for name in REPORTED
            },
        }

    adam, masked = (values(method, "test_kl")[both] for method in METHODS)
    gain = bootstrap(adam - masked)
    return {
        "methods": {method: means(method) for method in METHODS},
        "adam_minus_and_mask": gain.as_row(),
    }


def format_reruns(summary: Mapping[str, Any]) -> str:
    """The means, as text."""
    lines = [
        f"{method}: {each['seeds']} seeds, {each['diverged']} diverged; last epoch: "
        "test KL {mean:.5f} [{low:.5f}, {high:.5f}]".format(**each["test_kl"])
        + ", train KL {mean:.5f}".format(**each["train_kl"])
        for method, each in summary["methods"].items()
    ]
    lines.append(
        "adam minus and_mask: {mean:+.5f} [{low:+.5f}, {high:+.5f}]".format(
            **summary["adam_minus_and_mask"]
        )
    )
    return "\n".join(lines)
