"""Rules on directions of disagreement equal their definitions, in any basis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from tests._asserts import assert_trees_close
from tests._compat import enable_x64
from tests.zoo import compile_quickly
from tests.zoo.blocks import floats

WEIGHTS = {"equal": np.ones(6), "weighted": np.array([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])}
every_weighting = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


# The definitions, from gradients `[env, n]` in float64.


def axes(rows, shares):
    """Mean, principal axes `[axis, n]` and variances along them, falling."""
    mean = shares @ rows
    centred = np.sqrt(shares)[:, None] * (rows - mean)
    _, values, right = np.linalg.svd(centred, full_matrices=False)
    there = values > 1e-10 * values.max(initial=0)
    return mean, right[there], values[there] ** 2


def spectral_and_mask(rows, shares, losses, baselines, threshold=1.0):
    del baselines
    rows = rows / losses[:, None]
    mean, directions, _ = axes(rows, shares)
    agreed = np.abs(shares @ np.sign(rows @ directions.T))
    dropped = directions[agreed < threshold - 1e-9]
    return mean - dropped.T @ (dropped @ mean)


def drop_disagreement(rows, shares, losses, baselines, energy=0.99):
    del baselines
    rows = rows / losses[:, None]
    mean, directions, values = axes(rows, shares)
    number = 1 + np.argmax(np.cumsum(values) >= energy * values.sum() * (1 - 1e-12))
    dropped = directions[:number]
    return mean - dropped.T @ (dropped @ mean)


def relative_gauss_newton(rows, shares, losses, baselines, strength=30.0):
    rows, relative = rows / baselines[:, None], losses / baselines
    centred = rows - shares @ rows
    covariance = (shares[:, None] * centred).T @ centred
    factor = strength / np.trace(covariance)
    pulled = shares * (1 + factor * (relative - shares @ relative))
    return np.linalg.solve(np.eye(rows.shape[1]) + factor * covariance, pulled @ rows)


RULES = {
    "spectral_and_mask": (hardvary.spectral_and_mask, spectral_and_mask),
    "drop_disagreement": (hardvary.drop_disagreement, drop_disagreement),
    "relative_gauss_newton": (hardvary.relative_gauss_newton, relative_gauss_newton),
}
every_rule = pytest.mark.parametrize("name", RULES)
SETTINGS = {
    "strict": ("spectral_and_mask", {}),
    "weak": ("spectral_and_mask", {"threshold": 0.3}),
    "most": ("drop_disagreement", {}),
    "half": ("drop_disagreement", {"energy": 0.5}),
    "all": ("drop_disagreement", {"energy": 1.0}),
    "gauss_newton": ("relative_gauss_newton", {}),
    "weak_gauss_newton": ("relative_gauss_newton", {"strength": 0.5}),
}


def draw(seed=0, size=9, num_envs=6):
    """Gradients with a part in common, losses and baselines."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_envs, size)) + 0.8 * rng.normal(size=size)
    return rows, *(rng.uniform(0.5, 2.0, size=(2, num_envs)))


@functools.cache
def jitted(name, **settings):
    tx = RULES[name][0](**settings)

    @jax.jit
    def run(grads, losses, baselines, env_weights=None):
        given = {"env_losses": losses, "env_weights": env_weights}
        if name == "relative_gauss_newton":
            given["baseline_losses"] = baselines
        return tx.update(grads, tx.init(None), **given)

    return lambda *args, **kwargs: run(*(jnp.asarray(x) for x in args), **kwargs)


@every_weighting
@pytest.mark.parametrize(("name", "settings"), SETTINGS.values(), ids=SETTINGS)
def test_update_equals_the_definition(name, settings, weights):
    rows, losses, baselines = draw()
    expected = RULES[name][1](
        rows, weights / weights.sum(), losses, baselines, **settings
    )
    with enable_x64(True):
        update, _ = jitted(name, **settings)(
            rows, losses, baselines, env_weights=jnp.asarray(weights)
        )
        np.testing.assert_allclose(update, expected, rtol=1e-9, atol=1e-12)
    narrow = [x.astype(np.float32) for x in (rows, losses, baselines)]
    update, _ = jitted(name, **settings)(
        *narrow, env_weights=jnp.asarray(weights, jnp.float32)
    )
    np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-4)


@every_rule
def test_rotations_and_orders_of_environments_change_nothing_else(name):
    rows, *losses = draw(seed=1)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(9, 9)))[0]
    order = np.array([3, 0, 5, 1, 4, 2])
    with enable_x64(True):
        update, _ = jitted(name)(rows, *losses)
        turned, _ = jitted(name)(rows @ rotation, *losses)
        permuted, _ = jitted(name)(rows[order], *(x[order] for x in losses))
    expected = np.asarray(update) @ rotation
    np.testing.assert_allclose(turned, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(permuted, update, rtol=1e-9, atol=1e-12)


@every_rule
@pytest.mark.parametrize("power", [-45, -20, 20, 45])
def test_gradients_of_any_size_have_the_same_directions(name, power):
    rows, *losses = (x.astype(np.float32) for x in draw(seed=3))
    expected, _ = jitted(name)(rows, losses[0], losses[0])
    # Relative losses that are all 1 have no unit of their own.
    update, _ = jitted(name)(rows * np.float32(2.0**power), losses[0], losses[0])
    np.testing.assert_allclose(update / 2.0**power, expected, rtol=1e-3, atol=1e-4)


@every_rule
@pytest.mark.parametrize("num_envs", [1, 5])
def test_gradients_that_are_equal_are_their_mean(name, num_envs):
    rows = jnp.broadcast_to(jnp.asarray([3.0, -1.0, 0.1]), (num_envs, 3))
    ones = jnp.ones(num_envs)
    update, state = jitted(name)(rows, ones, ones)
    np.testing.assert_allclose(update, rows[0], rtol=1e-6)
    assert state.kept_fraction == 1


@every_rule
def test_absent_environments_may_hold_anything_and_present_ones_show_nan(name):
    rows, losses, baselines = (x.astype(np.float32) for x in draw(seed=4))
    weights = jnp.asarray([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    here = np.asarray(weights) > 0
    expected, _ = jitted(name)(rows[here], losses[here], baselines[here])
    for broken in (np.nan, np.inf):
        poisoned = [np.where(here, x.T, broken).T for x in (rows, losses, baselines)]
        update, _ = jitted(name)(
            *(x.astype(np.float32) for x in poisoned), env_weights=weights
        )
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-6)
        update, _ = jitted(name)(poisoned[0].astype(np.float32), losses, baselines)
        assert np.all(np.isnan(update))
    for broken in (np.nan, np.inf, -np.inf, -1.0):
        update, _ = jitted(name)(rows, np.where(here, losses, broken), baselines)
        assert np.all(np.isnan(update))
        found = hardvary.disagreement(
            jnp.asarray(rows), env_losses=jnp.where(here, losses, broken)
        )
        assert np.all(np.isnan(found.spectrum))
    if name == "relative_gauss_newton":
        for broken in (0.0, -1.0):
            bad = np.where(here, baselines, np.float32(broken))
            assert np.all(np.isnan(jitted(name)(rows, losses, bad)[0]))


@pytest.mark.parametrize("name", ["spectral_and_mask", "drop_disagreement"])
def test_a_loss_of_zero_stays_finite(name):
    rows, losses, baselines = (x.astype(np.float32) for x in draw(seed=5))
    rows[2], losses[2] = 0, 0
    update, _ = jitted(name)(rows, losses, baselines)
    assert np.all(np.isfinite(update))
    update, _ = jitted(name)(rows, 0 * losses, baselines)
    assert np.all(np.isfinite(update))


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e-20, 1e-30])
def test_relative_gauss_newton_stays_finite_where_gradients_vanish(size):
    rows, losses, baselines = (x.astype(np.float32) for x in draw(seed=8))
    for own in (losses, losses * np.float32(size), np.ones_like(losses)):
        update, _ = jitted("relative_gauss_newton")(
            rows * np.float32(size), own, baselines
        )
        assert np.all(np.isfinite(update))


def test_spectral_mask_keeps_what_environments_agree_on():
    # Nothing to differ in, one axis with both signs, one with the same.
    rows = np.array([[2, 3, 1], [2, -2, 1], [2, 3, 5], [2, -2, 5]], np.float32)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    ones = np.ones(4, np.float32)
    turned = (rows @ turn).astype(np.float32)
    update, state = jitted("spectral_and_mask")(turned, ones, ones)
    assert state.kept_fraction == 0.5
    np.testing.assert_allclose(update, np.array([2, 0, 3]) @ turn, rtol=1e-5)
    plain, state = jitted("spectral_and_mask", threshold=0.0)(turned, ones, ones)
    assert state.kept_fraction == 1
    np.testing.assert_allclose(plain, turned.mean(0), rtol=1e-5)


@every_rule
def test_rules_on_env_grads_equal_those_on_stacked_gradients(name):
    rng = np.random.default_rng(0)
    params = {"w": floats(rng.normal(size=(4, 3))), "b": jnp.zeros(3)}
    batch = floats(rng.normal(size=(5, 6, 4)))

    def loss(params, x):
        return 0.1 + jnp.mean(
            jnp.square(jnp.tanh(x @ params["w"] + params["b"][None]) - 0.3)
        )

    tx = RULES[name][0]()
    baselines = {"baseline_losses": jnp.linspace(1.0, 2.0, 5)}
    extra = baselines if name == "relative_gauss_newton" else {}

    @compile_quickly
    def run(params, batch):
        losses, grads = hardvary.value_and_env_grads(loss)(params, batch)
        stacked = hardvary.per_env_grad(loss)(params, batch)
        return [
            tx.update(g, tx.init(params), params, env_losses=losses, **extra)[0]
            for g in (grads, stacked)
        ]

    fused, stacked = run(params, batch)
    assert_trees_close(fused, stacked, rtol=1e-3, atol=1e-5)


@every_rule
def test_losses_that_are_missing_are_asked_for_by_name(name):
    tx = RULES[name][0]()
    grads = jnp.ones((3, 2))
    stats = hardvary.GradStats(mean=jnp.ones(2), num_envs=jnp.ones(()))
    with pytest.raises(ValueError, match=f"{name}: a GradStats holds no inner"):
        tx.update(stats, tx.init(None), env_losses=jnp.ones(3))
    with pytest.raises(TypeError, match=f"{name}: update needs env_losses, the losses"):
        tx.update(grads, tx.init(None))
    given = {"env_losses": jnp.ones(3), "baseline_losses": jnp.ones(3)}
    for key in given if name == "relative_gauss_newton" else ["env_losses"]:
        with pytest.raises(ValueError, match=rf"{name}: {key} must have shape \(3,\)"):
            tx.update(grads, tx.init(None), **given | {key: jnp.ones(4)})
        with pytest.raises(TypeError, match=f"{name}: {key} must be real"):
            tx.update(grads, tx.init(None), **given | {key: jnp.ones(3, complex)})
    if name == "relative_gauss_newton":
        with pytest.raises(TypeError, match="update needs baseline_losses"):
            tx.update(grads, tx.init(None), env_losses=jnp.ones(3))


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("spectral_and_mask", {"threshold": 1.5}, ValueError, "threshold must lie in"),
        ("spectral_and_mask", {"threshold": {}}, TypeError, "threshold"),
        ("spectral_and_mask", {"log_losses": 1}, TypeError, "log_losses must be True"),
        ("drop_disagreement", {"energy": -0.1}, ValueError, "energy must lie in"),
        ("drop_disagreement", {"energy": "most"}, TypeError, "energy"),
        ("relative_gauss_newton", {"strength": -1.0}, ValueError, "strength"),
        ("relative_gauss_newton", {"strength": np.nan}, ValueError, "strength"),
    ],
)
def test_wrong_settings_are_refused(name, settings, error, message):
    with pytest.raises(error, match=message):
        RULES[name][0](**settings)


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        ("spectral_and_mask", "threshold", (0.0, 1.0)),
        ("drop_disagreement", "energy", (0.0, 1.0)),
        ("relative_gauss_newton", "strength", (0.0, 100.0)),
    ],
)
def test_settings_may_be_schedules_and_traced(name, argument, values):
    rows, losses, baselines = draw(seed=6)
    grads = jnp.asarray(rows, jnp.float32)
    given = {"env_losses": jnp.asarray(losses, jnp.float32)}
    if name == "relative_gauss_newton":
        given["baseline_losses"] = jnp.asarray(baselines, jnp.float32)
    expected = [jitted(name, **{argument: v})(rows, losses, baselines) for v in values]
    tx = RULES[name][0](**{argument: lambda count: jnp.where(count < 1, *values)})
    state = tx.init(None)
    for update, _ in expected:
        found, state = tx.update(grads, state, **given)
        np.testing.assert_allclose(found, update, rtol=1e-3, atol=1e-5)

    @jax.jit
    def traced(value):
        tx = RULES[name][0](**{argument: value})
        return tx.update(grads, tx.init(None), **given)[0]

    np.testing.assert_allclose(traced(values[1]), expected[1][0], rtol=1e-3, atol=1e-5)


@every_weighting
def test_disagreement_is_the_principal_axes_of_gradients_around_their_mean(weights):
    rows, losses, _ = draw(seed=7)
    shares = weights / weights.sum()
    for given, own in ((None, rows), (losses, rows / losses[:, None])):
        mean, directions, values = axes(own, shares)
        with enable_x64(True):
            found = hardvary.disagreement(
                jnp.asarray(rows), env_losses=given, env_weights=jnp.asarray(weights)
            )
        found = jax.tree.map(np.asarray, found)
        number = len(values)
        np.testing.assert_allclose(found.spectrum[:number], values, rtol=1e-9)
        assert np.all(found.spectrum[number:] == 0)
        np.testing.assert_allclose(
            np.abs(found.mean[:number]), np.abs(directions @ mean), rtol=1e-7
        )
        agreed = np.abs(shares @ np.sign(own @ directions.T))
        np.testing.assert_allclose(found.agreement[:number], agreed, rtol=1e-9)
        left = mean - directions.T @ (directions @ mean)
        np.testing.assert_allclose(found.common, left @ left, rtol=1e-9)


def test_rules_compose_with_optax():
    tx = optax.chain(hardvary.spectral_and_mask(), optax.trace(0.9), optax.scale(-0.1))
    params = {"w": jnp.zeros(3)}
    grads = {"w": jnp.asarray([[1.0, 2.0, 0.0], [1.0, -2.0, 0.0]])}
    updates, state = tx.update(grads, tx.init(params), params, env_losses=jnp.ones(2))
    np.testing.assert_allclose(updates["w"], [-0.1, 0, 0], atol=1e-6)
    assert optax.tree.get(state, "kept_fraction") == 0
