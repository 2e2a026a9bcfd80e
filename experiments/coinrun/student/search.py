"""Search over the optimizer's settings: what a trial draws, and what the best are."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optuna

from experiments.coinrun.dataset import Dataset, load
from experiments.coinrun.student.config import (
    Decay,
    Method,
    SearchConfig,
    Source,
    TrainConfig,
    shared_settings,
)
from experiments.coinrun.student.training import (
    make_keys,
    make_trainer,
    on_device,
    rates_at,
)
from experiments.common.search import Search

# What the value of a trial that diverged stands for; log(15) is a student who guesses.
WORST_KL = 100.0
CURVES = ("train_kl", "test_kl")


@dataclasses.dataclass(frozen=True)
class Ranges:
    """From where to where settings are drawn, both ends included.

    They are as wide for both methods, and contain the paper's best (table 3).
    """

    learning_rate: tuple[float, float] = (1e-4, 3e-2)
    """Evenly in the logarithm."""
    b1: tuple[float, float] = (0.0, 0.95)
    b3: tuple[float, float] = (0.3, 0.95)
    """Only for and_mask."""
    threshold: tuple[float, float] = (0.0, 0.8)
    """Only for and_mask, which is adam at 0."""
    weight_decay: tuple[float, float] = (1e-5, 1e-1)
    """Evenly in the logarithm; only where there is one."""
    decay: tuple[Decay, ...] = ("off", "decoupled", "coupled")


RANGES = Ranges()


def suggest(trial: Any, method: Method, ranges: Ranges = RANGES) -> dict[str, Any]:
    """Draws the settings of a trial: fields of `TrainConfig` and their values."""

    def draw(name: str, log: bool = False) -> float:
        value: float = trial.suggest_float(name, *getattr(ranges, name), log=log)
        return value

    settings: dict[str, Any] = {
        "learning_rate": draw("learning_rate", log=True),
        "b1": draw("b1"),
        "decay": trial.suggest_categorical("decay", ranges.decay),
        "weight_decay": 0.0,
    }
    if settings["decay"] != "off":
        settings["weight_decay"] = draw("weight_decay", log=True)
    if method == "and_mask":
        settings |= {name: draw(name) for name in ("b3", "threshold")}
    return settings


@functools.lru_cache(maxsize=1)
def _data(source: Source, directory: Path, digest: str) -> Dataset:
    return on_device(load(source, directory, digest)[0])


@dataclasses.dataclass(frozen=True)
class Objective:
    """Trains a trial's settings; its value is minus its lowest test KL."""

    config: SearchConfig
    method: Method
    data: Path
    """Directory of the dataset."""
    digest: str
    """Checksum that tells it from others."""

    def __call__(self, trial: optuna.Trial) -> float:
        """Draws and trains; the trial's user attributes are its curves and metrics.

        A trial that diverges ends, and counts as the worst.
        """
        config = self.train_config(trial)
        trainer, keys = make_trainer(config, self.method), make_keys(config.seed)
        dataset = _data(self.config.dataset, self.data, self.digest)
        state = trainer.init(keys.model)
        curves: dict[str, list[float]] = {name: [] for name in CURVES}
        stopped = ""
        for epoch in range(config.epochs):
            rates = rates_at(config, epoch)
            state, metrics = trainer.epoch(state, dataset, keys.batches, epoch, rates)
            fetched = jax.device_get(metrics)  # at once, not one by one
            values = {name: float(value) for name, value in fetched.items()}
            if not all(math.isfinite(values[name]) for name in (*CURVES, "running_kl")):
                stopped = "diverged"
                break
            for name in CURVES:
                curves[name].append(values[name])
        best = min(curves["test_kl"], default=WORST_KL)
        attributes = {
            "min_test_kl": best,
            **{f"last_{name}": curve[-1] for name, curve in curves.items() if curve},
            "last_test_accuracy": values["test_accuracy"],
            "last_open_fraction": values["open_fraction"],
            "epochs": len(curves["test_kl"]),
            "stopped": stopped,
            **{f"{name}_curve": curve for name, curve in curves.items()},
        }
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        return -WORST_KL if stopped else -best

    def train_config(self, trial: Any) -> TrainConfig:
        """The whole config of a trial."""
        settings = {**shared_settings(self.config), **suggest(trial, self.method)}
        return TrainConfig(**settings, method=self.method, seed=self.config.seed)


def study_of(
    config: SearchConfig,
    method: Method,
    directory: Path,
    storage: Path | None,
    data_digest: str,
) -> Search:
    """The study of a method; both lie in one journal.

    Args:
      config: of the search.
      method: the study's.
      directory: where the locks lie, and the journal without a `storage`.
      storage: another journal's path.
      data_digest: what tells the dataset from others.
    """
    settings: dict[str, Any] = shared_settings(config)
    settings |= {"seed": config.seed, "data_sha256": data_digest, "method": method}
    settings["ranges"] = dataclasses.asdict(RANGES)
    return Search(
        name=f"coinrun-{method}-{config.seed}",
        directory=directory,
        trials=config.trials,
        seed=config.search_seed,
        sampler=config.sampler,
        space=settings,
        storage=storage,
    )


def best_trials(rows: Sequence[Mapping[str, Any]], top: int) -> list[Mapping[str, Any]]:
    """The `top` trials with the lowest test KL, of equals the first ones first.

    Those that diverged are none of them, so there may be fewer.
    """
    finished = [row for row in rows if not row["stopped"]]
    return sorted(finished, key=lambda row: row["min_test_kl"])[:top]
