"""The expert: its training and resumption, its file, its evaluation."""

import dataclasses
import functools
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from experiments.coinrun.__main__ import COMMANDS
from experiments.coinrun.evaluation import (
    POLICIES,
    evaluate,
    format_summary,
    policies,
    rows_of,
    summarize,
    summarize_all,
)
from experiments.coinrun.expert import ppo, training
from experiments.coinrun.expert.actors import random_policy, sampled, scripted_policy
from experiments.coinrun.expert.config import (
    EVALUATE_PRESETS,
    EXPERT_PRESETS,
    EvaluateConfig,
    ExpertConfig,
)
from experiments.coinrun.expert.figures import draw_learning_curve
from experiments.coinrun.expert.policy import Architecture, init_params, make_apply
from experiments.coinrun.expert.saved import (
    Expert,
    ExpertError,
    load_expert,
    save_expert,
)
from experiments.coinrun.expert.training import Trainer
from experiments.coinrun.game import (
    ACTIONS,
    EVALUATION_LEVELS,
    FRAME,
    REWARD,
    RIGHT,
    RIGHT_UP,
    Episode,
    Observation,
    Turn,
    play,
)
from experiments.common.cli import main
from experiments.common.settings import load_settings
from tests._asserts import assert_trees_equal
from tests.experiments._game import needs_game
from tests.experiments.conftest import ROOT, read_csv

SMOKE = EXPERT_PRESETS["smoke"]
FRAMES = 4 * SMOKE.block_frames
LONG = ("expert", "--preset", "smoke", "--frames", FRAMES)
RESULTS = ("metrics.csv", "expert.npz", "episodes.csv", "summary.json", "config.json")


def coinrun(*arguments):
    return main("python -m experiments.coinrun", COMMANDS, [*map(str, arguments)])


@pytest.fixture(scope="module")
def start(command_environment):
    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.coinrun", *map(str, arguments)],
            cwd=ROOT,
            env=command_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    path = tmp_path_factory.mktemp("coinrun") / "run"
    out = finish(start(*LONG, "--out", path))
    assert all(policy in out for policy in POLICIES)
    return path


@needs_game
def test_expert_smoke_writes_expert_tables_and_figure(undisturbed):
    rows = read_csv(undisturbed / "metrics.csv")
    assert [int(row["frames"]) for row in rows] == list(
        range(SMOKE.block_frames, FRAMES + 1, SMOKE.block_frames)
    )
    losses = ("policy_loss", "value_loss", "entropy", "kl", "clip_fraction")
    assert np.isfinite([[float(row[name]) for name in losses] for row in rows]).all()
    speeds = read_csv(undisturbed / "speed.csv")
    assert len(speeds) == 4
    assert all(float(row["frames_per_second"]) > 0 for row in speeds)
    assert imread(undisturbed / "learning_curve.png").std() > 0.01
    summary = json.loads((undisturbed / "summary.json").read_text())
    episodes = read_csv(undisturbed / "episodes.csv")
    levels = list(EVALUATION_LEVELS[: SMOKE.evaluation_levels])
    for policy in POLICIES:
        own = [row for row in episodes if row["policy"] == policy]
        assert [int(row["level"]) for row in own] == levels
        solved = np.mean([int(row["solved"]) for row in own])
        assert summary[policy]["solved"] == solved
        assert summary[policy]["mean_return"] == 10 * solved
    saved = load_expert(undisturbed / "expert.npz")
    assert saved.architecture == Architecture(SMOKE.width, SMOKE.hidden)
    assert saved.about == {"mode": "easy", "frames": FRAMES, "seed": 0}


@needs_game
def test_expert_killed_and_resumed_ends_bit_identical(start, undisturbed, tmp_path):
    path = tmp_path / "run"
    process = start(*LONG, "--out", path)
    checksum = path / "checkpoint" / "1.sha256"
    while not checksum.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (path / "summary.json").exists()
    finish(start(*LONG, "--out", path))
    for name in RESULTS:
        assert (path / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert json.loads((path / "manifest.json").read_text())["sessions"] == 2


@needs_game
def test_evaluate_saved_expert_plays_the_same_levels(undisturbed, tmp_path, capsys):
    file = undisturbed / "expert.npz"
    arguments = ("evaluate", "--preset", "smoke", "--expert", file, "--out", tmp_path)
    assert coinrun(*arguments) == 0
    assert "sampled" in capsys.readouterr().out
    here, there = (read_csv(path / "episodes.csv") for path in (tmp_path, undisturbed))
    assert [(row["policy"], row["level"]) for row in here] == [
        (row["policy"], row["level"]) for row in there
    ]
    # Which compute nothing that this process, with more devices, could round otherwise.
    baselines = slice(2 * SMOKE.evaluation_levels, None)
    assert here[baselines] == there[baselines]
    assert coinrun(*arguments) == 0
    assert "finished; --overwrite runs it again" in capsys.readouterr().out


@needs_game
def test_evaluate_without_a_usable_expert_is_refused(tmp_path, capsys):
    out = ("--out", tmp_path / "run")
    assert coinrun("evaluate", "--expert", tmp_path / "x.npz", *out) == 2
    assert "x.npz is not there" in capsys.readouterr().err


@needs_game
def test_trainer_block_is_a_function_of_the_state():
    config = dataclasses.replace(SMOKE, frames=FRAMES)
    with Trainer(config) as trainer:
        start = trainer.init()
        once, first = trainer.block(start, 0)
        trainer.block(once, 1)
        again, second = trainer.block(start, 0)
        assert_trees_equal(once, again)
        assert {n: str(v) for n, v in first.items()} == {
            n: str(v) for n, v in second.items()
        }
        # The workers' games differ, and the network has learnt.
        assert not np.array_equal(once.games[0].data, once.games[1].data)
        before, after = (jax.tree.leaves(each.params) for each in (start, once))
        assert all((a != b).any() for a, b in zip(before, after, strict=True))


@pytest.fixture
def untrained():
    architecture = Architecture(width=2, hidden=8)
    params = init_params(jax.random.key(1), architecture)
    # Far from uniform, so that sampled actions say something.
    params = jax.tree.map(lambda leaf: leaf * 3, params)
    return Expert(architecture, params, {"mode": "easy", "frames": 0, "seed": 1})


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (130, 64, 64, 3), np.uint8)


def test_probabilities_do_not_depend_on_the_batch(untrained, frames):
    whole = untrained.probabilities(frames)
    assert (whole.dtype, whole.shape) == (np.float32, (130, 15))
    np.testing.assert_allclose(whole.sum(-1), 1, rtol=1e-5)
    assert whole.std() > 1e-3
    for start, stop in ((0, 1), (3, 70), (129, 130)):
        part = untrained.probabilities(frames[start:stop])
        np.testing.assert_array_equal(part, whole[start:stop])
    assert untrained.probabilities(frames[:0]).shape == (0, 15)


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 64, 64, 3)), np.zeros((64, 64, 3), np.uint8)]
)
def test_probabilities_of_what_is_no_frames_are_refused(untrained, wrong):
    with pytest.raises(ValueError, match="frames must be uint8"):
        untrained.probabilities(wrong)


def test_saved_expert_is_the_same_and_its_file_deterministic(
    untrained, frames, tmp_path
):
    save_expert(tmp_path / "a.npz", untrained)
    loaded = load_expert(tmp_path / "a.npz")
    assert loaded.architecture == untrained.architecture
    assert loaded.about == untrained.about
    np.testing.assert_array_equal(
        loaded.probabilities(frames), untrained.probabilities(frames)
    )
    save_expert(tmp_path / "b.npz", loaded)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_load_expert_truncated_file_is_refused(untrained, tmp_path, kept):
    path = tmp_path / "expert.npz"
    save_expert(path, untrained)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ExpertError, match="is damaged"):
        load_expert(path)


def test_load_expert_any_flipped_byte_is_refused_or_harmless(
    untrained, tmp_path, frames
):
    path = tmp_path / "expert.npz"
    save_expert(path, untrained)
    content = path.read_bytes()
    expected = jax.tree.leaves(untrained.params)
    refused = 0
    positions = range(3, len(content), len(content) // 60)
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            loaded = load_expert(path)
        except ExpertError:
            refused += 1
            continue
        # Bytes that the format does not use, such as a date.
        assert_trees_equal(jax.tree.leaves(loaded.params), expected)
    assert refused > len(positions) / 2


def test_load_expert_changed_array_is_refused(untrained, tmp_path):
    path = tmp_path / "expert.npz"
    save_expert(path, untrained)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "value.bias": arrays["value.bias"] + 1})
    with pytest.raises(ExpertError, match="checksum does not agree"):
        load_expert(path)
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ExpertError, match="is not an expert's file"):
        load_expert(path)


def turn(levels, steps):
    levels, steps = np.array(levels), np.array(steps)
    n = len(levels)
    return Turn(np.zeros((n, 64, 64, 3), np.uint8), levels, steps, np.ones(n, bool))


def test_policies_draw_from_seed_level_and_step_alone():
    levels, steps = np.arange(600) // 30, np.arange(600) % 30
    for make in (random_policy, scripted_policy):
        whole = make(0)(turn(levels, steps))
        np.testing.assert_array_equal(
            make(0)(turn(levels[7:9], steps[7:9])), whole[7:9]
        )
        assert (make(1)(turn(levels, steps)) != whole).any()
    counts = np.bincount(random_policy(0)(turn(levels, steps)), minlength=15)
    assert len(counts) == len(ACTIONS)
    assert (counts > 10).all()
    assert set(scripted_policy(0)(turn(levels, steps)).tolist()) == {RIGHT, RIGHT_UP}


@needs_game
def test_sampled_expert_plays_the_same_whatever_the_slots(untrained):
    levels = EVALUATION_LEVELS[:5]
    policy = sampled(untrained.probabilities, 0)
    runs = [sorted(play(levels, policy, "easy", slots)) for slots in (2, 64)]
    assert runs[0] == runs[1]


@needs_game
def test_evaluate_scripted_policy_beats_random_actions(untrained):
    chosen = policies(untrained.probabilities, 0)
    assert tuple(chosen) == POLICIES
    chosen = {name: chosen[name] for name in ("scripted", "random")}
    levels = EVALUATION_LEVELS[:24]
    episodes = evaluate(chosen, levels, "easy", quiet=True)
    assert [row["level"] for row in rows_of(episodes)] == 2 * list(levels)
    scripted, random = (summarize(episodes[name]) for name in chosen)
    assert scripted["solved"] > 0.5
    assert random["solved"] < 0.5
    assert scripted["mean_steps"] < random["mean_steps"]


def test_summarize_is_means_with_standard_errors():
    episodes = [
        Episode(level, 10.0 * solved, bool(solved), steps)
        for level, (solved, steps) in enumerate([(1, 10), (1, 20), (0, 1000), (1, 30)])
    ]
    summary = summarize(episodes)
    assert (summary["levels"], summary["solved"]) == (4, 0.75)
    assert (summary["mean_return"], summary["mean_steps"]) == (7.5, 265.0)
    # Deviation 0.5 of (1, 1, 0, 1) with n - 1, over the root of 4.
    np.testing.assert_allclose(summary["solved_error"], 0.25)
    np.testing.assert_allclose(summary["return_error"], 2.5)


def test_summarize_all_gains_are_of_the_same_levels():
    def episodes(*solved):
        return [Episode(level, 10.0 * s, bool(s), 5) for level, s in enumerate(solved)]

    results = summarize_all(
        {"expert": episodes(1, 1, 1, 0), "scripted": episodes(1, 0, 0, 0)}
    )
    assert results["expert"]["solved"] == 0.75
    assert (results["expert"]["gain"], results["scripted"]["gain"]) == (0.5, 0.0)
    # Of the differences (0, 1, 1, 0), not of the two shares.
    np.testing.assert_allclose(results["expert"]["gain_error"], np.sqrt(1 / 3) / 2)
    assert results["scripted"]["gain_error"] == 0
    assert "+50.0% +-28.9%" in format_summary(results)


class ScriptedStream:
    """Games whose frames say which environment and step it is.

    An episode ends at every third step of the first environment, with a coin.
    """

    def __init__(self, num_envs, mode, levels, seed):
        self.num_envs, self.step, self.taken = num_envs, 0, []
        self.first_level = seed % 251

    def observe(self):
        frames = np.zeros((self.num_envs, *FRAME), np.uint8)
        frames[..., 0] = self.first_level
        frames[..., 1] = np.arange(self.num_envs)[:, None, None]
        frames[..., 2] = self.step
        first = np.zeros(self.num_envs, bool)
        first[0] = self.step > 0 and self.step % 3 == 0
        return Observation(REWARD * first.astype(np.float32), frames, first)

    def act(self, actions):
        self.taken.append(actions.copy())
        self.step += 1

    def save(self):
        return None

    def close(self):
        pass


def test_trainer_learns_from_what_was_seen_done_and_got(monkeypatch):
    monkeypatch.setattr(training, "LevelStream", ScriptedStream)
    config = EXPERT_PRESETS["smoke"]
    apply = jax.jit(make_apply(Architecture(config.width, config.hidden)))
    with Trainer(config) as trainer:
        state = trainer.init()
        rollouts, after = trainer._play(state.params, jax.random.key(0), state.steps)
        samples = trainer._samples(rollouts)
        streams = trainer._streams
    shape = (config.num_steps, config.num_envs // config.workers)
    assert len({stream.first_level for stream in streams}) == config.workers
    done = np.zeros(shape, bool)
    done[2::3, 0] = True
    advantages = []
    for stream, rollout in zip(streams, rollouts, strict=True):
        assert (rollout.frames[..., 0] == stream.first_level).all()
        steps, environments = np.indices(shape)
        assert (rollout.frames[:, :, 0, 0, 1] == environments).all()
        assert (rollout.frames[:, :, 0, 0, 2] == steps).all()
        np.testing.assert_array_equal(rollout.actions, stream.taken)
        np.testing.assert_array_equal(rollout.done, done)
        np.testing.assert_array_equal(rollout.rewards, done)
        output = apply(state.params, rollout.frames.reshape(-1, *FRAME))
        logs = jax.nn.log_softmax(output.logits)
        taken = np.asarray(logs)[np.arange(len(logs)), rollout.actions.reshape(-1)]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        close(rollout.log_probs.reshape(-1), taken)
        close(rollout.values.reshape(-1), output.values)
        close(rollout.last_values, apply(state.params, stream.observe().frames).values)
        assert rollout.episode_steps == [3] * int(done.sum())
        advantages.append(
            ppo.advantages_and_returns(
                rollout.rewards,
                rollout.done,
                rollout.values,
                rollout.last_values,
                config.gamma,
                config.gae_lambda,
            )
        )
    for worker, sample in enumerate(samples):
        own, returns = advantages[worker]
        everyone = np.concatenate([each for each, _ in advantages], axis=1)
        normal = (own - everyone.mean()) / everyone.std()
        close(sample.advantages, np.reshape(normal, -1), rtol=1e-3, atol=1e-4)
        close(sample.returns, np.reshape(returns, -1))
        close(sample.actions, rollouts[worker].actions.reshape(-1))
    expected = np.full(shape[1], config.num_steps)
    expected[0] = config.num_steps % 3
    for steps in after:
        np.testing.assert_array_equal(steps, expected)


def test_draw_learning_curve_takes_blocks_without_an_end():
    rows = [
        {"frames": index * 1e5, "solved": float("nan") if index < 2 else 0.5 + index}
        | {"entropy": 2.0}
        for index in range(5)
    ]
    results = {name: {"solved": 0.5} for name in POLICIES}
    assert len(draw_learning_curve(rows, results).axes) == 2


@pytest.mark.parametrize("preset", ["smoke", "cpu", "paper"])
def test_presets_are_whole_blocks(preset):
    config = EXPERT_PRESETS[preset]
    assert config.blocks * config.block_frames == config.frames
    assert EVALUATE_PRESETS[preset].levels >= 2


def test_paper_preset_is_the_papers_expert():
    config = EXPERT_PRESETS["paper"]
    assert config.mode == "hard"
    assert 400e6 <= config.frames < 401e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "medium"}, "mode must be one of easy, hard, got 'medium'"),
        ({"num_envs": 127}, "num_envs must be a multiple of workers"),
        ({"minibatch_size": 1000}, "minibatch_size must be a multiple of 64 for each"),
        ({"minibatch_size": 3072}, "minibatch_size must be a divisor of num_envs"),
        ({"frames": 1_000_000}, "frames must be a positive multiple of a block's"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"evaluation_levels": 1}, "evaluation_levels must be between 2 and 10000"),
        ({"seed": -1}, "seed must be between 0"),
        ({"clip_eps": -1.0}, "clip_eps must be positive"),
    ],
)
def test_expert_config_invalid_value_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ExpertConfig(**changes)


def test_settings_of_an_expert_are_read_under_their_former_names(tmp_path):
    former = {"discount": 0.9, "steps": 32, "environments": 64, "clip": 0.1}
    (tmp_path / "config.json").write_text(json.dumps({"config": former}))
    source = f"{tmp_path / 'config.json'}:config"
    settings = load_settings(source, ExpertConfig())
    assert settings == {
        "gamma": 0.9,
        "num_steps": 32,
        "num_envs": 64,
        "clip_eps": 0.1,
    }
    present = {field.name for field in dataclasses.fields(ExpertConfig)}
    assert set(ExpertConfig.FORMER_NAMES.values()) <= present
    assert not set(ExpertConfig.FORMER_NAMES) & present


def test_evaluate_config_invalid_value_is_refused():
    with pytest.raises(ValueError, match="levels must be between 2 and 10000, got 0"):
        EvaluateConfig(levels=0)
