"""Training on the paper's spirals, as they are and with rotated inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.common.networks import Params, Variables, part_of
from experiments.common.settings import fields_of
from experiments.shifts.config import (
    MethodName,
    SpiralsProblem,
    SpiralsRun,
    SpiralsSettings,
)
from experiments.shifts.linear_data import random_rotation
from experiments.shifts.methods import METHODS, Recipe, Setting, Whitening
from experiments.shifts.training import (
    TWO_CLASSES,
    Examples,
    errors_of,
    make_steps,
    share_of_baseline,
    train_epochs,
)
from experiments.synthetic.data import MECHANISM_DIMS, Dataset, Split, make_dataset
from experiments.synthetic.model import Architecture, init_variables, make_apply

# Adam as in `experiments.synthetic`.
RECIPE = Recipe(0.9, 0.9, 1e-15, l2=1e-7, weight_decay=0.1)
# The rotations of the inputs, apart from all that a seed draws otherwise.
_TURNS = 7


def data_for(settings: SpiralsSettings, problem: SpiralsProblem, seed: int) -> Dataset:
    """The splits of `experiments.synthetic.data`, inputs rotated alike in all."""
    dataset = make_dataset(
        jax.random.fold_in(jax.random.key(seed), 0),
        settings.num_envs,
        settings.examples_per_env,
        settings.shortcut_dims,
        settings.shortcut_std,
        settings.revolutions,
    )
    if problem == "spirals":
        return dataset
    rng = np.random.default_rng([seed, _TURNS])
    turn = random_rotation(rng, MECHANISM_DIMS + settings.shortcut_dims)
    turn = turn.astype(np.float32)

    def turned(split: Split) -> Split:
        features = jnp.matmul(split.features, turn, precision=jax.lax.Precision.HIGHEST)
        return Split(features, split.labels)

    return Dataset(*map(turned, dataset))


@functools.lru_cache(maxsize=4)
def network(
    dims: int, hidden_units: int, hidden_layers: int
) -> tuple[Callable[[jax.Array], Params], Callable[[Params, jax.Array], jax.Array]]:
    """What draws initial parameters from a key, and the network as a function."""
    architecture = Architecture(dims, hidden_units, hidden_layers)
    apply = make_apply(architecture)

    def init(key: jax.Array) -> Params:
        return init_variables(key, architecture).params

    def forward(params: Params, features: jax.Array) -> jax.Array:
        return apply(Variables(params, nnx.State({})), features)

    return init, forward


def network_of(settings: SpiralsSettings) -> Any:
    """The same for the inputs and the size of these settings."""
    dims = MECHANISM_DIMS + settings.shortcut_dims
    return network(dims, settings.hidden_units, settings.hidden_layers)


def layers_of(settings: SpiralsSettings) -> list[str]:
    """The layers, by the beginning of their parameters' paths."""
    return [f"mlp/layers/{index}" for index in range(settings.hidden_layers + 1)]


def train(
    config: SpiralsRun, seed: int
) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
    """Trains from the initial weights that the seed draws, with each setting of a run.

    Yields:
      Errors [env] on training, held-out and (as one environment) test examples, and
      the share that selection goes by.
    """
    settings = SpiralsSettings(**fields_of(config, SpiralsSettings))
    dataset = data_for(settings, config.problem, seed)
    run = _make_run(settings, config.method)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    for setting in config.settings:
        yield run(Setting(*map(np.float32, setting)), dataset, key)


@functools.lru_cache(maxsize=4)
def _make_run(settings: SpiralsSettings, method: MethodName) -> Any:
    init, forward = network_of(settings)
    steps_per_epoch = settings.examples_per_env // settings.batch_size
    schedule = optax.cosine_decay_schedule(1.0, settings.epochs * steps_per_epoch)
    whitening = Whitening(settings.damping, decay=0.95, every=10)

    @jax.jit
    def run(
        setting: Setting, dataset: Dataset, key: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        model_key, order_key = jax.random.split(key)
        loop = make_steps(
            TWO_CLASSES,
            forward,
            METHODS[method],
            setting,
            settings.num_envs,
            schedule,
            whitening,
            RECIPE,
            functools.partial(part_of, prefix=f"{layers_of(settings)[-1]}/"),
        )
        params = train_epochs(
            loop,
            init(model_key),
            Examples(*dataset.train),
            order_key,
            settings.epochs,
            settings.batch_size,
        )

        def errors(split: Split) -> jax.Array:
            return errors_of(TWO_CLASSES, forward, params, Examples(*split))

        test = jax.tree.map(lambda leaf: leaf[None], dataset.test)
        # Few examples in each of many environments: as one.
        held_out = jax.tree.map(
            lambda leaf: leaf.reshape(1, -1, *leaf.shape[2:]), dataset.held_out
        )
        return {
            "train": errors(dataset.train),
            "held_out": errors(dataset.held_out),
            "test": errors(test),
        }, share_of_baseline(TWO_CLASSES, forward, params, Examples(*held_out))

    return run
