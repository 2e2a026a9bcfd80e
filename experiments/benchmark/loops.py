"""The subcommand `loops`: environments a few at a time, and steps in a scan."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from tqdm import tqdm

import hardvary
from experiments.benchmark import contestants as ways
from experiments.benchmark.growth import require_sizes
from experiments.benchmark.steps import measure
from experiments.benchmark.workloads import (
    LABELS,
    WORKLOADS,
    Sizes,
    Workload,
    WorkloadName,
    build,
)
from experiments.common import plots
from experiments.common.cli import Invocation, Preset, RunOptions, entered
from experiments.common.run_dir import RunDir
from experiments.common.validation import require, require_at_least, require_choice

LOOPS = "loops.csv"
FIGURE = "loops.png"

Way = Literal["plain", "fused"]
WAYS: tuple[Way, ...] = get_args(Way)
# Steps of a scan, which all start from the same parameters.
SCANNED = 4
Step = Callable[..., tuple[Any, Any, jax.Array]]


@dataclasses.dataclass(frozen=True)
class LoopsConfig:
    """Which models, in how many parts, and how often to measure."""

    workloads: tuple[WorkloadName, ...] = (
        "cnn_80x1",
        "fastresnet_80x1",
        "transformer_16x4",
        "mlp_16x128",
    )
    """The models, named with environments x examples in each."""
    parts: tuple[int, ...] = (1, 2, 4, 8)
    """Microbatches that the environments of a step are divided into; numbers that do
    not divide those of a model are left out."""
    resnet_width: int = 16
    """Channels after FastResNet's first convolution; the paper's has 64."""
    shrink: int = 1
    """Divides environments, widths, image sides and sequence lengths; for tests."""
    rounds: int = 5
    """Timed rounds, in which the contestants take turns."""
    round_seconds: float = 0.3
    """Each contestant takes as many steps in a round as fit, at least one."""

    def __post_init__(self) -> None:
        for name in self.workloads:
            require_choice("workloads", name, WORKLOADS)
        distinct = len(set(self.workloads)) == len(self.workloads) > 0
        require("workloads", self.workloads, distinct, "one or more different ones")
        require_sizes(self, "parts")
        require_at_least(self, 1, "resnet_width", "shrink", "rounds")
        seconds = self.round_seconds
        require("round_seconds", seconds, 0 <= seconds < 3600, "in [0, 3600)")


PRESETS: dict[Preset, LoopsConfig] = {
    "smoke": LoopsConfig(("cnn_80x1",), (1, 5), shrink=16, rounds=2, round_seconds=0.0),
    "cpu": LoopsConfig(),
    "paper": LoopsConfig(resnet_width=64),
}


def run_loops(invocation: Invocation[LoopsConfig, RunOptions]) -> None:
    """Times steps whose environments are taken a few at a time, and steps in a scan.

    The plain step adds up the gradients of microbatches in a `jax.lax.scan`, the one
    with the AND-mask is given a `microbatch_size`. A scan takes four steps in one
    compiled function. The contestants take turns; medians are reported, with the peak
    of temporary memory. The losses of the first step are compared.
    """
    config, options = invocation.config, invocation.options
    with entered(
        invocation,
        invocation.run_path("benchmark", f"loops-{options.preset}"),
        "benchmark loops",
        outputs=(LOOPS, FIGURE),
    ) as run:
        if not run.finished:
            with ways.no_compilation_cache():
                _run(run, config)
        print(format_table(run.summary()["rows"]))


def _run(run: RunDir, config: LoopsConfig) -> None:
    rows: list[dict[str, Any]] = []
    for name in tqdm(config.workloads, desc="workloads"):
        workload = build(name, Sizes(config.shrink, config.resnet_width))
        rows += _measure(name, workload, config)
    run.write_metrics(rows, LOOPS)
    run.save_figure(FIGURE, draw(rows))
    run.finish({"rows": rows, "threads": ways.num_threads()})


def _measure(
    name: WorkloadName, workload: Workload, config: LoopsConfig
) -> list[dict[str, Any]]:
    """A row for every way to take a step."""
    compiled: dict[tuple[Way, int, bool], ways.CompiledStep] = {}
    for way in WAYS:
        for parts in config.parts:
            if workload.num_envs % parts == 0:
                compiled[way, parts, False] = ways.compile_made(
                    *make_step(way, workload, parts)
                )
        step, arguments = make_step(way, workload, 1)
        compiled[way, 1, True] = ways.compile_made(scanned(step), arguments)
    contestants: dict[str, ways.Contestant] = {
        str(key): one.run for key, one in compiled.items()
    }
    _, _, rounds = measure(contestants, config.rounds, config.round_seconds, name)

    def seconds(key: tuple[Way, int, bool]) -> float:
        _, _, in_scan = key
        median = statistics.median(row[str(key)] for row in rounds)
        return median / (SCANNED if in_scan else 1)

    return [
        {
            "workload": name,
            "contestant": way,
            "parts": parts,
            "in_scan": in_scan,
            "seconds_per_step": seconds((way, parts, in_scan)),
            "temp_bytes": step.temp_bytes,
            "param_bytes": workload.param_bytes,
        }
        for (way, parts, in_scan), step in compiled.items()
    ]


def make_step(way: Way, workload: Workload, parts: int) -> tuple[Step, tuple[Any, ...]]:
    """As `contestants.make_step`, with the environments in so many microbatches."""
    size = workload.num_envs // parts
    loss_fn, sgd = workload.loss_fn, optax.sgd(ways.LEARNING_RATE)
    tx: Any = sgd
    if way == "plain":
        gradient = accumulated(loss_fn, parts)
    else:
        tx = optax.chain(hardvary.and_mask(ways.THRESHOLD), sgd)
        gradient = hardvary.value_and_grad_stats(
            loss_fn, method="fused", microbatch_size=size
        )

    return ways.step_of(gradient, tx, workload)


def accumulated(
    loss_fn: Callable[[Any, Any], jax.Array], parts: int
) -> Callable[[Any, Any], tuple[jax.Array, Any]]:
    """Value and gradient of the mean loss, a part of the environments at a time."""

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(params, batch))

    def gradient(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        if parts == 1:
            return jax.value_and_grad(mean_loss)(params, batch)
        microbatches = jax.tree.map(
            lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch
        )

        def add(total: Any, microbatch: Any) -> tuple[Any, None]:
            one = jax.value_and_grad(mean_loss)(params, microbatch)
            return jax.tree.map(jnp.add, total, one), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, (jnp.zeros(()), zeros), microbatches)
        loss, grads = jax.tree.map(lambda leaf: leaf / parts, total)
        return loss, grads

    return gradient


def scanned(step: Step) -> Step:
    """Several steps with the same batch, one after the other in a `jax.lax.scan`."""

    def steps(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        def one(carry: Any, _: None) -> tuple[Any, jax.Array]:
            params, state, loss = step(*carry, batch)
            return (params, state), loss

        carry, losses = jax.lax.scan(one, (params, state), length=SCANNED)
        return *carry, losses[0]

    return steps


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| workload | environments at a time | plain, ms | fused, ms | plain = 1 "
        "| plain, temporary MB | fused, temporary MB |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {
        (row["workload"], row["parts"], row["in_scan"], row["contestant"]): row
        for row in rows
    }
    for name, parts, in_scan in dict.fromkeys(key[:3] for key in found):
        plain, fused = (found[name, parts, in_scan, way] for way in WAYS)
        times = [row["seconds_per_step"] for row in (plain, fused)]
        taken = "all" if parts == 1 else f"1/{parts}"
        cells = [
            name,
            f"all, {SCANNED} steps in a scan" if in_scan else taken,
            *map(ways.milliseconds, times),
            f"{times[1] / times[0]:.2f}",
            *(f"{row['temp_bytes'] / 1e6:.1f}" for row in (plain, fused)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Milliseconds per step over temporary memory, a panel for each workload."""
    plots.use_style()
    names = list(dict.fromkeys(row["workload"] for row in rows))
    columns = min(len(names), 2)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5.5 * columns, 0.7 + 3.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        _draw_workload(axes, name, [row for row in rows if row["workload"] == name])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def _draw_workload(axes: Axes, name: WorkloadName, rows: list[dict[str, Any]]) -> None:
    def place(row: dict[str, Any]) -> tuple[float, float]:
        return row["temp_bytes"] / 1e6, row["seconds_per_step"] * 1e3

    def total(way: Way) -> float:
        own = [row for row in rows if row["contestant"] == way and not row["in_scan"]]
        return sum(row["seconds_per_step"] for row in own)

    # Labels of the upper line lie above it.
    slower = max(WAYS, key=total)
    for way in WAYS:
        own = [row for row in rows if row["contestant"] == way]
        in_parts = [row for row in own if not row["in_scan"]]
        in_scan = [row for row in own if row["in_scan"]]
        color, label = ways.COLORS[way], ways.LABELS[way]
        axes.plot(
            *zip(*map(place, in_parts), strict=True), "o-", color=color, label=label
        )
        axes.plot(
            *zip(*map(place, in_scan), strict=True),
            "s",
            color=color,
            markerfacecolor="none",
            markersize=10,
            label=f"{label}, {SCANNED} steps in a scan",
        )
        for row in in_parts:
            axes.annotate(
                "all" if row["parts"] == 1 else f"1/{row['parts']}",
                place(row),
                textcoords="offset points",
                xytext=(0, 9 if way == slower else -18),
                ha="center",
                color=color,
            )
    times = [place(row)[1] for row in rows]
    axes.set_yscale("log")
    axes.set_ylim(min(times) / 1.6, max(times) * 1.6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(left=0)
    axes.margins(x=0.1)
    axes.set_title(LABELS[name].replace("\n", ", "))
    axes.set_xlabel("temporary memory, MB")
    axes.set_ylabel("milliseconds per step")
