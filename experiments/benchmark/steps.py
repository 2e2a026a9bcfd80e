"""The subcommand `steps`: one training step of several models, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

from experiments.benchmark import contestants as ways
from experiments.benchmark.contestants import CompiledStep, Contestant
from experiments.benchmark.peer import (
    Ask,
    PeerOptions,
    require_same_losses,
    torch_process,
)
from experiments.benchmark.workloads import (
    LABELS,
    WORKLOADS,
    AnyWorkloadName,
    Sizes,
    Workload,
    WorkloadName,
    build,
    image_mlp,
)
from experiments.common import plots
from experiments.common.cli import Invocation, Preset, entered
from experiments.common.run_dir import RunDir, RunDirError
from experiments.common.validation import require, require_at_least, require_choice

STEPS = "steps.csv"
FIGURE = "steps.png"

TORCH_WAYS = ("plain", "shared_forward", "functional", "backpack")
# BackPACK takes gradients of examples, not of environments, and knows few layers.
BACKPACK: tuple[WorkloadName, ...] = ("mlp_80x1", "cnn_80x1")


@dataclasses.dataclass(frozen=True)
class StepsConfig:
    """Which models, how large, and how often to measure."""

    workloads: tuple[WorkloadName, ...] = WORKLOADS
    """The models, named with environments x examples in each."""
    resnet_width: int = 16
    """Channels after FastResNet's first convolution; the paper's has 64."""
    shrink: int = 1
    """Divides environments, widths, image sides and sequence lengths; for tests."""
    deep_layers: int = 12
    """Layers of a transformer that is only compiled; 0 leaves it out."""
    compile_rounds: int = 3
    """Compilations of each contestant, one after the other in every round."""
    rounds: int = 9
    """Timed rounds, in which the contestants take turns."""
    round_seconds: float = 0.5
    """Each contestant takes as many steps in a round as fit, at least one."""

    def __post_init__(self) -> None:
        for name in self.workloads:
            require_choice("workloads", name, WORKLOADS)
        distinct = len(set(self.workloads)) == len(self.workloads) > 0
        require("workloads", self.workloads, distinct, "one or more different ones")
        require_at_least(self, 1, "resnet_width", "shrink", "compile_rounds", "rounds")
        require("deep_layers", self.deep_layers, self.deep_layers >= 0, "at least 0")
        seconds = self.round_seconds
        require("round_seconds", seconds, 0 <= seconds < 3600, "in [0, 3600)")

    @property
    def sizes(self) -> Sizes:
        """Sizes of the workloads."""
        return Sizes(self.shrink, self.resnet_width)


PRESETS: dict[Preset, StepsConfig] = {
    "smoke": StepsConfig(
        shrink=16, deep_layers=3, compile_rounds=1, rounds=2, round_seconds=0.0
    ),
    "cpu": StepsConfig(),
    "paper": StepsConfig(resnet_width=64),
}


def run_steps(invocation: Invocation[StepsConfig, PeerOptions]) -> None:
    """Times single training steps in JAX and, with --torch-python, in PyTorch.

    A step is everything from a batch to updated parameters: a plain one with the mean
    gradient, and one with the AND-mask for every way to get at the environments'
    gradients. The contestants take turns, each on all cores; medians are reported, with
    the peak of temporary memory and the time to compile. The losses of the first step
    are compared.
    """
    config, options = invocation.config, invocation.options
    experiment, name = "benchmark steps", f"steps-{options.preset}"
    if options.torch_python is not None:
        experiment, name = f"{experiment} with PyTorch", f"{name}-torch"
    with entered(
        invocation,
        invocation.run_path("benchmark", name),
        experiment,
        outputs=(STEPS, FIGURE),
    ) as run:
        if not run.finished:
            with ways.no_compilation_cache():
                _run(run, config, options.torch_python)
        print(format_table(run.summary()))


def _run(run: RunDir, config: StepsConfig, torch_python: Path | None) -> None:
    results: dict[WorkloadName, Any] = {}
    rows: list[dict[str, Any]] = []
    torch: dict[str, Any] = {}
    for name in config.workloads:
        workload = build(name, config.sizes)
        peers: dict[str, Contestant] = {}
        with contextlib.ExitStack() as stack:
            if torch_python is not None:
                # Before compiling: an interpreter that does not work shows at once.
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                write_workload(name, workload, folder / "workload.npz")
                for way in TORCH_WAYS:
                    if way != "backpack" or name in BACKPACK:
                        peers[f"torch_{way}"], torch = torch_contestant(
                            stack, torch_python, folder / "workload.npz", way
                        )
            compiled, compile_seconds = compile_all(
                _compilers(ways.jax_contestants(workload), workload),
                config.compile_rounds,
                name,
            )
            losses, steps, seconds = measure(
                {**{way: step.run for way, step in compiled.items()}, **peers},
                config.rounds,
                config.round_seconds,
                name,
            )
        rows += [{"workload": name, **row} for row in seconds]
        results[name] = summarize(
            workload, compiled, compile_seconds, losses, steps, seconds
        )
    deep: dict[str, Any] = {}
    if config.deep_layers:
        sizes = dataclasses.replace(config.sizes, layers=config.deep_layers)
        workload = build("transformer_16x4", sizes)
        _, compile_seconds = compile_all(
            _compilers(("plain", "fused"), workload),
            config.compile_rounds,
            "deep transformer",
        )
        deep["deep_transformer"] = {
            "layers": config.deep_layers,
            **_compile_summary(compile_seconds),
        }
    run.write_metrics(with_all_columns(rows), STEPS)
    run.save_figure(FIGURE, draw(results, rows))
    run.finish(
        {
            "workloads": results,
            **deep,
            "rounds": config.rounds,
            "threads": ways.num_threads(),
            **torch,
        }
    )


def _compilers(
    names: Iterable[ways.JaxContestant], workload: Workload
) -> dict[str, Callable[[], CompiledStep]]:
    return {
        name: functools.partial(ways.compile_step, name, workload) for name in names
    }


def compile_all(
    compilers: Mapping[str, Callable[[], CompiledStep]], rounds: int, label: str
) -> tuple[dict[str, CompiledStep], dict[str, float]]:
    """Compiles every contestant, alternating.

    Returns:
      The compiled steps, and the median of the seconds that each took.
    """
    _start_compiler()
    compiled: dict[str, CompiledStep] = {}
    seconds: dict[str, list[float]] = {name: [] for name in compilers}
    for _ in range(rounds):
        for name in tqdm(compilers, desc=f"{label}: compile", leave=False):
            compiled[name] = compilers[name]()
            seconds[name].append(compiled[name].compile_seconds)
    return compiled, {name: statistics.median(seconds[name]) for name in compilers}


@functools.cache
def _start_compiler() -> None:
    # What starts up at the first compilation of all is nobody's time.
    ways.compile_step("plain", image_mlp(2, 2))


def torch_contestant(
    stack: contextlib.ExitStack, python: Path, path: Path, way: str
) -> tuple[Contestant, dict[str, Any]]:
    """A step in PyTorch, in a process that lasts as long as `stack`.

    Returns:
      The contestant, and the PyTorch version.

    Raises:
      RunDirError: PyTorch cannot take as many threads as XLA.
    """
    ask, description = start_torch(stack, python, "torch_steps.py", path, way)
    return steps_of(ask), description


def start_torch(
    stack: contextlib.ExitStack, python: Path, script: str, path: Path, way: str
) -> tuple[Ask, dict[str, Any]]:
    """A process that has loaded a workload, and the PyTorch version; see above."""
    ask = stack.enter_context(torch_process(python, script))
    threads = ways.num_threads()
    description = ask({"load": str(path), "way": way, "threads": threads})
    if description.pop("threads") != threads:
        raise RunDirError(f"PyTorch does not take {threads} threads, as XLA does")
    return ask, description


def steps_of(ask: Ask) -> Contestant:
    """The contestant whose steps a process takes."""

    def run(num_steps: int) -> dict[str, float]:
        answer = ask({"steps": num_steps})
        return {**answer, "seconds": answer["seconds"] / num_steps}

    return run


def write_workload(
    name: AnyWorkloadName, workload: Workload, path: Path, **settings: float
) -> None:
    """Writes initial weights and data for PyTorch, in the layout of Flax."""
    arrays: dict[str, Any] = {
        "param:" + jax.tree_util.keystr(key, simple=True, separator="."): leaf
        for key, leaf in jax.tree.leaves_with_path(workload.params)
    }
    arrays |= {"x": workload.batch[0], "y": workload.batch[1]}
    arrays |= {"workload": name}
    arrays |= {"threshold": ways.THRESHOLD, "learning_rate": ways.LEARNING_RATE}
    arrays |= settings
    arrays = {key: np.asarray(leaf) for key, leaf in arrays.items()}
    np.savez(path, **arrays)


def measure(
    contestants: Mapping[str, Contestant], rounds: int, round_seconds: float, label: str
) -> tuple[dict[str, float], dict[str, int], list[dict[str, float]]]:
    """Alternates between contestants.

    Returns:
      The losses of the first steps, the number of steps per round, and a row for every
      round with the seconds per step of each contestant.

    Raises:
      RunDirError: the losses differ.
    """
    losses = {name: step(1)["loss"] for name, step in contestants.items()}
    require_same_losses(losses, "step")
    steps = {
        name: ways.fitting_steps(step, round_seconds)
        for name, step in contestants.items()
    }
    rows: list[dict[str, float]] = []
    for index in tqdm(range(rounds), desc=label, unit="round", leave=False):
        seconds = {
            name: step(steps[name])["seconds"] for name, step in contestants.items()
        }
        rows.append({"round": index + 1, **seconds})
    return losses, steps, rows


def summarize(
    workload: Workload,
    compiled: dict[str, CompiledStep],
    compile_seconds: dict[str, float],
    losses: dict[str, float],
    steps: dict[str, int],
    rows: list[dict[str, float]],
) -> dict[str, Any]:
    """One workload's part of the summary."""
    medians = {name: statistics.median(row[name] for row in rows) for name in losses}
    temp = {name: step.temp_bytes for name, step in compiled.items()}
    return {
        "num_envs": workload.num_envs,
        "param_bytes": workload.param_bytes,
        "median_seconds_per_step": medians,
        "time_over_plain": _ratios(medians, "plain"),
        "time_over_fused": _ratios(medians, "fused"),
        "temp_bytes": temp,
        "temp_minus_plain_in_params": {
            name: (temp[name] - temp["plain"]) / workload.param_bytes for name in temp
        },
        **_compile_summary(compile_seconds),
        "first_step_loss": losses,
        "steps_per_round": steps,
    }


def _compile_summary(seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "compile_seconds": seconds,
        "compile_over_plain": _ratios(seconds, "plain"),
    }


def _ratios(values: dict[str, float], reference: str) -> dict[str, float]:
    return {name: value / values[reference] for name, value in values.items()}


def with_all_columns(
    rows: list[dict[str, Any]], contestants: Iterable[str] = ways.LABELS
) -> list[dict[str, Any]]:
    """Rows with the columns of all; a cell is empty where a contestant was left out."""
    found = {column for row in rows for column in row}
    columns = [c for c in ("workload", "round", *contestants) if c in found]
    return [{column: row.get(column) for column in columns} for row in rows]


def format_table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| workload | step | ms | time, plain = 1 | time, fused = 1 "
        "| temporary MB | above plain, in parameters | compile s | plain = 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for workload, result in summary["workloads"].items():
        for name, seconds in result["median_seconds_per_step"].items():
            cells = [
                workload,
                ways.LABELS[name],
                ways.milliseconds(seconds),
                f"{result['time_over_plain'][name]:.2f}",
                f"{result['time_over_fused'][name]:.2f}",
            ]
            if name in result["temp_bytes"]:
                cells += [
                    f"{result['temp_bytes'][name] / 1e6:.1f}",
                    f"{result['temp_minus_plain_in_params'][name]:.2f}",
                    *_compile_cells(result, name),
                ]
            else:
                cells += [""] * 4
            lines.append(f"| {' | '.join(cells)} |")
    deep = summary.get("deep_transformer")
    if deep is not None:
        for name in deep["compile_seconds"]:
            cells = [f"transformer, {deep['layers']} layers", ways.LABELS[name]]
            cells += [*[""] * 5, *_compile_cells(deep, name)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _compile_cells(result: dict[str, Any], name: str) -> list[str]:
    return [
        f"{result['compile_seconds'][name]:.2f}",
        f"{result['compile_over_plain'][name]:.2f}",
    ]


def draw(
    results: Mapping[Any, Any],
    rows: list[dict[str, Any]],
    contestants: Mapping[str, str] = ways.LABELS,
    colors: Mapping[str, str] = ways.COLORS,
) -> Figure:
    """The medians, grouped by workload, with every measurement as a dot.

    Not as bars: on a log axis these have no foot, and their lengths say nothing.
    """
    plots.use_style()
    medians = {name: results[name]["median_seconds_per_step"] for name in results}
    lines = sum(map(len, medians.values())) + len(medians)
    figure = Figure(figsize=(10, 1.9 + 0.27 * lines), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    position, ticks = 0.0, []
    for workload, seconds in medians.items():
        ticks.append(position + (len(seconds) - 1) / 2)
        for name, median in seconds.items():
            measured = [r[name] * 1e3 for r in rows if r["workload"] == workload]
            axes.axhline(position, color="0.93", lw=1, zorder=0)
            axes.plot(median * 1e3, position, "o", color=colors[name], ms=11)
            axes.plot(measured, [position] * len(measured), "k.", ms=3, alpha=0.35)
            axes.annotate(
                ways.milliseconds(median),
                (max(*measured, median * 1e3), position),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
            )
            position += 1
        position += 1
    axes.set_yticks(ticks, [LABELS[name] for name in medians])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(position - 1.3, -0.7)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel("milliseconds per step (median; dots: every round)")
    drawn = [c for c in contestants if any(c in of_one for of_one in medians.values())]
    figure.legend(
        handles=[
            Line2D(
                [], [], color=colors[c], marker="o", ms=11, ls="", label=contestants[c]
            )
            for c in drawn
        ],
        loc="outside upper left",
        ncols=2,
        fontsize=11,
    )
    return figure
