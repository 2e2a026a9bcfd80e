"""The temporal AND-mask against Algorithm 1 written as a NumPy loop (issue check e)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from tests._asserts import assert_trees_close, assert_trees_equal
from tests._inputs import make_params

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
        b = np.abs(a) >= setting.threshold
        m_hat, v_hat = m, v
        if setting.bias_correction:
            m_hat, v_hat = m / (1 - setting.b1**step), v / (1 - setting.b2**step)
        alpha = learning_rate(step - 1)
        decay = alpha * setting.weight_decay * theta
        theta = theta - alpha * m_hat * b / (np.sqrt(v_hat) + setting.eps) - decay
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
    with jax.enable_x64(True):
        tx = hardvary.temporal_and_mask_adam(0.01, **dataclasses.asdict(setting))
        actual, _ = train(tx, jnp.asarray(theta), jnp.asarray(grads))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@adam
def test_temporal_and_mask_adam_with_a_schedule_matches_algorithm_1():
    grads = gradient_series(seed=1)
    theta = np.linspace(-1, 1, 12)
    setting = Setting(weight_decay=0.1)
    expected, _ = algorithm_1(theta, grads, lambda step: 0.1 / (1 + step), setting)
    with jax.enable_x64(True):
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


@adam
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_temporal_and_mask_adam_threshold_zero_is_adamw_to_the_bit(weight_decay, jit):
    masked = hardvary.temporal_and_mask_adam(
        0.01, threshold=0.0, weight_decay=weight_decay
    )
    plain = optax.adamw(0.01, weight_decay=weight_decay)
    assert_same_updates(masked, plain, jit)


@adam
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_temporal_and_mask_adam_behind_coupled_decay_is_adam_to_the_bit(jit):
    decay = optax.add_decayed_weights(0.1)
    masked = optax.chain(decay, hardvary.temporal_and_mask_adam(0.01, threshold=0.0))
    plain = optax.chain(decay, optax.adam(0.01))
    assert_same_updates(masked, plain, jit)


def assert_same_updates(left, right, jit):
    params = make_params("nested")
    states = [left.init(params), right.init(params)]
    steps = [jax.jit(tx.update) if jit else tx.update for tx in (left, right)]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),  # noqa: B023
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kept_fraction_counts_what_passed(dtype):
    rng = np.random.default_rng(0)
    tx = hardvary.temporal_and_mask(optax.sgd(1.0), threshold=0.75, decay=0.5)
    params = {"a": jnp.ones(50, dtype), "b": [jnp.ones((30, 5), dtype)]}
    state = tx.init(params)
    assert float(state.kept_fraction(0.75)) == 0
    # 0.75 is what two agreeing steps come to: exactly on the threshold.
    for _ in range(2):
        grads = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params
        )
        updates, state = tx.update(grads, state)
    passed = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(updates))
    assert 0 < passed < 200
    kept = jax.jit(lambda state, threshold: state.kept_fraction(threshold))(state, 0.75)
    assert kept.dtype == jnp.float32
    np.testing.assert_allclose(kept, passed / 200)
    assert float(tx.init({}).kept_fraction(0.5)) == 0


def test_temporal_and_mask_state_is_like_params():
    params = make_params("nested")
    tx = hardvary.temporal_and_mask(optax.adam(0.1), threshold=0.4, decay=0.9)
    state = tx.init(params)
    assert isinstance(state, hardvary.TemporalAndMaskState)
    assert_trees_close(state.sign_ema, jax.tree.map(jnp.zeros_like, params))
    assert_trees_equal(state.inner_state, optax.adam(0.1).init(params))
