"""The subcommand `gramian`: a step with inner products or norms, beside a plain one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

import hardvary
from experiments.benchmark import contestants as ways
from experiments.benchmark import growth
from experiments.benchmark.contestants import CompiledStep
from experiments.benchmark.peer import (
    LOSS_TOLERANCE,
    Ask,
    PeerOptions,
    peer_process,
    require_close,
)
from experiments.benchmark.steps import (
    compile_all,
    draw,
    measure,
    start_torch,
    steps_of,
    with_all_columns,
    write_workload,
)
from experiments.benchmark.workloads import (
    ALL_WORKLOADS,
    WORKLOADS,
    AnyWorkloadName,
    Sizes,
    Workload,
    build,
    image_mlp,
)
from experiments.common import plots
from experiments.common.cli import Invocation, Preset, entered
from experiments.common.run_dir import RunDir
from experiments.common.validation import require, require_at_least, require_choice

STEPS = "gramian.csv"
FIGURE = "gramian.png"
GROWTH = "gramian_growth.csv"
GROWTH_FIGURE = "gramian_growth.png"

JaxContestant = Literal[
    "plain", "upgrad", "stacked", "clip", "stacked_clip", "whitened"
]
CONTESTANTS: tuple[JaxContestant, ...] = get_args(JaxContestant)
STACKED: tuple[JaxContestant, ...] = ("stacked", "stacked_clip")
GROWING: tuple[JaxContestant, ...] = ("plain", "upgrad", "stacked")

LABELS: dict[str, str] = {
    "plain": "mean gradient",
    "upgrad": "hardvary, fused UPGrad",
    "stacked": "hardvary, stacked gradients, UPGrad",
    "clip": "hardvary, fused clipping",
    "stacked_clip": "hardvary, stacked gradients, clipping",
    "whitened": "hardvary, fused, whitened spectral AND-mask",
    "jax_privacy": "JAX Privacy, clipping",
    "torch_plain": "PyTorch, mean gradient",
    "torch_autogram": "PyTorch, TorchJD autogram, UPGrad",
    "torch_autojac": "PyTorch, TorchJD autojac, UPGrad",
    "torch_ghost": "PyTorch, Opacus ghost clipping",
}
COLORS: dict[str, str] = {
    "plain": plots.BLACK,
    "upgrad": plots.BLUE,
    "stacked": plots.SKY_BLUE,
    "clip": plots.GREEN,
    "stacked_clip": "#8CD3BC",
    "whitened": "#5E3C99",
    "jax_privacy": "#8C6D31",
    "torch_plain": "0.6",
    "torch_autogram": plots.VERMILION,
    "torch_autojac": plots.ORANGE,
    "torch_ghost": plots.PINK,
}
# Steps from one refresh of what whitens inputs to the next, the library's default.
REFRESH_EVERY = 20
TORCH_WAYS = ("plain", "autogram", "autojac", "ghost")

# The updates of each must be the same, whoever makes them.
ALIKE: tuple[tuple[str, ...], ...] = (
    ("plain", "torch_plain"),
    ("upgrad", "stacked", "torch_autogram", "torch_autojac"),
    ("clip", "stacked_clip", "jax_privacy", "torch_ghost"),
    ("whitened",),
)
# Measured steps leave the parameters where they are; the checked one has to move them.
CHECK_RATE = 0.2
UPDATE_TOLERANCE = 2e-3

# What is known beforehand, where a message from within would not say why.
REFUSED: dict[tuple[AnyWorkloadName, str], str] = {
    ("transformer_16x4", "torch_ghost"): "clips sequences, not environments of four",
}


@dataclasses.dataclass(frozen=True)
class GramianConfig:
    """Which models, how large, and how often to measure."""

    # XLA on CPU takes minutes for a step of the grouped one with stacked gradients.
    workloads: tuple[AnyWorkloadName, ...] = WORKLOADS
    """The models, named with environments x examples in each."""
    resnet_width: int = 16
    """Channels after FastResNet's first convolution; the paper's has 64."""
    shrink: int = 1
    """Divides environments, widths, image sides and sequence lengths; for tests."""
    growth: bool = False
    """Also the MLP of `growth` with more environments, and wider, without peers."""
    growth_envs: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    """Numbers of environments, one example each, at width 512."""
    growth_widths: tuple[int, ...] = (128, 256, 512, 1024)
    """Widths of both hidden layers, at 80 environments."""
    compile_rounds: int = 3
    """Compilations of each contestant, one after the other in every round."""
    rounds: int = 9
    """Timed rounds, in which the contestants take turns."""
    round_seconds: float = 0.5
    """Each contestant takes as many steps in a round as fit, at least one."""

    def __post_init__(self) -> None:
        for name in self.workloads:
            require_choice("workloads", name, ALL_WORKLOADS)
        distinct = len(set(self.workloads)) == len(self.workloads) > 0
        require("workloads", self.workloads, distinct, "one or more different ones")
        require_at_least(self, 1, "resnet_width", "shrink", "compile_rounds", "rounds")
        seconds = self.round_seconds
        require("round_seconds", seconds, 0 <= seconds < 3600, "in [0, 3600)")
        growth.require_sizes(self, "growth_envs", "growth_widths")

    @property
    def sizes(self) -> Sizes:
        """Sizes of the workloads."""
        return Sizes(self.shrink, self.resnet_width)


PRESETS: dict[Preset, GramianConfig] = {
    "smoke": GramianConfig(
        shrink=16,
        growth_envs=(2, 4),
        growth_widths=(8,),
        compile_rounds=1,
        rounds=2,
        round_seconds=0.0,
    ),
    "cpu": GramianConfig(),
    "paper": GramianConfig(resnet_width=64),
}


@dataclasses.dataclass(frozen=True)
class GramianOptions(PeerOptions):
    """Where to write, and the other interpreters."""

    privacy_python: Path | None = None
    """Interpreter with this project's packages and JAX Privacy; without it JAX Privacy
    is left out. `make bench` installs one and passes it."""


def run_gramian(invocation: Invocation[GramianConfig, GramianOptions]) -> None:
    """Times training steps that weight environments, by inner products or norms.

    A step is everything from a batch to updated parameters, with SGD: a plain one; one
    with UPGrad, which takes its weights from all inner products; one that clips every
    environment's gradient at the median of their norms; and one with the spectral
    AND-mask on whitened inputs. The former two are taken by the fused oracle and from
    stacked gradients; with --torch-python beside TorchJD and Opacus, with
    --privacy-python beside JAX Privacy. Losses and updates of the first step are
    compared.
    """
    config, options = invocation.config, invocation.options
    experiment, name = "benchmark gramian", f"gramian-{options.preset}"
    for python, peer, suffix in (
        (options.torch_python, "PyTorch", "torch"),
        (options.privacy_python, "JAX Privacy", "privacy"),
    ):
        if python is not None:
            experiment, name = f"{experiment} with {peer}", f"{name}-{suffix}"
    with entered(
        invocation,
        invocation.run_path("benchmark", name),
        experiment,
        outputs=(STEPS, FIGURE, GROWTH, GROWTH_FIGURE),
    ) as run:
        if not run.finished:
            with ways.no_compilation_cache():
                _run(run, config, options)
        summary = run.summary()
        print(format_table(summary))
        for what, rows in summary.get("growth", {}).items():
            print()
            print(growth.format_table(rows, what, LABELS))


def _run(run: RunDir, config: GramianConfig, options: GramianOptions) -> None:
    results: dict[AnyWorkloadName, Any] = {}
    rows: list[dict[str, Any]] = []
    versions: dict[str, Any] = {}
    for name in config.workloads:
        with contextlib.ExitStack() as stack:
            workload = build(name, config.sizes)
            max_norm = median_norm(workload)
            peers = start_peers(stack, name, workload, max_norm, config, options)
            versions |= peers.versions
            names, left_out = fitting(CONTESTANTS, workload)
            compiled, compile_seconds = compile_all(
                compilers(names, workload, max_norm), config.compile_rounds, name
            )
            checks = {way: check(step) for way, step in compiled.items()}
            contestants: dict[str, ways.Contestant] = {
                way: whole_cycles(step) if way == "whitened" else step.run
                for way, step in compiled.items()
            }
            for way, ask in peers.asks.items():
                answer = ask({"check": CHECK_RATE})
                if "refused" in answer:
                    left_out[way] = answer["refused"]
                else:
                    checks[way], contestants[way] = answer, steps_of(ask)
            require_same_updates(checks)
            losses, steps, seconds = measure(
                contestants, config.rounds, config.round_seconds, name
            )
        rows += [{"workload": name, **row} for row in seconds]
        temp = {way: step.temp_bytes for way, step in compiled.items()}
        results[name] = {
            "num_envs": workload.num_envs,
            "param_bytes": workload.param_bytes,
            "max_norm": max_norm,
            **summarize_times(seconds, losses),
            **summarize_memory(temp | peers.temp_bytes, workload),
            "compile_seconds": compile_seconds | peers.compile_seconds,
            "first_step_loss": losses,
            "checked": {
                way: {key: answer[key] for key in ("loss_after", "update_norm")}
                for way, answer in checks.items()
            },
            "steps_per_round": steps,
            "left_out": left_out | peers.left_out,
        }
    grown = grow(run, config) if config.growth else {}
    run.write_metrics(with_all_columns(rows, LABELS), STEPS)
    run.save_figure(FIGURE, draw(results, rows, LABELS, COLORS))
    run.finish(
        {
            "workloads": results,
            **grown,
            "check_rate": CHECK_RATE,
            "rounds": config.rounds,
            "threads": ways.num_threads(),
            **versions,
        }
    )


def whole_cycles(step: CompiledStep) -> ways.Contestant:
    """Steps in numbers of which each has its share of the refreshes."""

    def run(num_steps: int) -> Mapping[str, Any]:
        return step.run(-(-num_steps // REFRESH_EVERY) * REFRESH_EVERY)

    return run


def median_norm(workload: Workload) -> float:
    """The norm at which half of the environments are clipped."""

    @jax.jit
    def median(params: Any, batch: Any) -> jax.Array:
        grads = hardvary.env_grads(workload.loss_fn)(params, batch)
        return jnp.median(hardvary.norms(grads))

    return float(median(workload.params, workload.batch))


def make_step(
    contestant: JaxContestant, workload: Workload, max_norm: float
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A whole step and its first arguments; see `finish_step`."""
    loss_fn = workload.loss_fn
    gradients: Callable[..., Any]
    if contestant == "plain":

        def mean_loss(params: Any, batch: Any) -> jax.Array:
            return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(params, batch))

        gradients = jax.value_and_grad(mean_loss)
    elif contestant in STACKED:
        gradients = hardvary.value_and_per_env_grad(loss_fn)
    else:
        gradients = hardvary.value_and_env_grads(loss_fn)
    aggregators = {
        "plain": optax.identity,
        "upgrad": hardvary.upgrad,
        "stacked": hardvary.upgrad,
        "clip": functools.partial(hardvary.clip_env_norms, max_norm),
        "stacked_clip": functools.partial(hardvary.clip_env_norms, max_norm),
        "whitened": lambda: hardvary.whiten_inputs(
            hardvary.spectral_and_mask(),
            every=REFRESH_EVERY,
            # Attention has other kernels than [..., in, out].
            inputs_of=hardvary.explain(loss_fn, workload.params, workload.batch),
        ),
    }
    return finish_step(gradients, aggregators[contestant](), workload)


def finish_step(
    gradients: Callable[..., Any], aggregator: Any, workload: Workload
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A whole step and its first arguments.

    Args:
      gradients: of parameters and batch, to losses and what the aggregator takes.
      aggregator: an optax transformation.
      workload: where it starts.

    Returns:
      `step(params, state, batch) -> (params, state, loss)`, not yet jitted, and the
      arguments of the first call. The learning rate is a part of the state: `check`
      takes another one.
    """
    aggregator = optax.with_extra_args_support(aggregator)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        inner, rate = state
        loss, grads = gradients(params, batch)
        updates, inner = aggregator.update(grads, inner, params, env_losses=loss)
        params = optax.apply_updates(params, optax.tree.scale(-rate, updates))
        return params, (inner, rate), jnp.mean(loss)

    params = workload.params
    state = aggregator.init(params), jnp.float32(ways.LEARNING_RATE)
    return step, (params, state, workload.batch)


def check(compiled: CompiledStep) -> dict[str, float]:
    """What a step that moves the parameters does: losses around it, and its update."""
    params, (inner, _), batch = compiled.arguments
    rate = jnp.float32(CHECK_RATE)
    moved, state, loss = compiled.step(params, (inner, rate), batch)
    _, _, loss_after = compiled.step(moved, state, batch)
    # In one program: by itself, each operation on each leaf is compiled.
    length = jax.jit(lambda *trees: optax.tree.norm(optax.tree.sub(*trees)))
    return {
        "loss": float(loss),
        "loss_after": float(loss_after),
        "update_norm": float(length(moved, params)) / CHECK_RATE,
    }


def require_same_updates(checks: Mapping[str, Mapping[str, float]]) -> None:
    """Refuses contestants that should make the same update and do not.

    Raises:
      RunDirError: they do not train the same, so that the seconds say nothing.
    """
    for names in ALIKE:
        present = [name for name in names if name in checks]
        for key, what, tolerance in (
            ("loss_after", "losses after the first step", LOSS_TOLERANCE),
            ("update_norm", "norms of the first update", UPDATE_TOLERANCE),
        ):
            if present:
                values = {name: checks[name][key] for name in present}
                require_close(values, what, tolerance)


def fitting(
    names: Iterable[JaxContestant], workload: Workload
) -> tuple[list[JaxContestant], dict[str, str]]:
    """Those whose memory suffices, and why the others are left out."""
    reason = too_large(workload)
    left_out: dict[str, str] = {}
    if reason is not None:
        left_out = {name: reason for name in names if name in STACKED}
    return [name for name in names if name not in left_out], left_out


def too_large(workload: Workload) -> str | None:
    """Why nobody stacks the gradients of this one."""
    size = workload.num_envs * workload.param_bytes
    if size < ways.STACKED_LIMIT:
        return None
    return f"stacked gradients would take {size / 1e9:.1f} GB"


def compilers(
    names: Iterable[JaxContestant], workload: Workload, max_norm: float
) -> dict[str, Callable[[], CompiledStep]]:
    """What `compile_all` takes."""

    def compiler(name: JaxContestant) -> CompiledStep:
        return ways.compile_made(*make_step(name, workload, max_norm))

    return {name: functools.partial(compiler, name) for name in names}


@dataclasses.dataclass
class Peers:
    """Processes with other systems, and what they said of themselves."""

    asks: dict[str, Ask] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    temp_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)


def start_peers(
    stack: contextlib.ExitStack,
    name: AnyWorkloadName,
    workload: Workload,
    max_norm: float,
    config: GramianConfig,
    options: GramianOptions,
) -> Peers:
    """Starts those that have an interpreter and are not known to refuse."""
    peers = Peers()
    stacking = too_large(workload)
    if options.privacy_python is not None:
        if stacking is not None:
            peers.left_out["jax_privacy"] = stacking
        else:
            ask, answer = start_privacy(
                stack, options.privacy_python, name, max_norm, config
            )
            peers.asks["jax_privacy"] = ask
            peers.temp_bytes["jax_privacy"] = answer["temp_bytes"]
            peers.compile_seconds["jax_privacy"] = answer["compile_seconds"]
            peers.versions["jax_privacy"] = answer["jax_privacy"]
    if options.torch_python is not None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / "workload.npz"
        write_workload(name, workload, path, max_norm=max_norm)
        for way in TORCH_WAYS:
            contestant = f"torch_{way}"
            reason = REFUSED.get((name, contestant))
            if way == "autojac" and reason is None:
                reason = stacking
            if reason is not None:
                peers.left_out[contestant] = reason
                continue
            ask, versions = start_torch(
                stack, options.torch_python, "torch_gramian.py", path, way
            )
            peers.asks[contestant] = ask
            peers.versions |= versions
    return peers


def start_privacy(
    stack: contextlib.ExitStack,
    python: Path,
    name: AnyWorkloadName,
    max_norm: float,
    config: GramianConfig,
) -> tuple[Ask, dict[str, Any]]:
    """A process that has compiled JAX Privacy's step, and what it says of that."""
    command = [str(python), "-m", "experiments.benchmark.privacy_gramian"]
    flag = f"--privacy-python {python}"
    ask = stack.enter_context(peer_process(command, flag, "JAX Privacy"))
    request = {"load": name, "sizes": dataclasses.asdict(config.sizes)}
    return ask, ask({**request, "max_norm": max_norm, "rounds": config.compile_rounds})


def summarize_times(
    rows: list[dict[str, float]], names: Iterable[str]
) -> dict[str, Any]:
    """Medians, and as multiples of the framework's plain step and of the fused one."""
    medians = {name: statistics.median(row[name] for row in rows) for name in names}
    plain = {
        name: medians["torch_plain" if name.startswith("torch_") else "plain"]
        for name in medians
    }
    return {
        "median_seconds_per_step": medians,
        "time_over_plain": {name: medians[name] / plain[name] for name in medians},
        "time_over_upgrad": {
            name: medians[name] / medians["upgrad"] for name in medians
        },
    }


def summarize_memory(temp: dict[str, int], workload: Workload) -> dict[str, Any]:
    """Temporary memory, and in copies of the parameters above the plain step's."""
    return {
        "temp_bytes": temp,
        "temp_minus_plain_in_params": {
            name: (temp[name] - temp["plain"]) / workload.param_bytes for name in temp
        },
    }


def format_table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| workload | step | ms | time, plain = 1 | time, fused UPGrad = 1 "
        "| temporary MB | above plain, in parameters | compile s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload, result in summary["workloads"].items():
        for name, label in LABELS.items():
            if name in result["left_out"]:
                cells = [f"left out: {result['left_out'][name]}", *[""] * 5]
            elif name in result["median_seconds_per_step"]:
                cells = [
                    ways.milliseconds(result["median_seconds_per_step"][name]),
                    f"{result['time_over_plain'][name]:.2f}",
                    f"{result['time_over_upgrad'][name]:.2f}",
                    *_compiled_cells(result, name),
                ]
            else:
                continue
            lines.append(f"| {' | '.join([workload, label, *cells])} |")
    return "\n".join(lines)


def _compiled_cells(result: dict[str, Any], name: str) -> list[str]:
    if name not in result["temp_bytes"]:
        return [""] * 3
    return [
        f"{result['temp_bytes'][name] / 1e6:.1f}",
        f"{result['temp_minus_plain_in_params'][name]:.2f}",
        f"{result['compile_seconds'][name]:.2f}",
    ]


def grow(run: RunDir, config: GramianConfig) -> dict[str, Any]:
    """Measures the MLP of `growth`, and writes what came out.

    Returns:
      The part of the summary.
    """
    scaled = config.sizes.scaled
    sizes = growth.GrowthConfig(
        envs=config.growth_envs,
        widths=config.growth_widths,
        base_envs=scaled(80, 2),
        base_width=scaled(512),
        rounds=config.rounds,
        round_seconds=config.round_seconds,
    )
    inputs = scaled(784)
    envs = [
        row
        for size in sizes.envs
        for row in _grow_to(image_mlp(size, sizes.base_width, inputs), size, sizes)
    ]
    widths = [
        row
        for size in sizes.widths
        for row in _grow_to(image_mlp(sizes.base_envs, size, inputs), size, sizes)
    ]
    parts = {"environments": envs, "width": widths}
    rows = [{"grows": what, **row} for what in parts for row in parts[what]]
    run.write_metrics(rows, GROWTH)
    run.save_figure(GROWTH_FIGURE, growth.draw(envs, widths, sizes, LABELS, COLORS))
    return {"growth": parts}


def _grow_to(
    workload: Workload, size: int, sizes: growth.GrowthConfig
) -> list[dict[str, Any]]:
    names, _ = fitting(GROWING, workload)
    made = compilers(names, workload, max_norm=1.0)
    compiled = {name: compile_one() for name, compile_one in made.items()}
    return growth.measure_size(compiled, workload, size, sizes)
