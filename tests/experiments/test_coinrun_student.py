"""Students: the losses, the optimizers, the loop, and what a run leaves behind."""

import csv
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import hardvary
from experiments.coinrun.__main__ import COMMANDS
from experiments.coinrun.dataset import DataError, Dataset, States, generate
from experiments.coinrun.expert.policy import Architecture, init_params
from experiments.coinrun.expert.saved import Expert, save_expert
from experiments.coinrun.game import EVALUATION_LEVELS, Turn
from experiments.coinrun.student import training as student
from experiments.coinrun.student.commands import (
    Recorder,
    format_training,
    load_student,
)
from experiments.coinrun.student.config import (
    DATASET_PRESETS,
    PLAY_PRESETS,
    SEARCH_PRESETS,
    TRAIN_PRESETS,
    PlayConfig,
    SearchConfig,
    Settings,
    TrainConfig,
)
from experiments.coinrun.student.resnet import Variables, make_apply, make_train_apply
from experiments.coinrun.student.training import (
    METRICS,
    Rates,
    constant_kl,
    epoch_order,
    evaluate,
    kl_divergence,
    make_keys,
    make_optimizer,
    make_trainer,
    on_device,
    rates_at,
    train,
)
from experiments.common.cli import main
from experiments.common.run_dir import RunDir
from tests._asserts import assert_trees_close, assert_trees_equal
from tests.experiments._game import needs_game
from tests.zoo.blocks import floats

ADAM = dataclasses.replace(
    TRAIN_PRESETS["smoke"],
    method="adam",
    learning_rate=3e-3,
    b1=0.9,
    weight_decay=0.01,
)
MASKED = dataclasses.replace(ADAM, method="and_mask", threshold=0.3)


def open_fraction(opt_state):
    return optax.tree.get(opt_state, "kept_fraction")


def coinrun(*arguments):
    arguments = list(map(str, arguments))
    return main("python -m experiments.coinrun", COMMANDS, arguments)


@pytest.fixture(scope="module")
def data():
    return generate(DATASET_PRESETS["smoke"])


def run_one(config, data, epochs=None, **options):
    trainer, keys = make_trainer(config, config.method, **options), make_keys(0)
    dataset, state = on_device(data), trainer.init(keys.model)
    for index in range(epochs or config.epochs):
        rates = rates_at(config, index)
        state, metrics = trainer.epoch(state, dataset, keys.batches, index, rates)
    return state, metrics


def test_kl_divergence_is_its_definition_and_zero_targets_are_no_matter():
    targets = np.array([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    logits = np.array([[1.0, 2.0, -3.0], [0.0, 0.0, 0.0]])
    student = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = [
        sum(p * math.log(p / q) for p, q in zip(*rows, strict=True) if p > 0)
        for rows in zip(targets, student, strict=True)
    ]
    kl = kl_divergence(jnp.asarray(targets), jnp.asarray(logits))
    np.testing.assert_allclose(kl, expected, rtol=1e-5)
    same = kl_divergence(jnp.asarray(targets), jnp.log(jnp.asarray(targets) + 1e-30))
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_constant_kl_is_the_least_of_all_constants():
    rng = np.random.default_rng(0)
    targets = rng.dirichlet(np.full(15, 0.3), 40).astype(np.float32)
    least = constant_kl(targets)
    logits = jnp.log(targets.mean(0))

    def mean_kl(logits):
        return kl_divergence(targets, logits[None]).mean()

    np.testing.assert_allclose(mean_kl(logits), least, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(mean_kl)(logits), 0, atol=1e-5)
    never = targets.copy()
    never[:, 3] = 0
    never /= never.sum(1, keepdims=True)
    expected = constant_kl(np.delete(never, 3, axis=1))
    np.testing.assert_allclose(constant_kl(never), expected, rtol=1e-5)
    # Convex in the logits, so that a point without gradient is the minimum.
    for _ in range(5):
        assert mean_kl(logits + rng.normal(size=15)) > least


def test_epoch_order_has_every_level_once_and_no_state_twice():
    levels, rows = epoch_order(jax.random.key(0), 8, 16, 10)
    assert sorted(levels.tolist()) == list(range(8))
    assert rows.shape == (8, 10)
    for row in rows:
        assert len(set(row.tolist())) == 10
    assert rows.min() >= 0
    assert rows.max() <= 15
    assert len({tuple(row.tolist()) for row in rows}) == 8
    others, _ = epoch_order(jax.random.key(1), 8, 16, 10)
    assert others.tolist() != levels.tolist()


def test_rates_at_learning_rate_falls_to_a_tenth_at_half_and_three_quarters():
    config = dataclasses.replace(ADAM, epochs=30, decay="coupled")
    rates = [rates_at(config, index) for index in (0, 14, 15, 22, 23, 29)]
    np.testing.assert_allclose(
        [rate.learning_rate for rate in rates],
        [3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5],
        rtol=1e-5,
    )
    assert rates[0].coupled_decay == jnp.float32(0.01)
    assert rates[0].decoupled_decay == 0
    off = rates_at(dataclasses.replace(config, decay="off"), 0)
    assert off.coupled_decay == off.decoupled_decay == 0


@pytest.mark.parametrize(
    ("epochs", "shares"), [(1, [1]), (2, [1, 0.1]), (4, [1, 1, 0.1, 0.01])]
)
def test_rates_at_short_training_begins_with_the_whole_rate(epochs, shares):
    config = dataclasses.replace(ADAM, epochs=epochs)
    rates = [rates_at(config, index).learning_rate for index in range(epochs)]
    np.testing.assert_allclose(rates, 3e-3 * np.array(shares), rtol=1e-5)


def rates(**changes):
    values = Rates(1e-2, 0.5, 0.9, 0.5, 0.6, 1e-8, 0.0, 0.0)._replace(**changes)
    return Rates(*map(jnp.float32, values))


def test_make_optimizer_coupled_decay_votes_and_decoupled_does_not():
    params, grads = jnp.array([2.0, 2.0]), jnp.array([1.0, 0.0])

    def after_two(decays):
        tx = make_optimizer("and_mask", rates(**decays))
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        return updates, open_fraction(state)

    updates, share = after_two({})
    np.testing.assert_allclose(updates, [-1e-2, 0], rtol=1e-4)
    assert share == 0.5
    # The weight without a gradient decays by rate * strength * weight.
    updates, share = after_two({"decoupled_decay": 0.1})
    np.testing.assert_allclose(updates, [-1e-2 - 2e-3, -2e-3], rtol=1e-4)
    assert share == 0.5
    # The decay is a gradient that never changes its sign: Adam's step, and open.
    updates, share = after_two({"coupled_decay": 0.1})
    np.testing.assert_allclose(updates, [-1e-2, -1e-2], rtol=1e-4)
    assert share == 1


def test_open_fraction_counts_what_the_library_lets_pass():
    rng = np.random.default_rng(0)
    params = {"a": jnp.ones(50), "b": jnp.ones((30, 5))}
    tx = make_optimizer("and_mask", rates(threshold=0.75))
    state = tx.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda leaf: floats(rng.normal(size=leaf.shape)), params)
        updates, state = tx.update(grads, state, params)
    passed = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(updates))
    assert 0 < passed < 200
    # 0.75 is what two agreeing steps at the end come to: exactly on the threshold.
    np.testing.assert_allclose(open_fraction(state), passed / 200)


@pytest.mark.parametrize("decay", ["decoupled", "coupled"])
def test_and_mask_at_threshold_0_trains_bit_identically_to_adamw(decay, data):
    changes = {"decay": decay, "threshold": 0.0}
    adam, adam_metrics = run_one(dataclasses.replace(ADAM, **changes), data)
    masked, metrics = run_one(dataclasses.replace(MASKED, **changes), data)
    assert_trees_equal(masked.variables, adam.variables)
    assert_trees_equal(metrics, adam_metrics)
    assert optax.tree.get(masked.opt_state, "sign_ema")


def test_epoch_is_the_optimizer_on_one_level_after_another(data):
    """Against the library with plain numbers, in a loop from outside."""
    # With so large an eps a step is no sign, which rounding might turn.
    config = dataclasses.replace(MASKED, eps=1e-2)
    state, metrics = run_one(config, data, epochs=1)
    keys, dataset = make_keys(0), on_device(data)
    architecture = student.architecture_for(config)
    apply = make_train_apply(architecture)
    tx = hardvary.temporal_and_mask_adam(
        3e-3, 0.9, 0.999, 0.79, 0.3, 1e-2, weight_decay=0.01
    )
    params, stats = make_trainer(config, "and_mask").init(keys.model).variables
    opt_state, losses, shares = tx.init(params), [], []

    @jax.jit
    def step(params, stats, opt_state, images, targets):
        def loss_fn(params):
            logits, new = apply(Variables(params, stats), images)
            logs = jax.nn.log_softmax(logits)
            return (targets * (jnp.log(targets) - logs)).sum(-1).mean(), new

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    levels, rows = epoch_order(jax.random.fold_in(keys.batches, 0), 8, 16, 8)
    for level, chosen in zip(levels, rows, strict=True):
        images = dataset.train.images[level][chosen]
        targets = dataset.train.probabilities[level][chosen]
        params, stats, opt_state, loss = step(params, stats, opt_state, images, targets)
        losses.append(loss)
        shares.append(open_fraction(opt_state))
    start = make_trainer(config, "and_mask").init(keys.model).variables.params
    moved = max(
        float(abs(a - b).max())
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)
    )
    assert moved > 1e-3
    assert_trees_close(state.variables.params, params, rtol=0, atol=1e-2 * moved)
    np.testing.assert_allclose(metrics["running_kl"], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(metrics["open_fraction"], np.mean(shares), rtol=2e-2)


def test_epoch_in_one_piece_is_the_epoch_by_steps(data):
    config = dataclasses.replace(ADAM, eps=1e-2)
    _, by_steps = run_one(config, data, epochs=1, in_one_piece=False)
    _, in_one = run_one(config, data, epochs=1, in_one_piece=True)
    assert set(by_steps) == set(in_one) == set(METRICS)
    assert_trees_close(in_one, by_steps, rtol=1e-3, atol=1e-4)


def test_evaluate_is_in_evaluation_mode_on_the_first_states(data):
    trainer, dataset = make_trainer(ADAM, "adam"), on_device(data)
    architecture = student.architecture_for(ADAM)
    variables = trainer.init(make_keys(0).model).variables
    compiled = jax.jit(evaluate, static_argnums=(0, 3))
    metrics = compiled(architecture, variables, dataset, 4)
    apply = jax.jit(make_apply(architecture))
    for part, states in (
        ("train", jax.tree.map(lambda leaf: leaf[:, :4], dataset.train)),
        ("test", dataset.test),
    ):
        images = states.images.reshape(-1, 32, 32, 3)
        targets = states.probabilities.reshape(-1, 15)
        logits = apply(variables, images)
        np.testing.assert_allclose(
            metrics[f"{part}_kl"], kl_divergence(targets, logits).mean(), rtol=1e-4
        )
        agree = (logits.argmax(1) == targets.argmax(1)).mean()
        np.testing.assert_allclose(metrics[f"{part}_accuracy"], agree, rtol=1e-6)


def test_make_trainer_is_shared_by_rates_and_seeds():
    changes = {"learning_rate": 1.0, "b1": 0.1, "threshold": 0.9, "decay": "off"}
    other = dataclasses.replace(MASKED, **changes, seed=5, epochs=9, eps=1.0, b3=0.1)
    assert make_trainer(other, "and_mask") is make_trainer(MASKED, "and_mask")
    assert make_trainer(ADAM, "adam") is not make_trainer(MASKED, "and_mask")


@pytest.mark.parametrize("method", ["adam", "and_mask"])
def test_train_tiny_subset_is_overfitted_to_a_kl_near_0(method, data):
    few = Dataset(
        States(*(leaf[:1, :8] for leaf in data.train)),
        States(*(leaf[:1] for leaf in data.test)),
    )
    config = dataclasses.replace(
        ADAM if method == "adam" else MASKED,
        epochs=100,
        learning_rate=2e-2,
        threshold=0.2,
        decay="off",
        norm_momentum=0.5,
    )
    _, metrics = run_one(config, few)
    assert constant_kl(few.train.probabilities[0]) > 0.5
    assert metrics["train_kl"] < 0.02
    assert metrics["train_accuracy"] == 1


@pytest.mark.parametrize("method", ["adam", "and_mask"])
def test_train_test_kl_is_well_below_the_best_constants(method, data):
    config = dataclasses.replace(
        ADAM if method == "adam" else MASKED, epochs=16, learning_rate=2e-2, b1=0.5
    )
    _, metrics = run_one(config, data)
    assert metrics["test_kl"] < 0.5 * constant_kl(data.test.probabilities)
    assert metrics["test_accuracy"] > 0.8


def test_whole_state_is_finite_with_a_mask_that_nothing_passes(data):
    config = dataclasses.replace(MASKED, threshold=1.0, decay="off")
    state, metrics = run_one(config, data)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert metrics["open_fraction"] == 0
    start = make_trainer(config, "and_mask").init(make_keys(0).model).variables
    assert_trees_equal(state.variables.params, start.params)


def test_train_killed_between_epochs_ends_bit_identical(data, tmp_path, monkeypatch):
    config = dataclasses.replace(MASKED, epochs=3)

    def run(name):
        return RunDir(tmp_path / name, "coinrun train", config)

    with run("undisturbed") as undisturbed:
        final, _ = train(config, undisturbed, data, quiet=True)
    trainer = make_trainer(config, "and_mask")

    def killed(state, dataset, key, index, rates):
        if index == 2:
            raise RuntimeError("killed")
        return trainer.epoch(state, dataset, key, index, rates)

    with monkeypatch.context() as patch, run("killed") as first:
        patch.setattr(
            student, "make_trainer", lambda *_: trainer._replace(epoch=killed)
        )
        with pytest.raises(RuntimeError, match="killed"):
            train(config, first, data, quiet=True)
    with run("killed") as second:
        resumed, history = train(config, second, data, quiet=True)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert list(history[0]) == ["epoch", *METRICS]
    assert_trees_equal(resumed, final)
    rows = [
        (tmp_path / n / "metrics.csv").read_bytes() for n in ("killed", "undisturbed")
    ]
    assert rows[0] == rows[1]


def test_train_more_states_than_a_level_has_is_refused(data, tmp_path):
    config = dataclasses.replace(ADAM, batch_size=17)
    with (
        RunDir(tmp_path / "run", "coinrun train", config) as run,
        pytest.raises(DataError, match="batch_size must be at most the 16 states"),
    ):
        train(config, run, data, quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directory of a finished smoke run."""
    path = tmp_path_factory.mktemp("train") / "run"
    assert coinrun("train", "--preset", "smoke", "--out", path) == 0
    return path


def test_train_smoke_writes_metrics_and_what_a_constant_reaches(trained, capsys):
    rows = list(csv.DictReader((trained / "metrics.csv").read_text().splitlines()))
    assert list(rows[0]) == ["epoch", *METRICS]
    assert len(rows) == 2
    summary = json.loads((trained / "summary.json").read_text())
    targets = generate(DATASET_PRESETS["smoke"]).test.probabilities.astype(float)
    constant = np.sum(targets * np.log(targets / targets.mean(0)), -1).mean()
    assert summary["constant_test_kl"] == pytest.approx(constant, abs=1e-5)
    assert summary["min_test_kl"] == min(float(row["test_kl"]) for row in rows)
    assert 0 < summary["open_fraction"] < 1
    config = json.loads((trained / "config.json").read_text())["config"]
    assert config["data_sha256"] == "generated"
    modified = (trained / "metrics.csv").stat().st_mtime_ns
    assert coinrun("train", "--preset", "smoke", "--out", trained) == 0
    out = capsys.readouterr().out
    assert "finished; --overwrite runs it again" in out
    assert f"a constant {constant:.4f}" in out
    assert (trained / "metrics.csv").stat().st_mtime_ns == modified


def test_train_without_data_says_how_to_make_them(tmp_path, capsys):
    assert coinrun("train", "--data", tmp_path, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert f"python -m experiments.coinrun dataset --out {tmp_path}" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "search", "rerun"])
def test_data_that_are_not_read_are_refused(command, tmp_path, capsys):
    arguments = ("--preset", "smoke", "--data", tmp_path, "--out", tmp_path / "run")
    assert coinrun(command, *arguments) == 2
    assert "--data is not read: the dataset 'generated'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_load_student_is_the_one_that_was_trained(trained, data):
    loaded = load_student(trained)
    chances = loaded.probabilities(data.test.images)
    kl = (data.test.probabilities * np.log(data.test.probabilities / chances)).sum(1)
    assert kl.mean() == pytest.approx(loaded.identity["test_kl"], rel=1e-3)


def test_format_training_of_a_run_that_diverged_is_text():
    summary = dict.fromkeys((*METRICS, "min_test_kl", "constant_test_kl"), "nan")
    assert "nan train" in format_training({**summary, "min_test_kl_epoch": 3})


def test_play_of_an_unfinished_run_is_refused(tmp_path, capsys):
    assert coinrun("play", "--student", tmp_path, "--out", tmp_path / "out") == 2
    assert "is no finished training run: finish it with" in capsys.readouterr().err


def test_recorder_keeps_the_first_frames_of_the_levels_asked_for():
    def turn(steps):
        levels = np.array([5, 6, 7])
        frames = np.zeros((3, 4, 4, 3), np.uint8) + np.array(steps)[:, None, None, None]
        return Turn(frames.astype(np.uint8), levels, np.array(steps), ~(levels == 7))

    recorder = Recorder(lambda turn: turn.levels * 2, [7, 5], max_frames=3)
    for step in range(5):
        assert recorder(turn([step, step, step])).tolist() == [10, 12, 14]
    nothing, kept = recorder.frames()
    assert nothing == []
    assert [frame[0, 0, 0] for frame in kept] == [0, 1, 2]


@needs_game
@pytest.mark.parametrize("actions", ["sampled", "greedy"])
def test_play_smoke_in_the_game(trained, actions, tmp_path, capsys):
    architecture = Architecture(width=2, hidden=8)
    params = init_params(jax.random.key(1), architecture)
    file = tmp_path / "expert.npz"
    save_expert(file, Expert(architecture, params, {"mode": "easy"}))
    path = tmp_path / "play"
    arguments = ("--student", trained, "--expert", file, "--actions", actions)
    assert coinrun("play", "--preset", "smoke", *arguments, "--out", path) == 0
    rows = list(csv.DictReader((path / "episodes.csv").read_text().splitlines()))
    summary = json.loads((path / "summary.json").read_text())
    levels = list(EVALUATION_LEVELS[: PLAY_PRESETS["smoke"].levels])
    for name in ("expert", "student", "scripted"):
        own = [row for row in rows if row["policy"] == name]
        assert [int(row["level"]) for row in own] == levels
        mean = np.mean([float(row["return"]) for row in own])
        assert summary[name]["mean_return"] == mean
        assert summary[name]["solved"] == mean / 10
    gain = summary["student"]["solved"] - summary["scripted"]["solved"]
    assert summary["student"]["gain"] == pytest.approx(gain)
    with Image.open(path / "play.gif") as gif:
        assert gif.is_animated
        assert gif.size == (2 * 4 * 64 + 4, 4 * 64 + 14)
    assert "student" in capsys.readouterr().out


def test_paper_presets_are_the_papers_settings():
    best = TRAIN_PRESETS["paper"]
    drawn = (best.learning_rate, best.b1, best.b3, best.threshold, best.weight_decay)
    assert drawn == (0.0078, 0.21, 0.79, 0.36, 0.057)
    for config in (best, SEARCH_PRESETS["paper"]):
        assert (config.width, config.blocks, config.epochs) == (64, 2, 30)
    search = SEARCH_PRESETS["paper"]
    assert (search.trials, search.sampler, search.top) == (1024, "univariate_tpe", 10)
    states = DATASET_PRESETS["paper"]
    assert (states.levels, states.states_per_level) == (64, 1000)
    assert states.test_levels == 2000


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (Settings, {"dataset": "mnist"}, "dataset must be one of coinrun, generated"),
        (Settings, {"width": 0}, "width must be at least 1, got 0"),
        (Settings, {"batch_size": 0}, "batch_size must be at least 1, or None, got 0"),
        (Settings, {"norm_momentum": 1.0}, r"norm_momentum must be in \[0, 1\), got"),
        (Settings, {"eps": -1.0}, "eps must be non-negative and finite, got -1.0"),
        (TrainConfig, {"method": "sgd"}, "method must be one of adam, and_mask, got"),
        (TrainConfig, {"decay": "on"}, "decay must be one of off, decoupled, coupled"),
        (TrainConfig, {"learning_rate": 0.0}, "learning_rate must be positive and fin"),
        (TrainConfig, {"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
        (TrainConfig, {"b3": 1.0}, r"b3 must be in \[0, 1\), got 1.0"),
        (TrainConfig, {"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        (SearchConfig, {"methods": ("adam", "adam")}, "methods must be one or more di"),
        (SearchConfig, {"trials": 0}, "trials must be at least 1, got 0"),
        (SearchConfig, {"top": 0}, "top must be at least 1, got 0"),
        (PlayConfig, {"levels": 1}, "levels must be between 2 and 10000, got 1"),
        (PlayConfig, {"shown": 9, "levels": 3}, r"shown must be at most levels \(3\)"),
        (PlayConfig, {"actions": "best"}, "actions must be one of sampled, greedy"),
    ],
)
def test_config_invalid_value_is_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
