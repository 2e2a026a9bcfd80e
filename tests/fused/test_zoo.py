"""The fused oracle equals stacked gradients, on models of every kind."""

import numpy as np
import pytest

import hardvary
from hardvary.fused import rules
from tests._inputs import STATISTICS
from tests.fused._answers import ask, check_answers, make_env_oracle, signed_weights
from tests.fused._models import (
    build,
    check,
    check_values,
    compiled_oracle,
    definition,
    make_oracle,
)
from tests.fused._precision import PRECISIONS, allowed, at
from tests.zoo import ZOO, Stacked, compile_quickly, fields_by_path, poison
from tests.zoo.compare import FIELDS

WEIGHTS = np.array([1.0, 2.0, 0.0, 0.5, 1.0, 3.0], np.float32)
SIGNED = signed_weights(len(WEIGHTS))

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


def check_env_grads(name, result, env_weights=None):
    losses, aux, answers = result
    check_values(name, losses, aux, env_weights)
    return check_answers(
        answers,
        build(name)[0],
        definition(name),
        SIGNED,
        env_weights,
        ZOO[name].rounding,
    )


@pytest.mark.parametrize("name", ZOO)
def test_env_grads_of_a_zoo_model_equal_stacked_gradients(name):
    params, _, batch = build(name)
    result = compile_quickly(make_env_oracle(name))(params, batch, SIGNED)
    # Otherwise rounding would excuse anything.
    assert check_env_grads(name, result) >= ZOO[name].decided


@pytest.mark.parametrize("name", SOME)
def test_env_grads_with_weights_and_stats_by_microbatches_equal_stacked_gradients(
    name, monkeypatch
):
    if SOME.index(name) % 3:
        # These models are small: nothing else has a sum of products go by the scan.
        monkeypatch.setattr(rules, "SMALL", 0)
        # Nor has it make inner products a piece at a time.
        monkeypatch.setattr(rules.Rule, "elements", lambda rule: 8)
    params, _, batch = build(name)
    size = 2 + SOME.index(name) % 2
    whole = make_env_oracle(name, stack=True)
    in_parts = make_oracle(name, stats=STATISTICS, microbatch_size=size)

    @compile_quickly
    def run(params, poisoned, batch, signed, weights):
        return whole(params, poisoned, signed, weights), in_parts(params, batch)

    poisoned = poison(batch, int(np.argmin(WEIGHTS)))
    weighted, by_microbatches = run(params, poisoned, batch, SIGNED, WEIGHTS)
    check_env_grads(name, weighted, WEIGHTS)
    check(name, by_microbatches)


# Models that cannot be taken there, or that keep a part of themselves as it is.
NOT_IN = {
    "float64": {
        "bfloat16_compute_one_row",
        "parameters_of_several_dtypes",
        "nnx_conv_net_with_batch_norm",
        "nnx_lstm",
        "scan_over_examples_of_one_use_each",
    },
    # JAX has complex numbers of float32 and float64 alone.
    "bfloat16": {"complex_intermediate", "fourier_layer"},
    "float16": {"complex_intermediate", "fourier_layer", "attention_of_jax_nn"},
}
# Models with a product in float32 whatever their parameters are, which routes round
# each in their own way: they are held to what float32 allows.
FLOAT32_INSIDE = {"nnx_transformer_with_tied_embedding"}


def pytest_generate_tests(metafunc):
    if "precision" not in metafunc.fixturenames:
        return
    names = ["dense_one_row", "conv_2d_depthwise", "embedding_repeated_ids"]
    if metafunc.config.getoption("every_dtype"):
        names = ZOO
    pairs = [(n, p) for p in PRECISIONS for n in names if n not in NOT_IN[p]]
    metafunc.parametrize(("name", "precision"), pairs)


def test_env_grads_in_another_precision_equal_stacked_gradients(name, precision):
    params, full, batch = build(name)

    def loss_alone(params, batch):
        return full(params, batch)[0] if ZOO[name].has_aux else full(params, batch)

    with allowed(precision):
        params, loss_fn, batch = at(precision, params, loss_alone, batch)
        expected = Stacked(loss_fn, params, batch)

        @compile_quickly
        def run(params, batch, weights, env_weights):
            oracle = hardvary.value_and_env_grads(loss_fn)
            return ask(oracle(params, batch, env_weights=env_weights)[1], weights)

        poisoned = poison(batch, int(np.argmin(WEIGHTS)))
        answers = run(params, poisoned, SIGNED, WEIGHTS)
        rounding = PRECISIONS[precision]
        if name in FLOAT32_INSIDE:
            rounding = max(rounding, ZOO[name].rounding)
        check_answers(answers, params, expected, SIGNED, WEIGHTS, rounding)


@pytest.mark.parametrize("name", ["dense_one_row", "conv_2d_depthwise", "gru_by_scan"])
def test_fused_stats_by_microbatches_with_env_weights_equal_weighted_gradients(name):
    # The microbatch of environments 2 and 3, and one that is wholly absent.
    weights = np.array([0.0, 0.0, 0.0, 0.5, 1.0, 3.0], np.float32)
    params, _, batch = build(name)
    for env in range(3):
        batch = poison(batch, env)
    oracle = compiled_oracle(name, stats=STATISTICS, microbatch_size=2)
    check(name, oracle(params, batch, weights), weights)


@pytest.mark.parametrize(
    "name", ["dense_one_row", "conv_2d_one_example", "embedding_take", "layer_norm"]
)
def test_fused_stats_asked_for_alone_equal_stacked_gradients(name):
    requests = [("mean", "sign"), ("sign",), ("log_abs", "square")]
    oracles = [make_oracle(name, stats=stats) for stats in requests]
    params, _, batch = build(name)
    results = compile_quickly(lambda p, b: [run(p, b) for run in oracles])(
        params, batch
    )
    for stats, result in zip(requests, results, strict=True):
        for held in fields_by_path(result[2], params).values():
            assert held.keys() == {"num_envs"} | {FIELDS[name] for name in stats}
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
    params, _, batch = build(name)
    batch = poison(batch, 3)
    grads = definition(name).grads_of(batch)
    *_, stats = compiled_oracle(name, stats=STATISTICS)(params, batch)
    fields = fields_by_path(stats, params)
    assert fields.keys() == grads.keys()
    for path, grad in grads.items():
        broken = ~np.isfinite(grad).all(0)
        for field in (FIELDS[name] for name in STATISTICS):
            np.testing.assert_array_equal(
                np.isnan(fields[path][field]), broken, err_msg=f"{field} of {path}"
            )
