"""The figure of the synthetic experiment: learning curves and decision regions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.common.plots import (
    METHOD_COLORS,
    METHOD_LABELS,
    ORANGE,
    SKY_BLUE,
    percent_axis,
    use_style,
)
from experiments.synthetic.config import Settings
from experiments.synthetic.data import MECHANISM_DIMS, Dataset
from experiments.synthetic.model import Apply, Params
from experiments.synthetic.training import apply_for

REGION_COLORS = LinearSegmentedColormap.from_list(
    "regions", ("#F0C15F", "white", "#93CDF0")
)
EXTENT = 2.5  # the spirals end at about 1.02 / 0.43 = 2.4
GRID = 100
SHORTCUTS = 32
SHOWN_EXAMPLES = 500
CLASS_COLORS = (ORANGE, SKY_BLUE)

# The layout, in inches.
_HEIGHT = 6.3
_BOTTOM = 0.95
_REGIONS_LEFT = 6.8
_SIDE = 4.5
_GAP = 0.25


class Trained(NamedTuple):
    """What the figure shows of one method."""

    params: Params
    history: Sequence[Mapping[str, float]]


def draw(config: Settings, dataset: Dataset, results: Mapping[str, Trained]) -> Figure:
    """Learning curves on the left, each method's decision regions beside them."""
    use_style()
    width = _REGIONS_LEFT + len(results) * (_SIDE + _GAP)
    figure = Figure(figsize=(width, _HEIGHT))

    def axes_at(left: float, bottom: float, wide: float, high: float) -> Axes:
        """Axes at a place that is given in inches."""
        box = (left / width, bottom / _HEIGHT, wide / width, high / _HEIGHT)
        return figure.add_axes(box)

    accuracy = axes_at(1.15, 2.6, 5.0, 2.75)
    kept = axes_at(1.15, _BOTTOM, 5.0, 1.35)
    kept.sharex(accuracy)
    accuracy.tick_params(labelbottom=False)
    _draw_accuracy(accuracy, results)
    _draw_kept(kept, results)
    figure.align_ylabels([accuracy, kept])
    for index, (method, trained) in enumerate(results.items()):
        left = _REGIONS_LEFT + index * (_SIDE + _GAP)
        axes = axes_at(left, _BOTTOM, _SIDE, _SIDE)
        _draw_regions(axes, config, dataset, method, trained)
    middle = (_REGIONS_LEFT + width - _GAP) / 2
    figure.legend(
        handles=_region_legend(),
        loc="lower center",
        bbox_to_anchor=(middle / width, 0.01),
        ncols=3,
        fontsize=13,
        handletextpad=0.3,
    )
    return figure


def draw_seeds(method: str, curves: Sequence[Sequence[float]], solved: float) -> Figure:
    """O.o.d. test accuracy of every seed over the epochs, and their median.

    Args:
      method: the method that was trained.
      curves: accuracies by epoch, one curve for each seed, equally long.
      solved: the accuracy from which on a seed counts as solved.
    """
    use_style()
    figure = Figure(figsize=(9, 4.8), layout="tight")
    axes = figure.add_subplot()
    accuracies = np.asarray(curves)
    epochs = np.arange(1, accuracies.shape[1] + 1)
    color = METHOD_COLORS[method]
    axes.plot(epochs, accuracies.T, color=color, lw=0.8, alpha=0.35)
    axes.plot(epochs, np.median(accuracies, axis=0), color="black", lw=2.2)
    axes.axhline(solved, color="0.45", lw=1, ls="--", zorder=1)
    count = int(np.sum(accuracies[:, -1] >= solved))
    axes.set_title(
        f"{METHOD_LABELS[method]}: {count} of {len(accuracies)} seeds end at "
        f"{solved:.0%} or more"
    )
    axes.set(ylim=(0.4, 1.02), xlabel="Epoch", ylabel="O.o.d. test accuracy")
    percent_axis(axes)
    handles = [
        Line2D([], [], color=color, lw=1.2, alpha=0.6, label="one seed"),
        Line2D([], [], color="black", lw=2.2, label="median over seeds"),
        Line2D([], [], color="0.45", lw=1, ls="--", label=f"solved: {solved:.0%}"),
    ]
    axes.legend(handles=handles, loc="best")
    return figure


def _draw_accuracy(axes: Axes, results: Mapping[str, Trained]) -> None:
    for method, trained in results.items():
        epochs = _column(trained, "epoch")
        color = METHOD_COLORS[method]
        axes.plot(epochs, _column(trained, "train_accuracy"), "--", color=color, lw=1.6)
        axes.plot(epochs, _column(trained, "test_accuracy"), "-", color=color, lw=2.4)
    axes.axhline(0.5, color="0.45", lw=1, ls=":", zorder=1)
    axes.annotate(
        "chance",
        (0.995, 0.5),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="0.35",
        fontsize=11,
    )
    axes.set(ylim=(0.4, 1.02), ylabel="Accuracy")
    percent_axis(axes)
    handles = [
        Line2D([], [], color=METHOD_COLORS[method], lw=3, label=METHOD_LABELS[method])
        for method in results
    ]
    handles += [
        Line2D([], [], color="0.3", lw=2.4, label="o.o.d. test"),
        Line2D([], [], color="0.3", lw=1.6, ls="--", label="training"),
    ]
    axes.legend(handles=handles, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0))


def _draw_kept(axes: Axes, results: Mapping[str, Trained]) -> None:
    for method, trained in results.items():
        kept = _column(trained, "kept_fraction")
        kept = np.where(kept > 0, kept, np.nan)  # nothing to show on a log axis
        axes.plot(_column(trained, "epoch"), kept, color=METHOD_COLORS[method], lw=1.6)
    axes.set(yscale="log", ylim=(None, 2), xlabel="Epoch", ylabel="Gradient kept")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _draw_regions(
    axes: Axes, config: Settings, dataset: Dataset, method: str, trained: Trained
) -> None:
    key = jax.random.key(0)
    shape = (SHORTCUTS, config.shortcut_dims)
    shortcuts = config.shortcut_std * jax.random.normal(key, shape)
    apply = apply_for(config)
    probability = region_probability(apply, trained.params, shortcuts)
    axes.contourf(
        grid_ticks(),
        grid_ticks(),
        probability,
        levels=np.linspace(0, 1, 16),
        cmap=REGION_COLORS,
        antialiased=False,  # or the borders between levels would shine through
    )
    features, labels = jax.tree.map(lambda leaf: leaf[:SHOWN_EXAMPLES], dataset.test)
    logits = _logits(apply, trained.params, features)
    wrong = np.asarray((logits > 0) != (labels > 0.5))
    points = np.asarray(features[:, :MECHANISM_DIMS])
    for label, color in enumerate(CLASS_COLORS):
        x, y = points[(np.asarray(labels) == label) & ~wrong].T
        axes.scatter(x, y, s=22, color=color, edgecolor="0.15", linewidth=0.6)
    x, y = points[wrong].T
    axes.scatter(x, y, s=26, color="black", marker="x", linewidth=1.3)
    final = trained.history[-1]
    axes.set_title(
        METHOD_LABELS[method],
        fontsize=18,
        fontweight="bold",
        color=METHOD_COLORS[method],
        pad=30,
    )
    axes.annotate(
        f"o.o.d. test {final['test_accuracy']:.1%}, "
        f"training {final['train_accuracy']:.1%}",
        (0.5, 1),
        xycoords="axes fraction",
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        fontsize=14,
    )
    axes.set(xticks=[], yticks=[], aspect="equal", xlabel="spiral dimension 1")
    axes.set_ylabel("spiral dimension 2" if axes is axes.figure.axes[2] else "")
    axes.grid(False)
    axes.spines[:].set(visible=True, color="0.6")


def grid_ticks(grid: int = GRID) -> np.ndarray:
    """The coordinates [grid] at which the regions are sampled, on both axes."""
    return np.linspace(-EXTENT, EXTENT, grid, dtype=np.float32)


def region_probability(
    apply: Apply, params: Params, shortcuts: jax.Array, grid: int = GRID
) -> np.ndarray:
    """Probability of class 1, averaged over shortcut vectors.

    Args:
      apply: the model's forward function.
      params: its parameters.
      shortcuts: the vectors [count, shortcut_dims] to average over.
      grid: points per side of the square that the spirals lie in.

    Returns:
      float32 [grid, grid], rows from the lowest second coordinate up.
    """
    return np.asarray(_region_probability(apply, grid, params, shortcuts))


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply: Apply, params: Params, features: jax.Array) -> jax.Array:
    return apply(params, features)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _region_probability(
    apply: Apply, grid: int, params: Params, shortcuts: jax.Array
) -> jax.Array:
    y, x = jnp.meshgrid(grid_ticks(grid), grid_ticks(grid), indexing="ij")
    points = jnp.stack([x, y], axis=-1).reshape(-1, MECHANISM_DIMS)

    def probability(shortcut: jax.Array) -> jax.Array:
        repeated = jnp.broadcast_to(shortcut, (len(points), len(shortcut)))
        features = jnp.concatenate([points, repeated], axis=-1)
        return jax.nn.sigmoid(apply(params, features))

    return jax.lax.map(probability, shortcuts).mean(axis=0).reshape(grid, grid)


def _region_legend() -> list[Line2D]:
    def marker(shape: str, color: str, edge: str, label: str) -> Line2D:
        return Line2D(
            [], [], ls="", marker=shape, color=color, mec=edge, ms=8, label=label
        )

    return [
        marker("o", CLASS_COLORS[0], "0.15", "class 0"),
        marker("o", CLASS_COLORS[1], "0.15", "class 1"),
        marker("x", "black", "black", "misclassified"),
    ]


def _column(trained: Trained, name: str) -> np.ndarray:
    return np.array([row[name] for row in trained.history])
