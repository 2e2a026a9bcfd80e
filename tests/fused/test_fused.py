"""The fused oracle: its rules, memory, refusals, and what accelerators do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import hardvary
from hardvary import sharding
from tests._asserts import assert_trees_close, field_of
from tests._compat import equations_of, set_mesh
from tests._inputs import STATISTICS
from tests.fused._models import build, check, make_oracle
from tests.fused._stacked import assert_equals_stacked, floats
from tests.zoo import compile_quickly

NUM_ENVS = 6


def shape_of(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


RULES = {
    # name: (loss of one environment, parameter's shape, batch's shape, rule)
    "dense_one_row": (
        lambda w, x: jnp.sum(jnp.tanh(x @ w)),
        (70, 80),
        (70,),
        "product",
    ),
    "dense_of_the_transpose": (
        lambda w, x: jnp.sum(jnp.tanh(w.T @ x)),
        (70, 80),
        (70,),
        "product",
    ),
    "dense_reshaped": (
        lambda w, x: jnp.sum(jnp.tanh(x @ w.reshape(70, 80))),
        (70, 8, 10),
        (70,),
        "product",
    ),
    "heads": (
        lambda w, x: jnp.sum(jnp.tanh(jnp.einsum("hd,hdk->hk", x, w))),
        (3, 50, 40),
        (3, 50),
        "product",
    ),
    "dense_several_rows": (
        lambda w, x: jnp.sum(jnp.tanh(x @ w)),
        (70, 80),
        (4, 70),
        "scan",
    ),
    "dense_nonlinear_in_the_parameter": (
        lambda w, x: jnp.sum(jnp.tanh(x @ jnp.sin(w))),
        (70, 80),
        (70,),
        "scan",
    ),
    "dense_used_twice": (
        lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w)),
        (70, 70),
        (70,),
        "scan",
    ),
    "dense_regularised": (
        lambda w, x: jnp.sum(jnp.tanh(x @ w)) + jnp.sum(w**2),
        (70, 80),
        (70,),
        "scan",
    ),
    "dense_small": (
        lambda w, x: jnp.sum(jnp.tanh(x @ w)),
        (7, 8),
        (4, 7),
        "stack",
    ),
    "bias": (lambda w, x: jnp.sum(jnp.tanh(x + w)), (7,), (7,), "stack"),
    "convolution": (
        lambda w, x: jnp.sum(
            jnp.tanh(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME"))
        ),
        (8, 4, 3, 3),
        (1, 4, 9, 9),
        "scan",
    ),
    "unused": (lambda w, x: jnp.sum(x), (7,), (7,), "unused"),
    "stopped": (
        lambda w, x: jnp.sum(jax.lax.stop_gradient(w) * x),
        (7,),
        (7,),
        "unused",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_explain_names_the_rule_of_a_parameter(name):
    loss, param_shape, batch_shape, rule = RULES[name]
    params, batch = {"w": shape_of(*param_shape)}, shape_of(NUM_ENVS, *batch_shape)
    explanation = hardvary.explain(lambda p, x: loss(p["w"], x), params, batch)
    (row,) = explanation.parameters
    assert row.rule == rule
    assert row.reason
    assert row.path == "['w']"
    assert row.shape == param_shape
    assert row.stacked_bytes == 4 * NUM_ENVS * np.prod(param_shape)


def test_explain_of_an_embedding_is_a_lookup():
    def loss(table, ids):
        return jnp.sum(jnp.tanh(jnp.take(table, ids, axis=0)))

    ids = shape_of(NUM_ENVS, 5, dtype=jnp.int32)
    (row,) = hardvary.explain(loss, shape_of(100, 8), ids).parameters
    assert (row.rule, row.path) == ("lookup", "the root")


def test_explain_prints_a_line_for_every_parameter():
    def loss(params, x):
        return params["scale"] * jnp.sum(jnp.tanh(x @ params["w"]))

    params = {"scale": shape_of(), "unused": shape_of(3), "w": shape_of(4, 5)}
    text = str(hardvary.explain(loss, params, shape_of(NUM_ENVS, 4)))
    lines = text.splitlines()
    assert lines[0].split() == [
        *("parameter", "shape", "rule", "reason", "gramian", "inputs", "stacked")
    ]
    assert len(lines) == 1 + len(params)
    assert len({len(line) for line in lines}) == 1
    assert "scalar" in lines[1]
    assert "unused" in lines[2]
    assert "product" in lines[3]


def test_explain_takes_argnums_aux_and_keywords():
    def loss(x, w, *, shift):
        return jnp.sum(jnp.tanh(x @ w + shift)), {"x": x}

    explanation = hardvary.explain(
        loss,
        shape_of(NUM_ENVS, 4),
        shape_of(4, 5),
        argnums=1,
        has_aux=True,
        in_axes={"shift": None},
        shift=jnp.ones(5),
    )
    assert [row.rule for row in explanation.parameters] == ["product"]


# What accelerators do differently, on the models where it matters.


ACCELERATED = [
    "dense_one_row",
    "dense_scalar_output",
    "dense_optax_loss_of_one_example",
    "dense_weight_on_the_left",
    "einsum_three_operands",
    "dense_over_four_axes",
    "dense_of_every_head_one_row",
    "conv_1d_causal_dilated",
    "conv_2d_valid_strides",
    "conv_2d_negative_padding",
    "conv_2d_lhs_dilation",
    "conv_2d_depthwise",
    "conv_2d_kernel_covers_the_input",
    "conv_3d",
    "conv_transpose",
    "conv_of_patches",
    "conv_residual_block",
    "embedding_one_id",
    "embedding_clipped_ids",
    "embedding_wrapped_ids",
    "embedding_one_hot_one_id",
    "weight_standardised_conv",
    "dense_used_transposed_as_well",
    "transformer_with_tied_embedding",
    "custom_vjp_dense",
    "nnx_conv_net_with_batch_norm",
]


@pytest.mark.parametrize("name", ACCELERATED)
def test_fused_stats_as_on_an_accelerator_equal_stacked_gradients(name, monkeypatch):
    monkeypatch.setattr(sharding, "on_cpu", lambda: False)
    params, _, batch = build(name)
    run = compile_quickly(make_oracle(name, stats=STATISTICS))
    check(name, run(params, batch))


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_fused_stats_of_whole_numbers_equal_stacked(dtype, cpu, weighted, monkeypatch):
    def loss(w, x):
        numbers = (((0,), (0,)), ((), ()))
        z = jax.lax.dot_general(x, w, numbers, preferred_element_type=jnp.float32)
        return jnp.sum(jnp.sin(z))

    w, x = floats(3, 2), jnp.asarray(np.arange(15).reshape(5, 3) % 4, dtype)
    if weighted:
        weights = {"env_weights": jnp.array([1.0, 2.0, 0.0, 1.0, 0.5])}
    else:
        weights = {}
    expected = hardvary.grad_stats(loss, stats=STATISTICS, method="vmap")
    expected = expected(w, x, **weights)
    monkeypatch.setattr(sharding, "on_cpu", lambda: cpu)
    got = hardvary.grad_stats(loss, stats=STATISTICS)(w, x, **weights)
    for field in ("mean", "sign_sum", "square_mean", "abs_mean", "nonzero_sum"):
        np.testing.assert_allclose(
            getattr(got, field), getattr(expected, field), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "num_envs", [1, 7, 8, 9, 17, 80, 127, 128, 129, 255, 256, 257, 300, 513]
)
def test_signs_counted_in_words_and_parts_equal_the_definition(num_envs):
    # Scaled, because a saturated tanh has gradients whose sign is a matter of rounding.
    def loss(w, x):
        return jnp.sum(jnp.tanh(0.1 * x @ w))

    w, x = floats(30, 20), np.array(floats(num_envs, 30, seed=1))
    x[:, ::3] = 0
    linear = hardvary.grad_stats(lambda w, x: jnp.sum(x @ w), stats=("sign",))

    @compile_quickly
    def run(w, x, broken):
        grads = jax.vmap(jax.grad(loss), (None, 0))(w, x)
        return hardvary.grad_stats(loss)(w, x), grads, linear(w, broken)

    broken = x.copy()
    broken[-1, 4] = np.nan
    stats, grads, votes = run(w, x, broken)
    np.testing.assert_array_equal(stats.sign_sum, np.sign(grads).sum(0))
    broken = votes.sign_sum
    np.testing.assert_array_equal(np.isnan(broken).all(1), np.arange(30) == 4)
    np.testing.assert_array_equal(np.isnan(broken).any(1), np.arange(30) == 4)


@pytest.mark.parametrize("num_envs", [8, 127, 128, 129, 256, 300])
def test_signs_of_environments_that_all_agree_are_counted_to_the_last(num_envs):
    oracle = hardvary.grad_stats(lambda w, x: jnp.sum(x @ w), stats=("sign",))
    x = np.tile(np.array([1, -1, 0], np.float32), (num_envs, 1))
    stats = compile_quickly(oracle)(floats(3, 2), x)
    expected = np.array([[1], [-1], [0]]) * num_envs
    np.testing.assert_array_equal(stats.sign_sum, np.tile(expected, 2))


# Not finite.


@pytest.mark.parametrize("stats", [("sign",), ("mean", "sign")], ids=str)
def test_fused_of_an_input_that_is_not_finite_is_nan_where_the_gradient_is(stats):
    def two_uses(w, x):
        return jnp.sum(jnp.where(jnp.isfinite(x), x, 0) @ w) + jnp.sum(x @ w) * 0.5

    @compile_quickly
    def run(w, x):
        # One of two uses: the table of rules has a single one.
        single = hardvary.grad_stats(lambda w, x: jnp.sum(x @ w), stats=stats)
        return single(w, x), hardvary.grad_stats(two_uses, stats=stats)(w, x)

    w, x = floats(5, 3), np.array(floats(NUM_ENVS, 5, seed=1))
    for value in (np.nan, np.inf, -np.inf):
        x[2, 1] = value
        for result in run(w, x):
            np.testing.assert_array_equal(np.isnan(result.sign_sum[1]), True)
            assert np.isfinite(np.delete(result.sign_sum, 1, axis=0)).all()


def test_fused_of_a_product_that_overflows_is_nan():
    oracle = hardvary.grad_stats(lambda w, x: jnp.sum((x * 1e30) @ w) * 1e30)
    stats = compile_quickly(oracle)(floats(4, 3), np.ones((NUM_ENVS, 4), np.float32))
    np.testing.assert_array_equal(np.isnan(stats.sign_sum), True)


# Memory.


def temporary_bytes(step, *args):
    # The options leave buffers as they are: it is code generation that they shorten.
    compiled = compile_quickly(step).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rows", [1, 8])
def test_fused_memory_is_that_of_a_plain_step_and_four_times_the_parameters(rows):
    params = [shape_of(256, 256) for _ in range(3)]
    num_params = 4 * 3 * 256 * 256

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    def plain(params, x):
        return jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, x).sum())(params)

    fused = hardvary.grad_stats(loss)
    stacked = hardvary.grad_stats(loss, method="vmap")
    excess = {}
    for num_envs in (16, 64):
        x = shape_of(num_envs, rows, 256)
        base = temporary_bytes(plain, params, x)
        excess[num_envs] = temporary_bytes(fused, params, x) - base
        assert excess[num_envs] <= 4 * num_params
        # Outer products, of one row, jax 0.7 makes where they are added up.
        if rows > 1:
            assert temporary_bytes(stacked, params, x) - base > 4 * num_params
    # Nor does it grow with environments by more than their activations do.
    assert excess[64] - excess[16] <= 48 * rows * 256 * 4 * 3


def test_fused_by_microbatches_bounds_the_memory_of_activations():
    def loss(w, x):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    w, x = shape_of(64, 64), shape_of(64, 256, 64)
    sizes = [
        temporary_bytes(hardvary.grad_stats(loss, microbatch_size=size), w, x)
        for size in (4, 64)
    ]
    assert sizes[0] < sizes[1] / 4


# Collectives inside the loss.


def normalised(params, x, axis):
    mean = jax.lax.pmean(x, axis)
    var = jax.lax.pmean(jnp.square(x - mean), axis)
    return (x - mean) / jnp.sqrt(var + 1e-3) * params["scale"]


def with_shared_norm(params, x, axis="env"):
    hidden = normalised(params, x @ params["w"], axis)
    return jnp.sum(jnp.tanh(hidden @ params["out"]) ** 2)


@pytest.fixture
def norm_params():
    return {"w": floats(4, 5), "scale": floats(5, seed=1), "out": floats(5, 2, seed=2)}


def test_env_axis_name_gives_collectives_all_environments(norm_params):
    x = floats(NUM_ENVS, 4, seed=3)
    settings = {"stats": STATISTICS, "env_axis_name": "env"}
    fused = hardvary.value_and_grad_stats(with_shared_norm, **settings)
    stacked = hardvary.value_and_grad_stats(with_shared_norm, method="vmap", **settings)

    # The copies' gradients add up to the gradient of the sum of all losses.
    def total(params, x):
        each = jax.vmap(with_shared_norm, (None, 0), axis_name="env")
        return jnp.sum(each(params, x))

    @compile_quickly
    def run(params, x):
        return fused(params, x), stacked(params, x), jax.grad(total)(params, x)

    actual, expected, full = run(norm_params, x)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)
    sums = jax.tree.map(lambda mean: mean * NUM_ENVS, field_of(actual[1], "mean"))
    assert_trees_close(sums, full, rtol=1e-4, atol=1e-5)


def test_env_axis_name_in_shard_map_with_both_axes_equals_one_device(norm_params):
    mesh = jax.make_mesh((4,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    x = floats(8, 4, seed=3)
    both = functools.partial(with_shared_norm, axis=("env", "device"))
    oracle = hardvary.value_and_grad_stats(
        both, stats=STATISTICS, axis_name="device", env_axis_name="env"
    )
    run = jax.shard_map(
        oracle,
        mesh=mesh,
        in_specs=(P(), P("device")),
        out_specs=(P("device"), P()),
        # jax 0.10 has no collective over a vmapped axis inside shard_map otherwise.
        check_vma=False,
    )
    losses, stats = compile_quickly(run)(norm_params, x)
    whole = hardvary.value_and_grad_stats(
        with_shared_norm, stats=STATISTICS, env_axis_name="env"
    )
    expected_losses, expected = compile_quickly(whole)(norm_params, x)
    assert_trees_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
    for field in ("mean", "sign_sum", "square_mean", "log_abs_mean", "num_envs"):
        assert_trees_close(
            field_of(stats, field), field_of(expected, field), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("method", ["fused", "vmap"])
@pytest.mark.parametrize(
    "spec",
    [P("data"), P(), P("data", "model"), P(None, "model")],
    ids=["environments", "nothing", "both", "features"],
)
def test_env_axis_name_on_an_explicit_mesh_equals_one_device(norm_params, method, spec):
    explicit = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(explicit, explicit))
    x = floats(8, 4, seed=3)
    weights = jnp.arange(8, dtype=jnp.float32) % 3
    shift = floats(4, seed=4)

    def loss(params, x, shift):
        value = with_shared_norm(params, x + shift)
        return value, {"first": x[0], "loss": value}

    oracle = hardvary.value_and_grad_stats(
        loss, method=method, env_axis_name="env", has_aux=True, in_axes={2: None}
    )
    step = compile_quickly(oracle)
    with set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, spec))
        actual = step(norm_params, spread, shift, env_weights=weights)
    expected = step(norm_params, x, shift, env_weights=weights)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_env_axis_name_on_an_explicit_mesh_takes_parameters_that_it_has_split(
    norm_params,
):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = floats(8, 4, seed=3)
    oracle = jax.jit(hardvary.grad_stats(with_shared_norm, env_axis_name="env"))
    with set_mesh(mesh):
        split = NamedSharding(mesh, P("model"))
        params = norm_params | {"w": jax.device_put(norm_params["w"], split)}
        actual = oracle(params, jax.device_put(x, NamedSharding(mesh, P())))
    assert_trees_close(actual, oracle(norm_params, x), rtol=1e-4, atol=1e-5)


def test_env_axis_name_on_an_explicit_mesh_says_that_arrays_are_arguments(norm_params):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with set_mesh(mesh):
        spread = NamedSharding(mesh, P("data"))
        x, shift = (jax.device_put(floats(8, 4, seed=i), spread) for i in (3, 4))
        oracle = hardvary.grad_stats(
            lambda params, x: with_shared_norm(params, x + shift[0]),
            env_axis_name="env",
        )
        with pytest.raises(ValueError, match=r"(?i)context mesh") as raised:
            oracle(norm_params, x)
    assert "in_axes={argument: None}" in " ".join(raised.value.__notes__)


def test_env_axis_name_of_a_loss_that_asks_for_its_index():
    def loss(w, x):
        return w * x * jnp.float32(jax.lax.axis_index("env"))

    stats = hardvary.grad_stats(loss, env_axis_name="env")(
        jnp.float32(1), jnp.ones(NUM_ENVS)
    )
    assert float(stats.sign_sum) == NUM_ENVS - 1
    assert float(stats.mean) == pytest.approx((NUM_ENVS - 1) / 2)


@pytest.mark.parametrize(
    "settings",
    [{"method": "scan"}, {"method": "fused", "microbatch_size": 2}],
    ids=["scan", "microbatches"],
)
def test_env_axis_name_where_environments_do_not_meet_raises(settings):
    with pytest.raises(ValueError, match=r"env_axis_name .* got 'env'"):
        hardvary.grad_stats(with_shared_norm, env_axis_name="env", **settings)


@pytest.mark.parametrize("method", ["fused", "scan", "vmap"])
def test_shared_norm_without_env_axis_name_raises(norm_params, method):
    oracle = hardvary.grad_stats(with_shared_norm, method=method)
    with pytest.raises(ValueError, match="env_axis_name"):
        oracle(norm_params, floats(NUM_ENVS, 4))


def test_other_name_errors_of_a_loss_are_its_own():
    def loss(w, x):
        raise NameError("name 'y' is not defined")

    with pytest.raises(NameError, match="'y'"):
        hardvary.grad_stats(loss)(jnp.ones(2), jnp.ones((3, 2)))


# Side effects.


@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_fused_of_a_loss_with_side_effects_raises(ordered):
    def loss(w, x):
        io_callback(lambda value: None, None, x, ordered=ordered)
        return jnp.sum(w * x)

    with pytest.raises(ValueError, match=r"side effects.*aux"):
        hardvary.grad_stats(loss)(jnp.ones(2), jnp.ones((3, 2)))


def test_fused_of_a_loss_that_prints_prints_once_for_every_environment(capfd):
    @jax.checkpoint
    def layer(w, x):
        jax.debug.print("seen {}", x[0])
        return jnp.tanh(x @ w)

    def loss(w, x):
        return jnp.sum(layer(w, x))

    w, x = floats(3, 2), floats(4, 3, seed=1)
    quiet = hardvary.grad_stats(lambda w, x: jnp.sum(jnp.tanh(x @ w)), method="vmap")
    stats, expected = compile_quickly(
        lambda w, x: (hardvary.grad_stats(loss)(w, x), quiet(w, x))
    )(w, x)
    jax.effects_barrier()
    assert_trees_close(stats, expected)
    # A rematerialised function runs, and prints, again in the backward pass.
    assert capfd.readouterr().out.count("seen") == 8


# Counts between devices.


def collectives(jaxpr):
    """Dtypes of what is summed over devices."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("psum"):
            found += [str(var.aval.dtype) for var in eqn.invars]
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += collectives(inner)
    return found


@pytest.mark.parametrize(
    ("num_envs", "stats", "dtype"),
    [
        (64, ("mean", "sign"), "int8"),
        (64, ("sign",), "float16"),
        (2048, ("mean", "sign"), "float16"),
        (4096, ("mean", "sign"), "float32"),
    ],
)
def test_counts_cross_devices_in_the_narrowest_type(num_envs, stats, dtype):
    mesh = jax.make_mesh((8,), ("env",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    oracle = hardvary.grad_stats(loss, stats=stats, axis_name="env")
    run = compile_quickly(
        jax.shard_map(oracle, mesh=mesh, in_specs=(P(), P("env")), out_specs=P())
    )
    w, x = floats(3, 2), np.abs(np.array(floats(num_envs, 3, seed=1))) + 0.1
    sent = collectives(run.trace(w, x).jaxpr.jaxpr)
    assert sent
    if dtype == "float32":
        assert set(sent) <= {"float32", "int32"}
    else:
        assert sent.count(dtype) == 1
    result = run(w, x)
    np.testing.assert_array_equal(result.sign_sum, np.full((3, 2), num_envs))
    x[5, 1] = np.nan
    broken = run(w, x)
    np.testing.assert_array_equal(np.isnan(broken.sign_sum[1]), True)


# Steps.


def test_fused_step_compiles_once():
    traces = []

    def loss(w, x):
        traces.append(None)
        return jnp.sum(jnp.tanh(x @ w))

    tx = optax.chain(hardvary.and_mask(0.5), optax.sgd(0.1))
    oracle = hardvary.value_and_grad_stats(loss)

    @compile_quickly
    def step(w, state, x):
        losses, stats = oracle(w, x)
        updates, state = tx.update(stats, state, w)
        return optax.apply_updates(w, updates), state, losses

    w = floats(4, 3)
    state = tx.init(w)
    for seed in range(3):
        w, state, _ = step(w, state, floats(NUM_ENVS, 4, seed=seed))
    assert len(traces) == 1


def test_fused_of_a_loss_that_closes_over_traced_values_equals_stacked():
    def stats_of(shift, w, x, method):
        def loss(w, x):
            return jnp.sum(jnp.tanh(x @ w + shift))

        return hardvary.grad_stats(loss, stats=STATISTICS, method=method)(w, x)

    @compile_quickly
    def run(shifts, w, x):
        fused = functools.partial(stats_of, method="fused")
        one_by_one = [stats_of(shift, w, x, method="vmap") for shift in shifts]
        return jax.vmap(fused, (0, None, None))(shifts, w, x), one_by_one

    w, x, shifts = floats(4, 3), floats(NUM_ENVS, 4, seed=1), floats(2, 3, seed=2)
    together, one_by_one = run(shifts, w, x)
    for i, expected in enumerate(one_by_one):
        assert_trees_close(
            jax.tree.map(lambda leaf: leaf[i], together),  # noqa: B023
            expected,
        )


COMPLEX = {
    "data": lambda w, x: jnp.sum(
        jnp.square(jnp.abs((x * jnp.exp(1j * x)) @ w.astype(jnp.complex64)))
    ),
    "parameter": lambda w, x: jnp.sum(
        jnp.square(jnp.abs(jax.lax.complex(w, jnp.square(w)).T @ x.astype(complex)))
    ),
    "fourier": lambda w, x: jnp.sum(
        jnp.square(jnp.abs(jnp.fft.fft(w, axis=1)[:9] * x[:9, None] - 1))
    ),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_fused_of_complex_values_on_the_way_equals_stacked(name):
    w, x = floats(70, 80), floats(NUM_ENVS, 70, seed=1)
    with jax.numpy_dtype_promotion("standard"):
        oracles = [
            hardvary.grad_stats(COMPLEX[name], stats=STATISTICS, method=method)
            for method in ("fused", "vmap")
        ]
        actual, expected = compile_quickly(lambda w, x: [f(w, x) for f in oracles])(
            w, x
        )
    scale = float(jnp.abs(expected.mean).max())
    assert_trees_close(actual.mean, expected.mean, rtol=0, atol=1e-5 * scale)
    assert_trees_close(actual.sign_sum, expected.sign_sum, rtol=0, atol=0)


def test_fused_of_a_scan_of_no_steps_equals_stacked():
    def loss(w, x):
        y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=0)
        return jnp.sum(jnp.tanh(y @ w))

    w, x = floats(70, 70), floats(NUM_ENVS, 70, seed=1)
    oracles = [hardvary.grad_stats(loss, method=m) for m in ("fused", "vmap")]
    actual, expected = compile_quickly(lambda w, x: [f(w, x) for f in oracles])(w, x)
    assert_trees_close(actual, expected)


def test_weight_gradient_over_several_axes_is_one_product_of_matrices():
    """XLA on CPU would transpose the cotangents in front of another."""

    def loss(params, x):
        hidden = jnp.einsum("bti,iho->btho", x, params["in"])
        return jnp.mean(jnp.sin(jnp.einsum("btho,hoi->bti", hidden, params["out"])))

    params = {"in": floats(64, 2, 40), "out": floats(2, 40, 64, seed=1)}
    batch = floats(3, 2, 4, 64, seed=2)
    assert_equals_stacked(loss, params, batch)
    jaxpr = jax.make_jaxpr(hardvary.grad_stats(loss))(params, batch).jaxpr
    products = [
        [len(axes) for axes in eqn.params["dimension_numbers"][0]]
        for scan in jaxpr.eqns
        if scan.primitive.name == "scan"
        for eqn in equations_of(scan.params["jaxpr"].jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert products == [[1, 1], [1, 1]]


@pytest.mark.parametrize("sizes", [(0, 5, 3), (4, 0, 3), (4, 5, 0)], ids=str)
def test_products_of_nothing_have_gradients_of_zero(sizes):
    rows, inputs, outputs = sizes

    def loss(weight, x):
        return jnp.sum(jnp.sin(1.0 + jnp.einsum("bti,io->bto", x, weight)))

    weight = floats(inputs, outputs)
    assert_equals_stacked(loss, weight, floats(3, 2, rows, inputs, seed=1))
