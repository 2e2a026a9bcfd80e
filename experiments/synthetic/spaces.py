"""Spaces that a search draws from: tables 1 and 2 of the paper, and around them."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from experiments.synthetic.config import MASKS, Method

# Settings of a trial that its draws do not name.
NEUTRAL: dict[str, Any] = {"l1": 0.0, "l2": 0.0, "weight_decay": 0.0, "dropout": 0.0}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam", "b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "adam_short_memory": {"optimizer": "adam", "b1": 0.9, "b2": 0.9, "eps": 1e-15},
    "sgd": {"optimizer": "sgd"},
}


class Trial(Protocol):
    """The one method of `optuna.Trial` that a space uses."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of the choices."""


@dataclasses.dataclass(frozen=True)
class Space:
    """Values that a trial may take; one of L1, L2 and none is drawn first."""

    hidden_units: tuple[int, ...] = (256, 512)
    hidden_layers: tuple[int, ...] = (3, 5)
    batch_size: tuple[int, ...] = (64, 128, 256)
    optimizer: tuple[str, ...] = ("adam", "sgd")
    learning_rate: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    batch_norm: tuple[bool, ...] = (False, True)
    dropout: tuple[float, ...] = (0.0, 0.5)
    l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    l1: tuple[float, ...] = (1e-6, 1e-5, 1e-4)
    threshold: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0)
    rescale: tuple[bool, ...] = (False, True)
    sharpness: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0)
    irm_learning_rate: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    penalty_weight: tuple[float, ...] = (10.0, 100.0, 1000.0)
    penalty_annealing: tuple[int, ...] = (0, 1, 2, 4, 8)
    reversal_scale: tuple[float, ...] = (0.1, 1.0, 10.0)
    dro_step_size: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    cagrad_c: tuple[float, ...] = (0.1, 0.3, 0.5, 0.8)
    fairgrad_alpha: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0)
    grad_vac_beta: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    max_norm: tuple[float, ...] = (1e-2, 1e-1, 1.0, 10.0)


# `paper` has the values of its tables and, where they say nothing, ours. `wide` adds
# what this project's recipe needs, for every method alike.
SPACES: dict[str, Space] = {
    "paper": Space(),
    "wide": Space(
        optimizer=("adam", "adam_short_memory", "sgd"),
        l2=(1e-7, 1e-5, 1e-4, 1e-3),
    ),
    # A network that two cores train in seconds.
    "small": Space(
        hidden_units=(128,),
        hidden_layers=(3,),
        batch_size=(64, 128),
        optimizer=("adam", "adam_short_memory", "sgd"),
        l2=(1e-7, 1e-5, 1e-4, 1e-3),
    ),
    "smoke": Space(
        hidden_units=(8, 16),
        hidden_layers=(2,),
        batch_size=(32, 64),
        optimizer=("adam", "sgd"),
    ),
}

# In terms of a space's draws; the first trial of every method's study, with the largest
# network that the space has.
RECIPE: dict[str, Any] = {
    "hidden_layers": 3,
    "batch_size": 128,
    "optimizer": "adam_short_memory",
    "learning_rate": 1e-2,
    "batch_norm": False,
    "dropout": 0.0,
    "decay": "l2",
    "l2": 1e-7,
    "threshold": 1.0,
    "rescale": False,
    "sharpness": 10.0,
    "penalty_weight": 100.0,
    "penalty_annealing": 4,
    "reversal_scale": 1.0,
    "dro_step_size": 1e-2,
    "cagrad_c": 0.5,
    "fairgrad_alpha": 2.0,
    "grad_vac_beta": 1e-2,
    "max_norm": 1.0,
}


def suggest(trial: Trial, method: Method, space: Space) -> dict[str, Any]:
    """Draws the settings of a trial: fields of `TrainConfig` and their values."""
    settings = dict(NEUTRAL)

    def draw(field: str, choices: tuple[Any, ...]) -> Any:
        return trial.suggest_categorical(field, choices)

    def draw_settings(*fields: str) -> None:
        settings.update((field, draw(field, getattr(space, field))) for field in fields)

    draw_settings("hidden_units", "batch_size", "batch_norm")
    if method != "dann":  # its three parts have two layers each
        draw_settings("hidden_layers")
    settings |= OPTIMIZERS[draw("optimizer", space.optimizer)]
    irm = method == "irm"
    rates = space.irm_learning_rate if irm else space.learning_rate
    settings["learning_rate"] = draw("learning_rate", rates)
    if not irm:  # table 2 has none of these
        draw_settings("dropout")
        decay = draw("decay", ("none", "l1", "l2"))
        if decay != "none":
            draw_settings(decay)
    if method in MASKS:
        # At 1 nothing passes the smooth mask.
        smooth = method == "sand_mask"
        thresholds = tuple(t for t in space.threshold if t < 1 or not smooth)
        settings["threshold"] = draw("threshold", thresholds)
        draw_settings("rescale")
    draw_settings(*EXTRA.get(method, ()))
    return settings


EXTRA: dict[Method, tuple[str, ...]] = {
    "sand_mask": ("sharpness",),
    "irm": ("penalty_weight", "penalty_annealing"),
    "vrex": ("penalty_weight", "penalty_annealing"),
    "dann": ("reversal_scale",),
    "group_dro": ("dro_step_size",),
    "cagrad": ("cagrad_c",),
    "fairgrad": ("fairgrad_alpha",),
    "grad_vac": ("grad_vac_beta",),
    "clip_env_norms": ("max_norm",),
}


class _Recorder:
    """Answers with the recipe's values, and remembers which were asked for."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = recipe
        self.drawn: dict[str, Any] = {}
        self.in_space = True

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        value = self.drawn[name] = self.recipe[name]
        self.in_space &= value in choices
        return value


def recipe_draws(method: Method, space: Space) -> dict[str, Any] | None:
    """The recipe as the draws of a trial, None if the space does not contain it."""
    recipe = RECIPE | {"hidden_units": space.hidden_units[-1]}
    if method == "sand_mask":
        recipe["threshold"] = 0.8
    recorder = _Recorder(recipe)
    suggest(recorder, method, space)
    return recorder.drawn if recorder.in_space else None
