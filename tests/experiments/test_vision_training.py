"""Training of the vision experiment: the mask, the schedule, metrics, resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from experiments.common.run_dir import RunDir
from experiments.vision import training
from experiments.vision.config import SMOKE, Settings, TrainConfig
from experiments.vision.data import DataError, load, redraw_labels
from experiments.vision.model import LAYERS, NORMS, Architecture, make_apply
from experiments.vision.training import (
    METRICS,
    apply_mask,
    dataset_for,
    epoch_order,
    evaluate,
    make_keys,
    make_optimizer,
    make_trainer,
    rates_at,
    train,
)
from tests._asserts import assert_trees_close, assert_trees_equal, field_of
from tests.zoo.blocks import floats

CONFIG = TrainConfig(**SMOKE, redrawn=0.5, threshold=0.2, learning_rate=1e-3)
PLAIN = dataclasses.replace(CONFIG, threshold=0.0)


@pytest.fixture(scope="module")
def images():
    return load("generated", None, CONFIG.train_examples, CONFIG.test_examples)


def initial_variables():
    return make_trainer(CONFIG, 1).init(make_keys(0).model).variables


evaluate_compiled = jax.jit(evaluate, static_argnums=0)


def run_one(config, images, epochs=1, **options):
    trainer = make_trainer(config, 1, **options)
    dataset, keys = dataset_for(config, images), make_keys(config.seed)
    state = trainer.init(keys.model)
    for index in range(epochs):
        rates = rates_at(config, index)
        state, metrics = trainer.epoch(state, dataset, keys.batches, index, rates)
    return state, metrics


def test_rates_at_learning_rate_falls_to_a_tenth_after_each_drop():
    config = TrainConfig(drops=(40, 60), learning_rate=5e-4, threshold=0.2)
    rates = [rates_at(config, index).learning_rate for index in (0, 39, 40, 59, 60)]
    np.testing.assert_allclose(rates, [5e-4, 5e-4, 5e-5, 5e-5, 5e-6], rtol=1e-5)
    assert rates_at(config, 79).threshold == jnp.float32(0.2)


def test_epoch_order_is_a_permutation_less_the_incomplete_batch():
    order = epoch_order(jax.random.key(0), 25, 6)
    assert order.shape == (4, 6)
    assert len(np.unique(order)) == 24
    assert order.min() >= 0
    assert order.max() < 25


def test_dataset_for_redraws_labels_by_the_seed_and_keeps_bytes(images):
    dataset = dataset_for(CONFIG, images)
    assert dataset.train.images.dtype == jnp.uint8
    np.testing.assert_array_equal(dataset.train.true, images.train.labels)
    given, _ = redraw_labels(make_keys(0).labels, dataset.train.true, 0.5)
    np.testing.assert_array_equal(dataset.train.given, given)
    np.testing.assert_array_equal(dataset.test.given, dataset.test.true)
    other = dataset_for(dataclasses.replace(CONFIG, seed=1), images)
    assert (other.train.given != given).any()


def test_dataset_for_less_than_a_batch_is_refused(images):
    config = dataclasses.replace(CONFIG, train_examples=None, batch_size=81)
    with pytest.raises(DataError, match=r"batch_size must be at most 80, .* got 81"):
        dataset_for(config, images)


def stats_like_parameters():
    """Votes of 8 examples for a network's parameters, and where they agree."""
    params = initial_variables().params
    rng = np.random.default_rng(0)
    stacked = jax.tree.map(
        lambda leaf: floats(rng.normal(size=(8, *leaf.shape))), params
    )

    def stats(leaf):
        mean, votes = np.mean(leaf, 0), np.sign(leaf).sum(0)
        return hardvary.GradStats(
            jnp.asarray(mean), jnp.asarray(votes), num_envs=jnp.float32(8)
        )

    return stacked, jax.tree.map(stats, stacked)


@pytest.mark.parametrize("rescale", [True, False])
def test_apply_mask_is_the_librarys_mask_and_reports_layers(rescale):
    stacked, stats = stats_like_parameters()
    config = dataclasses.replace(CONFIG, rescale=rescale)
    updates, kept = jax.jit(apply_mask, static_argnums=0)(config, 0.5, stats)
    mask = hardvary.and_mask(0.5, rescale=rescale)
    expected, state = jax.jit(mask.update)(stacked, mask.init(stacked))
    assert_trees_close(updates, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(kept.overall, state.kept_fraction, rtol=1e-6)
    assert set(kept.layers) == {*LAYERS, NORMS}
    votes = field_of(stats, "sign_sum")
    layer2 = np.abs(votes["layer2"]["conv"]["kernel"][...]) >= 4
    np.testing.assert_allclose(kept.layers["layer2"], layer2.mean(), rtol=1e-6)
    norms = [
        np.abs(leaf).ravel() >= 4
        for path, leaf in jax.tree_util.tree_leaves_with_path(votes)
        if training.layer_of(path) == NORMS
    ]
    share = np.concatenate(norms).mean()
    np.testing.assert_allclose(kept.layers[NORMS], share, rtol=1e-6)


@pytest.mark.parametrize("order", ["coupled", "decoupled"])
def test_make_optimizer_decays_before_or_after_the_moments(order):
    settings = Settings(weight_decay=0.1, decay_order=order)
    tx, param, grad = make_optimizer(settings), jnp.float32(2.0), jnp.float32(0.5)
    direction, _ = tx.update(grad, tx.init(param), param)
    # The first direction of Adam is the sign of what it gets.
    expected = 1.0 if order == "coupled" else 1.0 + 0.1 * 2.0
    np.testing.assert_allclose(direction, expected, rtol=1e-5)


def test_epoch_of_plain_training_is_adam_on_the_mean_loss(images):
    """Against optax.adamw and a loop over batches, from outside."""
    config = PLAIN
    state, metrics = run_one(config, images)
    keys, dataset = make_keys(0), dataset_for(config, images)
    apply = training.make_train_apply(Architecture(1, config.width))
    decay = optax.add_decayed_weights(1e-6)
    tx = optax.chain(decay, optax.adam(config.learning_rate))
    variables = initial_variables()

    def loss_fn(params, stats, rows):
        tree = training.Variables(params, stats)
        logits, stats = apply(tree, dataset.train.images[rows])
        log_probs = jax.nn.log_softmax(logits)
        return -log_probs[jnp.arange(20), dataset.train.given[rows]].mean(), stats

    @jax.jit
    def step(params, stats, opt_state, rows):
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), grads = value_and_grad(params, stats, rows)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    params, stats = variables
    opt_state, losses = tx.init(params), []
    order = jax.random.permutation(jax.random.fold_in(keys.batches, 0), 80)
    for rows in order.reshape(4, 20):
        params, stats, opt_state, loss = step(params, stats, opt_state, rows)
        losses.append(loss)
    # Adam's first steps are signs, which rounding may turn: a few learning rates.
    assert_trees_close(state.variables.params, params, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["running_loss"], np.mean(losses), rtol=1e-4)
    assert metrics["kept_fraction"] == 1.0


def test_epoch_in_one_piece_is_the_epoch_by_steps(images):
    _, by_steps = run_one(PLAIN, images)
    _, in_one = run_one(PLAIN, images, in_one_piece=True)
    assert set(by_steps) == set(METRICS)
    assert_trees_close(in_one, by_steps, rtol=1e-2, atol=1e-3)


def test_make_trainer_is_shared_by_thresholds_rates_labels_and_seeds():
    changes = {"threshold": 0.8, "learning_rate": 1.0, "redrawn": 1.0, "seed": 5}
    other = dataclasses.replace(CONFIG, **changes, epochs=9, drops=(3,))
    assert make_trainer(other, 1) is make_trainer(CONFIG, 1)
    assert make_trainer(PLAIN, 1) is not make_trainer(CONFIG, 1)


def test_evaluate_counts_each_part_of_the_training_set(images):
    dataset = dataset_for(CONFIG, images)
    variables = initial_variables()
    architecture = Architecture(1, CONFIG.width)
    metrics = evaluate_compiled(architecture, variables, dataset)
    apply = jax.jit(make_apply(architecture))
    train, test = dataset
    logits = apply(variables, train.images)
    predicted, wrong = logits.argmax(-1), train.given != train.true
    assert 0 < wrong.sum() < len(wrong)
    tested = apply(variables, test.images).argmax(-1)
    log_probs = jax.nn.log_softmax(logits)
    expected = {
        "train_accuracy": (predicted == train.given).mean(),
        "train_loss": -log_probs[jnp.arange(80), train.given].mean(),
        "mislabelled_given_accuracy": (predicted == train.given)[wrong].mean(),
        "mislabelled_true_accuracy": (predicted == train.true)[wrong].mean(),
        "correct_accuracy": (predicted == train.true)[~wrong].mean(),
        "test_accuracy": (tested == test.true).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_evaluate_nothing_mislabelled_is_nan(images):
    dataset = dataset_for(dataclasses.replace(CONFIG, redrawn=0.0), images)
    variables = initial_variables()
    architecture = Architecture(1, CONFIG.width)
    metrics = evaluate_compiled(architecture, variables, dataset)
    assert jnp.isnan(metrics["mislabelled_given_accuracy"])
    assert jnp.isfinite(metrics["correct_accuracy"])


def test_train_killed_between_epochs_ends_bit_identical(images, tmp_path, monkeypatch):
    def run(name):
        return RunDir(tmp_path / name, "vision train", CONFIG)

    with run("undisturbed") as undisturbed:
        train(CONFIG, undisturbed, images, quiet=True)
    trainer = make_trainer(CONFIG, 1)

    def killed(state, dataset, key, index, rates):
        if index == 1:
            raise RuntimeError("killed")
        return trainer.epoch(state, dataset, key, index, rates)

    with monkeypatch.context() as patch, run("killed") as first:
        patch.setattr(
            training, "make_trainer", lambda *_: trainer._replace(epoch=killed)
        )
        with pytest.raises(RuntimeError, match="killed"):
            train(CONFIG, first, images, quiet=True)
    with run("killed") as second:
        history = train(CONFIG, second, images, quiet=True)
    assert [row["epoch"] for row in history] == [1, 2]
    assert list(history[0]) == ["epoch", *METRICS]
    rows = [
        (tmp_path / n / "metrics.csv").read_bytes() for n in ("killed", "undisturbed")
    ]
    assert rows[0] == rows[1]


def test_train_learns_what_is_there_to_learn(images):
    config = dataclasses.replace(PLAIN, redrawn=0.0, drops=(), learning_rate=1e-2)
    _, metrics = run_one(config, images, epochs=12)
    assert metrics["test_accuracy"] > 0.7
    assert metrics["train_accuracy"] > 0.9


def test_whole_state_is_finite_with_a_mask_that_nothing_passes(images):
    config = dataclasses.replace(CONFIG, threshold=1.0, batch_size=20)
    state, metrics = run_one(config, images)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert metrics["kept_fraction"] < 0.05


def test_same_seed_same_result(images):
    first, second = run_one(CONFIG, images), run_one(CONFIG, images)
    assert_trees_equal(first, second)
