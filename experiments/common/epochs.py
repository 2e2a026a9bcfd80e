"""Epochs on the device: their steps in one compiled function or one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from experiments.common.networks import Apply, Variables

Metrics = dict[str, jax.Array]
# What training carries from step to step.
Carried = TypeVar("Carried")

# Images that are evaluated at a time.
EVALUATED_AT_ONCE = 500


class State(NamedTuple):
    """All that training carries from step to step."""

    variables: Variables
    opt_state: optax.OptState


class Trainer(NamedTuple):
    """The compiled functions of one setting; seeds, rates and data share them.

    `init(key)` gives the initial state, and `epoch(state, dataset, key, index, rates)`
    the state after one more epoch and its metrics.
    """

    init: Callable[[jax.Array], State]
    epoch: Callable[..., tuple[State, Metrics]]


def make_epoch(
    order_of: Callable[[Any, jax.Array, jax.Array], Any],
    step: Callable[[Carried, Any, Any, Any], tuple[Carried, Any]],
    end: Callable[[Carried, Any, Any, Any], Metrics],
    in_one_piece: bool | None = None,
) -> Callable[..., tuple[Carried, Metrics]]:
    """The function `epoch` of a `Trainer`.

    Args:
      order_of: (dataset, key, index) to what each step of an epoch takes, [step, ...].
      step: (state, dataset, what it takes, rates) to the new state and a report.
      end: (state, dataset, reports [step, ...], rates) to the metrics of an epoch.
      in_one_piece: whether an epoch is one compiled function. If not, each of its steps
        is one, and nothing leaves the device in between either. The default is no on
        CPU: XLA's compiler brings the convolutions of a backward pass into the form
        that it has fast code for only outside of loops; in a scan they take 15 to 100
        times as long.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def whole_epoch(
        state: Carried, dataset: Any, key: jax.Array, index: jax.Array, rates: Any
    ) -> tuple[Carried, Metrics]:
        state, reports = jax.lax.scan(
            lambda state, batch: step(state, dataset, batch, rates),
            state,
            order_of(dataset, key, index),
        )
        return state, end(state, dataset, reports, rates)

    order_alone, end_alone = jax.jit(order_of), jax.jit(end)
    step_alone = jax.jit(step, donate_argnums=0)

    def stepwise_epoch(
        state: Carried, dataset: Any, key: jax.Array, index: jax.Array, rates: Any
    ) -> tuple[Carried, Metrics]:
        leaves, structure = jax.tree.flatten(order_alone(dataset, key, index))
        reports = []
        for batch in zip(*leaves, strict=True):
            taken = jax.tree.unflatten(structure, batch)
            state, report = step_alone(state, dataset, taken, rates)
            reports.append(report)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)
        return state, end_alone(state, dataset, stacked, rates)

    if in_one_piece is None:
        in_one_piece = jax.default_backend() != "cpu"
    return whole_epoch if in_one_piece else stepwise_epoch


def logits_of(apply: Apply, variables: Variables, images: jax.Array) -> jax.Array:
    """Logits of images, some at a time."""
    return jax.lax.map(
        lambda image: apply(variables, image[None])[0],
        images,
        batch_size=min(EVALUATED_AT_ONCE, len(images)),
    )
