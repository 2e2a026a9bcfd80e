"""Means of symmetric positive definite matrices: the Karcher mean."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hardvary import _validate
from hardvary.consistency import spd

# More than any input took that float64 can represent; see
# tests/consistency/test_means.py.
MAX_ITERATIONS = 2000


def karcher_mean(matrices: Any) -> jax.Array:
    r"""Geometric mean of symmetric positive definite matrices.

    The :math:`X` with

    .. math:: \sum_e \log(X^{-1/2} A_e X^{-1/2}) = 0,

    which is also the point whose squared Riemannian distances to all :math:`A_e` have
    the smallest sum. For matrices that commute it has the geometric means of their
    eigenvalues; for two matrices it is
    :math:`A^{1/2} (A^{-1/2} B A^{-1/2})^{1/2} A^{1/2}`. It is what the mean of
    gradients becomes when the AND of environments replaces their OR: a direction is
    steep in it only if it is steep in all.

    Args:
      matrices: floating `[..., env, n, n]`, symmetric and positive definite. Axes
        before the environments' are a batch.

    Returns:
      `[..., n, n]` in the dtype of the matrices; float16 and bfloat16 are computed in
      float32. In float64 the sum above has a norm below 1e-10 times the sum of the
      norms of its terms (or 1, if that is more), for condition numbers up to 1e8. First
      derivatives, forward and reverse, are those of the implicit function.

    Raises:
      TypeError: matrices that are not real floating.
      ValueError: not of shape `[..., env, n, n]`, no environment; (concrete values
        only) not symmetric, not positive definite or not finite.

    Edge cases:
      ======================================  ======================================
      one matrix                              itself
      not positive definite, while tracing    NaN
      condition number beyond 1 / eps         NaN: the Cholesky factor does not exist
      second derivatives                      not defined for repeated eigenvalues
      ======================================  ======================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> matrices = jnp.stack([jnp.diag(jnp.array([1.0, 9.0])), 4.0 * jnp.eye(2)])
      >>> mean = hardvary.consistency.karcher_mean(matrices)
      >>> [round(x, 3) for x in jnp.diag(mean).tolist()]
      [2.0, 6.0]

    References:
      Parascandolo et al., ICLR 2021, section 2.3. Ando, Li and Mathias, `Geometric
      means <https://doi.org/10.1016/j.laa.2003.11.019>`_, 2004. The length of a step
      is that of Bini and Iannazzo, `Computing the Karcher mean of symmetric positive
      definite matrices <https://doi.org/10.1016/j.laa.2011.08.052>`_, 2013.
    """
    matrices = spd.checked("karcher_mean", matrices, "matrices", definite=True)
    wide = matrices.astype(_validate.wide(matrices.dtype))
    mean = jnp.vectorize(_karcher, signature="(e,n,n)->(n,n)")(spd.symmetric(wide))
    return mean.astype(matrices.dtype)


@jax.jit
def _karcher_fixed_point(matrices: jax.Array) -> jax.Array:
    factors = jax.vmap(_cholesky)(matrices)
    dtype, size = matrices.dtype, matrices.shape[-1]
    tolerance = 4 * size * jnp.finfo(dtype).eps

    def step(state: Any) -> Any:
        factor, _, best, stale, iteration = state
        vectors, logs = _logs(factor, factors)
        total = jnp.einsum("eij,ej,ekj->ik", vectors, logs, vectors)
        sizes = jnp.sum(jnp.linalg.norm(logs, axis=-1))
        residual = jnp.linalg.norm(total) / jnp.maximum(sizes, 1)
        # The second derivative of a squared distance lies between 1 and this.
        half_spread = (logs.max(-1) - logs.min(-1)) / 2
        curvatures = _over_tanh(half_spread)
        length = 2 / (len(matrices) + jnp.sum(curvatures))
        exponents, directions = jnp.linalg.eigh(spd.symmetric(length * total))
        moved = factor @ (directions * jnp.exp(exponents / 2)[None, :])
        improved = residual < best
        return (
            jnp.linalg.qr(moved.T)[1].T,
            residual,
            jnp.minimum(best, residual),
            jnp.where(improved, 0, stale + 1),
            iteration + 1,
        )

    def unfinished(state: Any) -> jax.Array:
        _, residual, _, stale, iteration = state
        return (residual > tolerance) & (stale < 10) & (iteration < MAX_ITERATIONS)

    infinite = jnp.asarray(jnp.inf, dtype)
    start = (_first_guess(factors), infinite, infinite, 0, 0)
    factor, _, best, _, _ = jax.lax.while_loop(unfinished, step, start)
    converged = best <= jnp.sqrt(jnp.finfo(dtype).eps)
    return jnp.where(converged, spd.symmetric(factor @ factor.T), jnp.nan)


def _first_guess(factors: jax.Array) -> jax.Array:
    """Lower triangular factor: of the mean of two, or of the mean logarithm."""
    if len(factors) == 2:
        vectors, logs = _logs(factors[0], factors[1:])
        root = factors[0] @ (vectors[0] * jnp.exp(logs[0] / 4)[None, :])
    else:
        vectors, logs = _logs(jnp.eye(factors.shape[-1], dtype=factors.dtype), factors)
        mean = jnp.einsum("eij,ej,ekj->ik", vectors, logs, vectors) / len(factors)
        exponents, directions = jnp.linalg.eigh(spd.symmetric(mean))
        root = directions * jnp.exp(exponents / 2)[None, :]
    return jnp.linalg.qr(root.T)[1].T


def _logs(factor: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors and eigenvalues of the logarithms of matrices, seen from a point.

    Singular values of a product of factors, not eigenvalues of matrices: these would
    lose twice as many digits.

    Args:
      factor: [n, n], of the point F F'.
      factors: [env, n, n], of the matrices.

    Returns:
      Orthonormal columns [env, n, n] and eigenvalues [env, n] of
      log(F^-1 A_e F'^-1).
    """

    def one(other: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = jax.scipy.linalg.solve_triangular(factor, other, lower=True)
        vectors, values, _ = jnp.linalg.svd(seen)
        return vectors, 2 * jnp.log(values)

    return jax.vmap(one)(factors)


def _cholesky(matrix: jax.Array) -> jax.Array:
    """Cholesky factor, refined to the accuracy of its own entries.

    A Cholesky factor is that of a matrix a rounding error away, which changes the
    smallest eigenvalues of an ill-conditioned one by condition * eps: too much for what
    `karcher_mean` promises. With the exact residual, one correction leaves the square
    root of that.
    """
    factor = jnp.linalg.cholesky(matrix)
    solve = functools.partial(jax.scipy.linalg.solve_triangular, factor, lower=True)
    residual = solve(solve(_residual(matrix, factor)).T)
    lower = jnp.tril(residual)
    return factor + factor @ (lower - jnp.diag(jnp.diag(lower)) / 2)


def _residual(matrix: jax.Array, factor: jax.Array) -> jax.Array:
    """Residual matrix - factor factor', as if in a wider type.

    The factor is cut into pieces of so few bits that products of the leading ones are
    exact (Ozaki et al., 2012).
    """
    bits = jnp.finfo(factor.dtype).nmant + 1
    piece = (bits - math.ceil(math.log2(max(len(factor), 2)))) // 2
    _, exponents = jnp.frexp(jnp.max(jnp.abs(factor), axis=1))
    one = jnp.ones((), factor.dtype)
    scaled = factor * jnp.ldexp(one, -exponents)[:, None]
    unit = jnp.ldexp(one, jnp.asarray(piece))
    high = jnp.round(scaled * unit) / unit
    middle = jnp.round((scaled - high) * unit * unit) / (unit * unit)
    low = scaled - high - middle
    target = matrix * jnp.ldexp(one, -exponents)[:, None]
    target = target * jnp.ldexp(one, -exponents)[None, :]
    cross = high @ middle.T
    rest = high @ low.T
    result = ((target - high @ high.T) - (cross + cross.T)) - (
        middle @ middle.T + (rest + rest.T)
    )
    result = result * jnp.ldexp(one, exponents)[:, None]
    return result * jnp.ldexp(one, exponents)[None, :]


def _over_tanh(x: jax.Array) -> jax.Array:
    """Of x: x / tanh(x), 1 at 0."""
    small = jnp.abs(x) < 1e-4
    return jnp.where(small, 1 + x * x / 3, x / jnp.tanh(jnp.where(small, 1.0, x)))


def _over_sinh(x: jax.Array) -> jax.Array:
    """Of x: x / sinh(x), 1 at 0."""
    small = jnp.abs(x) < 1e-4
    return jnp.where(small, 1 - x * x / 6, x / jnp.sinh(jnp.where(small, 1.0, x)))


@jax.custom_jvp
@spd.exactly
def _karcher(matrices: jax.Array) -> jax.Array:
    if len(matrices) == 1:
        return matrices[0]
    return _karcher_fixed_point(matrices)


@_karcher.defjvp
@spd.exactly
def _karcher_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """By the implicit function theorem, in the coordinates of the solution.

    There the derivative of log(F^-1 A F'^-1) along a change of A multiplies by divided
    differences of the logarithm, and along a change of the point by minus
    (t / 2) / tanh(t / 2), for differences t of logarithms of eigenvalues.
    """
    [matrices], [changes] = primals, tangents
    mean = _karcher(matrices)
    factor = jnp.linalg.cholesky(mean)
    vectors, logs = _logs(factor, jax.vmap(_cholesky)(matrices))
    halves = (logs[:, :, None] - logs[:, None, :]) / 2
    roots = jnp.exp(-logs / 2)

    def rotated(symmetric: jax.Array) -> jax.Array:
        return jnp.einsum("eji,ejk,ekl->eil", vectors, symmetric, vectors)

    def back(symmetric: jax.Array) -> jax.Array:
        return jnp.einsum("eij,ejk,elk->il", vectors, symmetric, vectors)

    def apply(step: jax.Array) -> jax.Array:
        seen = rotated(jnp.broadcast_to(step, matrices.shape))
        return back(_over_tanh(halves) * seen)

    solve = functools.partial(jax.scipy.linalg.solve_triangular, factor, lower=True)

    def from_the_mean(change: jax.Array) -> jax.Array:
        return solve(solve(change).T).T

    seen = rotated(jax.vmap(from_the_mean)(changes))
    slopes = _over_sinh(halves) * roots[:, :, None] * roots[:, None, :]
    target = back(slopes * seen)
    # The eigenvalues of `apply` lie between the number of matrices and some ten times
    # that: conjugate gradients are at rounding after a few dozen steps.
    step = jax.lax.custom_linear_solve(
        apply, target, _conjugate_gradients, symmetric=True
    )
    return mean, factor @ step @ factor.T


def _conjugate_gradients(
    apply: Callable[[jax.Array], jax.Array], target: jax.Array
) -> jax.Array:
    tolerance = 4 * float(jnp.finfo(target.dtype).eps)
    return jax.scipy.sparse.linalg.cg(apply, target, tol=tolerance, maxiter=200)[0]
