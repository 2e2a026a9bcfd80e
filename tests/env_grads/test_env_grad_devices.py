"""Gradients of environments that are spread over devices equal those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import hardvary
from hardvary import _compat, sharding
from tests._asserts import assert_trees_close
from tests._compat import set_mesh
from tests.fused._answers import ANSWERS, ask, make_env_oracle, signed_weights
from tests.fused._models import build
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


def answers_of(params, batch, weights, **settings):
    oracle = hardvary.value_and_env_grads(loss_fn, **settings)
    losses, grads = oracle(params, batch, env_weights=weights)
    assert grads["bias"].num_envs == NUM_ENVS
    answers = ask(grads, signed_weights(NUM_ENVS), stack=True)
    tree = {
        "gramian": hardvary.gramian(grads),
        "norms": hardvary.norms(grads),
        "mask": hardvary.mask(grads, 0.25),
        "agreement": hardvary.agreement(grads),
    }
    return losses, answers, tree


@functools.cache
def on_one_device(weighted):
    weights = WEIGHTS if weighted else None
    return compile_quickly(answers_of)(PARAMS, BATCH, weights)


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
        own = weights if weighted else None
        losses, answers, tree = answers_of(params, batch, own, axis_name="env")
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
    "upgrad": hardvary.upgrad,
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


# Meshes with explicit axes: types carry the sharding, and nobody names an axis.


def explicit_mesh(shape=(DEVICES,), names=("env",)):
    return jax.make_mesh(
        shape,
        names,
        axis_types=(jax.sharding.AxisType.Explicit,) * len(shape),
        devices=jax.devices()[: np.prod(shape)],
    )


def place(mesh, tree, spec=None):
    spec = P("env") if spec is None else spec
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))


@pytest.mark.parametrize(
    ("weighted", "settings"),
    [(False, {}), (True, {}), (True, {"microbatch_size": 1})],
    ids=["plain", "weighted", "microbatches"],
)
def test_answers_on_an_explicit_mesh_equal_one_device(weighted, settings):
    mesh = explicit_mesh()
    run = compile_quickly(functools.partial(answers_of, **settings))
    with set_mesh(mesh):
        weights = place(mesh, WEIGHTS) if weighted else None
        actual = run(PARAMS, place(mesh, BATCH), weights)
    losses, answers, _ = actual
    assert_trees_close(actual, on_one_device(weighted), rtol=1e-4, atol=1e-5)
    # Stacked gradients stay where their environments are.
    stacks = jax.tree.leaves(answers.pop("stack"))
    assert {leaf.sharding.spec[0] for leaf in [losses, *stacks]} == {"env"}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(answers))


def test_answers_on_a_mesh_whose_axes_share_the_environments_equal_one_device():
    mesh = explicit_mesh((2, 2), ("host", "chip"))
    spec = P(("host", "chip"))
    with set_mesh(mesh):
        actual = compile_quickly(answers_of)(
            PARAMS, place(mesh, BATCH, spec), place(mesh, WEIGHTS, spec)
        )
    assert_trees_close(actual, on_one_device(True), rtol=1e-4, atol=1e-5)


def test_answers_beside_an_explicit_axis_for_something_else_equal_one_device():
    # The weights come without a sharding of their own.
    mesh = explicit_mesh((2, 2), ("env", "model"))
    with set_mesh(mesh):
        actual = compile_quickly(answers_of)(PARAMS, place(mesh, BATCH), WEIGHTS)
    assert_trees_close(actual, on_one_device(True), rtol=1e-4, atol=1e-5)


def test_answers_inside_shard_map_over_another_axis_equal_one_device():
    mesh = explicit_mesh((2, 2), ("host", "env"))

    def run(params, batch, weights):
        oracle = hardvary.env_grads(loss_fn, axis_name="host")
        batch, weights = sharding.spread_over((batch, weights), ("env",))
        grads = oracle(params, batch, env_weights=weights)
        return without_axes(ask(grads, signed_weights(NUM_ENVS)))

    over = compile_quickly(
        jax.shard_map(
            run,
            in_specs=(P(), P("host"), P("host")),
            out_specs=P(),
            axis_names={"host"},
        )
    )
    with set_mesh(mesh):
        batch, weights = place(mesh, (BATCH, WEIGHTS), P("host"))
        if not _compat.NESTED_AXIS_INDEX:
            with pytest.raises(ValueError, match=r"'host' .* 'env' .* need jax 0\.10"):
                over(PARAMS, batch, weights)
            return
        actual = over(PARAMS, batch, weights)
    expected = without_axes(on_one_device(True)[1])
    del expected["stack"]
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_answers_of_a_sharded_batch_under_plain_jit_equal_one_device(mesh):
    actual = compile_quickly(answers_of)(
        PARAMS, place(mesh, BATCH), place(mesh, WEIGHTS)
    )
    assert_trees_close(actual, on_one_device(True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["oracle", "stacked"])
def test_aggregators_on_an_explicit_mesh_equal_one_device(source):
    mesh = explicit_mesh()

    def run(params, batch, weights):
        if source == "oracle":
            return updates_of(params, batch, weights)
        grads = hardvary.env_grads(loss_fn)(params, batch)
        grads = jax.tree.map(lambda grad: grad.stack(), grads)
        return {
            name: make().update(grads, make().init(params), env_weights=weights)
            for name, make in RULES.items()
        }

    with set_mesh(mesh):
        actual = compile_quickly(run)(PARAMS, place(mesh, BATCH), place(mesh, WEIGHTS))
    assert_trees_close(actual, updates_on_one_device(), rtol=1e-3, atol=1e-5)


def test_whitening_and_losses_as_arguments_on_an_explicit_mesh_equal_one_device():
    params = {"hidden": normal(5, 4), "bias": normal(4), "readout": normal(4, 3)}
    batch = {"x": normal(NUM_ENVS, 6, 5), "y": normal(NUM_ENVS, 6, 3)}
    rules = {
        "whiten": hardvary.whiten_inputs(hardvary.upgrad(), every=1),
        "log_losses": hardvary.spectral_and_mask(0.5, log_losses=True),
    }

    def dense(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["hidden"] + params["bias"][None])
        return jnp.mean(jnp.square(hidden @ params["readout"] - batch["y"]))

    @compile_quickly
    def run(params, batch, weights):
        oracle = hardvary.value_and_env_grads(dense)
        losses, grads = oracle(params, batch, env_weights=weights)
        return [
            tx.update(grads, tx.init(params), params, env_losses=losses)[0]
            for tx in rules.values()
        ]

    expected = run(params, batch, WEIGHTS)
    mesh = explicit_mesh()
    with set_mesh(mesh):
        actual = run(params, *place(mesh, (batch, WEIGHTS)))
    assert_trees_close(actual, expected, rtol=1e-3, atol=1e-5)


# Loops, convolutions that are used once and several times, groups that meet.
@pytest.mark.parametrize(
    "name",
    [
        "gru_by_scan",
        "nested_scans",
        "dense_several_rows",
        "embedding_used_as_output_too",
        "hypernetwork",
        "conv_used_twice",
        "weight_norm",
    ],
)
def test_zoo_on_an_explicit_mesh_equals_one_device(name):
    params, _, batch = build(name)
    weights = np.array([1, 2, 0, 0, 0.5, 3], np.float32)
    run = compile_quickly(make_env_oracle(name))
    expected = run(params, batch, signed_weights(6), weights)
    mesh = explicit_mesh((3,))
    with set_mesh(mesh):
        actual = run(
            params, place(mesh, batch), signed_weights(6), place(mesh, weights)
        )
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


def scaled_loss(params, batch, scale):
    # A loop that begins with zeros: a loss knows nothing of shard_map.
    def body(total, _):
        return total + jnp.sum(params * batch * scale), None

    total, _ = jax.lax.scan(body, jnp.zeros(()), None, length=2)
    return total**2


@pytest.mark.parametrize("spec", [P(), P("env")], ids=["replicated", "spread"])
def test_what_environments_share_on_an_explicit_mesh_equals_one_device(spec):
    params, batch, scale = normal(4), normal(NUM_ENVS, 4), normal(4, seed=1)
    settings = {"in_axes": (None, 0, None)}

    @compile_quickly
    def run(params, batch, scale):
        gradients = hardvary.env_grads(scaled_loss, **settings)
        parts = hardvary.env_grads(scaled_loss, microbatch_size=1, **settings)
        stats = hardvary.grad_stats(scaled_loss, **settings)(params, batch, scale)
        gramians = [f(params, batch, scale).gramian() for f in (gradients, parts)]
        return gramians, stats.mean, stats.sign_sum

    expected = run(params, batch, scale)
    mesh = explicit_mesh()
    with set_mesh(mesh):
        actual = run(params, place(mesh, batch), place(mesh, scale, spec))
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("oracle", [hardvary.env_grads, hardvary.grad_stats])
def test_a_loss_that_closes_over_an_array_of_an_explicit_mesh_is_told_what_to_do(
    oracle,
):
    mesh = explicit_mesh()

    @jax.jit
    def run(params, batch, scale):
        return oracle(functools.partial(scaled_loss, scale=scale))(params, batch).mean

    errors = (ValueError, NotImplementedError)
    message = "(?i)closing over inputs|context mesh"
    with set_mesh(mesh), pytest.raises(errors, match=message) as raised:
        run(normal(4), place(mesh, normal(NUM_ENVS, 4)), normal(4))
    assert "in_axes={argument: None}" in " ".join(raised.value.__notes__)


def test_a_mesh_that_is_not_at_hand_names_the_way_to_have_it():
    batch = place(explicit_mesh(), BATCH)
    for oracle in (hardvary.env_grads, hardvary.grad_stats):
        with pytest.raises(
            ValueError, match=r"explicit axes \('env',\) .*mesh\(mesh\)"
        ):
            oracle(loss_fn)(PARAMS, batch)


def test_what_an_explicit_mesh_does_not_allow_names_the_way_to_have_it():
    mesh = explicit_mesh((2, 2), ("env", "model"))
    batch = place(mesh, BATCH)
    split = PARAMS | {"table": place(mesh, PARAMS["table"], P("model"))}
    with set_mesh(mesh):
        with pytest.raises(ValueError, match=r"replicated over the mesh.*'table'"):
            hardvary.env_grads(loss_fn)(split, batch)
        with pytest.raises(ValueError, match="of a device, got 3 for 4"):
            hardvary.env_grads(loss_fn, microbatch_size=3)(PARAMS, batch)
        with pytest.raises(ValueError, match="value_and_grad_stats takes them"):
            hardvary.env_grads(loss_fn, env_axis_name="batch")(PARAMS, batch)


@pytest.mark.parametrize(
    "ask",
    [
        lambda grads: hardvary.and_mask(0.5, axis_name="env").update(
            grads, hardvary.and_mask(0.5).init(PARAMS)
        ),
        lambda grads: hardvary.upgrad(axis_name="env").update(
            grads, hardvary.upgrad().init(PARAMS)
        ),
        lambda grads: hardvary.agreement(grads, axis_name="env"),
        lambda grads: hardvary.gramian(grads, axis_name=("other", "env")),
    ],
    ids=["and_mask", "upgrad", "agreement", "gramian"],
)
@pytest.mark.parametrize("check_vma", [True, False])
def test_an_axis_that_only_the_aggregator_was_given_is_refused(mesh, ask, check_vma):
    def update(params, batch):
        return ask(hardvary.env_grads(loss_fn)(params, batch))

    over = spread(update, mesh, (P(), P("env")), check_vma=check_vma)
    with pytest.raises(ValueError, match="give axis_name to value_and_env_grads"):
        over(PARAMS, BATCH)


@pytest.mark.parametrize(
    "oracle",
    [
        hardvary.env_grads,
        hardvary.grad_stats,
        functools.partial(hardvary.grad_stats, method="scan"),
    ],
    ids=["env_grads", "grad_stats", "scan"],
)
def test_an_axis_that_nothing_maps_is_named(mesh, oracle):
    message = "axis_name='data', and no axis 'data' is mapped here"
    grads = oracle(loss_fn, axis_name="data")
    with pytest.raises(ValueError, match=message):
        grads(PARAMS, BATCH, env_weights=WEIGHTS)
    over = spread(
        grads,
        mesh,
        (P(), P("env")),
    )
    with pytest.raises(ValueError, match=message):
        over(PARAMS, BATCH)
