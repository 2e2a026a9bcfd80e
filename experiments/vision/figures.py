"""The figures of the vision experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.common.plots import (
    BLACK,
    BLUE,
    METHOD_COLORS,
    ORANGE,
    percent_axis,
    use_style,
)

Row = Mapping[str, Any]

CHANCE = 0.1
_PARTS = {"train": ("Training set", BLUE, "-"), "test": ("Test set", ORANGE, "--")}
_TITLES = {"random": "Random labels", "true": "True labels"}
_METHODS = {"baseline": ("Averaging", METHOD_COLORS["erm"])}
_NOISE_PANELS = {
    "mislabelled_given_accuracy": "Mislabelled part:\nthe wrong label is learnt",
    "mislabelled_true_accuracy": "Mislabelled part:\nthe true label is predicted",
    "correct_accuracy": "Correctly labelled part",
    "test_accuracy": "Test set",
}


def draw_thresholds(rows: Sequence[Row]) -> Figure:
    """Figure 8: final accuracies against the threshold, random and true labels."""
    use_style()
    panels = _in_order(rows, "labels")
    figure, axes = _panels(1, len(panels), (5.2 * len(panels), 4.6))
    for ax, labels in zip(axes[0], panels, strict=True):
        chosen = [row for row in rows if row["labels"] == labels]
        for part, (title, color, style) in _PARTS.items():
            _thresholds_line(ax, chosen, f"{part}_accuracy", title, color, style)
        _chance(ax)
        ax.set(title=_TITLES[labels], xlabel="Threshold of the AND-mask")
        # Where the thresholds are close together, at the left, is where much happens.
        ax.set_xscale("function", functions=(_root, np.square))
        thresholds = sorted({row["threshold"] for row in chosen})
        ax.xaxis.set_major_locator(FixedLocator(thresholds))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels([f"{t:g}" for t in thresholds])
    axes[0, 0].set_ylabel("Accuracy after the last epoch")
    axes[0, 0].legend(loc="best")
    return figure


def _root(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(x, 0.0))


def _thresholds_line(
    axes: Axes, rows: Sequence[Row], column: str, title: str, color: str, style: str
) -> None:
    x = np.array([row["threshold"] for row in rows])
    y = np.array([row[column] for row in rows])
    places = np.unique(x)
    means = [y[x == place].mean() for place in places]
    axes.plot(places, means, style, color=color, label=title)
    # Whole dots, also on the edges of the panel.
    axes.plot(x, y, "o", color=color, ms=5, alpha=0.5, mec="none", clip_on=False)


def draw_threshold_curves(rows: Sequence[Row]) -> Figure:
    """Figure 16: learning curves of every threshold, random and true labels."""
    use_style()
    panels, thresholds = _in_order(rows, "labels"), _in_order(rows, "threshold")
    figure, axes = _panels(len(_PARTS), len(panels), (5.4 * len(panels), 7.6))
    colors = dict(zip(thresholds, _shades(len(thresholds)), strict=True))
    for column, labels in enumerate(panels):
        for line, (part, (title, _, _)) in enumerate(_PARTS.items()):
            ax = axes[line, column]
            for threshold in thresholds:
                chosen = [
                    row
                    for row in rows
                    if row["labels"] == labels and row["threshold"] == threshold
                ]
                _curves(ax, chosen, f"{part}_accuracy", colors[threshold])
            _chance(ax)
            ax.set_title(f"{_TITLES[labels]}, {title.lower()}")
    for ax in axes[-1]:
        ax.set_xlabel("Epoch")
    for ax in axes[:, 0]:
        ax.set_ylabel("Accuracy")
    axes[-1, 0].legend(loc="best")
    handles = [
        Line2D([], [], color=colors[t], label=f"{t:g}" if t else "0 (averaging)")
        for t in thresholds
    ]
    figure.legend(
        handles=handles,
        title="Threshold",
        loc="outside lower center",
        ncols=min(len(handles), 7),
    )
    return figure


def draw_label_noise(rows: Sequence[Row]) -> Figure:
    """Figure 9: accuracies over the epochs, each learning rate in a row of its own."""
    use_style()
    rates = _in_order(rows, "learning_rate")
    size = (4.2 * len(_NOISE_PANELS), 1.2 + 3.2 * len(rates))
    figure, axes = _panels(len(rates), len(_NOISE_PANELS), size)
    methods = {
        method: _METHODS.get(method, (_mask_label(rows), METHOD_COLORS["and_mask"]))
        for method in _in_order(rows, "method")
    }
    for line, rate in enumerate(rates):
        for ax, (name, title) in zip(axes[line], _NOISE_PANELS.items(), strict=True):
            for method, (_, color) in methods.items():
                chosen = [
                    row
                    for row in rows
                    if row["learning_rate"] == rate and row["method"] == method
                ]
                _curves(ax, chosen, name, color)
            chance = _chance(ax)
            if line == 0:
                ax.set_title(title)
            if line == len(rates) - 1:
                ax.set_xlabel("Epoch")
        axes[line, 0].set_ylabel(f"Learning rate {rate:g}\nAccuracy")
    handles = [
        Line2D([], [], color=color, label=label) for label, color in methods.values()
    ]
    handles.append(chance)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _mask_label(rows: Sequence[Row]) -> str:
    return f"AND-mask, threshold {max(row['threshold'] for row in rows):g}"


def _curves(axes: Axes, rows: Sequence[Row], column: str, color: Any) -> None:
    """Every seed thin, their mean thick."""
    seeds = _in_order(rows, "seed")
    curves = [[row[column] for row in rows if row["seed"] == seed] for seed in seeds]
    epochs = [row["epoch"] for row in rows if row["seed"] == seeds[0]]
    for curve in curves:
        axes.plot(epochs, curve, color=color, lw=0.8, alpha=0.4)
    axes.plot(epochs, np.mean(curves, axis=0), color=color)


def _chance(axes: Axes) -> Line2D:
    return axes.axhline(CHANCE, color="0.45", lw=1, ls=":", label="Chance")


def _panels(
    lines: int, columns: int, size: tuple[float, float]
) -> tuple[Figure, np.ndarray]:
    """A figure with axes [line, column] that share their scales."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    axes[0, 0].set_ylim(0, 1.02)
    for ax in axes.flat:
        percent_axis(ax)
    return figure, axes


def _shades(count: int) -> list[Any]:
    """Black, for averaging, and colours in an order, whose hues tell them apart."""
    plasma = colormaps["plasma"](np.linspace(0.05, 0.9, max(count - 1, 1)))
    return [BLACK, *plasma][:count]


def _in_order(rows: Sequence[Row], column: str) -> list[Any]:
    """Different values of a column, as they come."""
    return list(dict.fromkeys(row[column] for row in rows))
