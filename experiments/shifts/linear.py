"""Training on the linear unit tests: every step sees all examples."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shifts.config import LinearRun, LinearSettings, MethodName, Problem
from experiments.shifts.linear_data import FEATURES, make_data, task_of
from experiments.shifts.methods import METHODS, Recipe, Setting, Whitening
from experiments.shifts.training import (
    Data,
    State,
    Task,
    errors_of,
    make_steps,
    share_of_baseline,
)

# By split: errors [env].
Errors = dict[str, jax.Array]


def apply(params: jax.Array, features: jax.Array) -> jax.Array:
    """A linear model without a bias: outputs [...] for features [..., FEATURES]."""
    return (features @ params)[..., 0]


def data_for(
    settings: LinearSettings,
    problem: Problem,
    num_envs: int,
    method: MethodName,
    seed: int,
) -> Data:
    """What a method is trained and tested on; the same for all but the oracle."""
    oracle = METHODS[method].oracle
    return make_data(seed, problem, num_envs, settings.examples, oracle)


def train(config: LinearRun, seed: int) -> Iterator[tuple[Errors, jax.Array]]:
    """Trains from 0, with each setting of a run.

    Yields:
      Errors on the three splits, and the share that selection goes by.
    """
    problem, method = config.problem, config.method
    data = data_for(config, problem, config.num_envs, method, seed)
    run = _make_run(config.steps, config.damping, config.l2, task_of(problem), method)
    for setting in config.settings:
        yield run(Setting(*map(np.float32, setting)), data)


@functools.lru_cache(maxsize=4)
def _make_run(
    steps: int, damping: float, l2: float, task: Task, method: MethodName
) -> Any:
    schedule = optax.cosine_decay_schedule(1.0, steps)
    # The inputs are the same in every step.
    whitening = Whitening(damping, decay=0.0, every=steps)
    recipe = Recipe(l2=l2)

    @jax.jit
    def run(setting: Setting, data: Data) -> tuple[Errors, jax.Array]:
        num_envs = len(data.train.labels)
        loop = make_steps(
            task,
            apply,
            METHODS[method],
            setting,
            num_envs,
            schedule,
            whitening,
            recipe,
        )

        def step(state: State, _: None) -> tuple[State, None]:
            return loop.step(state, data.train)[0], None

        state = loop.init(jnp.zeros((FEATURES, 1)))
        params = jax.lax.scan(step, state, length=steps)[0].params

        errors = {
            name: errors_of(task, apply, params, envs)
            for name, envs in data._asdict().items()
        }
        return errors, share_of_baseline(task, apply, params, data.held_out)

    return run
