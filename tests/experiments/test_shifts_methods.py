"""Every method of the comparison, on a problem small enough to look through."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.shifts.config import METHOD_NAMES, LinearRun, LinearSettings
from experiments.shifts.linear import apply, data_for, train
from experiments.shifts.linear_data import FEATURES
from experiments.shifts.methods import METHODS, Setting, Whitening, group_dro, vrex
from experiments.shifts.training import (
    REGRESSION,
    TWO_CLASSES,
    Examples,
    make_steps,
    share_of_baseline,
)

ENVS = 3
WHITENING = Whitening(damping=1e-6, decay=0.0, every=100)


@pytest.fixture(scope="module")
def data():
    return data_for(LinearSettings(examples=40), "example3s", ENVS, "averaging", 0)


def test_methods_are_the_names_of_the_config():
    assert tuple(METHODS) == METHOD_NAMES
    assert all(method.numbers for method in METHODS.values())


def two_steps(name, data, setting):
    """Weights after two steps of a method."""
    loop = make_steps(
        TWO_CLASSES,
        apply,
        METHODS[name],
        setting,
        ENVS,
        optax.constant_schedule(1.0),
        WHITENING,
    )

    @jax.jit
    def run(examples):
        state = loop.init(jnp.zeros((FEATURES, 1)))
        for _ in range(2):
            state, losses = loop.step(state, examples)
        return state.params, losses

    return run(data.train)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_every_method_takes_two_steps(name, data):
    params, losses = two_steps(name, data, Setting(0.1, METHODS[name].numbers[0]))
    assert losses.shape == (ENVS,)
    assert np.all(np.isfinite(params))
    assert np.all(np.isfinite(losses))


def test_vrex_is_the_gradient_of_its_objective():
    def losses_of(w):
        return jnp.stack([jnp.square(w[0] - 1), jnp.square(w[0] + 2 * w[1])])

    def objective(w):
        losses = losses_of(w)
        return (losses.mean() + 3 * jnp.var(losses)) / 3

    w = jnp.array([0.5, -0.2])
    tx = vrex(3.0, 2)
    found, _ = tx.update(
        jax.jacobian(losses_of)(w), tx.init(w), env_losses=losses_of(w)
    )
    np.testing.assert_allclose(found, jax.grad(objective)(w), rtol=1e-5)


def test_group_dro_goes_to_the_environment_with_the_largest_loss():
    tx, grads, losses = group_dro(1.0, 2), jnp.eye(2), jnp.array([0.0, 1.0])
    state = tx.init(jnp.zeros(2))
    for _ in range(2):
        found, state = tx.update(grads, state, env_losses=losses)
    np.testing.assert_allclose(found, jax.nn.softmax(2 * losses), rtol=1e-6)


@pytest.mark.parametrize("task", [REGRESSION, TWO_CLASSES])
def test_penalty_is_the_squared_slope_along_the_scale_of_the_outputs(task):
    outputs = jnp.array([0.3, -1.2, 2.0, 0.1])
    labels = jnp.array([1.0, 0.0, 0.0, 1.0])
    slope = jax.grad(lambda s: task.loss(s * outputs, labels))(jnp.float32(1.0))
    found = task.penalty(outputs, labels)
    np.testing.assert_allclose(found, jnp.square(slope), rtol=1e-5)


@pytest.mark.parametrize("task", [REGRESSION, TWO_CLASSES])
def test_baseline_is_the_least_loss_of_a_constant(task):
    labels = jnp.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    constants = jnp.linspace(-3.0, 3.0, 601)
    losses, errors = jax.vmap(
        lambda c: (
            task.loss(jnp.full(6, c), labels),
            task.error(jnp.full(6, c), labels),
        )
    )(constants)
    np.testing.assert_allclose(task.baseline(labels), losses.min(), rtol=1e-3)
    np.testing.assert_allclose(task.baseline_error(labels), errors.min(), rtol=1e-3)


def test_share_of_baseline_is_the_worst_environments():
    labels = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    features = jnp.array([[[1.0], [-1.0]], [[-1.0], [1.0]]])
    envs = Examples(features, labels)
    share = share_of_baseline(TWO_CLASSES, apply, jnp.ones((1, 1)), envs)
    assert share == 1.0
    first = jax.tree.map(lambda leaf: leaf[:1], envs)
    assert share_of_baseline(TWO_CLASSES, apply, jnp.ones((1, 1)), first) == 0.0


@pytest.mark.optimized
def test_oracle_beats_averaging_where_spurious_features_are_turned_around():
    test = {}
    for name in ("averaging_whitened", "oracle"):
        run = LinearRun(
            examples=1000,
            steps=200,
            problem="example3s",
            num_envs=ENVS,
            method=name,
            settings=((0.1, 0.0),),
        )
        [(errors, _)] = train(run, 0)
        test[name] = float(errors["test"].mean())
    assert test["oracle"] < 0.03 < 0.2 < test["averaging_whitened"]
