"""The mean of positive definite matrices."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from jax.test_util import check_grads

from hardvary.consistency import karcher_mean
from tests.consistency._matrices import (
    assert_close,
    draw,
    from_eigenvalues,
    mean_of,
    numbers,
    rotation,
    seeds,
    sizes,
)


def residual(matrices, mean):
    """The norm of the sum of logarithms over that of their norms, in 60 digits."""

    def function(matrix, scalar):
        eigenvalues, vectors = mpmath.eigsy((matrix + matrix.T) / 2)
        return vectors * mpmath.diag([scalar(x) for x in eigenvalues]) * vectors.T

    with mpmath.workdps(60):
        root = function(mpmath.matrix(mean.tolist()), lambda x: 1 / mpmath.sqrt(x))
        logs = [
            function(root * mpmath.matrix(matrix.tolist()) * root, mpmath.log)
            for matrix in matrices
        ]
        total = functools.reduce(lambda a, b: a + b, logs)
        norms = [mpmath.mnorm(log, "f") for log in logs]
        return float(mpmath.mnorm(total, "f") / max(sum(norms), 1))


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e8])
@pytest.mark.parametrize(("size", "number"), [(2, 2), (2, 4), (4, 4), (6, 2)])
def test_karcher_mean_has_the_residual_that_it_promises(size, number, condition):
    for seed in range(2):
        matrices = draw(seed, size, number, condition)
        mean = np.asarray(mean_of(matrices))
        np.testing.assert_array_equal(mean, mean.T)
        assert residual(matrices, mean) < 1e-10


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1e8, 1e150])
def test_karcher_mean_of_a_large_or_small_scale_has_the_same_residual(scale):
    matrices = draw(1, 4, 3, 1e8, scale)
    assert residual(matrices, np.asarray(mean_of(matrices))) < 1e-10


def test_karcher_mean_of_many_large_matrices_converges():
    matrices = draw(0, 40, 30, 1e8)
    mean = np.asarray(mean_of(matrices))
    assert np.linalg.eigvalsh(mean)[0] > 0
    # SciPy's logarithm loses digits with the condition: hence not 1e-10.
    root = np.linalg.inv(scipy.linalg.sqrtm(mean))
    logs = np.array([scipy.linalg.logm(root @ a @ root) for a in matrices])
    assert np.linalg.norm(logs.sum(0)) < 1e-6 * np.linalg.norm(logs, axis=(1, 2)).sum()


@given(seeds, sizes, numbers)
def test_karcher_mean_solves_its_equation_by_scipys_functions(seed, size, number):
    matrices = draw(seed, size, number, condition=100)
    mean = mean_of(matrices)
    logs = [scipy.linalg.logm(np.linalg.solve(a, mean)) for a in matrices]
    assert np.abs(sum(logs)).max() < 1e-10


@given(seeds, sizes)
def test_karcher_mean_of_two_is_the_closed_form(seed, size):
    first, second = draw(seed, size, 2)
    root = scipy.linalg.sqrtm(first)
    inverse = np.linalg.inv(root)
    expected = root @ scipy.linalg.sqrtm(inverse @ second @ inverse) @ root
    assert_close(mean_of(np.stack([first, second])), expected)


@given(seeds, sizes, numbers)
def test_karcher_mean_of_equal_matrices_is_that_matrix(seed, size, number):
    [matrix] = draw(seed, size, 1)
    assert_close(mean_of(np.stack([matrix] * number)), matrix, 1e-12)


@given(seeds, sizes, numbers)
def test_karcher_mean_of_commuting_matrices_has_geometric_means(seed, size, number):
    rng = np.random.default_rng(seed)
    vectors = rotation(rng, size)
    eigenvalues = np.exp(rng.uniform(-4, 4, (number, size)))
    matrices = np.array([from_eigenvalues(vectors, row) for row in eigenvalues])
    expected = from_eigenvalues(vectors, np.exp(np.log(eigenvalues).mean(0)))
    assert_close(mean_of(matrices), expected)


@given(seeds, sizes, numbers)
def test_karcher_mean_follows_a_congruence(seed, size, number):
    matrices = draw(seed, size, number)
    change = np.random.default_rng(seed + 1).normal(size=(size, size)) + 3 * np.eye(
        size
    )
    moved = change @ matrices @ change.T
    moved = (moved + moved.swapaxes(1, 2)) / 2
    assert_close(mean_of(moved), change @ mean_of(matrices) @ change.T)


@given(seeds, sizes, numbers)
def test_karcher_mean_does_not_depend_on_the_order(seed, size, number):
    matrices = draw(seed, size, number)
    order = np.random.default_rng(seed).permutation(number)
    assert_close(mean_of(matrices[order]), mean_of(matrices), 1e-11)


@given(seeds, sizes, numbers)
def test_karcher_mean_of_inverses_is_the_inverse(seed, size, number):
    matrices = draw(seed, size, number)
    inverses = np.linalg.inv(matrices)
    inverses = (inverses + inverses.swapaxes(1, 2)) / 2
    assert_close(mean_of(inverses), np.linalg.inv(mean_of(matrices)))


@given(seeds, sizes, numbers)
def test_karcher_mean_has_the_geometric_mean_of_determinants(seed, size, number):
    matrices = draw(seed, size, number)
    expected = np.linalg.slogdet(matrices)[1].mean()
    np.testing.assert_allclose(
        np.linalg.slogdet(mean_of(matrices))[1], expected, rtol=1e-10, atol=1e-10
    )


@given(seeds, sizes, numbers)
def test_karcher_mean_lies_between_the_harmonic_and_the_arithmetic(seed, size, number):
    matrices = draw(seed, size, number)
    mean = mean_of(matrices)
    above = matrices.mean(0) - mean
    below = mean - np.linalg.inv(np.linalg.inv(matrices).mean(0))
    for difference in (above, below):
        assert np.linalg.eigvalsh(difference)[0] > -1e-9 * np.abs(matrices).max()


@given(seeds, sizes, numbers)
def test_karcher_mean_is_homogeneous_in_each_matrix(seed, size, number):
    matrices = draw(seed, size, number)
    factors = np.exp(np.random.default_rng(seed).uniform(-3, 3, number))
    expected = np.exp(np.log(factors).mean()) * mean_of(matrices)
    assert_close(mean_of(factors[:, None, None] * matrices), expected)


def test_karcher_mean_of_one_is_that_one():
    matrices = draw(0, 3, 1)
    np.testing.assert_array_equal(mean_of(matrices), matrices[0])


def test_karcher_mean_of_a_batch_equals_one_at_a_time():
    batch = np.stack([draw(seed, 3, 4, 10.0**seed) for seed in range(6)])
    expected = np.stack([mean_of(matrices) for matrices in batch])
    leading = karcher_mean(batch.reshape(2, 3, 4, 3, 3))
    assert_close(leading, expected.reshape(2, 3, 3, 3), 1e-12)
    assert_close(jax.vmap(karcher_mean)(batch), expected, 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_karcher_mean_of_narrow_matrices_is_of_their_dtype(dtype):
    matrices = jnp.asarray(draw(0, 3, 4, 10.0), dtype)
    mean = karcher_mean(matrices)
    assert mean.dtype == dtype
    expected = mean_of(matrices.astype("float64"))
    tolerance = 1e-5 if dtype == "float32" else 4 * float(jnp.finfo(dtype).eps)
    assert_close(np.asarray(mean, "float64"), expected, tolerance)


def symmetric(matrix):
    return (matrix + jnp.swapaxes(matrix, -1, -2)) / 2


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("distinct", [True, False])
def test_karcher_mean_is_differentiable(number, distinct):
    matrices = draw(0, 3, number, 100.0 if distinct else 1.0)
    check_grads(
        jax.jit(lambda a: karcher_mean(symmetric(a))),
        (matrices,),
        order=1,
        modes=("fwd", "rev"),
        rtol=1e-6,
        atol=1e-6,
    )


def test_gradient_of_the_karcher_mean_of_equal_matrices_shares_equally():
    [matrix] = draw(3, 3, 1)
    _, slope = jax.jvp(
        mean_of, (jnp.stack([jnp.asarray(matrix)] * 4),), (jnp.ones((4, 3, 3)),)
    )
    np.testing.assert_allclose(slope, np.ones((3, 3)), rtol=1e-10)


def test_karcher_mean_of_an_indefinite_matrix_is_nan_while_tracing():
    matrices = np.stack([np.eye(2), np.diag([1.0, -1.0])])
    assert np.isnan(mean_of(matrices)).all()
