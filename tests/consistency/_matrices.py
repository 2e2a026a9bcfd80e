"""Random positive definite matrices, and the compiled functions of them."""

import jax
import numpy as np
from hypothesis import strategies as st

from hardvary.consistency import (
    determinant_bound,
    karcher_mean,
    quadratic_inconsistency,
)

seeds = st.integers(0, 10_000)
sizes = st.sampled_from([1, 2, 4])
numbers = st.sampled_from([2, 4])

mean_of = jax.jit(karcher_mean)
score_of = jax.jit(quadratic_inconsistency)
bound_of = jax.jit(determinant_bound)


def rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def from_eigenvalues(vectors, eigenvalues):
    matrix = (vectors * eigenvalues) @ vectors.T
    return (matrix + matrix.T) / 2


def draw(seed, size, number, condition=1e3, scale=1.0):
    """Matrices [number, size, size] whose condition is at most, and nearly, that."""
    rng = np.random.default_rng(seed)
    matrices = []
    for _ in range(number):
        eigenvalues = np.exp(rng.uniform(0, np.log(condition), size))
        eigenvalues[0] = 1
        eigenvalues[-1] = condition if size > 1 else eigenvalues[0]
        matrices.append(from_eigenvalues(rotation(rng, size), scale * eigenvalues))
    return np.array(matrices)


def assert_close(actual, expected, rtol=1e-9):
    size = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * size)
