"""The temporal AND-mask against Algorithm 1 written as a NumPy loop."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import hardvary
from tests._asserts import assert_like_params, assert_trees_close, assert_trees_equal
from tests._compat import enable_x64
from tests._inputs import make_params
from tests.zoo.blocks import floats

STEPS = 100

# Bias correction in optax raises a float to an integer power.
adam = pytest.mark.usefixtures("standard_promotion")


@dataclasses.dataclass(frozen=True)
class Setting:
    b1: float = 0.9
    b2: float = 0.999
    b3: float = 0.9
    threshold: float = 0.4
    bias_correction: bool = True
    weight_decay: float = 0.0
    eps: float = 1e-8
    eps_root: float = 0.0
    nesterov: bool = False


SETTINGS = {
    "defaults": Setting(),
    "defaults_to_the_letter": Setting(bias_correction=False),
    "decay": Setting(weight_decay=0.1),
    "decay_to_the_letter": Setting(weight_decay=0.1, bias_correction=False),
    "short_memory": Setting(b1=0.5, b2=0.9, b3=0.5, threshold=0.5),
    "no_memory": Setting(b1=0.0, b2=0.0, b3=0.0, threshold=1.0, weight_decay=0.01),
    "long_memory": Setting(b1=0.8, b2=0.99, b3=0.99, threshold=0.1),
    "strict": Setting(b3=0.7, threshold=0.8, bias_correction=False),
    "open": Setting(threshold=0.0, weight_decay=0.1, eps=1e-3),
    "nesterov": Setting(nesterov=True, eps_root=1e-2),
    "nesterov_to_the_letter": Setting(nesterov=True, bias_correction=False),
}


def gradient_series(seed=0, size=12):
    """Gradients whose signs agree over time to a degree that differs by component."""
    rng = np.random.default_rng(seed)
    drift = np.linspace(-2, 2, size)
    grads = drift + rng.normal(size=(STEPS, size))
    grads[rng.random(grads.shape) < 0.05] = 0.0
    return grads


def algorithm_1(theta, grads, learning_rate, setting):
    """The listing, with weight decay as a second update independent of the mask."""
    m, v, a = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta)
    path, opened = [], []
    for step, g in enumerate(grads, start=1):
        m = setting.b1 * m + (1 - setting.b1) * g
        v = setting.b2 * v + (1 - setting.b2) * g**2
        a = setting.b3 * a + (1 - setting.b3) * np.sign(g)
        threshold = setting.threshold
        b = np.abs(a) >= (threshold(step - 1) if callable(threshold) else threshold)
        m_hat, v_hat, ahead, now = m, v, m, g
        if setting.bias_correction:
            m_hat, v_hat = m / (1 - setting.b1**step), v / (1 - setting.b2**step)
            ahead, now = m / (1 - setting.b1 ** (step + 1)), g / (1 - setting.b1**step)
        if setting.nesterov:
            m_hat = setting.b1 * ahead + (1 - setting.b1) * now
        root = np.sqrt(v_hat + setting.eps_root)
        alpha = learning_rate(step - 1)
        decay = alpha * setting.weight_decay * theta
        theta = theta - alpha * m_hat * b / (root + setting.eps) - decay
        path.append(theta)
        opened.append(b)
    return np.array(path), np.array(opened)


def train(tx, params, grads):
    """Parameters and update after every step, in one compiled scan."""

    @jax.jit
    def run(params, grads):
        def step(carry, grad):
            params, state = carry
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, updates)

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return run(params, grads)


@adam
@pytest.mark.parametrize("name", SETTINGS)
def test_temporal_and_mask_adam_over_100_steps_matches_algorithm_1(name):
    setting = SETTINGS[name]
    grads = gradient_series()
    theta = np.linspace(-1, 1, 12)
    expected, opened = algorithm_1(theta, grads, lambda _: 0.01, setting)
    # The setting tells a mask from none, unless it is open by design.
    assert opened.all() == (setting.threshold == 0)
    assert opened.any()

    # float64: the average must not fall on the other side of the threshold.
    with enable_x64(True):
        tx = hardvary.temporal_and_mask_adam(0.01, **dataclasses.asdict(setting))
        actual, _ = train(tx, jnp.asarray(theta), jnp.asarray(grads))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@adam
def test_temporal_and_mask_adam_with_a_schedule_matches_algorithm_1():
    grads = gradient_series(seed=1)
    theta = np.linspace(-1, 1, 12)
    setting = Setting(weight_decay=0.1)
    expected, _ = algorithm_1(theta, grads, lambda step: 0.1 / (1 + step), setting)
    with enable_x64(True):
        tx = hardvary.temporal_and_mask_adam(
            lambda count: 0.1 / (1 + count.astype(jnp.float64)), weight_decay=0.1
        )
        actual, _ = train(tx, jnp.asarray(theta), jnp.asarray(grads))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@adam
def test_temporal_and_mask_adam_in_float32_follows_float64():
    grads = gradient_series(seed=2)
    theta = np.linspace(-1, 1, 12)
    expected, _ = algorithm_1(theta, grads, lambda _: 0.01, Setting())
    actual, _ = train(
        hardvary.temporal_and_mask_adam(0.01),
        jnp.asarray(theta, jnp.float32),
        jnp.asarray(grads, jnp.float32),
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def falling(count):
    return 0.1 / (1 + count)


MATRICES = {
    "dense": {"kernel": True, "bias": False},
    "scale": False,
    "none": None,
}
ADAMW_OPTIONS = {
    "none": {},
    "decay": {"weight_decay": 0.1},
    "scheduled_decay": {"weight_decay": falling},
    "mask_prefix": {"weight_decay": 0.1, "mask": MATRICES | {"dense": True}},
    "mask_callable": {"weight_decay": 0.1, "mask": lambda params: MATRICES},
    "mask_without_decay": {"weight_decay": 0.0, "mask": MATRICES},
    "nesterov": {"nesterov": True},
    "eps": {"eps": 1e-2, "eps_root": 1e-3},
    "mu_dtype": {"mu_dtype": jnp.bfloat16},
    "all": {
        "learning_rate": falling,
        "b1": 0.5,
        "b2": 0.75,
        "eps": 1e-2,
        "eps_root": 1e-3,
        "mu_dtype": "float16",
        "weight_decay": 0.1,
        "mask": MATRICES,
        "nesterov": True,
    },
}


@adam
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ADAMW_OPTIONS)
def test_temporal_and_mask_adam_threshold_zero_is_adamw_to_the_bit(name, dtype):
    options = {"learning_rate": 0.01, "weight_decay": 0.0} | ADAMW_OPTIONS[name]
    masked = hardvary.temporal_and_mask_adam(threshold=0.0, **options)
    with enable_x64(dtype == "float64"):
        (state, *rest), (plain, *others) = assert_same_updates(
            masked, optax.adamw(**options), jit=True, dtype=dtype
        )
    assert_trees_equal(
        (state.count, state.mu, state.nu), (plain.count, plain.mu, plain.nu)
    )
    assert float(state.kept_fraction) == 1
    assert_trees_equal(rest, others)


@adam
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["none", "all"])
def test_temporal_and_mask_adam_without_jit_is_adamw_to_the_bit(name):
    options = {"learning_rate": 0.01, "weight_decay": 0.0} | ADAMW_OPTIONS[name]
    masked = hardvary.temporal_and_mask_adam(threshold=0.0, **options)
    assert_same_updates(masked, optax.adamw(**options), jit=False)


@adam
def test_scale_by_temporal_and_mask_adam_is_the_mask_around_scale_by_adam():
    options = {"b1": 0.5, "b2": 0.75, "eps": 1e-3, "eps_root": 1e-3, "nesterov": True}
    whole = hardvary.scale_by_temporal_and_mask_adam(b3=0.5, threshold=0.6, **options)
    parts = hardvary.temporal_and_mask(
        optax.scale_by_adam(**options), threshold=0.6, decay=0.5
    )
    state, other = assert_same_updates(whole, parts, jit=True)
    assert 0 < float(state.kept_fraction) < 1
    assert_trees_equal(state.kept_fraction, other.kept_fraction)
    assert_trees_equal(state.sign_ema, other.sign_ema)


@adam
@pytest.mark.optimized
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_temporal_and_mask_adam_behind_coupled_decay_is_adam_to_the_bit(jit):
    decay = optax.add_decayed_weights(0.1)
    masked = optax.chain(decay, hardvary.temporal_and_mask_adam(0.01, threshold=0.0))
    plain = optax.chain(decay, optax.adam(0.01))
    assert_same_updates(masked, plain, jit)


def assert_same_updates(left, right, jit, dtype="float32"):
    params = make_params("nested", dtype)
    states = [left.init(params), right.init(params)]
    steps = [jax.jit(tx.update) if jit else tx.update for tx in (left, right)]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(
            lambda leaf: floats(rng.normal(size=leaf.shape), leaf.dtype),  # noqa: B023
            params,
        )
        updates, states = zip(
            *(
                step(grads, state, params)
                for step, state in zip(steps, states, strict=True)
            ),
            strict=True,
        )
        assert_trees_equal(*updates)
    return states


@pytest.mark.parametrize(
    "inner",
    [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9), optax.scale_by_rms()],
    ids=["sgd", "momentum", "rms"],
)
def test_temporal_and_mask_around_any_optimizer_gates_its_raw_updates(inner):
    grads = jnp.asarray(gradient_series(), jnp.float32)
    params = jnp.linspace(-1, 1, 12, dtype=jnp.float32)
    tx = hardvary.temporal_and_mask(inner, threshold=0.5, decay=0.75)
    # The inner one sees what it would see alone: raw gradients.
    _, raw = train(inner, params, grads)
    _, masked = train(tx, params, grads)

    average, gates = np.zeros(12), []
    for grad in np.asarray(grads):
        average = 0.75 * average + 0.25 * np.sign(grad)
        gates.append(np.abs(average) >= 0.5)
    gates = np.array(gates)
    assert 0 < gates.mean() < 1
    np.testing.assert_allclose(masked, np.where(gates, raw, 0), rtol=1e-6)


def test_temporal_and_mask_average_is_not_bias_corrected():
    tx = hardvary.temporal_and_mask(optax.sgd(1.0), threshold=0.4, decay=0.9)
    params = jnp.zeros(1)
    state = tx.init(params)
    passed = []
    for _ in range(6):
        updates, state = tx.update(jnp.ones(1), state, params)
        passed.append(float(updates[0]) != 0)
    # 1 - 0.9**4 = 0.34 and 1 - 0.9**5 = 0.41: corrected, it would open at once.
    assert passed == [False, False, False, False, True, True]
    np.testing.assert_allclose(state.sign_ema, [1 - 0.9**6], rtol=1e-6)


def test_temporal_and_mask_zero_gradients_close_the_mask_again():
    tx = hardvary.temporal_and_mask(optax.sgd(1.0), threshold=0.5, decay=0.5)
    params = jnp.zeros(1)
    state = tx.init(params)
    averages = []
    for grad in (1.0, 1.0, 0.0, 0.0):
        _, state = tx.update(jnp.full(1, grad), state, params)
        averages.append(float(state.sign_ema[0]))
    assert averages == [0.5, 0.75, 0.375, 0.1875]


@pytest.mark.parametrize("decay", [0.5, 0.75, 0.8, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_temporal_and_mask_at_exactly_the_threshold_passes(steps, decay):
    # What the docstring promises: open as soon as 1 - decay**steps >= threshold.
    tx = hardvary.temporal_and_mask(
        optax.sgd(1.0), threshold=1 - decay**steps, decay=decay
    )
    state = tx.init(jnp.zeros(1))
    for _ in range(steps):
        updates, state = tx.update(jnp.ones(1), state)
    assert float(updates[0]) == -1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_temporal_and_mask_on_non_finite_gradients_returns_nan_there_only(
    threshold, value
):
    tx = hardvary.temporal_and_mask(optax.sgd(1.0), threshold=threshold, decay=0.4)
    params = jnp.zeros(3)
    updates, state = tx.update(jnp.array([1.0, value, -1.0]), tx.init(params), params)
    np.testing.assert_array_equal(updates, [-1, np.nan, 1])
    updates, _ = tx.update(jnp.array([1.0, 1.0, -1.0]), state, params)
    np.testing.assert_array_equal(updates, [-1, np.nan, 1])


@adam
def test_temporal_and_mask_adam_in_apply_if_finite_survives_nan():
    tx = optax.apply_if_finite(hardvary.temporal_and_mask_adam(0.1, b3=0.5), 5)
    params = jnp.ones(2)
    state = tx.init(params)
    updates, state = tx.update(jnp.array([np.nan, 1.0]), state, params)
    np.testing.assert_array_equal(updates, [0, 0])
    updates, _ = tx.update(jnp.array([1.0, 1.0]), state, params)
    np.testing.assert_allclose(updates, [-0.1, -0.1], rtol=1e-4)


def test_temporal_and_mask_passes_extra_arguments_to_the_inner_one():
    def update_fn(updates, state, params=None, *, factor, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: u * factor, updates), state

    inner = optax.GradientTransformationExtraArgs(
        lambda _: optax.EmptyState(), update_fn
    )
    tx = hardvary.temporal_and_mask(inner, threshold=0.0, decay=0.5)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), factor=3.0, other=1)
    np.testing.assert_array_equal(updates, [3, 3])


@adam
def test_temporal_and_mask_adam_without_decay_needs_no_params():
    tx = hardvary.temporal_and_mask_adam(0.1, threshold=0.0)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, [-0.1, -0.1], rtol=1e-5)


def test_temporal_and_mask_bfloat16_average_does_not_stall():
    # In bfloat16 the average would stop at 1 - decay / 256 of the way.
    tx = hardvary.temporal_and_mask(optax.sgd(1.0), threshold=0.99, decay=0.99)
    grads = jnp.ones((700, 1), jnp.bfloat16)
    _, updates = train(tx, jnp.zeros(1, jnp.bfloat16), grads)
    assert float(updates[-1, 0]) == -1
    assert updates.dtype == jnp.bfloat16


MAKERS = {
    "temporal_and_mask": lambda threshold, decay: hardvary.temporal_and_mask(
        optax.sgd(1.0), threshold=threshold, decay=decay
    ),
    "scale_by_temporal_and_mask_adam": lambda threshold, decay: (
        hardvary.scale_by_temporal_and_mask_adam(threshold=threshold, b3=decay)
    ),
    "temporal_and_mask_adam": lambda threshold, decay: hardvary.temporal_and_mask_adam(
        1.0, threshold=threshold, b3=decay
    ),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@adam
@every_maker
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kept_fraction_is_the_share_that_passed(make, dtype):
    rng = np.random.default_rng(0)
    tx = make(0.75, 0.5)
    params = {"a": jnp.ones(50, dtype), "b": [jnp.ones((30, 5), dtype)]}
    state = tx.init(params)
    assert float(optax.tree.get(state, "kept_fraction")) == 0
    # 0.75 is what two agreeing steps come to: exactly on the threshold.
    for _ in range(2):
        grads = jax.tree.map(
            lambda leaf: floats(rng.normal(size=leaf.shape), leaf.dtype), params
        )
        updates, state = tx.update(grads, state)
    passed = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(updates))
    assert 0 < passed < 200
    # Raises where the name is there twice.
    kept = optax.tree.get(state, "kept_fraction")
    assert kept.dtype == jnp.float32
    assert kept.shape == ()
    np.testing.assert_allclose(kept, passed / 200)


@adam
@every_maker
def test_kept_fraction_of_a_tree_without_leaves_is_zero(make):
    tx = make(0.0, 0.5)
    _, state = tx.update({}, tx.init({}), {})
    assert float(optax.tree.get(state, "kept_fraction")) == 0


@adam
@pytest.mark.parametrize(
    "tx",
    [
        hardvary.temporal_and_mask(optax.scale_by_adam(), threshold=falling, decay=0.9),
        hardvary.scale_by_temporal_and_mask_adam(threshold=falling),
        hardvary.temporal_and_mask_adam(0.1, threshold=falling, weight_decay=0.1),
    ],
    ids=MAKERS,
)
def test_count_under_a_scheduled_threshold_is_adams_alone(tx):
    params = jnp.ones(2)
    _, state = tx.update(params, tx.init(params), params)
    assert int(optax.tree.get(state, "count")) == 1


# Thresholds that differ from step to step and from leaf to leaf.


@adam
def test_scheduled_threshold_matches_algorithm_1():
    grads = gradient_series(seed=3)
    theta = np.linspace(-1, 1, 12)
    setting = Setting(threshold=lambda step: np.minimum(step / 50, 0.8), b3=0.75)
    expected, opened = algorithm_1(theta, grads, lambda _: 0.01, setting)
    with enable_x64(True):
        tx = hardvary.temporal_and_mask_adam(
            0.01,
            b3=0.75,
            threshold=lambda count: jnp.minimum(count.astype(jnp.float64) / 50, 0.8),
        )
        actual, _ = train(tx, jnp.asarray(theta), jnp.asarray(grads))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
    # It begins open, and ends as strict as the schedule does.
    assert opened[0].all()
    assert opened[40:].mean() < 0.8


def unrolled(tx, params, series):
    state, result = tx.init(params), []
    for grads in series:
        updates, state = tx.update(grads, state, params)
        result.append(updates)
    return result


@adam
@every_maker
def test_threshold_prefix_is_each_leafs_own(make):
    rising = optax.linear_schedule(0.0, 1.0, 4)
    parts = {"dense": rising, "scale": 0.25}

    @jax.jit
    def run(params):
        series = [params, jax.tree.map(jnp.negative, params), params]
        together = unrolled(make({**parts, "none": None}, 0.5), params, series)
        apart = {
            name: unrolled(
                make(threshold, 0.5), params[name], [grads[name] for grads in series]
            )
            for name, threshold in parts.items()
        }
        return together, apart

    together, apart = run(make_params("nested"))
    for name, updates in apart.items():
        assert_trees_close([updates[name] for updates in together], updates)
    # Averages 0.5, -0.25, 0.375 under thresholds 0, 0.25, 0.5.
    opened = [bool((updates["dense"]["bias"] != 0).all()) for updates in together]
    assert opened == [True, True, False]
    assert bool(together[2]["scale"] != 0)


@adam
@every_maker
def test_threshold_that_is_no_prefix_raises(make):
    params = make_params("nested")
    tx = make({"dense": {"kernel": 0.5}, "scale": 0.5, "none": None}, 0.5)
    with pytest.raises(
        ValueError, match=r"threshold .*nothing at \['dense'\]\['bias'\]"
    ):
        tx.update(params, tx.init(params), params)


@adam
@every_maker
def test_threshold_traced_and_scheduled_compiles_once(make):
    params = make_params("nested")
    traces = []

    @jax.jit
    def step(grads, state, level):
        traces.append(1)
        tx = make({"dense": level, "scale": falling, "none": None}, 0.5)
        return tx.update(grads, state, params)

    state = make(0.0, 0.5).init(params)
    kept = []
    for level in (0.25, 0.75, 0.875):
        _, state = step(params, state, jnp.float32(level))
        kept.append(float(optax.tree.get(state, "kept_fraction")))
    assert len(traces) == 1
    # Averages 0.5, 0.75, 0.875: unanimous, and exactly on the threshold.
    assert kept == [1.0, 1.0, 1.0]


# Half precision.

# Steady: the largest and the smallest that float16 holds, and nothing.
STEADY = np.array([6e4, 1e-1, -1e-3, 6e-8, 0.0])
HALF_OPTIONS = {
    "defaults": {},
    "open": {"threshold": 0.0},
    "to_the_letter": {"bias_correction": False, "threshold": 0.0},
    "nesterov": {"nesterov": True, "threshold": 0.0, "weight_decay": 0.1},
    "nesterov_to_the_letter": {"nesterov": True, "bias_correction": False},
    "scheduled": {"learning_rate": falling, "threshold": falling},
    "eps_root": {"eps": 1e-12, "eps_root": 1e-16},
}


def half_and_full(tx, dtype, value=1.0):
    """Updates from ten steady gradients in half precision, and in float32."""
    grads = jnp.asarray(np.tile(STEADY, (10, 1)), dtype)
    params = jnp.full(5, value, dtype)

    @jax.jit
    def updates(params, grads):
        def step(state, grad):
            update, state = tx.update(grad, state, params)
            return state, update

        return jax.lax.scan(step, tx.init(params), grads)[1]

    wide = jnp.float32
    return updates(params, grads), updates(params.astype(wide), grads.astype(wide))


def assert_one_rounding(half, full):
    """Finite, and at most half a unit in the last place away."""
    assert bool(jnp.isfinite(half).all())
    info = jnp.finfo(half.dtype)
    assert_trees_close(
        half,
        full,
        rtol=0.501 * float(info.eps),
        atol=0.501 * float(info.smallest_subnormal),
    )


@adam
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", HALF_OPTIONS)
def test_temporal_and_mask_adam_in_half_precision_follows_float32(name, dtype):
    options = {"learning_rate": 1e-2, **HALF_OPTIONS[name]}
    half, full = half_and_full(hardvary.temporal_and_mask_adam(**options), dtype)
    assert_one_rounding(half, full)
    if name == "defaults":
        # About one learning rate in the direction of the sign; eps damps the smallest.
        np.testing.assert_allclose(
            np.asarray(half[-1], np.float64) / -1e-2,
            [1, 1, -1, 6e-8 / 7e-8, 0],
            rtol=0.02,
        )


@adam
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "to_the_letter"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scale_by_temporal_and_mask_adam_in_half_precision_follows_float32(
    dtype, correct
):
    tx = hardvary.scale_by_temporal_and_mask_adam(bias_correction=correct)
    half, full = half_and_full(tx, dtype)
    assert half.dtype == dtype
    assert_one_rounding(half, full)


@adam
def test_temporal_and_mask_adam_small_decay_in_float16_is_not_lost():
    # 1e-8 is 0 in float16, and what it makes of 1000 is not.
    tx = hardvary.temporal_and_mask_adam(1.0, weight_decay=1e-8)
    half, full = half_and_full(tx, "float16", value=1000.0)
    assert_one_rounding(half, full)
    assert float(half[-1, -1]) == float(jnp.float16(-1e-5))


@adam
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_state_in_half_precision_is_float32_unless_asked(dtype):
    params = make_params("nested", dtype)
    wide = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)
    for mu_dtype in (None, dtype):
        tx = hardvary.scale_by_temporal_and_mask_adam(mu_dtype=mu_dtype)
        state = tx.init(params)
        _, after = jax.jit(tx.update)(params, state, params)
        assert_like_params(after, state)
        assert_like_params(state.nu, wide)
        assert_like_params(state.sign_ema, wide)
        assert_like_params(state.mu, params if mu_dtype else wide)


@adam
def test_temporal_and_mask_adam_injected_in_float16_is_finite():
    # optax rounds eps to 0 there, and the decays to what float16 holds of them.
    tx = optax.inject_hyperparams(hardvary.temporal_and_mask_adam)(learning_rate=0.01)
    params = jnp.ones(5, jnp.float16)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(10):
        updates, state = update(jnp.asarray(STEADY, jnp.float16), state, params)
    assert float(optax.tree.get(state, "eps")) == 0
    np.testing.assert_allclose(
        np.asarray(updates, np.float64), -0.01 * np.sign(STEADY), rtol=2e-3
    )


@adam
def test_temporal_and_mask_adam_injected_with_a_mask_finds_its_state():
    # The weight decay is 0, and known, at init; it is traced in the update.
    tx = optax.inject_hyperparams(hardvary.temporal_and_mask_adam)(
        learning_rate=0.01, threshold=0.0, mask=MATRICES
    )
    params = make_params("nested")
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert_like_params(updates, params)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


@adam
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "to_the_letter"])
def test_zero_gradients_give_zero_and_with_eps_zero_what_optax_gives(correct):
    params = jnp.ones(2)

    def first(**options):
        tx = hardvary.temporal_and_mask_adam(0.1, bias_correction=correct, **options)
        return tx.update(jnp.zeros(2), tx.init(params), params)[0]

    np.testing.assert_array_equal(first(threshold=0.0), [0, 0])
    np.testing.assert_array_equal(first(threshold=0.4, eps=0.0), [0, 0])
    np.testing.assert_array_equal(first(threshold=0.0, eps=0.0), [np.nan, np.nan])
    plain = optax.adam(0.1, eps=0.0)
    updates, _ = plain.update(jnp.zeros(2), plain.init(params))
    np.testing.assert_array_equal(updates, [np.nan, np.nan])


@adam
@every_maker
def test_state_keeps_its_dtypes_whatever_the_dtype_of_the_rest(make):
    # NumPy scalars and float64 gradients are strongly typed under x64.
    for x64 in (False, True):
        with enable_x64(x64):
            params = np.ones(3, np.float32)
            tx = make(np.float64(0.0), np.float64(0.5))
            state = tx.init(params)
            updates, after = tx.update(np.ones(3, np.float64), state, params)
            assert_like_params(after, state)
            assert updates.dtype == (jnp.float64 if x64 else jnp.float32)
            assert bool((updates != 0).all())


# Laws.


@functools.cache
def jitted_series(name):
    """`(grads, threshold, decay) -> (updates, kept fractions)`, compiled once."""

    @jax.jit
    def run(grads, threshold, decay):
        tx = MAKERS[name](threshold, decay)
        params = jnp.zeros(grads.shape[1])

        def step(state, grad):
            updates, state = tx.update(grad, state, params)
            return state, (updates, optax.tree.get(state, "kept_fraction"))

        return jax.lax.scan(step, tx.init(params), grads)[1]

    return run


series = hnp.arrays(
    np.float32, (6, 4), elements=st.integers(-8, 8).map(lambda quarters: quarters / 4)
)
levels = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]).map(np.float32)
decays = st.sampled_from([0.0, 0.5, 0.75]).map(np.float32)
every_name = pytest.mark.parametrize("name", MAKERS)


@adam
@every_name
@given(grads=series, threshold=levels, decay=decays)
def test_temporal_masks_pass_the_open_update_or_nothing(name, grads, threshold, decay):
    run = jitted_series(name)
    raw, everything = run(grads, np.float32(0), decay)
    masked, kept = run(grads, threshold, decay)
    average, passes = np.zeros(4), []
    for grad in grads:
        average = decay * average + (1 - decay) * np.sign(grad)
        passes.append(np.abs(average) >= threshold)
    np.testing.assert_allclose(masked, np.where(passes, raw, 0), rtol=1e-6)
    np.testing.assert_array_equal(kept, np.mean(passes, axis=1))
    np.testing.assert_array_equal(everything, np.ones(6))


@adam
@every_name
@given(grads=series, threshold=levels, decay=decays, order=st.permutations(range(4)))
def test_temporal_masks_follow_signs_and_order_of_the_components(
    name, grads, threshold, decay, order
):
    run = jitted_series(name)
    updates, kept = run(grads, threshold, decay)
    assert_trees_close(
        run(-grads[:, order], threshold, decay), (-updates[:, np.array(order)], kept)
    )


@adam
@given(grads=series, threshold=levels, decay=decays)
def test_temporal_masks_look_at_signs_only(grads, threshold, decay):
    run = jitted_series("temporal_and_mask")
    scales = np.float32([1e-20, 1e-3, 1.0, 1e20])
    updates, kept = run(grads, threshold, decay)
    scaled, scaled_kept = run(grads * scales[None], threshold, decay)
    assert_trees_close(scaled, updates * scales[None], rtol=1e-6, atol=0)
    assert_trees_equal(scaled_kept, kept)


# What is refused.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": np.nan}, ValueError, "eps must be finite and >= 0, got nan"),
        (
            {"eps_root": -1e-8},
            ValueError,
            "eps_root must be finite and >= 0, got -1e-08",
        ),
        ({"eps_root": "0"}, TypeError, "eps_root must be a real scalar"),
        ({"mu_dtype": jnp.int32}, TypeError, "mu_dtype must be a floating dtype"),
        ({"mu_dtype": "float8"}, TypeError, "mu_dtype must be a floating dtype"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
        ({"bias_correction": None}, TypeError, "bias_correction must be True or False"),
        ({"threshold": {"w": 2.0}}, ValueError, "threshold['w'] must lie in [0, 1]"),
        ({"threshold": {"w": "1"}}, TypeError, "threshold['w'] must be a real scalar"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_scale_by_temporal_and_mask_adam_bad_options_raise(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        hardvary.scale_by_temporal_and_mask_adam(**options)
    with pytest.raises(error, match=re.escape(message)):
        hardvary.temporal_and_mask_adam(0.1, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"learning_rate": np.nan},
            ValueError,
            "learning_rate must be finite, got nan",
        ),
        ({"learning_rate": None}, TypeError, "learning_rate must be a real scalar"),
        ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a real scalar"),
        ({"weight_decay": np.nan}, ValueError, "weight_decay must be finite and >= 0"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay must be a real scalar"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_temporal_and_mask_adam_bad_options_raise(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        hardvary.temporal_and_mask_adam(**{"learning_rate": 0.1, **options})


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_that_are_not_real_floating_raise_with_the_functions_name(name):
    tx = MAKERS[name](0.5, 0.5)
    state = tx.init({"w": jnp.ones(2)})
    for dtype in (jnp.int32, jnp.complex64):
        with pytest.raises(TypeError, match=rf"^{name}: gradients .*\['w'\]"):
            tx.update({"w": jnp.ones(2, dtype)}, state)


def test_temporal_and_mask_state_is_like_params():
    params = make_params("nested")
    tx = hardvary.temporal_and_mask(optax.adam(0.1), threshold=0.4, decay=0.9)
    state = tx.init(params)
    assert isinstance(state, hardvary.TemporalAndMaskState)
    assert_trees_close(state.sign_ema, jax.tree.map(jnp.zeros_like, params))
    assert int(state.mask_count) == 0
    assert_trees_equal(state.inner_state, optax.adam(0.1).init(params))
