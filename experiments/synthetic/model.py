"""The networks of the synthetic experiment, and their use through pure functions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

import hardvary
from experiments.common.networks import (
    BatchStats,
    Graph,
    Variables,
    graph_of,
    merge_copy,
    variables_of,
)

# The axis of environments: batch norm takes its statistics over all of them together.
ENV_AXIS = "env"


class Outputs(NamedTuple):
    """`logits` [...] of class 1, and [..., env] of the domain discriminator if any."""

    logits: jax.Array
    domain_logits: jax.Array | None = None


# Variables and features [..., inputs] to logits [...], as in evaluation.
Apply = Callable[[Variables, jax.Array], jax.Array]
# Variables, features, key for dropout and the scale of the reversed gradient to the
# outputs and the new batch_stats. With batch norm, under a vmap over ENV_AXIS.
TrainApply = Callable[
    [Variables, jax.Array, jax.Array, float], tuple[Outputs, BatchStats]
]


class Architecture(NamedTuple):
    """The sizes and kinds that make up a network."""

    inputs: int
    hidden_units: int
    hidden_layers: int
    batch_norm: bool = False
    dropout: float = 0.0
    num_domains: int | None = None


class MLP(nnx.Module):
    """Dense layers; between them batch norm, LeakyReLU and dropout.

    Weights are He-normal over the fan-in, biases 0.01, as in the authors' script.

    Args:
      architecture: all but `num_domains`, which only DANN has.
      outputs: units of the last layer; 0 ends with the last hidden layer.
      rngs: source of the initial weights.
    """

    def __init__(self, architecture: Architecture, outputs: int, *, rngs: nnx.Rngs):
        units = architecture.hidden_units
        sizes = [architecture.inputs, *[units] * architecture.hidden_layers]
        if outputs:
            sizes.append(outputs)
        # he_normal would cut the normal distribution off at two deviations.
        weights = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        self.layers = nnx.List(
            nnx.Linear(
                fan_in,
                fan_out,
                kernel_init=weights,
                bias_init=nnx.initializers.constant(0.01),
                rngs=rngs,
            )
            for fan_in, fan_out in itertools.pairwise(sizes)
        )
        hidden = architecture.hidden_layers if architecture.batch_norm else 0
        self.norms = nnx.List(
            nnx.BatchNorm(units, momentum=0.9, axis_name=ENV_AXIS, rngs=rngs)
            for _ in range(hidden)
        )
        self.dropout = nnx.Dropout(architecture.dropout)
        self.hidden_layers = architecture.hidden_layers

    def __call__(
        self, features: jax.Array, dropout_rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Outputs [..., outputs] for features [..., inputs].

        With a source of dropout masks as in training, without it as in evaluation.
        """
        training = dropout_rngs is not None
        for index, layer in enumerate(self.layers):
            features = layer(features)
            if index == self.hidden_layers:
                break
            if self.norms:
                norm = self.norms[index]
                features = norm(features, use_running_average=not training)
            features = nnx.leaky_relu(features)
            features = self.dropout(
                features, deterministic=not training, rngs=dropout_rngs
            )
        return features


class Classifier(nnx.Module):
    """An MLP with one logit."""

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
        self.mlp = MLP(architecture, 1, rngs=rngs)

    def __call__(
        self,
        features: jax.Array,
        dropout_rngs: nnx.Rngs | None = None,
        reversal_scale: float = 0.0,
    ) -> Outputs:
        """Logits [...] for features [..., inputs]; nothing is reversed here."""
        return Outputs(self.mlp(features, dropout_rngs)[..., 0])


class DANN(nnx.Module):
    """Domain-adversarial network (Ganin et al. 2016, JMLR 17(59)).

    Embedding, classifier and discriminator have two layers each (paper, section 3.1),
    so that embedding and classifier together are an MLP of three hidden layers.
    """

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
        assert architecture.num_domains is not None
        head = architecture._replace(inputs=architecture.hidden_units, hidden_layers=1)
        self.embedding = MLP(architecture._replace(hidden_layers=2), 0, rngs=rngs)
        self.classifier = MLP(head, 1, rngs=rngs)
        self.discriminator = MLP(head, architecture.num_domains, rngs=rngs)

    def __call__(
        self,
        features: jax.Array,
        dropout_rngs: nnx.Rngs | None = None,
        reversal_scale: float = 0.0,
    ) -> Outputs:
        """Logits [...] and domain logits [..., env] for features [..., inputs]."""
        embedding = self.embedding(features, dropout_rngs)
        reversed_ = hardvary.objectives.reverse_gradient(embedding, reversal_scale)
        return Outputs(
            self.classifier(embedding, dropout_rngs)[..., 0],
            self.discriminator(reversed_, dropout_rngs),
        )


def _make_model(architecture: Architecture, rngs: nnx.Rngs) -> Classifier | DANN:
    if architecture.num_domains is None:
        return Classifier(architecture, rngs=rngs)
    return DANN(architecture, rngs=rngs)


def init_variables(key: jax.Array, architecture: Architecture) -> Variables:
    """Initial parameters and batch statistics."""
    return variables_of(_make_model(architecture, nnx.Rngs(key)))


@functools.lru_cache(maxsize=16)
def make_apply(architecture: Architecture) -> Apply:
    """The network in evaluation, as a pure function to logits.

    The same architecture gives the same function, so that what is compiled for it
    once serves all methods and seeds.
    """
    graph = _graph(architecture)

    def apply(variables: Variables, features: jax.Array) -> jax.Array:
        outputs: Outputs = nnx.merge(graph, *variables)(features)
        return outputs.logits

    return apply


@functools.lru_cache(maxsize=16)
def make_train_apply(architecture: Architecture) -> TrainApply:
    """The network in training: dropout, statistics of the batch."""
    graph = _graph(architecture)

    def apply(
        variables: Variables,
        features: jax.Array,
        dropout_key: jax.Array,
        reversal_scale: float,
    ) -> tuple[Outputs, BatchStats]:
        model = merge_copy(graph, variables)
        outputs = model(features, nnx.Rngs(dropout=dropout_key), reversal_scale)
        return outputs, nnx.state(model, nnx.BatchStat)

    return apply


def _graph(architecture: Architecture) -> Graph:
    return graph_of(functools.partial(_make_model, architecture))
