"""Whitened inputs: moments, roots, and functions that no matrix in front changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import hardvary
from hardvary.aggregators.whiten_inputs import (
    inverse_factor_by_library,
    inverse_factor_by_products,
    inverse_root,
)
from hardvary.fused import rules
from hardvary.fused.rules.scan import Scan
from tests._asserts import assert_trees_close
from tests._compat import enable_x64
from tests.fused._models import build
from tests.zoo import ZOO, compile_quickly
from tests.zoo.blocks import floats


def arrays(*shapes, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [floats(rng.normal(size=shape), dtype) for shape in shapes]


def moment_of(rows):
    return np.mean(rows[:, :, None] * rows[:, None, :], axis=0)


# Losses of one weight and one batch: the rows that the weight meets, in NumPy.


def dense(w, x):
    return jnp.sum(jnp.sin(x @ w))


def dense_rows(x):
    return x.reshape(-1, x.shape[-1])


def dense_out_in(w, x):
    return jnp.sum(jnp.sin(jnp.einsum("bi,oi->bo", x, w)))


def two_axes(w, x):
    return jnp.sum(jnp.sin(jnp.einsum("bij,jio->bo", x, w)))


def two_axes_rows(x):
    # In the order of the weight's own axes that are contracted, or of the data's.
    return x.reshape(-1, x.shape[-2] * x.shape[-1])


def over_time(w, x):
    def step(carry, row):
        return jnp.tanh(carry + row @ w), None

    return jnp.sum(jax.lax.scan(step, jnp.zeros(w.shape[-1]), x)[0])


def convolve(x, w, strides, padding):
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def convolution(w, x):
    return jnp.sum(jnp.sin(convolve(x, w, (2, 1), "SAME")))


def patches(w, x):
    return jnp.sum(jnp.sin(convolve(x, w, (2, 2), "VALID")))


def convolution_rows(x, window, strides, padding):
    """All patches, one after the other, in the order of the kernel's axes."""
    images = np.asarray(x).reshape(-1, *x.shape[-3:])
    images = np.pad(images, ((0, 0), *padding, (0, 0)))
    rows = []
    for image in images:
        for i in range(0, image.shape[0] - window[0] + 1, strides[0]):
            for j in range(0, image.shape[1] - window[1] + 1, strides[1]):
                rows.append(image[i : i + window[0], j : j + window[1]].ravel())
    return np.stack(rows)


MEETINGS = {
    "dense": (dense, (4, 3), (5, 6, 4), dense_rows),
    "one_row": (dense, (4, 3), (5, 4), dense_rows),
    "large": (dense, (90, 60), (5, 6, 90), dense_rows),
    "out_in": (dense_out_in, (3, 4), (5, 6, 4), dense_rows),
    "over_time": (over_time, (4, 3), (5, 6, 4), dense_rows),
    "convolution": (
        convolution,
        (3, 3, 2, 4),
        (5, 2, 6, 5, 2),
        lambda x: convolution_rows(x, (3, 3), (2, 1), ((0, 1), (1, 1))),
    ),
    "patches": (
        patches,
        (2, 2, 2, 4),
        (5, 2, 6, 4, 2),
        lambda x: convolution_rows(x, (2, 2), (2, 2), ((0, 0), (0, 0))),
    ),
    # Fewer rows than outputs, in an environment or in all.
    "one_wide_row": (dense, (4, 12), (5, 4), dense_rows),
    "few_rows": (dense, (4, 12), (5, 2, 4), dense_rows),
    "wide_dense": (dense, (3, 40), (5, 30, 3), dense_rows),
    "wide_convolution": (
        convolution,
        (3, 3, 2, 40),
        (5, 1, 6, 5, 2),
        lambda x: convolution_rows(x, (3, 3), (2, 1), ((0, 1), (1, 1))),
    ),
}


@pytest.mark.parametrize(
    ("name", "few"),
    [
        *((name, False) for name in MEETINGS),
        *((name, True) for name in MEETINGS if "row" not in name),
    ],
)
def test_input_moment_and_whitened_gradients_are_those_of_the_rows(
    name, few, monkeypatch
):
    loss, shape, batch_shape, rows_of = MEETINGS[name]
    w, x = arrays(shape, batch_shape)
    rows = np.asarray(rows_of(np.asarray(x)), np.float64)
    root = np.linalg.inv(np.linalg.cholesky(moment_of(rows) + np.eye(rows.shape[1]))).T

    @compile_quickly
    def run(w, x):
        grad = hardvary.env_grads(loss)(w, x)
        assert grad.num_inputs == rows.shape[1]
        whitened = grad._whitened(jnp.asarray(root, jnp.float32))
        weights = jnp.arange(5.0) - 2
        return (
            grad.input_moment(),
            grad.stack(),
            {
                "stack": whitened.stack(),
                "gramian": whitened.gramian(),
                "norms": whitened.norms(),
                "mean": whitened.mean(),
                "combine": whitened.combine(weights),
                "square": whitened.stats(("square",)).square_mean,
                "abs": whitened.stats(("abs",)).abs_mean,
            },
        )

    if few:
        monkeypatch.setattr(Scan, "held", False)
        monkeypatch.setattr(rules.Rule, "elements", lambda rule: 30)
    moment, stacked, answers = run(w, x)
    np.testing.assert_allclose(moment, moment_of(rows), rtol=1e-4, atol=1e-5)
    inputs_last = name == "out_in"
    stacked = np.asarray(stacked, np.float64)
    if inputs_last:
        expected = stacked @ root
    else:
        flat = stacked.reshape(5, rows.shape[1], -1)
        expected = np.einsum("ji,ejo->eio", root, flat).reshape(stacked.shape)
    flat = expected.reshape(5, -1)
    assert_trees_close(
        answers,
        {
            "stack": expected,
            "gramian": flat @ flat.T,
            "norms": np.linalg.norm(flat, axis=1),
            "mean": expected.mean(0),
            "combine": np.tensordot(np.arange(5.0) - 2, expected, 1),
            "square": (expected**2).mean(0),
            "abs": np.abs(expected).mean(0),
        },
        rtol=1e-3,
        atol=1e-4 * np.abs(flat @ flat.T).max(),
    )


@pytest.mark.parametrize(
    "name",
    [
        "dense_of_every_head",
        "bilinear",
        "conv_2d_every_dilation",
        "conv_2d_depthwise",
        "gru_by_scan",
        "bfloat16_products_summed_in_float32",
    ],
)
def test_whitened_gradients_of_models_are_roots_times_their_gradients(name):
    params, loss, batch = build(name)
    entry = ZOO[name]

    @compile_quickly
    def run(params, batch):
        with entry.promotion():
            grads = hardvary.env_grads(loss, has_aux=entry.has_aux)(params, batch)
            grads = grads[0] if entry.has_aux else grads
            found = []
            for grad in jax.tree.leaves(grads):
                if grad.num_inputs is None:
                    continue
                moment = grad.input_moment()
                root = inverse_root(moment, 0.1)
                whitened = grad._whitened(root)
                times = jax.vmap(functools.partial(grad._times, root.T))
                expected = times(grad.stack().astype(moment.dtype))
                found.append(
                    (
                        moment,
                        whitened.gramian(),
                        whitened.combine(jnp.ones(grad.num_envs)),
                        expected,
                    )
                )
            return found

    narrow = name.startswith("bfloat16")
    for moment, gramian, total, expected in run(params, batch):
        np.testing.assert_allclose(moment, moment.T, rtol=1e-5, atol=1e-6)
        assert np.linalg.eigvalsh(moment).min() >= -1e-4 * np.trace(moment)
        flat = np.asarray(expected, np.float64).reshape(len(expected), -1)
        rounding = 0.05 if narrow else 1e-3
        size = np.abs(flat @ flat.T).max()
        np.testing.assert_allclose(gramian, flat @ flat.T, atol=rounding * size)
        size = np.abs(expected).max() * len(expected)
        np.testing.assert_allclose(total, expected.sum(0), atol=rounding * size)


def test_parameters_without_inputs_of_their_own_say_so():
    def loss(params, x):
        rows = params["table"][x]
        hidden = rows @ params["twice"] @ params["twice"] + params["bias"][None]
        return jnp.sum(jnp.sin(hidden @ params["once"]))

    shapes = {"table": (40, 3), "twice": (3, 3), "bias": (3,), "once": (3, 2)}
    params = dict(zip(shapes, arrays(*shapes.values()), strict=True))
    batch = jnp.arange(8).reshape(4, 2)

    def check(params, batch):
        grads = hardvary.env_grads(loss)(params, batch)
        found = {name: grad.num_inputs for name, grad in grads.items()}
        assert found == {"table": None, "twice": None, "bias": None, "once": 3}
        with pytest.raises(ValueError, match="meets no inputs of a single dense layer"):
            grads["bias"].input_moment()

    jax.eval_shape(check, params, batch)
    rows = hardvary.explain(loss, params, batch).parameters
    assert [row.num_inputs for row in rows] == [None, 3, None, None]


# Check: what matrix the inputs were multiplied by makes no difference.


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def squared_error(params, batch):
    x, y = batch
    return jnp.mean(jnp.square(network(params, x) - y))


def trainer(tx, steps=100):
    """`(params, batch) -> outputs` of the network on the batch after some steps."""

    @jax.jit
    def run(params, batch):
        def step(carry, _):
            params, state = carry
            losses, grads = hardvary.value_and_env_grads(squared_error)(params, batch)
            updates, state = tx.update(
                grads,
                state,
                params,
                env_losses=losses,
                baseline_losses=jnp.mean(jnp.square(batch[1]), axis=(1, 2)),
            )
            return (optax.apply_updates(params, updates), state), losses.mean()

        carry, losses = jax.lax.scan(step, (params, tx.init(params)), None, steps)
        return jax.vmap(network, (None, 0))(carry[0], batch[0]), losses

    def train(params, batch):
        outputs, losses = run(params, batch)
        assert losses[-1] < losses[0]
        return outputs

    return train


def problem(matrix):
    """Params and batch with inputs times a matrix, and the function the same."""
    first, second, x = arrays((4, 6), (6, 1), (5, 12, 4), dtype=np.float64)
    y = jnp.sin(x[..., :1]) + 0.1 * arrays((5, 12, 1), seed=1, dtype=np.float64)[0]
    params = {"first": jnp.linalg.solve(matrix, 0.3 * first), "second": 0.3 * second}
    return params, (x @ matrix, y)


def rotation():
    return jnp.linalg.qr(arrays((4, 4), seed=2, dtype=np.float64)[0])[0]


def invertible():
    return rotation() * jnp.asarray([[0.01, 0.3, 1.0, 40.0]]) @ rotation().T + jnp.triu(
        0.1 * arrays((4, 4), seed=3, dtype=np.float64)[0]
    )


BASIS_FREE = {
    "spectral_and_mask": hardvary.spectral_and_mask,
    "drop_disagreement": functools.partial(hardvary.drop_disagreement, 0.9),
    "relative_gauss_newton": hardvary.relative_gauss_newton,
    "upgrad": hardvary.upgrad,
    "mean": functools.partial(hardvary.and_mask, 0.0),
}


@pytest.mark.parametrize("name", BASIS_FREE)
def test_no_matrix_in_front_changes_what_whitened_rules_train(name):
    rule = hardvary.whiten_inputs(
        optax.chain(BASIS_FREE[name](), optax.clip_by_global_norm(1.0)),
        damping=0.0,
        decay=0.8,
        every=7,
    )
    tx = optax.chain(rule, optax.sgd(0.003, momentum=0.5))
    with enable_x64(True):
        train = trainer(tx)
        plain = train(*problem(jnp.eye(4)))
        other = train(*problem(invertible()))
    np.testing.assert_allclose(other, plain, atol=1e-6)


@pytest.mark.parametrize("name", BASIS_FREE)
def test_no_rotation_changes_what_rules_by_inner_products_train(name):
    tx = optax.chain(
        BASIS_FREE[name](), optax.clip_by_global_norm(1.0), optax.sgd(0.05)
    )
    with enable_x64(True):
        train = trainer(tx)
        plain = train(*problem(jnp.eye(4)))
        other = train(*problem(rotation()))
    np.testing.assert_allclose(other, plain, atol=1e-6)


def test_a_rotation_changes_what_the_elementwise_mask_trains():
    tx = optax.chain(hardvary.and_mask(1.0), optax.sgd(0.05))
    with enable_x64(True):
        train = trainer(tx)
        plain = train(*problem(jnp.eye(4)))
        other = train(*problem(rotation()))
    assert np.abs(other - plain).max() > 1e-2


# The average over time.


def one_layer(tx, **weights):
    """The state after an update on each batch."""

    def run(batches, w):
        state = tx.init(w)
        for x in batches:
            grads = hardvary.env_grads(dense)(w, x, **weights)
            _, state = tx.update(grads, state, w)
        return state

    return jax.jit(run)


def test_moments_are_averaged_and_refreshed_on_schedule():
    w, *batches = arrays((3, 2), *((4, 5, 3),) * 5)
    tx = hardvary.whiten_inputs(hardvary.upgrad(), decay=0.75, every=2, damping=0.1)
    state = one_layer(tx)(batches, w)
    moments = [moment_of(dense_rows(np.asarray(x))) for x in batches[::2]]
    average = 0.25 * (0.75**2 * moments[0] + 0.75 * moments[1] + moments[2])
    np.testing.assert_allclose(state.layers[0].moment, average, rtol=1e-4, atol=1e-6)
    corrected = average / (1 - 0.75**3)
    damped = corrected + 0.1 * np.trace(corrected) / 3 * np.eye(3)
    root = np.asarray(state.layers[0].root, np.float64)
    np.testing.assert_allclose(root.T @ damped @ root, np.eye(3), atol=1e-4)
    assert state.whiten_count == 5


def test_inputs_of_absent_environments_and_broken_inputs_do_not_count():
    w, x = arrays((3, 2), (4, 5, 3))
    tx = hardvary.whiten_inputs(hardvary.upgrad(), every=1)
    weights = jnp.asarray([1.0, 0.0, 2.0, 1.0])
    state = one_layer(tx, env_weights=weights)([x.at[1].set(jnp.nan)], w)
    rows = np.asarray(x, np.float64)
    expected = sum(
        weight * moment_of(own) for weight, own in zip(weights, rows, strict=True)
    )
    np.testing.assert_allclose(
        state.layers[0].moment, 0.1 * expected / 4, rtol=1e-3, atol=1e-6
    )
    once = one_layer(tx)([x], w)
    for batches in ([x, x.at[1].set(jnp.nan)], [x.at[1].set(jnp.nan), x]):
        broken = one_layer(tx)(batches, w)
        assert_trees_close(broken.layers, once.layers, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_inverse_root_is_one_of_the_damped_moment_at_any_scale(scale):
    rows = np.random.default_rng(0).normal(size=(40, 6)) * 10.0 ** np.arange(-2, 4)
    moment = moment_of(rows)
    given = jnp.asarray(moment * scale, jnp.float32)
    for damping in (1e-3, 0.0):
        damped = moment + damping * np.trace(moment) / 6 * np.eye(6)
        root = np.asarray(inverse_root(given, damping), np.float64) * scale**0.5
        np.testing.assert_allclose(root.T @ damped @ root, np.eye(6), atol=1e-4)


def test_inverse_root_without_damping_takes_inputs_that_are_always_zero():
    root = np.asarray(inverse_root(jnp.diag(jnp.asarray([4.0, 0.0, 1.0])), 0.0))
    np.testing.assert_allclose(root[[0, 2]], [[0.5, 0, 0], [0, 0, 1]], atol=1e-4)
    assert np.all(np.isfinite(root))
    assert np.all(np.isfinite(inverse_root(jnp.zeros((2, 2)), 0.0)))


@pytest.mark.parametrize("way", [inverse_factor_by_library, inverse_factor_by_products])
@pytest.mark.parametrize("size", [1, 128, 129, 301, 1025])
def test_factors_are_inverted_whatever_their_size(way, size):
    rows = np.random.default_rng(0).normal(size=(2 * size, size))
    moment = rows.T @ rows / len(rows)
    factor = np.asarray(jax.jit(way)(jnp.asarray(moment, jnp.float32)), np.float64)
    np.testing.assert_array_equal(factor, np.tril(factor))
    np.testing.assert_allclose(factor @ moment @ factor.T, np.eye(size), atol=1e-4)


@pytest.mark.parametrize("way", [inverse_factor_by_library, inverse_factor_by_products])
@pytest.mark.parametrize("place", [0, 100, 150, 199])
def test_a_matrix_without_a_factor_has_no_finite_inverse(way, place):
    for value in (-1.0, 0.0, np.nan):
        broken = jnp.eye(200).at[place, place].set(value)
        assert not np.all(np.isfinite(way(broken)))


def test_inputs_on_several_devices_are_those_of_one():
    w, x = arrays((3, 2), (4, 5, 3))
    tx = hardvary.whiten_inputs(hardvary.upgrad())
    mesh = jax.make_mesh((2,), ("env",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def update(w, x, axis_name=None):
        grads = hardvary.env_grads(dense, axis_name=axis_name)(w, x)
        return tx.update(grads, tx.init(w), w)

    spread = jax.shard_map(
        functools.partial(update, axis_name="env"),
        mesh=mesh,
        in_specs=(spec(), spec("env")),
        out_specs=spec(),
    )
    assert_trees_close(
        jax.jit(spread)(w, x), jax.jit(update)(w, x), rtol=1e-4, atol=1e-5
    )


def test_states_made_on_each_device_whiten_as_others():
    w, x = arrays((2, 3, 2), (2, 4, 5, 3))
    tx = hardvary.whiten_inputs(hardvary.upgrad())
    mesh = jax.make_mesh((2,), ("seed",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("seed")

    def update(w, x):
        grads = hardvary.env_grads(dense)(w, x)
        return tx.update(grads, tx.init(w), w)

    def of_own(w, x):
        own = jax.tree.map(lambda leaf: leaf[0], (w, x))
        return jax.tree.map(lambda leaf: leaf[None], update(*own))

    spread = jax.shard_map(of_own, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    assert_trees_close(
        jax.jit(spread)(w, x), jax.jit(jax.vmap(update))(w, x), rtol=1e-4, atol=1e-5
    )


def test_layers_too_large_or_without_inputs_go_through_as_they_are():
    def loss(params, x):
        hidden = jnp.sin(x @ params["w"] + params["b"][None])
        return jnp.sum(jnp.sin(hidden @ params["out"]))

    w, b, out, x = arrays((6, 2), (2,), (2, 3), (4, 5, 6))
    params = {"w": w, "b": b, "out": out}

    mean = hardvary.and_mask(0.0)

    @jax.jit
    def run(params, x):
        grads = hardvary.env_grads(loss)(params, x)
        return [
            tx.update(grads, tx.init(params), params)[0]
            for tx in (
                mean,
                hardvary.whiten_inputs(mean, max_inputs=5),
                hardvary.whiten_inputs(mean),
            )
        ]

    plain, small, whitened = run(params, x)
    # Where it is the mean, gradients of one layer do not know of the others.
    assert_trees_close(small["w"], plain["w"], rtol=1e-5, atol=1e-6)
    assert np.abs(small["out"] - plain["out"]).max() > 1e-3
    assert np.abs(whitened["w"] - plain["w"]).max() > 1e-3


def test_kernels_in_another_layout_need_their_number_of_inputs():
    w, x = arrays((3, 4), (5, 6, 4))
    grads = hardvary.env_grads(dense_out_in)(w, x)
    tx = hardvary.whiten_inputs(hardvary.upgrad())
    with pytest.raises(ValueError, match="has 4 inputs, and inputs_of says 3"):
        tx.update(grads, tx.init(w), w)
    for inputs_of in (
        lambda param: param.shape[-1],
        hardvary.explain(dense_out_in, w, x),
    ):
        tx = hardvary.whiten_inputs(hardvary.upgrad(), inputs_of=inputs_of)
        updates, state = tx.update(grads, tx.init(w), w)
        assert updates.shape == w.shape
        assert state.layers[0].root.shape == (4, 4)
    with pytest.raises(ValueError, match=r"and no parameter at .'other'."):
        tx.init({"other": w})


def test_layers_of_attention_are_whitened_as_explained():
    model = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)
    (x,) = arrays((3, 5, 6))
    params = model.init(jax.random.key(0), x[0])

    def loss(params, x):
        return jnp.sum(jnp.square(model.apply(params, x)))

    tx = hardvary.whiten_inputs(
        hardvary.upgrad(), inputs_of=hardvary.explain(loss, params, x)
    )

    @compile_quickly
    def run(params, x):
        grads = hardvary.env_grads(loss)(params, x)
        return tx.update(grads, tx.init(params), params)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        _, state = run(params, x)
    sizes = [layer and layer.root.shape[0] for layer in state.layers]
    assert sorted(size for size in sizes if size) == [4, 6, 6, 6]


def test_gradients_are_whitened_once():
    w, x = arrays((3, 2), (4, 5, 3))
    tx = hardvary.whiten_inputs(hardvary.whiten_inputs(hardvary.upgrad()))
    with pytest.raises(ValueError, match="is whitened already"):
        tx.update(hardvary.env_grads(dense)(w, x), tx.init(w), w)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"damping": -1.0}, ValueError, "damping"),
        ({"damping": "none"}, TypeError, "damping"),
        ({"decay": 1.0}, ValueError, "decay"),
        ({"every": 0}, ValueError, "every must be >= 1"),
        ({"every": 2.0}, TypeError, "every must be an integer"),
        ({"max_inputs": 0}, ValueError, "max_inputs"),
        ({"inputs_of": 3}, TypeError, "inputs_of must be what explain"),
        ({"aggregator": 0.5}, TypeError, "aggregator must be a transformation"),
    ],
)
def test_wrong_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        hardvary.whiten_inputs(**{"aggregator": hardvary.upgrad(), **settings})


def test_gradients_without_any_known_inputs_are_refused():
    w, x = arrays((3, 2), (4, 5, 3))
    tx = hardvary.whiten_inputs(hardvary.upgrad())
    grads = hardvary.env_grads(dense, microbatch_size=2)(w, x)
    with pytest.raises(ValueError, match="of no parameter here is it known"):
        tx.update(grads, tx.init(w), w)
    small = hardvary.whiten_inputs(hardvary.upgrad(), max_inputs=2)
    with pytest.raises(ValueError, match="at most max_inputs=2"):
        small.update(hardvary.env_grads(dense)(w, x), small.init(w), w)


def test_stacked_gradients_know_no_inputs():
    tx = hardvary.whiten_inputs(hardvary.upgrad())
    w = jnp.zeros((3, 2))
    with pytest.raises(TypeError, match="use value_and_env_grads, inside the same jit"):
        tx.update(jnp.ones((4, 3, 2)), tx.init(w), w)
