"""Draws the tutorial's figures from what its code has computed: `make figures`."""

import pathlib
import re

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from experiments.common import plots

DOCS = pathlib.Path(__file__).parent
COLORS = {
    "averaging": plots.METHOD_COLORS["erm"],
    "mask": plots.SKY_BLUE,
    "mask, decay": plots.METHOD_COLORS["and_mask"],
}


def run_page(path):
    """Runs the Python blocks of a page; returns its variables."""
    namespace = {}
    code = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    exec(compile("\n".join(code), str(path), "exec"), namespace)
    return namespace


def draw_surfaces(page):
    u, v = jnp.meshgrid(jnp.linspace(-0.5, 1.8, 150), jnp.linspace(-1.8, 1.8, 150))
    points = jnp.stack([u.ravel(), v.ravel()], axis=1)
    losses = jax.vmap(
        lambda point: jax.vmap(page["loss_fn"], (None, 0))(point, page["envs"])
    )(points).reshape(*u.shape, 2)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    surfaces = {
        "Environment A": losses[..., 0],
        "Environment B": losses[..., 1],
        "Mean": losses.mean(axis=-1),
    }
    for axes, (title, surface) in zip(panels, surfaces.items(), strict=True):
        levels = [0.05, 0.2, 0.5, 1, 2, 4, 8, 16]
        axes.contour(u, v, surface, levels=levels, colors="0.75", linewidths=1)
        axes.contourf(u, v, surface, levels=[0, 0.05], colors=["0.85"])
        for name, key, style in (
            ("averaging", "averaged", "-"),
            ("mask, decay", "masked", "--"),
        ):
            path, color = page[f"{key}_path"], COLORS[name]
            label = {"averaging": "averaging", "mask, decay": "AND-mask"}[name]
            axes.plot(*path.T, style, color=color, label=label)
            axes.plot(*path[-1], "o", color=color)
        axes.set(title=title, xlabel="u")
        axes.grid(False)
    panels[0].set_ylabel("v")
    panels[2].legend(loc="lower left")
    return figure


def draw_training(page):
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, (_, log) in page["results"].items():
        step, _, kept, train, test = zip(*log, strict=True)
        top.plot(step, test, color=COLORS[name], label=name)
        top.plot(step, train, "--", color=COLORS[name], linewidth=1.2)
        bottom.plot(step, kept, color=COLORS[name])
    top.set(ylabel="accuracy", ylim=(0.45, 1.02))
    top.legend(loc="center right")
    bottom.set(xlabel="step", ylabel="kept", ylim=(0, 1.5))
    bottom.set_yscale("symlog", linthresh=1e-3)
    plots.percent_axis(top)
    bottom.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    return figure


def main():
    plots.use_style()
    page = run_page(DOCS / "tutorial.md")
    for name, draw in (("surfaces", draw_surfaces), ("training", draw_training)):
        draw(page).savefig(DOCS / "img" / f"tutorial_{name}.png", dpi=100)


if __name__ == "__main__":
    main()
