"""The synthetic memorisation dataset (paper, section 3.1).

Two interleaved spirals carry the label in two dimensions: the mechanism, the same
everywhere. Further dimensions hold a vector that is +s_e for class 1 and -s_e for
class 0: a shortcut, easier to learn than the spirals and different in every
environment e. In the test set every example has a shortcut vector of its own, so
that whoever relies on shortcuts is right half of the time.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

MECHANISM_DIMS = 2
MIN_RADIUS = 0.08
RADIUS_NOISE = 0.02
TEST_EXAMPLES = 2000
VALIDATION_EXAMPLES = 128
HELD_OUT_ENVS = 128
HELD_OUT_EXAMPLES = 16


class Split(NamedTuple):
    """Examples.

    Features are float32 [..., 2 + shortcut_dims], spirals first; labels are float32
    [...], 0 or 1.
    """

    features: jax.Array
    labels: jax.Array


class Dataset(NamedTuple):
    """The four splits.

    `train` is [env, example], `validation` [env, example] with other examples of the
    same environments, `held_out` [env, example] with other environments, `test`
    [example] with a fresh shortcut for every example. Recipes are chosen on
    `validation` or `held_out`, so that `test` is never tuned on.
    """

    train: Split
    validation: Split
    held_out: Split
    test: Split


@functools.partial(
    jax.jit, static_argnames=("num_envs", "examples_per_env", "shortcut_dims")
)
def make_dataset(
    key: jax.Array,
    num_envs: int,
    examples_per_env: int,
    shortcut_dims: int,
    shortcut_std: float = 1.0,
    revolutions: float = 3.0,
) -> Dataset:
    """Draws the dataset; the same key and arguments give the same one."""
    held_out_envs, test_envs = num_envs, num_envs + HELD_OUT_ENVS
    # As (first environment, environments, examples in each); a test example's is its
    # own.
    sizes = (
        (0, num_envs, examples_per_env),
        (held_out_envs, HELD_OUT_ENVS, HELD_OUT_EXAMPLES),
        (test_envs, TEST_EXAMPLES, 1),
        (0, num_envs, VALIDATION_EXAMPLES),
    )
    spiral_key, shortcut_key = jax.random.split(key)
    # All splits in one draw: a draw for each takes three times as long to compile.
    num_examples = sum(envs * examples for _, envs, examples in sizes)
    mechanism = spirals(spiral_key, (num_examples,), revolutions)
    shape = (test_envs + TEST_EXAMPLES, 1, shortcut_dims)
    shortcuts = shortcut_std * jax.random.normal(shortcut_key, shape)

    splits, first_example = [], 0
    for first_env, envs, examples in sizes:
        rows = slice(first_example, first_example + envs * examples)
        part = Split(
            mechanism.features[rows].reshape(envs, examples, MECHANISM_DIMS),
            mechanism.labels[rows].reshape(envs, examples),
        )
        splits.append(add_shortcuts(part, shortcuts[first_env : first_env + envs]))
        first_example = rows.stop
    train, held_out, test, validation = splits
    test = Split(test.features[:, 0], test.labels[:, 0])
    return Dataset(train, validation, held_out, test)


def spirals(key: jax.Array, shape: tuple[int, ...], revolutions: float) -> Split:
    """Points [*shape, 2] on two interleaved spirals, with unit variance, and labels."""
    label_key, radius_key, noise_key = jax.random.split(key, 3)
    labels = jax.random.bernoulli(label_key, 0.5, shape).astype(jnp.float32)
    radius = jax.random.uniform(radius_key, shape, minval=MIN_RADIUS)
    angle = 2 * jnp.pi * revolutions * radius + jnp.pi * labels
    noise = jax.random.uniform(
        noise_key, shape, minval=-RADIUS_NOISE, maxval=RADIUS_NOISE
    )
    direction = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    points = (radius + noise)[..., None] * direction
    return Split(points / spiral_std(revolutions), labels)


def spiral_std(revolutions: float | jax.Array) -> jax.Array:
    """Standard deviations [2] of the unscaled spirals' two coordinates.

    They follow from the distribution, not from a sample: nothing about one split
    leaks into another. With radius r ~ U(a, 1), noise u and k = 4 pi revolutions,
    the variances are E[(r + u)^2 (1 +- cos(k r))] / 2; the means are 0 because the
    classes are each other's mirror image.
    """
    a, width = MIN_RADIUS, 1 - MIN_RADIUS
    noise_variance = RADIUS_NOISE**2 / 3
    k = 4 * math.pi * revolutions

    def antiderivative(r: float) -> jax.Array:
        """Of (r^2 + noise_variance) cos(k r)."""
        kr = k * r
        return (
            (r**2 + noise_variance) * jnp.sin(kr) / k
            + 2 * r * jnp.cos(kr) / k**2
            - 2 * jnp.sin(kr) / k**3
        )

    mean_square = (1 - a**3) / (3 * width) + noise_variance
    swing = (antiderivative(1.0) - antiderivative(a)) / width
    return jnp.sqrt(jnp.stack([mean_square + swing, mean_square - swing]) / 2)


def add_shortcuts(mechanism: Split, shortcuts: jax.Array) -> Split:
    """Appends +shortcut to the features of class 1 and -shortcut to those of class 0.

    Args:
      mechanism: spirals, labels [*batch].
      shortcuts: vectors that broadcast to [*batch, shortcut_dims].
    """
    signed = (2 * mechanism.labels - 1)[..., None] * shortcuts
    features = jnp.concatenate([mechanism.features, signed], axis=-1)
    return Split(features, mechanism.labels)
