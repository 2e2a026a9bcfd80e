"""Aggregators that draw at random: `grad_drop`, `agr_rand`, and rules of one's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from tests._asserts import assert_trees_close, assert_trees_equal
from tests._inputs import aggregate, jitted_aggregator, jitted_plain, make_grads
from tests.zoo import compile_quickly

SIZE = 10_000


def noise_rule(stats, key):
    return stats.mean < 0, stats.mean, jax.random.uniform(key, stats.mean.shape)


MAKERS = {
    "grad_drop": hardvary.grad_drop,
    "agr_rand": functools.partial(hardvary.agr_rand, std=2.0),
    "own": lambda seed: hardvary.aggregator(noise_rule, stats=("mean",), seed=seed),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def contested(size=SIZE):
    """Gradients `[4, size]` with purity 3/4: mean 1, positives 1.5, negatives -0.5."""
    return jnp.tile(jnp.array([[3.0], [3.0], [-1.0], [-1.0]]), (1, size))


def three_steps(tx, grads):
    """Updates of three steps on the same gradients, and the last state."""
    state, found = tx.init(None), []
    for _ in range(3):
        updates, state = tx.update(grads, state)
        found.append(updates)
    return found, state


def shuffled(name, update):
    """What was drawn, with mean 0 and variance 1 if drawn as it should be."""
    values = np.asarray(update, np.float64)
    if name == "grad_drop":
        # 1.5 with probability 3/4, else -0.5.
        return (values - 1) / np.sqrt(0.75)
    if name == "own":
        return (values - 0.5) * np.sqrt(12)
    return values / 2


def unequal(size=SIZE):
    """Two leaves to draw for, and one in which all agree, with 2 as its mean size."""
    agreed = jnp.array([[1.0, -3.0], [1.0, -3.0], [1.0, -3.0], [1.0, -3.0]])
    return {"a": contested(size), "b": contested(size), "agreed": agreed}


@pytest.mark.parametrize("name", MAKERS)
def test_draws_are_independent_between_components_leaves_and_steps(name):
    tx = MAKERS[name](0)
    found, state = jax.jit(functools.partial(three_steps, tx))(unequal())
    assert int(state.mask_count) == 3
    drawn = [shuffled(name, update[leaf]) for update in found for leaf in ("a", "b")]
    for values in drawn:
        # Four standard deviations.
        assert abs(values.mean()) < 4 / np.sqrt(SIZE)
        assert abs(values.var() - 1) < 0.1
        assert abs(np.mean(values[1:] * values[:-1])) < 4 / np.sqrt(SIZE)
    correlations = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 4 / np.sqrt(SIZE)


@every_maker
def test_draws_follow_from_the_seed_whatever_its_type(make):
    grads = contested(8)
    first, again, other = (three_steps(make(seed), grads)[0] for seed in (3, 3, 4))
    assert_trees_equal(first, again)
    assert not np.array_equal(first, other)
    for seed in (np.int64(3), jnp.uint32(3), jax.random.key(3)):
        assert_trees_equal(three_steps(make(seed), grads)[0], first)


@every_maker
def test_draws_under_vmap_over_seeds_are_those_of_each(make):
    grads = contested(8)

    @jax.jit
    @jax.vmap
    def run(seed):
        return three_steps(make(seed), grads)

    found = run(jnp.arange(3))
    for seed in range(3):
        mine = jax.tree.map(lambda leaf, seed=seed: leaf[seed], found)
        assert_trees_close(mine, three_steps(make(seed), grads))


@every_maker
def test_draws_resume_from_a_saved_state(make):
    grads = contested(8)
    found, state = three_steps(make(0), grads)
    # All that has to be saved is arrays of numbers.
    saved = jax.tree.map(np.asarray, state)
    later, _ = make(0).update(grads, saved)
    assert not any(np.array_equal(later, update) for update in found)
    assert_trees_equal(make(0).update(grads, state)[0], later)


def test_draws_of_groups_with_seeds_of_their_own_differ():
    grads = {"a": contested(8), "b": contested(8)}
    both = {"one": hardvary.grad_drop(0), "other": hardvary.grad_drop(1)}
    tx = optax.partition(both, {"a": "one", "b": "other"})
    updates, _ = tx.update(grads, tx.init({"a": jnp.ones(8), "b": jnp.ones(8)}))
    assert not np.array_equal(updates["a"], updates["b"])


def test_grad_drop_keeps_a_side_as_often_as_its_share_of_the_gradients():
    updates, kept_fraction = jitted_plain("grad_drop")(contested())
    values, counts = np.unique(updates, return_counts=True)
    np.testing.assert_array_equal(values, [-0.5, 1.5])
    assert abs(counts[1] / SIZE - 0.75) < 4 * np.sqrt(0.75 * 0.25 / SIZE)
    # The share of |g|: 3/4 of what is positive, and 1/4 of what is negative.
    expected = (counts[1] * 0.75 + counts[0] * 0.25) / SIZE
    np.testing.assert_allclose(kept_fraction, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grad_drop_where_all_agree_is_the_mean_whatever_is_drawn(dtype):
    # Gradients whose sums round, by every form and with weights.
    rng = np.random.default_rng(0)
    sizes = np.exp(3 * rng.normal(size=(100, 500)))
    signs = rng.choice([-1, 1], 500)
    grads = jnp.asarray(signs * sizes, dtype)
    weights = np.exp(rng.normal(size=100)).astype(np.float32)

    @compile_quickly
    def run(grads, weights):
        def loss_fn(w, g):
            return jnp.sum((w * g).astype(jnp.float32))

        params = jnp.zeros(500, dtype)
        tx, mean = hardvary.grad_drop(0), hardvary.and_mask(0.0)
        return [
            (*three_steps(tx, held(grads)), mean.update(held(grads), None)[0])
            for held in (
                lambda grads: grads,
                lambda grads: hardvary.env_grads(loss_fn)(
                    params, grads, env_weights=weights
                ),
                lambda grads: hardvary.grad_stats(
                    loss_fn, stats=("mean", "sign", "abs"), method="scan"
                )(params, grads, env_weights=weights),
            )
        ]

    for found, state, mean in run(grads, weights):
        assert float(state.kept_fraction) == 1
        for updates in found:
            assert_trees_close(updates, mean, rtol=1e-6 if dtype == "float32" else 1e-2)


def test_grad_drop_in_expectation_is_the_mean():
    grads = make_grads("array", 4)

    @jax.jit
    @jax.vmap
    def run(seed):
        return aggregate(hardvary.grad_drop(seed), grads)[0]

    updates = np.asarray(run(jnp.arange(SIZE)), np.float64)
    error = updates.mean(0) - np.asarray(grads).mean(0)
    assert np.all(np.abs(error) <= 4 * updates.std(0) / np.sqrt(SIZE) + 1e-6)


def test_agr_rand_scales_its_noise_to_what_agrees_in_all_leaves():
    grads = unequal()
    grads["far"] = jnp.full((4, 2), -6.0)  # mean of 1, 3, 6 and 6: 4
    updates, kept_fraction = jitted_plain("agr_rand")(grads)
    np.testing.assert_array_equal(updates["agreed"], [1, -3])
    np.testing.assert_array_equal(updates["far"], [-6, -6])
    for leaf in ("a", "b"):
        assert np.std(updates[leaf]) == pytest.approx(4, rel=0.04)
    np.testing.assert_allclose(kept_fraction, 4 / (2 * SIZE + 4), rtol=1e-5)


def test_agr_rand_std_is_that_of_the_noise():
    grads = unequal()

    @jax.jit
    def run(std):
        return aggregate(hardvary.agr_rand(0, std=std), grads)

    unit, _ = run(1.0)
    for std in (0.0, 0.125, 8.0):
        updates, _ = run(std)
        np.testing.assert_allclose(updates["a"], std * unit["a"], rtol=1e-6)
        np.testing.assert_array_equal(updates["agreed"], [1, -3])
    assert_trees_close(run(0.0), jitted_aggregator("and_mask")(grads, 1.0))


def test_agr_rand_std_of_a_schedule_fades():
    tx = hardvary.agr_rand(0, std=optax.linear_schedule(1.0, 0.0, 2))
    found, state = jax.jit(functools.partial(three_steps, tx))(contested())
    np.testing.assert_allclose([np.std(f) for f in found], [1, 0.5, 0], rtol=0.05)
    assert int(state.mask_count) == 3


def test_agr_rand_broken_components_do_not_reach_the_noise():
    grads = unequal(8)
    grads["agreed"] = grads["agreed"].at[0, 0].set(jnp.nan)
    updates, _ = jitted_plain("agr_rand")(grads)
    assert np.isnan(updates["agreed"]).tolist() == [True, False]
    assert np.isfinite(updates["a"]).all()


def test_agr_rand_unanimity_of_weights_that_round_is_unanimity():
    weights = np.random.default_rng(0).uniform(0.1, 1, 1000).astype(np.float32)
    grads = jnp.ones((1000, 3))
    updates, kept = jitted_plain("agr_rand")(grads, weights)
    np.testing.assert_allclose(updates, [1, 1, 1], rtol=1e-5)
    assert float(kept) == 1


def test_own_rule_with_three_arrays_fills_where_the_mask_is_closed():
    def rule(stats, soft):
        mask = stats.mean > 0
        if soft:
            mask = jnp.where(mask, 0.75, 0.25).astype(jnp.float32)
        return mask, stats.mean, 10 * jnp.ones_like(stats.mean)

    grads = jnp.array([[1.0, -2.0], [3.0, -2.0]])
    for soft, expected in ((False, [2, 10]), (True, [4, 7])):
        tx = hardvary.aggregator(functools.partial(rule, soft=soft), name="rule")
        np.testing.assert_allclose(aggregate(tx, grads)[0], expected)


def test_own_rule_with_a_third_array_of_another_shape_is_refused():
    tx = hardvary.aggregator(lambda s: (s.mean > 0, s.mean, s.mean[0]), name="mine")
    with pytest.raises(ValueError, match=r"mine: the rule's value where .* closed"):
        tx.update(jnp.ones((3, 2)), tx.init(None))
