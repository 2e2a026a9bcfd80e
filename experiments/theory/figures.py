"""The figures of the theory experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import hardvary
from experiments.common.plots import (
    BLACK,
    BLUE,
    GREEN,
    METHOD_COLORS,
    METHOD_LABELS,
    ORANGE,
    PINK,
    SKY_BLUE,
    VERMILION,
    use_style,
)
from experiments.theory import landscapes, noise, staircase
from experiments.theory.config import Method, RegressionConfig
from experiments.theory.quadratics import Scores, level_set
from experiments.theory.regression import NUM_ENVS, NUM_WEIGHTS, Trajectory

ENV_COLORS = {"A": BLUE, "B": ORANGE}
MATRIX_STYLES: dict[str, dict[str, Any]] = {
    "A": {"color": BLUE},
    "B": {"color": ORANGE},
    "arithmetic mean": {"color": BLACK, "ls": "--"},
    "geometric mean": {"color": GREEN},
}
# Light enough for paths to stand out.
SURFACE_COLORS = LinearSegmentedColormap.from_list("surface", ("white", "#6FA3CC"))
CLOSED = "#F6D9A8"  # where nothing passes the mask
MINIMUM_STYLES: dict[str, dict[str, Any]] = {
    "consistent": {"marker": "o", "color": GREEN},
    "patchwork": {"marker": "X", "color": PINK},
}

Row = Mapping[str, Any]


def draw_landscapes(
    envs: landscapes.Environments,
    paths: Mapping[Method, landscapes.Paths],
    threshold: float,
    resolution: int,
) -> Figure:
    """A, B, and two descents over the average of both (figure 1).

    Args:
      envs: leaves [2, 2, 2].
      paths: of `erm`, then `and_mask`.
      threshold: of the mask; nothing passes it where the last panel is shaded.
      resolution: points on each side of the grid behind the contours.
    """
    use_style()
    figure = Figure(figsize=(8.6, 7.3), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    x, y = (np.linspace(-end, end, resolution) for end in landscapes.EXTENT)
    points = jnp.stack(jnp.meshgrid(x, y), axis=-1)
    on_grid = jax.vmap(
        jax.vmap(jax.vmap(landscapes.loss, (None, 0)), (0, None)), (0, None)
    )
    losses = np.asarray(jax.jit(on_grid)(points, envs))
    levels = np.geomspace(0.02, 80, 8)
    surfaces = {
        "Environment A": losses[..., 0],
        "Environment B": losses[..., 1],
        "Averaging, on the average": losses.mean(axis=-1),
        "AND-mask, on the average": losses.mean(axis=-1),
    }
    for axes, (title, surface) in zip(panels.flat, surfaces.items(), strict=True):
        filled = axes.contourf(
            x,
            y,
            np.maximum(surface, 1e-6),
            levels=levels,
            norm=LogNorm(levels[0], levels[-1]),
            cmap=SURFACE_COLORS,
            extend="both",
        )
        if axes is panels[1, 1]:
            nothing = nothing_passes(points, envs, threshold)
            axes.contourf(x, y, nothing, levels=[0.5, 1.5], colors=[CLOSED])
        axes.contour(x, y, surface, levels=levels, colors="0.35", linewidths=0.5)
        axes.set_title(title)
        axes.set(aspect="equal")
        axes.grid(False)
    for axes, (method, descents) in zip(panels[1], paths.items(), strict=True):
        _draw_paths(axes, descents, METHOD_COLORS[method])
    for axes in panels.flat:
        for name, minimum in landscapes.MINIMA.items():
            axes.plot(
                *minimum, ls="", mec="white", ms=11, zorder=5, **MINIMUM_STYLES[name]
            )
    for axes in panels[1]:
        axes.set_xlabel("first parameter")
    for axes in panels[:, 0]:
        axes.set_ylabel("second parameter")
    ticks = levels
    bar = figure.colorbar(filled, ax=panels, shrink=0.6, label="Loss", ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
    handles: list[Line2D | Patch] = [
        Line2D([], [], ls="", mec="white", ms=11, label=f"{name} minimum", **style)
        for name, style in MINIMUM_STYLES.items()
    ]
    handles += [
        Line2D([], [], ls="", marker="o", mfc="white", mec="0.2", ms=6, label="start"),
        Line2D([], [], ls="", marker="o", color="0.2", ms=6, label="end"),
        Patch(color=CLOSED, label="nothing passes the mask"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def nothing_passes(
    points: jax.Array, envs: landscapes.Environments, threshold: float
) -> np.ndarray:
    """1.0 where the AND-mask is closed to all components, and 0.0 elsewhere.

    Args:
      points: params, [row, column, 2].
      envs: leaves [2, 2, 2].
      threshold: of the mask.
    """
    mask = hardvary.and_mask(threshold)
    gradients = hardvary.per_env_grad(landscapes.loss)

    def kept(params: jax.Array) -> jax.Array:
        return mask.update(gradients(params, envs), mask.init(params))[1].kept_fraction

    return np.asarray(jax.jit(jax.vmap(jax.vmap(kept)))(points) == 0, float)


def _draw_paths(axes: Axes, paths: landscapes.Paths, color: str) -> None:
    for path in np.asarray(paths.params):
        axes.plot(*path.T, color=color, lw=1.5)
        axes.plot(*path[0], "o", color="white", mec="0.2", ms=6)
        axes.plot(*path[-1], "o", color=color, mec="0.2", ms=6, zorder=6)


def draw_means(
    cases: Mapping[str, tuple[Mapping[str, jax.Array], Scores]], epsilon: float
) -> Figure:
    """Ellipses of two Hessians and their means, a panel for each case (figure 3).

    Args:
      cases: by name the matrices [2, 2], named as in `MATRIX_STYLES`, and the scores.
      epsilon: loss on the ellipses.
    """
    use_style()
    figure = Figure(figsize=(11, 5.8), layout="constrained")
    panels = figure.subplots(1, len(cases), sharex=True, sharey=True)
    for axes, (case, (matrices, scores)) in zip(panels, cases.items(), strict=True):
        for name, style in MATRIX_STYLES.items():
            determinant = float(jnp.linalg.det(matrices[name]))
            axes.plot(
                *level_set(np.asarray(matrices[name]), epsilon),
                label=f"{name}, det {determinant:.3g}",
                **style,
            )
        axes.set_title(f"{case}\n{describe(scores, epsilon)}")
        axes.set(aspect="equal", xlabel="first parameter")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    panels[0].set_ylabel("second parameter")
    return figure


def describe(scores: Scores, epsilon: float) -> str:
    """Inconsistency and bounds in units of epsilon, as text."""
    score, bound, paper = (value / epsilon for value in scores)
    return f"inconsistency {score:.4g} ε\nbound {bound:.4g} ε, paper's {paper:.4g} ε"


def draw_norms(rows: Sequence[Row]) -> Figure:
    """Squared norms and deviations from their expectations (figure 4).

    Args:
      rows: from `noise.norms_row`.
    """
    use_style()
    figure = Figure(figsize=(10, 8.4), layout="constrained")
    norms, errors = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    envs = np.array([row["num_envs"] for row in rows])
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    colors = {
        "average": METHOD_COLORS["erm"],
        "masked": METHOD_COLORS["and_mask"],
        "conditional": GREEN,
    }
    labels = {
        "average": "averaged: simulated",
        "masked": "masked: simulated (0 where there is no dot)",
        "conditional": "masked: simulated given that a component passes",
    }
    norms.plot(
        envs, column["average_exact"], color=colors["average"], label="averaged: n / d"
    )
    norms.plot(
        envs, column["masked_exact"], color=colors["masked"], label="masked: exact"
    )
    norms.plot(
        envs, column["bound"], color="0.3", ls="--", label="masked: bound in the proof"
    )
    styles = {"average": ("o", 5), "masked": ("o", 8), "conditional": (".", 6)}
    for name, (marker, size) in styles.items():
        positive = column[name] > 0  # a mean of 0 has no place on a log axis
        norms.plot(
            envs[positive],
            column[name][positive],
            marker,
            color=colors[name],
            ms=size,
            label=labels[name],
        )
        deviation = column[name] - column[noise.ESTIMATES[name]]
        deviation = deviation / column[f"{name}_std_error"]
        errors.plot(envs, deviation, marker, color=colors[name], ms=size)
    norms.set(yscale="log", ylabel="Squared norm of the gradient")
    norms.legend(loc="lower left")
    errors.axhspan(-3, 3, color="0.93", zorder=0)
    errors.axhline(0, color="0.4", lw=1)
    errors.set(
        ylim=(-4.5, 4.5),
        xlabel="Number of environments d",
        ylabel="(simulated \N{MINUS SIGN} exact)\n/ standard error",
    )
    return figure


def draw_staircase(rows: Sequence[Row]) -> Figure:
    """The sigmoids at theta* and beside it, and both losses along theta6 (figure 10).

    Args:
      rows: `theta6`, `loss_a` and `loss_b`.
    """
    use_style()
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    fits, losses = figure.subplots(1, 2)
    x = np.linspace(0, 1, 1001)
    fits.axvspan(0, 0.5, color=ENV_COLORS["A"], alpha=0.08, lw=0)
    fits.axvspan(0.5, 1, color=ENV_COLORS["B"], alpha=0.08, lw=0)
    fits.plot(x, staircase.target(jnp.asarray(x)), color="0.6", lw=4, label="target")
    for height, color, name in (
        (staircase.STAR[5], BLACK, "θ*"),
        (staircase.RUINED_HEIGHT, PINK, "θ*, but θ₆ = \N{MINUS SIGN}0.5"),
    ):
        fitted = staircase.model(staircase.with_height(height), jnp.asarray(x))
        fits.plot(x, fitted, color=color, ls="--", label=name)
    for env, place in (("A", 0.25), ("B", 0.75)):
        fits.text(place, 2.2, f"environment {env}", ha="center", color=ENV_COLORS[env])
    fits.set(xlim=(0, 1), ylim=(-0.1, 2.4), xlabel="x", ylabel="f(x)")
    fits.legend(loc="upper left", bbox_to_anchor=(0, 0.9))
    heights = [row["theta6"] for row in rows]
    for env in ENV_COLORS:
        values = [row[f"loss_{env.lower()}"] for row in rows]
        losses.plot(heights, values, color=ENV_COLORS[env], label=f"environment {env}")
    for height, color in ((staircase.STAR[5], BLACK), (staircase.RUINED_HEIGHT, PINK)):
        losses.axvline(height, color=color, ls="--", lw=1.2)
    losses.set(
        xlim=(heights[0], heights[-1]),
        yscale="log",
        xlabel="θ₆, the height of the second step",
        ylabel="Mean squared error",
    )
    losses.legend(loc="lower left", bbox_to_anchor=(0.28, 0.1))
    return figure


def draw_pairs(
    pairs: Sequence[tuple[int, float, jax.Array, Scores]], epsilon: float
) -> Figure:
    """Contours of pairs of quadratic landscapes, by ratio of curvatures (figure 11).

    Args:
      pairs: number of axes along which they differ, ratio, Hessians [2, 2, 2], scores.
      epsilon: see `Scores`.
    """
    use_style()
    lines = list(dict.fromkeys(axes for axes, *_ in pairs))
    columns = len(pairs) // len(lines)
    figure = Figure(figsize=(2.75 * columns + 0.6, 6.4), layout="constrained")
    panels = figure.subplots(
        len(lines), columns, sharex=True, sharey=True, squeeze=False
    )
    for panel, (count, ratio, pair, scores) in zip(panels.flat, pairs, strict=True):
        # Dashed on top, or equal landscapes would look like one.
        styles = zip(ENV_COLORS.values(), ("-", "--"), pair, strict=True)
        for color, style, hessian in styles:
            for level, width in ((0.25, 2.0), (1.0, 1.2)):
                outline = level_set(np.asarray(hessian), level)
                panel.plot(*outline, style, color=color, lw=width)
        where = "both axes" if count == 2 else "one axis"
        panel.set_title(
            f"ratio {ratio:g} on {where}\n{describe(scores, epsilon)}",
            fontsize=11,
            color=VERMILION if scores.paper_bound < scores.inconsistency else BLACK,
        )
        panel.set(aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
        panel.grid(False)
    for panel in panels[-1]:
        panel.set_xlabel("first parameter")
    for panel in panels[:, 0]:
        panel.set_ylabel("second parameter")
    handles = [
        Line2D([], [], color=color, ls=style, label=f"environment {env}")
        for (env, color), style in zip(ENV_COLORS.items(), ("-", "--"), strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


# Of lines that others are drawn on.
_PALE = {"and_mask": "#99C7E0"}


def draw_regression(
    config: RegressionConfig, runs: Mapping[Method, Trajectory]
) -> Figure:
    """Every weight over the steps, and the losses; a line for each seed.

    Args:
      config: settings of the runs.
      runs: by method.
    """
    use_style()
    figure = Figure(figsize=(10.2, 6.3), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    weights, losses = panels.flat[:NUM_WEIGHTS], panels.flat[NUM_WEIGHTS]
    tested = config.train_envs < NUM_ENVS
    for method, run in runs.items():
        # Methods that do the same stay visible as a thin line on a thick, pale one;
        # see-through lines would make a colour that the legend lacks.
        style: dict[str, Any] = {
            "color": _PALE.get(method, METHOD_COLORS[method]),
            "lw": {"erm": 1.2, "and_mask": 4.5, "geometric_mean": 0.8}[method],
        }
        for index, axes in enumerate(weights):
            axes.plot(run.weights[..., index].T, **style)
        losses.plot(run.train_loss.T, **style)
        if tested:
            losses.plot(run.test_loss.T, ls="--", **style)
    for index, axes in enumerate(weights[:NUM_ENVS]):
        seen = f"example {index + 1}" if index < config.train_envs else "not seen"
        axes.set_title(f"Weight {index + 1} ({seen})")
        axes.set_ylim(-0.4, 0.8)
        axes.axhline(1 / 3, color="0.4", lw=1, ls=":")
    weights[NUM_ENVS].set_title("Weight 5 (all examples)")
    weights[NUM_ENVS].axhline(10 / 3, color="0.4", lw=1, ls=":")
    losses.set_title("Loss (dashed: test)" if tested else "Loss")
    losses.set(yscale="log")
    for axes in panels[-1]:
        axes.set_xlabel("Step")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, config.steps)
    handles = [
        Line2D(
            [],
            [],
            color=_PALE.get(method, METHOD_COLORS[method]),
            lw=4.5 if method in _PALE else 1.5,
            label=METHOD_LABELS[method],
        )
        for method in runs
    ]
    handles.append(Line2D([], [], color="0.4", lw=1, ls=":", label="would fit alone"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def draw_descent(least: Mapping[float, np.ndarray], bound: np.ndarray) -> Figure:
    """Least squared norm of the masked gradient so far, beside proposition 1's bound.

    Args:
      least: [step] by threshold.
      bound: [step].
    """
    use_style()
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.add_subplot()
    steps = np.arange(1, len(bound) + 1)
    colors = [METHOD_COLORS["erm"], ORANGE, GREEN, SKY_BLUE, BLUE]
    for index, (threshold, values) in enumerate(least.items()):
        shown = values > 0
        color = colors[index % len(colors)]
        axes.plot(steps[shown], values[shown], color=color, label=f"τ = {threshold:g}")
        if not shown.all() and shown.any():
            # Nothing passes any more: a norm of 0 has no place on a log axis.
            end = int(np.argmin(shown))
            axes.plot(steps[end - 1], values[end - 1], "x", color=color, ms=9, mew=2)
    axes.plot(steps, bound, color="0.3", ls="--", label="bound")
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(1e-12, None),
        xlabel="Steps k",
        ylabel="Least squared norm of the\nmasked gradient within k steps",
    )
    axes.legend(loc="lower left")
    return figure
