"""The objectives and networks of the methods that the masks are compared with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.synthetic import training
from experiments.synthetic.config import (
    OBJECTIVES,
    PRESETS,
    SEARCHED_METHODS,
    TrainConfig,
)
from experiments.synthetic.data import Split
from experiments.synthetic.model import (
    ENV_AXIS,
    Architecture,
    Variables,
    init_variables,
    make_apply,
    make_train_apply,
)
from experiments.synthetic.training import (
    EnvBatch,
    architecture_for,
    dataset_for,
    domain_loss,
    make_env_loss,
    make_env_losses,
    make_gradients,
    make_keys,
    make_trainer,
)

SMALL = {**PRESETS["smoke"], "threshold": 0.5}
# One turn of the spirals, and no shortcut: their dimensions are 0.
SPIRALS = {
    "num_envs": 4,
    "examples_per_env": 256,
    "batch_size": 64,
    "shortcut_dims": 2,
    "shortcut_std": 0.0,
    "revolutions": 1.0,
    "hidden_units": 64,
    "hidden_layers": 3,
    "epochs": 60,
    "b2": 0.999,
    "eps": 1e-8,
    "l2": 0.0,
    "threshold": 0.5,
}


def small(**changes):
    return TrainConfig(**{**SMALL, **changes})


def some_batch(config, seed=0):
    """The first examples of every environment, as a step sees them."""
    dataset = dataset_for(config, seed)
    rows = jax.tree.map(lambda leaf: leaf[:, : config.batch_size], dataset.train)
    keys = jax.random.split(jax.random.key(seed), config.num_envs)
    return EnvBatch(*rows, jnp.arange(config.num_envs), keys)


def some_state(config, seed=0):
    return make_trainer(config).init(make_keys(seed))


def per_env(config, weight):
    """Objectives and cross-entropies of the environments, one call for each."""
    state, batch = some_state(config), some_batch(config)
    loss = make_env_loss(config)
    results = [
        loss(
            state.variables.params,
            jax.tree.map(lambda leaf, e=e: leaf[e], batch),
            batch_stats=state.variables.batch_stats,
            penalty_weight=jnp.float32(weight),
        )
        for e in range(config.num_envs)
    ]
    objectives = np.array([float(objective) for objective, _ in results])
    return objectives, np.array([float(aux.cross_entropy) for _, aux in results])


def numpy_logits(config):
    """Logits [env, example] and labels of `some_batch`."""
    state, batch = some_state(config), some_batch(config)
    apply = make_apply(architecture_for(config))
    logits = np.asarray(apply(state.variables, batch.features), np.float64)
    return logits, np.asarray(batch.labels, np.float64)


def cross_entropy(logits, labels):
    return (np.log1p(np.exp(-logits)) + (1 - labels) * logits).mean(axis=-1)


@pytest.mark.parametrize("method", SEARCHED_METHODS)
def test_make_trainer_without_shortcuts_every_method_learns_the_spirals(method):
    config = TrainConfig(**SPIRALS, method=method)
    if method == "irm":  # whose penalty, of 64 examples, is mostly noise
        config = dataclasses.replace(config, penalty_weight=10.0, epochs=300)
    trainer, keys = make_trainer(config), make_keys(0)
    dataset = dataset_for(config, 0)
    state = trainer.init(keys)
    for epoch in range(config.epochs):
        state, metrics = trainer.epoch(state, dataset, keys, epoch)
    assert float(metrics["test_accuracy"]) >= 0.98


@pytest.mark.parametrize("weight", [0.5, 10.0])
def test_env_loss_irm_adds_the_penalty_and_keeps_the_gradient_in_range(weight):
    config = small(method="irm")
    logits, labels = numpy_logits(config)
    slope = (logits * (1 / (1 + np.exp(-logits)) - labels)).mean(axis=-1)
    expected = cross_entropy(logits, labels) + weight * slope**2
    objectives, losses = per_env(config, weight)
    np.testing.assert_allclose(objectives, expected / max(1, weight), rtol=1e-4)
    np.testing.assert_allclose(losses, cross_entropy(logits, labels), rtol=1e-5)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_env_losses_in_one_batch_are_those_of_one_environment_at_a_time(method):
    config = small(method=method)
    state, batch = some_state(config), some_batch(config)
    shared = {
        "batch_stats": state.variables.batch_stats,
        "penalty_weight": jnp.float32(5),
    }

    def results(losses):
        def weighted(params):
            objectives, aux = losses(params, batch, **shared)
            return objectives @ jnp.arange(1.0, 1 + config.num_envs), (objectives, aux)

        return jax.jit(jax.grad(weighted, has_aux=True))(state.variables.params)

    def mapped(params, batch, **shared):
        loss = functools.partial(make_env_loss(config), **shared)
        return jax.vmap(loss, (None, 0))(params, batch)

    assert_close(results(make_env_losses(config)), results(mapped))


def test_gradients_vrex_is_that_of_mean_and_variance():
    config = small(method="vrex")
    state, batch = some_state(config), some_batch(config)
    apply = make_apply(architecture_for(config))

    def objective(variables):
        logits = apply(variables, batch.features)
        losses = optax.sigmoid_binary_cross_entropy(logits, batch.labels).mean(axis=1)
        return (losses.mean() + 10 * losses.var()) / 10

    grads, _, _ = make_gradients(config)(state, batch, jnp.float32(10))
    expected = jax.grad(objective)(state.variables).params
    assert_close(grads, expected)


def test_gradients_group_dro_weighs_the_worst_environments_more():
    config = small(method="group_dro", dro_step_size=0.5)
    state, batch = some_state(config), some_batch(config)
    logits, labels = numpy_logits(config)
    losses = cross_entropy(logits, labels)
    expected = np.exp(0.5 * losses) / np.exp(0.5 * losses).sum()
    grads, _, log_weights = make_gradients(config)(state, batch, jnp.float32(1))
    np.testing.assert_allclose(np.exp(log_weights), expected, rtol=1e-5)
    apply = make_apply(architecture_for(config))

    def objective(variables):
        logits = apply(variables, batch.features)
        losses = optax.sigmoid_binary_cross_entropy(logits, batch.labels).mean(axis=1)
        return losses @ expected.astype(np.float32)

    assert_close(grads, jax.grad(objective)(state.variables).params)
    # The weights carry over from step to step.
    _, _, again = make_gradients(config)(
        state._replace(log_weights=log_weights), batch, jnp.float32(1)
    )
    squared = expected**2 / (expected**2).sum()
    np.testing.assert_allclose(np.exp(again), squared, rtol=1e-4)


def test_epoch_penalty_counts_fully_only_after_annealing():
    """An epoch of annealing is one at weight 1, to the bit."""
    after = {}
    for name, changes in {
        "annealed": {"penalty_weight": 50.0, "penalty_annealing": 1},
        "light": {"penalty_weight": 1.0, "penalty_annealing": 0},
        "heavy": {"penalty_weight": 50.0, "penalty_annealing": 0},
    }.items():
        config = small(method="irm", **changes)
        keys, dataset = make_keys(0), dataset_for(config, 0)
        trainer = make_trainer(config)
        state, _ = trainer.epoch(trainer.init(keys), dataset, keys, 0)
        after[name] = np.concatenate([x.ravel() for x in jax.tree.leaves(state[0])])
    np.testing.assert_allclose(after["annealed"], after["light"], rtol=1e-5, atol=1e-7)
    assert np.abs(after["annealed"] - after["heavy"]).max() > 1e-3


def test_gradients_dann_reverses_only_what_reaches_the_embedding():
    def gradients(**changes):
        config = small(method="dann", **changes)
        state, batch = some_state(config), some_batch(config)
        return make_gradients(config)(state, batch, jnp.float32(1))[0]

    reversed_, neutral = gradients(reversal_scale=2.0), gradients(reversal_scale=0.0)
    config = small(method="dann")
    state, batch = some_state(config), some_batch(config)

    def domain_objective(params):
        variables = Variables(params, state.variables.batch_stats)
        apply = make_train_apply(architecture_for(config))
        # Without reversal: a scale of 1 turns the sign, a second time turns it back.
        outputs, _ = apply(variables, batch.features, jax.random.key(0), 1.0)
        picked = jax.nn.log_softmax(outputs.domain_logits)
        envs = jnp.broadcast_to(batch.env[:, None, None], (*picked.shape[:2], 1))
        return -jnp.take_along_axis(picked, envs, axis=-1).mean()

    unreversed = jax.tree.map(
        jnp.negative, jax.grad(domain_objective)(state.variables.params)["embedding"]
    )
    expected = jax.tree.map(
        lambda label, domain: label - 2.0 * domain, neutral["embedding"], unreversed
    )
    assert_close(reversed_["embedding"], expected)
    for part in ("classifier", "discriminator"):
        assert_close(reversed_[part], neutral[part])


def test_domain_loss_discriminator_trained_alone_tells_environments_apart():
    config = small(method="dann", num_envs=6, shortcut_dims=6, hidden_units=32)
    dataset = dataset_for(config, 0)
    apply = make_train_apply(architecture_for(config))
    variables = init_variables(jax.random.key(0), architecture_for(config))
    envs = jnp.arange(config.num_envs)

    def logits(discriminator, features):
        params = {**variables.params, "discriminator": discriminator}
        outputs, _ = apply(
            Variables(params, variables.batch_stats), features, jax.random.key(0), 0.0
        )
        return outputs.domain_logits

    def loss(discriminator):
        all_logits = logits(discriminator, dataset.train.features)
        return jax.vmap(domain_loss)(all_logits, envs).mean()

    optimizer = optax.adam(1e-2)
    discriminator = variables.params["discriminator"]
    opt_state = optimizer.init(discriminator)

    @jax.jit
    def step(discriminator, opt_state):
        updates, opt_state = optimizer.update(jax.grad(loss)(discriminator), opt_state)
        return optax.apply_updates(discriminator, updates), opt_state

    for _ in range(200):
        discriminator, opt_state = step(discriminator, opt_state)
    named = logits(discriminator, dataset.validation.features).argmax(axis=-1)
    assert float((named == envs[:, None]).mean()) > 0.95


def test_train_apply_batch_norm_takes_all_environments_together():
    architecture = Architecture(4, 8, 1, batch_norm=True)
    variables = init_variables(jax.random.key(0), architecture)
    features = 3 + jax.random.normal(jax.random.key(1), (5, 20, 4))
    apply = make_train_apply(architecture)
    keys = jax.random.split(jax.random.key(2), 5)
    outputs, stats = jax.vmap(
        lambda x, key: apply(variables, x, key, 0.0), axis_name=ENV_AXIS
    )(features, keys)

    kernel, bias = (
        np.asarray(variables.params["mlp"]["layers"][0][name][...])
        for name in ("kernel", "bias")
    )
    hidden = np.asarray(features) @ kernel + bias
    mean, var = hidden.mean(axis=(0, 1)), hidden.var(axis=(0, 1))
    running = stats["mlp"]["norms"][0]
    np.testing.assert_allclose(
        running["mean"][...], np.tile(0.1 * mean, (5, 1)), rtol=1e-4
    )
    np.testing.assert_allclose(
        running["var"][...], np.tile(0.9 + 0.1 * var, (5, 1)), rtol=1e-3
    )
    normal = (hidden - mean) / np.sqrt(var + 1e-5)
    active = np.where(normal > 0, normal, 0.01 * normal)
    last = variables.params["mlp"]["layers"][1]
    expected = active @ np.asarray(last["kernel"][...]) + np.asarray(last["bias"][...])
    np.testing.assert_allclose(outputs.logits, expected[..., 0], rtol=1e-3, atol=1e-4)


def test_make_apply_evaluates_with_the_running_statistics():
    architecture = Architecture(4, 8, 1, batch_norm=True, dropout=0.5)
    variables = init_variables(jax.random.key(0), architecture)
    apply = make_apply(architecture)
    features = 3 + jax.random.normal(jax.random.key(1), (20, 4))
    # One example at a time or all together: no statistics of the batch, no dropout.
    together = apply(variables, features)
    alone = np.array([apply(variables, x) for x in features])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    shifted = jax.tree.map(lambda leaf: leaf + 1, variables.batch_stats)
    other = apply(variables._replace(batch_stats=shifted), features)
    assert np.abs(np.asarray(other - together)).max() > 0.01


def test_train_apply_dropout_leaves_out_half_and_keeps_the_mean():
    plain = Architecture(4, 512, 1)
    dropped = plain._replace(dropout=0.5)
    variables = init_variables(jax.random.key(0), plain)
    features = jax.random.normal(jax.random.key(1), (4,))
    keys = jax.random.split(jax.random.key(2), 400)
    logits = jax.vmap(
        lambda key: make_train_apply(dropped)(variables, features, key, 0.0)[0].logits
    )(keys)
    expected = make_apply(plain)(variables, features)
    assert len(np.unique(np.asarray(logits))) == 400
    error = abs(float(logits.mean() - expected))
    assert error < 4 * float(logits.std()) / np.sqrt(400)


def test_epoch_dropout_differs_between_steps_and_seeds_repeat_it():
    config = small(method="erm", dropout=0.5)
    trainer, dataset = make_trainer(config), dataset_for(config, 0)

    def after(keys):
        state, _ = trainer.epoch(trainer.init(keys), dataset, keys, 0)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.variables)])

    keys = make_keys(0)
    np.testing.assert_array_equal(after(keys), after(keys))
    other = keys._replace(dropout=jax.random.key(9))
    assert np.abs(after(keys) - after(other)).max() > 1e-3


def test_epoch_every_environment_and_step_has_a_dropout_key_of_its_own(monkeypatch):
    config = small(method="erm", dropout=0.25)
    seen = []

    def recording(config):
        apply = make_train_apply(architecture_for(config))

        def loss(params, batch, *, batch_stats, penalty_weight):
            data = jax.random.key_data(batch.dropout_key)
            jax.debug.callback(lambda key: seen.append(tuple(key.tolist())), data)
            variables = Variables(params, batch_stats)
            outputs, stats = apply(variables, batch.features, batch.dropout_key, 0.0)
            value = outputs.logits.mean()
            return value, training.Aux(value, stats)

        return loss

    monkeypatch.setattr(training, "make_env_loss", recording)
    trainer = training._make_trainer.__wrapped__(config)
    keys, dataset = make_keys(0), dataset_for(config, 0)
    state = trainer.init(keys)
    for epoch in range(2):
        state, _ = trainer.epoch(state, dataset, keys, epoch)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(seen) == 2 * config.steps_per_epoch * config.num_envs
    assert len(set(seen)) == len(seen)


def test_epoch_running_statistics_carry_over_from_step_to_step():
    config = small(method="erm", batch_norm=True, learning_rate=1e-12)
    trainer, keys = make_trainer(config), make_keys(0)
    dataset = dataset_for(config, 0)
    state = trainer.init(keys)
    apply = make_train_apply(architecture_for(config))
    rows = training.epoch_order(jax.random.fold_in(keys.batches, 0), config)
    variables = state.variables
    for step_rows in rows:  # parameters stand still at this learning rate
        features = jax.vmap(lambda x, r: x[r])(dataset.train.features, step_rows)
        _, stats = jax.vmap(
            lambda x, v=variables: apply(v, x, jax.random.key(0), 0.0),
            axis_name=ENV_AXIS,
        )(features)
        variables = variables._replace(
            batch_stats=jax.tree.map(lambda leaf: leaf[0], stats)
        )
    state, _ = trainer.epoch(state, dataset, keys, 0)
    assert len(rows) > 1
    assert_close(state.variables.batch_stats, variables.batch_stats)


def test_state_of_plain_methods_keeps_equal_weights():
    config = small(method="erm")
    keys, dataset = make_keys(0), dataset_for(config, 0)
    trainer = make_trainer(config)
    state, _ = trainer.epoch(trainer.init(keys), dataset, keys, 0)
    np.testing.assert_array_equal(state.log_weights, 0)


def assert_close(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_some_batch_is_a_batch_of_the_training_split():
    config = small()
    batch = some_batch(config)
    split = dataset_for(config, 0).train
    assert isinstance(split, Split)
    np.testing.assert_array_equal(batch.features, split.features[:, :32])
