"""The fused oracle equals stacked gradients, on models of every kind."""

import functools

import jax
import numpy as np
import pytest

import hardvary
from tests._inputs import STATISTICS
from tests.zoo import ZOO, Stacked, assert_stats_match, compile_quickly, poison

METHOD = "fused"
WEIGHTS = np.array([1.0, 2.0, 0.0, 0.5, 1.0, 3.0], np.float32)

# One model or two of every family: a compilation each.
SOME = [
    "dense_one_row",
    "dense_several_rows",
    "dense_of_every_head",
    "bilinear",
    "conv_2d_every_dilation",
    "conv_2d_depthwise",
    "conv_net_with_max_pool",
    "embedding_repeated_ids",
    "embedding_one_id",
    "embedding_with_positions",
    "layer_norm",
    "scalar_parameters",
    "weight_norm",
    "unused_parameter",
    "dense_used_twice",
    "regulariser_only",
    "transformer_with_tied_embedding",
    "gru_by_scan",
    "scan_over_stacked_layers",
    "cond_on_the_batch",
    "custom_vjp_dense",
    "bfloat16_compute_one_row",
    "loss_with_aux",
    "random_keys_as_a_batch",
    "nnx_conv_net_with_batch_norm",
]
some_models = pytest.mark.parametrize("name", SOME)


@functools.cache
def build(name):
    return ZOO[name](np.random.default_rng(0))


@functools.cache
def definition(name):
    params, loss_fn, batch = build(name)
    entry = ZOO[name]
    return Stacked(loss_fn, params, batch, entry.has_aux, entry.promotion)


def run_oracle(name, batch, env_weights=None, **settings):
    """`(losses, aux, stats)` of a model."""
    entry = ZOO[name]
    params, loss_fn, _ = build(name)
    oracle = hardvary.value_and_grad_stats(
        loss_fn, method=METHOD, has_aux=entry.has_aux, **settings
    )
    with entry.promotion():
        value, stats = compile_quickly(oracle)(params, batch, env_weights=env_weights)
    losses, aux = value if entry.has_aux else (value, None)
    return losses, aux, stats


def check(name, result, weights=None):
    losses, aux, stats = result
    entry, expected = ZOO[name], definition(name)
    present = slice(None) if weights is None else weights > 0
    scale = np.abs(expected.losses).max()
    np.testing.assert_allclose(
        np.asarray(losses, np.float64)[present],
        expected.losses[present],
        rtol=0,
        atol=2 * entry.rounding * scale,
    )
    assert jax.tree.structure(aux) == jax.tree.structure(expected.aux)
    for leaf, other in zip(
        jax.tree.leaves(aux), jax.tree.leaves(expected.aux), strict=True
    ):
        np.testing.assert_allclose(leaf[present], other[present], rtol=1e-5, atol=1e-6)
    return assert_stats_match(
        stats, build(name)[0], expected, weights, rounding=entry.rounding
    )


@pytest.mark.parametrize("name", ZOO)
def test_fused_stats_of_a_zoo_model_equal_stacked_gradients(name):
    decided = check(name, run_oracle(name, build(name)[2], stats=STATISTICS))
    # Otherwise rounding would excuse anything.
    assert decided >= ZOO[name].decided


@some_models
def test_fused_stats_with_env_weights_equal_weighted_stacked_gradients(name):
    batch = poison(build(name)[2], int(np.argmin(WEIGHTS)))
    result = run_oracle(name, batch, WEIGHTS, stats=STATISTICS)
    check(name, result, WEIGHTS)


@some_models
def test_fused_stats_by_microbatches_equal_stacked_gradients(name):
    size = 2 + SOME.index(name) % 2
    batch = build(name)[2]
    result = run_oracle(name, batch, stats=STATISTICS, microbatch_size=size)
    check(name, result)


def test_fused_stats_by_microbatches_with_env_weights_equal_weighted_gradients():
    # The microbatch of environments 2 and 3, and one that is wholly absent.
    weights = np.array([0.0, 0.0, 0.0, 0.5, 1.0, 3.0], np.float32)
    for name in ("dense_one_row", "conv_2d_depthwise", "gru_by_scan"):
        batch = build(name)[2]
        for env in range(3):
            batch = poison(batch, env)
        result = run_oracle(name, batch, weights, stats=STATISTICS, microbatch_size=2)
        check(name, result, weights)


@pytest.mark.parametrize("stats", [("mean", "sign"), ("sign",), ("log_abs", "square")])
def test_fused_stats_asked_for_alone_equal_stacked_gradients(stats):
    for name in (
        "dense_one_row",
        "conv_2d_one_example",
        "embedding_take",
        "layer_norm",
    ):
        result = run_oracle(name, build(name)[2], stats=stats)
        held = {
            statistic
            for statistic, field in zip(
                STATISTICS,
                ("mean", "sign_sum", "square_mean", "log_abs_mean"),
                strict=True,
            )
            if getattr(result[2], field) is not None
        }
        assert held == set(stats)
        check(name, result)


@pytest.mark.parametrize(
    "name",
    [
        "dense_one_row",
        "dense_several_rows",
        "conv_2d_one_example",
        "embedding_bag",
        "layer_norm",
        "bias_and_scale_broadcast",
        "gather_of_a_scalar_per_example",
        "weight_norm",
    ],
)
def test_fused_stats_with_a_broken_environment_are_nan_where_its_gradient_is(name):
    params, loss_fn, batch = build(name)
    batch = poison(batch, 3)
    grads = jax.jit(hardvary.per_env_grad(loss_fn))(params, batch)
    _, _, stats = run_oracle(name, batch, stats=STATISTICS)
    for tree in (stats.mean, stats.sign_sum, stats.square_mean, stats.log_abs_mean):
        jax.tree.map(
            lambda grad, leaf: np.testing.assert_array_equal(
                np.isnan(leaf), ~np.isfinite(grad).all(0)
            ),
            grads,
            tree,
        )
