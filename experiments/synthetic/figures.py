"""The figures of the synthetic experiment."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.common.networks import Variables
from experiments.common.plots import (
    BLACK,
    BLUE,
    METHOD_COLORS,
    METHOD_LABELS,
    ORANGE,
    SKY_BLUE,
    VERMILION,
    percent_axis,
    use_style,
)
from experiments.synthetic.config import (
    Method,
    Settings,
    TrainConfig,
    shared_settings,
)
from experiments.synthetic.correlations import Signal
from experiments.synthetic.data import MECHANISM_DIMS, Dataset
from experiments.synthetic.model import Apply
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


Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """One method's part of the figure."""

    variables: Variables
    history: Sequence[Mapping[str, float]]


def draw(
    config: Settings, dataset: Dataset, results: Mapping[Method, Trained]
) -> Figure:
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
      curves: accuracies by epoch, one curve for each seed. One that ends early stays
        where it ended.
      solved: the accuracy from which on a seed counts as solved.
    """
    use_style()
    figure = Figure(figsize=(9, 4.8), layout="tight")
    axes = figure.add_subplot()
    longest = max(map(len, curves))
    accuracies = np.asarray([np.pad(c, (0, longest - len(c)), "edge") for c in curves])
    epochs = np.arange(1, longest + 1)
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


def draw_correlations(rows: Sequence[Row]) -> Figure:
    """Likeness of the masked gradient to others, against the threshold.

    The AND-mask on the right; the XOR-mask on the left, at its threshold less 1, so
    that the two meet at 0, where nearly everything passes both. Rows with nothing to
    correlate are left out.
    """
    use_style()
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    axes = figure.add_subplot()
    signals: dict[Signal, tuple[str, str]] = {
        "mechanism_correlation": (
            BLUE,
            "data whose shortcuts were shuffled (the mechanism's signal)",
        ),
        "shortcut_correlation": (
            VERMILION,
            "data whose spirals were shuffled (the shortcuts' signal)",
        ),
    }
    for column, (color, _) in signals.items():
        for mask, shift in (("xor", -1), ("and", 0)):
            points = np.array(
                [(r["threshold"] + shift, r[column]) for r in rows if r["mask"] == mask]
            )
            _draw_points_and_fit(axes, points[np.isfinite(points[:, 1])], color)
    axes.axvline(0, color="0.45", lw=1)
    for x, title in (
        (-0.5, "XOR-mask keeps components\nwith an agreement below 1 + x"),
        (0.5, "AND-mask keeps components\nwith an agreement of x or more"),
    ):
        axes.annotate(
            title,
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    axes.set(
        xlim=(-1.05, 1.05),
        xlabel="x: threshold of the AND-mask, that of the XOR-mask less 1",
        ylabel="Correlation of the masked gradient",
    )
    colors = [
        Line2D([], [], color=color, lw=3, label=f"with the gradient on {data}")
        for color, data in signals.values()
    ]
    figure.legend(handles=colors, loc="outside lower center")
    marks = [
        Line2D([], [], ls="", marker="o", color="0.3", ms=4, label="one network"),
        Line2D([], [], ls="", marker="o", color="0.3", ms=8, label="their mean"),
        Line2D([], [], ls="--", color="0.3", lw=1.5, label="linear fit"),
    ]
    axes.legend(handles=marks, loc="best")
    return figure


def _draw_points_and_fit(axes: Axes, points: np.ndarray, color: str) -> None:
    """Points [point, 2], their mean at each abscissa, and a straight line."""
    if not len(points):
        return
    x, y = points.T
    axes.plot(x, y, "o", color=color, ms=4, alpha=0.25, mec="none")
    places = np.unique(x)
    means = [y[x == place].mean() for place in places]
    axes.plot(places, means, "o", color=color, ms=8, mec="white")
    if len(places) > 1:
        line = np.polynomial.Polynomial.fit(x, y, 1)
        axes.plot(places, line(places), "--", color=color, lw=1.5)


def draw_accuracies(rows: Sequence[Row]) -> Figure:
    """Training and test accuracy of every method, a dot for each seed (figure 6).

    Args:
      rows: `method`, `seed`, `train_accuracy` and `test_accuracy` after training, and
        `run`: the label of another run of the method, shown on its own, or "".
    """
    use_style()
    bars: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        bars.setdefault((row["method"], row["run"]), []).append(row)
    figure = Figure(figsize=(1.5 + 1.35 * len(bars), 5.2), layout="constrained")
    axes = figure.add_subplot()
    for index, ((method, _), own) in enumerate(bars.items()):
        for offset, name, alpha in (
            (-0.2, "train_accuracy", 0.3),
            (0.2, "test_accuracy", 1.0),
        ):
            values = np.array([row[name] for row in own])
            x, color = index + offset, METHOD_COLORS[method]
            axes.bar(x, values.mean(), 0.38, color=color, alpha=alpha)
            spread = np.linspace(-0.13, 0.13, len(values)) if len(values) > 1 else 0
            axes.scatter(x + spread, values, s=9, color="0.15", alpha=0.6, zorder=3)
            axes.annotate(
                f"{values.mean():.0%}",
                (x, values.max()),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=11,
            )
    axes.axhline(0.5, color="0.3", lw=1, ls="--")
    axes.annotate(
        "chance",
        (1, 0.5),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=11,
        color="0.3",
    )
    labels = [
        f"{METHOD_LABELS[method].replace(' ', chr(10), 1)}\n{len(own)} seeds\n{run}"
        for (method, run), own in bars.items()
    ]
    axes.set_xticks(range(len(bars)), labels, fontsize=12)
    axes.set(ylim=(0, 1.1), ylabel="Accuracy", yticks=np.linspace(0, 1, 6))
    axes.grid(False, axis="x")
    percent_axis(axes)
    axes.set_title("Training (pale) and o.o.d. test accuracy (full), after training")
    return figure


def draw_curves(rows: Sequence[Row]) -> Figure:
    """Accuracies by epoch, a panel for each method (figure 14).

    Args:
      rows: `method`, `epoch`, and the lowest, mean and highest `train` and `test`
        accuracy over seeds.
    """
    use_style()
    methods = _methods(rows)
    columns = min(4, len(methods))
    lines = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes in panels.flat[len(methods) :]:
        axes.set_axis_off()
    for method, axes in zip(methods, panels.flat, strict=False):
        own = [row for row in rows if row["method"] == method]
        epochs = [row["epoch"] for row in own]
        # Test first, so that the dashes lie on it where both are the same.
        for name, color, style, shade in (
            ("test", METHOD_COLORS[method], "-", 0.25),
            ("train", BLACK, "--", 0.1),
        ):
            low, mean, high = (
                [row[f"{name}_{part}"] for row in own]
                for part in ("lowest", "mean", "highest")
            )
            axes.fill_between(epochs, low, high, color=color, alpha=shade, lw=0)
            axes.plot(epochs, mean, style, color=color, lw=1.8, zorder=3)
        axes.axhline(0.5, color="0.3", lw=1, ls=":", zorder=1)
        axes.set_title(METHOD_LABELS[method], fontsize=14)
        axes.set(ylim=(0.35, 1.03), xlabel="Epoch")
        percent_axis(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel("Accuracy")
    handles = [
        Line2D([], [], color=BLACK, ls="--", label="training"),
        Line2D([], [], color="0.5", label="o.o.d. test, in the method's colour"),
        Line2D([], [], color="0.3", lw=1, ls=":", label="chance"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle("Mean over seeds; shaded from the lowest to the highest seed")
    return figure


def draw_consistency(rows: Sequence[Row]) -> Figure:
    """Inconsistency of trained networks against the distance searched.

    Args:
      rows: `method`, `seed`, `variation`, `distance` and `score`.
    """
    use_style()
    titles = {
        "weights": "Anything added to any weight",
        "scales": "Weights multiplied by factors",
    }
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, len(titles), sharex=True, sharey=True)
    distances = sorted({row["distance"] for row in rows})
    for axes, (variation, title) in zip(panels, titles.items(), strict=True):
        for method in _methods(rows):
            curves: dict[float, dict[float, float]] = {}
            for row in rows:
                if row["method"] == method and row["variation"] == variation:
                    seed = curves.setdefault(row["seed"], {})
                    seed[row["distance"]] = row["score"]
            color = METHOD_COLORS[method]
            values = np.array([[c[d] for d in distances] for c in curves.values()])
            axes.plot(distances, values.T, color=color, alpha=0.35, lw=1.2)
            axes.plot(
                distances,
                np.median(values, axis=0),
                color=color,
                marker="o",
                label=METHOD_LABELS[method],
            )
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xlabel("Distance searched, relative")
        axes.set_xticks(distances, [f"{distance:g}" for distance in distances])
        axes.minorticks_off()
    panels[0].set_ylabel("Inconsistency found (loss, nats)")
    panels[0].legend()
    return figure


def draw_envs(rows: Sequence[Row]) -> Figure:
    """O.o.d. test accuracy against the number of environments (figure 15).

    Of a seed's runs with several thresholds, the one with the best accuracy on
    held-out environments counts.

    Args:
      rows: `method`, `num_envs`, `threshold`, `seed`, `held_out_accuracy` and
        `test_accuracy` after training.
    """
    use_style()
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for method in _methods(rows):
        best: dict[tuple[float, float], Row] = {}
        for row in rows:
            key = row["num_envs"], row["seed"]
            if row["method"] == method and (
                key not in best
                or row["held_out_accuracy"] > best[key]["held_out_accuracy"]
            ):
                best[key] = row
        color = METHOD_COLORS[method]
        sizes = sorted({num_envs for num_envs, _ in best})
        chosen = [
            max(
                (row for (n, _), row in best.items() if n == num_envs),
                key=lambda row: row["held_out_accuracy"],
            )
            for num_envs in sizes
        ]
        axes.scatter(
            [num_envs for num_envs, _ in best],
            [row["test_accuracy"] for row in best.values()],
            s=28,
            color=color,
            alpha=0.4,
            lw=0,
        )
        axes.plot(
            sizes,
            [row["test_accuracy"] for row in chosen],
            color=color,
            marker="o",
            label=METHOD_LABELS[method],
        )
    axes.axhline(0.5, color="0.3", lw=1, ls="--")
    ticks = sorted({row["num_envs"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(
        ylim=(0.4, 1.03),
        xlabel="Training environments (equally many steps and examples per step)",
        ylabel="O.o.d. test accuracy",
    )
    if len({row["seed"] for row in rows}) > 1:
        axes.set_title("Dots: every seed; lines: the best one on held-out environments")
    figure.legend(loc="outside lower center", ncols=2)
    percent_axis(axes)
    return figure


def _methods(rows: Sequence[Row]) -> list[str]:
    """The methods, in the order in which they come."""
    return list(dict.fromkeys(row["method"] for row in rows))


def _draw_accuracy(axes: Axes, results: Mapping[Method, Trained]) -> None:
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


def _draw_kept(axes: Axes, results: Mapping[Method, Trained]) -> None:
    for method, trained in results.items():
        kept = _column(trained, "kept_fraction")
        kept = np.where(kept > 0, kept, np.nan)  # nothing to show on a log axis
        axes.plot(_column(trained, "epoch"), kept, color=METHOD_COLORS[method], lw=1.6)
    axes.set(yscale="log", ylim=(None, 2), xlabel="Epoch", ylabel="Gradient kept")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _draw_regions(
    axes: Axes, config: Settings, dataset: Dataset, method: Method, trained: Trained
) -> None:
    apply = apply_for(TrainConfig(**shared_settings(config), method=method))
    axes.contourf(
        grid_ticks(),
        grid_ticks(),
        _regions(trained, apply, config.shortcut_dims, config.shortcut_std),
        levels=np.linspace(0, 1, 16),
        cmap=REGION_COLORS,
        antialiased=False,  # or the borders between levels would shine through
    )
    features, labels = jax.tree.map(lambda leaf: leaf[:SHOWN_EXAMPLES], dataset.test)
    logits = _logits(apply, trained.variables, features)
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


# A comparison shows what the figure of each of its runs has shown.
@functools.lru_cache(maxsize=16)
def _regions(
    trained: Trained, apply: Apply, shortcut_dims: int, shortcut_std: float
) -> np.ndarray:
    shape = (SHORTCUTS, shortcut_dims)
    shortcuts = shortcut_std * jax.random.normal(jax.random.key(0), shape)
    return region_probability(apply, trained.variables, shortcuts)


def grid_ticks(grid: int = GRID) -> np.ndarray:
    """The coordinates [grid] at which the regions are sampled, on both axes."""
    return np.linspace(-EXTENT, EXTENT, grid, dtype=np.float32)


def region_probability(
    apply: Apply, variables: Variables, shortcuts: jax.Array, grid: int = GRID
) -> np.ndarray:
    """Probability of class 1, averaged over shortcut vectors.

    Args:
      apply: the model's forward function.
      variables: the network.
      shortcuts: the vectors [count, shortcut_dims] to average over.
      grid: points per side of the square that the spirals lie in.

    Returns:
      float32 [grid, grid], rows from the lowest second coordinate up.
    """
    return np.asarray(_region_probability(apply, grid, variables, shortcuts))


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply: Apply, variables: Variables, features: jax.Array) -> jax.Array:
    return apply(variables, features)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _region_probability(
    apply: Apply, grid: int, variables: Variables, shortcuts: jax.Array
) -> jax.Array:
    y, x = jnp.meshgrid(grid_ticks(grid), grid_ticks(grid), indexing="ij")
    points = jnp.stack([x, y], axis=-1).reshape(-1, MECHANISM_DIMS)

    def probability(shortcut: jax.Array) -> jax.Array:
        repeated = jnp.broadcast_to(shortcut, (len(points), len(shortcut)))
        features = jnp.concatenate([points, repeated], axis=-1)
        return jax.nn.sigmoid(apply(variables, features))

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
