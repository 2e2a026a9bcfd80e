"""Eigenvectors of small symmetric matrices, without waking LAPACK's threads."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hardvary import sharding

# OpenBLAS, which does LAPACK's work on CPUs, has its threads multiply what is larger,
# and they keep processors busy for tens of milliseconds after a call: far longer than
# either way takes up to the second size.
_ONE_THREAD = 64
_LARGEST = 100
# Six to nine do.
_SWEEPS = 12
_HIGHEST = jax.lax.Precision.HIGHEST


def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues `[n]` of a symmetric `[n, n]`, rising, and vectors in columns."""
    if not (_ONE_THREAD < len(matrix) <= _LARGEST and sharding.on_cpu()):
        return jnp.linalg.eigh(matrix)
    return by_rotations((matrix + matrix.T) / 2)


@jax.custom_jvp
def by_rotations(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `eigh`, by Jacobi's method: half as many rotations at once as there are rows.

    Pairs meet as in a tournament where everyone plays everyone, so that a sweep has
    n - 1 rounds (Brent and Luk 1985). What it ends with is orthogonal to a few
    roundings only after one step of Newton's method, whatever rotations have added up
    to; eigenvalues are then the Rayleigh quotients.
    """
    size, dtype = len(matrix), matrix.dtype
    # Nobody meets the one more row of an odd number: its entries are 0.
    odd = size % 2
    even = jnp.pad(matrix, (0, odd))
    half = len(even) // 2
    eps = jnp.finfo(dtype).eps

    def meet(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rotated, rows, rounding = state
        diagonal = jnp.diagonal(rotated)
        corner = jnp.diagonal(rotated[:half, half:])
        # What is rounding would be turned by any angle, and turn rounding into more.
        apart = jnp.abs(corner) > rounding
        safe = jnp.where(apart, corner, 1)
        ratio = (diagonal[half:] - diagonal[:half]) / (2 * safe)
        # The smaller of two angles, at most 45 degrees: what has converged stays.
        root = jnp.abs(ratio) + jnp.sqrt(1 + ratio**2)
        tangent = jnp.where(ratio < 0, -1 / root, 1 / root)
        tangent = jnp.where(apart, tangent, 0)
        cosine = 1 / jnp.sqrt(1 + tangent**2)
        pair = cosine[:, None], (cosine * tangent)[:, None]
        rotated = _rotate(_rotate(rotated, pair).T, pair)
        rotated = _next_round(_next_round(rotated).T)
        return rotated, _next_round(_rotate(rows, pair)), rounding

    def go_on(state: tuple[jax.Array, ...]) -> jax.Array:
        rotated, _, sweeps = state
        entries = jnp.abs(rotated)
        others = jnp.where(jnp.eye(len(rotated), dtype=bool), 0, entries)
        return (jnp.max(others) > 4 * eps * jnp.max(entries)) & (sweeps < _SWEEPS)

    def sweep(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rotated, rows, sweeps = state
        rounds = len(rotated) - 1
        state = (rotated, rows, eps * jnp.max(jnp.abs(rotated)))
        rotated, rows, _ = jax.lax.fori_loop(0, rounds, meet, state)
        return rotated, rows, sweeps + 1

    start = (jnp.eye(len(even), dtype=dtype), jnp.asarray(0))
    start = sharding.vary_like(start, matrix)
    _, rows, _ = jax.lax.while_loop(go_on, sweep, (even, *start))
    vectors = rows.T[:size]
    lengths = _matmul(vectors.T, vectors)
    vectors = 1.5 * vectors - 0.5 * _matmul(vectors, lengths)
    values = jnp.sum(vectors * _matmul(matrix, vectors), axis=0)
    # The row that was added, which is none of the first.
    added = jnp.diagonal(lengths) < 0.5
    order = jnp.argsort(jnp.where(added, jnp.inf, values))[:size]
    return values[order], vectors[:, order]


@by_rotations.defjvp
def _(primals: Sequence[jax.Array], tangents: Sequence[jax.Array]) -> tuple[Any, Any]:
    values, vectors = by_rotations(*primals)
    inner = _matmul(vectors.T, _matmul(tangents[0], vectors))
    same = jnp.eye(len(values), dtype=bool)
    gaps = jnp.where(same, 1, values[None, :] - values[:, None])
    turned = _matmul(vectors, jnp.where(same, 0, inner / gaps))
    return (values, vectors), (jnp.diagonal(inner), turned)


def _rotate(rows: jax.Array, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    cosine, sine = pair
    first, second = jnp.split(rows, 2)
    return jnp.concatenate(
        [cosine * first - sine * second, sine * first + cosine * second]
    )


def _next_round(rows: jax.Array) -> jax.Array:
    """Rows in new pairs: all but the first one move on by a seat, round the table."""
    first, second = jnp.split(rows, 2)
    return jnp.concatenate([first[:1], second[:1], first[1:-1], second[1:], first[-1:]])


def _matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=_HIGHEST)
