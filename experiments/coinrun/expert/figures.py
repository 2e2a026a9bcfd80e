"""The figures of the expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.common.plots import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    percent_axis,
    use_style,
)

_LINES = {
    "sampled": ("Expert, unseen levels", GREEN, "-"),
    "scripted": ("Scripted: right, with jumps", ORANGE, "--"),
    "random": ("Random actions", BLACK, ":"),
}
# Rows that are averaged for the line: about a hundred points remain to be seen.
_SMOOTHED = 100


def draw_learning_curve(
    rows: Sequence[Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Share of training levels solved and entropy against frames.

    Args:
      rows: of metrics.csv.
      results: of the evaluation, by policy.
    """
    use_style()
    figure = Figure(figsize=(11, 4.9), layout="constrained")
    axes = figure.subplots(1, 2)
    frames = np.array([row["frames"] for row in rows]) / 1e6
    for ax, name in zip(axes, ("solved", "entropy"), strict=True):
        values = np.array([row[name] for row in rows])
        ax.plot(frames, values, color=BLUE, lw=0.7, alpha=0.35)
        ax.plot(frames, _smooth(values), color=BLUE, label="Training levels")
        ax.set_xlabel("Frames (millions)")
    for name, (label, color, style) in _LINES.items():
        axes[0].axhline(results[name]["solved"], label=label, color=color, ls=style)
    axes[0].set(ylabel="Levels solved", ylim=(0, 1.02))
    percent_axis(axes[0])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    axes[1].set(ylabel="Entropy of the policy (nats)", ylim=(0, None))
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over a window that grows with the curve, where there are values."""
    half = len(values) // _SMOOTHED
    windows = [
        values[max(0, index - half) : index + half + 1] for index in range(len(values))
    ]
    return np.array(
        [
            np.nanmean(window) if np.isfinite(window).any() else np.nan
            for window in windows
        ]
    )
