"""Training a small network on shifts of real images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from experiments.common.networks import (
    Params,
    Variables,
    graph_of,
    part_of,
    variables_of,
)
from experiments.common.settings import fields_of
from experiments.shifts.config import ImagesRun, ImagesSettings, MethodName
from experiments.shifts.image_data import CHANNELS, make_data
from experiments.shifts.methods import METHODS, Recipe, Setting, Whitening
from experiments.shifts.training import (
    TWO_CLASSES,
    Examples,
    errors_of,
    make_steps,
    share_of_baseline,
    train_epochs,
)

# A short memory of squares: what a mask has taken is soon decay alone.
RECIPE = Recipe(0.9, 0.99, 1e-8, l2=1e-5, weight_decay=0.1)
# The layers, by the beginning of their parameters' paths.
LAYERS = ("conv1", "conv2", "head")


class Network(nnx.Module):
    """Two convolutions that halve the image, and a dense layer with one output.

    Args:
      size: height and width of the images.
      width: channels after the first convolution; after the second twice as many.
      rngs: source of the initial weights.
    """

    def __init__(self, size: tuple[int, int], width: int, *, rngs: nnx.Rngs):
        weights = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")

        def convolution(fan_in: int, fan_out: int) -> nnx.Conv:
            return nnx.Conv(
                fan_in, fan_out, (3, 3), strides=2, kernel_init=weights, rngs=rngs
            )

        self.conv1 = convolution(CHANNELS, width)
        self.conv2 = convolution(width, 2 * width)
        height, breadth = (-(-side // 4) for side in size)
        self.head = nnx.Linear(
            2 * width * height * breadth, 1, kernel_init=weights, rngs=rngs
        )

    def __call__(self, features: jax.Array) -> jax.Array:
        """Logits [example] for features [example, height, width, CHANNELS]."""
        hidden = nnx.relu(self.conv2(nnx.relu(self.conv1(features))))
        return self.head(hidden.reshape(len(hidden), -1))[:, 0]


# Parameters and features [example, ...] to logits [example].
Forward = Callable[[Params, jax.Array], jax.Array]


@functools.lru_cache(maxsize=4)
def network(
    size: tuple[int, int], width: int
) -> tuple[Callable[[jax.Array], Params], Forward]:
    """What draws initial parameters from a key, and the network as a function."""
    graph = graph_of(lambda rngs: Network(size, width, rngs=rngs))

    def init(key: jax.Array) -> Params:
        return variables_of(Network(size, width, rngs=nnx.Rngs(key))).params

    def forward(params: Params, features: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graph, *Variables(params, nnx.State({})))
        return model(features)

    return init, forward


def train(
    config: ImagesRun, seed: int, data_dir: Path | None = None
) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
    """Trains from the initial weights that the seed draws, with each setting of a run.

    Yields:
      Errors [env] on training, held-out and test examples, and the share that selection
      goes by.
    """
    settings = ImagesSettings(**fields_of(config, ImagesSettings))
    data = jax.device_put(make_data(seed, config.problem, settings, data_dir))
    size = data.train.features.shape[2:4]
    fit, judge = _make_run(settings, config.method, size)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    for setting in config.settings:
        params = fit(Setting(*map(np.float32, setting)), data.train, key)
        yield judge(params, data._asdict())


@functools.lru_cache(maxsize=4)
def _make_run(
    settings: ImagesSettings, method: MethodName, size: tuple[int, int]
) -> tuple[Any, Any]:
    init, forward = network(size, settings.width)
    steps = settings.epochs * (settings.examples_per_env // settings.batch_size)
    schedule = optax.cosine_decay_schedule(1.0, steps)
    whitening = Whitening(settings.damping, decay=0.95, every=10)

    @jax.jit
    def fit(setting: Setting, examples: Examples, key: jax.Array) -> Params:
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
            functools.partial(part_of, prefix=f"{LAYERS[-1]}/"),
        )
        return train_epochs(
            loop,
            init(model_key),
            examples,
            order_key,
            settings.epochs,
            settings.batch_size,
        )

    return fit, _judge(size, settings.width)


@functools.lru_cache(maxsize=4)
def _judge(size: tuple[int, int], width: int) -> Any:
    """Errors and share, apart from what is compiled for each method."""
    _, forward = network(size, width)

    @jax.jit
    def judge(
        params: Params, splits: dict[str, Examples]
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        errors = {
            name: errors_of(TWO_CLASSES, forward, params, envs)
            for name, envs in splits.items()
        }
        share = share_of_baseline(TWO_CLASSES, forward, params, splits["held_out"])
        return errors, share

    return judge
