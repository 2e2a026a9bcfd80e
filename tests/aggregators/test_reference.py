"""Agreement with a second implementation: a plain NumPy loop over environments.

float64, one component at a time where that is plainer; written from the formulas of
the paper and shares nothing with the library.
"""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hardvary
from tests._asserts import assert_trees_close
from tests._inputs import (
    AGGREGATORS,
    PLAIN_AGGREGATORS,
    VOTE_MASKS,
    jitted_aggregator,
    jitted_plain,
    num_envs_of,
    stacked_grads,
    weights_for,
)

SHARPNESS = 2.0  # that of AGGREGATORS["sand_mask"]


def environments(grads, weights):
    """Yields (weight, gradient) of every environment that is there."""
    grads = np.asarray(grads, np.float64)
    for env in range(grads.shape[0]):
        if weights[env] > 0:
            yield float(weights[env]), grads[env]


def agreement_reference(grads, weights):
    votes, total = 0.0, 0.0
    for weight, grad in environments(grads, weights):
        votes = votes + weight * np.sign(grad)
        total += weight
    return np.abs(votes) / total


def mean_reference(grads, weights):
    weighted, total = 0.0, 0.0
    for weight, grad in environments(grads, weights):
        weighted = weighted + weight * grad
        total += weight
    return weighted / total


def geometric_reference(grads, weights):
    logs, total = 0.0, 0.0
    for weight, grad in environments(grads, weights):
        logs = logs + weight * np.log(np.abs(grad) + 1e-10)
        total += weight
    return np.sign(mean_reference(grads, weights)) * np.exp(logs / total)


def variance_reference(grads, weights):
    mean = mean_reference(grads, weights)
    squares, total = 0.0, 0.0
    for weight, grad in environments(grads, weights):
        squares = squares + weight * (grad - mean) ** 2
        total += weight
    return squares / (total - 1) if total > 1 else np.zeros_like(mean)


def mask_reference(name, grads, weights, threshold):
    agreement = agreement_reference(grads, weights)
    if name == "sand_mask":
        variance = variance_reference(grads, weights)
        above = np.round(agreement - threshold, 9)
        with np.errstate(divide="ignore", invalid="ignore"):
            smooth = np.tanh(SHARPNESS * above / variance)
        return np.maximum(np.where(variance > 0, smooth, np.sign(above)), 0)
    keeps = agreement >= threshold - 1e-9
    if name == "soft_and_mask":
        return np.where(keeps, 1, agreement)
    return 1.0 * (~keeps if name == "xor_mask" else keeps)


def aggregate_reference(name, tree, weights, threshold, rescale, max_rescale):
    kept, size = 0.0, 0

    def leaf(grads):
        nonlocal kept, size
        mask = mask_reference(name, grads, weights, threshold)
        kept, size = kept + mask.sum(), size + mask.size
        direction = geometric_reference if name == "geometric_mean" else mean_reference
        update = mask * direction(grads, weights)
        if rescale and mask.sum() > 0:
            update = update * min(mask.size / mask.sum(), max_rescale)
        return update

    updates = jax.tree.map(leaf, tree)
    return updates, kept / max(size, 1)


@st.composite
def problems(draw):
    """Gradients, weights that leave somebody present, and a threshold they can tie."""
    grads = draw(stacked_grads())
    num_envs = num_envs_of(grads)
    weights = draw(st.none() | weights_for(num_envs))
    levels = 2 * (num_envs if weights is None else float(weights.sum()))
    threshold = draw(st.integers(0, int(levels))) / levels
    return grads, weights, threshold


@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
@pytest.mark.parametrize("name", AGGREGATORS)
@given(problem=problems(), max_rescale=st.sampled_from([1.5, 1e9]))
def test_aggregators_on_random_trees_match_numpy_loop(
    name, rescale, problem, max_rescale
):
    grads, weights, threshold = problem
    run = jitted_aggregator(name, rescale=rescale, max_rescale=max_rescale)
    updates, kept_fraction = run(grads, np.float32(threshold), weights)
    ones = np.ones(num_envs_of(grads))
    expected, kept = aggregate_reference(
        name,
        grads,
        ones if weights is None else weights,
        threshold,
        rescale,
        max_rescale,
    )
    # A soft mask divides by a variance that float32 takes as a difference.
    rtol = 1e-5 if name in VOTE_MASKS else 2e-3
    assert_trees_close(updates, expected, rtol=rtol)
    np.testing.assert_allclose(kept_fraction, kept, rtol=rtol, atol=1e-6)


def majority_reference(grads, weights):
    votes, total = 0.0, 0.0
    for weight, grad in environments(grads, weights):
        votes = votes + weight * np.sign(grad)
        total += weight
    return np.sign(votes), votes != 0


def disjoint_reference(grads, weights):
    elected = np.sign(mean_reference(grads, weights))
    mass, number = np.zeros_like(elected), np.zeros_like(elected)
    for weight, grad in environments(grads, weights):
        counts = (np.sign(grad) == elected) & (elected != 0)
        mass += np.where(counts, weight * grad, 0)
        number += np.where(counts, weight, 0)
    return mass / np.maximum(number, 1e-9), elected != 0


def sides_reference(grads, weights):
    """Means of what is positive and of what is negative, over all environments."""
    positive, negative, total = 0.0, 0.0, 0.0
    for weight, grad in environments(grads, weights):
        positive = positive + weight * np.maximum(grad, 0)
        negative = negative + weight * np.minimum(grad, 0)
        total += weight
    return positive / total, negative / total


# One shape: every other is compiled for all four once more.
plain_problems = st.tuples(
    stacked_grads(cases=(("nested", 3),)),
    st.just(np.ones(3, np.float32)) | weights_for(3),
)


def share(masks):
    leaves = jax.tree.leaves(masks)
    return sum(leaf.sum() for leaf in leaves) / sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("majority_sign", majority_reference), ("disjoint_mean", disjoint_reference)],
)
@given(problem=plain_problems)
def test_plain_aggregators_on_random_trees_match_numpy_loop(name, reference, problem):
    grads, weights = problem
    updates, kept_fraction = jitted_plain(name)(grads, weights)
    expected = jax.tree.map(lambda leaf: reference(leaf, weights)[0], grads)
    assert_trees_close(updates, expected)
    decided = jax.tree.map(lambda leaf: reference(leaf, weights)[1], grads)
    np.testing.assert_allclose(kept_fraction, share(decided), rtol=1e-6)


@given(problem=plain_problems)
def test_grad_drop_on_random_trees_is_one_of_the_sides_of_the_numpy_loop(problem):
    grads, weights = problem
    updates, kept_fraction = jitted_plain("grad_drop")(grads, weights)

    def kept(update, grads):
        positive, negative = sides_reference(grads, weights)
        update = np.asarray(update, np.float64)
        side = np.where(update > 0, positive, negative)
        # Where all gradients are zero both sides are.
        np.testing.assert_allclose(update, side, rtol=1e-5, atol=1e-6)
        assert np.all((update != 0) == (positive - negative > 0))
        return np.abs(side) / np.maximum(positive - negative, 1e-9)

    masks = jax.tree.map(kept, updates, grads)
    np.testing.assert_allclose(kept_fraction, share(masks), rtol=1e-5)


@given(problem=plain_problems)
def test_agr_rand_on_random_trees_matches_numpy_loop_where_all_agree(problem):
    grads, weights = problem
    updates, kept_fraction = jitted_plain("agr_rand")(grads, weights)
    agreed = jax.tree.map(
        lambda leaf: agreement_reference(leaf, weights) >= 1 - 1e-9, grads
    )
    anybody = share(agreed) > 0

    def check(update, agreed, grads):
        expected = mean_reference(grads, weights)
        np.testing.assert_allclose(
            np.asarray(update)[agreed], np.asarray(expected)[agreed], rtol=1e-5
        )
        # Noise, which has no scale if there is nothing to take it from.
        assert np.all((np.asarray(update)[~agreed] != 0) == anybody)

    jax.tree.map(check, updates, agreed, grads)
    np.testing.assert_allclose(kept_fraction, share(agreed), rtol=1e-6)


def test_every_plain_aggregator_has_its_loop():
    loops = {"majority_sign", "disjoint_mean", "grad_drop", "agr_rand"}
    assert loops == set(PLAIN_AGGREGATORS)


@given(problem=problems())
def test_agreement_on_random_trees_matches_numpy_loop(problem):
    grads, weights, _ = problem
    actual = hardvary.agreement(grads, env_weights=weights)
    ones = np.ones(num_envs_of(grads))
    expected = jax.tree.map(
        lambda leaf: agreement_reference(leaf, ones if weights is None else weights),
        grads,
    )
    assert_trees_close(actual, expected, rtol=1e-6)
