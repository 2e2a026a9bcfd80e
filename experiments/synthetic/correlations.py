"""Which learning signal a masked gradient resembles (paper, section 4.1 and figure 7).

At initialisation, the gradient on the data is compared with the gradients on two
corrupted copies: with the shortcuts shuffled among examples only the spirals still
tell the label (the mechanism's signal), with the spirals shuffled only the shortcuts
do (the signal of memorisation).

Logits are scaled down to almost 0. As initialised they are of order 1 and off centre,
and the gradient that takes this back is alike on all datasets, also on one without any
signal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hardvary
from experiments.common.networks import Variables
from experiments.synthetic.config import Settings
from experiments.synthetic.data import MECHANISM_DIMS, Split
from experiments.synthetic.model import (
    Apply,
    Architecture,
    init_variables,
    make_apply,
)
from experiments.synthetic.training import dataset_for, make_keys

Part = Literal["mechanism", "shortcut"]
PARTS: dict[Part, slice] = {
    "mechanism": slice(0, MECHANISM_DIMS),
    "shortcut": slice(MECHANISM_DIMS, None),
}
Signal = Literal["mechanism_correlation", "shortcut_correlation"]

Mask = Literal["and", "xor"]
MASKS: dict[Mask, Callable[[Any], optax.GradientTransformationExtraArgs]] = {
    "and": hardvary.and_mask,
    "xor": hardvary.xor_mask,
}


class Row(TypedDict):
    """One mask at one threshold, for one seed.

    The correlations are of the components that passed, with the gradients on the data
    whose shortcuts were shuffled (mechanism) and whose spirals were (shortcut); NaN
    where fewer than two passed.
    """

    seed: int
    mask: Mask
    threshold: float
    kept_fraction: float
    mechanism_correlation: float
    shortcut_correlation: float


class Signals(NamedTuple):
    """Gradients at the same parameters, over all environments.

    All are trees like the parameters. `original`, of `GradStats`, is that on the data
    as it is, with its signs; `mechanism` and `shortcut` are means.
    """

    original: Any
    mechanism: Variables
    shortcut: Variables


class Correlations(NamedTuple):
    """Columns [threshold] of `Row`."""

    kept_fraction: jax.Array
    mechanism_correlation: jax.Array
    shortcut_correlation: jax.Array


def correlation_rows(
    config: Settings, seeds: Sequence[int], logit_scale: float
) -> list[Row]:
    """Both masks at every threshold, for networks that have learnt nothing yet.

    Args:
      config: data and model; the training split is one batch.
      seeds: each draws its own data, network and permutations.
      logit_scale: see `learning_signals`; 1 takes the networks as they are.
    """
    architecture = Architecture(
        MECHANISM_DIMS + config.shortcut_dims,
        config.hidden_units,
        config.hidden_layers,
    )
    apply = make_apply(architecture)
    thresholds = agreement_levels(config.num_envs)
    rows: list[Row] = []
    for seed in seeds:
        keys = make_keys(seed)
        params = init_variables(keys.model, architecture)
        split = dataset_for(config, seed).train
        signals = learning_signals(apply, params, split, keys.batches, logit_scale)
        for mask in MASKS:
            columns = masked_correlations(mask, signals, thresholds)
            rows += [
                Row(
                    seed=seed,
                    mask=mask,
                    threshold=threshold,
                    kept_fraction=kept,
                    mechanism_correlation=mechanism,
                    shortcut_correlation=shortcut,
                )
                for threshold, kept, mechanism, shortcut in zip(
                    thresholds.tolist(), *(c.tolist() for c in columns), strict=True
                )
            ]
    return rows


def agreement_levels(num_envs: int) -> np.ndarray:
    """The agreements that signs can have, ascending: steps of 2 / num_envs up to 1."""
    return np.arange(num_envs % 2, num_envs + 1, 2) / num_envs


@functools.partial(jax.jit, static_argnames="part")
def permute(split: Split, part: Part, key: jax.Array) -> Split:
    """Shuffles the spirals or the shortcuts among the examples of an environment.

    Labels and the other part stay, so that the shuffled one no longer tells the label.
    An environment's shortcuts are +s and -s, half and half: shuffled within it they
    mix signs, and every environment keeps the distribution of every dimension.
    Shuffling across environments would make the same of the mean gradient up to
    sampling noise: the pooled data come from the same distribution either way.

    Args:
      split: features [env, example, 2 + shortcut_dims], labels [env, example].
      part: what to shuffle; its dimensions stay together.
      key: source of the permutations, one for each environment.
    """
    dims = PARTS[part]

    def shuffle(key: jax.Array, features: jax.Array) -> jax.Array:
        return features.at[:, dims].set(jax.random.permutation(key, features[:, dims]))

    keys = jax.random.split(key, len(split.features))
    return Split(jax.vmap(shuffle)(keys, split.features), split.labels)


@functools.partial(jax.jit, static_argnames="apply")
def learning_signals(
    apply: Apply,
    params: Variables,
    split: Split,
    key: jax.Array,
    logit_scale: float,
) -> Signals:
    """The gradients on the data and on its two corrupted copies.

    Args:
      apply: the model's forward function.
      params: its parameters.
      split: features [env, example, 2 + shortcut_dims], labels [env, example].
      key: source of the permutations.
      logit_scale: what the logits are multiplied with.
    """

    def loss_fn(params: Variables, split: Split) -> jax.Array:
        logits = logit_scale * apply(params, split.features)
        return optax.sigmoid_binary_cross_entropy(logits, split.labels).mean()

    mechanism_key, shortcut_key = jax.random.split(key)
    # Environments are equally large: the mean over all examples is that over them.
    gradient = jax.grad(loss_fn)
    return Signals(
        hardvary.grad_stats(loss_fn)(params, split),
        gradient(params, permute(split, "shortcut", shortcut_key)),
        gradient(params, permute(split, "mechanism", mechanism_key)),
    )


@functools.partial(jax.jit, static_argnames="mask")
def masked_correlations(
    mask: Mask, signals: Signals, thresholds: jax.Array | np.ndarray
) -> Correlations:
    """Correlations of the masked gradient with both signals, at every threshold.

    Args:
      mask: `"and"` keeps the components with an agreement >= threshold, `"xor"` those
        below.
      signals: from `learning_signals`.
      thresholds: [threshold].
    """

    def at(threshold: jax.Array) -> Correlations:
        aggregator = MASKS[mask](threshold)
        masked, state = aggregator.update(signals.original, aggregator.init(None))
        return Correlations(
            state.kept_fraction,
            correlation(masked, signals.mechanism),
            correlation(masked, signals.shortcut),
        )

    return jax.lax.map(at, jnp.asarray(thresholds))


def correlation(masked: Variables, gradient: Variables) -> jax.Array:
    """Pearson correlation of two gradients where the first is not 0.

    All parameters count as one vector. NaN where fewer than two components are left.
    """
    x, y = ravel_pytree(masked)[0], ravel_pytree(gradient)[0]
    passed = x != 0
    count = jnp.sum(passed)

    def centred(values: jax.Array) -> jax.Array:
        mean = jnp.sum(values, where=passed) / count
        return jnp.where(passed, values - mean, 0)

    x, y = centred(x), centred(y)
    return x @ y / (jnp.linalg.norm(x) * jnp.linalg.norm(y))
