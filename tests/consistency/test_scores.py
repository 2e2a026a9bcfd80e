"""Scores of Hessians that disagree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from hardvary.consistency import determinant_bound, quadratic_inconsistency
from tests.consistency._matrices import (
    bound_of,
    draw,
    from_eigenvalues,
    mean_of,
    numbers,
    rotation,
    score_of,
    seeds,
    sizes,
)
from tests.test_errors import raises


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
    expected = [jax.jit(function)(hessians, 0.1) for hessians in batch]
    actual = function(batch.reshape(2, 3, 4, 3, 3), 0.1)
    np.testing.assert_allclose(actual, np.reshape(expected, (2, 3)), rtol=1e-9)


@pytest.mark.parametrize("function", [quadratic_inconsistency, determinant_bound])
def test_scores_of_narrow_hessians_are_float32(function):
    hessians = jnp.asarray(draw(0, 3, 4, 10.0), "bfloat16")
    score = function(hessians, 0.1)
    assert score.dtype == "float32"
    expected = function(hessians.astype("float64"), 0.1)
    np.testing.assert_allclose(score, expected, rtol=1e-4)


@pytest.mark.parametrize("function", [quadratic_inconsistency, determinant_bound])
@pytest.mark.parametrize(
    ("epsilon", "error"),
    [(0.0, ValueError), (-1.0, ValueError), (np.nan, ValueError), ("1", TypeError)],
)
def test_epsilon_of_a_score_that_is_not_positive_is_refused(function, epsilon, error):
    with raises(error, "epsilon must be", "> 0"):
        function(draw(0, 2, 2), epsilon)
