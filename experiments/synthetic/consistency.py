"""How inconsistent the networks are that training finds (paper, section 2).

A network is varied in two ways. `weights` adds anything to any weight, as the paper's
definition says. `scales` multiplies each weight by a factor of its own, starting from
1: it varies what the network uses, and cannot take up an input that it ignores.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

import hardvary
from experiments.common.networks import Variables
from experiments.synthetic.config import ConsistencyConfig, Method
from experiments.synthetic.data import Split
from experiments.synthetic.training import apply_for

Variation = Literal["weights", "scales"]
VARIATIONS: tuple[Variation, ...] = get_args(Variation)


class Measured(NamedTuple):
    """The finds of a search, for each distance: leaves [distance, ...].

    Attributes:
      scores: [distance, pair]: the largest change of the pair's second loss while the
        first keeps within epsilon.
      own_accuracy: [distance]: for the pair with the largest score, accuracy on its
        first environment at the parameters found.
      other_accuracy: [distance]: on its second.
      max_deviation: [distance]: the largest change of the first loss on the way.
      max_jump: [distance]: its largest change from one point checked to the next.
    """

    scores: jax.Array
    own_accuracy: jax.Array
    other_accuracy: jax.Array
    max_deviation: jax.Array
    max_jump: jax.Array


def draw_pairs(config: ConsistencyConfig) -> jax.Array:
    """Ordered pairs [pair, 2] of different environments, the same for all networks."""
    every = [
        (e, other)
        for e in range(config.num_envs)
        for other in range(config.num_envs)
        if e != other
    ]
    order = jax.random.permutation(jax.random.key(config.search_seed), len(every))
    return jnp.array(every, jnp.int32)[order[: config.num_pairs]]


def measure(
    config: ConsistencyConfig,
    variation: Variation,
    variables: Variables,
    train: Split,
) -> Measured:
    """Searches from a trained network.

    Args:
      config: settings.
      variation: how the network is varied.
      variables: the network.
      train: its training data, leaves [env, example, ...].
    """
    examples = jax.tree.map(lambda leaf: leaf[:, : config.examples], train)
    key = jax.random.key(config.search_seed)
    found = [
        _make_search(config, variation)(variables, examples, key, distance)
        for distance in config.distances
    ]
    stacked: Measured = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return stacked


@functools.lru_cache(maxsize=16)
def _make_search(config: ConsistencyConfig, variation: Variation) -> Any:
    apply = apply_for(config.train_configs()[0])
    pairs = draw_pairs(config)

    @jax.jit
    def search(
        variables: Variables, train: Split, key: jax.Array, distance: jax.Array
    ) -> Measured:
        params = variables.params
        start = params
        if variation == "scales":
            start = jax.tree.map(jnp.ones_like, params)

        def logits_of(point: Any, split: Split) -> jax.Array:
            if variation == "scales":
                point = jax.tree.map(jnp.multiply, params, point)
            return apply(variables._replace(params=point), split.features)

        def loss_fn(point: Any, split: Split) -> jax.Array:
            logits = logits_of(point, split)
            return optax.sigmoid_binary_cross_entropy(logits, split.labels).mean()

        def accuracy(point: Any, env: jax.Array) -> jax.Array:
            split = jax.tree.map(lambda leaf: leaf[env], train)
            return jnp.mean((logits_of(point, split) > 0) == (split.labels > 0.5))

        found = hardvary.consistency.inconsistency(
            loss_fn,
            start,
            train,
            config.epsilon,
            key=key,
            pairs=pairs,
            num_starts=config.search_starts,
            num_steps=config.search_steps,
            max_distance=distance * optax.tree.norm(start),
            batch_size=config.searches_at_once,
        )
        own, other = (accuracy(found.params, env) for env in found.pair)
        return Measured(
            found.pair_scores, own, other, found.max_deviation, found.max_jump
        )

    return search


def rows_of(
    config: ConsistencyConfig,
    method: Method,
    seed: int,
    variables: Variables,
    train: Split,
) -> Iterator[dict[str, Any]]:
    """A row for every variation and distance of one network."""
    for variation in VARIATIONS:
        measured = measure(config, variation, variables, train)
        for index, distance in enumerate(config.distances):
            at = jax.tree.map(lambda leaf, i=index: leaf[i], measured)
            yield {
                "method": method,
                "seed": seed,
                "variation": variation,
                "distance": distance,
                "score": float(at.scores.max()),
                "mean_pair_score": float(at.scores.mean()),
                "own_accuracy": float(at.own_accuracy),
                "other_accuracy": float(at.other_accuracy),
                "max_deviation": float(at.max_deviation),
                "max_jump": float(at.max_jump),
            }
