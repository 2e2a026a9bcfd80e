"""The directions in which environments' gradients differ, from their inner products.

Free of the basis: a rotation of the parameters rotates the directions, and changes no
number here. The differences span one dimension less than there are environments, so all
of it is work on matrices `[env, env]`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardvary._eigh import eigh
from hardvary._env_grads import forms
from hardvary._env_grads import statistics as st
from hardvary._env_grads.products import total_gramian
from hardvary._typing import AxisName, PyTree

_HIGHEST = jax.lax.Precision.HIGHEST


class Disagreement(NamedTuple):
    """How gradients differ between environments, along orthogonal directions.

    Attributes:
      spectrum: `[env]`, variance over environments of the gradients' components along
        each direction, falling; at most env - 1 are not 0. Their sum is the variance
        of the gradients.
      mean: `[env]`, components of the mean gradient along each direction.
      agreement: `[env]`, in [0, 1], how far environments agree on the sign of their
        components, as `agreement` for a component of the parameters; 0 where the
        variance is.
      common: scalar, square norm of what the mean gradient has outside of all these
        directions: there all environments are the same.
    """

    spectrum: jax.Array
    mean: jax.Array
    agreement: jax.Array
    common: jax.Array


class Directions(NamedTuple):
    """Directions of disagreement as sums of gradients.

    Attributes:
      spectrum: `[env]`, see `Disagreement`.
      mean: `[env]`, see `Disagreement`.
      votes: `[env, direction]`, components of every environment's gradient; exactly 0
        where nothing but rounding is left.
      coefficients: `[env, direction]`; direction i is `sum_e coefficients[e, i] g_e`,
        of length 1, or 0 where the variance is.
      deviations: `[env, direction]`, components of what a gradient has beyond the mean.
    """

    spectrum: jax.Array
    mean: jax.Array
    votes: jax.Array
    coefficients: jax.Array
    deviations: jax.Array


def directions(gramian: jax.Array, shares: jax.Array) -> Directions:
    """The directions of disagreement of gradients with this Gramian.

    Args:
      gramian: `[env, env]`, finite; rows of absent environments are 0.
      shares: `[env]`, weights with the sum 1, 0 for absent environments.
    """
    size, eps = len(gramian), jnp.finfo(gramian.dtype).eps
    # No matrix products: on accelerators they would round to fewer digits.
    with_mean = jnp.sum(gramian * shares[None, :], axis=1)
    square_mean = jnp.sum(shares * with_mean)
    roots = jnp.sqrt(shares)
    centred = gramian - with_mean[:, None] - with_mean[None, :] + square_mean
    values, vectors = eigh(roots[:, None] * centred * roots[None, :])
    values, vectors = values[::-1], vectors[:, ::-1]
    # What is left of gradients that are the same is rounding of their products.
    largest = jnp.max(jnp.where(shares > 0, jnp.diagonal(gramian), 0))
    known = values > size * eps * jnp.maximum(values[0], largest)
    # As many as can be: the differences from the mean have one dimension less.
    known &= jnp.arange(size) < jnp.sum(shares > 0) - 1
    spectrum = jnp.where(known, values, 0)
    lengths = jnp.sqrt(jnp.where(known, values, 1))
    unscaled = jnp.where(known[None, :], roots[:, None] * vectors, 0)
    coefficients = unscaled - shares[:, None] * jnp.sum(unscaled, axis=0)[None, :]
    coefficients /= lengths[None, :]
    mean = jnp.sum((with_mean - square_mean)[:, None] * coefficients, axis=0)
    safe = jnp.where(shares > 0, roots, 1)
    deviations = jnp.where(
        known[None, :] & (shares > 0)[:, None],
        vectors * lengths[None, :] / safe[:, None],
        0,
    )
    votes = jnp.where((shares > 0)[:, None], mean[None, :] + deviations, 0)
    rounding = 8 * eps * (jnp.abs(mean) + jnp.max(jnp.abs(deviations), axis=0))
    votes = jnp.where(jnp.abs(votes) > rounding[None, :], votes, 0)
    return Directions(spectrum, mean, votes, coefficients, deviations)


def sign_sums(found: Directions, shares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[direction]`, weighted sums of the votes' signs, and the total weight."""
    weights = st.make_weights(shares)
    total = st.as_total(st.total_weight(len(shares), weights))
    sums = st.sum_over_envs([found.votes], st.summed([st.SIGN], True), weights)
    (fields,) = st.finish(sums, [st.SIGN], total)
    return fields[st.SIGN.field], total


class Scaled(NamedTuple):
    """Inner products of all environments, in a range where nothing overflows.

    Attributes:
      gramian: `[env, env]` of the gradients times `scale`, with a largest diagonal
        entry of 1; zeros for absent environments.
      scale: `[env]`.
      shares: `[env]`, weights of the environments with the sum 1.
      length: scalar, of the longest gradient times its factor; 1 if all are 0.
      known: scalar, whether all of it was finite; what is there stands in if not.
    """

    gramian: jax.Array
    scale: jax.Array
    shares: jax.Array
    length: jax.Array
    known: jax.Array


def scaled(grads: forms.Gradients, factors: Any = None) -> Scaled:
    """Inner products of gradients times `factors: [env]`, 1 unless given."""
    gramian, env_weights = total_gramian(grads), grads.env_weights()
    here = env_weights > 0
    gramian = jnp.where(here[:, None] & here[None, :], gramian, 0)
    shares = jnp.where(here, env_weights, 0).astype(gramian.dtype)
    if factors is None:
        factors = jnp.ones_like(shares)
    factors = jnp.where(here, factors.astype(gramian.dtype), 0)
    known = jnp.all(jnp.isfinite(gramian)) & jnp.all(jnp.isfinite(factors))
    gramian = jnp.where(known, gramian, jnp.eye(len(gramian), dtype=gramian.dtype))
    factors = jnp.where(known, factors, 1)
    lengths = jnp.sqrt(jnp.diagonal(gramian)) * factors
    longest = jnp.max(lengths)
    length = jnp.where(longest > 0, longest, 1)
    scale = factors / length
    gramian = scale[:, None] * gramian * scale[None, :]
    return Scaled(gramian, scale, shares / jnp.sum(shares), length, known)


def of_logarithms(grads: forms.Gradients, losses: jax.Array) -> jax.Array:
    """`[env]`, factors that turn gradients of losses into those of their logarithms.

    A loss that is 0 next to the others counts as their rounding; one that is negative
    or not finite has the factor NaN.
    """
    losses = jnp.where(grads.env_weights() > 0, losses, 0)
    known = jnp.isfinite(losses) & (losses >= 0)
    largest = jnp.max(jnp.where(known, losses, 0))
    least = jnp.finfo(losses.dtype).eps * jnp.where(largest > 0, largest, 1)
    return jnp.where(
        known, 1 / jnp.maximum(jnp.where(known, losses, 1), least), jnp.nan
    )


def disagreement(
    grads: PyTree,
    *,
    env_losses: Any = None,
    env_weights: Any = None,
    axis_name: AxisName | None = None,
) -> Disagreement:
    r"""Along which directions environments' gradients differ, and how far they agree.

    The principal axes of the gradients around their mean. Large `spectrum` with small
    `agreement` is what `spectral_and_mask` takes out, large `spectrum` alone what
    `drop_disagreement` does; a mean that is almost all `common` has nothing to gain
    from either. Axes with less than about `sqrt(env * eps)` of the longest gradient,
    1e-3 of it in float32, cannot be told from rounding, and count as none.

    Args:
      grads: a tree of `EnvGrad`, or stacked gradients, each leaf
        `[env, *param.shape]`.
      env_losses: `[env]`, positive; the gradients are then those of the losses'
        logarithms, so that a loss that is large by itself does not count for more.
      env_weights: `[env]`, for stacked gradients; 0 marks an absent environment.
      axis_name: see `and_mask`.

    Returns:
      A `Disagreement`, float32 (float64 for float64 gradients); NaN where a present
      environment's gradient is not finite, or its loss is not or is negative.

    Raises:
      TypeError: gradients that are not real floating, losses that are not real.
      ValueError: as `gramian`; losses of another shape.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> grads = jnp.array([[1.0, 2.0, 0.0], [1.0, -2.0, 0.0]])  # [env, 3]
      >>> found = hardvary.disagreement(grads)
      >>> [round(x, 4) for x in found.spectrum.tolist()]
      [4.0, 0.0]
      >>> found.agreement.tolist(), round(found.common.item(), 4)
      ([0.0, 0.0], 1.0)
    """
    given = forms.read(grads, "disagreement", None, env_weights, axis_name)
    factors = None
    if env_losses is not None:
        factors = of_logarithms(given, given.of_envs("env_losses", env_losses))
    inner = scaled(given, factors)
    found = directions(inner.gramian, inner.shares)
    sums, total = sign_sums(found, inner.shares)
    with_mean = jnp.sum(inner.gramian * inner.shares[None, :], axis=1)
    square = jnp.sum(inner.shares * with_mean)
    common = jnp.maximum(square - jnp.sum(found.mean**2), 0)

    def result(value: jax.Array, power: int) -> jax.Array:
        return jnp.where(inner.known, value * inner.length**power, jnp.nan)

    agreed = jnp.where(found.spectrum > 0, jnp.abs(sums) / total, 0)
    return Disagreement(
        spectrum=result(found.spectrum, 2),
        mean=result(found.mean, 1),
        agreement=result(agreed, 0),
        common=result(common, 2),
    )
