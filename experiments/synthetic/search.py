"""Hyperparameter search: what a trial trains, when it stops, and what is chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optuna

from experiments.common.run_dir import RunDirError
from experiments.common.search import Search
from experiments.synthetic.config import (
    PENALIZED,
    Rule,
    SearchConfig,
    TrainConfig,
    shared_settings,
)
from experiments.synthetic.spaces import SPACES, recipe_draws, suggest
from experiments.synthetic.training import (
    METRICS,
    dataset_for,
    make_keys,
    make_trainer,
)

# Training accuracy above the first of these, and out-of-distribution accuracy below the
# second (paper, section 3.1).
MEMORISED = (0.97, 0.60)

# The learning rate is a setting of the trial already, which this would shadow.
RECORDED = tuple(name for name in METRICS if name != "learning_rate")

# The metric that each rule selects by.
SCORES: dict[Rule, str] = {
    "training": "validation_accuracy",
    "held_out": "held_out_accuracy",
    "oracle": "test_accuracy",
}
OUT_OF_DISTRIBUTION = {"held_out": "held_out_accuracy", "test": "test_accuracy"}


@dataclasses.dataclass(frozen=True)
class Objective:
    """Trains a trial's settings; its value is the accuracy that `config.rule` names."""

    config: SearchConfig

    def __call__(self, trial: optuna.Trial) -> float:
        """Draws and trains; the trial's user attributes are its last metrics."""
        config = self.train_config(trial)
        trainer, keys = make_trainer(config), make_keys(config.seed)
        dataset = dataset_for(config, config.seed)
        state = trainer.init(keys)
        stopped = ""
        done = 0  # epochs in a row that meet the condition of `stop`
        for epoch in range(config.epochs):
            state, metrics = trainer.epoch(state, dataset, keys, epoch)
            fetched = jax.device_get(metrics)  # at once, not one by one
            values = {name: float(fetched[name]) for name in RECORDED}
            # Before its penalty counts, a method is plain averaging.
            counts = config.method not in PENALIZED or epoch >= config.penalty_annealing
            done = done + 1 if counts and self.is_done(values) else 0
            if not math.isfinite(values["loss"]):
                stopped = "diverged"
            elif done == self.config.patience:
                stopped = "fitted" if self.config.stop == "fitted" else "memorised"
            if stopped:
                break
        for name, value in {**values, "epochs": epoch + 1, "stopped": stopped}.items():
            trial.set_user_attr(name, value)
        return values[SCORES[self.config.rule]]

    def train_config(self, trial: Any) -> TrainConfig:
        """The whole config of a trial."""
        space = SPACES[self.config.space]
        settings = {
            **shared_settings(self.config),
            **suggest(trial, self.config.method, space),
        }
        return TrainConfig(**settings, method=self.config.method, seed=self.config.seed)

    def is_done(self, values: Mapping[str, float]) -> bool:
        """Whether an epoch with these metrics meets the condition of `config.stop`."""
        fitted, generalises = MEMORISED
        if self.config.stop == "never" or values["train_accuracy"] <= fitted:
            return False
        return (
            self.config.stop == "fitted"
            or values[OUT_OF_DISTRIBUTION[self.config.stop]] < generalises
        )


def study_of(config: SearchConfig, directory: Path, storage: Path | None) -> Search:
    """The study that a search works on.

    Its first trial is this project's recipe, for every method alike, if the space
    contains it.

    Raises:
      RunDirError: the space has batches that environments are too small for.
    """
    space = SPACES[config.space]
    largest = max(space.batch_size)
    if config.examples_per_env < largest:
        raise RunDirError(
            f"examples_per_env must be at least {largest}, the largest batch of space "
            f"{config.space!r}, got {config.examples_per_env}"
        )
    recipe = recipe_draws(config.method, space)
    settings = dataclasses.asdict(config)
    own = {name: settings.pop(name) for name in ("trials", "sampler")}
    settings["ranges"] = dataclasses.asdict(space)
    return Search(
        name=f"synthetic-{config.method}-{config.space}-{config.seed}",
        directory=directory,
        seed=config.search_seed,
        first=() if recipe is None else (recipe,),
        space=settings,
        storage=storage,
        **own,
    )


def select(rows: Sequence[Mapping[str, Any]], rule: Rule) -> Mapping[str, Any]:
    """The trial that a rule chooses: the most accurate, of equals the one with the
    lowest validation loss.

    Args:
      rows: trials as `experiments.common.search.table` gives them.
      rule: `training` looks at further examples of the training environments,
        `held_out` at other environments, `oracle` at the test set. See
        `SearchConfig.clean_rules` for what else the trials may have seen.
    """

    def order(row: Mapping[str, Any]) -> tuple[float, float]:
        loss = row["validation_loss"]
        return row[SCORES[rule]], -loss if math.isfinite(loss) else -math.inf

    return max(rows, key=order)


def chosen_settings(
    config: SearchConfig, rows: Sequence[Mapping[str, Any]]
) -> dict[Rule, dict[str, Any]]:
    """The choice of each clean rule, as fields of `TrainConfig` and their values."""
    method, space = config.method, SPACES[config.space]
    return {
        rule: {
            "method": method,
            "schedule": config.schedule,
            **suggest(optuna.trial.FixedTrial(dict(select(rows, rule))), method, space),
        }
        for rule in config.clean_rules
    }
