import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.synthetic.config import (
    GRAMIAN_RULES,
    MASKS,
    METHODS,
    PRESETS,
    SEARCHED_METHODS,
    TrainConfig,
)
from experiments.synthetic.data import (
    HELD_OUT_ENVS,
    HELD_OUT_EXAMPLES,
    TEST_EXAMPLES,
    VALIDATION_EXAMPLES,
)
from experiments.synthetic.model import (
    Architecture,
    init_variables,
    make_apply,
)
from experiments.synthetic.training import (
    EVALUATED,
    METRICS,
    apply_for,
    dataset_for,
    epoch_order,
    fitted,
    make_keys,
    make_optimizer,
    make_schedule,
    make_trainer,
)

# Spelled out, so that the tests do not depend on the recipe; a layer less to compile.
SMOKE = {
    **PRESETS["smoke"],
    "hidden_layers": 1,
    "learning_rate": 1e-2,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "threshold": 1.0,
    "rescale": True,
    "l2": 1e-3,
}


def config(**changes):
    return TrainConfig(**{**SMOKE, **changes})


def run(config, epochs=2):
    """State and metrics after some epochs, without a run directory."""
    trainer, keys = make_trainer(config), make_keys(config.seed)
    dataset = dataset_for(config, config.seed)
    state = trainer.init(keys)
    for epoch in range(epochs):
        state, metrics = trainer.epoch(state, dataset, keys, epoch)
    return state, metrics


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_trees_close(first, second, **tolerance):
    for a, b in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def dense_layers(variables, name="mlp"):
    """Kernel and bias of every layer."""
    layers = variables.params[name]["layers"]
    return [
        (np.asarray(layers[i]["kernel"][...]), np.asarray(layers[i]["bias"][...]))
        for i in range(len(layers))
    ]


def test_init_variables_follows_the_authors_initialisation():
    variables = init_variables(jax.random.key(0), Architecture(20, 256, 3))
    layers = dense_layers(variables)
    assert len(layers) == 4
    for (weights, bias), fan_in in zip(layers, (20, 256, 256, 256), strict=True):
        assert weights.shape[0] == fan_in
        deviation = np.sqrt(2 / fan_in)
        assert abs(weights.std() / deviation - 1) < 4 / np.sqrt(2 * weights.size)
        assert (bias == np.float32(0.01)).all()
    # Not truncated: some of 65536 normal numbers lie beyond three deviations.
    assert np.abs(layers[1][0]).max() > 3 * np.sqrt(2 / 256)
    assert not jax.tree.leaves(variables.batch_stats)


def test_make_apply_is_an_mlp_with_leaky_relu():
    architecture = Architecture(3, 8, 2)
    variables = init_variables(jax.random.key(1), architecture)
    features = jax.random.normal(jax.random.key(2), (5, 4, 3))
    expected = np.asarray(features)
    for i, (weights, bias) in enumerate(dense_layers(variables)):
        expected = expected @ weights + bias
        if i < 2:
            expected = np.where(expected > 0, expected, 0.01 * expected)
    logits = make_apply(architecture)(variables, features)
    assert logits.shape == (5, 4)
    np.testing.assert_allclose(logits, expected[..., 0], rtol=1e-4, atol=1e-5)


def test_make_keys_are_independent_and_reproducible():
    keys = [tuple(jax.random.key_data(k).tolist()) for k in make_keys(3)]
    again = [tuple(jax.random.key_data(k).tolist()) for k in make_keys(3)]
    assert keys == again
    assert len({*keys, tuple(jax.random.key_data(make_keys(4).data).tolist())}) == 6


def test_epoch_order_shuffles_every_environment_on_its_own():
    order = np.asarray(epoch_order(jax.random.key(0), config(batch_size=30)))
    assert order.shape == (2, 4, 30)
    per_env = order.swapaxes(0, 1).reshape(4, -1)
    for row in per_env:
        assert len(set(row)) == 60
        assert set(row) <= set(range(64))
    assert len({tuple(row) for row in per_env}) == 4
    other = np.asarray(epoch_order(jax.random.key(1), config(batch_size=30)))
    assert (order != other).any()


def test_make_schedule_step_drops_at_half_and_three_quarters():
    schedule = make_schedule(config(epochs=8, learning_rate=0.1))
    rates = [float(schedule(epoch * 2)) for epoch in range(8)]
    np.testing.assert_allclose(rates, [0.1] * 4 + [0.01] * 2 + [0.001] * 2, rtol=1e-5)


def test_make_schedule_others_do_what_they_say():
    constant = make_schedule(config(schedule="constant", learning_rate=0.1))
    cosine = make_schedule(config(schedule="cosine", epochs=8, learning_rate=0.1))
    assert float(constant(0)) == float(constant(1000)) == pytest.approx(0.1)
    assert float(cosine(0)) == pytest.approx(0.1)
    assert float(cosine(8)) == pytest.approx(0.05)
    assert float(cosine(16)) == pytest.approx(0)


@pytest.mark.parametrize("extras", [{}, {"batch_norm": True, "dropout": 0.5}], ids=str)
@pytest.mark.parametrize("method", SEARCHED_METHODS)
def test_epoch_reports_every_metric_in_its_range(method, extras):
    _, metrics = run(config(method=method, threshold=0.5, **extras))
    assert set(metrics) == set(METRICS)
    for name in METRICS:
        if name.endswith("_accuracy"):
            assert 0 <= float(metrics[name]) <= 1
    if method in MASKS:
        assert 0 < float(metrics["kept_fraction"]) < 1
    else:
        assert float(metrics["kept_fraction"]) == 1
    assert float(metrics["loss"]) > 0
    assert float(metrics["learning_rate"]) == pytest.approx(0.01)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(SEARCHED_METHODS)))
def test_epoch_every_rule_moves_a_network_and_keeps_it_finite(method):
    c = config(method=method, threshold=0.5, hidden_units=4, l2=0.0)
    before = make_trainer(c).init(make_keys(0)).variables
    state, metrics = run(c, epochs=1)
    for old, new in zip(leaves(before), leaves(state.variables), strict=True):
        assert np.isfinite(new).all()
        assert (new != old).any()
    kept = float(metrics["kept_fraction"])
    assert kept == 1 if method in GRAMIAN_RULES else 0 < kept <= 1


def test_epoch_random_rules_draw_by_the_seed_of_the_run():
    c = config(method="grad_drop", hidden_units=4)
    trainer, dataset, keys = make_trainer(c), dataset_for(c, 0), make_keys(0)

    def after(keys):
        state, _ = trainer.epoch(trainer.init(keys), dataset, keys, 0)
        return np.concatenate([leaf.ravel() for leaf in leaves(state.variables)])

    np.testing.assert_array_equal(after(keys), after(keys))
    other = keys._replace(draws=make_keys(1).draws)
    assert (after(keys) != after(other)).any()


def test_epoch_accuracies_are_those_of_the_splits():
    c = config(method="erm", examples_per_env=EVALUATED + 32)
    state, metrics = run(c, epochs=3)
    dataset, apply = dataset_for(c, c.seed), apply_for(c)
    for name, size in (
        ("train", 4 * EVALUATED),
        ("validation", 4 * VALIDATION_EXAMPLES),
        ("held_out", HELD_OUT_ENVS * HELD_OUT_EXAMPLES),
        ("test", TEST_EXAMPLES),
    ):
        split = getattr(dataset, name)
        if name == "train":
            split = jax.tree.map(lambda leaf: leaf[:, :EVALUATED], split)
        logits = np.asarray(apply(state.variables, split.features))
        right = (logits > 0) == np.asarray(split.labels)
        assert right.size == size
        assert float(metrics[f"{name}_accuracy"]) == pytest.approx(
            right.mean(), abs=1e-6
        )
    logits = apply(state.variables, dataset.validation.features)
    losses = optax.sigmoid_binary_cross_entropy(logits, dataset.validation.labels)
    assert float(metrics["validation_loss"]) == pytest.approx(
        float(losses.mean()), rel=1e-5
    )


def test_epoch_erm_is_plain_training_on_all_environments():
    c = config(method="erm", l2=1e-2)
    state, _ = run(c, epochs=2)

    dataset, apply, keys = dataset_for(c, 0), apply_for(c), make_keys(0)
    params = make_trainer(c).init(keys).variables
    plain = optax.chain(
        optax.add_decayed_weights(1e-2), optax.adam(optax.constant_schedule(1e-2))
    )
    opt_state = plain.init(params)

    @jax.jit
    def step(params, opt_state, features, labels):
        def loss(params):
            logits = apply(params, features)
            return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

        updates, opt_state = plain.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for epoch in range(2):
        for rows in epoch_order(jax.random.fold_in(keys.batches, epoch), c):
            index = np.arange(4)[:, None], np.asarray(rows)
            features = dataset.train.features[index].reshape(-1, 6)
            labels = dataset.train.labels[index].reshape(-1)
            params, opt_state = step(params, opt_state, features, labels)
    assert_trees_close(state.variables, params, rtol=1e-3, atol=1e-5)


def test_epoch_and_mask_at_threshold_zero_is_erm():
    erm, _ = run(config(method="erm"))
    masked, _ = run(config(method="and_mask", threshold=0.0))
    assert_trees_close(erm.variables, masked.variables, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("oracle", "extras"),
    [
        ("scan", {}),
        ("vmap", {}),
        ("vmap", {"method": "upgrad"}),
        ("vmap", {"method": "upgrad", "batch_norm": True}),
    ],
    ids=str,
)
def test_epoch_oracle_changes_nothing_but_speed(oracle, extras):
    # Adam would blow rounding differences up to whole steps.
    plain = {"optimizer": "sgd", "threshold": 0.5, **extras}
    reference, _ = run(config(**plain), epochs=1)
    other, _ = run(config(**plain, oracle=oracle), epochs=1)
    assert_trees_close(reference.variables, other.variables, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "geometric_mean"},
        {"method": "sand_mask", "threshold": 0.5},
        {"threshold": 0.5},
        {"rescale": False},
        {"max_rescale": 1.1},
        {"l2": 0.1},
        {"l1": 0.1},
        {"weight_decay": 0.1},
        {"optimizer": "sgd"},
        {"b1": 0.5},
        {"b2": 0.9},
        {"eps": 0.1},
        {"learning_rate": 0.1},
        {"schedule": "cosine"},
    ],
    ids=str,
)
def test_make_optimizer_every_setting_has_an_effect(change):
    assert (two_updates(config()) != two_updates(config(**change))).any()


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("cagrad", {"cagrad_c": 0.1}),
        ("fairgrad", {"fairgrad_alpha": 1.0}),
        ("grad_vac", {"grad_vac_beta": 0.5}),
        ("clip_env_norms", {"max_norm": 8.0}),
    ],
    ids=str,
)
def test_make_optimizer_own_settings_of_a_rule_have_an_effect(method, change):
    own = two_updates(config(method=method, **change))
    assert (two_updates(config(method=method)) != own).any()


def two_updates(config):
    """The second of two different updates, for gradients of four environments."""
    params = jax.random.normal(jax.random.key(0), (50,))
    grads = jax.random.normal(jax.random.key(1), (2, 4, 50)) + 0.5
    optimizer = make_optimizer(config, jax.random.key(0))
    state = optimizer.init(params)
    for stacked in grads:
        updates, state = optimizer.update(stacked, state, params)
    return np.asarray(updates)


def test_make_optimizer_weight_decay_also_shrinks_masked_weights():
    c = config(weight_decay=0.5, l2=0.0, optimizer="sgd", learning_rate=0.1)
    optimizer = make_optimizer(c, jax.random.key(0))
    params = {"w": jnp.array([2.0, -4.0])}
    opposed = {"w": jnp.array([[1.0, -1.0], [-1.0, 1.0]])}
    updates, _ = optimizer.update(opposed, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1, 0.2], rtol=1e-6)


def test_fitted_wants_the_last_epochs_in_a_row():
    history = [{"train_accuracy": value} for value in (1.0, 0.99, 1.0, 0.996)]
    wanted = {0: False, 1: True, 2: True, 3: False, 4: False, 5: False}
    assert {n: fitted(history, n) for n in wanted} == wanted
    assert not fitted([], 1)
    assert not fitted([{"train_accuracy": 0.995}], 1)


def test_make_trainer_compiles_once_for_all_epochs_and_seeds():
    c = config(hidden_units=9)  # a setting that no other test uses
    trainer = make_trainer(c)
    for seed in (0, 1, 2):
        seeded = dataclasses.replace(c, seed=seed, checkpoint_every=seed + 1)
        assert make_trainer(seeded) is trainer
        run(seeded, epochs=3)
    assert trainer.epoch._cache_size() == 1
    assert trainer.init._cache_size() == 1


def test_run_same_seed_gives_the_same_bits():
    (first, a), (second, b) = run(config(seed=5)), run(config(seed=5))
    for x, y in zip(leaves((first, a)), leaves((second, b)), strict=True):
        np.testing.assert_array_equal(x, y)
