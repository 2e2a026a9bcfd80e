"""PPO against plain loops in NumPy, and the network against XLA's convolutions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.coinrun.expert import ppo
from experiments.coinrun.expert.config import PpoConfig
from experiments.coinrun.expert.policy import (
    Architecture,
    Output,
    convolve,
    init_params,
    make_apply,
    merge,
    to_blocks,
)

CONFIG = PpoConfig(clip_eps=0.2, vf_coef=0.7, ent_coef=0.03)


def test_advantages_and_returns_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    steps, num_envs, gamma, gae_lambda = 9, 5, 0.9, 0.8
    rewards, values = rng.normal(size=(2, steps, num_envs)).astype(np.float32)
    last = rng.normal(size=num_envs).astype(np.float32)
    done = rng.random((steps, num_envs)) < 0.3
    advantages, returns = jax.jit(ppo.advantages_and_returns)(
        rewards, done, values, last, gamma, gae_lambda
    )
    for env in range(num_envs):
        later, after = 0.0, float(last[env])
        for step in reversed(range(steps)):
            at = step, env
            going = 0.0 if done[at] else 1.0
            delta = rewards[at] + gamma * going * after - values[at]
            later = delta + gamma * gae_lambda * going * later
            np.testing.assert_allclose(advantages[at], later, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(
                returns[at], later + values[at], rtol=1e-4, atol=1e-6
            )
            after = float(values[at])


def test_advantages_of_one_ended_step_is_reward_less_value():
    one = np.full((1, 1), 3.0, np.float32)
    advantages, returns = ppo.advantages_and_returns(
        one, np.ones((1, 1), bool), one - 1, np.full(1, 100.0, np.float32), 0.9, 0.8
    )
    assert (advantages.item(), returns.item()) == (1.0, 3.0)


def test_normalize_has_mean_0_and_std_1_and_takes_constants():
    values = ppo.normalize(jnp.array([[1.0, 2.0], [4.0, 9.0]]))
    np.testing.assert_allclose(values.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(values.std(), 1, rtol=1e-5)
    np.testing.assert_array_equal(ppo.normalize(jnp.full((3, 2), 5.0)), 0)


def draw(n=64, spread=0.5):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    logits, values = normal(n, 15), normal(n)
    actions = rng.integers(0, 15, n, np.int32)
    log_probs = np.asarray(jax.nn.log_softmax(logits))[np.arange(n), actions]
    samples = ppo.Samples(
        actions,
        log_probs + spread * normal(n),
        values + spread * normal(n),
        normal(n),
        normal(n),
    )
    return Output(jnp.asarray(logits), jnp.asarray(values)), samples


def test_loss_is_that_of_a_loop():
    output, samples = draw()
    total, terms = jax.jit(ppo.loss, static_argnums=2)(output, samples, CONFIG)
    rows = []
    for logits, value, action, old, old_value, advantage, gain in zip(
        np.asarray(output.logits, np.float64), output.values, *samples, strict=True
    ):
        shares = np.exp(logits) / np.exp(logits).sum()
        ratio = shares[action] / np.exp(float(old))
        clipped = min(max(ratio, 0.8), 1.2)
        near = old_value + min(max(value - old_value, -0.2), 0.2)
        rows.append(
            [
                -min(advantage * ratio, advantage * clipped),
                max((value - gain) ** 2, (near - gain) ** 2) / 2,
                -(shares * np.log(shares)).sum(),
                ratio - 1 - np.log(ratio),
                abs(ratio - 1) > 0.2,
            ]
        )
    expected = np.mean(np.array(rows, float), 0)
    np.testing.assert_allclose(jnp.stack(terms), expected, rtol=1e-4, atol=1e-5)
    assert 0.1 < terms.clip_fraction < 0.9
    np.testing.assert_allclose(
        total, expected[0] + 0.7 * expected[1] - 0.03 * expected[2], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [
        (1.0, 1.5, False),
        (1.0, 0.5, True),
        (-1.0, 1.5, True),
        (-1.0, 0.5, False),
        (1.0, 1.1, True),
        (-1.0, 0.9, True),
    ],
)
def test_loss_clipped_policy_moves_only_back(advantage, ratio, moves):
    logits = jnp.zeros((1, 15))
    old = np.log(1 / 15) - np.log(ratio)
    one = np.ones(1, np.float32)
    samples = ppo.Samples(np.zeros(1, np.int32), old * one, one, advantage * one, one)

    def policy_loss(logits):
        return ppo.loss(Output(logits, jnp.ones(1)), samples, CONFIG)[1].policy_loss

    gradient = jax.grad(policy_loss)(logits)
    assert bool(jnp.any(gradient != 0)) is moves


@pytest.mark.parametrize(
    ("value", "gain", "moves"), [(1.5, 2.0, False), (1.5, 0.0, True), (1.1, 2.0, True)]
)
def test_loss_clipped_value_moves_only_back(value, gain, moves):
    one = np.ones(1, np.float32)
    samples = ppo.Samples(np.zeros(1, np.int32), -one, one, one, gain * one)

    def value_loss(value):
        output = Output(jnp.zeros((1, 15)), value[None])
        return ppo.loss(output, samples, CONFIG)[1].value_loss

    assert bool(jax.grad(value_loss)(jnp.float32(value)) != 0) is moves


def test_step_long_gradient_is_shortened():
    config = dataclasses.replace(CONFIG, max_grad_norm=0.5)
    optimizer = ppo.make_optimizer(config)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    long = {"a": jnp.array([30.0, 0.0]), "b": jnp.array([0.0, 40.0, 0.0])}
    _, state = ppo.step(optimizer, params, optimizer.init(params), long, 0.1)
    mu = state[1].mu
    np.testing.assert_allclose(mu["a"], [0.1 * 0.3, 0], rtol=1e-5)
    np.testing.assert_allclose(mu["b"], [0, 0.1 * 0.4, 0], rtol=1e-5)
    short = jax.tree.map(lambda leaf: leaf / 1000, long)
    new, state = ppo.step(optimizer, params, optimizer.init(params), short, 0.1)
    np.testing.assert_allclose(state[1].mu["a"], [0.1 * 0.03, 0], rtol=1e-5)
    # Adam's first step is the learning rate, against the gradient.
    np.testing.assert_allclose(new["a"], [-0.1, 0], rtol=1e-3)


def test_learning_rate_falls_linearly():
    config = PpoConfig(learning_rate=1e-3, final_rate=0.1)
    rates = [ppo.learning_rate(config, done) for done in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(rates, [1e-3, 5.5e-4, 1e-4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"clip_eps": 0.0}, "clip_eps must be positive and finite"),
        ({"ent_coef": -0.1}, "ent_coef must be non-negative"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"update_epochs": 0}, "update_epochs must be at least 1"),
    ],
)
def test_ppo_config_invalid_value_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PpoConfig(**changes)


@pytest.mark.parametrize(("fan_in", "fan_out"), [(48, 4), (8, 6)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_convolve_is_xlas_convolution(size, fan_in, fan_out):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 6, 5, fan_in)).astype(np.float32)
    kernel = rng.normal(size=(size, size, fan_in, fan_out)).astype(np.float32)

    def ours(x, kernel):
        return convolve(x, kernel)

    def xlas(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("HWNC", "HWIO", "HWNC")
        )

    expected = xlas(x, kernel)
    cotangent = rng.normal(size=expected.shape).astype(np.float32)
    results = []
    for function in (ours, xlas):
        output, pull = jax.vjp(function, jnp.asarray(x), jnp.asarray(kernel))
        results.append((output, *pull(jnp.asarray(cotangent))))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_first_layers_are_strided_convolutions():
    """Blocks and merging make the nature CNN's 8x8 with stride 4 and 4x4 with 2."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    first = rng.normal(size=(2, 2, 48, 3)).astype(np.float32)
    second = rng.normal(size=(2, 2, 12, 2)).astype(np.float32)
    ours = convolve(merge(convolve(to_blocks(frames), first)[:14, :14]), second)
    # Channels of a block are [row, column, colour], those of a merged one [row,
    # column, channel].
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = first.reshape(2, 2, 4, 4, 3, 3).transpose(0, 2, 1, 3, 4, 5)
    x = jax.lax.conv_general_dilated(
        frames / np.float32(255),
        kernel.reshape(8, 8, 3, 3),
        (4, 4),
        "VALID",
        dimension_numbers=numbers,
    )
    kernel = second.reshape(2, 2, 2, 2, 3, 2).transpose(0, 2, 1, 3, 4, 5)
    x = jax.lax.conv_general_dilated(
        x, kernel.reshape(4, 4, 3, 2), (2, 2), "VALID", dimension_numbers=numbers
    )
    assert x.shape == (2, 6, 6, 2)
    np.testing.assert_allclose(ours.transpose(2, 0, 1, 3), x, rtol=1e-3, atol=1e-3)


def test_network_shapes_and_start():
    architecture = Architecture(width=4, hidden=8)
    params = init_params(jax.random.key(0), architecture)
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    logits, values = jax.jit(make_apply(architecture))(params, frames)
    assert (logits.shape, values.shape) == ((3, 15), (3,))
    assert logits.dtype == values.dtype == jnp.float32
    # At first all actions are about as likely.
    np.testing.assert_allclose(jax.nn.softmax(logits), 1 / 15, rtol=0.1)
    assert len(set(values.tolist())) == 3


def test_network_sees_every_part_of_the_frame_up_to_the_edge():
    architecture = Architecture(width=4, hidden=8)
    params = init_params(jax.random.key(0), architecture)
    apply = jax.jit(make_apply(architecture))
    base = apply(params, np.full((1, 64, 64, 3), 128, np.uint8)).values
    for row, column in ((2, 2), (2, 57), (57, 2), (57, 57), (30, 30)):
        frames = np.full((1, 64, 64, 3), 128, np.uint8)
        frames[0, row - 2 : row + 2, column - 2 : column + 2] = 0
        assert apply(params, frames).values != base
