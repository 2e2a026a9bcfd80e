"""A look at the environments' gradients, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hardvary
from experiments.common.cli import Invocation, RunOptions, entered
from experiments.common.networks import part_of
from experiments.common.settings import fields_of
from experiments.common.tables import format_rows
from experiments.shifts import images, spirals
from experiments.shifts.config import (
    ImagesLookConfig,
    ImagesLookOptions,
    ImagesProblem,
    ImagesSettings,
    SpiralsLookConfig,
    SpiralsProblem,
    SpiralsSettings,
)
from experiments.shifts.image_data import make_data
from experiments.shifts.methods import METHODS, Recipe, Setting, Whitening
from experiments.shifts.training import (
    TWO_CLASSES,
    Examples,
    make_steps,
    train_epochs,
)

LOOK = "look.csv"
# Of the disagreement that the leading directions are to carry.
_MOST = 0.9

Row = dict[str, Any]


def images_look(call: Invocation[ImagesLookConfig, ImagesLookOptions]) -> None:
    """Where gradients of averaging agree and differ on real images; a table."""
    config, options = call.config, call.options
    looks = functools.partial(look_at_images, config, data_dir=options.data_dir)
    _tabulate(call, "images-look", looks)


def spirals_look(call: Invocation[SpiralsLookConfig, RunOptions]) -> None:
    """Where gradients of averaging agree and differ on the spirals; a table."""
    looks = functools.partial(look_at_spirals, call.config)
    _tabulate(call, "spirals-look", looks)


def _tabulate(
    call: Invocation[Any, Any], name: str, looks: Callable[[Any], Iterator[Row]]
) -> None:
    path = call.run_path("shifts", f"{name}-{call.options.preset}")
    with entered(call, path, f"shifts {name}", outputs=(LOOK,)) as run:
        if not run.finished:
            rows = [row for problem in call.config.problems for row in looks(problem)]
            run.write_metrics(rows, LOOK)
            run.finish({"looks": rows})
        print(format_look(run.summary()["looks"]))
        print(f"With the spectra: {run.path / LOOK}")


def look_at_images(
    config: ImagesLookConfig, problem: ImagesProblem, data_dir: Any = None
) -> Iterator[Row]:
    """What one batch of all examples shows, at initial weights and a little later.

    Yields:
      For each look and layer what `of_layer` finds.
    """
    settings = ImagesSettings(**fields_of(config, ImagesSettings))
    data = make_data(config.seed, problem, settings, data_dir)
    networks = images.network(data.train.features.shape[2:4], settings.width)
    sees = _make_look(networks, images.LAYERS, images.RECIPE, _Training.of(config))
    return _look(sees, config, problem, jax.device_put(data.train))


def look_at_spirals(
    config: SpiralsLookConfig, problem: SpiralsProblem
) -> Iterator[Row]:
    """The same on the spirals, as they are or rotated."""
    settings = SpiralsSettings(**fields_of(config, SpiralsSettings))
    train = Examples(*spirals.data_for(settings, problem, config.seed).train)
    networks = spirals.network_of(settings)
    layers = tuple(spirals.layers_of(settings))
    sees = _make_look(networks, layers, spirals.RECIPE, _Training.of(config))
    return _look(sees, config, problem, train)


class _Training(NamedTuple):
    """What training before the second look depends on."""

    num_envs: int
    epochs: int
    batch_size: int
    learning_rate: float

    @classmethod
    def of(cls, config: ImagesLookConfig | SpiralsLookConfig) -> _Training:
        return cls(*(getattr(config, field) for field in cls._fields))


def _look(
    sees: tuple[Any, Any, Any],
    config: ImagesLookConfig | SpiralsLookConfig,
    problem: str,
    train: Examples,
) -> Iterator[Row]:
    start, later, of_layers = sees
    model_key, order_key = jax.random.split(jax.random.key(config.seed))
    initial = start(model_key)
    trained = later(initial, train, order_key)
    for epochs, params in ((0, initial), (config.epochs, trained)):
        found = jax.device_get(of_layers(params, train))
        for layer, values in found.items():
            yield {"problem": problem, "epochs": epochs, "layer": layer} | {
                name: float(value) for name, value in values.items()
            }


@functools.lru_cache(maxsize=1)
def _make_look(
    networks: tuple[Any, Any],
    layers: tuple[str, ...],
    recipe: Recipe,
    training: _Training,
) -> tuple[Any, Any, Any]:
    """Compiled once for all shifts: initial weights, some epochs of averaging, and what
    the gradients of each layer show.
    """
    init, apply = networks
    loop = make_steps(
        TWO_CLASSES,
        apply,
        METHODS["averaging"],
        Setting(training.learning_rate, 0.0),
        training.num_envs,
        optax.constant_schedule(1.0),
        Whitening(damping=0.0, decay=0.0, every=1),  # averaging has no use for it
        recipe,
    )

    def later(params: Any, train: Examples, key: jax.Array) -> Any:
        sizes = training.epochs, training.batch_size
        return train_epochs(loop, params, train, key, *sizes)

    def env_loss(params: Any, env: Examples) -> jax.Array:
        return TWO_CLASSES.loss(apply(params, env.features), env.labels)

    def of_layers(params: Any, batch: Examples) -> dict[str, dict[str, jax.Array]]:
        grads = hardvary.env_grads(env_loss)(params, batch)
        return {layer: of_layer(part_of(grads, f"{layer}/")[0]) for layer in layers}

    return jax.jit(init), jax.jit(later), jax.jit(of_layers)


def of_layer(grads: Any) -> dict[str, jax.Array]:
    """Numbers of a layer's gradients, of which each is free of their size.

    Args:
      grads: a tree that `hardvary.disagreement` takes.

    Returns:
      shared: the squared length of the mean gradient over the mean squared length, 1
        where all environments agree and 1 / env where they have nothing in common.
      common: the share of the mean gradient that is the same in all environments.
      directions: how many directions carry 90 % of the disagreement.
      unanimous: directions along which all environments have the same sign.
      kept: the share of weights whose gradients have the same sign in all
        environments.
      spectrum_0 and so on: the share of the disagreement along each direction.
    """
    found = hardvary.disagreement(grads)
    square = jnp.sum(found.mean**2) + found.common
    total = jnp.sum(found.spectrum)
    shares = found.spectrum / jnp.where(total > 0, total, 1)
    before = jnp.cumsum(shares) - shares
    agreed = jax.tree.leaves(hardvary.mask(grads, 1.0))
    weights = sum(leaf.size for leaf in agreed)
    numbers = {
        "shared": square / (square + total),
        "common": found.common / square,
        "directions": jnp.sum((before < _MOST) & (shares > 0)),
        "unanimous": jnp.sum((found.agreement == 1) & (shares > 0)),
        "kept": sum(jnp.sum(leaf) for leaf in agreed) / weights,
    }
    return numbers | {
        f"spectrum_{index}": share for index, share in enumerate(jnp.unstack(shares))
    }


def format_look(rows: Sequence[Row]) -> str:
    """The table, without the spectra."""
    columns = {
        "problem": ("problem", "<15"),
        "epochs": ("epochs", ">6g"),
        "layer": ("layer", "<12"),
        "shared": ("shared", ">7.3f"),
        "common": ("common", ">7.3f"),
        "directions": ("directions", ">10g"),
        "unanimous": ("unanimous", ">9g"),
        "kept": ("kept", ">6.3f"),
    }
    return format_rows(columns, rows)


def format_look_markdown(rows: Sequence[Row]) -> str:
    """A line for each shift and layer, with both looks in a cell."""
    looks: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        looks.setdefault((row["problem"], row["layer"]), []).append(row)
    formats = {
        "shared": ".2f",
        "kept": ".2f",
        "common": ".2f",
        "directions": "g",
        "unanimous": "g",
    }
    lines = [
        "| shift | layer | " + " | ".join(formats) + " |",
        "|---" * (len(formats) + 2) + "|",
    ]
    for (problem, layer), own in looks.items():
        cells = [
            ", ".join(format(row[name], spec) for row in own)
            for name, spec in formats.items()
        ]
        titles = [problem.replace("_", " "), layer]
        lines.append("| " + " | ".join([*titles, *cells]) + " |")
    return "\n".join(lines)
