"""The mean of positive definite matrices, and scores of Hessians."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from hardvary.consistency import (
    determinant_bound,
    karcher_mean,
    quadratic_inconsistency,
)
from tests.test_errors import raises

seeds = st.integers(0, 10_000)
sizes = st.sampled_from([1, 2, 4])
numbers = st.sampled_from([2, 4])


@pytest.fixture(autouse=True, scope="module")
def wide():
    with jax.enable_x64(True):
        yield


@functools.cache
def compiled(function):
    return jax.jit(function)


mean_of = compiled(karcher_mean)
score_of = compiled(quadratic_inconsistency)
bound_of = compiled(determinant_bound)


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


# The Karcher mean.


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


# Scores of Hessians.


def largest_by_search(hessians, epsilon, rng):
    """The largest rise over pairs and directions, by search without an eigenvalue."""
    best = 0.0
    for own in hessians:
        for other in hessians:

            def rise(v, own=own, other=other):
                return -(v @ other @ v) / (v @ own @ v)

            directions = rng.normal(size=(500, len(own)))
            start = min(directions, key=rise)
            best = max(best, -scipy.optimize.minimize(rise, start).fun)
    return epsilon * best


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_quadratic_inconsistency_equals_a_search_over_directions(size, number):
    rng = np.random.default_rng(size + 10 * number)
    hessians = draw(size * number, size, number, condition=30)
    expected = largest_by_search(hessians, 0.3, rng)
    np.testing.assert_allclose(score_of(hessians, 0.3), expected, rtol=1e-6)


@given(seeds, sizes, numbers)
def test_quadratic_inconsistency_equals_scipys_generalised_eigenvalues(
    seed, size, number
):
    hessians = draw(seed, size, number)
    expected = max(scipy.linalg.eigh(b, a)[0][-1] for a in hessians for b in hessians)
    np.testing.assert_allclose(score_of(hessians, 2.0), 2 * expected, rtol=1e-8)


@given(seeds, sizes, numbers)
def test_quadratic_inconsistency_of_common_eigenvectors_is_the_papers(
    seed, size, number
):
    hessians, eigenvalues = codiagonal(seed, size, number)
    ratios = eigenvalues[:, None] / eigenvalues[None, :]
    np.testing.assert_allclose(score_of(hessians, 0.1), 0.1 * ratios.max(), rtol=1e-8)


def codiagonal(seed, size, number, spread=4.0):
    rng = np.random.default_rng(seed)
    vectors = rotation(rng, size)
    eigenvalues = np.exp(rng.uniform(-spread, spread, (number, size)))
    hessians = np.array([from_eigenvalues(vectors, row) for row in eigenvalues])
    return hessians, eigenvalues


@given(seeds, sizes, numbers)
def test_score_and_bound_of_equal_hessians_are_epsilon_and_twice_that(
    seed, size, number
):
    hessians = np.stack([draw(seed, size, 1)[0]] * number)
    np.testing.assert_allclose(score_of(hessians, 0.1), 0.1, rtol=1e-8)
    np.testing.assert_allclose(bound_of(hessians, 0.1), 0.2, rtol=1e-8)


@given(seeds, sizes, numbers, st.sampled_from([0.1, 1.0, 4.0]))
def test_determinant_bound_is_never_below_the_score(seed, size, number, spread):
    hessians, _ = codiagonal(seed, size, number, spread)
    assert score_of(hessians, 0.1) <= bound_of(hessians, 0.1) * (1 + 1e-9)
    # Nor for Hessians that have no common eigenvectors.
    hessians = draw(seed, size, number)
    assert score_of(hessians, 0.1) <= bound_of(hessians, 0.1) * (1 + 1e-9)


@given(seeds, sizes, numbers)
def test_determinant_bound_has_the_determinants_of_both_means(seed, size, number):
    hessians = draw(seed, size, number, 30)
    ratio = np.linalg.det(hessians.mean(0)) / np.linalg.det(mean_of(hessians))
    np.testing.assert_allclose(
        bound_of(hessians, 0.1), 0.2 * (2 * ratio**number - 1), rtol=1e-8
    )


@given(st.floats(1.0, 1e6))
def test_determinant_bound_of_one_parameter_is_the_ratio_and_its_inverse(ratio):
    """And the formula of Proposition 3 is below the score, for ratios above 2.42."""
    hessians = np.array([[[ratio]], [[1.0]]])
    np.testing.assert_allclose(bound_of(hessians, 1.0), ratio + 1 / ratio, rtol=1e-9)
    np.testing.assert_allclose(score_of(hessians, 1.0), ratio, rtol=1e-9)
    proposition_3 = 2 * ((ratio + 1) / 2 / np.sqrt(ratio)) ** 2
    assert (proposition_3 < ratio) == (ratio > 1 + np.sqrt(2))


def test_determinant_bound_neither_overflows_nor_underflows_on_the_way():
    for scale in (1e-3, 1e3):
        hessians = scale * np.stack([np.eye(400), np.eye(400)])
        np.testing.assert_allclose(bound_of(hessians, 1.0), 2.0, rtol=1e-6)
    hessians[0, 0, 0] *= 50
    np.testing.assert_allclose(bound_of(hessians, 1.0), 50.02, rtol=1e-6)


def test_determinant_bound_that_is_too_large_is_infinite():
    hessians = np.stack([np.eye(400), 1e6 * np.eye(400)])
    assert bound_of(hessians, 1.0) == np.inf


@given(seeds, st.sampled_from([2, 4]), numbers)
def test_score_and_bound_are_infinite_where_only_one_is_flat(seed, size, number):
    rng = np.random.default_rng(seed)
    hessians = draw(seed, size, number)
    eigenvalues = np.exp(rng.uniform(-2, 2, size))
    eigenvalues[0] = 0
    hessians[number // 2] = from_eigenvalues(rotation(rng, size), eigenvalues)
    assert score_of(hessians, 0.1) == np.inf
    assert bound_of(hessians, 0.1) == np.inf


@given(seeds, st.sampled_from([2, 4]), numbers)
def test_directions_in_which_all_are_flat_do_not_count(seed, size, number):
    rng = np.random.default_rng(seed)
    curved, _ = codiagonal(seed, size - 1, number)
    padded = np.zeros((number, size, size))
    padded[:, 1:, 1:] = curved
    vectors = rotation(rng, size)
    hessians = vectors @ padded @ vectors.T
    hessians = (hessians + hessians.swapaxes(1, 2)) / 2
    for function in (score_of, bound_of):
        np.testing.assert_allclose(
            function(hessians, 0.1), function(curved, 0.1), rtol=1e-6
        )


def test_score_of_hessians_that_are_all_zero_is_zero():
    assert score_of(np.zeros((3, 2, 2)), 0.1) == 0


def test_score_of_a_single_environment_is_epsilon():
    np.testing.assert_allclose(score_of(draw(0, 3, 1), 0.1), 0.1, rtol=1e-9)


@pytest.mark.parametrize("function", [score_of, bound_of])
def test_scores_of_negative_curvature_are_nan_while_tracing(function):
    hessians = np.stack([np.diag([1.0, -1.0]), np.diag([1.0, -1.0])])
    assert np.isnan(function(hessians, 0.1))


@pytest.mark.parametrize("function", [quadratic_inconsistency, determinant_bound])
def test_scores_of_a_batch_equal_one_at_a_time(function):
    batch = np.stack([draw(seed, 3, 4) for seed in range(6)])
    expected = [compiled(function)(hessians, 0.1) for hessians in batch]
    actual = function(batch.reshape(2, 3, 4, 3, 3), 0.1)
    np.testing.assert_allclose(actual, np.reshape(expected, (2, 3)), rtol=1e-9)


@pytest.mark.parametrize("function", [quadratic_inconsistency, determinant_bound])
def test_scores_of_narrow_hessians_are_float32(function):
    hessians = jnp.asarray(draw(0, 3, 4, 10.0), "bfloat16")
    score = function(hessians, 0.1)
    assert score.dtype == "float32"
    expected = function(hessians.astype("float64"), 0.1)
    np.testing.assert_allclose(score, expected, rtol=1e-4)


# Bad input.

FUNCTIONS = {
    "karcher_mean": karcher_mean,
    "quadratic_inconsistency": lambda hessians: quadratic_inconsistency(hessians, 0.1),
    "determinant_bound": lambda hessians: determinant_bound(hessians, 0.1),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


@functions
@pytest.mark.parametrize("shape", [(2, 2), (2, 3, 2), (0, 2, 2), (2, 0, 0)], ids=str)
def test_hessians_of_a_wrong_shape_are_refused(name, shape):
    with raises(ValueError, name, "[..., env, n, n]", shape):
        FUNCTIONS[name](jnp.ones(shape))


@functions
def test_hessians_of_a_wrong_kind_are_refused(name):
    with raises(TypeError, name, "real floating", "int"):
        FUNCTIONS[name](jnp.ones((2, 2, 2), int))
    with raises(ValueError, name, "finite", "nan"):
        FUNCTIONS[name](jnp.full((2, 2, 2), jnp.nan))
    with raises(ValueError, name, "symmetric", (1,), "transpose"):
        FUNCTIONS[name](np.array([np.eye(2), [[1.0, 0.5], [0.0, 1.0]]]))


@functions
def test_hessians_with_negative_curvature_are_refused(name):
    rule = "definite" if name == "karcher_mean" else "semidefinite"
    with raises(ValueError, name, f"positive {rule}", (1,), "-1"):
        FUNCTIONS[name](np.array([np.eye(2), np.diag([1.0, -1.0])]))


def test_karcher_mean_of_a_singular_matrix_is_refused():
    with raises(ValueError, "karcher_mean", "positive definite", "eigenvalue 0"):
        karcher_mean(np.array([np.eye(2), np.diag([1.0, 0.0])]))


@pytest.mark.parametrize("function", [quadratic_inconsistency, determinant_bound])
@pytest.mark.parametrize(
    ("epsilon", "error"),
    [(0.0, ValueError), (-1.0, ValueError), (np.nan, ValueError), ("1", TypeError)],
)
def test_epsilon_of_a_score_that_is_not_positive_is_refused(function, epsilon, error):
    with raises(error, "epsilon must be", "> 0"):
        function(draw(0, 2, 2), epsilon)
