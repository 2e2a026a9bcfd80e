"""Training with every example its own environment, on the device for whole epochs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hardvary
from experiments.common.epochs import Metrics, State, Trainer, logits_of, make_epoch
from experiments.common.networks import BatchStats, Params, Variables
from experiments.vision.config import Settings, TrainConfig, shared_settings
from experiments.vision.data import DataError, Images, redraw_labels
from experiments.vision.model import (
    ENV_AXIS,
    LAYERS,
    NORMS,
    Architecture,
    init_variables,
    layer_of,
    make_apply,
    make_train_apply,
)

if TYPE_CHECKING:
    from experiments.common.run_dir import RunDir

METRICS = (
    "train_loss",
    "train_accuracy",
    "mislabelled_given_accuracy",
    "mislabelled_true_accuracy",
    "correct_accuracy",
    "test_loss",
    "test_accuracy",
    "running_loss",
    "learning_rate",
    "kept_fraction",
    *(f"kept_{layer}" for layer in (*LAYERS, NORMS)),
)
PROGRESS = {
    "loss": ("train_loss", ".3f"),
    "train": ("train_accuracy", ".1%"),
    "test": ("test_accuracy", ".1%"),
    "kept": ("kept_fraction", ".2%"),
}


class Examples(NamedTuple):
    """A split on the device.

    `images` uint8 [example, height, width, channel]; `given` are the labels that are
    trained on and `true` the true ones, int32 [example], equal in the test set.
    """

    images: jax.Array
    given: jax.Array
    true: jax.Array


class Dataset(NamedTuple):
    """The examples of a run, for training and evaluation."""

    train: Examples
    test: Examples


class Keys(NamedTuple):
    """One source of randomness for each purpose, all from one seed."""

    labels: jax.Array
    model: jax.Array
    batches: jax.Array


class Rates(NamedTuple):
    """Settings of an epoch that are no part of what is compiled, float32 scalars.

    Plain training does not look at the threshold.
    """

    threshold: jax.Array
    learning_rate: jax.Array


class Kept(NamedTuple):
    """Share of the components that passed the mask: of all, and of each layer's."""

    overall: jax.Array
    layers: dict[str, jax.Array]


class Step(NamedTuple):
    """The report of a step."""

    loss: jax.Array
    kept: Kept


def make_keys(seed: int) -> Keys:
    """Independent keys for redrawn labels, initial weights and batches."""
    key = jax.random.key(seed)
    return Keys(*(jax.random.fold_in(key, purpose) for purpose in range(3)))


def dataset_for(config: TrainConfig, images: Images) -> Dataset:
    """The examples of a run, on the device, with its labels.

    Raises:
      DataError: they do not fill one batch.
    """
    count = len(images.train.labels)
    if config.batch_size > count:
        raise DataError(
            f"batch_size must be at most {count}, as {config.dataset} has no more "
            f"training examples, got {config.batch_size}"
        )
    train, test = (
        Examples(jnp.asarray(split.images), labels, labels)
        for split in images
        for labels in (jnp.asarray(split.labels),)
    )
    key = make_keys(config.seed).labels
    given, _ = redraw_labels(key, train.true, config.redrawn)
    return Dataset(train._replace(given=given), test)


def architecture_for(config: Settings, channels: int) -> Architecture:
    """The network of a config for images with so many channels."""
    return Architecture(channels, config.width, config.norm)


def make_optimizer(config: Settings) -> optax.GradientTransformation:
    """From the aggregated gradient to a direction: decay and Adam's moments.

    The learning rate is no part of it, so that runs may share what is compiled.
    """
    decay = optax.add_decayed_weights(config.weight_decay)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.decay_order == "coupled":
        return optax.chain(decay, adam)
    return optax.chain(adam, decay)


class Gradients(NamedTuple):
    """Losses and gradients of a step's examples.

    `losses` [example]; `gradients` is a tree like the parameters, with a `GradStats` at
    every leaf if the examples are to vote.
    """

    losses: jax.Array
    gradients: Any
    batch_stats: BatchStats


# (variables, images [example, height, width, channel], labels [example]) to gradients.
GradientsFn = Callable[[Variables, jax.Array, jax.Array], Gradients]


def make_plain_gradients(config: Settings, channels: int) -> GradientsFn:
    """The gradient of the mean loss; a plain training step."""
    losses_of = _batch_losses(config, channels)

    def plain(variables: Variables, images: jax.Array, labels: jax.Array) -> Gradients:
        def loss_fn(params: Params) -> tuple[jax.Array, tuple[jax.Array, BatchStats]]:
            losses, batch_stats = losses_of(
                params, variables.batch_stats, images, labels
            )
            return losses.mean(), (losses, batch_stats)

        grads, (losses, batch_stats) = jax.grad(loss_fn, has_aux=True)(variables.params)
        return Gradients(losses, grads, batch_stats)

    return plain


def make_voting_gradients(config: Settings, channels: int) -> GradientsFn:
    """Mean and votes of the gradients of all examples, a tree of `GradStats`."""
    if config.norm == "batch" and config.batch_norm == "coupled":
        return _make_coupled_gradients(config, channels)
    shared = config.norm == "batch"
    axis_name = ENV_AXIS if shared else None
    apply = make_train_apply(architecture_for(config, channels), axis_name)

    def loss_fn(
        params: Params,
        example: tuple[jax.Array, jax.Array],
        *,
        batch_stats: BatchStats,
    ) -> tuple[jax.Array, BatchStats]:
        image, label = example
        logits, batch_stats = apply(Variables(params, batch_stats), image[None])
        return _cross_entropy(logits, label[None])[0], batch_stats

    oracle = hardvary.value_and_grad_stats(
        loss_fn,
        method=config.oracle,
        has_aux=True,
        in_axes={"batch_stats": None},
        env_axis_name=axis_name,
    )

    def path(variables: Variables, images: jax.Array, labels: jax.Array) -> Gradients:
        params, batch_stats = variables
        (losses, batch_stats), stats = oracle(
            params, (images, labels), batch_stats=batch_stats
        )
        # Taken over all examples together, so the same for each of them.
        batch_stats = jax.tree.map(lambda leaf: leaf[0], batch_stats)
        return Gradients(losses, stats, batch_stats)

    return path


def _make_coupled_gradients(config: Settings, channels: int) -> GradientsFn:
    oracle = hardvary.value_and_env_grads_of_losses(
        _batch_losses(config, channels),
        has_aux=True,
        microbatch_size=config.microbatch_size,
    )

    def coupled(
        variables: Variables, images: jax.Array, labels: jax.Array
    ) -> Gradients:
        (losses, batch_stats), grads = oracle(*variables, images, labels)
        # Whoever compiles this function on its own gets arrays only.
        stats = jax.tree.map(lambda grad: grad.stats(), grads)
        return Gradients(losses, stats, batch_stats)

    return coupled


def _batch_losses(
    config: Settings, channels: int
) -> Callable[..., tuple[jax.Array, BatchStats]]:
    """`(params, batch_stats, images, labels)` to losses [example] and batch_stats."""
    apply = make_train_apply(architecture_for(config, channels))

    def losses_of(
        params: Params, batch_stats: BatchStats, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, BatchStats]:
        logits, batch_stats = apply(Variables(params, batch_stats), images)
        return _cross_entropy(logits, labels), batch_stats

    return losses_of


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def apply_mask(
    config: Settings, threshold: jax.Array, stats: Any
) -> tuple[Params, Kept]:
    """The AND-mask, and what it keeps of each layer.

    Weight tensors are layers of their own; scales and offsets of the norms are
    counted together.

    Args:
      config: says whether to rescale.
      threshold: of the mask.
      stats: a tree like the parameters, of `GradStats`.
    """
    aggregator = hardvary.and_mask(
        threshold, rescale=config.rescale, max_rescale=config.max_rescale
    )
    updates, state = aggregator.update(stats, aggregator.init(None))
    kept = dict.fromkeys((*LAYERS, NORMS), jnp.float32(0))
    sizes = dict.fromkeys(kept, 0)
    mask = hardvary.mask(stats, threshold)
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        layer = layer_of(path)
        kept[layer] += jnp.sum(leaf, dtype=jnp.float32)
        sizes[layer] += leaf.size
    layers = {name: kept[name] / sizes[name] for name in kept}
    return updates, Kept(state.kept_fraction, layers)


def _keep_all(grads: Params) -> tuple[Params, Kept]:
    one = jnp.float32(1)
    return grads, Kept(one, dict.fromkeys((*LAYERS, NORMS), one))


def make_trainer(
    config: TrainConfig, channels: int, in_one_piece: bool | None = None
) -> Trainer:
    """The functions that train `config`, compiled once for all its seeds and rates.

    Args:
      config: what to train. A threshold of 0 is plain training, at its cost.
      channels: of the images.
      in_one_piece: see `experiments.common.epochs.make_epoch`.
    """
    elsewhere = {"epochs": 1, "drops": (), "checkpoint_every": 1}
    settings = Settings(**{**shared_settings(config), **elsewhere})
    return _make_trainer(settings, channels, config.threshold > 0, in_one_piece)


# Apart, because training with and without the mask have it in common.
@functools.lru_cache(maxsize=16)
def _make_init(config: Settings, channels: int) -> Callable[[jax.Array], State]:
    optimizer, architecture = make_optimizer(config), architecture_for(config, channels)

    @jax.jit
    def init(key: jax.Array) -> State:
        variables = init_variables(key, architecture)
        return State(variables, optimizer.init(variables.params))

    return init


@functools.lru_cache(maxsize=16)
def _make_trainer(
    config: Settings, channels: int, masked: bool, in_one_piece: bool | None
) -> Trainer:
    optimizer = make_optimizer(config)
    make_gradients = make_voting_gradients if masked else make_plain_gradients
    gradients_of = make_gradients(config, channels)
    architecture = architecture_for(config, channels)

    def step(
        state: State, dataset: Dataset, rows: jax.Array, rates: Rates
    ) -> tuple[State, Step]:
        """One step on the examples `rows`."""
        (params, _), opt_state = state
        images, labels = dataset.train.images[rows], dataset.train.given[rows]
        losses, grads, batch_stats = gradients_of(state.variables, images, labels)
        if masked:
            grads, kept = apply_mask(config, rates.threshold, grads)
        else:
            grads, kept = _keep_all(grads)
        direction, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(
            lambda param, leaf: param - rates.learning_rate * leaf, params, direction
        )
        state = State(Variables(params, batch_stats), opt_state)
        return state, Step(losses.mean(), kept)

    def order_of(dataset: Dataset, key: jax.Array, index: jax.Array) -> jax.Array:
        examples = len(dataset.train.given)
        key = jax.random.fold_in(key, index)
        return epoch_order(key, examples, config.batch_size)

    def end(state: State, dataset: Dataset, steps: Step, rates: Rates) -> Metrics:
        """The metrics of an epoch, from what its steps report."""
        mean = jax.tree.map(jnp.mean, steps)
        return {
            **evaluate(architecture, state.variables, dataset),
            "running_loss": mean.loss,
            "learning_rate": rates.learning_rate,
            "kept_fraction": mean.kept.overall,
            **{f"kept_{layer}": share for layer, share in mean.kept.layers.items()},
        }

    return Trainer(
        _make_init(config, channels), make_epoch(order_of, step, end, in_one_piece)
    )


def rates_at(config: TrainConfig, index: int) -> Rates:
    """The rates of epoch `index` (from 0): a tenth of the learning rate each drop."""
    dropped = sum(index >= drop for drop in config.drops)
    rate = config.learning_rate * 0.1**dropped
    return Rates(jnp.float32(config.threshold), jnp.float32(rate))


def epoch_order(key: jax.Array, examples: int, batch_size: int) -> jax.Array:
    """Indices [step, batch_size] of one epoch; an incomplete last batch is dropped."""
    steps = examples // batch_size
    order = jax.random.permutation(key, examples)
    return order[: steps * batch_size].reshape(steps, batch_size)


def evaluate(
    architecture: Architecture, variables: Variables, dataset: Dataset
) -> Metrics:
    """Losses and accuracies in evaluation mode, on all examples.

    Where nothing is mislabelled, the accuracies on that part are NaN.
    """
    apply = make_apply(architecture)

    train, test = dataset
    logits, test_logits = (
        logits_of(apply, variables, split.images) for split in dataset
    )
    predicted, test_predicted = logits.argmax(-1), test_logits.argmax(-1)
    mislabelled = train.given != train.true

    def accuracy(labels: jax.Array, where: jax.Array | None = None) -> jax.Array:
        return jnp.mean(predicted == labels, where=where)

    return {
        "train_loss": _cross_entropy(logits, train.given).mean(),
        "train_accuracy": accuracy(train.given),
        "mislabelled_given_accuracy": accuracy(train.given, mislabelled),
        "mislabelled_true_accuracy": accuracy(train.true, mislabelled),
        "correct_accuracy": accuracy(train.true, ~mislabelled),
        "test_loss": _cross_entropy(test_logits, test.true).mean(),
        "test_accuracy": jnp.mean(test_predicted == test.true),
    }


def train(
    config: TrainConfig, run: RunDir, images: Images, *, quiet: bool = False
) -> list[dict[str, float]]:
    """Trains to the end, from the start or from the run's last checkpoint.

    Args:
      config: what to train.
      run: where the checkpoints and metrics go.
      images: the dataset of `config`, from the caller because runs share it.
      quiet: without a progress bar.

    Returns:
      The metrics of every epoch.
    """
    # Here, so that the functions above do without Orbax and tqdm.
    from experiments.common.training import run_epochs

    trainer = make_trainer(config, images.train.images.shape[-1])
    dataset, keys = dataset_for(config, images), make_keys(config.seed)

    def epoch_fn(state: State, index: int) -> tuple[State, Metrics]:
        rates = rates_at(config, index)
        return trainer.epoch(state, dataset, keys.batches, index, rates)

    _, history = run_epochs(
        run,
        epoch_fn,
        trainer.init(keys.model),
        config.epochs,
        metrics=METRICS,
        checkpoint_every=config.checkpoint_every,
        progress=None if quiet else PROGRESS,
        title=config.name,
    )
    return history
