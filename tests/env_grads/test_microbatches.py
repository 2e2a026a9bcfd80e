"""Gradients of environments a few at a time equal those of all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import hardvary
from tests._asserts import assert_trees_close
from tests.fused._answers import ask, signed_weights
from tests.zoo import compile_quickly
from tests.zoo.blocks import floats

NUM_ENVS = 8
WEIGHTS = np.array([1, 2, 0, 0, 0.5, 1, 0, 3], np.float32)


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return floats(rng.normal(size=shape))


PARAMS = {"table": normal(12, 6), "w": normal(6, 3), "twice": normal(3, 3)}
BATCH = {
    "id": jnp.asarray(np.random.default_rng(0).integers(0, 12, (NUM_ENVS, 4))),
    "y": normal(NUM_ENVS, 4, 3),
}


def loss_fn(params, batch):
    hidden = jnp.tanh(params["table"][batch["id"]] @ params["w"])
    outputs = jnp.sin(hidden @ params["twice"]) @ params["twice"]
    return jnp.mean(jnp.square(outputs - batch["y"])), {"outputs": outputs}


def answers(params, batch, env_weights=None, **settings):
    oracle = hardvary.value_and_env_grads(loss_fn, has_aux=True, **settings)
    (losses, aux), grads = oracle(params, batch, env_weights=env_weights)
    tree = {"gramian": hardvary.gramian(grads), "norms": hardvary.norms(grads)}
    tree["losses"], tree["aux"] = losses, aux
    stats = ask(grads, signed_weights(NUM_ENVS), stack=True)
    return (
        tree
        | {key: stats[key] for key in stats if key != "stats"}
        | {
            "sign": {
                name: grad.stats(("sign",)).sign_sum for name, grad in grads.items()
            }
        }
    )


@functools.cache
def at_once(weighted):
    run = compile_quickly(answers)
    return run(PARAMS, BATCH, WEIGHTS if weighted else None)


@pytest.mark.parametrize(
    ("size", "weighted"), [(1, False), (2, True), (4, False), (8, True)]
)
def test_answers_of_microbatches_equal_those_of_all_at_once(size, weighted):
    run = compile_quickly(functools.partial(answers, microbatch_size=size))
    found = run(PARAMS, BATCH, WEIGHTS if weighted else None)
    assert_trees_close(found, at_once(weighted), rtol=1e-4, atol=1e-5)


def test_microbatches_on_devices_equal_one_device():
    mesh = jax.make_mesh((2,), ("env",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(params, batch):
        found = answers(params, batch, axis_name="env", microbatch_size=2)
        return {key: found[key] for key in ("gramian", "norms", "combine", "sign")}

    spread = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("env")), out_specs=P())
    found = compile_quickly(spread)(PARAMS, BATCH)
    expected = {key: at_once(False)[key] for key in found}
    assert_trees_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_step_by_inner_products_takes_less_memory_in_microbatches():
    def step(size, w, x):
        loss = lambda w, x: jnp.mean(jnp.square(jnp.sin(jnp.sin(x @ w) @ w.T)))  # noqa: E731
        _, grads = hardvary.value_and_env_grads(loss, microbatch_size=size)(w, x)
        tx = hardvary.upgrad()
        return tx.update(grads, tx.init(w), w)[0]

    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 16), (8, 2000, 16))
    ]
    whole, parts = (
        compile_quickly(functools.partial(step, size))
        .lower(*arguments)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for size in (None, 2)
    )
    assert parts < 0.6 * whole


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"microbatch_size": 0}, ValueError, "microbatch_size must be >= 1"),
        ({"microbatch_size": 2.0}, TypeError, "microbatch_size must be an integer"),
        (
            {"microbatch_size": 2, "env_axis_name": "env"},
            ValueError,
            "do not meet in microbatches",
        ),
    ],
)
def test_wrong_sizes_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        hardvary.value_and_env_grads(loss_fn, **settings)


def test_a_size_that_does_not_divide_is_refused():
    oracle = hardvary.env_grads(loss_fn, has_aux=True, microbatch_size=3)
    with pytest.raises(ValueError, match=r"must divide .* got 3 for 8"):
        oracle(PARAMS, BATCH)


def test_a_training_step_in_microbatches_composes():
    tx = optax.chain(hardvary.and_mask(0.5), optax.sgd(0.1))

    @compile_quickly
    def step(params, state):
        oracle = hardvary.env_grads(loss_fn, has_aux=True, microbatch_size=2)
        grads, _ = oracle(params, BATCH)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, _ = step(PARAMS, tx.init(PARAMS))
    assert np.abs(params["w"] - PARAMS["w"]).max() > 0
