"""The subcommand `epochs`: epochs of the synthetic training, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.benchmark.peer import (
    PeerOptions,
    require_same_losses,
    torch_process,
)
from experiments.common import plots
from experiments.common.cli import Invocation, Preset, entered
from experiments.common.run_dir import RunDir, RunDirError
from experiments.common.validation import require_at_least
from experiments.synthetic.config import (
    PRESETS,
    Settings,
    TrainConfig,
    shared_settings,
)
from experiments.synthetic.training import (
    EVALUATED,
    dataset_for,
    epoch_order,
    make_keys,
    make_trainer,
)

EPOCHS = "epochs.csv"
FIGURE = "epochs.png"

LABELS = {
    "jax_fused": "hardvary, fused",
    "jax_scan": "hardvary, scan over environments",
    "jax_vmap": "hardvary, stacked gradients",
    "torch_functional": "PyTorch, torch.func vmap(grad)",
    "torch_own_forward": "PyTorch, forward and autograd.grad\nfor each environment",
    "torch_shared_forward": "PyTorch, one forward, autograd.grad\nfor each environment",
}
AUTHORS_WAY = "torch_shared_forward"

Oracle = Literal["fused", "scan", "vmap"]
ORACLES: tuple[Oracle, ...] = get_args(Oracle)

# A contestant trains for one epoch and says how long it took and what came out.
Epoch = Callable[[], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(Settings):
    """The training with the AND-mask that everybody runs, and how often to measure."""

    rounds: int = 9
    """Timed epochs of each contestant, one after the other in every round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "rounds")

    @property
    def training(self) -> TrainConfig:
        """The config of the training."""
        return TrainConfig(**shared_settings(self), method="and_mask", seed=self.seed)

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return 0


def jax_contestant(config: TrainConfig, oracle: Oracle) -> Epoch:
    """The training of experiments.synthetic with one of the gradient oracles."""
    size = config.microbatch_size if oracle == "scan" else 1
    config = dataclasses.replace(config, oracle=oracle, microbatch_size=size)
    trainer, keys = make_trainer(config), make_keys(config.seed)
    dataset = dataset_for(config, config.seed)
    state, index = trainer.init(keys), 0

    def epoch() -> dict[str, float]:
        nonlocal state, index
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(
            trainer.epoch(state, dataset, keys, index)
        )
        seconds = time.perf_counter() - start
        index += 1
        return {"seconds": seconds, **jax.tree.map(float, jax.device_get(metrics))}

    return epoch


def torch_contestant(
    stack: contextlib.ExitStack, python: Path, training: Path, way: str
) -> tuple[Epoch, dict[str, Any]]:
    """The training in PyTorch, in a process that lasts as long as `stack`.

    Returns:
      The contestant, and the PyTorch version and number of threads.
    """
    ask = stack.enter_context(torch_process(python, "torch_peer.py"))
    description = ask({"load": str(training), "way": way})
    return (lambda: ask({"epoch": True})), description


def require_torch_can(config: TrainConfig) -> None:
    """Refuses settings that torch_peer.py does not implement."""
    # The step schedule may stand: its first drop comes long after the first epoch, the
    # one whose losses are compared.
    implemented: dict[str, tuple[object, ...]] = {
        "optimizer": ("adam",),
        "schedule": ("step", "constant"),
        "l1": (0.0,),
        "weight_decay": (0.0,),
        "batch_norm": (False,),
        "dropout": (0.0,),
    }
    for field, values in implemented.items():
        value = getattr(config, field)
        if value not in values:
            raise RunDirError(
                f"with --torch-python, {field} must be {' or '.join(map(str, values))},"
                f" got {value!r}: the PyTorch peers have nothing else"
            )


def write_training(config: TrainConfig, path: Path) -> None:
    """Writes data, initial weights and the first epoch's batches for PyTorch."""
    keys, dataset = make_keys(config.seed), dataset_for(config, config.seed)
    params = make_trainer(config).init(keys).variables.params
    layers = [
        params["mlp"]["layers"][index] for index in range(config.hidden_layers + 1)
    ]
    weights = [layer[part][...] for layer in layers for part in ("kernel", "bias")]
    order = epoch_order(jax.random.fold_in(keys.batches, 0), config)
    arrays: dict[str, Any] = {
        f"{name}_{part}": leaf
        for name, split in dataset._asdict().items()
        for part, leaf in zip(("x", "y"), split, strict=True)
    }
    arrays |= {f"param_{index}": leaf for index, leaf in enumerate(weights)}
    arrays |= {"rows": order, "num_params": len(weights), "evaluated": EVALUATED}
    arrays |= {"settings": json.dumps(dataclasses.asdict(config))}
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

    Raises:
      RunDirError: their first losses differ, so that the seconds say nothing.
    """
    first = {name: epoch() for name, epoch in contestants.items()}
    require_same_losses(
        {name: report["loss"] for name, report in first.items()}, "epoch"
    )
    rows = []
    for index in tqdm(range(rounds), unit="round"):
        seconds = {name: epoch()["seconds"] for name, epoch in contestants.items()}
        rows.append({"round": index + 1, **seconds})
    return first, rows


def run_benchmark(
    invocation: Invocation[BenchmarkConfig, PeerOptions],
) -> None:
    """Times epochs of AND-mask training in JAX and, with --torch-python, in PyTorch.

    All train the same network on the same data from the same weights; the losses of
    the first epoch, in which they also see the same batches, are compared. The
    contestants take turns, each on all cores; medians are reported.
    """
    config, options = invocation.config, invocation.options
    experiment, name = "benchmark epochs", f"epochs-{options.preset}"
    if options.torch_python is not None:
        require_torch_can(config.training)
        experiment, name = f"{experiment} with PyTorch", f"{name}-torch"
    with entered(
        invocation,
        invocation.run_path("benchmark", name),
        experiment,
        outputs=(EPOCHS, FIGURE),
    ) as run:
        if not run.finished:
            _run(run, config, options.torch_python)
        summary = run.summary()
        print(format_table(summary))
        if "authors_way_over_fused" in summary:
            label = LABELS[AUTHORS_WAY].replace("\n", " ")
            times = summary["authors_way_over_fused"]
            print(f"hardvary's fused oracle is {times:.1f} times as fast as {label}")


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
                contestants[f"torch_{way}"], torch = torch_contestant(
                    stack, torch_python, folder / "training.npz", way
                )
        first, rows = measure(contestants, config.rounds)
    medians = {
        name: statistics.median(row[name] for row in rows) for name in contestants
    }
    slower = {name: medians[name] / medians["jax_fused"] for name in medians}
    headline = (
        {"authors_way_over_fused": slower[AUTHORS_WAY]} if AUTHORS_WAY in slower else {}
    )
    run.write_metrics(rows, EPOCHS)
    run.save_figure(FIGURE, draw(medians, rows))
    run.finish(
        {
            **headline,
            "median_seconds_per_epoch": medians,
            "slower_than_fused": slower,
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
        "| training | s per epoch | epochs per s | time, fused = 1 | first loss |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in summary["median_seconds_per_epoch"].items():
        label = LABELS[name].replace("\n", " ")
        ratio = summary["slower_than_fused"][name]
        loss = summary["first_epoch_loss"][name]
        lines.append(
            f"| {label} | {seconds:.3f} | {1 / seconds:.2f} | {ratio:.2f} "
            f"| {loss:.6f} |"
        )
    return "\n".join(lines)


def draw(medians: dict[str, float], rows: list[dict[str, float]]) -> Figure:
    """Horizontal bars of the medians, with every measurement as a dot."""
    plots.use_style()
    names = list(medians)
    figure = Figure(figsize=(9, 1.4 + 0.7 * len(names)), layout="tight")
    axes = figure.add_subplot()
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


def configs() -> dict[Preset, BenchmarkConfig]:
    """The config of every preset."""
    rounds: dict[Preset, int] = {"smoke": 2, "cpu": 9, "paper": 5}
    return {
        preset: BenchmarkConfig(**PRESETS[preset], rounds=rounds[preset])
        for preset in rounds
    }
