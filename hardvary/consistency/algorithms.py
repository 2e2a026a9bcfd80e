"""Invariant learning consistency: a score of a whole algorithm."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardvary import _validate
from hardvary._typing import PyTree


class ILC(NamedTuple):
    """Invariant learning consistency of an algorithm, estimated by `ilc`.

    Attributes:
      value: scalar, minus the mean score; higher is better, 0 is the best.
      standard_error: scalar, of the mean; NaN for one initialisation.
      scores: `[initialisation]`.
    """

    value: jax.Array
    standard_error: jax.Array
    scores: jax.Array


def ilc(
    train_fn: Callable[[jax.Array], PyTree],
    score_fn: Callable[[PyTree, jax.Array], Any],
    *,
    key: jax.Array,
    num_inits: int = 10,
) -> ILC:
    r"""Invariant learning consistency of an algorithm.

    .. math::

      \mathrm{ILC}(\mathcal{A}, p_{\theta_0}) = -\mathbb{E}_{\theta_0 \sim p_{\theta_0}}
          [I_\epsilon(\mathcal{A}_\infty(\theta_0))]

    Args:
      train_fn: `train_fn(key) -> params`: draws parameters, trains them with the
        algorithm and returns what it converged to. Called once for each
        initialisation, from Python: jit it yourself.
      score_fn: `score_fn(params, key) -> scalar`, the inconsistency score, such as the
        `score` of `inconsistency`.
      key: random key, `jax.random.key(seed)`.
      num_inits: initialisations.

    Returns:
      An `ILC`.

    Raises:
      TypeError: a score that is not a real scalar.
      ValueError: num_inits below 1.

    Edge cases:
      ======================================  ======================================
      an infinite score                       the value is -infinity
      scores that are lower bounds            the value is an upper bound
      ======================================  ======================================

    Example:
      >>> import jax, jax.numpy as jnp, hardvary
      >>> hessians = jnp.stack([jnp.eye(2), jnp.diag(jnp.array([4.0, 1.0]))])
      >>> train_fn = lambda key: hessians  # of a quadratic: the same at every minimum
      >>> score_fn = lambda hessians, key: (
      ...     hardvary.consistency.quadratic_inconsistency(hessians, 0.1))
      >>> result = hardvary.consistency.ilc(
      ...     train_fn, score_fn, key=jax.random.key(0), num_inits=3)
      >>> round(float(result.value), 3), round(float(result.standard_error), 3)
      (-0.4, 0.0)

    References:
      Parascandolo et al., ICLR 2021, section 2, equation (2).
    """
    _validate.at_least("num_inits", num_inits, 1)
    scores = []
    for init_key in jax.random.split(key, num_inits):
        train_key, score_key = jax.random.split(init_key)
        returned = score_fn(train_fn(train_key), score_key)
        if not _validate.is_array(returned):
            found = _validate.a_or_an(type(returned).__name__)
            raise TypeError(
                "ilc: score_fn must return a scalar, such as the score of what "
                f"inconsistency found, got {found}"
            )
        score = jnp.asarray(returned)
        _validate.real_floating(score, "ilc: scores")
        if score.ndim:
            raise TypeError(f"ilc: a score must be a scalar, got shape {score.shape}")
        scores.append(score)
    stacked = jnp.stack(scores)
    mean = jnp.mean(stacked)
    spread = jnp.sqrt(jnp.sum(jnp.square(stacked - mean)) / max(num_inits - 1, 1))
    error = spread / math.sqrt(num_inits) if num_inits > 1 else mean * jnp.nan
    return ILC(value=-mean, standard_error=error, scores=stacked)
