"""Small quadratic programs with bounds, solved exactly inside a `jit`.

The matrix is a Gramian with a diagonal of 1, at the most: symmetric, possibly singular,
without eigenvalues below 0.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Rounds of exchanges in which no infeasibility went away, before one is exchanged at a
# time: cycles end there.
_PATIENCE = 3


def complementary(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """`x >= 0` with `M x + q >= 0`, where one of the two is 0 in every component.

    It minimizes `x M x / 2 + q x` over `x >= 0`. By exchanging all components on the
    wrong side at once (block principal pivoting, Portugal et al. 1994), one at a time
    where that makes no progress. Directions in which M says nothing are decided by the
    shortest x.

    Args:
      matrix: `[n, n]`, M.
      vector: `[n]`, q; components with a zero row in M must be >= 0.
    """
    size, eps = len(vector), jnp.finfo(matrix.dtype).eps
    identity = jnp.eye(size, dtype=matrix.dtype)
    # Small beside the rounding of a Gramian; what factors of a singular one need is
    # larger, and is taken out again.
    matrix, safe = matrix + 2 * eps * identity, 4 * size * eps * identity
    tolerance = 8 * eps * (1 + jnp.max(jnp.abs(vector)))
    index = jnp.arange(size)

    def solved(inside: jax.Array) -> tuple[jax.Array, jax.Array]:
        both = inside[:, None] & inside[None, :]
        system = jnp.where(both, matrix, identity)
        factor = jax.scipy.linalg.cho_factor(system + safe)
        right = jnp.where(inside, -vector, 0)
        x = jax.scipy.linalg.cho_solve(factor, right)
        for _ in range(3):
            x += jax.scipy.linalg.cho_solve(factor, right - _matmul(system, x))
        x = jnp.where(inside, x, 0)
        return x, _matmul(matrix, x) + vector

    def wrong_of(inside: jax.Array, x: jax.Array, slack: jax.Array) -> jax.Array:
        largest = jnp.maximum(1, jnp.max(jnp.abs(x)))
        return jnp.where(inside, x < -tolerance * largest, slack < -tolerance * largest)

    def go_on(state: Any) -> jax.Array:
        *_, wrong, rounds = state
        return jnp.any(wrong) & (rounds < 20 + 2 * size)

    def step(state: Any) -> Any:
        inside, fewest, patience, _, wrong, rounds = state
        count = jnp.sum(wrong)
        better = count < fewest
        patience = jnp.where(better, _PATIENCE, patience - 1)
        last = index == jnp.max(jnp.where(wrong, index, -1))
        inside ^= jnp.where(better | (patience >= 0), wrong, last)
        x, slack = solved(inside)
        wrong = wrong_of(inside, x, slack)
        fewest = jnp.minimum(count, fewest)
        return inside, fewest, patience, x, wrong, rounds + 1

    nothing = jnp.zeros(size, bool)
    x = jnp.zeros_like(vector)
    start = (
        nothing,
        jnp.asarray(size + 1),
        jnp.asarray(_PATIENCE),
        x,
        wrong_of(nothing, x, vector),
        jnp.asarray(0),
    )
    _, _, _, x, _, _ = jax.lax.while_loop(go_on, step, start)
    return jnp.maximum(x, 0)


def cone_projections(matrix: jax.Array) -> jax.Array:
    """Row by row the `v >= e_i` that minimizes `v M v`, `e_i` the i-th unit vector.

    Projects each of the vectors whose Gramian M is on the cone of all that have no
    negative product with any of them. By conjugate gradients in the faces of the bound
    (MPRGP, Dostal and Schoeberl 2005), for all rows together: two products of matrices
    a step, however many rows there are.

    Args:
      matrix: `[n, n]`.

    Returns:
      `[n, n]`, a row for each vector.
    """
    size, dtype = len(matrix), matrix.dtype
    eps = jnp.finfo(dtype).eps
    lower = jnp.eye(size, dtype=dtype)
    # The largest eigenvalue is at most the largest sum of a row.
    stride = 1.9 / jnp.maximum(jnp.max(jnp.sum(jnp.abs(matrix), axis=1)), 1)
    times = lambda rows: _matmul(rows, matrix)  # noqa: E731
    dot = lambda a, b: jnp.sum(a * b, axis=1, keepdims=True)  # noqa: E731

    def parts(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        free = x > lower
        return jnp.where(free, gradient, 0), jnp.where(
            free, 0, jnp.minimum(gradient, 0)
        )

    def violation(x: jax.Array, gradient: jax.Array) -> jax.Array:
        inner, outer = parts(x, gradient)
        return dot(inner, inner) + dot(outer, outer)

    def far(x: jax.Array, gradient: jax.Array, factor: float) -> jax.Array:
        return violation(x, gradient) > (factor * eps) ** 2 * dot(x, x)

    def go_on(state: Any) -> jax.Array:
        x, gradient, _, step = state
        return jnp.any(far(x, gradient, 16)) & (step < 60 + 2 * size)

    def step(state: Any) -> Any:
        x, gradient, direction, steps = state
        inner, outer = parts(x, gradient)
        # How far a step along the gradient can go inside of the face.
        reduced = jnp.minimum(jnp.where(x > lower, (x - lower) / stride, 0), inner)
        proportional = dot(outer, outer) <= dot(reduced, inner)
        along = jnp.where(proportional, direction, outer)
        image = times(along)
        curvature = dot(along, image)
        # A direction in which M says nothing, to rounding.
        curvature = jnp.where(curvature > 4 * eps * dot(along, along), curvature, 0)
        length = dot(gradient, along) / jnp.where(curvature > 0, curvature, 1)
        length = jnp.where(curvature > 0, length, 0)
        room = jnp.where(
            along > 0, (x - lower) / jnp.where(along > 0, along, 1), jnp.inf
        )
        most = jnp.min(room, axis=1, keepdims=True)
        expands = proportional & ((length > most) | (curvature <= 0))
        length = jnp.where(expands, jnp.where(jnp.isfinite(most), most, 0), length)
        moved = jnp.maximum(x - length * along, lower)
        slope = gradient - length * image
        # Past the face: a step of the projected gradient.
        further = jnp.maximum(moved - stride * parts(moved, slope)[0], lower)
        x = jnp.where(expands, further, moved)
        gradient = times(x)
        inner, _ = parts(x, gradient)
        ratio = dot(inner, image) / jnp.where(curvature > 0, curvature, 1)
        conjugate = inner - jnp.where(curvature > 0, ratio, 0) * direction
        goes_on = proportional & ~expands
        return x, gradient, jnp.where(goes_on, conjugate, inner), steps + 1

    gradient = matrix
    start = (lower, gradient, parts(lower, gradient)[0], jnp.asarray(0))
    x, gradient, *_ = jax.lax.while_loop(go_on, step, start)

    def one_by_one() -> jax.Array:
        # Of more vectors than dimensions, mostly: slower, and sure to end.
        return lower + jax.vmap(functools.partial(complementary, matrix))(matrix)

    return jax.lax.cond(jnp.any(far(x, gradient, 256)), one_by_one, lambda: x)


def _matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def cosines(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gramian of the same vectors at length 1, and their lengths.

    Whatever their sizes, its entries are precise. A vector of length 0 has a row of 0.
    """
    lengths = jnp.sqrt(jnp.diagonal(gramian))
    inverse = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
    return gramian * inverse[:, None] * inverse[None, :], lengths


def balanced(gramian: jax.Array, power: Any) -> jax.Array:
    """`w > 0` with `G w = w ** -power`, component by component; a zero row is left out.

    The minimum of `w G w / 2 - sum h(w)`, where `h' = w ** -power`: convex, found by
    Newton's method with a line search. Where vectors can cancel out there is none, and
    w is as large as the rounding of G allows.
    """
    size, dtype = len(gramian), gramian.dtype
    eps = jnp.finfo(dtype).eps
    power = jnp.asarray(power, dtype)
    diagonal = jnp.diagonal(gramian)
    # Left out: anything that has a solution and meets no other.
    used = jnp.where(diagonal > 0, diagonal, 1)
    matrix = gramian + jnp.diag(used * (1 + 2 * eps) - diagonal)
    steps = 2.0 ** -jnp.arange(0, 24, dtype=dtype)

    def value(w: jax.Array) -> jax.Array:
        logs = jnp.log(w)
        near = jnp.abs(1 - power) < 1e-3
        rate = jnp.where(near, 1, 1 - power)
        # (w ** rate - 1) / rate, which is log(w) in the limit.
        other = jnp.where(near, logs, jnp.expm1(rate * logs) / rate)
        return 0.5 * w @ _matmul(matrix, w) - jnp.sum(other)

    def newton(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradient = _matmul(matrix, w) - w**-power
        hessian = matrix + jnp.diag(power * w ** (-power - 1))
        factor = jax.scipy.linalg.cho_factor(hessian)
        direction = -jax.scipy.linalg.cho_solve(factor, gradient)
        return direction, -gradient @ direction

    def go_on(state: Any) -> jax.Array:
        _, step, decrement = state
        return (decrement > 4 * eps) & (step < 200)

    def step(state: Any) -> Any:
        w, count, _ = state
        direction, decrement = newton(w)
        candidates = w[None] + steps[:, None] * direction[None]
        inside = jnp.all(candidates > 0, axis=1)
        safe = jnp.where(inside[:, None], candidates, w[None])
        values = jnp.where(inside, jax.vmap(value)(safe), jnp.inf)
        enough = values <= value(w) - 0.1 * steps * decrement
        # Near the minimum values are rounding, and whole steps are right.
        enough = jnp.where(decrement < 1e-2, inside, enough)
        chosen = jnp.argmax(enough)
        moved = jnp.where(jnp.any(enough), candidates[chosen], w)
        return moved, count + 1, jnp.where(jnp.any(enough), decrement, 0)

    start = used ** (-1 / (1 + power)) * size ** (-1 / (1 + power))
    w, *_ = jax.lax.while_loop(
        go_on, step, (start, jnp.asarray(0), jnp.asarray(jnp.inf, dtype))
    )
    return jnp.where(diagonal > 0, w, 0)


def pseudo_inverse_times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """`pinv(M) v` of a symmetric M without eigenvalues below 0."""
    values, vectors = spectrum(matrix)
    inverse = jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0)
    return _matmul(vectors, inverse * _matmul(vectors.T, vector))


def spectrum(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, 0 where they are rounding, and eigenvectors in columns."""
    values, vectors = jnp.linalg.eigh(matrix)
    bound = len(matrix) * jnp.finfo(matrix.dtype).eps * jnp.max(jnp.abs(values))
    return jnp.where(values > bound, values, 0), vectors
