"""hardvary.objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

import hardvary
from hardvary.objectives import irm_penalty, reverse_gradient, vrex_penalty
from tests._asserts import assert_trees_close, assert_trees_equal, field_of
from tests._compat import enable_x64
from tests._inputs import DTYPES, make_params
from tests.test_errors import raises
from tests.zoo.blocks import floats

CASES = ("binary", "multiclass")


def make_case(case, seed=0, envs=(), examples=6, classes=3):
    """Float64 logits and integer labels, with leading axes `envs`."""
    rng = np.random.default_rng(seed)
    batch = (*envs, examples)
    if case == "binary":
        return 2 * rng.normal(size=batch), rng.integers(0, 2, size=batch)
    logits = 2 * rng.normal(size=(*batch, classes))
    return logits, rng.integers(0, classes, size=batch)


def numpy_slope(logits, labels):
    """d/dw of the mean cross-entropy of w * logits at w = 1, example by example."""
    slopes = []
    for z, y in zip(logits, labels, strict=True):
        if np.ndim(z) == 0:
            probability = 1 / (1 + np.exp(-z))
            slopes.append(z * (probability - y))
        else:
            probabilities = np.exp(z) / np.exp(z).sum()
            slopes.append(sum(p * zc for p, zc in zip(probabilities, z, strict=True)))
            slopes[-1] -= z[y]
    return np.mean(slopes)


def mean_loss(logits, labels):
    if logits.shape == labels.shape:
        targets = labels.astype(logits.dtype)
        return optax.sigmoid_binary_cross_entropy(logits, targets).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# IRM.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_irm_penalty_equals_the_squared_slope_by_hand(case, seed):
    logits, labels = make_case(case, seed)
    actual = irm_penalty(jnp.asarray(logits, "float32"), labels)
    np.testing.assert_allclose(actual, numpy_slope(logits, labels) ** 2, rtol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_irm_penalty_equals_the_derivative_with_respect_to_a_multiplier(case):
    with enable_x64(True):
        logits, labels = (jnp.asarray(a) for a in make_case(case))
        slope = jax.grad(lambda w: mean_loss(w * logits, labels))(jnp.ones(()))
        np.testing.assert_allclose(
            irm_penalty(logits, labels), slope**2, rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("case", CASES)
def test_irm_penalty_of_logits_at_the_optimal_scale_is_zero(case):
    # Examples that contradict each other keep the optimal scale finite.
    with enable_x64(True):
        logits = {
            "binary": jnp.full(4, np.log(3.0)),
            "multiclass": jnp.broadcast_to(jnp.log(jnp.array([3.0, 1.0])), (4, 2)),
        }[case]
        labels = {"binary": [1, 1, 1, 0], "multiclass": [0, 0, 0, 1]}[case]
        labels = jnp.array(labels)
        np.testing.assert_allclose(irm_penalty(logits, labels), 0, atol=1e-30)
        for factor in (0.5, 2.0):
            assert irm_penalty(factor * logits, labels) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_irm_penalty_gradient_agrees_with_finite_differences(case):
    with enable_x64(True):
        logits, labels = (jnp.asarray(a) for a in make_case(case))
        check_grads(lambda z: irm_penalty(z, labels), (logits,), order=1, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_irm_penalty_vmap_over_environments_equals_a_loop(case):
    logits, labels = make_case(case, envs=(4,))
    logits = jnp.asarray(logits, "float32")
    actual = jax.jit(jax.vmap(irm_penalty))(logits, labels)
    expected = [irm_penalty(z, y) for z, y in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(actual, np.stack(expected), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_irm_penalty_further_example_axes_count_as_examples(case):
    logits, labels = make_case(case, envs=(2, 5))
    logits = jnp.asarray(logits, "float32")
    rows = logits.reshape(-1, *logits.shape[3:])
    np.testing.assert_allclose(
        irm_penalty(logits, labels), irm_penalty(rows, labels.reshape(-1)), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", *DTYPES])
def test_irm_penalty_binary_labels_of_any_real_dtype_are_the_same(dtype):
    logits, labels = make_case("binary")
    logits = jnp.asarray(logits, "float32")
    with enable_x64(dtype == "float64"):
        assert_trees_equal(
            irm_penalty(logits, labels.astype(dtype)), irm_penalty(logits, labels)
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_irm_penalty_has_the_dtype_of_the_logits_and_wide_sums(dtype, case):
    logits, labels = make_case(case, examples=5000)
    with enable_x64(dtype == "float64"):
        logits = jnp.asarray(logits, dtype)
        penalty = jax.jit(irm_penalty)(logits, labels)
        assert penalty.dtype == dtype
        assert penalty.shape == ()
        expected = numpy_slope(np.asarray(logits, np.float64), labels) ** 2
        rtol = max(2 * float(jnp.finfo(dtype).eps), 1e-5)
        np.testing.assert_allclose(float(penalty), expected, rtol=rtol)


@pytest.mark.parametrize("label", [-1, 3])
def test_irm_penalty_class_outside_the_range_is_nan(label):
    assert np.isnan(irm_penalty(jnp.ones((2, 3)), jnp.array([0, label])))


@pytest.mark.parametrize("case", CASES)
def test_irm_penalty_of_huge_logits_is_finite(case):
    logits, labels = make_case(case)
    logits = jnp.asarray(1e4 * logits, "float32")
    value, gradient = jax.value_and_grad(irm_penalty)(logits, labels)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("method", ["fused", "scan", "vmap"])
def test_irm_penalty_in_the_loss_of_an_oracle_gives_its_gradient(method):
    logits, labels = make_case("binary", envs=(4,))
    batch = jnp.asarray(np.stack([logits, logits**2], axis=-1), "float32"), labels

    def loss_fn(params, env):
        x, y = env
        z = x @ params
        return mean_loss(z, y) + 10 * irm_penalty(z, y)

    params = jnp.array([0.5, -0.25])
    stats = hardvary.grad_stats(loss_fn, method=method)(params, batch)
    expected = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch).mean(axis=0)
    assert_trees_close(stats.mean, expected)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ((4,), (3,)),
        ((4, 3), (3,)),
        ((4, 3), (4, 1)),
        ((4,), ()),
        ((), (1,)),
    ],
)
def test_irm_penalty_labels_of_another_shape_raise(logits, labels):
    # Of a vector of logits, a scalar label is that of one example: floats are none.
    arrays = jnp.ones(logits), jnp.ones(labels)
    for run in (irm_penalty, jax.jit(irm_penalty)):
        with raises(
            ValueError, "labels", "shape of the logits", "integers", labels, logits
        ):
            run(*arrays)


def test_irm_penalty_class_labels_that_are_no_integers_raise():
    with raises(ValueError, "labels", "integers", "float32", "(4, 3)"):
        irm_penalty(jnp.ones((4, 3)), jnp.ones(4))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_irm_penalty_logits_that_are_not_real_floating_raise(dtype):
    with raises(TypeError, "irm_penalty", "logits", "floating", dtype):
        irm_penalty(jnp.ones(4, dtype), jnp.ones(4))


def test_irm_penalty_complex_labels_raise():
    with raises(TypeError, "labels", "real", "complex64"):
        irm_penalty(jnp.ones(4), jnp.ones(4, "complex64"))


@pytest.mark.parametrize(("logits", "labels"), [((0,), (0,)), ((0, 3), (0,))])
def test_irm_penalty_of_no_examples_raises(logits, labels):
    with raises(ValueError, "logits", "at least one example", logits):
        irm_penalty(jnp.ones(logits), jnp.ones(labels, "int32"))


# V-REx.


@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 8),
        elements=st.integers(-64, 64).map(lambda quarters: quarters / 4),
    )
)
def test_vrex_penalty_equals_numpys_variance(losses):
    expected = np.var(losses.astype(np.float64))
    np.testing.assert_allclose(vrex_penalty(losses), expected, rtol=1e-5, atol=1e-6)


def test_vrex_penalty_gradient_is_twice_the_centred_loss_over_environments():
    losses = jnp.array([1.0, 2.0, 6.0])
    gradient = jax.jit(jax.grad(vrex_penalty))(losses)
    np.testing.assert_allclose(gradient, 2 / 3 * np.array([-2, -1, 3]), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vrex_penalty_has_the_dtype_of_the_losses_and_wide_sums(dtype):
    # In bfloat16 a sum of the losses would be off by more than their deviations.
    with enable_x64(dtype == "float64"):
        losses = jnp.asarray(64 + np.arange(100) % 2 / 2, dtype)
        penalty = vrex_penalty(losses)
        assert penalty.dtype == dtype
        assert penalty == 0.0625


@pytest.mark.parametrize("shape", [(), (0,), (3, 1)])
def test_vrex_penalty_losses_of_another_shape_raise(shape):
    with raises(ValueError, "losses", "[env]", shape):
        vrex_penalty(jnp.ones(shape))


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_vrex_penalty_losses_that_are_not_real_floating_raise(dtype):
    with raises(TypeError, "vrex_penalty", "losses", "floating", dtype):
        vrex_penalty(jnp.ones(3, dtype))


# Gradient reversal.


def smooth(x):
    """A scalar function of a tree with derivatives of every order."""
    return sum(jnp.sum(jnp.sin(leaf) * leaf) for leaf in jax.tree.leaves(x))


finite = st.floats(-8, 8, width=32, allow_subnormal=False)


@given(
    hnp.arrays(np.float32, (2, 3), elements=finite),
    st.floats(0, 8, width=32, allow_subnormal=False),
)
def test_reverse_gradient_is_minus_scale_times_the_gradient(x, scale):
    tree = {"a": jnp.asarray(x), "b": [jnp.asarray(x[0])]}
    value, reversed_ = jax.value_and_grad(
        lambda tree: smooth(reverse_gradient(tree, scale))
    )(tree)
    expected, plain = jax.value_and_grad(smooth)(tree)
    assert value == expected
    assert_trees_equal(reversed_, jax.tree.map(lambda g: -np.float32(scale) * g, plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2, np.float32(0.5)], ids=repr)
def test_reverse_gradient_keeps_values_and_dtypes(dtype, scale):
    with enable_x64(dtype == "float64"):
        params = make_params("nested", dtype)
        params["special"] = jnp.array([jnp.inf, -jnp.inf, -0.0], dtype)
        same = jax.jit(reverse_gradient)(params, scale)
        assert_trees_equal(same, params)
        assert np.signbit(np.asarray(same["special"], np.float32)[2])
        pulled = jax.vjp(lambda x: reverse_gradient(x, scale), params)[1](params)[0]
        assert_trees_equal(
            pulled, jax.tree.map(lambda p: jnp.asarray(-scale, dtype) * p, params)
        )


@pytest.mark.parametrize("name", ["scalar", "zero_size", "no_leaves"])
def test_reverse_gradient_of_any_tree_keeps_its_structure(name):
    params = make_params(name)
    assert_trees_equal(reverse_gradient(params), params)


def test_reverse_gradient_twice_multiplies_the_scales():
    x = jnp.arange(1.0, 4.0)
    twice = jax.grad(lambda x: smooth(reverse_gradient(reverse_gradient(x, 2), 3)))
    np.testing.assert_allclose(twice(x), 6 * jax.grad(smooth)(x), rtol=1e-6)


def test_reverse_gradient_second_derivative_reverses_twice():
    x = jnp.float32(0.7)
    second = jax.grad(jax.grad(lambda x: smooth(reverse_gradient(x, 3.0))))
    expected = 9 * jax.grad(jax.grad(smooth))(x)
    np.testing.assert_allclose(second(x), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(second)(x), expected, rtol=1e-6)


def test_reverse_gradient_hessians_of_both_modes_agree():
    x = jnp.arange(1.0, 4.0)

    def f(x):
        return smooth(reverse_gradient(x, 0.5)) * smooth(x)

    expected = jax.jacrev(jax.grad(f))(x)
    np.testing.assert_allclose(jax.hessian(f)(x), expected, rtol=1e-5, atol=1e-6)


def test_reverse_gradient_forward_mode_agrees_with_backward_mode():
    x, direction = jnp.arange(1.0, 4.0), jnp.array([1.0, -2.0, 0.5])

    def f(x):
        return smooth(reverse_gradient(x, 0.5))

    tangent = jax.jvp(f, (x,), (direction,))[1]
    np.testing.assert_allclose(tangent, jax.grad(f)(x) @ direction, rtol=1e-6)


def test_reverse_gradient_gives_its_scale_no_gradient():
    x = jnp.arange(1.0, 4.0)
    gradients = jax.jit(
        jax.grad(lambda x, s: smooth(reverse_gradient(x, s)), argnums=(0, 1))
    )(x, jnp.float32(2.0))
    np.testing.assert_allclose(gradients[0], -2 * jax.grad(smooth)(x), rtol=1e-6)
    assert gradients[1] == 0


def test_reverse_gradient_vmap_takes_a_scale_for_each_example():
    x, scales = jnp.arange(6.0).reshape(2, 3), jnp.array([0.5, 2.0])
    gradient = jax.vmap(jax.grad(lambda x, s: smooth(reverse_gradient(x, s))))
    expected = -scales[:, None] * jax.vmap(jax.grad(smooth))(x)
    np.testing.assert_allclose(gradient(x, scales), expected, rtol=1e-6)


def test_reverse_gradient_descent_trains_two_parts_against_each_other():
    def loss(features, critic):
        return jnp.sum(jnp.square(reverse_gradient(features) - critic))

    features, critic = jnp.ones(2), jnp.zeros(2)
    towards, against = jax.grad(loss, argnums=(1, 0))(features, critic)
    plain = jax.grad(lambda c: jnp.sum(jnp.square(features - c)))(critic)
    np.testing.assert_array_equal(towards, plain)
    np.testing.assert_array_equal(against, plain)


@pytest.mark.parametrize("method", ["fused", "scan", "vmap"])
def test_reverse_gradient_in_the_loss_of_an_oracle_reverses(method):
    def loss_fn(params, x):
        features = jnp.tanh(x @ params["features"])
        return jnp.mean(reverse_gradient(features, 0.5) @ params["critic"])

    params = {"features": jnp.eye(3, 2), "critic": jnp.array([1.0, -2.0])}
    x = floats(np.random.default_rng(0).normal(size=(4, 5, 3)))
    stats = hardvary.grad_stats(loss_fn, method=method)(params, x)
    stacked = jax.vmap(jax.grad(loss_fn), (None, 0))(params, x)
    assert_trees_close(
        field_of(stats, "mean"), jax.tree.map(lambda g: g.mean(axis=0), stacked)
    )
    signs = jax.tree.map(lambda g: jnp.sign(g).sum(axis=0), stacked)
    assert_trees_equal(field_of(stats, "sign_sum"), signs)


@pytest.mark.parametrize("scale", [-1.0, -1, np.nan, np.inf, jnp.float32(-2)], ids=repr)
def test_reverse_gradient_scale_negative_or_not_finite_raises(scale):
    with raises(ValueError, "scale", "finite and >= 0", "got", float(scale)):
        reverse_gradient(jnp.ones(2), scale)


@pytest.mark.parametrize("scale", ["1", None, True, 1j, np.ones(2)], ids=repr)
def test_reverse_gradient_scale_that_is_no_real_scalar_raises(scale):
    with raises(TypeError, "scale", "real scalar", "finite and >= 0", "got"):
        reverse_gradient(jnp.ones(2), scale)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_reverse_gradient_leaves_that_are_not_real_floating_raise(dtype):
    tree = {"a": jnp.ones(2), "b": jnp.ones(2, dtype)}
    with raises(TypeError, "reverse_gradient", "floating", "['b']", dtype):
        reverse_gradient(tree)


@pytest.mark.parametrize(("dtype", "classes"), [(jnp.uint8, 256), (jnp.int8, 300)])
def test_irm_penalty_more_classes_than_the_labels_dtype_counts_is_exact(dtype, classes):
    logits, labels = make_case("multiclass", classes=classes)
    labels = labels % 100
    wide = irm_penalty(jnp.asarray(logits), jnp.asarray(labels, jnp.int32))
    narrow = irm_penalty(jnp.asarray(logits), jnp.asarray(labels, dtype))
    assert jnp.isfinite(narrow)
    assert narrow == wide


# Penalties on gradients.


def stats_of(method, per_example):
    """Statistics over environments, or over the examples of each environment."""

    def loss(params, example):
        x, y = example
        hidden = jnp.tanh(x @ params["w"] + params["b"])
        return jnp.square(hidden @ params["out"] - y)

    def mean_loss(params, batch):
        return jnp.mean(jax.vmap(loss, (None, 0))(params, batch))

    oracle = hardvary.grad_stats(
        loss if per_example else mean_loss, stats=("mean", "square"), method=method
    )
    stacked = jax.vmap(jax.grad(mean_loss), (None, 0))
    if per_example:
        oracle = jax.vmap(oracle, (None, 0))
        stacked = jax.vmap(jax.vmap(jax.grad(loss), (None, 0)), (None, 0))
    return oracle, stacked


@pytest.mark.parametrize("method", ["fused", "vmap"])
@pytest.mark.parametrize("name", ["iga_penalty", "fishr_penalty"])
def test_penalties_on_gradients_and_their_slopes_equal_the_definition(name, method):
    oracle, stacked = stats_of(method, per_example=name == "fishr_penalty")
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4), "b": (4,), "out": (4,)}
    params = {k: floats(rng.normal(size=s)) for k, s in shapes.items()}
    batch = (
        floats(rng.normal(size=(5, 6, 3))),
        floats(rng.normal(size=(5, 6))),
    )

    def by_definition(params):
        total = 0.0
        for grad in jax.tree.leaves(stacked(params, batch)):
            values = jnp.var(grad, axis=1) if name == "fishr_penalty" else grad
            total += jnp.sum(jnp.var(values, axis=0))
        return total

    def penalty(params):
        return getattr(hardvary.objectives, name)(oracle(params, batch))

    value, slope = jax.jit(jax.value_and_grad(penalty))(params)
    expected, expected_slope = jax.jit(jax.value_and_grad(by_definition))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert_trees_close(slope, expected_slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["iga_penalty", "fishr_penalty"])
def test_penalties_on_gradients_say_what_they_need(name):
    penalty = getattr(hardvary.objectives, name)
    with pytest.raises(TypeError, match=f"{name} takes a tree of GradStats"):
        penalty({"w": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match=f"{name} needs the mean and the square"):
        penalty({"w": hardvary.GradStats(mean=jnp.ones(2), num_envs=jnp.ones(()))})
    with pytest.raises(ValueError, match="without leaves"):
        penalty({})
    # As over environments, and as over the examples of each.
    other = () if name == "fishr_penalty" else (3,)
    stats = hardvary.GradStats(
        mean=jnp.ones((3, 2)), square_mean=jnp.ones((3, 2)), num_envs=jnp.ones(other)
    )
    with pytest.raises(ValueError, match=f"{name} takes statistics over"):
        penalty(stats)
