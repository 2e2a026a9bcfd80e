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


def part_of(params: Params, prefix: str) -> tuple[list[Any], Callable[[Any], Params]]:
    """A part of the parameters, and a function that puts other values there.

    Args:
      params: any tree.
      prefix: what the paths of the part's leaves begin with, keys joined by slashes.
    """
    paths, treedef = jax.tree.flatten_with_path(params)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths
    ]
    inside = [name.startswith(prefix) for name in names]
    if not any(inside):
        raise ValueError(f"no parameter is below {prefix!r}, there are {names}")
    leaves = [leaf for _, leaf in paths]

    def rebuild(part: list[Any]) -> Params:
        own = iter(part)
        return jax.tree.unflatten(
            treedef,
            [
                next(own) if here else leaf
                for here, leaf in zip(inside, leaves, strict=True)
            ],
        )

    return [leaf for here, leaf in zip(inside, leaves, strict=True) if here], rebuild


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
