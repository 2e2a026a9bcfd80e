"""Behavioural cloning with one level in a batch, on the device for whole epochs."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hardvary
from experiments.coinrun.dataset import DataError, Dataset, States
from experiments.coinrun.game import NUM_ACTIONS
from experiments.coinrun.student.config import (
    Method,
    Settings,
    TrainConfig,
)
from experiments.coinrun.student.resnet import (
    Architecture,
    init_variables,
    make_apply,
    make_train_apply,
)
from experiments.common.epochs import Metrics, State, Trainer, logits_of, make_epoch
from experiments.common.networks import Variables

if TYPE_CHECKING:
    from experiments.common.run_dir import RunDir

METRICS = (
    "train_kl",
    "test_kl",
    "train_accuracy",
    "test_accuracy",
    "running_kl",
    "learning_rate",
    "open_fraction",
)
PROGRESS = {
    "train": ("train_kl", ".4f"),
    "test": ("test_kl", ".4f"),
    "open": ("open_fraction", ".1%"),
}


class Keys(NamedTuple):
    """One source of randomness for each purpose, both from one seed."""

    model: jax.Array
    batches: jax.Array


class Rates(NamedTuple):
    """Settings of the optimizer, no part of what is compiled; float32 scalars.

    Adam does not look at `b3` and `threshold`.
    """

    learning_rate: jax.Array
    b1: jax.Array
    b2: jax.Array
    b3: jax.Array
    threshold: jax.Array
    eps: jax.Array
    decoupled_decay: jax.Array
    coupled_decay: jax.Array


# A level and rows of its states; of an epoch [level] and [level, batch_size].
Batch = tuple[jax.Array, jax.Array]


class Step(NamedTuple):
    """The report of a step: the batch's mean KL, and the share of open weights."""

    kl: jax.Array
    open_fraction: jax.Array


def make_keys(seed: int) -> Keys:
    """The keys of a run."""
    return Keys(*jax.random.split(jax.random.key(seed)))


def on_device(dataset: Dataset) -> Dataset:
    """The dataset as JAX arrays."""
    return jax.tree.map(jnp.asarray, dataset)


def architecture_for(config: Settings) -> Architecture:
    """The network of a config."""
    return Architecture(config.width, config.blocks, NUM_ACTIONS, config.norm_momentum)


def make_optimizer(method: Method, rates: Rates) -> optax.GradientTransformation:
    """AdamW or temporal AND-mask Adam behind an L2 decay that moments and signs see."""
    lr, b1, b2, b3, threshold, eps, decoupled, coupled = rates
    if method == "adam":
        adam = optax.adamw(lr, b1, b2, eps, weight_decay=decoupled)
    else:
        adam = hardvary.temporal_and_mask_adam(
            lr, b1, b2, b3, threshold, eps, weight_decay=decoupled
        )
    return optax.chain(optax.add_decayed_weights(coupled), adam)


def rates_at(config: TrainConfig, index: int) -> Rates:
    """The rates of epoch `index` (from 0): a tenth of the learning rate each drop.

    A drop is at the first epoch that begins after its share of the training.
    """
    drops = (math.ceil(config.epochs / 2), math.ceil(config.epochs * 3 / 4))
    dropped = sum(index >= drop for drop in drops)
    decays = {
        kind: config.weight_decay if config.decay == kind else 0.0
        for kind in ("decoupled", "coupled")
    }
    return Rates(
        *map(
            jnp.float32,
            (
                config.learning_rate * 0.1**dropped,
                config.b1,
                config.b2,
                config.b3,
                config.threshold,
                config.eps,
                decays["decoupled"],
                decays["coupled"],
            ),
        )
    )


def make_trainer(
    config: Settings, method: Method, in_one_piece: bool | None = None
) -> Trainer:
    """The functions that train with `method`, compiled once for all seeds and rates.

    Args:
      config: network and batches.
      method: the optimizer.
      in_one_piece: see `experiments.common.epochs.make_epoch`.
    """
    return _make_trainer(
        architecture_for(config),
        method,
        config.batch_size,
        config.evaluated_states,
        in_one_piece,
    )


@functools.lru_cache(maxsize=16)
def _make_trainer(
    architecture: Architecture,
    method: Method,
    batch_size: int | None,
    evaluated_states: int | None,
    in_one_piece: bool | None,
) -> Trainer:
    apply = make_train_apply(architecture)

    @jax.jit
    def init(key: jax.Array) -> State:
        variables = init_variables(key, architecture)
        # The rates make no difference to the state that an optimizer begins with.
        zeros = Rates(*[jnp.float32(0)] * len(Rates._fields))
        optimizer = make_optimizer(method, zeros)
        return State(variables, optimizer.init(variables.params))

    def step(
        state: State, dataset: Dataset, batch: Batch, rates: Rates
    ) -> tuple[State, Step]:
        """One step on some of a level's states."""
        (params, batch_stats), opt_state = state
        train, (level, rows) = dataset.train, batch
        images, targets = train.images[level, rows], train.probabilities[level, rows]

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, new_stats = apply(Variables(params, batch_stats), images)
            return kl_divergence(targets, logits).mean(), new_stats

        (kl, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        optimizer = make_optimizer(method, rates)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        share = optax.tree.get(opt_state, "kept_fraction", jnp.float32(1))
        return State(Variables(params, batch_stats), opt_state), Step(kl, share)

    def order_of(dataset: Dataset, key: jax.Array, index: jax.Array) -> Batch:
        levels, states = dataset.train.images.shape[:2]
        key = jax.random.fold_in(key, index)
        return epoch_order(key, levels, states, batch_size or states)

    def end(state: State, dataset: Dataset, steps: Step, rates: Rates) -> Metrics:
        """The metrics of an epoch, from what its steps report."""
        return {
            **evaluate(architecture, state.variables, dataset, evaluated_states),
            "running_kl": steps.kl.mean(),
            "learning_rate": rates.learning_rate,
            "open_fraction": steps.open_fraction.mean(),
        }

    return Trainer(init, make_epoch(order_of, step, end, in_one_piece))


def epoch_order(key: jax.Array, levels: int, states: int, batch_size: int) -> Batch:
    """All levels once, int32 [level], and states of each, int32 [level, batch_size].

    The states of a level are drawn without replacement.
    """
    levels_key, states_key = jax.random.split(key)
    order = jax.random.permutation(levels_key, levels)
    rows = jax.vmap(lambda key: jax.random.permutation(key, states)[:batch_size])(
        jax.random.split(states_key, levels)
    )
    return order, rows


def kl_divergence(targets: jax.typing.ArrayLike, logits: jax.Array) -> jax.Array:
    """KL(target || softmax(logits)) in nats, [...]; targets and logits [..., action].

    Where a target is 0 it contributes nothing.
    """
    return optax.losses.kl_divergence(jax.nn.log_softmax(logits), targets)


def constant_kl(probabilities: np.ndarray | jax.Array) -> jax.Array:
    """Mean KL of the best constant distribution, which is the mean of all [n, action].

    The least that a student who does not look at the state can have on these.
    """
    mean = jnp.asarray(probabilities).mean(0)
    # What never happens costs nothing, whatever its logarithm.
    logs = jnp.log(jnp.where(mean > 0, mean, 1))
    return optax.losses.kl_divergence(logs[None], probabilities).mean()


def evaluate(
    architecture: Architecture,
    variables: Variables,
    dataset: Dataset,
    evaluated_states: int | None,
) -> Metrics:
    """Mean KL, and how often student and expert prefer the same action.

    In evaluation mode. Training metrics are of the first `evaluated_states` of each
    level, or of all.
    """
    apply = make_apply(architecture)

    def measure(states: States) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(apply, variables, jnp.asarray(states.images))
        agree = logits.argmax(-1) == states.probabilities.argmax(-1)
        return kl_divergence(states.probabilities, logits).mean(), agree.mean()

    train = jax.tree.map(
        lambda leaf: leaf[:, :evaluated_states].reshape(-1, *leaf.shape[2:]),
        dataset.train,
    )
    train_kl, train_accuracy = measure(train)
    test_kl, test_accuracy = measure(dataset.test)
    return {
        "train_kl": train_kl,
        "test_kl": test_kl,
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
    }


def require_fitting(config: Settings, dataset: Dataset) -> None:
    """Raises DataError where a level has fewer states than `config` asks for."""
    states = dataset.train.images.shape[1]
    for field in ("batch_size", "evaluated_states"):
        value = getattr(config, field)
        if value is not None and value > states:
            raise DataError(
                f"{field} must be at most the {states} states that a level of the "
                f"dataset has, got {value}"
            )


def train(
    config: TrainConfig, run: RunDir, dataset: Dataset, *, quiet: bool = False
) -> tuple[State, list[dict[str, float]]]:
    """Trains to the end, from the start or from the run's last checkpoint.

    Args:
      config: what to train.
      run: where the checkpoints and metrics go.
      dataset: what to train on.
      quiet: without a progress bar.

    Returns:
      The final state, and the metrics of every epoch.
    """
    # Here, so that the functions above do without Orbax and tqdm.
    from experiments.common.training import run_epochs

    require_fitting(config, dataset)
    trainer = make_trainer(config, config.method)
    data, keys = on_device(dataset), make_keys(config.seed)

    def epoch_fn(state: State, index: int) -> tuple[State, Metrics]:
        rates = rates_at(config, index)
        return trainer.epoch(state, data, keys.batches, index, rates)

    return run_epochs(
        run,
        epoch_fn,
        trainer.init(keys.model),
        config.epochs,
        metrics=METRICS,
        checkpoint_every=config.checkpoint_every,
        progress=None if quiet else PROGRESS,
        title=config.method,
    )
