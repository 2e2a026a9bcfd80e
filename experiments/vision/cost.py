"""The subcommand `cost`: epochs with and without the mask, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from experiments.common.cli import Invocation, entered
from experiments.vision.config import CostConfig, TrainConfig, VisionOptions
from experiments.vision.data import Images, load, require_read
from experiments.vision.model import init_variables
from experiments.vision.training import (
    architecture_for,
    dataset_for,
    evaluate,
    make_keys,
    make_trainer,
    rates_at,
)

ROUNDS = "cost.csv"
LABELS = {
    "plain": "batch norm, plain",
    "masked": "batch norm, AND-mask",
    "group_plain": "group norm, plain",
    "group_masked": "group norm, AND-mask",
    "evaluation": "of each: evaluation",
}
# What a training with the mask is compared with.
PEERS = {"masked": "plain", "group_masked": "group_plain"}


def run(call: Invocation[CostConfig, VisionOptions]) -> None:
    """Times epochs in turns and reports medians and ratios.

    An epoch is what a run of the other commands repeats: all steps, then the
    evaluation on both parts of the data. As the latter is the same with and without
    the mask, it is timed too, and ratios are given with and without it.
    """
    config, options = call.config, call.options
    require_read(config.dataset, options.data_dir)
    path = call.run_path("vision", f"cost-{options.preset}")
    with entered(call, path, "vision cost", outputs=(ROUNDS,)) as run_dir:
        if not run_dir.finished:
            sizes = (config.train_examples, config.test_examples)
            images = load(config.dataset, options.data_dir, *sizes)
            rows = _measure(config, images)
            run_dir.write_metrics(rows, ROUNDS)
            run_dir.finish(summarize(rows))
        print(format_table(run_dir.summary()))


def _measure(config: CostConfig, images: Images) -> list[dict[str, Any]]:
    """A row for every round, with the seconds of each contestant."""
    contestants: dict[str, Callable[[], object]] = {
        "plain": _training(config.train_config("batch", 0.0), images),
        "masked": _training(config.train_config("batch", config.threshold), images),
        "group_plain": _training(config.train_config("group", 0.0), images),
        "group_masked": _training(
            config.train_config("group", config.threshold), images
        ),
        "evaluation": _evaluation(config.train_config("batch", 0.0), images),
    }
    for contestant in contestants.values():  # compiles
        contestant()
    return [
        {"round": index + 1, **{name: seconds(c) for name, c in contestants.items()}}
        for index in tqdm(range(config.rounds), unit="round")
    ]


def seconds(function: Callable[[], object]) -> float:
    """Wall time of a call, until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _training(config: TrainConfig, images: Images) -> Callable[[], object]:
    trainer = make_trainer(config, images.train.images.shape[-1])
    dataset, keys = dataset_for(config, images), make_keys(config.seed)
    state, rates, index = trainer.init(keys.model), rates_at(config, 0), 0

    def epoch() -> object:
        nonlocal state, index
        state, metrics = trainer.epoch(state, dataset, keys.batches, index, rates)
        index += 1
        return state, metrics

    return epoch


def _evaluation(config: TrainConfig, images: Images) -> Callable[[], object]:
    channels = images.train.images.shape[-1]
    architecture, dataset = (
        architecture_for(config, channels),
        dataset_for(config, images),
    )
    variables = init_variables(make_keys(config.seed).model, architecture)
    evaluation = jax.jit(lambda variables: evaluate(architecture, variables, dataset))
    return lambda: evaluation(variables)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds, and what the mask costs as a factor."""
    medians = {name: statistics.median(row[name] for row in rows) for name in LABELS}
    evaluation = medians["evaluation"]
    return {
        "median_seconds": medians,
        "epoch_over_plain": {
            name: medians[name] / medians[peer] for name, peer in PEERS.items()
        },
        "steps_over_plain": {
            name: (medians[name] - evaluation) / (medians[peer] - evaluation)
            for name, peer in PEERS.items()
        },
        "rounds": len(rows),
    }


def format_table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| epoch | s | plain = 1 | without the evaluation, plain = 1 |",
        "|---|---|---|---|",
    ]
    for name, median in summary["median_seconds"].items():
        ratios = " | ".join(
            f"{summary[key][name]:.2f}" if name in summary[key] else ""
            for key in ("epoch_over_plain", "steps_over_plain")
        )
        lines.append(f"| {LABELS[name]} | {median:.3f} | {ratios} |")
    return "\n".join(lines)
