"""Bad input raises, and says which argument, what it was and how to mend it.

Every line of the design's list that concerns the library. Messages
are matched on the argument, the value received and the mend.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from tests._inputs import AGGREGATORS, PLAIN_AGGREGATORS, make_grads, make_params

every_aggregator = pytest.mark.parametrize("name", AGGREGATORS)
in_both_modes = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


def raises(error, *parts):
    """pytest.raises for a message that contains the parts in this order."""
    pattern = ".*".join(re.escape(str(part)) for part in parts)
    return pytest.raises(error, match=f"(?s){pattern}")


def update(tx, grads, params=None, *, jit=False, **extra_args):
    def run(grads, params):
        return tx.update(grads, tx.init(params), params, **extra_args)

    return (jax.jit(run) if jit else run)(grads, params)


# Construction: thresholds, decays, caps.

MAKERS_WITH_THRESHOLD = {
    **AGGREGATORS,
    "temporal_and_mask": lambda threshold: hardvary.temporal_and_mask(
        optax.sgd(0.1), threshold=threshold, decay=0.9
    ),
    "temporal_and_mask_adam": lambda threshold: hardvary.temporal_and_mask_adam(
        0.1, threshold=threshold
    ),
}


@pytest.mark.parametrize("name", MAKERS_WITH_THRESHOLD)
@pytest.mark.parametrize(
    "value",
    [-0.1, 1.1, -1, 2, np.nan, np.inf, np.float32(1.5), jnp.float32(-1)],
    ids=repr,
)
def test_threshold_outside_the_unit_interval_raises(name, value):
    with raises(ValueError, "threshold", "[0, 1]", "got", float(value)):
        MAKERS_WITH_THRESHOLD[name](threshold=value)


@pytest.mark.parametrize("name", MAKERS_WITH_THRESHOLD)
@pytest.mark.parametrize(
    "value",
    ["0.5", None, True, 0.5j, {"w": "0.5"}, np.array([0.5])],
    ids=["str", "none", "bool", "complex", "tree", "array"],
)
def test_threshold_that_is_no_real_scalar_raises(name, value):
    with raises(TypeError, "threshold", "real scalar", "[0, 1]", "got"):
        MAKERS_WITH_THRESHOLD[name](threshold=value)


@every_aggregator
def test_threshold_tree_that_is_no_prefix_of_params_raises(name):
    tx = AGGREGATORS[name]({"w": 0.5, "c": 0.5})
    grads = {"w": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
    with raises(ValueError, "threshold", "prefix of params", "['b']"):
        update(tx, grads)


@every_aggregator
def test_threshold_outside_the_unit_interval_raises_while_tracing(name):
    with raises(ValueError, "threshold", "got 1.5"):
        jax.jit(lambda g: update(AGGREGATORS[name](1.5), g))(make_grads("array", 3))


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, np.nan], ids=repr)
@pytest.mark.parametrize("argument", ["decay", "b1", "b2", "b3"])
def test_decay_outside_its_interval_raises(argument, value):
    with raises(ValueError, argument, "[0, 1)", "got", float(value)):
        if argument == "decay":
            hardvary.temporal_and_mask(optax.sgd(0.1), threshold=0.4, decay=value)
        else:
            hardvary.temporal_and_mask_adam(0.1, **{argument: value})


@pytest.mark.parametrize("argument", ["decay", "b1", "b2", "b3"])
def test_decay_that_is_no_real_scalar_raises(argument):
    with raises(TypeError, argument, "real scalar", "got", "'0.9'"):
        if argument == "decay":
            hardvary.temporal_and_mask(optax.sgd(0.1), threshold=0.4, decay="0.9")
        else:
            hardvary.temporal_and_mask_adam(0.1, **{argument: "0.9"})


@pytest.mark.parametrize("argument", ["eps", "weight_decay"])
def test_temporal_and_mask_adam_negative_constant_raises(argument):
    with raises(ValueError, argument, ">= 0", "got -0.1"):
        hardvary.temporal_and_mask_adam(0.1, **{argument: -0.1})


@pytest.mark.parametrize("inner", [None, 0.1, lambda params: params, optax.adam])
def test_temporal_and_mask_around_no_transformation_raises(inner):
    with raises(TypeError, "inner", "optax.GradientTransformation", "got"):
        hardvary.temporal_and_mask(inner, threshold=0.4, decay=0.9)


@every_aggregator
@pytest.mark.parametrize("value", [0.99, 0, -1.0, np.nan], ids=repr)
def test_max_rescale_below_one_raises(name, value):
    with raises(ValueError, "max_rescale", ">= 1", "got", float(value)):
        AGGREGATORS[name](0.5, rescale=True, max_rescale=value)


@every_aggregator
@pytest.mark.parametrize("value", [1, "yes", None, 2.0], ids=repr)
def test_rescale_that_is_no_boolean_raises(name, value):
    with raises(TypeError, "rescale", "True or False", "got", repr(value)):
        AGGREGATORS[name](0.5, rescale=value)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan], ids=repr)
def test_sand_mask_sharpness_not_positive_raises(value):
    with raises(ValueError, "sharpness", "> 0", "got", value):
        hardvary.sand_mask(0.5, value)


@pytest.mark.parametrize("value", [0.0, -1e-10, np.nan], ids=repr)
def test_geometric_mean_eps_not_positive_raises(value):
    with raises(ValueError, "eps", "> 0", "got", value):
        hardvary.geometric_mean(0.5, eps=value)


def own_drawing_rule(seed):
    return hardvary.aggregator(lambda stats, key: (stats.mean > 0, key), seed=seed)


MAKERS_WITH_SEED = {
    "grad_drop": hardvary.grad_drop,
    "agr_rand": hardvary.agr_rand,
    "aggregator": own_drawing_rule,
}
every_seed = pytest.mark.parametrize(
    "make", MAKERS_WITH_SEED.values(), ids=MAKERS_WITH_SEED
)


@every_seed
def test_negative_seed_raises(make):
    with raises(ValueError, "seed", ">= 0", "got -1"):
        make(-1)


@every_seed
@pytest.mark.parametrize(
    "value",
    [0.0, True, "0", np.zeros(2, np.uint32), jnp.zeros(2, jnp.uint32), jnp.float32(0)],
    ids=["float", "bool", "str", "numpy", "raw_key", "float_array"],
)
def test_seed_that_is_no_integer_and_no_key_raises(make, value):
    with raises(TypeError, "seed", "integer >= 0 or a key", "jax.random.key(0)", "got"):
        make(value)


@pytest.mark.parametrize("make", [hardvary.grad_drop, hardvary.agr_rand])
def test_seed_none_raises_where_there_is_no_rule_without(make):
    with raises(TypeError, "seed", "integer >= 0 or a key", "got None"):
        make(None)


def test_aggregator_with_a_seed_and_a_hyperparameter_named_key_raises():
    with raises(TypeError, "key", "seed", "rename"):
        hardvary.aggregator(lambda stats, key: None, seed=0, key=1.0)


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf, -1], ids=repr)
def test_agr_rand_std_negative_or_not_finite_raises(value):
    with raises(ValueError, "std", "finite and >= 0", "got", float(value)):
        hardvary.agr_rand(0, std=value)


@pytest.mark.parametrize("value", ["0.1", True, 1j, {"w": 0.1}], ids=repr)
def test_agr_rand_std_that_is_no_real_scalar_raises(value):
    with raises(TypeError, "std", "real scalar", "got", repr(value)):
        hardvary.agr_rand(0, std=value)


@pytest.mark.parametrize("value", [-0.1, np.nan], ids=repr)
def test_add_l1_decay_negative_strength_raises(value):
    with raises(ValueError, "strength", ">= 0", "got", value):
        hardvary.add_l1_decay(value)


def test_add_l1_decay_strength_that_is_no_real_scalar_raises():
    with raises(TypeError, "strength", "real scalar", "got", "'0.1'"):
        hardvary.add_l1_decay("0.1")


def test_add_l1_decay_without_params_raises():
    tx = hardvary.add_l1_decay(0.1)
    with raises(
        ValueError, "add_l1_decay", "parameters", "update(updates, state, params)"
    ):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


# Tracing: what an aggregator is given.


@every_aggregator
@in_both_modes
@pytest.mark.parametrize("shape", ["array", "scalar", "nested"])
def test_gradients_without_an_environment_axis_raise(name, shape, jit):
    params = make_params(shape)
    with raises(ValueError, name, "environment axis", "per_env_grad"):
        update(AGGREGATORS[name](0.5), params, params, jit=jit)


@every_aggregator
def test_gradients_without_an_environment_axis_name_the_leaf_and_shapes(name):
    params = {"dense": {"kernel": jnp.ones((3, 4))}}
    with raises(ValueError, "['dense']['kernel']", "(3, 4)", "(3, 4)"):
        update(AGGREGATORS[name](0.5), params, params)


@every_aggregator
def test_python_scalar_gradient_without_an_environment_axis_raises(name):
    with raises(ValueError, name, "environment axis"):
        update(AGGREGATORS[name](0.5), 1.0, 1.0)


@every_aggregator
def test_scalar_gradient_without_params_raises(name):
    with raises(ValueError, name, "environment axis", "scalar"):
        update(AGGREGATORS[name](0.5), jnp.float32(1))


@every_aggregator
@in_both_modes
def test_gradients_of_other_shapes_than_params_raise(name, jit):
    grads, params = {"w": jnp.ones((5, 4, 3))}, {"w": jnp.ones((3, 4))}
    with raises(ValueError, name, "['w']", "(5, 4, 3)", "(3, 4)"):
        update(AGGREGATORS[name](0.5), grads, params, jit=jit)


@every_aggregator
@in_both_modes
def test_leaves_that_disagree_on_the_number_of_environments_raise(name, jit):
    grads = {"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}
    with raises(ValueError, name, "environments", "['a'] has 3", "['b'] has 4"):
        update(AGGREGATORS[name](0.5), grads, jit=jit)


@every_aggregator
@in_both_modes
def test_zero_environments_raise(name, jit):
    with raises(ValueError, name, "zero environments", "at least one"):
        update(AGGREGATORS[name](0.5), jnp.ones((0, 2)), jnp.ones(2), jit=jit)


@every_aggregator
@in_both_modes
@pytest.mark.parametrize("length", [1, 2, 4])
def test_env_weights_of_the_wrong_length_raise(name, length, jit):
    with raises(ValueError, name, "env_weights", "(3,)", "got shape", (length,)):
        update(
            AGGREGATORS[name](0.5),
            make_grads("array", 3),
            jit=jit,
            env_weights=np.ones(length, np.float32),
        )


@every_aggregator
@in_both_modes
@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_env_weights_negative_or_not_finite_raise(name, bad, jit):
    weights = np.array([1.0, bad, 1.0], np.float32)
    with raises(
        ValueError, name, "env_weights", "non-negative", "got", weights.tolist()
    ):
        update(
            AGGREGATORS[name](0.5), make_grads("array", 3), jit=jit, env_weights=weights
        )


def test_env_weights_all_zero_raise():
    with raises(ValueError, "env_weights", "absent", "at least one"):
        update(
            hardvary.and_mask(), make_grads("array", 3), env_weights=np.zeros(3, "f")
        )


def test_env_weights_complex_raise():
    with raises(TypeError, "env_weights", "real", "complex64"):
        update(hardvary.and_mask(), make_grads("array", 3), env_weights=np.ones(3, "F"))


@every_aggregator
@in_both_modes
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "uint8"])
def test_gradients_that_are_not_real_floating_raise(name, dtype, jit):
    grads = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2), dtype)}
    with raises(TypeError, name, "floating", "['b']", dtype):
        update(AGGREGATORS[name](0.5), grads, jit=jit)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_temporal_and_mask_gradients_that_are_not_real_floating_raise(dtype):
    tx = hardvary.temporal_and_mask(optax.sgd(0.1), threshold=0.4, decay=0.9)
    with raises(TypeError, "temporal_and_mask", "floating", "['w']", dtype):
        tx.update({"w": jnp.ones(2, dtype)}, tx.init({"w": jnp.ones(2)}))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_agreement_of_gradients_that_are_not_real_floating_raises(dtype):
    with raises(TypeError, "agreement", "floating", dtype):
        hardvary.agreement(jnp.ones((3, 2), dtype))


@every_aggregator
@pytest.mark.parametrize("field", ["mean", "sign_sum"])
@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_grad_stats_that_are_not_real_floating_raise(name, field, dtype):
    # Integer sign sums would make the threshold an integer: 0.8 becomes 0.
    fields = dict.fromkeys(
        ("mean", "sign_sum", "square_mean", "log_abs_mean"), jnp.ones(3)
    )
    fields[field] = jnp.array([1, 3, 5], dtype)
    stats = hardvary.GradStats(**fields, num_envs=jnp.float32(5))
    with raises(TypeError, name, "floating", dtype):
        update(AGGREGATORS[name](0.8), stats)


@every_aggregator
@in_both_modes
def test_gradients_of_another_tree_than_params_raise(name, jit):
    with raises(ValueError, name, "structure", "'a'", "'b'"):
        update(
            AGGREGATORS[name](0.5),
            {"a": jnp.ones((3, 2))},
            {"b": jnp.ones(2)},
            jit=jit,
        )


def test_temporal_and_mask_gradients_of_another_tree_raise():
    tx = hardvary.temporal_and_mask(optax.sgd(0.1), threshold=0.4, decay=0.9)
    with raises(ValueError, "temporal_and_mask", "structure", "'a'", "'b'"):
        tx.update({"a": jnp.ones(2)}, tx.init({"b": jnp.ones(2)}))


@in_both_modes
@pytest.mark.parametrize(
    ("name", "held", "missing"),
    [
        ("and_mask", ("mean",), "sign"),
        ("xor_mask", ("sign",), "mean"),
        ("geometric_mean", ("mean", "sign"), "log_abs"),
        ("sand_mask", ("mean", "sign"), "square"),
        ("soft_and_mask", ("mean",), "sign"),
        ("grad_drop", ("mean", "sign"), "abs"),
        ("disjoint_mean", ("mean", "sign", "abs"), "nonzero"),
        ("majority_sign", ("mean",), "sign"),
        ("agr_rand", ("sign",), "mean"),
    ],
)
def test_grad_stats_missing_a_statistic_raise(name, held, missing, jit):
    oracle = hardvary.grad_stats(lambda w, x: jnp.sum(w * x), stats=held)
    stats = oracle(jnp.ones(2), jnp.ones((3, 2)))
    with raises(ValueError, name, repr(missing), "grad_stats(loss_fn, stats=", missing):
        tx = PLAIN_AGGREGATORS[name]() if name in PLAIN_AGGREGATORS else None
        update(tx or AGGREGATORS[name](0.5), stats, jit=jit)


def test_agreement_of_grad_stats_without_signs_raises():
    with raises(ValueError, "agreement", "'sign'", "grad_stats(loss_fn, stats="):
        hardvary.agreement(hardvary.GradStats(mean=jnp.ones(2), num_envs=2.0))


def linear_stats():
    oracle = hardvary.grad_stats(
        lambda w, x: jnp.sum(w * x), stats=("mean", "sign", "square", "log_abs")
    )
    return oracle(jnp.ones(2), jnp.ones((3, 2)))


@every_aggregator
def test_grad_stats_together_with_env_weights_raise(name):
    with raises(ValueError, name, "env_weights", "already weighted"):
        update(AGGREGATORS[name](0.5), linear_stats(), env_weights=np.ones(3, "f"))


@every_aggregator
@pytest.mark.parametrize(
    "params", [jnp.ones(3), {"w": jnp.ones(2)}], ids=["shape", "tree"]
)
def test_grad_stats_unlike_params_raise(name, params):
    with raises(ValueError, name, "gradients must have", "params"):
        update(AGGREGATORS[name](0.5), linear_stats(), params)


def test_geometric_mean_of_grad_stats_with_another_eps_raises():
    with raises(ValueError, "geometric_mean", "eps", "0.001", "1e-10", "stacked"):
        update(hardvary.geometric_mean(0.5, eps=1e-3), linear_stats())


# The oracles. Construction first.

ORACLES = {
    "per_env_grad": hardvary.per_env_grad,
    "value_and_per_env_grad": hardvary.value_and_per_env_grad,
    "grad_stats": hardvary.grad_stats,
    "value_and_grad_stats": hardvary.value_and_grad_stats,
    "grad_stats_vmap": lambda *args, **kwargs: hardvary.grad_stats(
        *args, method="vmap", **kwargs
    ),
}
STATS_ORACLES = {name: ORACLES[name] for name in ("grad_stats", "value_and_grad_stats")}
every_oracle = pytest.mark.parametrize("make", ORACLES.values(), ids=ORACLES)
stats_oracles = pytest.mark.parametrize(
    "make", STATS_ORACLES.values(), ids=STATS_ORACLES
)


def squares(w, x):
    return jnp.sum((w * x) ** 2)


@every_oracle
@pytest.mark.parametrize("value", [None, 3, jnp.ones(2)], ids=["none", "int", "array"])
def test_oracles_of_a_loss_that_is_not_callable_raise(make, value):
    with raises(TypeError, "loss_fn", "callable", "got"):
        make(value)


@every_oracle
@pytest.mark.parametrize("value", ["0", 0.5, (0.5,), None], ids=repr)
def test_oracles_with_argnums_that_are_no_integers_raise(make, value):
    with raises(TypeError, "argnums", "integer", "got", repr(value)):
        make(squares, argnums=value)


@every_oracle
@pytest.mark.parametrize("value", [-1, (), (0, 0), (0, -1)], ids=repr)
def test_oracles_with_impossible_argnums_raise(make, value):
    with raises(ValueError, "argnums", "distinct positions", "got", repr(value)):
        make(squares, argnums=value)


@stats_oracles
@pytest.mark.parametrize("value", ["means", "sign_sum", ""], ids=repr)
def test_grad_stats_of_an_unknown_statistic_raise(make, value):
    with raises(ValueError, "stats", "'mean'", "'log_abs'", "got", repr(value)):
        make(squares, stats=("mean", value))


@stats_oracles
def test_grad_stats_of_no_statistic_raise(make):
    with raises(ValueError, "stats", "at least one", "'mean'"):
        make(squares, stats=())


@stats_oracles
@pytest.mark.parametrize("value", ["mean", 3, None], ids=repr)
def test_grad_stats_of_stats_that_are_no_sequence_raise(make, value):
    with raises(TypeError, "stats", "('mean', 'sign')", "got", repr(value)):
        make(squares, stats=value)


@stats_oracles
@pytest.mark.parametrize("value", ["loop", "", None, "SCAN"], ids=repr)
def test_grad_stats_by_an_unknown_method_raise(make, value):
    with raises(ValueError, "method", "'scan'", "'vmap'", "got", repr(value)):
        make(squares, method=value)


@stats_oracles
@pytest.mark.parametrize("value", [0, -2])
def test_grad_stats_microbatch_size_below_one_raises(make, value):
    with raises(ValueError, "microbatch_size", ">= 1", "got", value):
        make(squares, microbatch_size=value)


@stats_oracles
@pytest.mark.parametrize("value", [2.0, "2", True], ids=repr)
def test_grad_stats_microbatch_size_that_is_no_integer_raises(make, value):
    with raises(TypeError, "microbatch_size", "integer", "got", repr(value)):
        make(squares, microbatch_size=value)


@stats_oracles
def test_grad_stats_microbatch_size_for_vmap_raises(make):
    with raises(ValueError, "microbatch_size", "'scan'", "'vmap'", "got 2"):
        make(squares, method="vmap", microbatch_size=2)


# And what they are called with.


@stats_oracles
@in_both_modes
@pytest.mark.parametrize("size", [2, 3, 10])
def test_grad_stats_microbatch_size_that_does_not_divide_raises(make, size, jit):
    oracle = make(squares, microbatch_size=size)
    with raises(ValueError, "microbatch_size", "divide", "got", size, "for 5"):
        (jax.jit(oracle) if jit else oracle)(jnp.ones(2), jnp.ones((5, 2)))


@every_oracle
@in_both_modes
@pytest.mark.parametrize(
    ("loss", "received"),
    [
        (lambda w, x: w * x, "shape (2,)"),
        (lambda w, x: jnp.sum(w * x)[None], "shape (1,)"),
        (lambda w, x: jnp.sum(w * x).astype(jnp.complex64), "complex64"),
        (lambda w, x: jnp.sum(w * x).astype(jnp.int32), "int32"),
        (lambda w, x: jnp.sum(w * x) > 0, "bool"),
        (lambda w, x: 1, "int"),
        (lambda w, x: None, "NoneType"),
        (lambda w, x: {"loss": jnp.sum(w * x)}, "dict"),
        (lambda w, x: (jnp.sum(w * x), x), "tuple"),
        (lambda w, x: [jnp.sum(w * x)], "list"),
        (lambda w, x: "loss", "str"),
    ],
    ids=[
        "vector",
        "one_element",
        "complex",
        "integer",
        "boolean",
        "python_int",
        "none",
        "dict",
        "tuple",
        "list",
        "str",
    ],
)
def test_oracles_of_a_loss_that_is_no_real_scalar_raise(make, loss, received, jit):
    oracle = make(loss)
    with raises(TypeError, "loss", "real scalar", received):
        (jax.jit(oracle) if jit else oracle)(jnp.ones(2), jnp.ones((5, 2)))


@every_oracle
def test_oracles_has_aux_without_aux_raise(make):
    with raises(TypeError, "has_aux=True", "(loss, aux)", "got"):
        make(squares, has_aux=True)(jnp.ones(2), jnp.ones((5, 2)))


@every_oracle
@in_both_modes
def test_oracles_batch_leaves_with_different_leading_sizes_raise(make, jit):
    oracle = make(lambda w, batch: squares(w, batch["x"]))
    batch = {"x": jnp.ones((5, 2)), "y": jnp.ones((4, 2))}
    with raises(ValueError, "batch", "['x'] has 5", "['y'] has 4"):
        (jax.jit(oracle) if jit else oracle)(jnp.ones(2), batch)


@every_oracle
def test_oracles_batch_arguments_with_different_leading_sizes_raise(make):
    oracle = make(lambda w, x, y: squares(w, x))
    with raises(ValueError, "batch", "has 5", "has 4"):
        oracle(jnp.ones(2), jnp.ones((5, 2)), jnp.ones(4))


@every_oracle
def test_oracles_batch_leaf_without_environment_axis_raises(make):
    oracle = make(lambda w, x, scale: squares(w, x) * scale)
    with raises(ValueError, "batch", "environment axis", "scalar"):
        oracle(jnp.ones(2), jnp.ones((5, 2)), 2.0)


@every_oracle
def test_oracles_batch_of_zero_environments_raises(make):
    with raises(ValueError, "zero environments", "at least one"):
        make(squares)(jnp.ones(2), jnp.ones((0, 2)))


@every_oracle
def test_oracles_without_a_batch_raise(make):
    with raises(ValueError, "batch", "[env, ...]"):
        make(lambda w: jnp.sum(w))(jnp.ones(2))


@every_oracle
def test_oracles_without_the_argument_of_argnums_raise(make):
    with raises(ValueError, "argnums 2", "2 positional"):
        make(squares, argnums=2)(jnp.ones(2), jnp.ones((5, 2)))


@every_oracle
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_oracles_of_parameters_that_are_not_real_floating_raise(make, dtype):
    params = {"a": jnp.ones(2), "b": jnp.ones(2, dtype)}
    with raises(TypeError, "parameters", "floating", "['b']", dtype):
        make(lambda p, x: squares(p["a"], x))(params, jnp.ones((5, 2)))


@stats_oracles
@in_both_modes
@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        (np.ones(4, np.float32), ("(5,)", "got shape (4,)")),
        (np.array([1, 1, -1, 1, 1], np.float32), ("non-negative", "-1.0")),
        (np.zeros(5, np.float32), ("absent", "at least one")),
    ],
    ids=["length", "negative", "all_zero"],
)
def test_grad_stats_with_bad_env_weights_raise(make, weights, parts, jit):
    def run(w, x):
        return make(squares)(w, x, env_weights=weights)

    with raises(ValueError, "env_weights", *parts):
        (jax.jit(run) if jit else run)(jnp.ones(2), jnp.ones((5, 2)))


# Found in review.


@pytest.mark.parametrize("make", ["temporal_and_mask", "temporal_and_mask_adam"])
def test_temporal_mask_on_stacked_gradients_raises(make):
    tx = MAKERS_WITH_THRESHOLD[make](0.5)
    with raises(ValueError, "temporal_and_mask", "(4, 3)", "(3,)", "use and_mask"):
        update(tx, jnp.ones((4, 3)), jnp.ones(3))


def test_and_mask_grad_stats_with_a_tree_inside_raise():
    stats = hardvary.GradStats(
        mean={"a": jnp.ones(2)}, sign_sum=jnp.ones(2), num_envs=2.0
    )
    tx = hardvary.and_mask()
    with raises(TypeError, "and_mask", "mean", "a dict", "GradStats at every leaf"):
        tx.update(stats, tx.init(None))


def test_and_mask_grad_stats_without_a_total_raises():
    stats = hardvary.GradStats(mean=jnp.ones(2), sign_sum=jnp.ones(2))
    tx = hardvary.and_mask()
    with raises(ValueError, "and_mask", "num_envs", "grad_stats fills it in"):
        tx.update(stats, tx.init(None))


@pytest.mark.parametrize(
    ("loss", "has_aux", "parts"),
    [
        (lambda w, x: (jnp.sum(w * x), x), False, ["tuple", "pass has_aux=True"]),
        (lambda w, x: None, False, ["a NoneType"]),
        (lambda w, x: (1, x), True, ["an int"]),
        (lambda w, x: w * x, False, ["shape (2,)", "average over the examples"]),
    ],
    ids=["tuple", "nothing", "int", "vector"],
)
def test_grad_stats_loss_that_is_no_scalar_says_what_it_is(loss, has_aux, parts):
    oracle = hardvary.grad_stats(loss, has_aux=has_aux)
    with raises(TypeError, "real scalar, got", *parts) as error:
        oracle(jnp.ones(2), jnp.ones((3, 2)))
    hint_fits = "has_aux=True" in str(error.value)
    assert hint_fits == (parts[-1] == "pass has_aux=True")


# Words that say where to look.


def raises_with_a_note(error, *parts):
    pattern = re.compile("(?s)" + ".*".join(map(re.escape, parts)))
    return pytest.raises(
        error, check=lambda error: any(map(pattern.search, error.__notes__))
    )


@every_oracle
@in_both_modes
@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (lambda w, batch: (batch["x"] @ w[:1]).sum(), TypeError),
        (lambda w, batch: batch["z"], KeyError),
        (lambda w: w.sum(), TypeError),
        (lambda w, batch, key: w.sum(), TypeError),
        (lambda w, batch: float(w[0]), jax.errors.ConcretizationTypeError),
    ],
    ids=["shapes", "key", "too few", "too many", "concrete"],
)
def test_oracles_of_a_loss_that_fails_note_what_it_was_given(make, loss, error, jit):
    batch = {"x": jnp.ones((5, 4, 2)), "y": jnp.ones((5, 4), jnp.int32)}
    oracle = make(loss)
    given = "argument 0: float32[2]; argument 1: ['x'] float32[4, 2], ['y'] int32[4]"
    with raises_with_a_note(error, "ONE of 5", given, "axis 0 of the batch", "in_axes"):
        (jax.jit(oracle) if jit else oracle)(jnp.ones(2), batch)


def test_oracle_of_a_loss_that_fails_notes_its_keywords_and_axes():
    oracle = hardvary.env_grads(lambda w, x, rate: w[:1] @ x, in_axes={1: 1, "rate": 0})
    with raises_with_a_note(
        TypeError, "ONE of 3", "argument 'rate': float32[]", "in_axes={1: 1, 'rate': 0}"
    ):
        oracle(jnp.ones(2), jnp.ones((2, 3)), rate=jnp.ones(3))


def test_oracle_of_a_loss_that_fails_shows_few_of_many_leaves():
    params = {f"layer{i:03}": jnp.ones(2) for i in range(300)}
    with raises_with_a_note(KeyError, "['layer003'] float32[2], 296 more; argument 1"):
        hardvary.env_grads(lambda p, x: p["head"] @ x)(params, jnp.ones((3, 2)))


def test_losses_fn_that_fails_notes_what_it_was_given():
    oracle = hardvary.value_and_env_grads_of_losses(lambda w, x, rate: x @ w[:1])
    given = "argument 0: float32[2]; argument 1: float32[3, 2]; argument 'rate': no"
    with raises_with_a_note(TypeError, "losses_fn", given):
        oracle(jnp.ones(2), jnp.ones((3, 2)), rate="fast")


@every_oracle
@pytest.mark.parametrize(
    ("batch", "where"),
    [
        ({"x": jnp.ones((4, 2)), "y": jnp.ones(3)}, "argument 1['y'] has 3"),
        ([jnp.ones((4, 2)), jnp.ones((3, 2))], "argument 1[1] has 3"),
    ],
    ids=["dict", "list of environments"],
)
def test_oracles_of_environments_of_unequal_size_say_what_to_do(make, batch, where):
    with raises(ValueError, where, "unequal size", "draw as many", "pad"):
        make(squares)(jnp.ones(2), batch)


@every_oracle
def test_oracles_of_a_ragged_array_say_what_to_do(make):
    ragged = np.array([np.ones(3), np.ones(4)], object)
    with raises(
        TypeError, "argument 1 is an ndarray", "objects", "unequal size", "pad"
    ):
        make(squares)(jnp.ones(2), ragged)


@every_oracle
def test_oracles_with_two_parameters_name_the_argument_that_is_wrong(make):
    def loss(w, x, b):
        return jnp.sum(w * x + b)

    with raises(TypeError, "parameters, argument 2 ", "['b']", "int32"):
        make(loss, argnums=(0, 2))(jnp.ones(2), jnp.ones((5, 2)), {"b": jnp.arange(2)})


SCHEDULE = optax.constant_schedule(0.1)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (
            hardvary.and_mask,
            {"rescale": True, "max_rescale": lambda count: 2.0},
        ),
        (hardvary.temporal_and_mask_adam, {"learning_rate": 0.1, "b1": SCHEDULE}),
        (hardvary.temporal_and_mask_adam, {"learning_rate": 0.1, "eps": SCHEDULE}),
    ],
    ids=["max_rescale", "b1", "eps"],
)
def test_schedule_where_none_is_taken_names_what_takes_it(make, argument):
    name = list(argument)[-1]
    with raises(TypeError, name, "no schedule", "optax.inject_hyperparams", "got"):
        make(**argument)
    tx, params = optax.inject_hyperparams(make)(**argument), jnp.ones(2)
    grads = params if make is hardvary.temporal_and_mask_adam else jnp.ones((3, 2))
    with jax.numpy_dtype_promotion("standard"):  # optax raises b1 to whole numbers
        _, state = tx.update(grads, tx.init(params), params)
    expected = list(argument.values())[-1](0)
    np.testing.assert_allclose(state.hyperparams[name], expected, rtol=1e-6)


def test_multi_steps_around_an_aggregator_is_sent_behind_it():
    tx = optax.MultiSteps(optax.chain(hardvary.and_mask(), optax.sgd(0.1)), 2)
    params = jnp.ones(2)
    for grads in (jnp.ones((3, 2)), linear_stats()):
        with raises(ValueError, "behind the aggregator, optax.MultiSteps too"):
            tx.update(grads, tx.init(params), params)

    @jax.jit
    def step(params):
        grads = hardvary.env_grads(squares)(params, jnp.ones((3, 2)))
        return tx.update(grads, tx.init(params), params)

    with raises(TypeError, "first in the chain", "optax.MultiSteps goes behind"):
        step(params)


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ({"w": jnp.ones(3), "c": jnp.ones(3)}, ["it has nothing at ['b']"]),
        ({"w": jnp.ones(3)}, ["it has nothing at ['b']"]),
        ({"w": jnp.ones(3), "b": [jnp.ones(3)]}, ["at ['b'] it has a list", "a leaf"]),
    ],
    ids=["another", "missing", "deeper"],
)
def test_combine_with_weights_that_are_no_prefix_names_the_first_path(weights, parts):
    grads = {"w": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
    with raises(ValueError, "combine: weights", "prefix of params", *parts):
        hardvary.combine(grads, weights)
