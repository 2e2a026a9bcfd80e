"""Training on the synthetic data: one compiled function per epoch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hardvary
from experiments.common.networks import BatchStats, Params, Variables
from experiments.common.run_dir import RunDir
from experiments.common.training import run_epochs
from experiments.synthetic.aggregators import AGGREGATE
from experiments.synthetic.config import Settings, TrainConfig
from experiments.synthetic.data import MECHANISM_DIMS, Dataset, Split, make_dataset
from experiments.synthetic.model import (
    ENV_AXIS,
    Apply,
    Architecture,
    Outputs,
    init_variables,
    make_apply,
    make_train_apply,
)
from experiments.synthetic.placement import mask_update, per_env

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
# Training accuracy above which a network has fitted its data.
FITTED = 0.995


class State(NamedTuple):
    """All that training carries from step to step.

    `log_weights` [env] of the environments are group DRO's, and stay 0 in the other
    methods. As logarithms none of them gets lost for good.
    """

    variables: Variables
    opt_state: optax.OptState
    log_weights: jax.Array


class EnvBatch(NamedTuple):
    """One step's examples; every leaf is [env, ...]."""

    features: jax.Array
    labels: jax.Array
    env: jax.Array
    dropout_key: jax.Array


class StepInputs(NamedTuple):
    """What a step takes: rows [env, batch_size] of the training split, and a key."""

    rows: jax.Array
    dropout_key: jax.Array


class Aux(NamedTuple):
    """Reports of a loss beside the objective."""

    cross_entropy: jax.Array
    batch_stats: BatchStats


class Keys(NamedTuple):
    """One source of randomness for each purpose, all from one seed."""

    data: jax.Array
    model: jax.Array
    batches: jax.Array
    dropout: jax.Array
    draws: jax.Array


class Trainer(NamedTuple):
    """The compiled functions of one setting; seeds share them.

    `init(keys)` gives the initial state and `epoch(state, dataset, keys, index)`
    the state after one more epoch and its metrics.
    """

    init: Callable[[Keys], State]
    epoch: Callable[[State, Dataset, Keys, int], tuple[State, dict[str, Any]]]


def make_keys(seed: int) -> Keys:
    """Independent keys for data, initial weights, batches, dropout and random rules."""
    key = jax.random.key(seed)
    return Keys(*(jax.random.fold_in(key, purpose) for purpose in range(5)))


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


def architecture_for(config: TrainConfig) -> Architecture:
    """The network of a config."""
    return Architecture(
        MECHANISM_DIMS + config.shortcut_dims,
        config.hidden_units,
        config.hidden_layers,
        config.batch_norm,
        config.dropout,
        config.num_envs if config.method == "dann" else None,
    )


def apply_for(config: TrainConfig) -> Apply:
    """The pure forward function of a config's network, as in evaluation."""
    return make_apply(architecture_for(config))


def make_schedule(config: Settings) -> optax.Schedule:
    """Learning rate as a function of the step."""
    steps = config.epochs * config.steps_per_epoch
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, steps)
    if config.schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    drops = {steps // 2: 0.1, steps * 3 // 4: 0.1}
    return optax.piecewise_constant_schedule(config.learning_rate, drops)


def make_optimizer(
    config: TrainConfig, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Aggregator if any, then decay, moments and learning rate.

    Args:
      config: what to train.
      key: what a rule that is random draws from.
    """
    aggregate: list[optax.GradientTransformation] = []
    if config.method in AGGREGATE:
        aggregate.append(AGGREGATE[config.method].make(config, key))
    decay: list[optax.GradientTransformation] = []
    if config.l2:
        decay.append(optax.add_decayed_weights(config.l2))
    if config.l1:
        decay.append(hardvary.add_l1_decay(config.l1))
    if config.optimizer == "adam":
        moments = optax.scale_by_adam(config.b1, config.b2, config.eps)
    else:
        moments = optax.trace(decay=0.9)
    parts = [*aggregate, *decay, moments]
    if config.placement == "moments":
        first = per_env(optax.ema(config.b1), config.num_envs)
        second = optax.scale_by_adam(0.0, config.b2, config.eps)
        parts = [first, *aggregate, *decay, second]
    elif config.placement == "update":
        parts = [mask_update(optax.chain(*decay, moments), config.threshold)]
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    parts.append(optax.scale_by_learning_rate(make_schedule(config)))
    return optax.chain(*parts)


# (state, batch, penalty weight) to what the optimizer gets, the losses' reports with a
# leading axis [env], and the new log-weights of the environments.
Gradients = Callable[[State, EnvBatch, jax.Array], tuple[Any, Aux, jax.Array]]


def make_env_loss(config: TrainConfig) -> Callable[..., tuple[jax.Array, Aux]]:
    """The objective of one environment: `(params, batch, *, batch_stats,
    penalty_weight)` to a scalar and what it reports.
    """
    apply = make_train_apply(architecture_for(config))

    def env_loss(
        params: Params,
        batch: EnvBatch,
        *,
        batch_stats: BatchStats,
        penalty_weight: jax.Array,
    ) -> tuple[jax.Array, Aux]:
        outputs, batch_stats = apply(
            Variables(params, batch_stats),
            batch.features,
            batch.dropout_key,
            config.reversal_scale,
        )
        objective, loss = _env_objective(config, outputs, batch, penalty_weight)
        return objective, Aux(loss, batch_stats)

    return env_loss


def _env_objective(
    config: TrainConfig, outputs: Outputs, batch: EnvBatch, penalty_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Objective and cross-entropy of one environment, from what the network says."""
    logits = outputs.logits
    loss = optax.sigmoid_binary_cross_entropy(logits, batch.labels).mean()
    objective = loss
    if config.method == "irm":
        penalty = hardvary.objectives.irm_penalty(logits, batch.labels)
        objective = _penalized(loss, penalty, penalty_weight)
    if outputs.domain_logits is not None:
        objective = loss + domain_loss(outputs.domain_logits, batch.env)
    return objective, loss


def domain_loss(domain_logits: jax.Array, env: jax.Array) -> jax.Array:
    """Mean cross-entropy of telling the environment `env` from [..., env] logits."""
    return -jax.nn.log_softmax(domain_logits)[..., env].mean()


def _penalized(
    loss: jax.Array, penalty: jax.Array, penalty_weight: jax.Array
) -> jax.Array:
    # Scaled so that the gradient stays in range whatever the weight, as the authors of
    # IRM and V-REx do.
    return (loss + penalty_weight * penalty) / jnp.maximum(penalty_weight, 1.0)


def make_env_losses(config: TrainConfig) -> Callable[..., tuple[jax.Array, Aux]]:
    """`make_env_loss` of all environments: all that it takes of a batch and all that it
    returns has a leading axis [env].
    """
    if config.batch_norm or config.dropout:
        # Batch norm wants the axis, and dropout each environment's own key.
        env_loss = make_env_loss(config)

        def env_by_env(params: Params, batch: EnvBatch, **shared: Any) -> Any:
            loss_fn = functools.partial(env_loss, **shared)
            mapped = jax.vmap(loss_fn, (None, 0), axis_name=ENV_AXIS)
            return mapped(params, batch)

        return env_by_env
    apply = make_train_apply(architecture_for(config))

    def in_one_batch(
        params: Params,
        batch: EnvBatch,
        *,
        batch_stats: BatchStats,
        penalty_weight: jax.Array,
    ) -> tuple[jax.Array, Aux]:
        # Mapped over environments, the gradient of a kernel is a sum over two axes, and
        # XLA on CPU transposes what is summed first: a sixth of an epoch.
        shape = batch.labels.shape
        outputs, batch_stats = apply(
            Variables(params, batch_stats),
            batch.features.reshape(math.prod(shape), -1),
            batch.dropout_key[0],
            config.reversal_scale,
        )
        outputs = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), outputs)
        objective = functools.partial(_env_objective, config)
        objectives, losses = jax.vmap(objective, (0, 0, None))(
            outputs, batch, penalty_weight
        )
        return objectives, Aux(losses, batch_stats)

    return in_one_batch


def make_oracle(
    config: TrainConfig, env_loss: Callable[..., tuple[jax.Array, Aux]]
) -> Callable[..., Any]:
    """What an aggregator reads, in the form that its rule and `config.oracle` ask for.

    Returns:
      A function with the arguments of `env_loss` that returns `((losses, aux),
      gradients)`, losses and aux with a leading axis [env].
    """
    stats = AGGREGATE[config.method].stats
    axis = ENV_AXIS if config.batch_norm else None
    in_axes = {"batch_stats": None, "penalty_weight": None}
    if stats and config.placement != "moments":
        return hardvary.value_and_grad_stats(
            env_loss,
            stats=stats,
            method=config.oracle,
            microbatch_size=config.microbatch_size if config.oracle == "scan" else None,
            has_aux=True,
            in_axes=in_axes,
            env_axis_name=axis,
        )
    if config.oracle == "fused":
        return hardvary.value_and_env_grads(
            env_loss, has_aux=True, in_axes=in_axes, env_axis_name=axis
        )

    def stacked(params: Params, batch: EnvBatch, **shared: Any) -> Any:
        loss_fn = functools.partial(env_loss, **shared)
        with_grads = jax.value_and_grad(loss_fn, has_aux=True)
        return jax.vmap(with_grads, (None, 0), axis_name=ENV_AXIS)(params, batch)

    return stacked


def make_gradients(config: TrainConfig) -> Gradients:
    """The gradient of a step: of each environment for aggregators, else of the sum."""
    if config.method in AGGREGATE:
        oracle = make_oracle(config, make_env_loss(config))

        def aggregated(
            state: State, batch: EnvBatch, penalty_weight: jax.Array
        ) -> tuple[Any, Aux, jax.Array]:
            (_, aux), grads = oracle(
                state.variables.params,
                batch,
                batch_stats=state.variables.batch_stats,
                penalty_weight=penalty_weight,
            )
            return grads, aux, state.log_weights

        return aggregated

    env_losses = make_env_losses(config)

    def objective(
        params: Params, state: State, batch: EnvBatch, penalty_weight: jax.Array
    ) -> tuple[jax.Array, tuple[Aux, jax.Array]]:
        losses, aux = env_losses(
            params,
            batch,
            batch_stats=state.variables.batch_stats,
            penalty_weight=penalty_weight,
        )
        log_weights, total = state.log_weights, losses.mean()
        if config.method == "vrex":
            penalty = hardvary.objectives.vrex_penalty(losses)
            total = _penalized(total, penalty, penalty_weight)
        if config.method == "group_dro":
            step = config.dro_step_size * jax.lax.stop_gradient(losses)
            log_weights = jax.nn.log_softmax(log_weights + step)
            total = jnp.exp(log_weights) @ losses
        return total, (aux, log_weights)

    def plain(
        state: State, batch: EnvBatch, penalty_weight: jax.Array
    ) -> tuple[Any, Aux, jax.Array]:
        grads, (aux, log_weights) = jax.grad(objective, has_aux=True)(
            state.variables.params, state, batch, penalty_weight
        )
        return grads, aux, log_weights

    return plain


def make_trainer(config: TrainConfig) -> Trainer:
    """The functions that train `config`, compiled once for all seeds."""
    return _make_trainer(dataclasses.replace(config, seed=0, checkpoint_every=1))


class Parts(NamedTuple):
    """What an epoch consists of, as pure functions that nothing has compiled.

    `order(keys, index)` gives the inputs of an epoch's steps, [step, ...];
    `batch(dataset, inputs)` the examples of one step's inputs; `gradients(state, batch,
    penalty_weight)` what the optimizer gets; `step(state, dataset, keys,
    penalty_weight, inputs)` the state after one step, its loss and the fraction kept;
    `evaluate(variables, dataset)` the metrics of the splits.
    """

    order: Callable[[Keys, int], StepInputs]
    batch: Callable[[Dataset, StepInputs], EnvBatch]
    gradients: Gradients
    step: Callable[..., tuple[State, tuple[jax.Array, jax.Array]]]
    evaluate: Callable[[Variables, Dataset], dict[str, jax.Array]]


def make_parts(config: TrainConfig) -> Parts:
    """What an epoch of `config` consists of."""
    apply = apply_for(config)
    gradients = make_gradients(config)
    envs = jnp.arange(config.num_envs)

    def order(keys: Keys, index: int) -> StepInputs:
        rows = epoch_order(jax.random.fold_in(keys.batches, index), config)
        key = jax.random.fold_in(keys.dropout, index)
        return StepInputs(rows, jax.random.split(key, config.steps_per_epoch))

    def batch(dataset: Dataset, inputs: StepInputs) -> EnvBatch:
        split = jax.vmap(_take)(dataset.train, inputs.rows)
        dropout_keys = jax.random.split(inputs.dropout_key, config.num_envs)
        return EnvBatch(*split, envs, dropout_keys)

    def step(
        state: State,
        dataset: Dataset,
        keys: Keys,
        penalty_weight: jax.Array,
        inputs: StepInputs,
    ) -> tuple[State, tuple[jax.Array, jax.Array]]:
        optimizer = make_optimizer(config, keys.draws)
        grads, aux, log_weights = gradients(
            state, batch(dataset, inputs), penalty_weight
        )
        params, _ = state.variables
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        # Taken over all environments together, so the same in each of them.
        batch_stats = jax.tree.map(lambda leaf: leaf[0], aux.batch_stats)
        variables = Variables(optax.apply_updates(params, updates), batch_stats)
        kept = optax.tree.get(opt_state, "kept_fraction", jnp.float32(1))
        state = State(variables, opt_state, log_weights)
        return state, (aux.cross_entropy.mean(), kept)

    def evaluate(variables: Variables, dataset: Dataset) -> dict[str, jax.Array]:
        evaluated = jax.tree.map(lambda leaf: leaf[:, :EVALUATED], dataset.train)
        splits = dataset._replace(train=evaluated)
        # In one batch: the network is compiled once, not for each split.
        rows = [x.features.reshape(x.labels.size, -1) for x in splits]
        logits = apply(variables, jnp.concatenate(rows))
        ends = itertools.accumulate(len(part) for part in rows)
        parts = jnp.split(logits, list(ends)[:-1])
        metrics: dict[str, jax.Array] = {}
        for name, split, part in zip(Dataset._fields, splits, parts, strict=True):
            part = part.reshape(split.labels.shape)
            metrics[f"{name}_accuracy"] = jnp.mean((part > 0) == (split.labels > 0.5))
            if name == "validation":
                losses = optax.sigmoid_binary_cross_entropy(part, split.labels)
                metrics["validation_loss"] = losses.mean()
        return metrics

    return Parts(order, batch, gradients, step, evaluate)


@functools.lru_cache(maxsize=16)
def _make_trainer(config: TrainConfig) -> Trainer:
    schedule = make_schedule(config)
    parts = make_parts(config)

    @jax.jit
    def init(keys: Keys) -> State:
        variables = init_variables(keys.model, architecture_for(config))
        log_weights = jnp.zeros(config.num_envs)
        optimizer = make_optimizer(config, keys.draws)
        return State(variables, optimizer.init(variables.params), log_weights)

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(
        state: State, dataset: Dataset, keys: Keys, index: int
    ) -> tuple[State, dict[str, Any]]:
        annealing = index < config.penalty_annealing
        penalty_weight = jnp.where(
            annealing, min(1.0, config.penalty_weight), config.penalty_weight
        )
        state, (losses, kept) = jax.lax.scan(
            lambda state, inputs: parts.step(
                state, dataset, keys, penalty_weight, inputs
            ),
            state,
            parts.order(keys, index),
        )
        metrics = {
            "loss": losses.mean(),
            **parts.evaluate(state.variables, dataset),
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
) -> tuple[Variables, list[dict[str, float]]]:
    """Trains to the end, from the start or from the run's last checkpoint.

    Args:
      config: what to train.
      run: where the checkpoints and metrics go.
      dataset: `dataset_for(config, config.seed)`, from the caller because several
        methods may share it.
      quiet: without a progress bar.

    Returns:
      The final network, and the metrics of every epoch.
    """
    trainer = make_trainer(config)
    keys = make_keys(config.seed)

    state, history = run_epochs(
        run,
        lambda state, index: trainer.epoch(state, dataset, keys, index),
        trainer.init(keys),
        config.epochs,
        metrics=METRICS,
        checkpoint_every=config.checkpoint_every,
        progress=None if quiet else PROGRESS,
        title=config.method,
        done=functools.partial(fitted, num_epochs=config.fitted_epochs),
    )
    return state.variables, history


def fitted(history: Sequence[Mapping[str, float]], num_epochs: int) -> bool:
    """Whether a training ends since its last `num_epochs` have fitted the data.

    Args:
      history: metrics of all epochs.
      num_epochs: 0 for never.
    """
    if not 0 < num_epochs <= len(history):
        return False
    return all(row["train_accuracy"] > FITTED for row in history[-num_epochs:])
