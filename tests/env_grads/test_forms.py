"""Laws of gradients in their three forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hardvary
from tests._asserts import assert_trees_close, assert_trees_equal
from tests._inputs import (
    AGGREGATORS,
    STATISTICS,
    VOTE_MASKS,
    make_grads,
    stacked_grads,
    weights_for,
)
from tests.zoo import compile_quickly
from tests.zoo.blocks import floats

NUM_ENVS = 8
every_aggregator = pytest.mark.parametrize("name", AGGREGATORS)
grads_of_eight = stacked_grads(cases=(("zero_size", NUM_ENVS),))
thresholds = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def linear(params, grads):
    products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, grads)
    return sum(jax.tree.leaves(products))


def zeros_of(grads):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), grads)


def as_stacked(grads, env_weights=None):
    del env_weights
    return grads


def as_env_grads(grads, env_weights=None):
    """The same gradients, of a loss linear in the parameters."""
    oracle = hardvary.env_grads(linear)
    return oracle(zeros_of(grads), grads, env_weights=env_weights)


def as_grad_stats(grads, env_weights=None, **settings):
    oracle = hardvary.grad_stats(linear, stats=STATISTICS, **settings)
    return oracle(zeros_of(grads), grads, env_weights=env_weights)


FORMS = {
    "stacked": as_stacked,
    "env_grads": as_env_grads,
    "grad_stats": as_grad_stats,
}


def extra_for(form, env_weights):
    """Weights belong to the stacked form alone: the others are weighted already."""
    if form != "stacked" or env_weights is None:
        return {}
    return {"env_weights": env_weights}


def weight_all(env_weights, num_envs=NUM_ENVS):
    return np.ones(num_envs, np.float32) if env_weights is None else env_weights


@functools.cache
def everything(name):
    """`(grads, threshold, weights) -> form -> all that is made of them`, compiled."""

    @compile_quickly
    def run(grads, threshold, weights):
        found = {}
        for form, make in FORMS.items():
            extra = extra_for(form, weights)
            tx = AGGREGATORS[name](threshold, rescale=True)
            held = make(grads, weights)
            updates, state = tx.update(held, tx.init(None), **extra)
            found[form] = {
                "updates": updates,
                "kept": state.kept_fraction,
                "agreement": hardvary.agreement(held, **extra),
                "mask": hardvary.mask(held, threshold, **extra),
                "kept_fractions": hardvary.kept_fractions(held, threshold, **extra),
            }
            if form != "grad_stats":
                found[form] |= {
                    "gramian": hardvary.gramian(held, **extra),
                    "norms": hardvary.norms(held, **extra),
                    "combine": hardvary.combine(
                        held, jnp.arange(-3.0, NUM_ENVS - 3), **extra
                    ),
                }
        return found

    return run


@every_aggregator
@given(
    grads=grads_of_eight,
    threshold=thresholds,
    weights=st.none() | weights_for(NUM_ENVS),
)
def test_forms_are_equal_and_permuting_environments_changes_nothing(
    name, grads, threshold, weights
):
    weights = weight_all(weights)
    found = everything(name)(grads, threshold, weights)
    expected = found.pop("stacked")
    rtol = 1e-5 if name in VOTE_MASKS else 2e-3
    for actual in found.values():
        for key, value in actual.items():
            assert_trees_close(value, expected[key], rtol=rtol, atol=1e-5)

    order = np.random.default_rng(0).permutation(NUM_ENVS)
    turned = jax.tree.map(lambda leaf: leaf[order], grads)
    permuted = everything(name)(turned, threshold, weights[order])
    for form in FORMS:
        actual = permuted[form]
        for key in ("updates", "kept", "agreement", "mask", "kept_fractions"):
            assert_trees_close(actual[key], expected[key], rtol=rtol, atol=1e-5)
        if form != "grad_stats":
            assert_trees_close(
                actual["gramian"], expected["gramian"][order][:, order], rtol=1e-4
            )
            assert_trees_close(actual["norms"], expected["norms"][order], rtol=1e-4)


@given(
    grads=grads_of_eight,
    threshold=thresholds,
    weights=st.none() | weights_for(NUM_ENVS),
)
def test_mask_is_what_the_and_mask_keeps(grads, threshold, weights):
    weights = weight_all(weights)
    for of_form in everything("and_mask")(grads, threshold, weights).values():
        kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(of_form["mask"]))
        size = sum(leaf.size for leaf in jax.tree.leaves(of_form["mask"]))
        np.testing.assert_allclose(of_form["kept"], kept / size, rtol=1e-6)
        shares = jax.tree.map(
            lambda leaf: np.float32(leaf.sum() / max(leaf.size, 1)), of_form["mask"]
        )
        assert_trees_close(of_form["kept_fractions"], shares, rtol=1e-6)
        # What is dropped is zero; what is kept is the mean, which may be zero.
        for update, mask in zip(
            jax.tree.leaves(of_form["updates"]),
            jax.tree.leaves(of_form["mask"]),
            strict=True,
        ):
            assert not np.any(np.asarray(update)[~np.asarray(mask)])
        for leaf in jax.tree.leaves(of_form["agreement"]):
            assert leaf.dtype == jnp.float32
            assert np.all((leaf >= 0) & (leaf <= 1))


THRESHOLDS = {
    "constant": lambda tree: 0.5,
    "numpy": lambda tree: np.float32(0.5),
    "array": lambda tree: jnp.float32(0.5),
    "float16": lambda tree: jnp.float16(0.5),
    "schedule": lambda tree: lambda count: 0.5,
    "moving schedule": lambda tree: optax.constant_schedule(0.5),
    "tree": lambda tree: jax.tree.map(lambda leaf: 0.5, tree),
    "prefix": lambda tree: {"dense": 0.5, "scale": 0.5, "none": 0.5},
    "tree of schedules": lambda tree: jax.tree.map(
        lambda leaf: optax.constant_schedule(0.5), tree
    ),
    "mixed": lambda tree: {
        "dense": {"kernel": jnp.float32(0.5), "bias": optax.constant_schedule(0.5)},
        "scale": 0.5,
        "none": None,
    },
}


@every_aggregator
def test_threshold_in_any_shape_is_the_constant(name):
    grads = make_grads("nested", NUM_ENVS, seed=2)

    @compile_quickly
    def run(grads, traced):
        def update(threshold, form):
            tx = AGGREGATORS[name](threshold)
            updates, state = tx.update(FORMS[form](grads), tx.init(None))
            return updates, state.kept_fraction

        made = {key: make(grads) for key, make in THRESHOLDS.items()}
        made["traced"] = traced
        made["tree of traced"] = {"dense": traced, "scale": 0.5, "none": traced}
        return {
            form: {key: update(value, form) for key, value in made.items()}
            for form in (FORMS if name == "and_mask" else ("stacked",))
        }

    for of_form in run(grads, 0.5).values():
        expected = of_form.pop("constant")
        assert 0 < float(expected[1]) < 1
        for actual in of_form.values():
            assert_trees_equal(actual, expected)


@pytest.mark.parametrize("form", FORMS)
def test_thresholds_that_differ_by_leaf_and_step(form):
    grads = make_grads("nested", NUM_ENVS, seed=2)
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    thresholds = {"dense": {"kernel": schedule, "bias": 0.25}, "scale": 1.0, "none": 1}
    tx = hardvary.and_mask(thresholds)

    @compile_quickly
    def run(grads):
        held, state, found = FORMS[form](grads), tx.init(None), []
        for count in range(5):
            updates, state = tx.update(held, state)
            now = {
                "dense": {"kernel": schedule(count), "bias": 0.25},
                "scale": 1.0,
                "none": 1,
            }
            alone = {
                "kernel": hardvary.and_mask(count / 4),
                "bias": hardvary.and_mask(0.25),
            }
            expected = {
                key: tx.update(held["dense"][key], tx.init(None))[0]
                for key, tx in alone.items()
            }
            fractions = hardvary.kept_fractions(held, now)
            found.append((updates, expected, state, fractions))
        return found

    sizes = jax.tree.map(lambda leaf: leaf[0].size, grads)
    seen = []
    for count, (updates, expected, state, fractions) in enumerate(run(grads)):
        assert_trees_equal(updates["dense"], expected)
        assert int(state.mask_count) == count + 1
        kept = jax.tree.map(lambda share, size: share * size, fractions, sizes)
        total = sum(jax.tree.leaves(kept)) / sum(jax.tree.leaves(sizes))
        np.testing.assert_allclose(state.kept_fraction, total, rtol=1e-6)
        seen.append(float(fractions["dense"]["kernel"]))
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > seen[-1]


# --------------------------------------------------------------------------------------
# Unanimity and weights.

METHODS = {
    "env_grads": None,
    "fused": {"method": "fused"},
    "fused in parts": {"method": "fused", "microbatch_size": 1},
    "scan": {"method": "scan"},
    "vmap": {"method": "vmap"},
    "stacked": None,
}


def unanimous_kinds(num_envs):
    """Name -> weights of `num_envs` environments that sums in any order round."""
    rng = np.random.default_rng(num_envs)
    return {
        "equal": np.ones(num_envs),
        "thirds": np.full(num_envs, 1 / 3),
        "uniform": rng.uniform(0.1, 1, num_envs),
        "harmonic": 1 / np.arange(1, num_envs + 1),
        "log-normal": np.exp(3 * rng.normal(size=num_envs)),
        "geometric": 0.5 ** np.minimum(np.arange(num_envs), 40),
        "normalised": (lambda w: w / w.sum())(rng.uniform(0.1, 1, num_envs)),
    }


@pytest.mark.parametrize("num_envs", [1, 3, 7, 100, 1000, 10_000])
def test_unanimity_of_any_weights_passes_at_threshold_one(num_envs):
    # One component of each sign, one without a dissenter, one with the least heavy.
    kinds = unanimous_kinds(num_envs)
    size = num_envs // 10 if num_envs > 10 else 1
    sizes = {**METHODS["fused in parts"], "microbatch_size": size}

    def loss_fn(params, x):
        # A product, and a stack.
        return jnp.sum(params["w"] @ x["left"]) + jnp.sum(params["b"] * x["right"])

    rng = np.random.default_rng(0)
    signs = np.array([1.0, -1.0, 1.0], np.float32)
    batch = {
        "left": floats(rng.uniform(0.1, 1, (num_envs, 2))),
        "right": jnp.asarray(signs * rng.uniform(0.1, 1, (num_envs, 3)), jnp.float32),
    }
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)}

    @compile_quickly
    def run(batch, weights):
        def masks(weights):
            found = {}
            for name, settings in METHODS.items():
                extra = {}
                if name == "stacked":
                    grads = hardvary.per_env_grad(loss_fn)(params, batch)
                    extra = {"env_weights": weights}
                elif settings is None:
                    oracle = hardvary.env_grads(loss_fn)
                    grads = oracle(params, batch, env_weights=weights)
                else:
                    settings = sizes if name == "fused in parts" else settings
                    oracle = hardvary.grad_stats(loss_fn, **settings)
                    grads = oracle(params, batch, env_weights=weights)
                found[name] = (
                    hardvary.mask(grads, 1.0, **extra),
                    hardvary.agreement(grads, **extra),
                )
            return found

        return jax.lax.map(masks, weights)

    weights = np.stack(list(kinds.values())).astype(np.float32)
    for name, (masks, agreements) in run(batch, weights).items():
        for leaf in jax.tree.leaves(masks):
            lost = [
                kind for kind, row in zip(kinds, leaf, strict=True) if not row.all()
            ]
            assert lost == [], name
        for leaf in jax.tree.leaves(agreements):
            assert np.all((leaf <= 1) & (leaf > 1 - 1e-5)), name


@pytest.mark.parametrize("num_envs", [3, 100, 1000])
def test_a_dissenter_of_noticeable_weight_does_not_pass_at_threshold_one(num_envs):
    weights = unanimous_kinds(num_envs)
    # Twice the share of a dissenter is what the agreement lacks.
    weights = [w for w in weights.values() if 2 * w.min() / w.sum() > 1e-4]
    weights = np.stack(weights).astype(np.float32)
    grads = np.ones((*weights.shape, 1), np.float32)
    grads[np.arange(len(weights)), weights.argmin(1)] = -1

    @compile_quickly
    @jax.vmap
    def run(grads, weights):
        return hardvary.mask(grads, 1.0, env_weights=weights)

    assert not np.any(run(grads, weights))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_below_the_smallest_float16_are_there(dtype):
    grads = jnp.asarray([[1.0, 2.0], [3.0, -4.0], [5.0, np.nan]], dtype)
    small = np.array([1e-9, 3e-9, 0.0], np.float32)

    @compile_quickly
    def run(grads, weights):
        found = {}
        for form in FORMS:
            extra = extra_for(form, weights)
            held = FORMS[form](grads, weights)
            tx = hardvary.and_mask(0.25)
            found[form] = (
                tx.update(held, tx.init(None), **extra)[0],
                hardvary.agreement(held, **extra),
            )
            if form != "grad_stats":
                signed = jnp.array([1e-9, -3e-9, 0.0])
                found[form] += (hardvary.combine(held, signed, **extra),)
        return found

    for weights in (small, jnp.asarray(small)):
        for updates, shares, *combined in run(grads, weights).values():
            np.testing.assert_allclose(
                np.asarray(updates, np.float32), [2.5, -2.5], rtol=1e-2
            )
            np.testing.assert_allclose(shares, [1, 0.5], rtol=1e-6)
            for value in combined:
                np.testing.assert_allclose(value, [-8e-9, 1.4e-8], rtol=1e-3)


@given(
    grads=stacked_grads(cases=(("array", 5),)),
    weights=st.lists(st.floats(2**-30, 2**30, width=32), min_size=5, max_size=5),
)
def test_agreement_of_every_form_lies_in_the_unit_interval(grads, weights):
    run = _agreements()
    for shares in run(grads, np.array(weights, np.float32)).values():
        assert np.all((shares >= 0) & (shares <= 1))


@functools.cache
def _agreements():
    @compile_quickly
    def run(grads, weights):
        return {
            form: hardvary.agreement(make(grads, weights), **extra_for(form, weights))
            for form, make in FORMS.items()
        }

    return run


# --------------------------------------------------------------------------------------
# Questions about whole trees.


def test_combine_takes_a_tree_prefix_of_weights():
    grads = make_grads("nested", NUM_ENVS)
    one, other = np.arange(-3.0, 5), np.ones(NUM_ENVS)
    weights = {"dense": one.astype(np.float32), "scale": other, "none": other}

    @compile_quickly
    def run(grads):
        return [
            hardvary.combine(make(grads), weights)
            for make in (as_stacked, as_env_grads)
        ]

    expected = {
        "dense": jax.tree.map(lambda leaf: np.tensordot(one, leaf, 1), grads["dense"]),
        "scale": np.asarray(grads["scale"]).sum(0),
        "none": None,
    }
    for combined in run(grads):
        assert_trees_close(combined, expected)


@pytest.mark.parametrize("form", ["stacked", "env_grads"])
def test_questions_about_trees_with_bad_arguments_are_refused(form):
    grads = FORMS[form](make_grads("array", 4))
    with pytest.raises(ValueError, match=r"weights must have shape \(4,\)"):
        hardvary.combine(grads, np.ones(3))
    with pytest.raises(ValueError, match=r"combine: weights must be an array \[env\]"):
        hardvary.combine({"w": grads}, {"b": np.ones(4)})
    with pytest.raises(TypeError, match="weights must be real"):
        hardvary.combine(grads, np.ones(4) * 1j)
    with pytest.raises(ValueError, match="threshold must lie in"):
        hardvary.mask(grads, 1.5)
    with pytest.raises(ValueError, match="threshold must lie in"):
        hardvary.kept_fractions(grads, np.nan)
    with pytest.raises(TypeError, match=r"belongs to an aggregator.* schedule"):
        hardvary.mask(grads, lambda count: 0.5)
    with pytest.raises(ValueError, match="threshold must be a number"):
        hardvary.mask({"w": grads}, {"b": 0.5})


@pytest.mark.parametrize("form", ["env_grads", "grad_stats"])
def test_weights_beside_a_form_that_is_weighted_are_refused(form):
    grads = FORMS[form](make_grads("array", 4))
    functions = [hardvary.agreement, hardvary.mask, hardvary.kept_fractions]
    if form == "env_grads":
        functions += [hardvary.gramian, hardvary.norms]
    for function in functions:
        with pytest.raises(ValueError, match="env_weights belong to stacked gradients"):
            function(grads, env_weights=np.ones(4))


def test_products_of_grad_stats_are_refused_with_the_way_to_have_them():
    grads = as_grad_stats(make_grads("array", 4))
    mend = "use value_and_env_grads, inside the same jit, or stacked gradients"
    for name, call in {
        "gramian": lambda: hardvary.gramian(grads),
        "norms": lambda: hardvary.norms(grads),
        "combine": lambda: hardvary.combine(grads, np.ones(4)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: a GradStats holds no .*{mend}"):
            call()


def test_forms_that_are_mixed_are_refused():
    grads = make_grads("array", 4)
    mixed = {"a": as_env_grads(grads), "b": grads}
    with pytest.raises(TypeError, match="gradients must come in one form, got"):
        hardvary.agreement(mixed)
    tx = hardvary.and_mask(0.5)
    with pytest.raises(TypeError, match=r"and_mask: .* one form, got .*EnvGrad"):
        tx.update({"a": as_grad_stats(grads), "b": as_env_grads(grads)}, tx.init(None))


def test_gradients_of_a_tree_without_leaves():
    for held in ({}, None, {"a": None}):
        assert hardvary.agreement(held) == held
        assert hardvary.mask(held) == held
        assert hardvary.kept_fractions(held) == held
        with pytest.raises(ValueError, match="a tree without leaves has no environ"):
            hardvary.gramian(held)
