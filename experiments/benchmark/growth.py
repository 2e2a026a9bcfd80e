"""The subcommand `growth`: a step of the MLP with more environments, and wider."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.benchmark import contestants as ways
from experiments.benchmark.steps import measure
from experiments.benchmark.workloads import Workload, image_mlp
from experiments.common import plots
from experiments.common.cli import Invocation, Preset, RunOptions, entered
from experiments.common.run_dir import RunDir
from experiments.common.validation import require, require_at_least

ENVS = "growth_envs.csv"
WIDTHS = "growth_widths.csv"
FIGURE = "growth.png"


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
    """Sizes of the MLP, and how often to measure."""

    envs: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of environments, one example each, at base_width."""
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    """Widths of both hidden layers, at base_envs."""
    base_envs: int = 80
    """Environments while the width grows."""
    base_width: int = 512
    """Width while the environments grow."""
    rounds: int = 5
    """Timed rounds, in which the contestants take turns."""
    round_seconds: float = 0.3
    """Each contestant takes as many steps in a round as fit, at least one."""

    def __post_init__(self) -> None:
        require_sizes(self, "envs", "widths")
        require_at_least(self, 1, "base_envs", "base_width", "rounds")
        seconds = self.round_seconds
        require("round_seconds", seconds, 0 <= seconds < 3600, "in [0, 3600)")


def require_sizes(config: Any, *fields: str) -> None:
    """Refuses fields that are no list of ascending sizes.

    Raises:
      ValueError: one is none.
    """
    for field in fields:
        values = getattr(config, field)
        ascending = len(values) > 0 and list(values) == sorted(set(values))
        require(field, values, ascending, "one or more in ascending order")
        require(field, values, values[0] >= 1, "at least 1 each")


PRESETS: dict[Preset, GrowthConfig] = {
    "smoke": GrowthConfig((2, 4), (8, 16), 4, 8, rounds=2, round_seconds=0.0),
    "cpu": GrowthConfig(),
    "paper": GrowthConfig(),
}


def run_growth(invocation: Invocation[GrowthConfig, RunOptions]) -> None:
    """Times an MLP's training step while environments or its width grow.

    The contestants and what is measured are those of `steps`, in JAX alone. Stacked
    gradients are left out where they would take two gigabytes or more.
    """
    config, options = invocation.config, invocation.options
    with entered(
        invocation,
        invocation.run_path("benchmark", f"growth-{options.preset}"),
        "benchmark growth",
        outputs=(ENVS, WIDTHS, FIGURE),
    ) as run:
        if not run.finished:
            with ways.no_compilation_cache():
                _run(run, config)
        summary = run.summary()
        print(format_table(summary["envs"], "environments"))
        print()
        print(format_table(summary["widths"], "width"))


def _run(run: RunDir, config: GrowthConfig) -> None:
    envs = [
        row
        for num_envs in tqdm(config.envs, desc="environments")
        for row in _measure(image_mlp(num_envs, config.base_width), num_envs, config)
    ]
    widths = [
        row
        for width in tqdm(config.widths, desc="width")
        for row in _measure(image_mlp(config.base_envs, width), width, config)
    ]
    run.write_metrics(envs, ENVS)
    run.write_metrics(widths, WIDTHS)
    run.save_figure(FIGURE, draw(envs, widths, config))
    run.finish({"envs": envs, "widths": widths, "threads": ways.num_threads()})


def _measure(
    workload: Workload, size: int, config: GrowthConfig
) -> list[dict[str, Any]]:
    """A row for every contestant."""
    compiled = {
        name: ways.compile_step(name, workload)
        for name in ways.jax_contestants(workload)
    }
    return measure_size(compiled, workload, size, config)


def measure_size(
    compiled: Mapping[Any, ways.CompiledStep],
    workload: Workload,
    size: int,
    config: GrowthConfig,
) -> list[dict[str, Any]]:
    """A row for every contestant at one size."""
    steps: dict[str, ways.Contestant] = {
        name: step.run for name, step in compiled.items()
    }
    _, _, rounds = measure(steps, config.rounds, config.round_seconds, str(size))
    return [
        {
            "size": size,
            "contestant": name,
            "seconds_per_step": statistics.median(row[name] for row in rounds),
            "temp_bytes": step.temp_bytes,
            "param_bytes": workload.param_bytes,
        }
        for name, step in compiled.items()
    ]


def format_table(
    rows: list[dict[str, Any]],
    what: str,
    contestants: Mapping[str, str] = ways.LABELS,
) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {what} | step | ms | temporary MB |", "|---|---|---|---|"]
    for row in rows:
        time, megabytes = row["seconds_per_step"], row["temp_bytes"] / 1e6
        label = contestants[row["contestant"]]
        lines.append(
            f"| {row['size']} | {label} | {ways.milliseconds(time)} | {megabytes:.1f} |"
        )
    return "\n".join(lines)


def draw(
    envs: list[dict[str, Any]],
    widths: list[dict[str, Any]],
    config: GrowthConfig,
    contestants: Mapping[str, str] = ways.LABELS,
    colors: Mapping[str, str] = ways.COLORS,
) -> Figure:
    """Time and temporary memory over environments and over width, on log axes."""
    plots.use_style()
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    columns = (
        (envs, f"environments, one example each (width {config.base_width})"),
        (widths, f"width of the hidden layers ({config.base_envs} environments)"),
    )
    quantities = (
        ("seconds_per_step", 1e3, "milliseconds per step"),
        ("temp_bytes", 1e-6, "temporary memory, MB"),
    )
    measured = {row["contestant"] for row in envs}
    names = [name for name in contestants if name in measured]
    for column, (rows, x_label) in enumerate(columns):
        sizes = sorted({row["size"] for row in rows})
        for line, (quantity, factor, y_label) in enumerate(quantities):
            axes = panels[line, column]
            for index, name in enumerate(names):
                own = [row for row in rows if row["contestant"] == name]
                axes.plot(
                    [row["size"] for row in own],
                    [row[quantity] * factor for row in own],
                    "o-",
                    # Ever thinner, so that lines that coincide can all be seen.
                    linewidth=5 - index,
                    markersize=11 - 2 * index,
                    color=colors[name],
                    label=contestants[name],
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sizes, map(str, sizes))
            if line == 1:
                axes.set_xlabel(x_label)
            if column == 0:
                axes.set_ylabel(y_label)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure
