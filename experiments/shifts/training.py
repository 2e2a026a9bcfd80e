"""One training loop for all methods and shifts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hardvary
from experiments.shifts.methods import (
    Method,
    Recipe,
    Setting,
    Tie,
    Whitening,
    make_optimizer,
)
from hardvary.objectives import irm_penalty


class Examples(NamedTuple):
    """Features [env, example, ...] and labels [env, example]."""

    features: Any
    labels: Any


class Data(NamedTuple):
    """`train` is what is trained on, and `test` what is reported; `held_out` are other
    environments, drawn as the training ones are, for choosing.
    """

    train: Examples
    test: Examples
    held_out: Examples


class Task(NamedTuple):
    """How outputs [example, ...] are judged by labels [example].

    `loss` is what is trained, a mean over examples, and `penalty` IRM's for it;
    `error` what is reported; `baseline` and `baseline_error` are the least loss and
    error of a prediction that is the same for every example.
    """

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    penalty: Callable[[jax.Array, jax.Array], jax.Array]
    error: Callable[[jax.Array, jax.Array], jax.Array]
    baseline: Callable[[jax.Array], jax.Array]
    baseline_error: Callable[[jax.Array], jax.Array]


def _squared(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(outputs - labels))


def _squared_penalty(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The square of the derivative of the loss of s times the outputs, at s = 1."""
    return jnp.square(jnp.mean(2 * outputs * (outputs - labels)))


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def _wrong(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean((logits > 0) != (labels > 0.5))


def _entropy(labels: jax.Array) -> jax.Array:
    share = labels.mean()
    return jnp.sum(jax.scipy.special.entr(jnp.stack([share, 1 - share])))


def _rarer(labels: jax.Array) -> jax.Array:
    share = labels.mean()
    return jnp.minimum(share, 1 - share)


REGRESSION = Task(_squared, _squared_penalty, _squared, jnp.var, jnp.var)
TWO_CLASSES = Task(_cross_entropy, irm_penalty, _wrong, _entropy, _rarer)

DEFAULT_RECIPE = Recipe()
# Parameters and features [example, ...] to outputs [example, ...].
Apply = Callable[[Any, Any], jax.Array]


# From parameters to a part of them, and a function that puts other values there.
SplitParams = Callable[[Any], tuple[Any, Callable[[Any], Any]]]


def whole(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """All parameters, as a `SplitParams`."""
    return params, lambda own: own


class State(NamedTuple):
    """All that training carries from step to step."""

    params: Any
    opt_state: optax.OptState


class Steps(NamedTuple):
    """`init(params)` gives a state and `step(state, batch)` the next, with the losses
    [env] before it.
    """

    init: Callable[[Any], State]
    step: Callable[[State, Examples], tuple[State, jax.Array]]


def make_steps(
    task: Task,
    apply: Apply,
    method: Method,
    setting: Setting,
    num_envs: int,
    schedule: optax.Schedule,
    whitening: Whitening,
    recipe: Recipe = DEFAULT_RECIPE,
    split: SplitParams = whole,
) -> Steps:
    """The loop's body, pure, to be traced by whoever loops; see `make_optimizer`.

    `split` gives the parameters of the last layer, whose gradients Fishr compares, and
    a function that puts others in their place; all of them unless given.
    """
    optimizer = make_optimizer(method, setting, num_envs, schedule, whitening, recipe)

    def env_loss(params: Any, batch: Examples) -> tuple[jax.Array, jax.Array]:
        outputs = apply(params, batch.features)
        loss = task.loss(outputs, batch.labels)
        if not method.penalized:
            return loss, loss
        penalty = setting.number * task.penalty(outputs, batch.labels)
        # In range whatever the weight, as the authors of IRM do.
        return (loss + penalty) / jnp.maximum(setting.number, 1.0), loss

    gradients = hardvary.value_and_env_grads(env_loss, has_aux=True)
    if method.tie is not None:
        gradients = _tied(task, apply, method.tie, setting.number, split)

    def init(params: Any) -> State:
        return State(params, optimizer.init(params))

    def step(state: State, batch: Examples) -> tuple[State, jax.Array]:
        (_, losses), grads = gradients(state.params, batch)
        updates, opt_state = optimizer.update(
            grads,
            state.opt_state,
            state.params,
            env_losses=losses,
            baseline_losses=jax.vmap(task.baseline)(batch.labels),
        )
        return State(optax.apply_updates(state.params, updates), opt_state), losses

    return Steps(init, step)


def _tied(
    task: Task, apply: Apply, tie: Tie, weight: Any, split: SplitParams
) -> Callable[[Any, Examples], Any]:
    """The gradient of the mean loss and `weight` times a tie; aux are losses [env].

    Divided by the weight where that is above 1, as with IRM's penalty.
    """

    def objective(params: Any, batch: Examples) -> tuple[jax.Array, jax.Array]:
        losses = jax.vmap(
            lambda env: task.loss(apply(params, env.features), env.labels)
        )(batch)
        own, rebuild = split(params) if tie.last_layer else whole(params)

        def loss(own: Any, examples: Examples) -> jax.Array:
            return task.loss(apply(rebuild(own), examples.features), examples.labels)

        total = losses.mean() + weight * tie.penalty(loss, own, batch)
        return total / jnp.maximum(weight, 1.0), losses

    return jax.value_and_grad(objective, has_aux=True)


def train_epochs(
    loop: Steps,
    params: Any,
    train: Examples,
    key: jax.Array,
    epochs: int,
    batch_size: int,
) -> Any:
    """Parameters after passes over the examples, in orders of each environment's own.

    Args:
      loop: what a step does.
      params: the initial ones.
      train: examples [env, example, ...].
      key: of the orders.
      epochs: number of passes.
      batch_size: examples per step from each environment; what is left over of a pass
        is left out.
    """
    num_envs, examples = train.labels.shape[:2]
    steps = examples // batch_size

    def step(state: State, rows: jax.Array) -> tuple[State, None]:
        batch = jax.vmap(lambda env, own: jax.tree.map(lambda x: x[own], env))(
            train, rows
        )
        return loop.step(state, batch)[0], None

    def epoch(state: State, key: jax.Array) -> tuple[State, None]:
        keys = jax.random.split(key, num_envs)
        order = jax.vmap(lambda key: jax.random.permutation(key, examples))(keys)
        order = order[:, : steps * batch_size]
        shape = (num_envs, steps, batch_size)
        return jax.lax.scan(step, state, order.reshape(shape).swapaxes(0, 1))

    state = loop.init(params)
    return jax.lax.scan(epoch, state, jax.random.split(key, epochs))[0].params


def errors_of(task: Task, apply: Apply, params: Any, envs: Examples) -> jax.Array:
    """Errors [env]."""
    return jax.vmap(lambda env: task.error(apply(params, env.features), env.labels))(
        envs
    )


def share_of_baseline(task: Task, apply: Apply, params: Any, envs: Examples) -> Any:
    """The rule of selection: the error on the worst of held-out environments.

    As a share of the best constant prediction's there, and no more than 1, so that
    problems count alike.
    """

    def share(env: Examples) -> jax.Array:
        error = task.error(apply(params, env.features), env.labels)
        return jnp.minimum(error / task.baseline_error(env.labels), 1.0)

    return jax.vmap(share)(envs).max()
