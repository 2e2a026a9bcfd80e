"""The contract of every public transformation.

One suite over all of them: a new transformation joins by an entry in CASES.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import hardvary
from tests._asserts import assert_like_params, assert_trees_close, assert_trees_equal
from tests._compat import enable_x64
from tests._inputs import DTYPES, SHAPES, make_grads, make_params
from tests.zoo.blocks import floats

NUM_ENVS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A transformation, and how to feed it.

    Attributes:
      make: the transformation as a function of its main hyperparameter.
      stacked: whether updates enter with an environment axis.
      argument: name of that hyperparameter, None if there is none.
      values: two values that make a difference.
      injected: factory for `optax.inject_hyperparams`, which needs a plain function.
      fixed: other arguments of the factory.
    """

    make: Callable[[Any], Any]
    stacked: bool
    argument: str | None
    values: tuple[Any, Any]
    injected: Callable[..., Any]
    fixed: dict[str, Any]

    def inputs(self, params, seed=0):
        """Gradients on a grid, in the form and dtype that this case takes."""
        rng = np.random.default_rng(seed)
        leading = (NUM_ENVS,) if self.stacked else ()

        def leaf(param):
            shape = (*leading, *jnp.shape(param))
            quarters = rng.integers(-5, 6, jnp.shape(param)) + rng.integers(0, 4, shape)
            # Never zero: in float16 Adam's eps is, and 0/0 would be optax's own.
            quarters = np.where(quarters == 0, 1, quarters)
            return jnp.asarray(quarters / 4, jnp.result_type(param))

        return jax.tree.map(leaf, params)


def case(factory, stacked, argument=None, values=(None, None), **fixed):
    def make(value):
        return factory(**({} if argument is None else {argument: value}), **fixed)

    return Case(make, stacked, argument, values, factory, fixed)


def temporal_and_mask_sgd(threshold, decay):
    return hardvary.temporal_and_mask(optax.sgd(0.5), threshold=threshold, decay=decay)


def spectral_and_mask(threshold):
    return hardvary.spectral_and_mask(threshold, log_losses=False)


def drop_disagreement(energy):
    return hardvary.drop_disagreement(energy, log_losses=False)


CASES = {
    "and_mask": case(hardvary.and_mask, True, "threshold", (0.0, 1.0), rescale=True),
    "xor_mask": case(hardvary.xor_mask, True, "threshold", (0.5, 1.0)),
    "geometric_mean": case(hardvary.geometric_mean, True, "threshold", (0.0, 1.0)),
    "sand_mask": case(
        hardvary.sand_mask, True, "threshold", (0.0, 0.75), sharpness=1.0
    ),
    "soft_and_mask": case(hardvary.soft_and_mask, True, "threshold", (0.0, 0.75)),
    "grad_drop": case(hardvary.grad_drop, True, "seed", (0, 1)),
    "disjoint_mean": case(hardvary.disjoint_mean, True),
    "majority_sign": case(hardvary.majority_sign, True),
    "agr_rand": case(hardvary.agr_rand, True, "std", (1.0, 2.0), seed=0),
    "cagrad": case(hardvary.cagrad, True, "c", (0.0, 0.75)),
    "pcgrad": case(hardvary.pcgrad, True, seed=0),
    "clip_env_norms": case(hardvary.clip_env_norms, True, "max_norm", (0.5, 1.0)),
    "spectral_and_mask": case(spectral_and_mask, True, "threshold", (0.0, 1.0)),
    "drop_disagreement": case(drop_disagreement, True, "energy", (0.0, 1.0)),
    "temporal_and_mask": case(
        temporal_and_mask_sgd, False, "threshold", (0.5, 1.0), decay=0.5
    ),
    "temporal_and_mask_adam": case(
        hardvary.temporal_and_mask_adam,
        False,
        "threshold",
        (0.5, 1.0),
        b3=0.5,
        learning_rate=0.1,
        weight_decay=0.1,
    ),
    "add_l1_decay": case(hardvary.add_l1_decay, False, "strength", (0.5, 1.0)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
tunable_cases = pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.argument is not None],
    ids=[name for name, case in CASES.items() if case.argument is not None],
)
stacked_cases = pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.stacked],
    ids=[name for name, case in CASES.items() if case.stacked],
)


@pytest.fixture(autouse=True)
def _promotion(request):
    # Bias correction in optax's Adam raises a float to an integer power.
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("case") is CASES["temporal_and_mask_adam"]:
        request.getfixturevalue("standard_promotion")


def make(case):
    return case.make(case.values[0])


def first_update(tx, inputs, params, **extra_args):
    """Updates from a fresh state, compiled: op by op takes many compilations."""

    @jax.jit
    def run(inputs, params):
        return tx.update(inputs, tx.init(params), params, **extra_args)[0]

    return run(inputs, params)


@functools.cache
def plain_update(case, shape):
    """`(inputs, params, updates)` in float32, compiled for all tests once."""
    params = make_params(shape)
    inputs = case.inputs(params)
    return inputs, params, first_update(make(case), inputs, params)


@every_case
def test_transformation_under_jit_compiles_once_and_equals_eager(case):
    tx, params = make(case), make_params("array")
    traces = []

    @jax.jit
    def step(updates, state, params):
        traces.append(1)
        return tx.update(updates, state, params)

    state = eager_state = tx.init(params)
    for seed in range(2):
        inputs = case.inputs(params, seed)
        updates, state = step(inputs, state, params)
        eager, eager_state = tx.update(inputs, eager_state, params)
        assert_trees_close(updates, eager)
        assert_trees_close(state, eager_state)
    assert len(traces) == 1


@every_case
def test_transformation_inside_scan_equals_a_loop(case):
    tx, params = make(case), make_params("array")
    inputs = jnp.stack([case.inputs(params, seed) for seed in range(3)])

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    start = (params, tx.init(params))
    end, updates = jax.jit(lambda start: jax.lax.scan(step, start, inputs))(start)
    carry, expected = start, []
    for grads in inputs:
        carry, update = step(carry, grads)
        expected.append(update)
    assert_trees_close(updates, jnp.stack(expected))
    assert_trees_close(end, carry)


@every_case
def test_transformation_under_vmap_over_seeds_equals_one_by_one(case):
    tx, params = make(case), make_params("nested")
    inputs = [case.inputs(params, seed) for seed in range(3)]
    seeds = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)

    @jax.jit
    def one(inputs, params):
        return tx.update(inputs, tx.init(params), params)

    together = jax.jit(jax.vmap(one))(seeds, many)
    for seed in range(3):
        alone = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together)
        assert_trees_close(alone, one(inputs[seed], params))


@every_case
def test_transformation_first_in_a_chain_feeds_the_rest(case):
    inputs, params, alone = plain_update(case, "nested")
    chain = optax.chain(make(case), optax.scale(-2.0), optax.trace(0.9))
    updates = first_update(chain, inputs, params)
    assert_like_params(updates, params)
    assert_trees_close(updates, jax.tree.map(lambda u: -2 * u, alone))


@every_case
def test_transformation_in_masked_acts_on_the_named_leaves_only(case):
    tx, params = make(case), make_params("nested")
    inputs = case.inputs(params)
    masked = optax.masked(tx, {"dense": True, "scale": False, "none": None})
    updates = first_update(masked, inputs, params)
    alone = first_update(tx, inputs["dense"], params["dense"])
    assert_trees_close(updates["dense"], alone)
    # A skipped leaf is passed on as it came, environment axis included.
    assert_trees_equal(updates["scale"], inputs["scale"])


@every_case
def test_transformation_in_partition_acts_on_its_own_leaves(case):
    params = make_params("nested")
    inputs = case.inputs(params)
    one, other = (case.make(value) for value in case.values)
    labels = {"dense": "one", "scale": "other", "none": None}
    both = optax.partition({"one": one, "other": other}, labels)
    updates = first_update(both, inputs, params)
    assert_like_params(updates, params)
    for name, tx in (("dense", one), ("scale", other)):
        alone = first_update(tx, inputs[name], params[name])
        assert_trees_close(updates[name], alone)


@tunable_cases
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_transformation_with_injected_schedule_follows_it(case, jit):
    first, second = case.values
    params = make_params("array")
    injected = optax.inject_hyperparams(
        case.injected,
        # Branches of a program, not numbers in the optimizer's state.
        static_args=[k for k, v in case.fixed.items() if isinstance(v, bool)],
    )(
        **{case.argument: lambda count: jnp.where(count < 1, first, second)},
        **case.fixed,
    )
    state = injected.init(params)
    update = jax.jit(injected.update) if jit else injected.update
    plain_state = case.make(first).init(params)
    seen = []
    for value in (first, second):
        inputs = case.inputs(params)
        updates, state = update(inputs, state, params)
        expected, plain_state = case.make(value).update(inputs, plain_state, params)
        assert_trees_close(updates, expected)
        assert float(state.hyperparams[case.argument]) == value
        seen.append(np.asarray(updates))
    # Else the schedule could as well have been ignored.
    assert not np.array_equal(*seen)


@every_case
def test_transformation_with_injected_defaults_under_jit_runs(case):
    params = make_params("array")
    fixed = {k: v for k, v in case.fixed.items() if not isinstance(v, bool)}
    if case.argument is not None:
        fixed[case.argument] = case.values[0]
    tx = optax.inject_hyperparams(case.injected)(**fixed)
    inputs = case.inputs(params)
    updates = first_update(tx, inputs, params)
    expected, _ = tx.update(inputs, tx.init(params), params)
    assert_trees_close(updates, expected)


@every_case
def test_transformation_state_under_map_params_keeps_its_structure(case):
    tx, params = make(case), make_params("nested")
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    # Leaves like parameters, and they alone, are visited.
    visited = jax.tree.map(lambda old, new: bool((new != old).all()), state, mapped)
    if case.stacked or not jax.tree.leaves(state):
        assert not any(jax.tree.leaves(visited))
    else:
        temporal = visited if hasattr(visited, "sign_ema") else visited[0]
        assert all(jax.tree.leaves(temporal.sign_ema))


@every_case
def test_transformation_with_unknown_extra_arguments_ignores_them(case):
    inputs, params, plain = plain_update(case, "nested")
    extra_args = {"value": jnp.float32(1), "unknown": "x"}
    with_extra = first_update(make(case), inputs, params, **extra_args)
    assert_trees_equal(with_extra, plain)


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformation_keeps_the_dtype_of_its_updates(case, dtype):
    with enable_x64(dtype == "float64"):
        tx, params = make(case), make_params("array", dtype)
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(case.inputs(params), state, params)
        assert_like_params(updates, params)
        # A state that changed dtype would recompile, and break a scan.
        assert_like_params(new_state, state)
    *_, expected = plain_update(case, "array")
    rtol = {"bfloat16": 2e-2, "float16": 2e-3}.get(dtype, 1e-5)
    assert_trees_close(updates, expected, rtol=rtol)


@every_case
@pytest.mark.parametrize("shape", SHAPES)
def test_transformation_on_any_tree_returns_updates_like_params(case, shape):
    _, params, updates = plain_update(case, shape)
    assert_like_params(updates, params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(updates))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.tanh(linen.Dense(3)(x)))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 3, rngs=rngs)
        self.readout = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.readout(nnx.tanh(self.hidden(x)))


@functools.cache
def linen_problem():
    model = LinenModel()
    return model.init(jax.random.key(0), jnp.ones((1, 2))), model.apply


@functools.cache
def nnx_problem():
    graph, params = nnx.split(NNXModel(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


@every_case
@pytest.mark.parametrize("problem", [linen_problem, nnx_problem], ids=["linen", "nnx"])
# Flax promotes and broadcasts inside its layers.
@pytest.mark.usefixtures("standard_promotion")
def test_transformation_on_flax_parameters_trains(case, problem):
    with jax.numpy_rank_promotion("allow"):
        params, apply = problem()
        tx = optax.chain(make(case), optax.sgd(0.01))
        rng = np.random.default_rng(0)
        x = floats(rng.normal(size=(NUM_ENVS, 8, 2)))

        def loss_fn(params, x):
            return jnp.mean((apply(params, x) - x.sum(-1, keepdims=True)) ** 2)

        per_env = hardvary.per_env_grad(loss_fn)

        @jax.jit
        def step(params, state):
            grads = per_env(params, x)
            if not case.stacked:
                grads = jax.tree.map(lambda leaf: leaf.mean(0), grads)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, updates

        new_params, _, updates = step(params, tx.init(params))
    assert_like_params(updates, params)
    assert_like_params(new_params, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new_params))


@pytest.mark.parametrize("problem", [linen_problem, nnx_problem], ids=["linen", "nnx"])
@pytest.mark.usefixtures("standard_promotion")
def test_grad_stats_of_flax_parameters_equal_the_stacked_form(problem):
    with jax.numpy_rank_promotion("allow"):
        params, apply = problem()
        rng = np.random.default_rng(0)
        x = floats(rng.normal(size=(NUM_ENVS, 8, 2)))

        def loss_fn(params, x):
            return jnp.mean((apply(params, x) - x.sum(-1, keepdims=True)) ** 2)

        tx = hardvary.and_mask(0.5)
        state = tx.init(params)

        @jax.jit
        def both(params):
            stats = hardvary.grad_stats(loss_fn)(params, x)
            grads = hardvary.per_env_grad(loss_fn)(params, x)
            return tx.update(stats, state, params), tx.update(grads, state, params)

        fast, stacked = both(params)
    assert_trees_close(fast, stacked)


@every_case
def test_transformation_before_apply_if_finite_keeps_nan_from_the_optimizer(case):
    params = make_params("array")
    inputs = case.inputs(params)
    index = (0,) * inputs.ndim
    tx = optax.chain(make(case), optax.apply_if_finite(optax.sgd(0.1), 5))
    update = jax.jit(tx.update)
    updates, state = update(inputs.at[index].set(jnp.nan), tx.init(params), params)
    np.testing.assert_array_equal(updates, np.zeros(7))
    assert int(optax.tree.get(state, "notfinite_count")) == 1


@stacked_cases
def test_aggregator_kept_fraction_is_found_in_any_optimizer_state(case):
    params = make_params("nested")
    tx = optax.chain(make(case), optax.adam(1e-3))
    state = tx.init(params)
    assert float(optax.tree.get(state, "kept_fraction")) == 0
    with jax.numpy_dtype_promotion("standard"):
        _, state = jax.jit(tx.update)(case.inputs(params), state, params)
    kept = optax.tree.get(state, "kept_fraction")
    assert kept.dtype == jnp.float32
    assert 0 < float(kept) <= 1
    assert isinstance(state[0], hardvary.AggregatorState)


@stacked_cases
def test_aggregator_in_a_chain_receives_env_weights(case):
    params = make_params("nested")
    inputs = case.inputs(params)
    tx = optax.chain(make(case), optax.scale(1.0))
    weights = np.array([1, 0, 1, 1], np.float32)
    updates = first_update(tx, inputs, params, env_weights=weights)
    present = jax.tree.map(lambda leaf: leaf[weights > 0], inputs)
    expected = first_update(tx, present, params)
    assert_trees_close(updates, expected)


@stacked_cases
def test_aggregator_init_with_a_leafless_tree_equals_init_with_params(case):
    # optax.tree.map_params calls it that way.
    assert_trees_equal(make(case).init({}), make(case).init(make_params("nested")))


def test_temporal_and_mask_adam_injected_for_bfloat16_keeps_float32_rates():
    # In bfloat16, the dtype that optax would take, b2 = 0.999 rounds to 1.
    params = make_params("array", "bfloat16")
    tx = optax.inject_hyperparams(
        hardvary.temporal_and_mask_adam, hyperparam_dtype=jnp.float32
    )(learning_rate=0.1, b3=0.5)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jnp.ones_like(params), tx.init(params), params)
    np.testing.assert_allclose(np.asarray(updates, np.float32), -0.1, rtol=1e-2)


def test_aggregator_accumulates_over_microbatches_where_multi_steps_cannot():
    # optax.MultiSteps wants updates shaped like params. What replaces it accumulates
    # inside the oracle.
    params = jnp.ones(3)
    grads = make_grads("array", 8)[:, :3]
    oracle = hardvary.grad_stats(lambda w, g: jnp.sum(w * g), microbatch_size=2)
    tx = hardvary.and_mask(0.5)
    actual, _ = tx.update(oracle(params, grads), tx.init(params), params)
    expected, _ = tx.update(grads, tx.init(params), params)
    assert_trees_close(actual, expected)
