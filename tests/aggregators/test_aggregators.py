"""The edge cases that the aggregators' docstrings promise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardvary
from tests._asserts import assert_trees_equal
from tests._compat import enable_x64
from tests._inputs import (
    AGGREGATORS,
    PLAIN_AGGREGATORS,
    STATISTICS,
    aggregate,
    jitted_aggregator,
    jitted_plain,
    make_grads,
    make_params,
    num_envs_of,
)

every_aggregator = pytest.mark.parametrize("name", AGGREGATORS)
every_plain = pytest.mark.parametrize("name", PLAIN_AGGREGATORS)
non_finite = pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])


@every_aggregator
@pytest.mark.parametrize("shape", ["no_leaves", "only_zero_size"])
def test_aggregators_without_components_report_nothing_kept(name, shape):
    _, kept_fraction = aggregate(AGGREGATORS[name](0.5), make_grads(shape, 3))
    assert float(kept_fraction) == 0


@every_aggregator
@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
def test_aggregators_on_zero_gradients_return_zeros(name, rescale):
    tx = AGGREGATORS[name](0.5, rescale=rescale)
    updates, _ = aggregate(tx, make_grads("nested", 4, scale=0.0))
    zeros = jax.tree.map(jnp.zeros_like, make_params("nested"))
    assert_trees_equal(updates, zeros)


@pytest.mark.parametrize("name", ["and_mask", "geometric_mean", "sand_mask"])
def test_aggregators_with_nothing_agreed_return_zeros_when_rescaled(name):
    grads = jnp.array([[1.0, -2.0], [-3.0, 4.0]])
    updates, kept_fraction = aggregate(AGGREGATORS[name](1.0, rescale=True), grads)
    np.testing.assert_array_equal(updates, [0, 0])
    assert float(kept_fraction) == 0


def test_and_mask_rescale_acts_leaf_by_leaf():
    grads = {
        "half": jnp.array([[1.0, 1.0], [1.0, -3.0]]),
        "all": jnp.array([[1.0, 2.0], [3.0, 4.0]]),
    }
    updates, kept_fraction = aggregate(hardvary.and_mask(1.0, rescale=True), grads)
    np.testing.assert_array_equal(updates["half"], [2, 0])
    np.testing.assert_array_equal(updates["all"], [2, 3])
    assert float(kept_fraction) == 0.75


@pytest.mark.parametrize(
    "shape", [(), (70_001,), (40_000, 3), (32_767, 2), (3, 3, 64, 50), (0, 4), (4, 0)]
)
def test_kept_fraction_counts_parameters_of_any_shape(shape):
    rng = np.random.default_rng(0)
    kept = rng.random(shape) < 0.7
    grads = np.stack([np.ones(shape), np.where(kept, 1, -1)]).astype(np.float32)
    _, kept_fraction = aggregate(hardvary.and_mask(1.0), jnp.asarray(grads))
    expected = np.sum(kept, dtype=np.float32) / np.float32(max(kept.size, 1))
    assert float(kept_fraction) == expected


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
@pytest.mark.parametrize("soft", ["none", "some", "all"])
def test_kept_fraction_is_of_all_parameters_few_or_many(soft, rescale, jit):
    # Those of few components are counted together, hard masks and soft ones.
    rng = np.random.default_rng(1)
    shapes = [(), (3,), (70, 60), (300, 33), (5, 4), (0, 2), (4096,), (9,)]
    masks = [rng.random(shape).astype(np.float32) for shape in shapes]
    is_soft = [soft == "all" or (soft == "some" and i % 3 == 1) for i in range(8)]
    masks = [m if s else np.round(m) for m, s in zip(masks, is_soft, strict=True)]

    def rule(stats, soft):
        return stats.mean if soft else stats.mean != 0, stats.mean

    if soft == "some":
        soft_sizes = {np.shape(m) for m, s in zip(masks, is_soft, strict=True) if s}
        tx = hardvary.aggregator(
            lambda x: rule(x, x.mean.shape in soft_sizes), rescale=rescale
        )
    else:
        tx = hardvary.aggregator(lambda x: rule(x, soft == "all"), rescale=rescale)
    grads = [jnp.asarray(m)[None] for m in masks]
    update = jax.jit(tx.update) if jit else tx.update
    _, state = update(grads, tx.init(masks))
    expected = sum(m.sum(dtype=np.float64) for m in masks) / sum(m.size for m in masks)
    np.testing.assert_allclose(state.kept_fraction, expected, rtol=1e-6)
    assert isinstance(state.kept_fraction, jax.Array)


@pytest.mark.parametrize("form", ["stacked", "stats", "object"])
def test_and_mask_traces_no_functions_within_functions(form):
    # Each takes longer to trace, and to lower, than what it consists of.
    params = {"w": jnp.ones((6, 5)), "b": jnp.ones(5), "c": jnp.ones((3, 2))}
    x = jnp.ones((4, 3, 6))

    def loss(params, x):
        hidden = x @ params["w"] + params["b"][None]
        return jnp.sum(jnp.tanh(hidden)[:, :2] @ params["c"].T)

    tx = hardvary.and_mask(0.7)
    oracle = {
        "stacked": hardvary.per_env_grad,
        "stats": hardvary.grad_stats,
        "object": hardvary.env_grads,
    }[form](loss)

    def calls(function):
        eqns = jax.make_jaxpr(function)(params, x).eqns
        return sum(eqn.primitive.name in ("jit", "pjit") for eqn in eqns)

    updates = calls(lambda p, x: tx.update(oracle(p, x), tx.init(p), p))
    alone = calls(lambda p, x: jax.vmap(jax.value_and_grad(loss), (None, 0))(p, x))
    assert updates <= alone


@pytest.mark.parametrize("name", ["and_mask", "geometric_mean"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_aggregators_on_one_environment_return_its_gradient(name, threshold):
    grads = jnp.array([[1.0, -2.0, 0.0, 0.25]])
    updates, kept_fraction = aggregate(AGGREGATORS[name](threshold), grads)
    np.testing.assert_allclose(updates, grads[0], rtol=1e-6)
    # Nobody votes on a zero gradient.
    assert float(kept_fraction) == (1.0 if threshold == 0 else 0.75)


def test_sand_mask_on_one_environment_is_the_step():
    grads = jnp.array([[1.0, -2.0, 0.0, 0.25]])
    updates, kept_fraction = aggregate(
        hardvary.sand_mask(0.5, 1.0, rescale=False), grads
    )
    np.testing.assert_array_equal(updates, grads[0])
    assert float(kept_fraction) == 0.75


def test_and_mask_zero_gradient_lowers_the_agreement():
    grads = jnp.array([[1.0], [1.0], [0.0]])
    np.testing.assert_allclose(hardvary.agreement(grads), [2 / 3], rtol=1e-6)
    assert float(aggregate(hardvary.and_mask(0.7), grads)[0][0]) == 0
    assert float(aggregate(hardvary.and_mask(0.6), grads)[0][0]) > 0


def test_xor_mask_threshold_zero_keeps_nothing():
    updates, kept_fraction = aggregate(hardvary.xor_mask(0.0), make_grads("array", 4))
    np.testing.assert_array_equal(updates, np.zeros(7))
    assert float(kept_fraction) == 0


def test_sand_mask_threshold_one_keeps_nothing():
    updates, kept_fraction = aggregate(
        hardvary.sand_mask(1.0, 1.0), jnp.array([[1.0, 2.0], [1.0, 3.0]])
    )
    np.testing.assert_array_equal(updates, [0, 0])
    assert float(kept_fraction) == 0


def test_sand_mask_rescale_divides_by_the_mean_of_the_mask():
    grads = jnp.array([[1.0, 2.0], [3.0, -1.0]])  # variance 2 and 4.5
    mask = np.tanh(0.5 / 2)
    plain, kept_fraction = aggregate(hardvary.sand_mask(0.5, 1.0, rescale=False), grads)
    rescaled, _ = aggregate(hardvary.sand_mask(0.5, 1.0), grads)
    np.testing.assert_allclose(plain, [2 * mask, 0], rtol=1e-6)
    np.testing.assert_allclose(rescaled, [4, 0], rtol=1e-6)
    np.testing.assert_allclose(kept_fraction, mask / 2, rtol=1e-6)


def test_geometric_mean_eps_enters_the_logarithm():
    grads = jnp.array([[1.0], [0.0]])
    updates, _ = aggregate(hardvary.geometric_mean(0.0, eps=0.25), grads)
    np.testing.assert_allclose(updates, [np.sqrt(1.25 * 0.25)], rtol=1e-6)


def test_geometric_mean_of_tiny_and_huge_gradients_does_not_overflow():
    grads = jnp.array([[1e30, 1e-30], [1e30, 1e-30], [1e-9, 1e-30]])
    updates, _ = aggregate(hardvary.geometric_mean(1.0), grads)
    np.testing.assert_allclose(updates, [(1e51 * 1.1) ** (1 / 3), 1e-10], rtol=1e-4)


@every_aggregator
@non_finite
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
def test_aggregators_on_non_finite_gradients_return_nan_there_only(
    name, value, threshold, rescale
):
    grads = make_grads("array", 4)
    broken = grads.at[2, 5].set(value)
    tx = AGGREGATORS[name](threshold, rescale=rescale)
    updates, kept_fraction = aggregate(tx, broken)
    np.testing.assert_array_equal(np.isnan(updates), np.arange(7) == 5)
    assert np.isfinite(kept_fraction)


@every_aggregator
@non_finite
@pytest.mark.parametrize("method", ["vmap", "scan"])
def test_aggregators_on_grad_stats_of_non_finite_gradients_return_nan(
    name, value, method
):
    # One environment has a non-finite gradient, of one component.
    inputs = make_grads("array", 4).at[2, 5].set(value)
    oracle = hardvary.grad_stats(
        lambda w, g: jnp.sum(w * g), stats=STATISTICS, method=method
    )
    tx = AGGREGATORS[name](0.5, rescale=True)
    updates, kept_fraction = aggregate(tx, oracle(jnp.zeros(7), inputs))
    np.testing.assert_array_equal(np.isnan(updates), np.arange(7) == 5)
    assert np.isfinite(kept_fraction)


@non_finite
def test_agreement_on_non_finite_gradients_is_nan_there_only(value):
    grads = make_grads("array", 4).at[2, 5].set(value)
    np.testing.assert_array_equal(
        np.isnan(hardvary.agreement(grads)), np.arange(7) == 5
    )


@every_aggregator
def test_aggregators_on_numpy_gradients_equal_those_on_jax_arrays(name):
    grads = make_grads("nested", 3)
    tx = AGGREGATORS[name](0.5)
    actual = aggregate(tx, jax.tree.map(np.asarray, grads), make_params("nested"))
    assert_trees_equal(actual, aggregate(tx, grads, make_params("nested")))


@every_aggregator
def test_aggregators_on_handmade_grad_stats_accept_a_python_count(name):
    grads = make_grads("array", 4)
    stats = hardvary.GradStats(
        mean=grads.mean(0),
        sign_sum=jnp.sign(grads).sum(0),
        square_mean=jnp.square(grads).mean(0),
        log_abs_mean=jnp.log(jnp.abs(grads) + 1e-10).mean(0),
        num_envs=num_envs_of(grads),
    )
    updates, _ = aggregate(AGGREGATORS[name](0.5), stats)
    expected, _ = aggregate(AGGREGATORS[name](0.5), grads)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [list, np.array, lambda w: np.array(w, np.int32), lambda w: np.array(w) > 0],
    ids=["list", "float64", "int", "bool"],
)
def test_and_mask_env_weights_of_any_real_type_weigh(make):
    grads = make_grads("array", 3)
    weights = make([1, 0, 1])
    updates, _ = aggregate(hardvary.and_mask(0.5), grads, env_weights=weights)
    expected, _ = aggregate(hardvary.and_mask(0.5), grads[np.array([0, 2])])
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_and_mask_float64_weights_are_used_in_full():
    with enable_x64(True):
        grads = jnp.ones((3, 2), jnp.float64)
        weights = jnp.full(3, 0.1, jnp.float64)
        updates, _ = aggregate(hardvary.and_mask(1.0), grads, env_weights=weights)
        agreement = hardvary.agreement(grads, env_weights=weights)
    np.testing.assert_allclose(updates, [1, 1], rtol=1e-15)
    np.testing.assert_allclose(agreement, [1, 1], rtol=1e-15)


def test_and_mask_max_rescale_may_be_traced():
    grads = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, -3.0, -3.0, -3.0]])
    run = jax.jit(
        lambda cap: aggregate(
            hardvary.and_mask(1.0, rescale=True, max_rescale=cap), grads
        )[0]
    )
    np.testing.assert_array_equal(run(2.5), [2.5, 0, 0, 0])
    np.testing.assert_array_equal(run(9.0), [4, 0, 0, 0])


def test_sand_mask_of_bfloat16_gradients_sees_the_variance_of_the_gradients():
    # Rounded to bfloat16, the mean would hide a variance of 2 % of its square.
    noise = jnp.array([-0.2, -0.1, -0.05, 0.05, 0.1, 0.2])
    grads = (1 + noise).astype(jnp.bfloat16)[:, None]
    tx = hardvary.sand_mask(threshold=0.9, sharpness=0.01, rescale=False)
    exact = np.var(np.asarray(grads, np.float64), ddof=1)
    [update], _ = aggregate(tx, grads)
    assert update.dtype == jnp.bfloat16
    assert float(update) == pytest.approx(np.tanh(0.01 * 0.1 / exact), rel=0.01)


def test_and_mask_only_absent_environments_under_jit_is_nan():
    grads = jnp.ones((2, 3))

    @jax.jit
    def update(weights):
        return aggregate(hardvary.and_mask(), grads, env_weights=weights)[0]

    assert jnp.isnan(update(jnp.zeros(2))).all()
    # What cannot be refused under jit counts as absent, in sums and total alike.
    assert (update(jnp.array([1.0, -1.0])) == 1.0).all()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators_on_float64_numpy_gradients_without_x64_do_not_warn(name):
    # Warnings are errors here.
    grads = np.random.default_rng(0).normal(size=(4, 3))
    assert grads.dtype == np.float64
    updates, _ = aggregate(AGGREGATORS[name](0.5, rescale=True), grads, jnp.ones(3))
    expected, _ = aggregate(
        AGGREGATORS[name](0.5, rescale=True), jnp.asarray(grads, jnp.float32)
    )
    assert_trees_equal(updates, expected)


# Aggregators without a threshold.


@every_plain
@pytest.mark.parametrize("shape", ["no_leaves", "only_zero_size"])
def test_plain_aggregators_without_components_report_nothing_kept(name, shape):
    grads = make_grads(shape, 3)
    updates, kept_fraction = aggregate(PLAIN_AGGREGATORS[name](), grads)
    assert float(kept_fraction) == 0
    assert jax.tree.structure(updates) == jax.tree.structure(grads)


@every_plain
def test_plain_aggregators_on_zero_gradients_return_zeros(name):
    updates, kept_fraction = jitted_plain(name)(jnp.zeros((4, 7)))
    np.testing.assert_array_equal(updates, np.zeros(7))
    assert float(kept_fraction) == 0


@every_plain
@pytest.mark.parametrize("form", ["stacked", "stats"])
def test_plain_aggregators_on_non_finite_gradients_return_nan_there_only(name, form):
    grads = make_grads("array", 4)
    for env, value in enumerate((np.nan, np.inf, -np.inf)):
        grads = grads.at[env, 4 + env].set(value)
    if form == "stats":
        oracle = hardvary.grad_stats(lambda w, g: jnp.sum(w * g), stats=STATISTICS)
        grads = jax.jit(oracle)(jnp.zeros(7), grads)
    updates, kept_fraction = jitted_plain(name)(grads)
    np.testing.assert_array_equal(np.isnan(updates), np.arange(7) >= 4)
    assert 0 < float(kept_fraction) < 0.6


@every_plain
def test_plain_aggregators_on_one_environment_return_its_gradient(name):
    grads = jnp.array([[1.0, -2.0, 0.0, 0.25]])
    updates, kept_fraction = jitted_plain(name)(grads)
    expected = jnp.sign(grads[0]) if name == "majority_sign" else grads[0]
    # Nobody votes on a zero gradient, so that agr_rand puts noise there.
    there = np.arange(4) != 2
    np.testing.assert_array_equal(np.asarray(updates)[there], expected[there])
    assert (float(updates[2]) != 0) == (name == "agr_rand")
    assert float(kept_fraction) == 0.75


@every_plain
def test_plain_aggregators_with_only_absent_environments_under_jit_are_nan(name):
    @jax.jit
    def update(weights):
        tx = PLAIN_AGGREGATORS[name]()
        return aggregate(tx, jnp.ones((2, 3)), env_weights=weights)[0]

    assert jnp.isnan(update(jnp.zeros(2))).all()
    assert (update(jnp.array([0.0, 1.0])) == 1).all()


def test_soft_and_mask_weakens_what_does_not_reach_the_threshold():
    # Agreement 1, 1/2, 1/4 and 0; means 2.5, 1, 0.25 and 0.5.
    grads = jnp.array(
        [
            [1.0, 4.0, 2.0, -2.0],
            [2.0, 2.0, 1.0, -2.0],
            [3.0, 1.0, -2.0, 3.0],
            [4.0, -3.0, 0.0, 3.0],
        ]
    )
    for threshold, mask in (
        (1.0, [1, 0.5, 0.25, 0]),
        (0.5, [1, 1, 0.25, 0]),
        (0.25, [1, 1, 1, 0]),
        (0.0, [1, 1, 1, 1]),
    ):
        updates, kept_fraction = jitted_aggregator("soft_and_mask")(grads, threshold)
        np.testing.assert_array_equal(updates, np.array([2.5, 1, 0.25, 0.5]) * mask)
        assert float(kept_fraction) == np.mean(mask)


def test_soft_and_mask_on_a_tie_with_the_threshold_keeps_all():
    # 4/5 = 0.8 and 3/5 = 0.6, which no float is.
    grads = jnp.array([[1.0, 1.0]] * 4 + [[0.0, -1.0]])
    for threshold in (0.8, np.float32(0.8), jnp.bfloat16(0.8)):
        updates, _ = aggregate(hardvary.soft_and_mask(threshold), grads)
        np.testing.assert_allclose(updates, [0.8, 0.6 * 0.6], rtol=1e-6)


def test_disjoint_mean_leaves_out_whoever_lost_the_election():
    grads = jnp.array(
        [
            [1.0, -8.0, 2.0, 0.0, 3.0],
            [2.0, 1.0, -2.0, 0.0, -1.0],
            [-1.5, 3.0, 0.0, 5.0, -1.0],
        ]
    )
    updates, kept_fraction = jitted_plain("disjoint_mean")(grads)
    # One large gradient outweighs many small ones; a zero is not counted; a tie is 0.
    np.testing.assert_array_equal(updates, [1.5, -8, 0, 5, 3])
    np.testing.assert_allclose(kept_fraction, 4 / 5, rtol=1e-6)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize("name", ["disjoint_mean", "majority_sign"])
def test_ties_that_sums_round_are_ties_in_any_order(name, order):
    # 0.1 + 0.2 - 0.3 is not 0 in every order.
    values = np.array([0.1, 0.2, -0.3], np.float32)[list(order)]
    if name == "disjoint_mean":
        grads, weights = values[:, None], np.ones(3, np.float32)
    else:
        grads, weights = np.sign(values)[:, None], np.abs(values)
    updates, kept_fraction = jitted_plain(name)(grads, weights)
    assert float(updates[0]) == float(kept_fraction) == 0


def test_disjoint_mean_of_weights_far_apart_stays_finite():
    grads = jnp.array([[-1.0, 1e30], [1e20, -1.0]])
    weights = np.array([1.0, 1e-12], np.float32)
    updates, _ = jitted_plain("disjoint_mean")(grads, weights)
    assert np.isfinite(updates).all()
    assert (np.asarray(updates) > 0).all()


def test_majority_sign_counts_votes_whatever_they_are_worth():
    grads = jnp.array([[1.0, 1.0, 0.0], [1e-30, -9.0, -5.0], [-1e9, 0.0, 0.0]])
    run = jitted_plain("majority_sign")
    updates, kept_fraction = run(grads)
    np.testing.assert_array_equal(updates, [1, 0, -1])
    np.testing.assert_allclose(kept_fraction, 2 / 3, rtol=1e-6)
    weights = np.array([1.0, 1.0, 3.0], np.float32)
    weighted, _ = run(grads, weights)
    np.testing.assert_array_equal(weighted, [-1, 0, -1])


@pytest.mark.parametrize("margin", [0, 1])
def test_majority_sign_of_many_environments_sees_a_single_vote(margin):
    signs = np.ones((100_000 + margin, 1), np.float32)
    signs[:50_000] = -1
    updates, _ = jitted_plain("majority_sign")(signs)
    assert float(updates[0]) == margin
