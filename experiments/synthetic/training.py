"""Training on the synthetic data: one compiled function per epoch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hardvary
from experiments.common.run_dir import RunDir
from experiments.common.training import run_epochs
from experiments.synthetic.config import Settings, TrainConfig
from experiments.synthetic.data import MECHANISM_DIMS, Dataset, Split, make_dataset
from experiments.synthetic.model import Apply, Params, init_params, make_apply

METRICS = (
    "loss",
    "train_accuracy",
    "validation_accuracy",
    "validation_loss",
    "held_out_accuracy",
    "test_accuracy",
    "kept_fraction",
    "learning_rate",
)
PROGRESS = {
    "loss": ("loss", ".3f"),
    "train": ("train_accuracy", ".1%"),
    "o.o.d. test": ("test_accuracy", ".1%"),
    "kept": ("kept_fraction", ".2%"),
}


# Training examples of each environment that train_accuracy is taken over: all of them
# would cost a quarter of an epoch.
EVALUATED = 128


class State(NamedTuple):
    """What training carries from step to step."""

    params: Params
    opt_state: optax.OptState


class Keys(NamedTuple):
    """One source of randomness for each purpose, all from one seed."""

    data: jax.Array
    model: jax.Array
    batches: jax.Array


class Trainer(NamedTuple):
    """The compiled functions of one setting; seeds share them.

    `init(keys)` gives the initial state and `epoch(state, dataset, key, index)`
    the state after one more epoch and its metrics.
    """

    init: Callable[[Keys], State]
    epoch: Callable[[State, Dataset, jax.Array, int], tuple[State, dict[str, Any]]]


def make_keys(seed: int) -> Keys:
    """Independent keys for the data, the initial weights and the batches."""
    key = jax.random.key(seed)
    return Keys(*(jax.random.fold_in(key, purpose) for purpose in range(3)))


def dataset_for(config: Settings, seed: int) -> Dataset:
    """The dataset that a config and a seed describe."""
    return make_dataset(
        make_keys(seed).data,
        config.num_envs,
        config.examples_per_env,
        config.shortcut_dims,
        config.shortcut_std,
        config.revolutions,
    )


def apply_for(config: Settings) -> Apply:
    """The pure forward function of a config's model."""
    inputs = MECHANISM_DIMS + config.shortcut_dims
    return make_apply(inputs, config.hidden_units, config.hidden_layers)


def make_schedule(config: Settings) -> optax.Schedule:
    """Learning rate as a function of the step."""
    steps = config.epochs * config.steps_per_epoch
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, steps)
    if config.schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    drops = {steps // 2: 0.1, steps * 3 // 4: 0.1}
    return optax.piecewise_constant_schedule(config.learning_rate, drops)


def make_aggregator(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """The step from per-environment gradients to one; all that methods differ in."""
    if config.method == "erm":
        # Nothing is masked at threshold 0: this is the mean of the gradients.
        return hardvary.and_mask(threshold=0.0)
    aggregators = {
        "and_mask": hardvary.and_mask,
        "geometric_mean": hardvary.geometric_mean,
    }
    return aggregators[config.method](
        threshold=config.threshold,
        rescale=config.rescale,
        max_rescale=config.max_rescale,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Aggregator, then decay, moments and learning rate."""
    parts = [make_aggregator(config)]
    if config.l2:
        parts.append(optax.add_decayed_weights(config.l2))
    if config.l1:
        parts.append(hardvary.add_l1_decay(config.l1))
    if config.optimizer == "adam":
        parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    else:
        parts.append(optax.trace(decay=0.9))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    parts.append(optax.scale_by_learning_rate(make_schedule(config)))
    return optax.chain(*parts)


def make_trainer(config: TrainConfig) -> Trainer:
    """The functions that train `config`, compiled once for all seeds."""
    return _make_trainer(dataclasses.replace(config, seed=0, checkpoint_every=1))


@functools.lru_cache(maxsize=16)
def _make_trainer(config: TrainConfig) -> Trainer:
    apply = apply_for(config)
    optimizer = make_optimizer(config)
    schedule = make_schedule(config)
    inputs = MECHANISM_DIMS + config.shortcut_dims

    def loss_fn(params: Params, batch: Split) -> jax.Array:
        logits = apply(params, batch.features)
        return optax.sigmoid_binary_cross_entropy(logits, batch.labels).mean()

    log_abs = ("log_abs",) if config.method == "geometric_mean" else ()
    gradients = hardvary.value_and_grad_stats(
        loss_fn,
        stats=("mean", "sign", *log_abs),
        method=config.oracle,
        microbatch_size=config.microbatch_size if config.oracle == "scan" else None,
    )

    def evaluate(params: Params, split: Split) -> tuple[jax.Array, jax.Array]:
        """Accuracy and mean loss."""
        logits = apply(params, split.features)
        losses = optax.sigmoid_binary_cross_entropy(logits, split.labels)
        return jnp.mean((logits > 0) == (split.labels > 0.5)), losses.mean()

    @jax.jit
    def init(keys: Keys) -> State:
        params = init_params(
            keys.model, inputs, config.hidden_units, config.hidden_layers
        )
        return State(params, optimizer.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(
        state: State, dataset: Dataset, key: jax.Array, index: int
    ) -> tuple[State, dict[str, Any]]:
        def step(state: State, rows: jax.Array) -> tuple[State, tuple[jax.Array, ...]]:
            batch = jax.vmap(_take)(dataset.train, rows)
            losses, stats = gradients(state.params, batch)
            updates, opt_state = optimizer.update(stats, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            kept = optax.tree.get(opt_state, "kept_fraction")
            return State(params, opt_state), (losses.mean(), kept)

        rows = epoch_order(jax.random.fold_in(key, index), config)
        state, (losses, kept) = jax.lax.scan(step, state, rows)
        evaluated = jax.tree.map(lambda leaf: leaf[:, :EVALUATED], dataset.train)
        train_accuracy, _ = evaluate(state.params, evaluated)
        validation_accuracy, validation_loss = evaluate(
            state.params, dataset.validation
        )
        held_out_accuracy, _ = evaluate(state.params, dataset.held_out)
        test_accuracy, _ = evaluate(state.params, dataset.test)
        metrics = {
            "loss": losses.mean(),
            "train_accuracy": train_accuracy,
            "validation_accuracy": validation_accuracy,
            "validation_loss": validation_loss,
            "held_out_accuracy": held_out_accuracy,
            "test_accuracy": test_accuracy,
            "kept_fraction": kept.mean(),
            "learning_rate": schedule(index * config.steps_per_epoch),
        }
        return state, metrics

    return Trainer(init, epoch)


def epoch_order(key: jax.Array, config: Settings) -> jax.Array:
    """Example indices [step, env, batch_size] of one epoch.

    Every environment is shuffled on its own; an incomplete last batch is dropped.
    """
    keys = jax.random.split(key, config.num_envs)
    examples = config.examples_per_env
    order = jax.vmap(lambda key: jax.random.permutation(key, examples))(keys)
    order = order[:, : config.steps_per_epoch * config.batch_size]
    batches = order.reshape(config.num_envs, config.steps_per_epoch, config.batch_size)
    return batches.swapaxes(0, 1)


def _take(split: Split, rows: jax.Array) -> Split:
    return Split(split.features[rows], split.labels[rows])


def train(
    config: TrainConfig, run: RunDir, dataset: Dataset, *, quiet: bool = False
) -> tuple[Params, list[dict[str, float]]]:
    """Trains to the end, from the start or from the run's last checkpoint.

    Args:
      config: what to train.
      run: where the checkpoints and metrics go.
      dataset: `dataset_for(config, config.seed)`, from the caller because several
        methods may share it.
      quiet: without a progress bar.

    Returns:
      The final parameters, and the metrics of every epoch.
    """
    trainer = make_trainer(config)
    keys = make_keys(config.seed)

    def epoch_fn(state: State, index: int) -> tuple[State, dict[str, Any]]:
        state, metrics = trainer.epoch(state, dataset, keys.batches, index)
        # jit sorts the keys of dictionaries; the columns of metrics.csv keep ours.
        return state, {name: metrics[name] for name in METRICS}

    state, history = run_epochs(
        run,
        epoch_fn,
        trainer.init(keys),
        config.epochs,
        checkpoint_every=config.checkpoint_every,
        progress=None if quiet else PROGRESS,
        title=config.method,
    )
    return state.params, history
