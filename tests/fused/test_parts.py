"""Environments that a pass takes a few at a time of its own accord."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from hardvary.fused import parts, traced
from tests._asserts import assert_trees_close
from tests.fused._answers import check_answers, make_env_oracle, signed_weights
from tests.fused._models import build, check, check_values, definition, make_oracle
from tests.zoo import ZOO, compile_quickly
from tests.zoo.blocks import floats

NUM_ENVS = 8
SIGNED = signed_weights(6)
WEIGHTS = np.array([1.0, 2.0, 0.0, 0.5, 1.0, 3.0], np.float32)
# Of every family and every rule.
MODELS = [
    "dense_one_row",
    "dense_several_rows",
    "bilinear",
    "conv_net_with_max_pool",
    "conv_2d_depthwise",
    "embedding_repeated_ids",
    "layer_norm",
    "unused_parameter",
    "dense_used_twice",
    "regulariser_only",
    "transformer_with_tied_embedding",
    "gru_by_scan",
    "cond_on_the_batch",
    "bfloat16_compute_one_row",
    "loss_with_aux",
    "random_keys_as_a_batch",
    "nnx_conv_net_with_batch_norm",
]


@pytest.fixture
def in_parts(monkeypatch):
    """Makes every pass take so many environments at a time, whatever their size."""

    def use(size):
        taken = []

        def part_size(program, num_envs):
            taken.append(num_envs)
            return size

        monkeypatch.setattr(traced, "part_size", part_size)
        return taken

    return use


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("name", MODELS)
def test_all_answers_of_parts_equal_stacked_gradients(name, weights, in_parts):
    taken = in_parts(2)
    params, _, batch = build(name)
    run = compile_quickly(make_env_oracle(name))
    losses, aux, answers = run(params, batch, SIGNED, weights)
    assert taken
    check_values(name, losses, aux, weights)
    entry, expected = ZOO[name], definition(name)
    decided = check_answers(
        answers, params, expected, SIGNED, weights, rounding=entry.rounding
    )
    assert decided >= (entry.decided if weights is None else 0)


@pytest.mark.parametrize("name", MODELS[::4])
def test_statistics_of_parts_equal_stacked_gradients(name, in_parts):
    taken = in_parts(3)
    params, _, batch = build(name)
    result = compile_quickly(make_oracle(name))(params, batch)
    assert taken
    assert check(name, result) >= ZOO[name].decided


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["in"] + params["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["out"]))


def normal(*shape):
    return floats(np.random.default_rng(shape).normal(size=shape))


PARAMS = {"in": normal(40, 50), "bias": normal(50), "out": normal(50, 30)}
BATCH = normal(NUM_ENVS, 100, 40)


def mask_step(params, batch):
    losses, grads = hardvary.value_and_env_grads(loss_fn)(params, batch)
    tx = hardvary.and_mask(0.5)
    return losses, tx.update(grads, tx.init(params), params)[0]


def test_a_step_in_parts_takes_the_memory_of_a_part(in_parts):
    def temporary(size):
        in_parts(size)
        step = jax.jit(lambda *args: mask_step(*args))
        compiled = step.lower(PARAMS, BATCH).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled(PARAMS, BATCH)

    whole, expected = temporary(NUM_ENVS)
    part, found = temporary(2)
    assert_trees_close(found, expected, rtol=1e-5)
    assert part < 0.5 * whole


def test_sums_that_nobody_asks_for_cost_nothing(in_parts):
    """Operations in the body of a loop are counted once."""

    def operations(size):
        in_parts(size)
        ask = jax.jit(
            lambda *args: hardvary.gramian(hardvary.env_grads(loss_fn)(*args))
        )
        return ask.lower(PARAMS, BATCH).compile().cost_analysis()["flops"]

    whole, halves, quarters = map(operations, (NUM_ENVS, 4, 2))
    in_loop = 4 * (halves - quarters)
    np.testing.assert_allclose(halves + in_loop / 2, whole, rtol=0.02)


def test_further_statistics_and_other_weights_need_no_other_pass(in_parts):
    taken = in_parts(4)

    def ask(params, batch):
        grad = hardvary.env_grads(loss_fn)(params, batch)["in"]
        found = grad.stats(("mean", "sign", "square", "log_abs", "abs", "nonzero"))
        return found.square_mean, grad.combine(jnp.arange(8.0)), grad.stack()

    square, total, stacked = jax.jit(ask)(PARAMS, BATCH)
    assert len(taken) == 1
    stacked = np.asarray(stacked, np.float64)
    np.testing.assert_allclose(square, np.mean(stacked**2, 0), rtol=1e-4)
    np.testing.assert_allclose(
        total, np.tensordot(np.arange(8), stacked, 1), rtol=1e-4, atol=1e-4
    )


def test_an_absent_environment_may_hold_anything(in_parts):
    in_parts(4)
    weights = np.array([1, 1, 0, 1, 1, 1, 1, 0], np.float32)
    spoilt = jnp.asarray(BATCH).at[np.array([2, 7])].set(jnp.nan)

    def masked(batch):
        oracle = hardvary.value_and_env_grads(loss_fn)
        _, grads = oracle(PARAMS, batch, env_weights=weights)
        tx = hardvary.and_mask(0.5)
        return tx.update(grads, tx.init(PARAMS), PARAMS)[0]

    assert_trees_close(jax.jit(masked)(spoilt), masked(BATCH), rtol=1e-5)


def test_updates_of_parts_can_be_differentiated(in_parts):
    def after(params):
        _, updates = mask_step(params, BATCH)
        moved = optax.apply_updates(params, updates)
        return jnp.mean(jax.vmap(loss_fn, (None, 0))(moved, BATCH))

    expected = jax.jit(jax.grad(after))(PARAMS)
    in_parts(2)
    assert_trees_close(
        jax.jit(jax.grad(lambda p: after(p)))(PARAMS), expected, rtol=1e-4
    )


def test_outside_of_a_jit_no_loop_is_compiled(in_parts, monkeypatch):
    in_parts(2)
    monkeypatch.delattr(traced, "sums_by_parts")
    losses, _ = hardvary.value_and_env_grads(loss_fn)(PARAMS, BATCH)
    assert losses.shape == (NUM_ENVS,)


def loops(function, *args):
    return len(re.findall("stablehlo.while", jax.jit(function).lower(*args).as_text()))


def test_a_microbatch_size_of_all_environments_takes_them_at_once(in_parts):
    taken = in_parts(2)
    for oracle in (hardvary.env_grads, hardvary.grad_stats):

        def means(params, batch, oracle=oracle, **settings):
            grads = oracle(loss_fn, **settings)(params, batch)
            mean = lambda grad: grad.mean() if callable(grad.mean) else grad.mean  # noqa: E731
            return [mean(grads[name]) for name in PARAMS]

        own = loops(lambda *args, f=means: f(*args), PARAMS, BATCH)
        asked = len(taken)
        given = loops(
            lambda *args, f=means: f(*args, microbatch_size=NUM_ENVS), PARAMS, BATCH
        )
        assert own > given
        assert len(taken) == asked


def test_environments_that_meet_are_taken_at_once(in_parts):
    taken = in_parts(2)

    def meeting(params, x):
        return loss_fn(params, x - jax.lax.pmean(x, "env"))

    oracle = hardvary.env_grads(meeting, env_axis_name="env")
    jax.jit(lambda *args: hardvary.norms(oracle(*args))).lower(PARAMS, BATCH)
    assert not taken


def explained(num_envs, rows, width, layers=4):
    shape = jax.ShapeDtypeStruct
    params = [shape((width, width), jnp.float32)] * layers

    def deep(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x)

    batch = shape((num_envs, rows, width), jnp.float32)
    return hardvary.explain(deep, params, batch)


@pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.__version_info__ < (0, 10),
    reason="parts are measured on CPU, with jax 0.10",
)
def test_parts_are_as_large_as_was_measured(monkeypatch):
    # 4 MB of cotangents: small enough.
    assert explained(16, 64, 256).part_size == 16
    # 67 MB, 4.2 MB of an environment.
    found = explained(16, 1024, 256)
    assert (found.part_size, found.num_envs) == (2, 16)
    assert str(found).endswith("\n2 of 16 environments at a time")
    # A prime number of them, a sixth of a megabyte each.
    assert explained(251, 64, 160).part_size == 251
    # Parameters that are larger than what meets them.
    assert explained(1024, 1, 2048).part_size == 1024
    monkeypatch.setattr(parts.sharding, "on_cpu", lambda: False)
    assert explained(16, 1024, 256).part_size == 16
