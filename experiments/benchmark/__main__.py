"""`python -m experiments.benchmark`: epochs of the synthetic training, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from tqdm import tqdm

from experiments.common.cli import Command, Invocation, Preset, RunOptions, main
from experiments.common.run_dir import RunDir, RunDirError
from experiments.common.validation import require
from experiments.synthetic.config import PRESETS, TrainConfig
from experiments.synthetic.training import (
    dataset_for,
    epoch_order,
    make_keys,
    make_trainer,
)

PROG = "python -m experiments.benchmark"
EPOCHS = "epochs.csv"
FIGURE = "epochs.png"

LABELS = {
    "jax_scan": "hardvary, scan over environments",
    "jax_vmap": "hardvary, stacked gradients",
    "torch_functional": "PyTorch, torch.func vmap(grad)",
    "torch_own_forward": "PyTorch, forward and autograd.grad\nfor each environment",
    "torch_shared_forward": "PyTorch, one forward, autograd.grad\nfor each environment",
}
REFERENCE = "torch_shared_forward"

Oracle = Literal["scan", "vmap"]
ORACLES: tuple[Oracle, ...] = get_args(Oracle)

# A contestant trains for one epoch and says how long it took and what came out.
Epoch = Callable[[], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """How often to measure, and what."""

    training: TrainConfig
    """The training that everybody runs."""
    rounds: int = 9
    """Timed epochs of each contestant, one after the other in every round."""
    torch: bool = False
    """Whether the PyTorch peers take part; set by --torch-python."""

    def __post_init__(self) -> None:
        require("rounds", self.rounds, self.rounds >= 1, "at least 1")


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions(RunOptions):
    """Where to write, and the other interpreter."""

    torch_python: Path | None = None
    """Interpreter with PyTorch; without it the PyTorch peers are left out. `make bench`
    installs one and passes it."""


def jax_contestant(config: TrainConfig, oracle: Oracle) -> Epoch:
    """The training of experiments.synthetic with one of the gradient oracles."""
    size = 1 if oracle == "vmap" else config.microbatch_size
    config = dataclasses.replace(config, oracle=oracle, microbatch_size=size)
    trainer, keys = make_trainer(config), make_keys(config.seed)
    dataset = dataset_for(config, config.seed)
    state, index = trainer.init(keys), 0

    def epoch() -> dict[str, float]:
        nonlocal state, index
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(
            trainer.epoch(state, dataset, keys.batches, index)
        )
        seconds = time.perf_counter() - start
        index += 1
        return {"seconds": seconds, **jax.tree.map(float, jax.device_get(metrics))}

    return epoch


@contextlib.contextmanager
def torch_contestant(
    python: Path, training: Path, way: str
) -> Iterator[tuple[Epoch, dict[str, Any]]]:
    """A process that runs torch_peer.py with another interpreter, while it is needed.

    Yields:
      The contestant, and the PyTorch version and number of threads.
    """
    script = Path(__file__).with_name("torch_peer.py")
    try:
        process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        raise RunDirError(f"--torch-python {python}: {error.strerror}") from None

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise RunDirError(
                "the PyTorch process ended early: see its message above; "
                "`make bench` installs what it needs"
            ) from None
        return answer

    with process:
        try:
            description = ask({"load": str(training), "way": way})
            yield lambda: ask({"epoch": True}), description
        finally:
            process.kill()


def write_training(config: TrainConfig, path: Path) -> None:
    """Writes data, initial weights and the first epoch's batches for PyTorch."""
    keys, dataset = make_keys(config.seed), dataset_for(config, config.seed)
    params = make_trainer(config).init(keys).params
    layers = [params["layers"][index] for index in range(config.hidden_layers + 1)]
    weights = [layer[part][...] for layer in layers for part in ("kernel", "bias")]
    order = epoch_order(jax.random.fold_in(keys.batches, 0), config)
    settings = dataclasses.asdict(config)
    if not config.rescale:
        settings["max_rescale"] = 1.0
    elif config.max_rescale is None:
        settings["max_rescale"] = 1e30
    arrays: dict[str, Any] = {
        f"{name}_{part}": leaf
        for name, split in dataset._asdict().items()
        for part, leaf in zip(("x", "y"), split, strict=True)
    }
    arrays |= {f"param_{index}": leaf for index, leaf in enumerate(weights)}
    arrays |= {"rows": order, "num_params": len(weights)}
    arrays |= {"settings": json.dumps(settings)}
    arrays = {name: np.asarray(leaf) for name, leaf in arrays.items()}
    np.savez(path, **arrays)


def measure(
    contestants: dict[str, Epoch], rounds: int
) -> tuple[dict[str, dict[str, float]], list[dict[str, float]]]:
    """Alternates between contestants.

    Returns:
      What each reported of its first epoch, the one that includes compilation and in
      which all see the same batches; and a row for every round with the seconds of
      each contestant.
    """
    first = {name: epoch() for name, epoch in contestants.items()}
    rows = []
    for index in tqdm(range(rounds), unit="round"):
        seconds = {name: epoch()["seconds"] for name, epoch in contestants.items()}
        rows.append({"round": index + 1, **seconds})
    return first, rows


def run_benchmark(
    invocation: Invocation[BenchmarkConfig, BenchmarkOptions],
) -> None:
    """Times epochs of AND-mask training in JAX and, with --torch-python, in PyTorch.

    All train the same network on the same data from the same weights; the losses of
    the first epoch, in which they also see the same batches, are compared. The
    contestants take turns, each on all cores; medians are reported.
    """
    options = invocation.options
    config = dataclasses.replace(
        invocation.config, torch=options.torch_python is not None
    )
    out = options.out or Path("runs") / "benchmark" / options.preset
    with RunDir(
        out,
        "benchmark",
        config,
        seed=config.training.seed,
        command=invocation.command,
        overwrite=options.overwrite,
        outputs=(EPOCHS, FIGURE),
    ) as run:
        if not run.finished:
            _run(run, config, options.torch_python)
        print(format_table(run.summary()))
        print(f"Written to {run.path}")


def _run(run: RunDir, config: BenchmarkConfig, torch_python: Path | None) -> None:
    training = config.training
    contestants = {
        f"jax_{oracle}": jax_contestant(training, oracle) for oracle in ORACLES
    }
    torch: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if torch_python is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_training(training, folder / "training.npz")
            for way in ("functional", "own_forward", "shared_forward"):
                contestants[f"torch_{way}"], torch = stack.enter_context(
                    torch_contestant(torch_python, folder / "training.npz", way)
                )
        first, rows = measure(contestants, config.rounds)
    medians = {
        name: statistics.median(row[name] for row in rows) for name in contestants
    }
    run.write_metrics(rows, EPOCHS)
    run.save_figure(FIGURE, draw(medians, rows))
    run.finish(
        {
            "median_seconds_per_epoch": medians,
            "slower_than_scan": {
                name: medians[name] / medians["jax_scan"] for name in medians
            },
            "first_epoch_loss": {name: first[name]["loss"] for name in first},
            "first_epoch_kept_fraction": {
                name: first[name]["kept_fraction"] for name in first
            },
            "steps_per_epoch": training.steps_per_epoch,
            "rounds": config.rounds,
            **torch,
        }
    )


def format_table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| training | s per epoch | epochs per s | time, scan = 1 | first loss |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in summary["median_seconds_per_epoch"].items():
        label = LABELS[name].replace("\n", " ")
        ratio = summary["slower_than_scan"][name]
        loss = summary["first_epoch_loss"][name]
        lines.append(
            f"| {label} | {seconds:.3f} | {1 / seconds:.2f} | {ratio:.2f} "
            f"| {loss:.6f} |"
        )
    return "\n".join(lines)


def draw(medians: dict[str, float], rows: list[dict[str, float]]) -> Any:
    """Horizontal bars of the medians, with every measurement as a dot."""
    from matplotlib import pyplot as plt

    from experiments.common import plots

    plots.use_style()
    names = list(medians)
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.7 * len(names)), layout="tight")
    colors = [plots.BLUE if name.startswith("jax") else plots.ORANGE for name in names]
    axes.barh(names, [medians[name] for name in names], color=colors, height=0.6)
    for position, name in enumerate(names):
        measured = [row[name] for row in rows]
        axes.plot(measured, [position] * len(rows), "k.", alpha=0.4, markersize=5)
        axes.annotate(
            f"{medians[name]:.2f} s",
            (max(measured), position),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel("seconds per epoch (median; dots: every measurement)")
    return figure


def _configs() -> dict[Preset, BenchmarkConfig]:
    rounds: dict[Preset, int] = {"smoke": 2, "cpu": 9, "paper": 5}
    return {
        preset: BenchmarkConfig(TrainConfig(**PRESETS[preset]), rounds=rounds[preset])
        for preset in rounds
    }


COMMANDS: dict[str, Command[Any, Any]] = {
    "epochs": Command(_configs(), BenchmarkOptions, run_benchmark)
}

if __name__ == "__main__":
    sys.exit(main(PROG, COMMANDS, sys.argv[1:]))
