"""Laws that hold for all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hardvary
from tests._asserts import assert_trees_close, assert_trees_equal, field_of
from tests._inputs import (
    AGGREGATORS,
    PLAIN_AGGREGATORS,
    SCALES,
    STATISTICS,
    VOTE_MASKS,
    aggregate,
    jitted_aggregator,
    jitted_plain,
    make_grads,
    num_envs_of,
    stacked_grads,
    weights_for,
)

thresholds = st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.75, 1.0]).map(np.float32)
every_aggregator = pytest.mark.parametrize("name", AGGREGATORS)
vote_masks = pytest.mark.parametrize("name", VOTE_MASKS)
every_plain = pytest.mark.parametrize("name", PLAIN_AGGREGATORS)
three_envs = stacked_grads(cases=(("nested", 3),))


def mean_of(grads):
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), grads)


def mask_of(name, grads, threshold, weights=None):
    """The mask itself: what passes when the mean is 1 everywhere."""
    run = jitted_aggregator(name)
    num_envs = num_envs_of(grads)
    weights = np.ones(num_envs, np.float32) if weights is None else weights
    votes = jax.tree.map(
        lambda leaf: jnp.tensordot(weights, jnp.sign(leaf), axes=1), grads
    )

    def leaf(vote):
        return hardvary.GradStats(
            mean=jnp.ones_like(vote),
            sign_sum=vote,
            square_mean=jnp.ones_like(vote),
            log_abs_mean=jnp.zeros_like(vote),
            num_envs=jnp.float32(weights.sum()),
        )

    stats = jax.tree.map(leaf, votes)
    return run(stats, threshold)[0]


@every_aggregator
@given(grads=stacked_grads(), threshold=thresholds, seed=st.integers(0, 99))
def test_aggregators_on_permuted_environments_change_nothing(
    name, grads, threshold, seed
):
    order = np.random.default_rng(seed).permutation(num_envs_of(grads))
    permuted = jax.tree.map(lambda leaf: leaf[order], grads)
    run = jitted_aggregator(name)
    assert_trees_close(run(permuted, threshold), run(grads, threshold))


@vote_masks
@given(grads=stacked_grads(), pair=st.tuples(thresholds, thresholds))
def test_masks_at_a_higher_threshold_are_nested(name, grads, pair):
    low, high = sorted(pair)
    wide, narrow = (mask_of(name, grads, threshold) for threshold in (low, high))
    if name == "xor_mask":
        wide, narrow = narrow, wide
    for outer, inner in zip(
        jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True
    ):
        assert np.all(np.asarray(outer) >= np.asarray(inner))


@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
@given(grads=stacked_grads())
def test_and_mask_at_threshold_zero_is_the_mean(rescale, grads):
    updates, kept_fraction = jitted_aggregator("and_mask", rescale=rescale)(
        grads, np.float32(0)
    )
    assert_trees_equal(updates, mean_of(grads))
    assert kept_fraction == 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_and_mask_on_identical_environments_is_the_mean(threshold, scale):
    gradient = make_grads("nested", 1, scale=scale)
    grads = jax.tree.map(lambda leaf: jnp.repeat(leaf, 7, axis=0), gradient)
    updates, _ = aggregate(hardvary.and_mask(threshold), grads)
    assert_trees_close(updates, mean_of(gradient), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_geometric_mean_of_identical_environments_is_the_mean(scale):
    gradient = make_grads("nested", 1, scale=scale)
    grads = jax.tree.map(lambda leaf: jnp.repeat(leaf, 7, axis=0), gradient)
    updates, _ = aggregate(hardvary.geometric_mean(1.0), grads)
    # log(|g| + 1e-10): the offset of the paper's formula shows at small gradients.
    assert_trees_close(updates, mean_of(gradient), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("form", ["stacked", "stats"])
@pytest.mark.parametrize("scale", SCALES)
def test_sand_mask_of_identical_environments_is_the_mean(scale, form):
    # Off the exact grid: the rounding of the variance must not pass for variance.
    values = np.random.default_rng(0).normal(size=(1, 50)) * scale
    grads = jnp.repeat(jnp.asarray(values, jnp.float32), 7, axis=0)
    updates, kept_fraction = aggregate(
        hardvary.sand_mask(0.5, 1.0), as_stats(grads) if form == "stats" else grads
    )
    assert_trees_close(updates, grads[0], rtol=1e-5, atol=0)
    assert float(kept_fraction) == float(scale > 0)


@every_aggregator
@given(grads=stacked_grads(), threshold=thresholds)
def test_aggregators_on_flipped_signs_flip_the_update(name, grads, threshold):
    run = jitted_aggregator(name, rescale=True)
    updates, kept_fraction = run(grads, threshold)
    flipped, flipped_fraction = run(jax.tree.map(jnp.negative, grads), threshold)
    assert_trees_equal(jax.tree.map(jnp.negative, flipped), updates)
    assert kept_fraction == flipped_fraction


@vote_masks
@given(
    grads=three_envs,
    threshold=thresholds,
    env=st.integers(0, 2),
    exponent=st.integers(-20, 20),
)
def test_masks_with_one_environment_scaled_stay_the_same(
    name, grads, threshold, env, exponent
):
    factors = np.ones(3, np.float32)
    factors[env] = 2.0**exponent

    def scaled(leaf):
        return leaf * factors.reshape((3,) + (1,) * (leaf.ndim - 1))

    run = jitted_aggregator(name)
    _, kept_fraction = run(grads, threshold)
    _, scaled_fraction = run(jax.tree.map(scaled, grads), threshold)
    assert kept_fraction == scaled_fraction


@every_aggregator
@pytest.mark.parametrize("filler", [np.nan, np.inf, 1e30, 0.0])
@given(grads=three_envs, threshold=thresholds, position=st.integers(0, 3))
def test_aggregators_with_a_weightless_environment_ignore_it(
    name, filler, grads, threshold, position
):
    weights = np.insert(np.ones(3, np.float32), position, 0)
    padded = jax.tree.map(
        lambda leaf: jnp.asarray(np.insert(leaf, position, filler, axis=0)), grads
    )
    run = jitted_aggregator(name, rescale=True)
    assert_trees_close(run(padded, threshold, weights), run(grads, threshold))


@vote_masks
@given(
    grads=three_envs,
    threshold=thresholds,
    weights=weights_for(3),
    factor=st.sampled_from([1e-6, 0.1, 3.0, 1e6]),
)
def test_aggregators_with_weights_times_a_constant_change_nothing(
    name, grads, threshold, weights, factor
):
    run = jitted_aggregator(name)
    scaled = weights * np.float32(factor)
    assert_trees_close(run(grads, threshold, scaled), run(grads, threshold, weights))


@every_aggregator
@given(grads=three_envs, threshold=thresholds)
def test_aggregators_with_integer_weights_count_repetitions(name, grads, threshold):
    repeats = np.array([3, 0, 2])
    repeated = jax.tree.map(
        lambda leaf: jnp.asarray(np.repeat(leaf, repeats, axis=0)), grads
    )
    run = jitted_aggregator(name)
    weighted = run(grads, threshold, repeats.astype(np.float32))
    # A soft mask divides by a variance that float32 takes as a difference.
    rtol = 1e-5 if name in VOTE_MASKS else 2e-3
    assert_trees_close(weighted, run(repeated, threshold), rtol=rtol)


@given(grads=stacked_grads(), threshold=thresholds, weighted=st.booleans())
def test_and_mask_plus_xor_mask_is_the_mean(grads, threshold, weighted):
    num_envs = num_envs_of(grads)
    weights = np.arange(1, num_envs + 1, dtype=np.float32) if weighted else None
    kept, kept_fraction = jitted_aggregator("and_mask")(grads, threshold, weights)
    rest, rest_fraction = jitted_aggregator("xor_mask")(grads, threshold, weights)
    mean, _ = jitted_aggregator("and_mask")(grads, np.float32(0), weights)
    assert_trees_equal(jax.tree.map(jnp.add, kept, rest), mean)
    np.testing.assert_allclose(kept_fraction + rest_fraction, 1, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-60, -20, 20, 50])
@given(grads=three_envs, threshold=thresholds)
def test_and_mask_of_scaled_gradients_is_the_scaled_update(exponent, grads, threshold):
    run = jitted_aggregator("and_mask", rescale=True)
    factor = np.float32(2.0**exponent)
    updates, _ = run(grads, threshold)
    scaled, _ = run(jax.tree.map(lambda leaf: leaf * factor, grads), threshold)
    assert_trees_equal(scaled, jax.tree.map(lambda leaf: leaf * factor, updates))


@every_aggregator
@given(
    grads=stacked_grads(cases=(("array", 4),)),
    threshold=thresholds,
    cap=st.sampled_from([1.0, 2.0]),
)
def test_rescale_multiplies_by_size_over_kept_up_to_its_cap(
    name, grads, threshold, cap
):
    update, kept_fraction = jitted_aggregator(name)(grads, threshold)
    rescaled, _ = jitted_aggregator(name, rescale=True)(grads, threshold)
    run_capped = jitted_aggregator(name, rescale=True, max_rescale=cap)
    capped, _ = run_capped(grads, threshold)
    factor = 1 / kept_fraction if kept_fraction > 0 else 0.0
    assert_trees_close(rescaled, update * factor)
    assert_trees_close(capped, update * min(factor, cap))


@given(grads=stacked_grads(), weights=st.data())
def test_agreement_of_any_gradients_lies_in_the_unit_interval(grads, weights):
    num_envs = num_envs_of(grads)
    positive = st.floats(2**-10, 2**10, width=32)
    values = weights.draw(st.lists(positive, min_size=num_envs, max_size=num_envs))
    for leaf in jax.tree.leaves(
        hardvary.agreement(grads, env_weights=np.array(values, np.float32))
    ):
        assert np.all((leaf >= 0) & (leaf <= 1))


def as_stats(grads, weights=None, **settings):
    """The same gradients out of an oracle: those of a loss linear in the parameters."""
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), grads)
    return linear_oracle(**settings)(params, grads, weights)


@functools.cache
def linear_oracle(**settings):
    def loss_fn(params, gradient):
        products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, gradient)
        return sum(jax.tree.leaves(products))

    oracle = hardvary.grad_stats(loss_fn, stats=STATISTICS, **settings)
    return jax.jit(
        lambda params, grads, weights: oracle(params, grads, env_weights=weights)
    )


ROUTES = {
    "fused": {"method": "fused"},
    "fused_by_2": {"method": "fused", "microbatch_size": 2},
    "vmap": {"method": "vmap"},
    "scan": {"method": "scan"},
    "scan_by_2": {"method": "scan", "microbatch_size": 2},
    "scan_by_8": {"method": "scan", "microbatch_size": 8},
}
eight_envs = stacked_grads(cases=(("zero_size", 8),))


@pytest.mark.parametrize("route", ROUTES)
@given(grads=eight_envs, weights=st.none() | weights_for(8))
def test_grad_stats_by_every_route_are_the_sums_over_environments(
    route, grads, weights
):
    stats = as_stats(grads, weights, **ROUTES[route])
    w = np.ones(8) if weights is None else weights.astype(np.float64)

    def total(function):
        return jax.tree.map(
            lambda leaf: np.tensordot(
                w, function(np.asarray(leaf, np.float64)), axes=1
            ),
            grads,
        )

    def mean(function):
        return jax.tree.map(lambda leaf: leaf / w.sum(), total(function))

    for leaf in jax.tree.leaves(field_of(stats, "num_envs")):
        assert leaf == w.sum()
    # Signs are counted, not averaged: no tolerance.
    exact = {"rtol": 0, "atol": 0}
    assert_trees_close(field_of(stats, "sign_sum"), total(np.sign), **exact)
    assert_trees_close(field_of(stats, "nonzero_sum"), total(lambda g: g != 0), **exact)
    assert_trees_close(field_of(stats, "mean"), mean(lambda g: g), rtol=1e-6)
    assert_trees_close(field_of(stats, "square_mean"), mean(np.square), rtol=1e-6)
    assert_trees_close(field_of(stats, "abs_mean"), mean(np.abs), rtol=1e-6)
    assert_trees_close(
        field_of(stats, "log_abs_mean"), mean(lambda g: np.log(abs(g) + 1e-10))
    )


@every_aggregator
@pytest.mark.parametrize("route", ["vmap", "scan"])
@given(grads=eight_envs, threshold=thresholds, weights=st.none() | weights_for(8))
def test_aggregators_on_grad_stats_equal_the_stacked_form(
    name, route, grads, threshold, weights
):
    run = jitted_aggregator(name, rescale=True)
    stats = as_stats(grads, weights, **ROUTES[route])
    expected = run(grads, threshold, weights)
    rtol = 1e-5 if name in VOTE_MASKS else 2e-3
    assert_trees_close(run(stats, threshold), expected, rtol=rtol)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("filler", [np.nan, np.inf])
def test_grad_stats_with_a_weightless_environment_ignore_it(filler, route):
    grads = make_grads("zero_size", 8)
    absent = np.array([False, True, False, False, False, True, True, False])
    weights = (~absent).astype(np.float32)
    broken = jax.tree.map(lambda leaf: leaf.at[absent].set(filler), grads)
    present = jax.tree.map(lambda leaf: leaf[~absent], grads)
    expected = as_stats(present, method="vmap")
    assert_trees_close(as_stats(broken, weights, **ROUTES[route]), expected)


# Aggregators without a threshold. Those that draw do so from the same seed.


@functools.cache
def plain_of_every_form(name):
    """`(grads, weights) -> [(updates, kept_fraction), ...]` of the three forms."""

    def linear(params, gradient):
        products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, gradient)
        return sum(jax.tree.leaves(products))

    @jax.jit
    def run(grads, weights):
        tx = PLAIN_AGGREGATORS[name]()
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), grads)
        oracles = (
            hardvary.env_grads(linear),
            hardvary.grad_stats(linear, stats=STATISTICS),
        )
        return [
            aggregate(tx, grads, env_weights=weights),
            *(
                aggregate(tx, oracle(params, grads, env_weights=weights))
                for oracle in oracles
            ),
        ]

    return run


@every_plain
@given(grads=three_envs, weights=weights_for(3), seed=st.integers(0, 99))
def test_plain_aggregators_of_every_form_and_order_of_environments_are_the_same(
    name, grads, weights, seed
):
    run = plain_of_every_form(name)
    stacked, *others = run(grads, weights)
    for other in others:
        assert_trees_close(other, stacked)
    order = np.random.default_rng(seed).permutation(3)
    permuted = jax.tree.map(lambda leaf: leaf[order], grads)
    for other in run(permuted, weights[order]):
        assert_trees_close(other, stacked)


def plain_of_stacked(name, grads, weights=(1, 1, 1)):
    # Compiled for all laws at once.
    return plain_of_every_form(name)(grads, np.array(weights, np.float32))[0]


@every_plain
@given(
    grads=three_envs,
    factor=st.sampled_from([1e-6, 0.1, 3.0, 1e6]),
    filler=st.sampled_from([np.nan, np.inf, 1e30, 0.0]),
)
def test_plain_aggregators_with_integer_weights_of_any_scale_count_repetitions(
    name, grads, factor, filler
):
    # An environment of weight 0 among them, whatever it holds.
    repeats = np.array([3, 0, 2])
    repeated = jax.tree.map(
        lambda leaf: jnp.asarray(np.repeat(leaf, repeats, axis=0)), grads
    )
    broken = jax.tree.map(lambda leaf: leaf.at[1].set(filler), grads)
    weighted = plain_of_stacked(name, broken, repeats * factor)
    assert_trees_close(weighted, jitted_plain(name)(repeated))


@pytest.mark.parametrize("name", ["disjoint_mean", "majority_sign"])
@given(grads=three_envs)
def test_plain_aggregators_on_flipped_signs_flip_the_update(name, grads):
    updates, kept_fraction = plain_of_stacked(name, grads)
    flipped, flipped_fraction = plain_of_stacked(
        name, jax.tree.map(jnp.negative, grads)
    )
    assert_trees_equal(jax.tree.map(jnp.negative, flipped), updates)
    assert kept_fraction == flipped_fraction


@every_plain
@given(grads=three_envs, exponent=st.sampled_from([-60, -1, 30]))
def test_plain_aggregators_of_scaled_gradients_scale(name, grads, exponent):
    factor = np.float32(2.0**exponent)
    updates, _ = plain_of_stacked(name, grads)
    scaled, _ = plain_of_stacked(name, jax.tree.map(lambda leaf: leaf * factor, grads))
    # The length of a vote is 1.
    power = np.float32(1) if name == "majority_sign" else factor
    assert_trees_close(scaled, jax.tree.map(lambda leaf: leaf * power, updates), atol=0)
