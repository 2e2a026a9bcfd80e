"""Figures of the search, and the animation of expert and student."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from experiments.common.bootstrap import bootstrap
from experiments.common.plots import METHOD_COLORS, use_style

Row = Mapping[str, Any]

_METHODS = {
    "adam": ("Adam", METHOD_COLORS["erm"]),
    "and_mask": ("AND-mask Adam", METHOD_COLORS["and_mask"]),
}
_PANELS = {"train_kl": "Training levels", "test_kl": "Unseen levels"}
# How far from the middle the first and the last point of a method are.
_SPREAD = 0.25

SCALE = 4
FRAME_MS = 66
_MARGIN, _HEADER = 4, 14


def draw_curves(rows: Sequence[Row]) -> Figure:
    """Figure 18: KL by epoch, mean of the best trials with 95 % bootstrap intervals."""
    return _draw_means(rows, "rank", "best {}")


def draw_reruns(rows: Sequence[Row]) -> Figure:
    """KL by epoch, mean over seeds with 95 % bootstrap intervals."""
    return _draw_means(rows, "seed", "{} seeds")


def _draw_means(rows: Sequence[Row], run: str, number: str) -> Figure:
    """Means over the runs that the column `run` tells apart; the legend counts them."""
    use_style()
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (column, title) in zip(axes, _PANELS.items(), strict=True):
        for method in _in_order(rows, "method"):
            label, color = _METHODS[method]
            curves = _curves(rows, method, run, column)
            epochs = np.arange(1, curves.shape[1] + 1)
            mean, low, high = bootstrap(curves)
            count = number.format(len(curves))
            ax.plot(epochs, mean, color=color, label=f"{label}, {count}")
            ax.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
        ax.set(title=title, xlabel="Epoch", yscale="log")
    axes[0].set_ylabel("KL(expert || student), nats")
    axes[1].legend(loc="best")
    return figure


def draw_best(rows: Sequence[Row]) -> Figure:
    """Lowest test KL of the best trials of each method, their mean and its interval."""
    use_style()
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    ax = figure.subplots()
    methods = _in_order(rows, "method")
    for place, method in enumerate(methods):
        _, color = _METHODS[method]
        values = np.array([row["test_kl"] for row in rows if row["method"] == method])
        mean, low, high = bootstrap(values)
        error = [[mean - low], [high - mean]]
        ax.errorbar(place - 0.4, mean, error, fmt="D", color=color, capsize=6, lw=2)
        offsets = np.linspace(-_SPREAD, _SPREAD, len(values))
        ax.plot(place + offsets, values, "o", color=color, ms=6, mec="white")
    ax.set_xlim(-0.75, len(methods) - 0.25)
    ax.set_xticks(range(len(methods)), [_METHODS[method][0] for method in methods])
    ax.set_ylabel("Lowest test KL, nats")
    return figure


def _curves(rows: Sequence[Row], method: str, run: str, column: str) -> np.ndarray:
    """Float [run, epoch]."""
    chosen = [row for row in rows if row["method"] == method]
    return np.array(
        [
            [row[column] for row in chosen if row[run] == name]
            for name in _in_order(chosen, run)
        ]
    )


def _in_order(rows: Sequence[Row], column: str) -> list[Any]:
    """Different values of a column, as they come."""
    return list(dict.fromkeys(row[column] for row in rows))


def animation(
    players: Mapping[str, Sequence[Sequence[np.ndarray]]],
    scale: int = SCALE,
    ms: int = FRAME_MS,
) -> bytes:
    """An endless GIF of several players side by side.

    Args:
      players: frames uint8 [step, height, width, 3] of each level, by player. Whoever
        is done with a level first waits for the others.
      scale: pixels of the GIF for one of a frame.
      ms: milliseconds for which a frame is shown.

    Returns:
      The file.
    """
    images = []
    for level in zip(*players.values(), strict=True):
        for step in range(max(map(len, level))):
            frames = [frames[min(step, len(frames) - 1)] for frames in level]
            images.append(_side_by_side(tuple(players), frames, scale))
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=ms, loop=0
    )
    return buffer.getvalue()


def _side_by_side(
    titles: Sequence[str], frames: Sequence[np.ndarray], scale: int
) -> Image.Image:
    height, width = frames[0].shape[:2]
    cell = scale * width + _MARGIN
    size = (len(frames) * cell - _MARGIN, _HEADER + scale * height)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for index, (title, frame) in enumerate(zip(titles, frames, strict=True)):
        large = Image.fromarray(frame).resize(
            (scale * width, scale * height), Image.Resampling.NEAREST
        )
        picture.paste(large, (index * cell, _HEADER))
        draw.text((index * cell + _MARGIN, 1), title, fill="black")
    return picture
