"""Scores of Hessians that disagree: the inconsistency, and a bound on it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hardvary import _validate
from hardvary.consistency import spd


def quadratic_inconsistency(hessians: Any, epsilon: Any) -> jax.Array:
    r"""Inconsistency score of a minimum that all environments share, exactly.

    .. math::

      I_\epsilon = \epsilon \max_{e, e'} \max_{v}
          \frac{v^\top H_{e'} v}{v^\top H_e v}
        = \epsilon \max_{e, e'} \lambda_{\max}(H_e^{-1} H_{e'})

    for losses :math:`L_e(\theta) = L^* + \frac12 (\theta - \theta^*)^\top H_e (\theta -
    \theta^*)`: how far the loss of one environment can rise while that of another
    changes by no more than :math:`\epsilon`.

    Args:
      hessians: floating `[..., env, n, n]`, symmetric and positive semidefinite. Axes
        before the environments' are a batch.
      epsilon: :math:`\epsilon` > 0, in units of the loss; may be traced.

    Returns:
      `[...]` in the dtype of the Hessians (float32 at least): `epsilon` where all
      Hessians are equal and more where they differ; infinite where one is flat in a
      direction in which another is not. A direction counts as flat where the curvature
      is below rounding: n * eps times the largest.

    Raises:
      TypeError: Hessians that are not real floating, an epsilon that is no real scalar.
      ValueError: Hessians not of shape `[..., env, n, n]`, no environment; (concrete
        values only) not symmetric, not positive semidefinite or not finite, an epsilon
        that is not positive.

    Edge cases:
      ======================================  ======================================
      flat in the same directions             the score of the others
      all zero                                0: no loss ever changes
      one environment                         `epsilon`
      negative curvature, while tracing       NaN
      ======================================  ======================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> hessians = jnp.array([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 5.0]]])
      >>> float(hardvary.consistency.quadratic_inconsistency(hessians, 0.1))
      0.5

    References:
      Parascandolo et al., ICLR 2021, section 2 and appendix A; there for two Hessians
      with common eigenvectors.
    """
    hessians = spd.checked("quadratic_inconsistency", hessians, "hessians")
    _validate.at_least("epsilon", epsilon, 0.0, strict=True)
    return _scaled(_largest_ratio, hessians, epsilon)


def determinant_bound(hessians: Any, epsilon: Any) -> jax.Array:
    r"""Bound on the inconsistency by an arithmetic and a geometric mean.

    .. math::

      I_\epsilon \le 2 \epsilon \Big(2 \Big(\frac{\det H_+}{\det H_\wedge}\Big)^{k}
          - 1\Big)

    with the arithmetic mean :math:`H_+` and the geometric mean :math:`H_\wedge` (see
    `karcher_mean`) of :math:`k` Hessians. The paper's Proposition 3, for :math:`k = 2`,
    has :math:`2 \epsilon (\det H_+ / \det H_\wedge)^2`. That is no bound: one parameter
    with curvatures 10 and 1 has the score :math:`10 \epsilon`, and it gives
    :math:`6.05 \epsilon`. Both are :math:`2 \epsilon` for equal Hessians.

    Why this one holds: for one parameter, two curvatures :math:`r` and 1 have
    :math:`(\det H_+ / \det H_\wedge)^2 = (r + 2 + 1/r) / 4`, so that the right side is
    :math:`\epsilon (r + 1/r)`. Two Hessians are diagonal in a common basis (of
    congruence, which leaves both sides as they are) and every other parameter's factor
    is at least 1. Further environments raise the ratio to the k-th power least when
    they equal the mean of the two, and then leave it as it is.

    Args:
      hessians: floating `[..., env, n, n]`, symmetric and positive semidefinite. Axes
        before the environments' are a batch.
      epsilon: :math:`\epsilon` > 0, in units of the loss; may be traced.

    Returns:
      `[...]` in the dtype of the Hessians (float32 at least), computed from logarithms
      of determinants: only a bound that is too large itself is infinite. Infinite also
      where one Hessian is flat in a direction in which another is not; directions in
      which all are flat are left out.

    Raises:
      TypeError: Hessians that are not real floating, an epsilon that is no real scalar.
      ValueError: Hessians not of shape `[..., env, n, n]`, no environment; (concrete
        values only) not symmetric, not positive semidefinite or not finite, an epsilon
        that is not positive.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> hessians = jnp.array([[[10.0]], [[1.0]]])
      >>> round(float(hardvary.consistency.determinant_bound(hessians, 1.0)), 3)
      10.1
      >>> round(float(hardvary.consistency.quadratic_inconsistency(hessians, 1.0)), 3)
      10.0

    References:
      Parascandolo et al., ICLR 2021, Proposition 3.
    """
    hessians = spd.checked("determinant_bound", hessians, "hessians")
    _validate.at_least("epsilon", epsilon, 0.0, strict=True)
    return _scaled(_determinant_ratio, hessians, epsilon)


def _scaled(
    score: Callable[[jax.Array], jax.Array], hessians: jax.Array, epsilon: Any
) -> jax.Array:
    wide = spd.symmetric(hessians.astype(_validate.wide(hessians.dtype)))
    value = jnp.vectorize(score, signature="(e,n,n)->()")(wide)
    return jnp.asarray(epsilon, value.dtype) * value


# Scores of Hessians [env, n, n], for an epsilon of 1.


def _whitener(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`W` with W' hessian W the identity where it is not flat.

    Returns:
      `W` [n, n], with zeros for columns of flat directions; and those directions
      [n, n], with zeros for the others.
    """
    eigenvalues, vectors = jnp.linalg.eigh(hessian)
    size = jnp.max(jnp.abs(eigenvalues))
    rounding = len(eigenvalues) * jnp.finfo(eigenvalues.dtype).eps * size
    indefinite = eigenvalues[0] < -8 * rounding
    eigenvalues = jnp.where(indefinite, jnp.nan, eigenvalues)
    flat = eigenvalues <= rounding
    scale = jnp.where(flat, 0.0, jax.lax.rsqrt(jnp.where(flat, 1.0, eigenvalues)))
    return vectors * scale[None, :], jnp.where(flat[None, :], vectors, 0.0)


def _curved(hessian: jax.Array, directions: jax.Array) -> jax.Array:
    """Whether the Hessian is not flat in one of the directions [n, n]."""
    rounding = len(hessian) * jnp.finfo(hessian.dtype).eps * jnp.max(jnp.abs(hessian))
    curvatures = jnp.sum(directions * (hessian @ directions), axis=0)
    return jnp.max(curvatures) > 8 * rounding


@jax.jit
@spd.exactly
def _largest_ratio(hessians: jax.Array) -> jax.Array:
    def pair(hessian: jax.Array, other: jax.Array) -> jax.Array:
        whitener, flat = _whitener(hessian)
        ratio = jnp.linalg.eigvalsh(spd.symmetric(whitener.T @ other @ whitener))[-1]
        return jnp.where(_curved(other, flat), jnp.inf, ratio)

    over_others = jax.vmap(pair, (None, 0))
    return jnp.max(jax.vmap(over_others, (0, None))(hessians, hessians))


@jax.jit
@spd.exactly
def _determinant_ratio(hessians: jax.Array) -> jax.Array:
    mean = jnp.mean(hessians, axis=0)
    whitener, _ = _whitener(mean)
    # Where all are flat, factors of 1 in the determinants.
    rest = jnp.diag(jnp.where(jnp.any(whitener != 0, axis=0), 0.0, 1.0))

    def log_det(hessian: jax.Array) -> jax.Array:
        # The arithmetic mean is the identity here, and its log-determinant 0.
        white = spd.symmetric(whitener.T @ hessian @ whitener) + rest
        singular = _curved(mean, _whitener(hessian)[1])
        return jnp.where(singular, -jnp.inf, jnp.linalg.slogdet(white)[1])

    # Rounding must not make the ratio less than 1.
    log_ratio = jnp.maximum(-jnp.sum(jax.vmap(log_det)(hessians)), 0.0)
    return 2 * jnp.exp(log_ratio + jnp.log(2 - jnp.exp(-log_ratio)))
