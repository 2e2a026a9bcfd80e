"""What an `EnvGrad` owes whoever asks it; tests/fused hold its answers to models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from tests._asserts import assert_like_params, assert_trees_close
from tests._inputs import SHAPES, STATISTICS, make_params
from tests.fused._answers import ask, check_answers, signed_weights
from tests.zoo import Stacked, compile_quickly, poison
from tests.zoo.blocks import floats
from tests.zoo.compare import FIELDS

NUM_ENVS = 5


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return floats(rng.normal(size=shape))


def make_problem():
    """A product, a lookup, a stack, a scan, tied weights, and one of no use."""
    params = {
        "table": normal(12, 3),
        "hidden": normal(3, 4),
        "bias": normal(4),
        "tied": normal(4, 4),
        "unused": normal(2),
        "scalar": normal(),
    }
    batch = {
        "id": jnp.asarray([0, 3, 3, 11, 7], jnp.int32),
        "y": normal(NUM_ENVS, 4),
    }

    def loss_fn(params, batch):
        x = params["table"][batch["id"]]
        x = jnp.sin(x @ params["hidden"] + params["bias"])
        x = jnp.sin(params["tied"] @ x) @ params["tied"]
        return jnp.mean(jnp.square(params["scalar"] * x - batch["y"]))

    return params, loss_fn, batch


@pytest.fixture(scope="module")
def problem():
    return make_problem()


@pytest.fixture(scope="module")
def expected(problem):
    params, loss_fn, batch = problem
    return Stacked(loss_fn, params, batch)


def test_env_grads_outside_of_a_jit_answer_too():
    params, batch = {"w": normal(3), "b": normal()}, normal(NUM_ENVS, 3)

    def loss_fn(params, x):
        return jnp.square(params["w"] @ x + params["b"])

    expected, signed = Stacked(loss_fn, params, batch), signed_weights(NUM_ENVS)
    losses, grads = hardvary.value_and_env_grads(loss_fn)(params, batch)
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-5)
    check_answers(ask(grads, signed, stack=True), params, expected, signed)


def test_env_grads_are_a_tree_like_params_that_knows_its_shapes(problem):
    params, loss_fn, batch = problem
    grads = hardvary.env_grads(loss_fn)(params, batch)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for grad, param in zip(
        jax.tree.leaves(grads), jax.tree.leaves(params), strict=True
    ):
        assert isinstance(grad, hardvary.EnvGrad)
        assert (grad.shape, grad.dtype, grad.ndim, grad.size) == (
            param.shape,
            param.dtype,
            param.ndim,
            param.size,
        )
        assert grad.num_envs == NUM_ENVS
    # Frozen parameters and the like pass as everywhere in optax.
    labels = jax.tree.map(lambda grad: grad.ndim > 1, grads)
    assert labels["hidden"] is True
    assert labels["bias"] is False


def count(jaxpr, name):
    """Equations of a primitive, inside of others too."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == name
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += count(inner, name)
    return total


def products(ask_for):
    """Matrix products that a model of two layers takes, with an answer."""
    params = {"one": normal(30, 40), "two": normal(40, 20)}

    def loss_fn(params, x):
        return jnp.sum(jnp.sin(jnp.sin(x @ params["one"]) @ params["two"]))

    def run(params, batch):
        losses, grads = hardvary.value_and_env_grads(loss_fn)(params, batch)
        return losses, ask_for(grads)

    # What nobody asks for is traced, and thrown away.
    traced = jax.make_jaxpr(run)(params, normal(NUM_ENVS, 30))
    used, _ = jax.interpreters.partial_eval.dce_jaxpr(
        traced.jaxpr, [True] * len(traced.jaxpr.outvars)
    )
    return count(used, "dot_general")


def test_what_nobody_asks_for_costs_nothing():
    # Forward through two layers; the backward pass stops where nobody asks.
    assert products(lambda grads: None) == 2
    every_mean = products(lambda grads: [g.mean() for g in grads.values()])
    one = products(lambda grads: grads["two"].mean())
    assert one < every_mean
    assert every_mean == 2 + 1 + 2  # forward, back through one, a mean of each


def test_what_two_ask_for_is_computed_once():
    def mean(grads):
        return [grads["two"].mean()]

    def often(grads):
        grad = grads["two"]
        return [
            grad.mean(),
            grad.mean(),
            grad.stats(("mean",)).mean,
            hardvary.mask({"two": grad}, 0.0)["two"],
            hardvary.and_mask(0.0).update({"two": grad}, None)[0]["two"],
        ]

    signs = products(lambda grads: [grads["two"].stats(("mean", "sign")).sign_sum])
    assert products(often) <= signs + products(mean) - products(lambda _: None)

    def gramians(times):
        def ask_for(grads):
            return [
                found
                for _ in range(times)
                for found in (
                    hardvary.gramian(grads),
                    hardvary.norms(grads),
                    grads["one"].gramian(),
                )
            ]

        return ask_for

    assert products(gramians(3)) == products(gramians(1))

    def combined(times, weights):
        def ask_for(grads):
            return [hardvary.combine(grads, weights) for _ in range(times)]

        return ask_for

    weights = jnp.arange(1.0, 6.0)
    once = products(combined(1, weights))
    assert products(combined(3, weights)) == once
    assert products(combined(1, np.arange(1.0, 6.0))) == once


def test_answers_inside_of_branches_and_loops_are_right(problem, expected):
    # They are of the inner trace and must not be handed out outside.
    params, loss_fn, batch = problem

    @compile_quickly
    def run(params, batch, flag):
        grads = hardvary.env_grads(loss_fn)(params, batch)
        grad = grads["hidden"]
        inside = jax.lax.cond(
            flag,
            lambda: (grad.mean(), grad.gramian()),
            lambda: (grad.mean(), grad.gramian()),
        )
        in_scan = jax.lax.scan(
            lambda total, w: (total + grad.combine(w), grad.norms()),
            jnp.zeros(grad.shape),
            jnp.eye(NUM_ENVS),
        )
        in_vmap = jax.vmap(grad.combine)(jnp.eye(NUM_ENVS))
        outside = grad.mean(), grad.gramian(), grad.stack(), grad.norms()
        return inside, in_scan, in_vmap, outside

    inside, in_scan, in_vmap, outside = run(params, batch, True)
    rows = expected.grads["['hidden']"]
    gramian = expected.gramian()["['hidden']"]
    assert_trees_close(inside, (rows.mean(0), gramian), atol=1e-5)
    total, norms = in_scan
    assert_trees_close(total, rows.sum(0), atol=1e-5)
    assert_trees_close(
        norms, np.stack([np.sqrt(np.diag(gramian))] * NUM_ENVS), atol=1e-5
    )
    assert_trees_close(in_vmap, rows, atol=1e-5)
    assert_trees_close(
        outside, (rows.mean(0), gramian, rows, np.sqrt(np.diag(gramian))), atol=1e-5
    )


def test_an_answer_with_traced_weights_in_a_loop_is_not_the_answer_before(problem):
    params, loss_fn, batch = problem
    rows = hardvary.per_env_grad(loss_fn)(params, batch)["bias"]

    @jax.jit
    def run(params, batch, weights):
        grad = hardvary.env_grads(loss_fn)(params, batch)["bias"]
        # New arrays that may take the place, and the id, of old ones.
        found = [grad.combine(weights * (k + 1)) for k in range(5)]
        numpy = [grad.combine(np.full(NUM_ENVS, k, np.float32)) for k in range(5)]
        return found, numpy

    weights = jnp.arange(NUM_ENVS, dtype=jnp.float32) - 2
    found, numpy = run(params, batch, weights)
    for k in range(5):
        np.testing.assert_allclose(found[k], (k + 1) * (weights @ rows), rtol=1e-4)
        np.testing.assert_allclose(numpy[k], k * rows.sum(0), rtol=1e-4, atol=1e-6)


def test_a_combination_with_weights_that_were_changed_in_place_is_new():
    oracle = hardvary.env_grads(lambda w, x: jnp.sum(w * x))
    grad = oracle(jnp.ones(2), jnp.ones((3, 2)))
    for weights in (np.ones(3, np.float32), [1.0, 1.0, 1.0]):
        assert grad.combine(weights).tolist() == [3.0, 3.0]
        weights[0] = 2.0
        assert grad.combine(weights).tolist() == [4.0, 4.0]


@pytest.mark.parametrize("weights", [[0, 1, 2, 0.5, 0], [1e-30, 0, 3, 1e30, 0]])
def test_an_absent_environment_may_hold_anything(problem, weights):
    params, loss_fn, batch = problem
    weights = np.array(weights, np.float32)
    absent = np.flatnonzero(weights == 0)
    broken = batch
    for env in absent:
        broken = poison(broken, env)
    signed = signed_weights(NUM_ENVS)

    @compile_quickly
    def run(params, batch, weights):
        grads = hardvary.env_grads(loss_fn)(params, batch, env_weights=weights)
        return ask(grads, signed, stack=True)

    there, here = run(params, batch, weights), run(params, broken, weights)
    assert_trees_close(here, there)
    for leaf in jax.tree.leaves(here["stack"]):
        assert not np.any(np.asarray(leaf)[absent])
    for gramian in jax.tree.leaves(here["gramian"]):
        assert not np.any(np.asarray(gramian)[absent])
        assert not np.any(np.asarray(gramian)[:, absent])


def test_a_present_environment_that_is_broken_shows_everywhere(problem):
    params, loss_fn, batch = problem
    broken = poison(batch, 2)
    answers = jax.jit(
        lambda params, batch: ask(
            hardvary.env_grads(loss_fn)(params, batch), jnp.ones(NUM_ENVS)
        )
    )(params, broken)
    for name in ("hidden", "bias", "tied", "scalar"):
        stats = answers["stats"][name]
        for field in FIELDS.values():
            assert np.isnan(getattr(stats, field)).all(), (name, field)
        assert np.isnan(answers["combine"][name]).all()
        assert (
            np.isnan(answers["norms"][name]).tolist()
            == [False] * 2 + [True] + [False] * 2
        )
        is_nan = np.isnan(answers["gramian"][name])
        expected = np.zeros((NUM_ENVS, NUM_ENVS), bool)
        expected[2] = expected[:, 2] = True
        np.testing.assert_array_equal(is_nan, expected)
    # A lookup touches its row alone.
    rows = np.isnan(answers["stats"]["table"].sign_sum).all(1)
    assert np.flatnonzero(rows).tolist() == [3]
    assert np.isfinite(answers["mean"]["unused"]).all()


# Rows that an environment looks up: one, none in common, some more than once, some
# twice in common, one out of range.
ROWS = {
    "one": [[3], [4], [3]],
    "none_in_common": [[0, 1], [4, 5], [2, 3]],
    "repeated": [[2, 2], [2, 4], [5, 5]],
    "out_of_range": [[9], [1], [9]],
}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ROWS)
def test_a_broken_lookup_has_the_gramian_of_stacked_gradients(name, value):
    ids = jnp.array(ROWS[name])
    scales = jnp.ones(ids.shape).at[0, 0].set(value)

    def loss(table, env):
        ids, scales = env
        return jnp.sum(jnp.take(table, ids, axis=0, mode="fill") * scales[:, None])

    table = jnp.arange(21.0).reshape(7, 3)
    (row,) = hardvary.explain(loss, table, (ids, scales)).parameters
    assert row.rule == "lookup"
    assert row.gramian == "matching rows"

    @compile_quickly
    def run(table, batch):
        grads = hardvary.env_grads(loss)(table, batch)
        return grads.gramian(), grads.norms()

    gramian, norms = run(table, (ids, scales))
    rows = compile_quickly(jax.vmap(jax.grad(loss), (None, 0)))(table, (ids, scales))
    rows = np.asarray(rows).reshape(3, -1)
    with np.errstate(invalid="ignore"):  # infinity times 0
        expected = rows @ rows.T
    np.testing.assert_array_equal(np.isfinite(gramian), np.isfinite(expected))
    np.testing.assert_array_equal(np.isfinite(norms), np.isfinite(np.diag(expected)))
    there = np.isfinite(expected)
    np.testing.assert_array_equal(np.asarray(gramian)[there], expected[there])


def test_combine_leaves_out_what_has_weight_zero_even_where_it_is_broken(problem):
    params, loss_fn, batch = problem
    broken = poison(batch, 2)

    @compile_quickly
    def run(params, batch, weights):
        grads = hardvary.env_grads(loss_fn)(params, batch)
        return hardvary.combine(grads, weights)

    weights = jnp.array([1.0, -2.0, 0.0, 0.5, -0.0])
    assert_trees_close(run(params, broken, weights), run(params, batch, weights))


@pytest.mark.parametrize("shape", SHAPES)
def test_env_grads_of_any_tree_are_like_params(shape):
    params = make_params(shape)

    def loss_fn(params, x):
        sums = jax.tree.map(lambda p: jnp.sum(p) * x, params)
        return sum(jax.tree.leaves(sums), jnp.zeros(()))

    @compile_quickly
    def run(params, batch):
        losses, grads = hardvary.value_and_env_grads(loss_fn)(params, batch)
        return losses, ask(grads, jnp.arange(-1.0, 3.0))

    losses, answers = run(params, jnp.arange(4.0))
    assert losses.shape == (4,)
    for name, value in (("mean", 1.5), ("combine", 8.0)):
        assert_like_params(answers[name], params)
        for leaf in jax.tree.leaves(answers[name]):
            assert np.all(np.asarray(leaf) == value)
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(params)]
    for size, gramian in zip(sizes, jax.tree.leaves(answers["gramian"]), strict=True):
        np.testing.assert_allclose(gramian, size * np.outer(np.arange(4), np.arange(4)))


def test_env_grads_with_argnums_aux_and_no_env_axis_of_aux(problem):
    params, loss_fn, batch = problem

    def loss(batch, hidden, rest):
        value = loss_fn({**rest, "hidden": hidden}, batch)
        return value, {"value": value, "three": 3}

    rest = {k: v for k, v in params.items() if k != "hidden"}
    oracle = hardvary.value_and_env_grads(loss, argnums=(1, 2), has_aux=True)
    plain = hardvary.env_grads(loss, argnums=1, has_aux=True, in_axes={2: None})

    @compile_quickly
    def run(batch, hidden, rest):
        (losses, aux), (first, second) = oracle(batch, hidden, rest)
        alone, _ = plain(batch, hidden, rest)
        return losses, aux, first.mean(), second["bias"].mean(), alone.mean()

    losses, aux, first, second, alone = run(batch, params["hidden"], rest)
    assert_trees_close(aux, {"value": losses, "three": np.full(NUM_ENVS, 3)})
    expected = jax.jit(hardvary.per_env_grad(loss_fn))(params, batch)
    assert_trees_close(first, expected["hidden"].mean(0))
    assert_trees_close(alone, expected["hidden"].mean(0))
    assert_trees_close(second, expected["bias"].mean(0))


def test_env_grads_under_vmap_over_seeds_equal_one_by_one(problem):
    params, loss_fn, batch = problem
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), params)
    signed = signed_weights(NUM_ENVS)

    def answers(params):
        grads = hardvary.env_grads(loss_fn)(params, batch)
        return ask(grads, signed, stack=True)

    @compile_quickly
    def run(many):
        together = jax.vmap(answers)(many)
        return together, answers(jax.tree.map(lambda leaf: leaf[1], many))

    together, alone = run(many)
    second = jax.tree.map(lambda leaf: leaf[1], together)
    assert_trees_close(second, alone, rtol=1e-4, atol=1e-5)


def test_env_grads_inside_a_scan_train_a_model(problem):
    params, loss_fn, batch = problem
    tx = optax.chain(hardvary.and_mask(0.2), optax.sgd(0.05))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            losses, grads = hardvary.value_and_env_grads(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), losses.mean()

        return jax.lax.scan(step, (params, tx.init(params)), None, length=20)[1]

    losses = train(params)
    assert losses[-1] < losses[0]


def test_second_derivatives_through_answers_are_those_of_the_stack(problem):
    params, loss_fn, batch = problem

    def score(grads_of, params):
        # Of the kind that penalises disagreement.
        gramian = hardvary.gramian(grads_of(params, batch))
        return jnp.sum(jnp.sin(gramian))

    @compile_quickly
    def run(params):
        return [
            jax.grad(lambda p, g=grads_of: score(g(loss_fn), p))(params)
            for grads_of in (hardvary.env_grads, hardvary.per_env_grad)
        ]

    fast, stacked = run(params)
    assert_trees_close(fast, stacked, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: g.stats("mean"), TypeError, "names must be a sequence of names"),
        (lambda g: g.stats(()), ValueError, "names must name at least one"),
        (lambda g: g.stats(("median",)), ValueError, "names must be drawn from"),
        (
            lambda g: g.combine(np.ones(3)),
            ValueError,
            r"weights must have shape \(5,\)",
        ),
        (
            lambda g: g.combine(1.0),
            ValueError,
            r"one for each environment, got shape \(\)",
        ),
        (lambda g: g.combine(np.ones(5) * 1j), TypeError, "weights must be real"),
    ],
)
def test_bad_questions_are_refused(problem, call, error, message):
    params, loss_fn, batch = problem
    with pytest.raises(error, match=message):
        call(hardvary.env_grads(loss_fn)(params, batch)["bias"])


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.ones(3), ValueError, r"env_weights must have shape \(5,\)"),
        (np.array([1.0, -1, 1, 1, 1]), ValueError, "finite and non-negative"),
        (np.array([1.0, np.inf, 1, 1, 1]), ValueError, "finite and non-negative"),
        (np.zeros(5), ValueError, "mark every environment absent"),
        (np.ones(5) * 1j, TypeError, "env_weights must be real"),
    ],
)
def test_env_grads_with_bad_weights_are_refused(problem, weights, error, message):
    params, loss_fn, batch = problem
    with pytest.raises(error, match=f"value_and_env_grads: .*{message}"):
        hardvary.env_grads(loss_fn)(params, batch, env_weights=weights)


def test_weights_of_every_real_type_weigh(problem):
    params, loss_fn, batch = problem
    weights = [1, 0, 2, 1, 3]

    @compile_quickly
    def run(params, batch, given):
        return [
            hardvary.env_grads(loss_fn)(params, batch, env_weights=w)["bias"].stats(
                STATISTICS
            )
            for w in given
        ]

    given = [
        np.array(weights, dtype)
        for dtype in (np.float32, np.int8, np.int32, np.uint8, np.float16)
    ]
    expected, *rest = run(params, batch, [*given, jnp.asarray(weights, jnp.bfloat16)])
    assert float(expected.num_envs) == 7
    for stats in rest:
        assert_trees_close(stats, expected)
