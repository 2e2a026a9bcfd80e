"""The subcommand `profile`: the parts of an epoch, beside what they should cost."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.benchmark import contestants as ways
from experiments.common.checkpoints import Checkpoints
from experiments.common.cli import Invocation, Preset, RunOptions, entered
from experiments.common.run_dir import RunDir, nine_digits
from experiments.common.validation import require_at_least
from experiments.synthetic.config import (
    PRESETS,
    Settings,
    TrainConfig,
    shared_settings,
)
from experiments.synthetic.data import MECHANISM_DIMS, Dataset
from experiments.synthetic.training import (
    EVALUATED,
    METRICS,
    Keys,
    State,
    dataset_for,
    make_env_losses,
    make_keys,
    make_parts,
    make_trainer,
)

PROFILE = "profile.csv"

Trained = Literal["erm", "and_mask"]
TRAINED: tuple[Trained, ...] = get_args(Trained)
LABELS: dict[Trained, str] = {"erm": "averaging", "and_mask": "AND-mask"}

# Each part of an epoch, and what it should cost.
DUES = {
    "order of the examples": "NumPy's sort of as many numbers",
    "batches": "bytes, read and written once",
    "forward": "its products",
    "backward": "its products",
    "signs and mask": "bytes: every gradient read once, two sums updated",
    "decay, Adam, parameters": "bytes of parameters and moments, once",
    "evaluation": "its products",
    "call of the compiled epoch": "nothing",
    "metrics to the host": "nothing",
    "checkpoints": "bytes of the state, written and synced",
}
FLOAT = 4  # bytes
# Products, and passes, in a row, whose rates are taken.
REPEATS = 32

Timed = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class ProfileConfig(Settings):
    """The training whose epochs are taken apart, and how often to measure."""

    rounds: int = 15
    """Rounds, in each of which every part is timed once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "rounds")

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return 0

    def training(self, method: Trained) -> TrainConfig:
        """The config of a method's training."""
        return TrainConfig(**shared_settings(self), method=method, seed=self.seed)


PROFILES: dict[Preset, ProfileConfig] = {
    "smoke": ProfileConfig(**PRESETS["smoke"], rounds=2),
    "cpu": ProfileConfig(),
    "paper": ProfileConfig(**PRESETS["paper"]),
}


def run_profile(invocation: Invocation[ProfileConfig, RunOptions]) -> None:
    """Times the parts of an epoch of the synthetic training, and what they should take.

    Averaging and the AND-mask. A part is a compiled function of its own, or what one
    function takes beyond another; in the whole epoch, which is timed too, XLA may run
    parts side by side. What a part should cost follows from operations and bytes, at
    the rates that XLA has here for products of a batch with a hidden layer's kernel and
    for passes over such a kernel. Medians of rounds.
    """
    with entered(
        invocation,
        invocation.run_path("benchmark", f"profile-{invocation.options.preset}"),
        "benchmark profile",
        outputs=(PROFILE,),
    ) as run:
        if not run.finished:
            with ways.no_compilation_cache():
                _run(run, invocation.config)
        print(format_table(run.summary()))


def _run(run: RunDir, config: ProfileConfig) -> None:
    compile_seconds = {
        method: _compile_seconds(config.training(method)) for method in TRAINED
    }
    with (
        tempfile.TemporaryDirectory(dir=run.path) as folder,
        contextlib.closing(Checkpoints(Path(folder) / "checkpoint")) as checkpoints,
    ):
        seconds = _measure(config, checkpoints, Path(folder))
    dues = due_seconds(config, seconds)
    rows = [
        {
            "method": method,
            "part": part,
            "milliseconds": taken * 1e3,
            "due_milliseconds": dues[part] * 1e3,
        }
        for method in TRAINED
        for part, taken in parts_of(method, seconds, config.checkpoint_every).items()
    ]
    run.write_metrics(rows, PROFILE)
    run.finish(
        {
            "rows": rows,
            "epoch_milliseconds": {m: seconds[f"epoch, {m}"] * 1e3 for m in TRAINED},
            "compile_seconds": compile_seconds,
            "gflop_per_second": _product_flops(config) / seconds["products"] / 1e9,
            "gigabytes_per_second": _pass_bytes(config) / seconds["passes"] / 1e9,
            "rounds": config.rounds,
            "threads": ways.num_threads(),
        }
    )


def _compile_seconds(config: TrainConfig) -> float:
    """To trace, lower and compile an epoch."""
    trainer, keys = make_trainer(config), make_keys(config.seed)
    state, dataset = trainer.init(keys), dataset_for(config, config.seed)
    return ways.compile_made(trainer.epoch, (state, dataset, keys, 0)).compile_seconds


def _measure(
    config: ProfileConfig, checkpoints: Checkpoints, folder: Path
) -> dict[str, float]:
    """Median seconds of all that is timed, by name."""
    keys = make_keys(config.seed)
    dataset = dataset_for(config, config.seed)
    timed: dict[str, Timed] = {}
    states = {}
    for method in TRAINED:
        training = config.training(method)
        states[method] = make_trainer(training).init(keys)
        timed |= _epoch_functions(training, states[method], dataset, keys)
    timed |= _rates(config)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for function in timed.values():
        jax.block_until_ready(function())
    epochs = {m: _whole_epochs(config.training(m), dataset, keys) for m in TRAINED}
    saves = _saves(checkpoints, states["erm"], folder)
    for _ in tqdm(range(config.rounds), unit="round"):
        for name, function in timed.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            samples[name].append(time.perf_counter() - start)
        own = [epochs[method]() for method in TRAINED] + [saves()]
        for name, seconds in (item for found in own for item in found.items()):
            samples.setdefault(name, []).append(seconds)
    return {name: statistics.median(found) for name, found in samples.items()}


def _epoch_functions(
    config: TrainConfig, state: State, dataset: Dataset, keys: Keys
) -> dict[str, Timed]:
    """Compiled functions of more and more of an epoch."""
    parts = make_parts(config)
    weight = jnp.float32(1)
    order = jax.jit(parts.order)
    inputs = order(keys, 0)

    @jax.jit
    def steps(state: State, dataset: Dataset, inputs: Any) -> Any:
        return jax.lax.scan(
            lambda state, row: parts.step(state, dataset, keys, weight, row),
            state,
            inputs,
        )

    functions: dict[str, Timed] = {
        f"steps, {config.method}": lambda: steps(state, dataset, inputs)
    }
    if config.method == "and_mask":
        return functions
    env_losses = make_env_losses(config)

    @jax.jit
    def batches(dataset: Dataset, inputs: Any) -> Any:
        return jax.lax.map(lambda row: parts.batch(dataset, row)[:2], inputs)

    @jax.jit
    def forward(state: State, dataset: Dataset, inputs: Any) -> Any:
        params, batch_stats = state.variables

        def losses(row: Any) -> Any:
            found, _ = env_losses(
                params,
                parts.batch(dataset, row),
                batch_stats=batch_stats,
                penalty_weight=weight,
            )
            return found

        return jax.lax.map(losses, inputs)

    @jax.jit
    def gradients(state: State, dataset: Dataset, inputs: Any) -> Any:
        def add(total: Any, row: Any) -> tuple[Any, None]:
            grads, *_ = parts.gradients(state, parts.batch(dataset, row), weight)
            return jax.tree.map(jnp.add, total, grads), None

        zeros = jax.tree.map(jnp.zeros_like, state.variables.params)
        return jax.lax.scan(add, zeros, inputs)[0]

    evaluate = jax.jit(parts.evaluate)
    return functions | {
        "order": lambda: order(keys, 1),
        "batches": lambda: batches(dataset, inputs),
        "forward": lambda: forward(state, dataset, inputs),
        "gradients": lambda: gradients(state, dataset, inputs),
        "evaluation": lambda: evaluate(state.variables, dataset),
    }


def _whole_epochs(
    config: TrainConfig, dataset: Dataset, keys: Keys
) -> Callable[[], dict[str, float]]:
    """One more epoch as `run_epochs` has it: the call, its end, and its metrics."""
    trainer = make_trainer(config)
    state, index = trainer.init(keys), 0

    def epoch() -> dict[str, float]:
        nonlocal state, index
        start = time.perf_counter()
        state, metrics = trainer.epoch(state, dataset, keys, index)
        called = time.perf_counter()
        jax.block_until_ready((state, metrics))
        ended = time.perf_counter()
        values = jax.device_get(metrics)
        assert all(np.isfinite(nine_digits(values[name])) for name in METRICS)
        index += 1
        return {
            f"call, {config.method}": called - start,
            f"epoch, {config.method}": ended - start,
            f"metrics, {config.method}": time.perf_counter() - ended,
        }

    epoch()
    return epoch


def _saves(
    checkpoints: Checkpoints, state: State, folder: Path
) -> Callable[[], dict[str, float]]:
    """A checkpoint, and the writing of as many bytes."""
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))
    step = 0

    def save() -> dict[str, float]:
        nonlocal step
        step += 1
        start = time.perf_counter()
        checkpoints.save(step, state)
        saved = time.perf_counter()
        with (folder / "bytes").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return {"save": saved - start, "bytes": time.perf_counter() - saved}

    save()
    return save


def _rates(config: ProfileConfig) -> dict[str, Timed]:
    """Products and passes, whose rates give what others should take; and a sort."""
    draw = np.random.default_rng(0)
    examples, units = config.num_envs * config.batch_size, config.hidden_units
    batch = jnp.asarray(draw.normal(size=(examples, units)), jnp.float32)
    # Of the norm that lets products of products neither grow nor vanish.
    kernel = jnp.asarray(draw.normal(size=(units, units)) / np.sqrt(units), jnp.float32)
    shape = (config.num_envs, config.examples_per_env)
    numbers = draw.integers(2**63, size=shape)

    @jax.jit
    def products(batch: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, REPEATS, lambda _, x: x @ kernel, batch)

    @jax.jit
    def passes(kernel: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, REPEATS, lambda _, x: 0.99 * x + 0.01, kernel)

    return {
        "products": lambda: products(batch, kernel),
        "passes": lambda: passes(kernel),
        "sort": lambda: np.sort(numbers),
    }


def parts_of(
    method: Trained, seconds: Mapping[str, float], checkpoint_every: int
) -> dict[str, float]:
    """Seconds of every part of an epoch, from what was timed."""
    found = {
        "order of the examples": seconds["order"],
        "batches": seconds["batches"],
        "forward": seconds["forward"] - seconds["batches"],
        "backward": seconds["gradients"] - seconds["forward"],
        "decay, Adam, parameters": seconds["steps, erm"] - seconds["gradients"],
        "signs and mask": seconds["steps, and_mask"] - seconds["steps, erm"],
        "evaluation": seconds["evaluation"],
        "call of the compiled epoch": seconds[f"call, {method}"],
        "metrics to the host": seconds[f"metrics, {method}"],
        "checkpoints": seconds["save"] / checkpoint_every,
    }
    if method == "erm":
        del found["signs and mask"]
    return {part: found[part] for part in DUES if part in found}


def due_seconds(
    config: ProfileConfig, seconds: Mapping[str, float]
) -> dict[str, float]:
    """What every part should take.

    Args:
      config: the training.
      seconds: of the products, the passes, the sort and the written bytes.
    """
    rate = _product_flops(config) / seconds["products"]
    bandwidth = _pass_bytes(config) / seconds["passes"]
    inputs, units = MECHANISM_DIMS + config.shortcut_dims, config.hidden_units
    first = inputs * units
    kernels = first + (config.hidden_layers - 1) * units**2 + units
    params = kernels + config.hidden_layers * units + 1
    steps, envs = config.steps_per_epoch, config.num_envs
    examples = steps * envs * config.batch_size
    dataset = jax.eval_shape(lambda: dataset_for(config, config.seed))
    evaluated = envs * min(EVALUATED, config.examples_per_env) + sum(
        split.labels.size
        for split in (dataset.validation, dataset.held_out, dataset.test)
    )
    return {
        "order of the examples": seconds["sort"],
        "batches": 2 * examples * (inputs + 1) * FLOAT / bandwidth,
        "forward": 2 * kernels * examples / rate,
        # The gradient of every kernel, and of the inputs of all layers but the first.
        "backward": 2 * (2 * kernels - first) * examples / rate,
        "signs and mask": steps * envs * 5 * params * FLOAT / bandwidth,
        # Gradient, parameters and two moments are read, the last three written.
        "decay, Adam, parameters": steps * 7 * params * FLOAT / bandwidth,
        "evaluation": 2 * kernels * evaluated / rate,
        "call of the compiled epoch": 0.0,
        "metrics to the host": 0.0,
        "checkpoints": seconds["bytes"] / config.checkpoint_every,
    }


def _product_flops(config: ProfileConfig) -> float:
    examples, units = config.num_envs * config.batch_size, config.hidden_units
    return 2.0 * REPEATS * examples * units**2


def _pass_bytes(config: ProfileConfig) -> float:
    return 2.0 * REPEATS * config.hidden_units**2 * FLOAT


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table."""
    titles = " | ".join(f"{LABELS[method]}, ms" for method in TRAINED)
    lines = [
        f"| part | {titles} | should cost, ms | namely |",
        "|---|---|---|---|---|",
    ]
    measured = {(row["method"], row["part"]): row for row in summary["rows"]}
    for part, what in DUES.items():
        rows = [measured.get((method, part)) for method in TRAINED]
        cells = [f"{row['milliseconds']:.2f}" if row else "" for row in rows]
        due = measured["and_mask", part]["due_milliseconds"]
        lines.append(f"| {part} | {' | '.join(cells)} | {due:.2f} | {what} |")
    taken, dues = (
        [
            f"{sum(row[column] for row in summary['rows'] if row['method'] == m):.1f}"
            for m in TRAINED
        ]
        for column in ("milliseconds", "due_milliseconds")
    )
    total = f"{' | '.join(taken)} | {' and '.join(dues)}"
    lines.append(f"| sum | {total} | without and with the mask |")
    whole = [f"{summary['epoch_milliseconds'][method]:.1f}" for method in TRAINED]
    lines.append(f"| an epoch in one piece | {' | '.join(whole)} | | |")
    compiled = [f"{summary['compile_seconds'][m] * 1e3:.0f}" for m in TRAINED]
    lines.append(f"| compiling it, once | {' | '.join(compiled)} | | |")
    lines.append("")
    lines.append(
        f"Products at {summary['gflop_per_second']:.0f} GFLOP/s, passes at "
        f"{summary['gigabytes_per_second']:.0f} GB/s, {summary['threads']} threads."
    )
    return "\n".join(lines)
