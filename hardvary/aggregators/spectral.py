"""Singular values of gradients of very different sizes, from their inner products.

An eigenvalue of the Gramian is the square of a singular value. In float32 a gradient
that is some thousand times shorter than another one is rounding there, and an
orthogonal one looks like one that depends on it. So what depends on what is decided for
the gradients at length 1, and their lengths come back as one factor of a matrix whose
singular values are not squared.
"""

import jax
import jax.numpy as jnp

from hardvary.aggregators.quadratic import cosines, spectrum


def singular_values(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Singular values of the rows that have this Gramian, and their left vectors.

    Args:
      gramian: `[n, n]`; a zero row belongs to a vector of length 0.

    Returns:
      `[n]`, falling, 0 beyond the rank, and `[n, n]`, in columns.
    """
    matrix, lengths = cosines(gramian)
    values, vectors = spectrum(matrix)
    # Rows like those of the gradients, up to a rotation. Long ones first: bidiagonal
    # form then keeps what is precise about the short ones.
    order = jnp.argsort(-lengths)
    rows = lengths[:, None] * vectors * jnp.sqrt(values)[None, :]
    left, singular, _ = jnp.linalg.svd(rows[order], full_matrices=False)
    inside = jnp.arange(len(singular)) < jnp.sum(values > 0)
    return jnp.where(inside, singular, 0), left[jnp.argsort(order)]
