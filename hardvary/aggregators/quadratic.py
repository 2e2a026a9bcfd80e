"""Small quadratic programs with bounds, solved exactly inside a `jit`.

The matrix is a Gramian with a diagonal of 1, at the most: symmetric, possibly singular,
without eigenvalues below 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardvary import sharding
from hardvary._eigh import eigh
from hardvary._sums import sums_and_minima

# Rounds of exchanges in which no infeasibility went away, before the problem is made an
# easier one: cycles end there.
_PATIENCE = 3
# Of exchanges, beside one for every component: many more than any problem has needed.
_ROUNDS = 100


class _Pivoting(NamedTuple):
    inside: jax.Array
    wrong: jax.Array
    x: jax.Array
    center: jax.Array
    near: jax.Array
    fewest: jax.Array
    patience: jax.Array
    rounds: jax.Array
    moves: jax.Array


def complementary(
    matrix: jax.Array, vector: jax.Array, guess: jax.Array | None = None
) -> jax.Array:
    """`x >= 0` with `M x + q >= 0`, where one of the two is 0 in every component.

    It minimizes `x M x / 2 + q x` over `x >= 0`. By exchanging all components on the
    wrong side at once (block principal pivoting, Portugal et al. 1994). M may be
    singular: what is solved is M + d I, d a few roundings, around 0, then around what
    came out, until nothing moves (the proximal point method). Where exchanges go round
    in circles d grows, and shrinks again step by step.

    Args:
      matrix: `[n, n]`, M.
      vector: `[n]`, q; components with a zero row in M must be >= 0, and where M says
        nothing in a direction of x >= 0, q must not fall in it.
      guess: `[n]`, where x is probably positive.
    """
    size, eps = len(vector), jnp.finfo(matrix.dtype).eps
    identity = jnp.eye(size, dtype=matrix.dtype)
    # Enough for factors of a singular matrix to be precise.
    least = jnp.asarray(64 * eps * size**0.5, matrix.dtype)
    tolerance = 8 * eps * (1 + jnp.max(jnp.abs(vector)))

    def go_on(state: _Pivoting) -> jax.Array:
        return state.moves & (state.rounds < _ROUNDS + size)

    def step(state: _Pivoting) -> _Pivoting:
        inside = state.inside ^ state.wrong
        regular = matrix + state.near * identity
        shifted = vector - state.near * state.center
        system = jnp.where(inside[:, None] & inside[None, :], regular, identity)
        factor = jax.scipy.linalg.cho_factor(system, lower=True)
        right = jnp.where(inside, -shifted, 0)
        x = jax.scipy.linalg.cho_solve(factor, right)
        x += jax.scipy.linalg.cho_solve(factor, right - _matmul(system, x))
        x = jnp.where(inside, x, 0)

        slack = _matmul(regular, x) + shifted
        largest = tolerance * jnp.maximum(1, jnp.max(jnp.abs(x)))
        wrong = jnp.where(inside, x, slack) < -largest
        count = jnp.sum(wrong)
        solved = count == 0
        change = state.near * jnp.max(jnp.abs(x - state.center))
        patience = jnp.where(count < state.fewest, _PATIENCE, state.patience - 1)
        again = solved | (patience == 0)
        near = jnp.where(solved, state.near / 5, state.near)
        near = jnp.where(patience == 0, jnp.sqrt(state.near), near)
        return _Pivoting(
            inside=inside,
            wrong=wrong,
            x=x,
            center=jnp.where(solved, jnp.maximum(x, 0), state.center),
            near=jnp.clip(near, least, 1),
            fewest=jnp.where(again, size + 1, jnp.minimum(count, state.fewest)),
            patience=jnp.where(again, _PATIENCE, patience),
            rounds=state.rounds + 1,
            moves=~solved | (state.near > least) | (change > largest),
        )

    nothing = jnp.zeros_like(vector)
    wrong = vector < -tolerance
    moves = jnp.any(wrong)
    if guess is not None:
        wrong = jnp.where(moves & jnp.any(guess), guess, wrong)
    start = _Pivoting(
        inside=jnp.zeros(size, bool),
        wrong=wrong,
        x=nothing,
        center=nothing,
        near=least,
        fewest=jnp.asarray(size + 1),
        patience=jnp.asarray(_PATIENCE),
        rounds=jnp.asarray(0),
        moves=moves,
    )
    start = sharding.vary_like(start, (matrix, vector, guess))
    return jnp.maximum(jax.lax.while_loop(go_on, step, start).x, 0)


def shortest_reaching(
    matrix: jax.Array, heights: jax.Array, guess: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`x >= 0` and `rest` such that `sum_e x_e a_e / rest` is the shortest of its kind.

    Of all y with `<y, a_e> >= h_e`; M is the Gramian of the a_e, of length 1. It is as
    long as `sqrt(1 / rest - 1)`. By least squares, which have a solution where there is
    no such y (Lawson and Hanson 1974, chapter 23): then rest is 0, and x combines the
    a_e to 0.

    Args:
      matrix: `[n, n]`, M.
      heights: `[n]`, h; components with a zero row in M must be <= 0.
      guess: as for `complementary`.
    """
    scales = jax.lax.rsqrt(1 + heights**2)
    lifted = (matrix + heights[:, None] * heights[None, :]) * (
        scales[:, None] * scales[None, :]
    )
    x = complementary(lifted, -heights * scales, guess) * scales
    return x, 1 - heights @ x


class _Steps(NamedTuple):
    x: jax.Array
    gradient: jax.Array
    direction: jax.Array
    proportional: jax.Array
    violation: jax.Array
    steps: jax.Array


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
    # In what follows a column for each vector: XLA on CPU is fast at their sums.
    lower = jnp.eye(size, dtype=dtype)
    # The largest eigenvalue is at most the largest sum of a row.
    stride = 1.9 / jnp.maximum(jnp.max(jnp.sum(jnp.abs(matrix), axis=1)), 1)
    rounding = eps * jnp.sqrt(jnp.max(jnp.sum(matrix**2, axis=1)))

    def of_columns(summed: list[jax.Array], least: Any = ()) -> list[jax.Array]:
        return [total[None] for total in sums_and_minima(summed, list(least))]

    def parts(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        free = x > lower
        return jnp.where(free, gradient, 0), jnp.where(
            free, 0, jnp.minimum(gradient, 0)
        )

    def arrived(x: jax.Array, gradient: jax.Array, image: Any) -> tuple[Any, ...]:
        inner, outer = parts(x, gradient)
        # How far a step along the gradient can go inside of the face.
        reduced = jnp.minimum(jnp.where(x > lower, (x - lower) / stride, 0), inner)
        terms = [inner * inner, outer * outer, reduced * inner, x * x, inner * image]
        inner2, outer2, reduced2, x2, along_image = of_columns(terms)
        return outer2 <= reduced2, (inner2 + outer2) / x2, along_image

    def far(state: _Steps, factor: float) -> jax.Array:
        return state.violation > (factor * rounding) ** 2

    def go_on(state: _Steps) -> jax.Array:
        return jnp.any(far(state, 4)) & (state.steps < min(60 + 2 * size, 400))

    def step(state: _Steps) -> _Steps:
        x, gradient, direction, proportional, *_ = state
        along = jnp.where(proportional, direction, parts(x, gradient)[1])
        image = _matmul(matrix, along)
        room = jnp.where(
            along > 0, (x - lower) / jnp.where(along > 0, along, 1), jnp.inf
        )
        terms = [along * image, along * along, gradient * along]
        curvature, along2, slope, most = of_columns(terms, [room])
        # Otherwise a direction in which M says nothing, to rounding.
        curved = curvature > 4 * eps * along2
        curvature = jnp.where(curved, curvature, 1)
        length = jnp.where(curved, slope / curvature, 0)
        expands = proportional & ((length > most) | ~curved)
        length = jnp.where(expands, jnp.where(jnp.isfinite(most), most, 0), length)
        moved = jnp.maximum(x - length * along, lower)
        # Past the face: a step of the projected gradient.
        there = parts(moved, gradient - length * image)[0]
        further = jnp.maximum(moved - stride * there, lower)
        x = jnp.where(expands, further, moved)
        gradient = _matmul(matrix, x)
        goes_on = proportional & ~expands & curved
        proportional, violation, along_image = arrived(x, gradient, image)
        ratio = jnp.where(goes_on, along_image / curvature, 0)
        conjugate = parts(x, gradient)[0] - jnp.where(goes_on, ratio * direction, 0)
        return _Steps(x, gradient, conjugate, proportional, violation, state.steps + 1)

    proportional, violation, _ = arrived(lower, matrix, matrix)
    inner, _ = parts(lower, matrix)
    start = _Steps(lower, matrix, inner, proportional, violation, jnp.asarray(0))
    start = sharding.vary_like(start, matrix)
    end = jax.lax.while_loop(go_on, step, start)
    rows, done = end.x.T, ~far(end, 8)[0]

    def exact(row: Any) -> jax.Array:
        # Of more vectors than dimensions, mostly: slower, and sure to end.
        x, low, start, done = row
        return jax.lax.cond(
            done, lambda: x, lambda: low + complementary(matrix, start, x > low)
        )

    return jax.lax.cond(
        jnp.all(done),
        lambda: rows,
        lambda: jax.lax.map(exact, (rows, lower, matrix, done)),
    )


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
    matrix = gramian + jnp.diag(used * (1 + 64 * eps) - diagonal)
    steps = 2.0 ** -jnp.arange(0, 24, dtype=dtype)

    def go_on(state: Any) -> jax.Array:
        *_, moves, count = state
        return moves & (count < 200)

    def step(state: Any) -> Any:
        w, before, _, count = state
        image, barrier = _matmul(matrix, w), w**-power
        factor = jax.scipy.linalg.cho_factor(
            matrix + jnp.diag(power * barrier / w), lower=True
        )
        direction = jax.scipy.linalg.cho_solve(factor, barrier - image)
        decrement = (barrier - image) @ direction
        # Slopes of what is minimized, which are precise where its values are not.
        points = w[None] + steps[:, None] * direction[None]
        inside = jnp.all(points > 0, axis=1)
        gains = jnp.where(inside[:, None], points, 1) ** -power @ direction
        slopes = direction @ image - gains
        slopes += steps * (direction @ _matmul(matrix, direction))
        close = (1 + power) * jnp.max(jnp.abs(direction / w)) < 0.25
        enough = inside & (close | (slopes <= 0.1 * decrement))
        found = jnp.any(enough)
        chosen = jnp.argmax(enough)
        moved = jnp.where(found, points[chosen], w)
        # From here a whole step squares the error, or nothing is left but rounding.
        last = (decrement <= 0.1 * eps * (w @ barrier)) | (decrement > 0.25 * before)
        last &= close & (chosen == 0)
        before = jnp.where(close, decrement, jnp.inf)
        return moved, before, found & ~last, count + 1

    start = used ** (-1 / (1 + power)) * size ** (-1 / (1 + power))
    far = jnp.asarray(jnp.inf, dtype)
    state = (start, far, jnp.asarray(True), jnp.asarray(0))
    state = sharding.vary_like(state, (matrix, power))
    w, *_ = jax.lax.while_loop(go_on, step, state)
    return jnp.where(diagonal > 0, w, 0)


def pseudo_inverse_times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """`pinv(M) v` of a symmetric M without eigenvalues below 0."""
    values, vectors = spectrum(matrix)
    inverse = jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0)
    return _matmul(vectors, inverse * _matmul(vectors.T, vector))


def spectrum(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, 0 where they are rounding, and eigenvectors in columns."""
    values, vectors = eigh(matrix)
    bound = len(matrix) * jnp.finfo(matrix.dtype).eps * jnp.max(jnp.abs(values))
    return jnp.where(values > bound, values, 0), vectors
