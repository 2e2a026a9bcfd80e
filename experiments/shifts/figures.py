"""Figures of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.plots import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    SKY_BLUE,
    VERMILION,
    use_style,
)
from experiments.shifts.methods import METHODS

Row = Mapping[str, Any]

# Of the methods that a figure shows; a table has the others.
COLORS = {
    "averaging": VERMILION,
    "averaging_whitened": ORANGE,
    "and_mask": BLUE,
    "and_mask_whitened": SKY_BLUE,
    "spectral_and_mask_whitened": GREEN,
    "drop_disagreement_whitened": "0.55",
    "relative_gauss_newton_whitened": "#8C6D31",
    "mgda_whitened": "#6A3D9A",
    "irm": PINK,
    "oracle": BLACK,
}
_TITLES = {
    "example1": "Example 1",
    "example2": "Example 2",
    "example3": "Example 3",
    "example1s": "Example 1, scrambled",
    "example2s": "Example 2, scrambled",
    "example3s": "Example 3, scrambled",
}


def draw_linear(rows: Sequence[Row]) -> Figure:
    """Test errors against the number of environments, a panel for each problem."""
    use_style()
    problems = [name for name in _TITLES if any(r["problem"] == name for r in rows)]
    methods = [name for name in COLORS if any(r["method"] == name for r in rows)]
    columns = min(3, len(problems))
    lines = -(-len(problems) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * lines + 1.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(problems) :]:
        axes.set_axis_off()
    for problem, axes in zip(problems, panels.flat, strict=False):
        for index, method in enumerate(methods):
            own = [
                row
                for row in rows
                if row["problem"] == problem and row["method"] == method
            ]
            own.sort(key=lambda row: row["num_envs"])
            # Side by side: several methods may have the same error everywhere.
            aside = 0.7 * ((index + 0.5) / len(methods) - 0.5)
            envs = [row["num_envs"] + aside for row in own]
            color = COLORS[method]
            style = "--" if method == "oracle" else "-"
            relative = own and all(row["over_oracle"] != "" for row in own)
            if problem.startswith("example1") and relative:
                # Errors differ from seed to seed far more than methods do.
                ratios = [row["over_oracle"] for row in own]
                axes.plot(envs, ratios, style, color=color, marker="o", ms=4)
                axes.set_ylabel("Squared error on the test, oracle = 1")
                continue
            error, low, high = (
                [row[name] for row in own] for name in ("error", "low", "high")
            )
            axes.plot(envs, error, style, color=color, marker="o", ms=4)
            axes.fill_between(envs, low, high, color=color, alpha=0.15, lw=0)
            axes.set_ylabel("Error on the test")
        axes.set(
            title=_TITLES[problem],
            xlabel="Training environments (methods side by side)",
        )
    lines_shown = panels.flat[0].get_lines()
    labels = [METHODS[method].label for method in methods]  # type: ignore[index]
    figure.legend(lines_shown, labels, loc="outside lower center", ncols=3)
    return figure


def draw_spirals(rows: Sequence[Row]) -> Figure:
    """Test errors of every method as bars, on inputs as they are and rotated."""
    use_style()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(methods)), layout="constrained")
    axes = figure.add_subplot()
    for offset, problem, color, label in (
        (-0.2, "spirals", BLUE, "as they are"),
        (0.2, "spirals_rotated", VERMILION, "rotated"),
    ):
        own = [row for row in rows if row["problem"] == problem]
        _draw_bars(axes, own, methods, offset, height=0.36, color=color, label=label)
    axes.invert_yaxis()
    axes.set(xlim=(0, 0.6), xlabel="Error on the test (chance: 0.5)")
    figure.legend(title="Inputs", loc="outside lower center", ncols=2)
    return figure


def draw_levels(rows: Sequence[Row]) -> Figure:
    """KL on unseen levels of every method as bars, by levels in a step."""
    use_style()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sizes = sorted({row["num_envs"] for row in rows})
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(methods)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.72 / len(sizes)
    colors = (BLUE, VERMILION, GREEN, ORANGE)
    for index, size in enumerate(sizes):
        own = [row for row in rows if row["num_envs"] == size]
        offset = (index - (len(sizes) - 1) / 2) * height
        color = colors[index % len(colors)]
        _draw_bars(
            axes, own, methods, offset, height=height, color=color, label=f"{size:g}"
        )
    axes.invert_yaxis()
    axes.set(xlim=(0, None), xlabel="KL from the expert on unseen levels (nats)")
    figure.legend(title="Levels in a step", loc="outside lower center", ncols=4)
    return figure


def _draw_bars(
    axes: Axes,
    rows: Sequence[Row],
    methods: Sequence[str],
    offset: float,
    **options: Any,
) -> None:
    """Errors of the methods that rows have, a bar each, with their intervals."""
    own = {row["method"]: row for row in rows}
    places = [index + offset for index, m in enumerate(methods) if m in own]
    error, low, high = (
        [own[m][name] for m in methods if m in own] for name in ("error", "low", "high")
    )
    axes.barh(places, error, **options)
    axes.hlines(places, low, high, color="0.2", lw=1.5)
    # With numbers: no bar can be seen of an error of 0.
    for place, value, end in zip(places, error, high, strict=True):
        axes.annotate(
            f"{value:#.2g}",
            (end, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
        )
    labels = [METHODS[method].label for method in methods]  # type: ignore[index]
    axes.set_yticks(range(len(methods)), labels)


_SHIFTS = {
    "own_shortcut": "Own shortcuts",
    "coloured_labels": "Coloured labels",
    "rotated": "Rotated",
    "mixed_labels": "Mixed labels",
}


def draw_images(rows: Sequence[Row]) -> Figure:
    """Test errors of every method as bars, a panel for each shift of real images."""
    use_style()
    problems = [name for name in _SHIFTS if any(r["problem"] == name for r in rows)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    size = 3.4 * len(problems) + 2.4, 1.8 + 0.3 * len(methods)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(problems), squeeze=False, sharey=True)[0]
    for problem, axes in zip(problems, panels, strict=True):
        own = [row for row in rows if row["problem"] == problem]
        places = [methods.index(row["method"]) for row in own]
        error, low, high, oracle = (
            [row[name] for row in own]
            for name in ("error", "low", "high", "oracle_chosen")
        )
        axes.barh(places, error, 0.7, color=SKY_BLUE)
        bars = axes.hlines(places, low, high, color="0.2", lw=1.5)
        marks = axes.scatter(
            oracle, places, s=22, color=VERMILION, marker="D", zorder=3
        )
        averaged = [row["error"] for row in own if row["method"] == "averaging"]
        for value in averaged:
            axes.axvline(value, color="0.5", lw=1, ls="--")
        axes.set(title=_SHIFTS[problem], xlabel="Error on the test", xlim=(0, None))
    labels = [METHODS[method].label for method in methods]
    panels[0].set_yticks(range(len(methods)), labels)
    panels[0].invert_yaxis()
    shown = ["95 % interval over seeds", "setting chosen on the test"]
    figure.legend([bars, marks], shown, loc="outside lower center", ncols=2)
    return figure
