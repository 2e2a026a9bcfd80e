"""Aggregators by inner products equal their formulas in NumPy, on every form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from tests._asserts import assert_like_params, assert_trees_close, assert_trees_equal
from tests._compat import enable_x64
from tests._inputs import make_grads, make_params
from tests.zoo import compile_quickly
from tests.zoo.blocks import floats

# Rules as a user would write them, and the same in NumPy from stacked rows `[env, n]`.


def shorter_of_two(gramian):
    """The shortest vector between the gradients of two environments."""
    (a, b), (_, c) = gramian
    share = jnp.clip((c - b) / jnp.maximum(a - 2 * b + c, 1e-12), 0, 1)
    return jnp.stack([share, 1 - share])


def shorter_of_two_of(rows):
    first, second = rows
    shares = np.linspace(0, 1, 20001)
    points = shares[:, None] * first + (1 - shares[:, None]) * second
    return points[np.argmin((points**2).sum(1))]


def normalised(gramian):
    """The mean of gradients of length 1."""
    return 1 / jnp.sqrt(jnp.diagonal(gramian)) / len(gramian)


def normalised_of(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)


def projected(gramian):
    """PCGrad with the others in order: each loses what is against another."""
    size = len(gramian)

    def one(i):
        def project(j, w):
            product = gramian[j] @ w
            against = jnp.where(i == j, 0, jnp.minimum(product, 0))
            return w.at[j].add(-against / gramian[j, j])

        return jax.lax.fori_loop(0, size, project, jnp.eye(size)[i])

    return jax.vmap(one)(jnp.arange(size)).sum(0)


def projected_of(rows):
    total = np.zeros(rows.shape[1])
    for i, row in enumerate(rows):
        left = row.copy()
        for j, other in enumerate(rows):
            if i != j and left @ other < 0:
                left -= (left @ other) / (other @ other) * other
        total += left
    return total


def plain(gramian):
    return jnp.ones(len(gramian)) / len(gramian)


RULES = {
    "shorter_of_two": (shorter_of_two, shorter_of_two_of, 2),
    "normalised": (normalised, normalised_of, 4),
    "projected": (projected, projected_of, 4),
    "plain": (plain, lambda rows: rows.mean(0), 3),
}


def make_problem(num_envs, seed=0):
    """`(params, loss_fn, batch)` of a product, of a stack and of a lookup."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return floats(rng.normal(size=shape))

    params = {"w": normal(3, 2), "b": normal(2), "table": normal(20, 3)}
    batch = {
        "x": normal(num_envs, 3),
        "y": normal(num_envs, 2),
        "id": jax.device_put(rng.integers(0, 3, num_envs).astype(np.int32)),
    }

    def loss_fn(params, batch):
        x = batch["x"] + params["table"][batch["id"]]
        y = jnp.sin(x @ params["w"] + params["b"])
        return jnp.mean(jnp.square(y - batch["y"]))

    return params, loss_fn, batch


def rows_of(grads):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def flat(updates):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(updates)]
    return np.concatenate([leaf.ravel() for leaf in leaves])


@pytest.mark.parametrize(
    ("name", "absent"),
    [*((name, False) for name in RULES), ("normalised", True), ("plain", True)],
)
def test_weighting_on_every_form_equals_numpy(name, absent):
    rule, by_numpy, num_envs = RULES[name]
    params, loss_fn, batch = make_problem(num_envs)
    weights = np.ones(num_envs, np.float32)
    if absent:
        weights[1] = 0
        batch = {**batch, "x": batch["x"].at[1].set(jnp.nan)}
        rule = {"plain": by_weights, "normalised": present_normalised}[name]
    tx = hardvary.weighting(rule)

    @compile_quickly
    def run(params, batch, weights):
        state = tx.init(params)
        stacked = hardvary.per_env_grad(loss_fn)(params, batch)
        grads = hardvary.env_grads(loss_fn)(params, batch, env_weights=weights)
        return (
            stacked,
            tx.update(grads, state, params),
            tx.update(stacked, state, params, env_weights=weights),
            tx.update(stacked, state, env_weights=weights),
        )

    stacked, *results = run(params, batch, weights)
    expected = by_numpy(rows_of(stacked)[weights > 0])
    for updates, state in results:
        assert_like_params(updates, params)
        np.testing.assert_allclose(flat(updates), expected, atol=2e-4, rtol=1e-4)
        assert float(state.kept_fraction) == 1


def by_weights(gramian, env_weights):
    """The mean over the environments that are there."""
    del gramian
    return env_weights / jnp.sum(env_weights)


def present_normalised(gramian, env_weights):
    # An absent environment has no length, and whatever the rule says is not heard.
    lengths = jnp.sqrt(jnp.diagonal(gramian))
    return 1 / lengths / jnp.sum(jnp.sign(env_weights))


def test_weighting_with_env_weights_in_the_rule_is_the_weighted_mean():
    tx, mean = hardvary.weighting(by_weights), hardvary.and_mask(0.0)

    @compile_quickly
    def run(grads, weights):
        return (
            tx.update(grads, tx.init(None), env_weights=weights)[0],
            mean.update(grads, mean.init(None), env_weights=weights)[0],
            # Without weights they are 1.
            tx.update(grads, tx.init(None))[0],
            mean.update(grads, mean.init(None))[0],
        )

    weights = np.array([0.5, 0.0, 2.0, 1.0], np.float32)
    weighted, expected, plain, expected_plain = run(make_grads("nested", 4), weights)
    assert_trees_close(weighted, expected)
    assert_trees_close(plain, expected_plain)


def shrunk(gramian, power, scale=1.0):
    lengths = jnp.sqrt(jnp.diagonal(gramian))
    return scale * jnp.power(lengths, jnp.asarray(power).astype(gramian.dtype))


def test_weighting_hyperparameters_are_numbers_traced_values_or_schedules():
    grads = make_grads("nested", 4, seed=3)

    def update(count=0, **hyperparams):
        tx = hardvary.weighting(shrunk, **hyperparams)
        state = tx.init(None)
        for _ in range(count + 1):
            updates, state = tx.update(grads, state)
        return updates, state

    rows = rows_of(grads)
    lengths = np.linalg.norm(rows, axis=1)
    for power in (0.0, -1.0):
        updates, state = update(power=power)
        assert state.mask_count is None
        np.testing.assert_allclose(flat(updates), lengths**power @ rows, rtol=1e-4)
    traced = jax.jit(lambda power: update(power=power)[0])(-1.0)
    assert_trees_close(traced, update(power=-1.0)[0])
    schedule = optax.linear_schedule(0.0, -1.0, 2)
    for count, power in enumerate((0.0, -0.5, -1.0)):
        updates, state = update(count, power=schedule, scale=2.0)
        assert_trees_close(updates, update(power=power, scale=2.0)[0])
        assert int(state.mask_count) == count + 1


def test_weighting_injected_follows_a_schedule():
    grads, params = make_grads("array", 4), make_params("array")

    def make(power):
        return hardvary.weighting(shrunk, power=power)

    tx = optax.inject_hyperparams(make)(
        power=lambda count: jnp.where(count < 1, 0.0, -1.0)
    )
    state = tx.init(params)
    for power in (0.0, -1.0):
        updates, state = jax.jit(tx.update)(grads, state, params)
        expected, _ = make(power).update(grads, make(power).init(params), params)
        assert_trees_close(updates, expected)


def test_weighting_in_partition_has_a_gramian_for_each_group():
    grads, params = make_grads("nested", 4), make_params("nested")
    tx = hardvary.weighting(normalised)
    both = optax.partition(
        {"one": tx, "other": hardvary.weighting(normalised)},
        {"dense": "one", "scale": "other", "none": None},
    )
    updates, _ = both.update(grads, both.init(params), params)
    for name in ("dense", "scale"):
        alone, _ = tx.update(grads[name], tx.init(None))
        assert_trees_close(updates[name], alone)


def test_weighting_does_not_depend_on_the_basis():
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    grads = rng.normal(size=(4, 6)).astype(np.float32)
    for rule in (normalised, projected, plain):
        tx = hardvary.weighting(rule)
        run = compile_quickly(lambda grads, tx=tx: tx.update(grads, tx.init(None))[0])
        update, turned = run(grads), run((grads @ rotation).astype(np.float32))
        np.testing.assert_allclose(turned, update @ rotation, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weighting_computes_in_float32_or_more(dtype):
    with enable_x64(dtype == "float64"):
        grads, params = (
            make_grads("nested", 4, dtype=dtype),
            make_params("nested", dtype),
        )
        seen = []

        def rule(gramian):
            seen.append(gramian.dtype)
            return plain(gramian).astype(gramian.dtype)

        tx = hardvary.weighting(rule)
        updates, _ = compile_quickly(tx.update)(grads, tx.init(params), params)
        assert_like_params(updates, params)
        assert seen == [np.promote_types(jnp.dtype(dtype), np.float32)]
        assert_trees_close(updates, jax.tree.map(lambda g: g.mean(0), grads), rtol=1e-2)


def test_weighting_edge_cases():
    tx = hardvary.weighting(plain)
    updates, state = tx.update({}, tx.init({}))
    assert updates == {}
    assert float(state.kept_fraction) == 1
    assert float(tx.init({}).kept_fraction) == 0
    # One environment is its own mean; nothing in a leaf stays nothing.
    grads = make_grads("zero_size", 1)
    updates, _ = tx.update(grads, tx.init(None))
    assert_trees_close(updates, jax.tree.map(lambda leaf: leaf[0], grads))
    # A weight of 0 leaves out what is broken, the rule's too.
    broken = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
    tx = hardvary.weighting(lambda gramian: jnp.array([1.0, 0.0]))
    updates, _ = tx.update(broken, tx.init(None))
    assert updates.tolist() == [1.0, 2.0]
    # And one of 1 does not.
    tx = hardvary.weighting(plain)
    updates, _ = tx.update(broken, tx.init(None))
    assert not np.isfinite(updates).any()


def test_weighting_of_grad_stats_is_refused_by_name():
    params = make_params("array")
    stats = hardvary.GradStats(
        mean=params, sign_sum=jnp.sign(params), num_envs=jnp.float32(4)
    )
    message = (
        r"normalised: a GradStats holds no inner products; use value_and_env_grads, "
        r"inside the same jit, or stacked gradients from per_env_grad"
    )
    for rule, name in ((normalised, None), (lambda g: g[0], "normalised")):
        tx = hardvary.weighting(rule, name=name)
        with pytest.raises(ValueError, match=message):
            tx.update(stats, tx.init(params), params)


@pytest.mark.parametrize(
    ("rule", "hyperparams", "error", "message"),
    [
        (3, {}, TypeError, "rule must be callable, got 3"),
        (shrunk, {"power": "1"}, TypeError, "power must be a real scalar"),
        (shrunk, {"power": None}, TypeError, "power must be a real scalar"),
        (shrunk, {"power": jnp.ones(2)}, TypeError, "power must be a real scalar"),
        (shrunk, {"power": 1j}, TypeError, "power must be a real scalar"),
        (lambda: 1, {}, TypeError, "called with the inner products .* alone; it tak"),
        (lambda g, t: g[0], {}, TypeError, "missing a required argument: 't'"),
        (shrunk, {"power": 1.0, "stats": ("mean",)}, TypeError, "argument 'stats'"),
        # One Gramian for all parameters has no use for a tree.
        (shrunk, {"power": {"w": 1.0}}, TypeError, "power must be a real scalar or a"),
    ],
)
def test_weighting_of_bad_arguments_is_refused(rule, hyperparams, error, message):
    with pytest.raises(error, match=message):
        hardvary.weighting(rule, **hyperparams)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (
            lambda gramian: gramian,
            ValueError,
            r"weights of shape \(4,\).* got \(4, 4\)",
        ),
        (lambda gramian: gramian[0, 0], ValueError, r"one for each .*, got \(\)"),
        (lambda gramian: gramian[0, :3], ValueError, r"mine: .* got \(3,\)"),
        (lambda gramian: gramian[0] * 1j, TypeError, "weights must be real"),
        (lambda gramian: None, TypeError, "mine: .* array of weights, .* NoneType"),
        (lambda gramian: {"w": gramian[0]}, TypeError, "mine: .* weights, .* a dict"),
    ],
)
def test_weighting_rule_that_returns_no_weights_is_refused(rule, error, message):
    grads = make_grads("array", 4)
    tx = hardvary.weighting(rule, name="mine")
    with jax.numpy_dtype_promotion("standard"), pytest.raises(error, match=message):
        tx.update(grads, tx.init(None))


def test_weighting_of_bad_gradients_is_refused_as_by_masks():
    tx = hardvary.weighting(plain)
    grads, params = make_grads("nested", 4), make_params("nested")
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"plain: env_weights must have shape \(4,\)"):
        tx.update(grads, state, params, env_weights=np.ones(3))
    with pytest.raises(ValueError, match=r"plain: gradients must have shape \[env"):
        tx.update(jax.tree.map(lambda leaf: leaf[0], grads), state, params)
    with pytest.raises(TypeError, match="plain: gradients must be real floating"):
        tx.update(jax.tree.map(lambda leaf: leaf.astype(int), grads), state, params)


def test_weighting_on_the_gradients_of_one_trace_asks_for_one_gramian():
    # The same as masks: states and structure do not change, under jit and in a scan.
    params, loss_fn, batch = make_problem(4)
    tx = optax.chain(hardvary.weighting(normalised), optax.sgd(0.1))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            losses, grads = hardvary.value_and_env_grads(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), losses.mean()

        return jax.lax.scan(step, (params, tx.init(params)), None, length=20)

    (_, state), losses = train(params)
    assert_trees_equal(state[0], hardvary.AggregatorState(jnp.float32(1)))
    assert losses[-1] < losses[0]
