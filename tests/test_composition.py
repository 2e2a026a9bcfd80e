"""What composes with an aggregator first: like stacked gradients, or refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from optax.experimental import aggregating

import hardvary
from tests._asserts import assert_trees_close
from tests._inputs import STATISTICS
from tests.zoo import compile_quickly
from tests.zoo.blocks import floats

NUM_ENVS = 4
ORACLES = {
    "stacked": hardvary.per_env_grad,
    "env_grads": hardvary.env_grads,
    "grad_stats": functools.partial(hardvary.grad_stats, stats=STATISTICS),
}
# The two that have to do as the first does.
not_stacked = pytest.mark.parametrize("form", ["env_grads", "grad_stats"])


def make_params():
    rng = np.random.default_rng(0)
    return {
        "w": floats(rng.normal(size=(3, 2))),
        "b": floats(rng.normal(size=2)),
    }


def make_batch(seed=1):
    rng = np.random.default_rng(seed)
    return floats(rng.normal(size=(NUM_ENVS, 5, 3)))


def loss_fn(params, x):
    y = jnp.sin(x @ params["w"] + params["b"][None])
    return jnp.mean(jnp.square(y - x[:, :2]))


def masked_sgd(threshold=0.5):
    return optax.chain(hardvary.and_mask(threshold), optax.sgd(0.1))


# --------------------------------------------------------------------------------------
# Like stacked gradients.


def partition():
    rules = {
        "one": hardvary.and_mask(0.5),
        "other": optax.chain(hardvary.geometric_mean(0.5), optax.scale(-3.0)),
    }
    return optax.partition(rules, {"w": "one", "b": "other"})


def masked():
    return optax.chain(
        optax.masked(hardvary.and_mask(0.5), {"w": True, "b": False}),
        optax.masked(hardvary.xor_mask(0.5), {"w": False, "b": True}),
        optax.sgd(0.1),
    )


def injected():
    make = optax.inject_hyperparams(masked_sgd)
    return make(threshold=lambda count: jnp.where(count < 1, 0.0, 1.0))


def sam(**settings):
    """Both optimizers begin with an aggregator."""
    adversary = optax.chain(
        hardvary.and_mask(0.0), optax.contrib.normalize(), optax.sgd(0.05)
    )
    return optax.contrib.sam(masked_sgd(), adversary, **settings)


def process(aggregator):
    tx = aggregating.process(optax.identity(), aggregator, optax.adam(0.1))
    return optax.GradientTransformationExtraArgs(tx.init, tx.update)


def accumulated():
    """A `process` that adds up what the aggregator returns for several batches."""
    step = optax.chain(hardvary.and_mask(0.5), aggregating.accumulate_avg_updates(2))
    return process(step)


COMPOSED = {
    "chain": lambda: optax.chain(
        hardvary.sand_mask(0.25, sharpness=2.0), optax.add_decayed_weights(0.1)
    ),
    "clip behind": lambda: optax.chain(
        hardvary.and_mask(0.5), optax.clip_by_global_norm(0.1), optax.adam(0.1)
    ),
    "partition": partition,
    "masked": masked,
    "inject_hyperparams": injected,
    "MultiSteps behind": lambda: optax.chain(
        hardvary.and_mask(0.5),
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    ),
    "apply_if_finite behind": lambda: optax.chain(
        hardvary.and_mask(0.5), optax.apply_if_finite(optax.sgd(0.1), 5)
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(masked_sgd(), 0.1),
    "sam": lambda: sam(sync_period=2),
    "muon": lambda: optax.chain(hardvary.and_mask(0.5), optax.contrib.muon(0.1)),
    "process": lambda: process(hardvary.and_mask(0.5)),
    "process and accumulate": accumulated,
    "named_chain": lambda: optax.named_chain(
        ("mask", hardvary.and_mask(0.5)), ("rest", optax.sgd(0.1, momentum=0.9))
    ),
    "with_extra_args_support": lambda: optax.chain(
        optax.with_extra_args_support(optax.identity()), masked_sgd()
    ),
    "flatten behind": lambda: optax.chain(
        hardvary.and_mask(0.5), optax.flatten(optax.adam(0.1))
    ),
    "lbfgs behind": lambda: optax.chain(
        hardvary.and_mask(0.5), optax.scale_by_lbfgs(), optax.scale(-0.1)
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.usefixtures("standard_promotion")
def test_composition_on_every_form_trains_as_on_stacked_gradients(name):
    tx, params = COMPOSED[name](), make_params()

    @compile_quickly
    def step(carries, batch):
        def one(form, carry):
            params, state = carry
            updates, state = tx.update(
                ORACLES[form](loss_fn)(params, batch), state, params
            )
            return optax.apply_updates(params, updates), state

        return {form: one(form, carry) for form, carry in carries.items()}

    start = (params, tx.init(params))
    carries = dict.fromkeys(ORACLES, start)
    with jax.numpy_rank_promotion("allow"):
        for seed in range(3):
            carries = step(carries, make_batch(seed))
    expected = carries.pop("stacked")
    moved = np.abs(expected[0]["w"] - params["w"]).max()
    assert 1e-3 < moved < 10
    for actual in carries.values():
        assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_sam_in_opaque_mode_asks_for_gradients_of_every_form():
    tx, params = sam(sync_period=2, opaque_mode=True), make_params()

    @compile_quickly
    def run(params, batch):
        def updates_of(oracle):
            grad_fn = lambda params, _: oracle(loss_fn)(params, batch)  # noqa: E731
            grads = grad_fn(params, 0)
            return tx.update(grads, tx.init(params), params, grad_fn=grad_fn)[0]

        return [updates_of(oracle) for oracle in ORACLES.values()]

    expected, *rest = run(params, make_batch())
    for updates in rest:
        assert_trees_close(updates, expected)


@pytest.mark.usefixtures("standard_promotion")
def test_lookahead_on_every_form_trains_as_on_stacked_gradients():
    tx, params = optax.lookahead(masked_sgd(), 2, 0.5), make_params()

    @compile_quickly
    def run(params, batches):
        def train(oracle):
            both = optax.LookaheadParams.init_synced(params)
            state = tx.init(both)
            for batch in batches:
                grads = oracle(loss_fn)(both.fast, batch)
                updates, state = tx.update(grads, state, both)
                both = optax.apply_updates(both, updates)
            return both

        return [train(oracle) for oracle in ORACLES.values()]

    expected, *rest = run(params, [make_batch(seed) for seed in range(2)])
    for actual in rest:
        assert_trees_close(actual, expected)


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.tanh(linen.Dense(3)(x)))


@pytest.mark.usefixtures("standard_promotion")
def test_linen_train_state_applies_gradients_of_every_form():
    model, x = LinenModel(), make_batch()
    with jax.numpy_rank_promotion("allow"):
        params = model.init(jax.random.key(0), x[0])
        tx = optax.chain(hardvary.and_mask(0.5), optax.adam(0.1))
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

        def loss(params, x):
            return jnp.mean(jnp.square(model.apply(params, x) - x[:, :1]))

        def run(state):
            grads = [oracle(loss)(state.params, x) for oracle in ORACLES.values()]
            return [state.apply_gradients(grads=leaf) for leaf in grads]

        expected, *rest = compile_quickly(run)(state)
    assert int(expected.step) == 1
    for actual in rest:
        assert_trees_close(actual.params, expected.params)
        assert_trees_close(actual.opt_state, expected.opt_state)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 3, rngs=rngs)
        self.readout = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.readout(nnx.tanh(self.hidden(x)))


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_optimizer_updates_with_gradients_of_every_form():
    def updated(form, jit=True):
        model = NNXModel(nnx.Rngs(0))
        tx = optax.chain(hardvary.and_mask(0.5), optax.sgd(0.1))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        def step(model, optimizer, x):
            graph, params = nnx.split(model, nnx.Param)

            def loss(params, x):
                return jnp.mean(jnp.square(nnx.merge(graph, params)(x) - x[:, :1]))

            optimizer.update(model, ORACLES[form](loss)(params, x))

        (nnx.jit(step) if jit else step)(model, optimizer, make_batch())
        return nnx.state(model, nnx.Param), nnx.state(optimizer)

    with jax.numpy_rank_promotion("allow"):
        expected, *rest = [updated(form) for form in ORACLES]
        outside = updated("env_grads", jit=False)
    for actual in [*rest, outside]:
        assert_trees_close(actual, expected)


# --------------------------------------------------------------------------------------
# Refused, with the mend.

# What a message has to say: where the aggregator belongs, or what to take along.
MENDS = {
    "env_grads": r"Put hardvary's aggregator first in the chain, inside the same jit; "
    r"to leave a jit, or to cross a scan or a cond, take "
    r"\.stats\(\.\.\.\), \.mean\(\) or \.stack\(\) first",
    "grad_stats": r"put hardvary's aggregator in front and everything else behind it|"
    r"put what averages or adds up gradients behind the aggregator",
}


def refused(form):
    return pytest.raises((TypeError, ValueError), match=MENDS[form])


def cases(names):
    return pytest.mark.parametrize(
        ("name", "form"),
        [(name, form) for name in names for form in ("env_grads", "grad_stats")],
    )


def grads_of(form, params):
    return ORACLES[form](loss_fn)(params, make_batch())


@functools.cache
def eager_grads(form):
    """Outside of a jit, where every operation is compiled by itself."""
    return grads_of(form, make_params())


IN_FRONT = {
    "clip": lambda: optax.clip(1.0),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(1.0),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
    "scale": lambda: optax.scale(2.0),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: 0.1),
    "add_noise": lambda: optax.add_noise(0.1, 0.5, 0),
    "add_decayed_weights": lambda: optax.add_decayed_weights(0.1),
    "trace": lambda: optax.trace(0.9),
    "ema": lambda: optax.ema(0.9),
    "scale_by_adam": lambda: optax.scale_by_adam(),
    "normalize": lambda: optax.contrib.normalize(),
    "centralize": lambda: optax.centralize(),
    "sign": lambda: optax.scale_by_sign(),
    "keep_params_nonnegative": lambda: optax.keep_params_nonnegative(),
    "stateless": lambda: optax.stateless(
        lambda updates, _: jax.tree.map(lambda leaf: leaf * 2, updates)
    ),
}


@cases(IN_FRONT)
@pytest.mark.usefixtures("standard_promotion")
def test_transformation_in_front_of_an_aggregator_is_refused(name, form):
    tx = optax.chain(IN_FRONT[name](), hardvary.and_mask(0.5))

    @jax.jit
    def step(params):
        return tx.update(grads_of(form, params), tx.init(params), params)[0]

    with refused(form):
        step(make_params())


@not_stacked
@pytest.mark.parametrize(
    "name", ["clip", "clip_by_global_norm", "scale", "trace", "centralize"]
)
@pytest.mark.usefixtures("standard_promotion")
def test_transformation_in_front_of_an_aggregator_is_refused_outside_of_a_jit(
    name, form
):
    params = make_params()
    tx = optax.chain(IN_FRONT[name](), hardvary.and_mask(0.5))
    # A key array outside of a jit lacks some methods of arrays, and JAX says only that.
    lacks = form == "grad_stats" and name in ("clip_by_global_norm", "centralize")
    with pytest.raises(NotImplementedError) if lacks else refused(form):
        tx.update(grads_of(form, params), tx.init(params), params)


AROUND = {
    "apply_if_finite": lambda: optax.apply_if_finite(masked_sgd(), 5),
    "MultiSteps": lambda: optax.MultiSteps(masked_sgd(), 2).gradient_transformation(),
    "flatten": lambda: optax.flatten(masked_sgd()),
    "conditionally_transform": lambda: optax.conditionally_transform(
        masked_sgd(), lambda step: step < 1
    ),
    "sam with another adversary": lambda: optax.contrib.sam(
        masked_sgd(), optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    ),
    "process with clipping": lambda: aggregating.process(
        optax.clip(1.0), hardvary.and_mask(0.5), optax.sgd(0.1)
    ),
}


@cases(AROUND)
@pytest.mark.usefixtures("standard_promotion")
def test_wrapper_that_computes_with_gradients_is_refused(name, form):
    tx = AROUND[name]()

    @jax.jit
    def step(params):
        return tx.update(grads_of(form, params), tx.init(params), params)[0]

    with refused(form):
        step(make_params())


@pytest.mark.parametrize("name", ["apply_if_finite", "MultiSteps"])
@pytest.mark.usefixtures("standard_promotion")
def test_wrapper_that_wants_updates_like_gradients_refuses_every_form(name):
    params, tx = make_params(), AROUND[name]()
    for form in ORACLES:
        with pytest.raises((TypeError, ValueError)):
            tx.update(eager_grads(form), tx.init(params), params)


def test_frozen_parameters_beside_an_aggregator():
    rules = {"train": hardvary.and_mask(0.5), "frozen": optax.set_to_zero()}
    tx = optax.partition(rules, {"w": "train", "b": "frozen"})
    # Of the other forms set_to_zero makes zeros of that form. Behind, it is right.
    behind = optax.chain(
        hardvary.and_mask(0.5),
        optax.masked(optax.set_to_zero(), {"w": False, "b": True}),
    )

    @compile_quickly
    def run(params):
        grads = {form: grads_of(form, params) for form in ORACLES}
        expected, _ = tx.update(grads["env_grads"], tx.init(params), params)
        return expected, [
            behind.update(leaf, behind.init(params), params)[0]
            for leaf in grads.values()
        ]

    expected, all_behind = run(make_params())
    np.testing.assert_array_equal(expected["b"], np.zeros(2))
    for actual in all_behind:
        assert_trees_close(actual, expected)


def by_name(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, tree)


def test_labels_by_a_function_see_the_tree_of_the_parameters():
    rules = {"w": hardvary.and_mask(0.5), "b": hardvary.and_mask(0.0)}
    txs = [
        optax.partition(rules, labels) for labels in (by_name, by_name(make_params()))
    ]

    @compile_quickly
    def run(params):
        return [
            [
                tx.update(grads_of(form, params), tx.init(params), params)[0]
                for tx in txs
            ]
            for form in ("stacked", "env_grads")
        ]

    params = make_params()
    for actual, expected in run(params):
        assert_trees_close(actual, expected)
    # optax calls the function on the gradients: of another tree with GradStats.
    match = r"give optax\.partition and optax\.masked a tree, not a function"
    with pytest.raises(ValueError, match=match):
        txs[0].update(eager_grads("grad_stats"), txs[0].init(params), params)
    every = lambda tree: jax.tree.map(lambda _: True, tree)  # noqa: E731
    masked = optax.masked(hardvary.and_mask(0.5), every)
    with pytest.raises(ValueError, match=match):
        masked.update(eager_grads("grad_stats"), masked.init(params), params)


def test_zero_nans_in_front_of_grad_stats_does_what_it_does_behind():
    w = make_params()["w"]
    batch = make_batch()[:, :3, :2].at[1, 0].set(jnp.nan)
    rules = [
        hardvary.and_mask(0.5),
        hardvary.xor_mask(0.5),
        hardvary.geometric_mean(0.5),
        hardvary.sand_mask(0.5, sharpness=2.0),
    ]

    @compile_quickly
    def run(w):
        linear = lambda w, x: jnp.sum(w * x)  # noqa: E731
        stats = ORACLES["grad_stats"](linear)(w, batch)
        pairs = [
            (optax.chain(optax.zero_nans(), rule), optax.chain(rule, optax.zero_nans()))
            for rule in rules
        ]
        return [[tx.update(stats, tx.init(w), w)[0] for tx in pair] for pair in pairs]

    for in_front, behind in run(w):
        assert_trees_close(in_front, behind)
        assert not np.any(behind[0])
        assert np.any(behind[1:])


@pytest.mark.usefixtures("standard_promotion")
def test_conditionally_mask_around_env_grads_skips_steps():
    tx = optax.conditionally_mask(masked_sgd(), lambda step: step < 1)
    params, plain = make_params(), masked_sgd()
    grads, state = eager_grads("env_grads"), tx.init(params)
    first, state = tx.update(grads, state, params)
    expected, _ = plain.update(grads, plain.init(params), params)
    assert_trees_close(first, expected)
    second, _ = tx.update(grads, state, params)
    assert_trees_close(second, jax.tree.map(jnp.zeros_like, params))


ARITHMETIC = {
    "add": lambda grads: jax.tree.map(jnp.add, grads, grads),
    "operator": lambda grads: jax.tree.map(lambda a, b: a + b, grads, grads),
    "scaled": lambda grads: jax.tree.map(lambda leaf: 0.5 * leaf, grads),
    "divided": lambda grads: jax.tree.map(lambda leaf: leaf / 2, grads),
    "where": lambda grads: jax.tree.map(lambda leaf: jnp.where(True, leaf, 0), grads),
    "norm": optax.tree.norm,
    "apply_updates": lambda grads: optax.apply_updates(make_params(), grads),
    "comparison": lambda grads: jax.tree.map(lambda leaf: leaf > 0, grads),
    "abs": lambda grads: jax.tree.map(abs, grads),
    "negative": lambda grads: jax.tree.map(lambda leaf: -leaf, grads),
    "tree.add": lambda grads: optax.tree.add(grads, grads),
    "tree.scale": lambda grads: optax.tree.scale(2.0, grads),
}


@cases(ARITHMETIC)
@pytest.mark.usefixtures("standard_promotion")
def test_arithmetic_on_gradients_is_refused(name, form):
    with refused(form):
        jax.jit(lambda params: ARITHMETIC[name](grads_of(form, params)))(make_params())


USED_AS_ARRAY = {
    "np.asarray": np.asarray,
    "jnp.asarray": jnp.asarray,
    "float": float,
    "len": len,
    "index": lambda grad: grad[0],
    "sum": lambda grad: grad.sum(),
    "astype": lambda grad: grad.astype(jnp.float16),
    "reshape": lambda grad: grad.reshape(-1),
    "at": lambda grad: grad.at[0].set(0.0),
    "matmul": lambda grad: grad @ grad,
    "iteration": list,
    "bool": bool,
    "jnp.sum": jnp.sum,
    "jnp.dot": lambda grad: jnp.dot(grad, grad),
    "device_put": jax.device_put,
    "numpy function": lambda grad: np.add(grad, 1.0),
    "numpy array on the left": lambda grad: np.ones(2) * grad,
    "jax array on the left": lambda grad: jnp.ones(2) * grad,
    "in place": lambda grad: (
        grad.__iadd__(1.0) if hasattr(grad, "__iadd__") else grad + 1
    ),
}


@pytest.mark.parametrize("name", USED_AS_ARRAY)
def test_env_grad_taken_for_an_array_is_refused(name):
    with refused("env_grads"):
        USED_AS_ARRAY[name](eager_grads("env_grads")["b"])


def in_scan(grads):
    jax.lax.scan(lambda carry, _: (carry, None), grads, None, length=2)


def out_of_scan(grads):
    jax.lax.scan(lambda carry, _: (carry, grads), 0, None, length=2)


def in_cond(grads):
    jax.lax.cond(True, lambda g: 0.0, lambda g: 1.0, grads)


def out_of_cond(grads):
    jax.lax.cond(True, lambda: grads, lambda: grads)


CROSSINGS = {
    "out of a jit": lambda grads: jax.jit(lambda: grads)(),
    "into a jit": lambda grads: jax.jit(lambda g: g["b"].mean())(grads),
    "carried by a scan": in_scan,
    "out of a scan": out_of_scan,
    "into a cond": in_cond,
    "out of a cond": out_of_cond,
    "into a while_loop": lambda grads: jax.lax.while_loop(
        lambda g: False, lambda g: g, grads
    ),
    "out of a vmap": lambda grads: jax.vmap(lambda x: grads)(jnp.ones(2)),
    # What is not used, jax 0.7 does not look at.
    "into a vmap": lambda grads: jax.vmap(lambda g: g.mean())(grads["b"]),
    "out of eval_shape": lambda grads: jax.eval_shape(lambda: grads),
    "into a grad": lambda grads: jax.grad(lambda g: 0.0)(grads),
    "into a checkpoint": lambda grads: jax.checkpoint(lambda g: g.mean())(grads["b"]),
}


@pytest.mark.parametrize("name", CROSSINGS)
def test_env_grad_that_crosses_a_transformation_is_refused(name):
    with refused("env_grads"):
        CROSSINGS[name](eager_grads("env_grads"))


def test_env_grads_that_leave_the_jit_of_their_oracle_are_refused():
    with refused("env_grads"):
        jax.jit(hardvary.env_grads(loss_fn))(make_params(), make_batch())
    with refused("env_grads"):
        jax.vmap(hardvary.env_grads(loss_fn), (None, 0))(
            make_params(), make_batch()[None]
        )


def test_grad_stats_cross_what_env_grads_cannot():
    params, batch = make_params(), make_batch()
    tx = hardvary.and_mask(0.5)
    stats = jax.jit(ORACLES["grad_stats"](loss_fn))(params, batch)
    expected, _ = tx.update(ORACLES["stacked"](loss_fn)(params, batch), tx.init(params))

    @jax.jit
    def run(stats):
        carried, _ = jax.lax.scan(lambda s, _: (s, None), stats, None, length=2)
        chosen = jax.lax.cond(True, lambda: carried, lambda: stats)
        many = jax.vmap(lambda _: chosen)(jnp.ones(2))
        one = jax.tree.map(lambda leaf: leaf[0], many)
        return tx.update(one, tx.init(params), params)[0]

    assert_trees_close(run(stats), expected)


# --------------------------------------------------------------------------------------
# Derivatives of what is made of gradients.


def test_derivative_through_an_answer_is_the_second_derivative():
    params, batch = make_params(), make_batch()

    def size(oracle, params):
        grads = oracle(loss_fn)(params, batch)
        return jnp.sum(jnp.sin(hardvary.norms(grads)))

    stacked, fast = compile_quickly(
        lambda params: [
            jax.grad(functools.partial(size, ORACLES[form]))(params)
            for form in ("stacked", "env_grads")
        ]
    )(params)
    assert_trees_close(fast, stacked)


def test_messages_name_the_class_and_not_its_internals():
    grad = eager_grads("env_grads")["b"]
    assert re.search("EnvGrad.*shape=.*num_envs=4", repr(grad))
    with pytest.raises(TypeError, match=r"^an EnvGrad is not an array and has no \.T:"):
        grad.T  # noqa: B018
    # hasattr and getattr with a default are how others ask for what may not be there.
    assert not hasattr(grad, "sharding")
    assert getattr(grad, "aval", None) is None
