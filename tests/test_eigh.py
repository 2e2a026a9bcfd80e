"""Eigenvectors by rotations against NumPy's, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hardvary import _eigh
from tests._compat import enable_x64
from tests.zoo import compile_quickly

RNG = np.random.default_rng


def _gramian(rows):
    return rows @ rows.T


MATRICES = {
    "generic": _gramian(RNG(0).normal(size=(80, 400))),
    "of odd size": _gramian(RNG(1).normal(size=(67, 90))),
    "singular": _gramian(RNG(2).normal(size=(66, 9))),
    "indefinite": np.triu(RNG(3).normal(size=(70, 70)), 1)
    + np.triu(RNG(3).normal(size=(70, 70)), 1).T,
    "scales": _gramian(
        RNG(4).normal(size=(65, 90)) * 10.0 ** RNG(5).uniform(-6, 0, size=(65, 1))
    ),
    "equal rows": np.ones((72, 72)),
    "nearly equal": np.eye(69) + 1e-3,
    "tiny": 1e-30 * _gramian(RNG(6).normal(size=(65, 70))),
    "huge": 1e30 * _gramian(RNG(7).normal(size=(65, 70))),
    "diagonal": np.diag(RNG(8).normal(size=66)),
    "nothing": np.zeros((65, 65)),
    "swapped": np.roll(np.eye(66), 33, axis=0),
    "three": _gramian(RNG(10).normal(size=(3, 3))),
}


def _check(matrix, values, vectors, roundings):
    matrix, values, vectors = (
        np.asarray(x, np.float64) for x in (matrix, values, vectors)
    )
    size = len(matrix)
    bound = roundings * np.finfo(np.float32).eps
    assert values.shape == (size,)
    assert vectors.shape == (size, size)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=bound)
    expected = np.linalg.eigvalsh(matrix)
    scale = max(np.abs(expected).max(), np.finfo(np.float32).tiny)
    np.testing.assert_allclose(values / scale, expected / scale, atol=bound)
    residual = matrix @ vectors - vectors * values
    np.testing.assert_allclose(residual / scale, 0, atol=8 * bound)


@pytest.mark.parametrize("name", MATRICES)
def test_rotations_end_at_eigenvalues_and_orthogonal_vectors(name):
    matrix = np.asarray(MATRICES[name], np.float32)
    values, vectors = jax.jit(_eigh.by_rotations)(matrix)
    assert np.all(np.diff(values) >= 0)
    _check(matrix, values, vectors, 20)


@pytest.mark.parametrize("name", ["generic", "of odd size", "singular"])
def test_rotations_of_float64_are_as_precise_as_it_is(name):
    with enable_x64(True):
        matrix = jnp.asarray(MATRICES[name])
        assert matrix.dtype == jnp.float64
        values, vectors = jax.jit(_eigh.by_rotations)(matrix)
    values, vectors = np.asarray(values), np.asarray(vectors)
    scale = values[-1]
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), atol=1e-14 * scale)
    np.testing.assert_allclose(
        vectors @ np.diag(values) @ vectors.T, matrix, atol=1e-13 * scale
    )


def test_a_matrix_that_is_not_finite_has_no_eigenvalues():
    matrix = np.asarray(MATRICES["of odd size"], np.float32)
    matrix[3, 5] = matrix[5, 3] = np.nan
    values, _ = jax.jit(_eigh.by_rotations)(matrix)
    assert np.all(np.isnan(values))


def test_derivatives_are_those_of_the_library():
    matrix = np.asarray(MATRICES["of odd size"], np.float32) / 90
    change = RNG(0).normal(size=matrix.shape).astype(np.float32)
    change += change.T

    def projected(eigh, matrix):
        values, vectors = eigh(matrix)
        # What does not depend on the signs of vectors.
        return values[-3:], jnp.square(vectors[:, -3:])

    def slopes(eigh):
        run = lambda matrix: projected(eigh, matrix)  # noqa: E731
        total = lambda matrix: sum(map(jnp.sum, run(matrix)))  # noqa: E731
        forward = jax.jvp(run, (matrix,), (change,))
        return forward, jax.grad(lambda x: total(x) + jnp.sum(run(x)[1] ** 2))(matrix)

    for ours, theirs in zip(
        jax.tree.leaves(slopes(_eigh.eigh)),
        jax.tree.leaves(slopes(jnp.linalg.eigh)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_mapped_matrices_are_taken_one_by_one():
    several = np.stack(
        [MATRICES["scales"], MATRICES["tiny"] * 1e30, MATRICES["nothing"]]
    )
    several = several.astype(np.float32)
    values, vectors = compile_quickly(jax.vmap(_eigh.by_rotations))(several)
    for matrix, own_values, own_vectors in zip(several, values, vectors, strict=True):
        _check(matrix, own_values, own_vectors, 20)


def test_matrices_may_differ_between_devices():
    matrix = np.asarray(MATRICES["of odd size"], np.float32)
    mesh = jax.make_mesh((2,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))

    def one(matrices):
        return _eigh.by_rotations(matrices[0])[0][None]

    run = jax.shard_map(one, mesh=mesh, in_specs=P("device"), out_specs=P("device"))
    values = jax.jit(run)(np.stack([matrix, 2 * matrix]))
    np.testing.assert_allclose(2 * values[0], values[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", [64, 65, 100, 101])
def test_rotations_are_for_what_wakes_threads_and_is_still_small(size):
    matrix = jax.ShapeDtypeStruct((size, size), jnp.float32)
    traced = str(jax.make_jaxpr(_eigh.eigh)(matrix))
    assert ("eigh" in traced.replace("_eigh", "")) == (size in (64, 101))
