"""Inner products and weighted sums of whole gradients."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hardvary import _hyperparams
from hardvary._env_grads import forms
from hardvary._typing import AxisName, PyTree


def gramian(
    grads: PyTree, *, env_weights: Any = None, axis_name: AxisName | None = None
) -> jax.Array:
    """Inner products of the environments' gradients, over all parameters.

    Args:
      grads: a tree of `EnvGrad`, or stacked gradients, each leaf
        `[env, *param.shape]`.
      env_weights: `[env]`, for stacked gradients; 0 marks an absent environment, whose
        row and column are 0. Other weights change nothing.
      axis_name: see `and_mask`.

    Returns:
      `[env, env]`, float32 (float64 for float64 gradients).

    Raises:
      TypeError: gradients that are not real floating.
      ValueError: as `agreement`; a tree of `GradStats`, which has no inner products; a
        tree without leaves, which has no environments.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> grads = {"w": jnp.array([[1.0, 2.0], [3.0, -1.0]]), "b": jnp.ones(2)}
      >>> hardvary.gramian(grads).tolist()
      [[6.0, 2.0], [2.0, 11.0]]
    """
    return total_gramian(forms.read(grads, "gramian", None, env_weights, axis_name))


def total_gramian(given: forms.Gradients) -> jax.Array:
    """`[env, env]`, inner products over all parameters."""
    return _total(given.name, given.gramian())


def total_square_norms(given: forms.Gradients) -> jax.Array:
    """`[env]`, squares of norms over all parameters."""
    return _total(given.name, given.square_norms())


def _total(name: str, parts: Sequence[jax.Array]) -> jax.Array:
    if not parts:
        raise ValueError(f"{name}: a tree without leaves has no environments")
    dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    return sum((part.astype(dtype) for part in parts[1:]), parts[0].astype(dtype))


def norms(
    grads: PyTree, *, env_weights: Any = None, axis_name: AxisName | None = None
) -> jax.Array:
    """Euclidean norms of the environments' gradients, over all parameters.

    Args:
      grads: see `gramian`.
      env_weights: see `gramian`.
      axis_name: see `and_mask`.

    Returns:
      `[env]`, float32 (float64 for float64 gradients).

    Raises:
      TypeError: as `gramian`.
      ValueError: as `gramian`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> hardvary.norms(jnp.array([[3.0, 4.0], [0.0, -1.0]])).tolist()
      [5.0, 1.0]
    """
    given = forms.read(grads, "norms", None, env_weights, axis_name)
    return jnp.sqrt(total_square_norms(given))


def combine(
    grads: PyTree,
    weights: Any,
    *,
    env_weights: Any = None,
    axis_name: AxisName | None = None,
) -> PyTree:
    """Weighted sum of the environments' gradients, `sum_e w_e g_e`.

    Args:
      grads: see `gramian`.
      weights: `[env]` of any sign, or a tree prefix of params with such arrays. An
        environment of weight 0 might as well not be there, even where its gradient is
        NaN.
      env_weights: `[env]`, for stacked gradients; 0 marks an absent environment, other
        weights change nothing.
      axis_name: see `and_mask`.

    Returns:
      A tree like params, in at least float32.

    Raises:
      TypeError: as `gramian`; weights that are not real.
      ValueError: as `gramian`; weights of another shape, or a tree that is no prefix
        of params.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> grads = jnp.array([[1.0, 2.0], [3.0, -1.0]])  # [env, 2]
      >>> hardvary.combine(grads, jnp.array([1.0, -1.0])).tolist()
      [-2.0, 3.0]
    """
    given = forms.read(grads, "combine", None, env_weights, axis_name)
    # One array for all leaves: an EnvGrad knows weights by their identity.
    weights = jax.tree.map(jnp.asarray, weights)
    rule = "combine: weights must be an array [env], or a tree of such arrays"
    parts = _hyperparams.spread(weights, grads, rule, forms.is_leaf)
    shared = [leaf for _, leaf, size in parts for _ in range(size)]
    return given.unflatten(given.combine(shared))
