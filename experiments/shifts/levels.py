"""Training on CoinRun's levels, several in a step, each an environment.

Data, network and metric are those of `experiments.coinrun.student`, which trains on one
level in a step. What a level's batch norm sees are its own states, so its gradient does
not depend on the levels beside it; running statistics play no part in training, and are
taken once at its end, from some states of every training level.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.coinrun import dataset as coinrun
from experiments.coinrun.game import NUM_ACTIONS
from experiments.coinrun.student.resnet import (
    Architecture,
    init_variables,
    make_apply,
    make_train_apply,
)
from experiments.coinrun.student.training import constant_kl, kl_divergence
from experiments.common.cli import Invocation
from experiments.common.epochs import logits_of, make_epoch
from experiments.common.networks import BatchStats, Params, Variables
from experiments.common.settings import fields_of
from experiments.shifts.config import MethodName
from experiments.shifts.levels_config import (
    LevelsChooseOptions,
    LevelsOptions,
    LevelsRun,
    LevelsSettings,
)
from experiments.shifts.methods import METHODS, Recipe, Setting, Whitening
from experiments.shifts.training import (
    Data,
    Examples,
    State,
    Steps,
    Task,
    make_steps,
    share_of_baseline,
)

# Decays of both optimizers as in the paper's best settings.
RECIPE = Recipe(b1=0.21, b2=0.999, eps=1e-8, b3=0.79)
WHITENING = Whitening(damping=1e-3, decay=0.95, every=10)
# Which levels are held out, apart from all that a seed draws otherwise.
_HELD_OUT = 11


# Levels [step, env] and rows of their states [step, env, state], or those of a step.
Batch = tuple[jax.Array, jax.Array]


def _kl(logits: jax.Array, probabilities: jax.Array) -> jax.Array:
    return kl_divergence(probabilities, logits).mean()


def _kl_penalty(logits: jax.Array, probabilities: jax.Array) -> jax.Array:
    """The square of the derivative of the loss of s times the logits, at s = 1."""
    excess = jax.nn.softmax(logits) - probabilities
    return jnp.square((logits * excess).sum(-1).mean())


IMITATION = Task(_kl, _kl_penalty, _kl, constant_kl, constant_kl)


Call = Invocation[Any, LevelsOptions] | Invocation[Any, LevelsChooseOptions]
AnyCall = TypeVar("AnyCall", bound=Call)


def with_digest(call: AnyCall) -> AnyCall:
    """`call` with what tells its dataset from others in its config.

    Raises:
      DataError: see `experiments.coinrun.dataset.load`; or it has too few levels, or
        too few states of a level.
    """
    config, expected = call.config, call.config.data_sha256 or None
    folder = call.options.data_dir(config.dataset)
    dataset, digest = coinrun.load(config.dataset, folder, expected)
    levels, states = dataset.train.images.shape[:2]
    if config.evaluated_states > states:
        raise coinrun.DataError(
            f"evaluated_states must be at most the {states} states that a level of the "
            f"dataset has, got {config.evaluated_states}"
        )
    for num_envs in config.num_envs:
        wanted = config.held_out_levels + num_envs
        if wanted > levels:
            raise coinrun.DataError(
                f"held_out_levels ({config.held_out_levels}) and num_envs ({num_envs}) "
                f"must be at most the {levels} training levels of the dataset together"
            )
        if config.states_per_step // num_envs > states:
            raise coinrun.DataError(
                f"states_per_step must be at most {states * num_envs} with {num_envs} "
                f"levels of {states} states, got {config.states_per_step}"
            )
    # In the preset too: it is no change that a directory's name has to tell.
    config, preset = (
        dataclasses.replace(each, data_sha256=digest)
        for each in (config, call.preset_config)
    )
    return dataclasses.replace(call, config=config, preset_config=preset)


def data_for(settings: LevelsSettings, seed: int, data_dir: Path) -> Data:
    """The dataset, with the seed's levels held out; images and the expert's
    probabilities, [level, state, ...] each.

    Test states, each of a level of its own, are as one level.
    """
    expected = settings.data_sha256 or None
    (train, test), _ = coinrun.load(settings.dataset, data_dir, expected)
    order = np.random.default_rng([seed, _HELD_OUT]).permutation(len(train.images))
    held_out, own = np.split(order, [settings.held_out_levels])
    return Data(
        train=Examples(*(array[np.sort(own)] for array in train)),
        test=Examples(*(np.asarray(array)[None] for array in test)),
        held_out=Examples(*(array[np.sort(held_out)] for array in train)),
    )


def train(
    config: LevelsRun, seed: int, data_dir: Path
) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
    """Trains from the initial weights that the seed draws, with each setting of a run.

    Yields:
      KL [level] on training, held-out and (as one level) test states, and the share
      that selection goes by.
    """
    settings = LevelsSettings(**fields_of(config, LevelsSettings))
    data = jax.tree.map(jnp.asarray, data_for(settings, seed, data_dir))
    loop = make_loop(settings, config.method, config.num_envs)
    model_key, order_key = jax.random.split(jax.random.key(seed))
    for values in config.settings:
        setting = Setting(*map(jnp.float32, values))
        state = loop.init(model_key, setting)
        _, found = loop.run(state, data, order_key, 0, setting)
        yield {name: found[name] for name in Data._fields}, found["share"]


class Loop(NamedTuple):
    """`init(key, setting)` gives a state; `run` trains, see `Trainer.epoch`."""

    init: Any
    run: Any


@functools.lru_cache(maxsize=4)
def make_loop(settings: LevelsSettings, method: MethodName, num_envs: int) -> Loop:
    """The functions that train with a method, compiled once for all seeds."""
    # Nothing of other batches is kept in the statistics.
    architecture = Architecture(
        settings.width, settings.blocks, NUM_ACTIONS, momentum=0.0
    )
    train_apply, eval_apply = make_train_apply(architecture), make_apply(architecture)
    drops = (settings.steps // 2, settings.steps * 3 // 4)
    schedule = optax.piecewise_constant_schedule(1.0, dict.fromkeys(drops, 0.1))

    def normalized(params: Params, images: jax.Array) -> tuple[jax.Array, BatchStats]:
        """Logits by the statistics of these images, and the statistics."""
        return train_apply(Variables(params, _no_statistics(architecture)), images)

    def apply(params: Params, images: jax.Array) -> jax.Array:
        return normalized(params, images)[0]

    def steps_with(setting: Setting) -> Steps:
        return make_steps(
            IMITATION,
            apply,
            METHODS[method],
            setting,
            num_envs,
            schedule,
            WHITENING,
            RECIPE,
        )

    @jax.jit
    def init(key: jax.Array, setting: Setting) -> State:
        return steps_with(setting).init(init_variables(key, architecture).params)

    def order_of(data: Data, key: jax.Array, index: jax.Array) -> Batch:
        each = settings.states_per_step // num_envs
        levels, states = data.train.labels.shape[:2]
        key = jax.random.fold_in(key, index)
        return draw_batches(key, settings.steps, num_envs, each, levels, states)

    def step(
        state: State, data: Data, batch: Batch, setting: Setting
    ) -> tuple[State, jax.Array]:
        levels, rows = batch
        examples = Examples(*(leaf[levels[:, None], rows] for leaf in data.train))
        return steps_with(setting).step(state, examples)

    def end(
        state: State, data: Data, losses: jax.Array, setting: Setting
    ) -> dict[str, jax.Array]:
        params = state.params
        seen = jax.tree.map(lambda x: x[:, : settings.evaluated_states], data.train)
        statistics = jax.lax.map(
            lambda images: normalized(params, images)[1], seen.features
        )
        variables = Variables(params, jax.tree.map(lambda x: x.mean(0), statistics))

        def errors(levels: Examples) -> jax.Array:
            images, labels = levels
            flat = images.reshape(-1, *images.shape[2:])
            logits = logits_of(eval_apply, variables, flat).reshape(labels.shape)
            return jax.vmap(IMITATION.error)(logits, labels)

        share = share_of_baseline(IMITATION, eval_apply, variables, data.held_out)
        return {
            "share": share,
            **{
                name: errors(own)
                for name, own in data._replace(train=seen)._asdict().items()
            },
        }

    return Loop(init, make_epoch(order_of, step, end))


def _no_statistics(architecture: Architecture) -> BatchStats:
    """Running statistics of batch norm where nothing reads them."""
    shapes = jax.eval_shape(
        lambda key: init_variables(key, architecture), jax.random.key(0)
    ).batch_stats
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def draw_batches(
    key: jax.Array, steps: int, num_envs: int, each: int, levels: int, states: int
) -> Batch:
    """What each step is on: `num_envs` different levels, `each` states of every one.

    All levels come up before one does again, but for those that are too few for a step.
    """
    levels_key, states_key = jax.random.split(key)
    in_a_pass = levels // num_envs
    passes = -(-steps // in_a_pass)
    orders = jax.vmap(
        lambda key: jax.random.permutation(key, levels)[: in_a_pass * num_envs]
    )(jax.random.split(levels_key, passes))
    taken = orders.reshape(-1, num_envs)[:steps]
    rows = jax.vmap(lambda key: jax.random.permutation(key, states)[:each])(
        jax.random.split(states_key, steps * num_envs)
    )
    return taken, rows.reshape(steps, num_envs, each)
