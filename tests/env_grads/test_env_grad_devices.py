"""Gradients of environments that are spread over devices equal those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import hardvary
from tests._asserts import assert_trees_close
from tests._compat import set_mesh
from tests.fused._answers import ANSWERS, ask, signed_weights
from tests.zoo import compile_quickly

NUM_ENVS, DEVICES = 8, 4


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def mesh():
    # Four of the eight.
    return jax.make_mesh(
        (DEVICES,),
        ("env",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[4:],
    )


# A product, a lookup, a convolution by the scan, and two that are stacked together.
PARAMS = {
    "table": normal(12, 6),
    "kernel": normal(3, 1, 2),
    "readout": normal(12, 3),
    "bias": normal(3),
    "unused": normal(2),
}
BATCH = {
    "id": jnp.asarray(np.random.default_rng(0).integers(0, 12, NUM_ENVS), jnp.int32),
    "y": normal(NUM_ENVS, 3),
}
WEIGHTS = np.array([1, 2, 0, 0, 0.5, 1, 0, 3], np.float32)  # a device without any


def loss_fn(params, batch):
    x = params["table"][batch["id"]]
    x = jax.lax.conv_general_dilated(
        x[None, :, None],
        params["kernel"],
        (1,),
        "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"),
    )
    y = jnp.sin(x.reshape(-1) @ params["readout"] + params["bias"])
    return jnp.mean(jnp.square(y - batch["y"]))


def spread(function, mesh, in_specs, out_specs=None, check_vma=True):
    return compile_quickly(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=P() if out_specs is None else out_specs,
            check_vma=check_vma,
        )
    )


@functools.cache
def on_one_device(weighted):
    @compile_quickly
    def run(params, batch, weights):
        oracle = hardvary.value_and_env_grads(loss_fn)
        losses, grads = oracle(params, batch, env_weights=weights)
        answers = ask(grads, signed_weights(NUM_ENVS), stack=True)
        tree = {
            "gramian": hardvary.gramian(grads),
            "norms": hardvary.norms(grads),
            "mask": hardvary.mask(grads, 0.25),
            "agreement": hardvary.agreement(grads),
        }
        return losses, answers, tree

    return run(PARAMS, BATCH, WEIGHTS if weighted else None)


def without_axes(answers):
    """A `GradStats` remembers its axes, in the structure."""
    fields = [f for f in vars(hardvary.GradStats()) if f not in ("axis_names", "guard")]
    stats = jax.tree.map(
        lambda leaf: {field: getattr(leaf, field) for field in fields},
        answers["stats"],
        is_leaf=lambda node: isinstance(node, hardvary.GradStats),
    )
    return {**answers, "stats": stats}


@pytest.mark.parametrize(
    ("weighted", "check_vma"),
    [(False, True), (True, True), (True, False)],
    ids=["plain", "weighted", "weighted_no_vma"],
)
def test_answers_over_devices_equal_one_device(mesh, weighted, check_vma):
    def run(params, batch, weights):
        oracle = hardvary.value_and_env_grads(loss_fn, axis_name="env")
        losses, grads = oracle(params, batch, env_weights=weights if weighted else None)
        assert grads["bias"].num_envs == NUM_ENVS
        answers = ask(grads, signed_weights(NUM_ENVS), stack=True)
        tree = {
            "gramian": hardvary.gramian(grads),
            "norms": hardvary.norms(grads),
            "mask": hardvary.mask(grads, 0.25),
            "agreement": hardvary.agreement(grads),
        }
        return losses, without_axes(answers), tree

    over = spread(
        run,
        mesh,
        (P(), P("env"), P("env")),
        (P("env"), dict.fromkeys(ANSWERS, P()), P()),
        check_vma,
    )
    losses, answers, tree = over(PARAMS, BATCH, WEIGHTS)
    expected_losses, expected, expected_tree = on_one_device(weighted)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_trees_close(answers, without_axes(expected), rtol=1e-4, atol=1e-5)
    assert_trees_close(tree, expected_tree, rtol=1e-4, atol=1e-5)


def normalised(gramian):
    lengths = jnp.sqrt(jnp.diagonal(gramian))
    return 1 / jnp.maximum(lengths, 1e-6) / len(gramian)


RULES = {
    "and_mask": functools.partial(hardvary.and_mask, 0.25, rescale=True),
    "sand_mask": functools.partial(hardvary.sand_mask, 0.2, sharpness=2.0),
    "weighting": functools.partial(hardvary.weighting, normalised),
    "imtl_g": hardvary.imtl_g,
    # Every device has to draw the same.
    "pcgrad": functools.partial(hardvary.pcgrad, 0),
    "grad_vac": functools.partial(hardvary.grad_vac, 0, num_envs=NUM_ENVS),
    "clip_env_norms": functools.partial(hardvary.clip_env_norms, 0.5),
}


def updates_of(params, batch, weights, axis_of_oracle=None, axis_of_rule=None):
    if axis_of_rule is not None and axis_of_oracle is None:
        # What an aggregator is to gather has to be stacked, and weighted there.
        grads = hardvary.per_env_grad(loss_fn)(params, batch)
        extra = {"env_weights": weights}
    else:
        oracle = hardvary.env_grads(loss_fn, axis_name=axis_of_oracle)
        grads, extra = oracle(params, batch, env_weights=weights), {}
    found = {}
    for name, make in RULES.items():
        tx = make(axis_name=axis_of_rule)
        found[name] = tx.update(grads, tx.init(params), params, **extra)
    return found


@functools.cache
def updates_on_one_device():
    return compile_quickly(updates_of)(PARAMS, BATCH, WEIGHTS)


@pytest.mark.parametrize(
    ("axes", "check_vma"),
    [
        (("env", None), True),
        ((None, "env"), True),
        (("env", "env"), True),
        (("env", "env"), False),
    ],
    ids=["oracle", "aggregator", "both", "both_no_vma"],
)
def test_aggregators_of_spread_environments_equal_one_device(mesh, axes, check_vma):
    over = spread(
        lambda *args: updates_of(*args, *axes),
        mesh,
        (P(), P("env"), P("env")),
        check_vma=check_vma,
    )
    actual = over(PARAMS, BATCH, WEIGHTS)
    assert_trees_close(actual, updates_on_one_device(), rtol=1e-3, atol=1e-5)


def test_stacked_gradients_of_spread_environments_have_the_products_of_all(mesh):
    def run(params, batch, weights):
        grads = hardvary.per_env_grad(loss_fn)(params, batch)
        settings = {"env_weights": weights, "axis_name": "env"}
        signed = jnp.asarray(signed_weights(NUM_ENVS))
        return (
            hardvary.gramian(grads, **settings),
            hardvary.norms(grads, **settings),
            hardvary.combine(grads, signed, **settings),
            hardvary.mask(grads, 0.25, **settings),
        )

    over = spread(run, mesh, (P(), P("env"), P("env")))
    gramian, norms, combined, mask = over(PARAMS, BATCH, WEIGHTS)
    _, answers, tree = on_one_device(True)
    assert_trees_close(gramian, tree["gramian"], rtol=1e-4, atol=1e-5)
    assert_trees_close(norms, tree["norms"], rtol=1e-4, atol=1e-5)
    assert_trees_close(combined, answers["combine"], rtol=1e-4, atol=1e-5)
    assert_trees_close(mask, tree["mask"])


def test_answers_over_two_axes_equal_one_device():
    mesh = jax.make_mesh(
        (2, 2),
        ("host", "chip"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:4],
    )
    axes = ("host", "chip")

    def run(params, batch, weights):
        oracle = hardvary.env_grads(loss_fn, axis_name=axes)
        grads = oracle(params, batch, env_weights=weights)
        return without_axes(ask(grads, signed_weights(NUM_ENVS), stack=True))

    over = spread(run, mesh, (P(), P(axes), P(axes)))
    expected = without_axes(on_one_device(True)[1])
    assert_trees_close(over(PARAMS, BATCH, WEIGHTS), expected, rtol=1e-4, atol=1e-5)


def test_answers_over_a_vmapped_axis_equal_one_axis():
    groups, weights = jax.tree.map(
        lambda leaf: jnp.asarray(leaf).reshape(4, 2, *leaf.shape[1:]), (BATCH, WEIGHTS)
    )

    def run(batch, weights):
        oracle = hardvary.env_grads(loss_fn, axis_name="group")
        grads = oracle(PARAMS, batch, env_weights=weights)
        return without_axes(ask(grads, signed_weights(NUM_ENVS), stack=True))

    every = compile_quickly(jax.vmap(run, axis_name="group"))(groups, weights)
    expected = without_axes(on_one_device(True)[1])
    for group in range(4):
        actual = jax.tree.map(lambda leaf, group=group: leaf[group], every)
        assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_model_trains_the_same_on_devices_that_share_its_environments(mesh):
    tx = optax.chain(hardvary.and_mask(0.25), optax.sgd(0.1, momentum=0.9))

    def train(params, batch, axis_name):
        oracle = hardvary.value_and_env_grads(loss_fn, axis_name=axis_name)

        def step(carry, _):
            params, state = carry
            _, grads = oracle(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=5)[0][0]

    over = spread(functools.partial(train, axis_name="env"), mesh, (P(), P("env")))
    expected = compile_quickly(functools.partial(train, axis_name=None))
    assert_trees_close(
        over(PARAMS, BATCH), expected(PARAMS, BATCH), rtol=1e-4, atol=1e-5
    )


def test_env_grads_of_an_explicitly_sharded_batch_name_the_way_to_have_them():
    mesh = jax.make_mesh(
        (DEVICES,),
        ("env",),
        axis_types=(jax.sharding.AxisType.Explicit,),
        devices=jax.devices()[:DEVICES],
    )
    sharding = jax.sharding.NamedSharding(mesh, P("env"))
    batch = jax.device_put(BATCH, sharding)
    message = r"value_and_grad_stats takes them, or call it inside jax\.shard_map"
    with set_mesh(mesh), pytest.raises(ValueError, match=message):
        hardvary.env_grads(loss_fn)(PARAMS, batch)
