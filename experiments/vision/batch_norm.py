"""The subcommand `batch-norm`: what the votes are behind shared statistics.

Once a norm takes its statistics over the batch, 'the gradient of an example' can mean
two things (`Settings.batch_norm`). Both have the same mean, the gradient of a plain
step; the votes differ, and so does the mask.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

import hardvary
from experiments.common.cli import Invocation
from experiments.common.figures import (
    Drawings,
    figure_dir,
    finish_figures,
    redraw,
)
from experiments.common.networks import Variables
from experiments.common.plots import (
    BLUE,
    GREEN,
    ORANGE,
    percent_axis,
    use_style,
)
from experiments.vision.config import BatchNorm, BatchNormConfig, Norm, VisionOptions
from experiments.vision.cost import seconds
from experiments.vision.data import Images, load, require_read
from experiments.vision.training import (
    Dataset,
    GradientsFn,
    dataset_for,
    epoch_order,
    make_keys,
    make_plain_gradients,
    make_trainer,
    make_voting_gradients,
    rates_at,
)

NAME = "batch_norm"
Row = Mapping[str, Any]


def run(call: Invocation[BatchNormConfig, VisionOptions]) -> None:
    """Trains without a mask, and compares the readings on one batch on the way."""
    if redraw(call.options, DRAWINGS, (NAME,)):
        return
    config, options = call.config, call.options
    require_read(config.dataset, options.data_dir)
    path = call.run_path("vision", f"batch-norm-{options.preset}")
    experiment = "vision batch-norm"
    with figure_dir(path, experiment, call, config, (NAME,), experiment) as run_dir:
        if not run_dir.finished:
            sizes = (config.train_examples, config.test_examples)
            images = load(config.dataset, options.data_dir, *sizes)
            rows, times = compare(config, images)
            finish_figures(
                run_dir,
                DRAWINGS,
                {NAME: rows},
                {"median_seconds": times, "rows": rows},
            )
        summary = run_dir.summary()
        print(format_table(summary["rows"]))
        for name, median in summary["median_seconds"].items():
            print(f"{name}: {1e3 * median:.0f} ms for the gradients of a batch")
        print(f"Figure: {run_dir.path / f'{NAME}.png'}")


class _Training(NamedTuple):
    """A network at the epochs where it is looked at."""

    dataset: Dataset
    variables: dict[int, Variables]


def compare(
    config: BatchNormConfig, images: Images
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Compares masks on the first batch, at every look and threshold.

    Returns:
      A row for every look and threshold, and median seconds of each way to get at the
      gradients of a batch, timed in turns.
    """
    channels = images.train.images.shape[-1]
    batch, group = (_train(config, norm, images) for norm in ("batch", "group"))
    key = jax.random.fold_in(make_keys(config.seed).batches, config.epochs)
    count = len(batch.dataset.train.given)
    rows = epoch_order(key, count, config.batch_size)[0]
    examples = batch.dataset.train.images[rows], batch.dataset.train.given[rows]

    def gradients(
        make: Callable[..., GradientsFn], norm: Norm, reading: BatchNorm = "path"
    ) -> GradientsFn:
        settings = dataclasses.replace(config.train_config(norm), batch_norm=reading)
        return jax.jit(make(settings, channels))

    ways = {
        "plain": gradients(make_plain_gradients, "batch"),
        "path": gradients(make_voting_gradients, "batch"),
        "coupled": gradients(make_voting_gradients, "batch", "coupled"),
        "group": gradients(make_voting_gradients, "group"),
    }
    table = []
    for look in config.looks:
        stats = {
            name: way(
                (group if name == "group" else batch).variables[look], *examples
            ).gradients
            for name, way in ways.items()
        }
        same = float(_distance(_mean(stats["path"]), _mean(stats["coupled"])))
        for threshold in config.thresholds:
            table.append(
                {
                    "epoch": look,
                    "threshold": threshold,
                    **compare_masks(stats["path"], stats["coupled"], threshold),
                    "kept_group": float(_masked(stats["group"], threshold)[1]),
                    "mean_difference": same,
                }
            )
    return table, _time(ways, batch, group, examples, config)


def _train(config: BatchNormConfig, norm: Norm, images: Images) -> _Training:
    training = config.train_config(norm)
    dataset, keys = dataset_for(training, images), make_keys(training.seed)
    trainer = make_trainer(training, images.train.images.shape[-1])
    state = trainer.init(keys.model)
    looks = {}
    for index in tqdm(range(config.looks[-1] + 1), desc=f"{norm} norm", unit="epoch"):
        if index in config.looks:
            # Copies: the state is given away in the next epoch.
            looks[index] = jax.tree.map(jnp.copy, state.variables)
        if index < config.looks[-1]:
            rates = rates_at(training, index)
            state, _ = trainer.epoch(state, dataset, keys.batches, index, rates)
    return _Training(dataset, looks)


def _time(
    ways: Mapping[str, GradientsFn],
    batch: _Training,
    group: _Training,
    examples: tuple[jax.Array, jax.Array],
    config: BatchNormConfig,
) -> dict[str, float]:
    look = config.looks[-1]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(config.rounds), desc="timing", unit="round"):
        for name, way in ways.items():
            variables = (group if name == "group" else batch).variables[look]
            call = functools.partial(way, variables, *examples)
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def compare_masks(path: Any, coupled: Any, threshold: float) -> dict[str, float]:
    """Two masks at one threshold.

    Args:
      path: statistics of one reading, a tree of `GradStats`.
      coupled: of the other, with the same mean up to rounding.
      threshold: of the AND-mask.

    Returns:
      `kept_path` and `kept_coupled`: shares of the components that pass. `overlap`:
      components that pass both over those that pass either (Jaccard index; NaN where
      nothing passes). `cosine`: between the masked means (NaN likewise).
    """
    found = _compare_masks(path, coupled, threshold)
    return {name: float(value) for name, value in found.items()}


@jax.jit
def _compare_masks(path: Any, coupled: Any, threshold: Any) -> dict[str, jax.Array]:
    masks = [hardvary.mask(stats, threshold) for stats in (path, coupled)]
    both = optax.tree.sum(jax.tree.map(jnp.logical_and, *masks))
    either = optax.tree.sum(jax.tree.map(jnp.logical_or, *masks))
    (first, kept_path), (second, kept_coupled) = (
        _masked(stats, threshold) for stats in (path, coupled)
    )
    norms = optax.tree.norm(first) * optax.tree.norm(second)
    return {
        "kept_path": kept_path,
        "kept_coupled": kept_coupled,
        "overlap": both / either,
        "cosine": optax.tree.vdot(first, second) / norms,
    }


def _masked(stats: Any, threshold: Any) -> tuple[Any, jax.Array]:
    """The masked mean, and the share of components that pass."""
    aggregator = hardvary.and_mask(threshold)
    masked, state = aggregator.update(stats, aggregator.init(None))
    return masked, state.kept_fraction


def _mean(stats: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.mean,
        stats,
        is_leaf=lambda node: isinstance(node, hardvary.GradStats),
    )


@jax.jit
def _distance(a: Any, b: Any) -> jax.Array:
    """Norm of the difference over the norm of `a`."""
    return optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(a)


def format_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| epoch | threshold | kept, path | kept, coupled | overlap | cosine "
        "| kept, group norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kept, coupled, overlap, group = (
            f"{float(row[name]):.1%}"
            for name in ("kept_path", "kept_coupled", "overlap", "kept_group")
        )
        cosine = f"{float(row['cosine']):.2f}"
        lines.append(
            f"| {row['epoch']} | {row['threshold']} | {kept} | {coupled} | {overlap} "
            f"| {cosine} | {group} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row]) -> Figure:
    """Shares that pass, and how alike the two masks are, against the threshold."""
    use_style()
    figure = Figure(figsize=(11.5, 4.9), layout="constrained")
    kept_axes, alike_axes = figure.subplots(1, 2)
    kept = {
        "kept_path": ("path", BLUE),
        "kept_coupled": ("coupled", ORANGE),
        "kept_group": ("group norm", GREEN),
    }
    alike = {
        "overlap": ("overlap: components in both masks / in either", BLUE),
        "cosine": ("cosine between the masked gradients", ORANGE),
    }
    looks = list(dict.fromkeys(row["epoch"] for row in rows))
    styles = dict(zip(looks, (":", "--", "-", "-."), strict=False))
    for axes, lines in ((kept_axes, kept), (alike_axes, alike)):
        for name, (_, color) in lines.items():
            for look in looks:
                chosen = [row for row in rows if row["epoch"] == look]
                axes.plot(
                    [row["threshold"] for row in chosen],
                    [row[name] for row in chosen],
                    styles.get(look, "-"),
                    marker="o",
                    ms=4,
                    color=color,
                )
        handles = [
            Line2D([], [], color=color, label=label) for label, color in lines.values()
        ]
        axes.legend(handles=handles, loc="upper right")
        axes.set_xlabel("Threshold of the AND-mask")
    # Room for the legends above the lines, and below for cosines under 0.
    bottom = -1 if any(row["cosine"] < 0 for row in rows) else 0
    kept_axes.set(title="Components that pass", ylim=(0, 1.3))
    kept_axes.set_yticks(np.arange(6) / 5)
    percent_axis(kept_axes)
    alike_axes.set(title="How alike path and coupled are", ylim=(bottom, 1.3))
    alike_axes.set_yticks(np.arange(5 * bottom, 6) / 5)
    figure.legend(
        handles=[
            Line2D([], [], color="0.3", ls=style, label=f"{look:g} epochs")
            for look, style in styles.items()
        ],
        title="After",
        loc="outside lower center",
        ncols=len(styles),
    )
    return figure


DRAWINGS: Drawings = {NAME: draw}
