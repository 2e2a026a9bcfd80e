"""`hardvary.aggregator`: a rule of one's own has all that the library's own have."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from hardvary._env_grads.agreement import reaches
from tests._asserts import assert_like_params, assert_trees_close, assert_trees_equal
from tests._inputs import STATISTICS, make_grads, make_params
from tests.zoo import compile_quickly
from tests.zoo.compare import FIELDS

NUM_ENVS = 4
# The library's own, once more.


def and_rule(stats, threshold):
    return reaches(stats.sign_sum, stats.num_envs, threshold), stats.mean


def soft_rule(stats, threshold):
    """Gradient-masked averaging: the agreement where it is below the threshold."""
    agreement = jnp.abs(stats.sign_sum) / stats.num_envs
    kept = reaches(stats.sign_sum, stats.num_envs, threshold)
    return jnp.where(kept, 1, agreement), stats.mean


def one_sided(stats):
    """Every statistic that there is has a say."""
    positive = (stats.nonzero_sum + stats.sign_sum) / 2
    spread = jnp.sqrt(stats.square_mean) + jnp.exp(stats.log_abs_mean)
    return positive > stats.nonzero_sum / 4, stats.abs_mean + spread


def one_sided_of(grad, weights):
    """As `one_sided`, from `[env, ...]`, in NumPy."""
    w = weights.reshape(-1, *[1] * (grad.ndim - 1))
    average = lambda values: (w * values).sum(0) / w.sum()  # noqa: E731
    spread = np.sqrt(average(grad**2)) + np.exp(average(np.log(np.abs(grad) + 1e-10)))
    positive, nonzero = (w * (grad > 0)).sum(0), (w * (grad != 0)).sum(0)
    return np.where(positive > nonzero / 4, average(np.abs(grad)) + spread, 0)


def to_env_grads(grads, weights=None):
    """The same gradients as a tree of `EnvGrad`: of a loss linear in the parameters."""
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), grads)
    return hardvary.env_grads(linear)(params, grads, env_weights=weights)


def to_grad_stats(grads, weights=None):
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), grads)
    oracle = hardvary.grad_stats(linear, stats=STATISTICS)
    return oracle(params, grads, env_weights=weights)


def linear(params, grads):
    products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, grads)
    return sum(jax.tree.leaves(products))


def updates_of_every_form(tx, grads, weights=None):
    """`[(updates, state)]` of the three forms, from one compilation."""

    @compile_quickly
    def run(grads, weights):
        extra = {} if weights is None else {"env_weights": weights}
        return [
            tx.update(grads, tx.init(None), **extra),
            tx.update(to_env_grads(grads, weights), tx.init(None)),
            tx.update(to_grad_stats(grads, weights), tx.init(None)),
        ]

    return run(grads, weights)


@pytest.mark.parametrize("rescale", [False, True])
def test_own_and_rule_is_the_and_mask(rescale):
    grads = make_grads("nested", NUM_ENVS)
    settings = {"rescale": rescale, "max_rescale": 3.0}
    own = hardvary.aggregator(and_rule, threshold=0.5, **settings)
    tx = hardvary.and_mask(0.5, **settings)
    mine, theirs = (updates_of_every_form(t, grads) for t in (own, tx))
    for one, other in zip(mine, theirs, strict=True):
        assert_trees_equal(one, other)
        assert_trees_close(one, mine[0])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_own_rule_of_all_statistics_equals_numpy_on_every_form(weighted):
    grads = make_grads("nested", NUM_ENVS)
    weights = np.array([1.0, 0.0, 2.0, 0.5], np.float32) if weighted else None
    if weighted:
        grads = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), grads)
    tx = hardvary.aggregator(one_sided, stats=STATISTICS)
    present = np.ones(NUM_ENVS) if weights is None else weights
    expected = jax.tree.map(
        lambda leaf: one_sided_of(
            np.asarray(leaf, np.float64)[present > 0], present[present > 0]
        ),
        grads,
    )
    for updates, _ in updates_of_every_form(tx, grads, weights):
        assert_trees_close(updates, expected, rtol=1e-4)


@pytest.mark.parametrize("rescale", [False, True])
def test_own_soft_mask_weights_the_direction_and_counts_its_mean(rescale):
    grads = make_grads("nested", NUM_ENVS)
    tx = hardvary.aggregator(soft_rule, threshold=0.75, rescale=rescale)

    def soft(leaf):
        leaf = np.asarray(leaf, np.float64)
        agreement = np.abs(np.sign(leaf).mean(0))
        return np.where(agreement >= 0.75, 1, agreement)

    masks = jax.tree.map(soft, grads)
    sizes = [(mask.sum(), mask.size) for mask in jax.tree.leaves(masks)]
    fraction = sum(kept for kept, _ in sizes) / sum(size for _, size in sizes)

    def expected(mask, leaf):
        factor = mask.size / mask.sum() if rescale and mask.sum() > 0 else 1
        return factor * mask * np.asarray(leaf, np.float64).mean(0)

    for updates, state in updates_of_every_form(tx, grads):
        assert_trees_close(updates, jax.tree.map(expected, masks, grads))
        np.testing.assert_allclose(state.kept_fraction, fraction, rtol=1e-6)


def test_own_rule_gets_the_number_for_its_parameter_and_step():
    grads = make_grads("nested", NUM_ENVS, seed=1)
    schedule = optax.linear_schedule(0.0, 1.0, 2)
    thresholds = {"dense": {"kernel": schedule, "bias": 0.25}, "scale": 0.5, "none": 1}
    tx = hardvary.aggregator(and_rule, threshold=thresholds)

    @compile_quickly
    def run(grads):
        state, found = tx.init(None), []
        for _ in range(3):
            updates, state = tx.update(grads, state)
            found.append((updates, state))
        return found

    for count, (updates, state) in enumerate(run(grads)):
        assert int(state.mask_count) == count + 1
        for value, of, name in (
            (count / 2, "dense", "kernel"),
            (0.25, "dense", "bias"),
        ):
            tx_alone = hardvary.and_mask(value)
            alone, _ = tx_alone.update(grads[of][name], tx_alone.init(None))
            assert_trees_close(updates[of][name], alone)


def test_own_rule_reads_what_it_asked_for_in_float32_and_no_more():
    seen = []

    def rule(stats, **hyperparams):
        seen.append((stats, hyperparams))
        return stats.nonzero_sum >= 0, stats.abs_mean

    tx = hardvary.aggregator(rule, stats=("nonzero", "abs"), quorum=2.0)
    for dtype in ("bfloat16", "float16", "float32"):
        grads, params = make_grads("array", 3, dtype=dtype), make_params("array", dtype)
        for make in (jnp.asarray, to_env_grads, to_grad_stats):
            updates, _ = jax.eval_shape(
                lambda make=make, grads=grads: tx.update(make(grads), tx.init(None))
            )
            stats, hyperparams = seen.pop()
            assert hyperparams == {"quorum": 2.0}
            if make is not to_grad_stats:
                assert_like_params(updates, params)
                held = {f for f in FIELDS.values() if getattr(stats, f) is not None}
                assert held == {"nonzero_sum", "abs_mean"}
            assert stats.nonzero_sum.dtype == stats.abs_mean.dtype == jnp.float32
            assert stats.num_envs.dtype == jnp.float32


def test_own_rule_meets_a_broken_environment_as_nan_whatever_it_says():
    grads = jnp.array([[1.0, jnp.nan, jnp.inf, 2.0], [1.0, 1.0, 1.0, 2.0]])

    def rule(stats):
        direction = next(
            value
            for value in (stats.mean, stats.abs_mean, stats.nonzero_sum)
            if value is not None
        )
        return jnp.zeros(4, bool), direction

    for names in (("mean",), ("mean", "sign"), ("nonzero",), ("abs", "nonzero")):
        tx = hardvary.aggregator(rule, stats=names)
        updates, state = tx.update(grads, tx.init(None))
        assert np.isnan(updates).tolist() == [False, True, True, False], names
        assert float(state.kept_fraction) == 0


@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
@pytest.mark.parametrize(
    "direction",
    [jnp.array([1, 2, 3]), jnp.array([True, True, True]), np.array([1.0, 2.0, 3.0])],
    ids=["whole numbers", "booleans", "of NumPy"],
)
def test_own_rule_may_return_any_numbers_and_still_shows_nan(direction, rescale):
    grads = jnp.array([[1.0, jnp.inf, -3.0], [1.0, 1.0, -1.0]])
    mask = np.array([True, True, False])
    tx = hardvary.aggregator(lambda stats: (mask, direction), rescale=rescale)
    updates, state = tx.update(grads, tx.init(None))
    factor = 1.5 if rescale else 1.0
    assert np.isnan(updates).tolist() == [False, True, False]
    assert [float(updates[0]), float(updates[2])] == [factor, 0]
    assert updates.dtype == jnp.float32
    np.testing.assert_allclose(state.kept_fraction, 2 / 3, rtol=1e-6)


def test_own_rule_is_named_in_messages():
    def quorum(stats):
        return stats.nonzero_sum > 1, stats.abs_mean

    stats = hardvary.GradStats(mean=jnp.ones(3), num_envs=jnp.float32(2))
    for name, expected in ((None, "quorum"), ("mine", "mine")):
        tx = hardvary.aggregator(quorum, stats=("nonzero", "abs"), name=name)
        message = (
            rf"^{expected} needs the statistic 'nonzero', which this GradStats does "
            r"not hold; ask for it with .*stats=\('nonzero', 'abs'\)\), or use "
            "value_and_env_grads"
        )
        with pytest.raises(ValueError, match=message):
            tx.update(stats, tx.init(None))
        with pytest.raises(TypeError, match=f"^{expected}: gradients must be real"):
            tx.update(jnp.ones((2, 3), int), tx.init(None))


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (lambda s: (s.mean[:2] > 0, s.mean), "mask must have the shape"),
        (lambda s: (s.mean > 0, s.mean[None]), "direction must have the shape"),
        (lambda s: (True, s.mean), "mask must have the shape"),
        (lambda s: (s.mean > 0, 1.0), "direction must have the shape"),
    ],
)
def test_own_rule_of_another_shape_is_refused(rule, what):
    tx = hardvary.aggregator(rule, name="mine")
    with pytest.raises(ValueError, match=rf"mine: the rule's {what} \(7,\)"):
        tx.update(make_grads("array", 2), tx.init(None))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rule": 3}, TypeError, "rule must be callable, got 3"),
        ({"stats": "mean"}, TypeError, "stats must be a sequence of names"),
        ({"stats": ()}, ValueError, "stats must name at least one"),
        ({"stats": ("median",)}, ValueError, "stats must be drawn from .* 'median'"),
        ({"rescale": 1}, TypeError, "rescale must be True or False, got 1"),
        ({"max_rescale": 0.5}, ValueError, "max_rescale must be >= 1, got 0.5"),
        ({"threshold": "0.5"}, TypeError, "threshold must be a real scalar"),
        ({"threshold": jnp.ones(2)}, TypeError, "threshold must be a real scalar"),
    ],
)
def test_own_rule_with_bad_settings_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        hardvary.aggregator(**{"rule": and_rule, "threshold": 0.5, **settings})


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (lambda: 1, {}, "mine: the rule is called with the statistics.* alone; it tak"),
        (lambda s, k: s, {}, r"takes \(s, k\): missing a required argument: 'k'"),
        (lambda s: s, {"k": 1.0}, r"by keyword, k; .* unexpected keyword argument 'k'"),
        (lambda mean, sign: mean, {}, "missing a required argument: 'sign'"),
        (lambda s: s, {"seed": 0}, "unexpected keyword argument 'key'"),
    ],
)
def test_own_rule_that_takes_something_else_is_refused_when_built(
    rule, settings, message
):
    with pytest.raises(TypeError, match=message):
        hardvary.aggregator(rule, name="mine", **settings)


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        (lambda s: s.mean, r"an array of shape \(7,\)"),
        (lambda s: None, "a NoneType"),
        (lambda s: (s.mean,), "a tuple of 1"),
        (lambda s: [s.mean] * 4, "a list of 4"),
    ],
)
def test_own_rule_that_returns_no_pair_is_refused(rule, found):
    tx = hardvary.aggregator(rule, name="mine")
    with pytest.raises(TypeError, match=rf"mine: .*\(mask, direction\).* got {found}"):
        tx.update(make_grads("array", 2), tx.init(None))


@pytest.mark.parametrize(
    "rule",
    [
        lambda s: (s.abs_mean > 0, s.mean),
        lambda s: (s.mean > 0, jnp.sqrt(s.square_mean)),
        lambda s: (s.mean > 0, s.abs_mean.astype(float)),
    ],
    ids=["comparison", "function", "method"],
)
def test_own_rule_that_reads_what_it_did_not_name_is_told(rule):
    tx = hardvary.aggregator(rule, name="mine")
    with pytest.raises((TypeError, AttributeError), match="NoneType") as caught:
        tx.update(make_grads("array", 2), tx.init(None))
    (note,) = [note for note in caught.value.__notes__ if note.startswith("mine: ")]
    assert "None for want of being named in stats: square_mean ('square')" in note
    assert "abs_mean ('abs')" in note
    assert "sign_sum" not in note


def test_own_rule_with_a_tree_that_is_no_prefix_is_refused():
    tx = hardvary.aggregator(and_rule, threshold={"dense": 0.5})
    with pytest.raises(
        ValueError,
        match=r"threshold must be .* nothing at \['none'\]|"
        r"threshold must be .* nothing at \['scale'\]",
    ):
        tx.update(make_grads("nested", 2), tx.init(None))
