"""Environments spread over devices or mapped axes equal those on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import hardvary
from hardvary._compat import vary
from tests._asserts import assert_trees_close, field_of
from tests._compat import set_mesh
from tests._inputs import AGGREGATORS, PLAIN_AGGREGATORS, STATISTICS
from tests.zoo.blocks import floats

NUM_ENVS = 16
# `soft_and_mask` asks for what `and_mask` does.
every_aggregator = pytest.mark.parametrize(
    "name", [name for name in AGGREGATORS if name != "soft_and_mask"]
)
every_method = pytest.mark.parametrize("method", ["fused", "vmap", "scan"])
check_vma = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])


@pytest.fixture(scope="module")
def mesh():
    assert jax.device_count() == 8
    return jax.make_mesh((8,), ("env",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(scope="module")
def params():
    return {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.1)}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return floats(rng.normal(size=(NUM_ENVS, 5, 3)))


def loss_fn(params, x, shift=1.0):
    return jnp.mean((x @ params["w"] + params["b"] - shift) ** 2)


def on_one_device(name, params, batch, env_weights=None):
    tx = AGGREGATORS[name](0.5, rescale=True)
    extra = {} if env_weights is None else {"env_weights": env_weights}
    return tx.update(
        hardvary.per_env_grad(loss_fn)(params, batch), tx.init(params), params, **extra
    )


def statistics_of(stats):
    """What a tree of GradStats says, apart from how it came about."""
    fields = dataclasses.fields(hardvary.GradStats)
    names = [f.name for f in fields if f.name not in ("axis_names", "guard")]
    return {name: field_of(stats, name) for name in names}


def over_devices(function, mesh, in_specs, check_vma, out_specs=None):
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=P() if out_specs is None else out_specs,
            check_vma=check_vma,
        )
    )


@every_aggregator
@check_vma
@pytest.mark.parametrize("route", ["stacked", "fused", "vmap", "scan"])
def test_aggregator_with_axis_name_in_shard_map_equals_one_device(
    mesh, params, batch, name, route, check_vma
):
    def update(params, batch):
        if route == "stacked":
            grads = hardvary.per_env_grad(loss_fn)(params, batch)
        else:
            # Parameters are the same everywhere, and jax sums the gradient of such
            # over devices by itself: no sign would be left to count.
            grads = hardvary.grad_stats(loss_fn, stats=STATISTICS, method=route)(
                params, batch
            )
        tx = AGGREGATORS[name](0.5, rescale=True, axis_name="env")
        return tx.update(grads, tx.init(params), params)

    actual = over_devices(update, mesh, (P(), P("env")), check_vma)(params, batch)
    assert_trees_close(actual, on_one_device(name, params, batch))


@pytest.mark.parametrize("name", PLAIN_AGGREGATORS)
def test_plain_aggregators_with_axis_name_in_shard_map_equal_one_device(
    mesh, params, batch, name
):
    # Those that draw: the same numbers, on every device and for every number of them.
    def update(params, batch, axis_name="env"):
        tx = PLAIN_AGGREGATORS[name](axis_name=axis_name)
        grads = hardvary.per_env_grad(loss_fn)(params, batch)
        return tx.update(grads, tx.init(params), params)

    actual = over_devices(update, mesh, (P(), P("env")), True)(params, batch)
    expected = jax.jit(functools.partial(update, axis_name=None))(params, batch)
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("name", ["grad_drop", "agr_rand"])
def test_aggregators_that_draw_on_an_explicit_mesh_equal_one_device(name):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    grads = floats(np.random.default_rng(0).normal(size=(3, 16)))

    @jax.jit
    def update(grads):
        tx = PLAIN_AGGREGATORS[name]()
        return tx.update(grads, tx.init(None))

    expected = update(grads)
    with set_mesh(mesh):
        spread = jax.NamedSharding(mesh, P(None, "model"))
        actual = update(jax.device_put(grads, spread))
    assert_trees_close(actual, expected)
    assert actual[0].sharding.spec == P("model")


@every_method
@check_vma
def test_grad_stats_with_axis_name_in_shard_map_equal_one_device(
    mesh, params, batch, method, check_vma
):
    settings = {"stats": STATISTICS, "method": method}
    oracle = hardvary.value_and_grad_stats(loss_fn, axis_name="env", **settings)
    run = over_devices(oracle, mesh, (P(), P("env")), check_vma, (P("env"), P()))
    losses, stats = run(params, batch)
    expected = hardvary.value_and_grad_stats(loss_fn, **settings)(params, batch)
    assert_trees_close(losses, expected[0])
    assert_trees_close(statistics_of(stats), statistics_of(expected[1]))


@every_aggregator
@check_vma
def test_axis_name_on_oracle_and_aggregator_counts_nobody_twice(
    mesh, params, batch, name, check_vma
):
    def update(params, batch):
        oracle = hardvary.grad_stats(loss_fn, stats=STATISTICS, axis_name="env")
        tx = AGGREGATORS[name](0.5, rescale=True, axis_name="env")
        return tx.update(oracle(params, batch), tx.init(params), params)

    actual = over_devices(update, mesh, (P(), P("env")), check_vma)(params, batch)
    assert_trees_close(actual, on_one_device(name, params, batch))


@check_vma
@pytest.mark.parametrize("route", ["stacked", "scan"])
def test_aggregator_with_all_environments_of_a_device_absent_ignores_it(
    mesh, params, batch, route, check_vma
):
    weights = jnp.where(jnp.arange(NUM_ENVS) < 11, 1.0, 0.0)
    broken = jnp.where(weights[:, None, None] > 0, batch, jnp.nan)

    def update(params, batch, weights):
        tx = hardvary.and_mask(0.5, rescale=True, axis_name="env")
        state = tx.init(params)
        if route == "stacked":
            grads = hardvary.per_env_grad(loss_fn)(params, batch)
            return tx.update(grads, state, params, env_weights=weights)
        stats = hardvary.grad_stats(loss_fn)(params, batch, env_weights=weights)
        return tx.update(stats, state, params)

    run = over_devices(update, mesh, (P(), P("env"), P("env")), check_vma)
    expected = on_one_device("and_mask", params, batch[:11])
    assert_trees_close(run(params, broken, weights), expected)


@pytest.mark.parametrize("source", ["keyword", "closure"])
@every_method
def test_grad_stats_with_device_dependence_outside_the_batch_equal_one_device(
    mesh, params, batch, method, source
):
    # The batch is the same on every device; the target is not.
    shifts = jnp.arange(8.0)

    def run(params, batch, shift):
        if source == "keyword":
            oracle = hardvary.grad_stats(
                loss_fn,
                method=method,
                axis_name="env",
                in_axes={"shift": None},
            )
            return oracle(params, batch, shift=shift[0])
        loss = functools.partial(loss_fn, shift=shift[0])
        return hardvary.grad_stats(loss, method=method, axis_name="env")(params, batch)

    actual = over_devices(run, mesh, (P(), P(), P("env")), True)(
        params, batch[:2], shifts
    )
    everything = (jnp.tile(batch[:2], (8, 1, 1)), jnp.repeat(shifts, 2))
    expected = hardvary.grad_stats(lambda p, b: loss_fn(p, b[0], shift=b[1]))(
        params, everything
    )
    assert_trees_close(statistics_of(actual), statistics_of(expected))


@every_aggregator
@pytest.mark.parametrize("where", ["oracle", "aggregator", "both"])
def test_axis_name_under_vmap_equals_one_axis(params, batch, name, where):
    groups = batch.reshape(4, 4, 5, 3)

    def update(batch):
        oracle = hardvary.grad_stats(
            loss_fn,
            stats=STATISTICS,
            axis_name=None if where == "aggregator" else "group",
        )
        tx = AGGREGATORS[name](
            0.5, rescale=True, axis_name=None if where == "oracle" else "group"
        )
        return tx.update(oracle(params, batch), tx.init(params), params)

    every_group = jax.jit(jax.vmap(update, axis_name="group"))(groups)
    expected = on_one_device(name, params, batch)
    for group in range(4):
        assert_trees_close(
            jax.tree.map(lambda leaf, group=group: leaf[group], every_group), expected
        )


def test_axis_name_of_several_axes_in_shard_map_equals_one_device(params, batch):
    mesh = jax.make_mesh(
        (2, 4), ("host", "chip"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    axes = ("host", "chip")

    def update(params, batch):
        stats = hardvary.grad_stats(loss_fn, axis_name=axes)(params, batch)
        tx = hardvary.and_mask(0.5, rescale=True)
        return tx.update(stats, tx.init(params), params)

    actual = over_devices(update, mesh, (P(), P(axes)), True)(params, batch)
    assert_trees_close(actual, on_one_device("and_mask", params, batch))


@every_method
def test_grad_stats_of_a_sharded_batch_under_plain_jit_equal_one_device(
    mesh, params, batch, method
):
    sharded = jax.device_put(batch, NamedSharding(mesh, P("env")))
    oracle = jax.jit(
        hardvary.value_and_grad_stats(loss_fn, stats=STATISTICS, method=method)
    )
    assert_trees_close(oracle(params, sharded), oracle(params, batch))


@every_method
def test_grad_stats_of_an_explicitly_sharded_batch_equal_one_device(
    params, batch, method
):
    # Explicit axes are what jax.make_mesh makes unless told otherwise.
    mesh = jax.make_mesh((8,), ("env",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharded = jax.device_put(batch, NamedSharding(mesh, P("env")))
    oracle = jax.jit(hardvary.grad_stats(loss_fn, method=method))
    with set_mesh(mesh):
        actual = oracle(params, sharded)
    assert_trees_close(actual, oracle(params, batch))


@every_method
def test_value_and_grad_stats_of_an_explicitly_sharded_batch_with_weights_and_aux(
    params, batch, method
):
    mesh = jax.make_mesh((8,), ("env",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = NamedSharding(mesh, P("env"))
    weights = jnp.arange(NUM_ENVS, dtype=jnp.float32) % 3

    def with_aux(params, x):
        return loss_fn(params, x), {"first": x[0, 0]}

    oracle = jax.jit(
        hardvary.value_and_grad_stats(
            with_aux, stats=STATISTICS, method=method, has_aux=True
        )
    )
    with set_mesh(mesh):
        actual = oracle(
            params,
            jax.device_put(batch, sharding),
            env_weights=jax.device_put(weights, sharding),
        )
    assert_trees_close(actual, oracle(params, batch, env_weights=weights))


@every_method
def test_parameters_that_differ_between_devices_are_refused_by_every_method(
    mesh, batch, method
):
    rows = jnp.arange(8.0)

    def gathered(row, x):
        whole = jax.lax.all_gather(row, "env", axis=0, tiled=True)
        return jnp.mean(x) * jnp.sum(whole**2)

    def run(row, batch):
        oracle = hardvary.grad_stats(gathered, method=method, axis_name="env")
        return oracle(row, batch).sign_sum

    with pytest.raises(ValueError, match="collects parameters over the axis 'env'"):
        over_devices(run, mesh, (P("env"), P("env")), True)(rows, batch)


@pytest.mark.parametrize(
    "ask",
    [
        lambda grads: hardvary.and_mask(0.5, axis_name="env").update(
            grads, hardvary.and_mask(0.5).init(grads)
        )[0],
        lambda grads: hardvary.mgda(axis_name="env").update(
            grads, hardvary.mgda().init(grads)
        )[0],
        lambda grads: hardvary.agreement(grads, axis_name="env"),
        lambda grads: hardvary.gramian(grads, axis_name="env"),
    ],
    ids=["and_mask", "mgda", "agreement", "gramian"],
)
def test_gradients_that_shard_map_has_summed_over_devices_are_refused(
    ask, mesh, params, batch
):
    def by_hand(params, batch):
        return ask(jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch))

    def cast(params, batch):
        own = jax.tree.map(lambda leaf: vary(leaf, ("env",)), params)
        return by_hand(own, batch)

    def run(local, **settings):
        specs = (P(), P("env"))
        spread = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=P(), **settings
        )
        return jax.jit(spread)(params, batch)

    message = (
        r"\['b'\] are the same on all devices of the axis 'env'.*(pcast|pvary)\(params"
    )
    with pytest.raises(ValueError, match=message):
        run(by_hand)
    # Without types nothing is summed, and nothing has to be said.
    assert_trees_close(run(cast), run(by_hand, check_vma=False))


def test_gradients_that_vary_over_one_of_two_axes_are_refused(params, batch):
    mesh = jax.make_mesh(
        (4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def local(params, batch):
        own = jax.tree.map(lambda leaf: vary(leaf, ("a",)), params)
        grads = jax.vmap(jax.grad(loss_fn), (None, 0))(own, batch)
        return hardvary.agreement(grads, axis_name=("a", "b"))

    with pytest.raises(ValueError, match=r"axis 'b'.*(pcast|pvary)\(params, \('b',\)"):
        jax.shard_map(local, mesh=mesh, in_specs=(P(), P(("a", "b"))), out_specs=P())(
            params, batch
        )
