"""Every method of the comparison, on a problem small enough to look through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
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


@pytest.mark.parametrize("name", ["iga", "fishr"])
def test_tied_methods_take_the_gradient_of_mean_loss_and_penalty(name, data):
    weight, learning_rate = 3.0, 0.5
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:, :6]), data.train)
    method = METHODS[name]._replace(optimizer="layer")
    loop = make_steps(
        TWO_CLASSES,
        apply,
        method,
        Setting(learning_rate, weight),
        ENVS,
        optax.constant_schedule(1.0),
        WHITENING,
    )
    params = 0.1 * jnp.ones((FEATURES, 1))

    def of_examples(params, env):
        return TWO_CLASSES.loss(apply(params, env.features), env.labels)

    def objective(params):
        losses, vectors = [], []
        for env in range(ENVS):
            own = jax.tree.map(lambda leaf, env=env: leaf[env], batch)
            losses.append(of_examples(params, own))
            ones = [
                jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], own) for i in range(6)
            ]
            grads = [jax.grad(of_examples)(params, one) for one in ones]
            stacked = jnp.stack(grads)
            vectors.append(stacked.mean(0) if name == "iga" else stacked.var(0))
        spread = jnp.sum(jnp.var(jnp.stack(vectors), axis=0))
        return (jnp.stack(losses).mean() + weight * spread) / weight

    state, losses = jax.jit(loop.step)(loop.init(params), batch)
    assert losses.shape == (ENVS,)
    direction = jax.jit(jax.grad(objective))(params)
    moved = (params - state.params) / learning_rate
    # NovoGrad's first step has length 1.
    np.testing.assert_allclose(moved, direction / jnp.linalg.norm(direction), atol=1e-4)


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


def test_weight_decay_of_the_linear_model_costs_training_loss():
    run = LinearRun(
        examples=100,
        steps=50,
        problem="example1",
        num_envs=ENVS,
        method="averaging",
        settings=((0.1, 0.0),),
    )
    losses = {}
    for l2 in (0.0, 0.9):
        [(errors, _)] = train(dataclasses.replace(run, l2=l2), 0)
        losses[l2] = float(errors["train"].mean())
    assert losses[0.0] < 0.99 * losses[0.9]


def test_temporal_method_is_the_librarys_on_the_mean_gradient(data):
    found, _ = two_steps("temporal_and_mask", data, Setting(0.1, 0.4))
    tx = hardvary.temporal_and_mask_adam(0.1, 0.9, 0.999, 0.9, 0.4)

    def loss(params):
        return jax.vmap(
            lambda env: TWO_CLASSES.loss(apply(params, env.features), env.labels)
        )(data.train).mean()

    params = jnp.zeros((FEATURES, 1))
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found, params, rtol=1e-4, atol=1e-6)
