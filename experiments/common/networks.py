"""Flax NNX networks as pure functions of all that they consist of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

Params = Any
BatchStats = Any
# Of a network without its variables.
Graph = Any


class Variables(NamedTuple):
    """All that a network consists of.

    `batch_stats` are the running means and variances of batch norm, without leaves in a
    network that has none.
    """

    params: Params
    batch_stats: BatchStats


# Variables and images uint8 [batch, height, width, channel] to logits [batch, class].
Apply = Callable[[Variables, jax.Array], jax.Array]
# The same to logits and the new batch_stats.
TrainApply = Callable[[Variables, jax.Array], tuple[jax.Array, BatchStats]]


def variables_of(model: nnx.Module) -> Variables:
    """Parameters and batch statistics."""
    return Variables(nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat))


def graph_of(make: Callable[[nnx.Rngs], nnx.Module]) -> Graph:
    """The graph of what `make` gives, whose weights are not drawn."""
    return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def apply_of(graph: Graph) -> Apply:
    """The network in evaluation, as a pure function to logits."""

    def apply(variables: Variables, images: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graph, *variables)
        return model(images)

    return apply


def train_apply_of(graph: Graph) -> TrainApply:
    """The network in training, as a pure function to logits and batch statistics."""

    def apply(variables: Variables, images: jax.Array) -> tuple[jax.Array, BatchStats]:
        model = merge_copy(graph, variables)
        return model(images, training=True), nnx.state(model, nnx.BatchStat)

    return apply


def merge_copy(graph: Graph, variables: Variables) -> Any:
    """The network with copies of its variables, which a trace may update."""
    return nnx.merge(graph, *variables, copy=True)
