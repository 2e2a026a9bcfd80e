"""The rules on inner products, beside TorchJD's and what their papers promise."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import hardvary
from hardvary.aggregators import quadratic
from tests._asserts import assert_trees_close
from tests._compat import enable_x64
from tests.zoo.blocks import floats

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "torchjd.npz")
RULES = {
    "upgrad": hardvary.upgrad,
    "dualproj": hardvary.dualproj,
    "mgda": hardvary.mgda,
    "cagrad": functools.partial(hardvary.cagrad, 0.5),
    "nash_mtl": hardvary.nash_mtl,
    "fairgrad": functools.partial(hardvary.fairgrad, 2.0),
    "imtl_g": hardvary.imtl_g,
    "aligned_mtl": hardvary.aligned_mtl,
    "config": hardvary.config,
    "pcgrad": functools.partial(hardvary.pcgrad, 0),
    "clip_env_norms": functools.partial(hardvary.clip_env_norms, 1.0),
}
# Whose update is as large as the gradients, whatever their scale.
HOMOGENEOUS = [
    *("upgrad", "dualproj", "mgda", "cagrad", "imtl_g", "aligned_mtl", "config"),
    "pcgrad",
]
# Whose update to first order makes no loss rise.
CONFLICT_FREE = ["upgrad", "dualproj", "mgda", "nash_mtl", "fairgrad"]
# In which no lot and no order decides.
SYMMETRIC = [name for name in RULES if name != "pcgrad"]
# Of the gradients in most tests: another shape is another compilation for every rule.
SHAPE = (4, 10)
every_rule = pytest.mark.parametrize("name", RULES)


@functools.cache
def jitted(name):
    tx = RULES[name]()

    @jax.jit
    def run(grads, env_weights=None):
        return tx.update(grads, tx.init(None), env_weights=env_weights)[0]

    return run


@functools.cache
def tuned(make):
    """`(value, grads) -> update` of a rule, compiled once for every value."""

    @jax.jit
    def run(value, grads):
        tx = make(value)
        return tx.update(grads, tx.init(None))[0]

    return run


def draw(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return floats(rng.normal(size=shape))


@pytest.mark.parametrize("rule", sorted({key.split(":")[0] for key in GOLDEN.files}))
def test_rule_gives_what_torchjd_gives(rule):
    if rule == "matrix":
        assert sum(key.startswith("matrix:") for key in GOLDEN.files) == 33
        return
    names = [k.split(":")[1] for k in GOLDEN.files if k.startswith(f"{rule}:")]
    assert names
    with enable_x64(True):
        run = jitted(rule)
        for name in names:
            matrix, expected = GOLDEN[f"matrix:{name}"], GOLDEN[f"{rule}:{name}"]
            actual = np.asarray(run(jnp.asarray(matrix)))
            largest = np.abs(expected).max()
            # An update of nothing but rounding is to be as small.
            allowed = 1e-4 * max(largest, 1e-3 * np.abs(matrix).max())
            np.testing.assert_allclose(actual, expected, atol=allowed, err_msg=name)


def shortest(matrix):
    """The shortest vector of the convex hull of rows, by another program."""
    count = len(matrix)
    # A row of large ones asks for weights with the sum 1.
    weight = 1e4 * np.abs(matrix).max()
    system = np.vstack([matrix.T, weight * np.ones(count)])
    target = np.append(np.zeros(matrix.shape[1]), weight)
    weights, _ = optimize.nnls(system, target)
    return weights @ matrix / weights.sum()


@pytest.mark.parametrize("shape", [(2, 3), (5, 2), (6, 40), (16, 30)])
def test_mgda_is_the_shortest_vector_of_the_convex_hull(shape):
    for seed in range(4):
        grads = draw(*shape, seed=seed) + 0.3
        actual = jitted("mgda")(grads)
        expected = shortest(np.asarray(grads, np.float64))
        np.testing.assert_allclose(actual, expected, atol=2e-3)


@pytest.mark.parametrize("shape", [(2, 3), (5, 3), (16, 8), (40, 30)])
def test_upgrad_is_the_mean_of_projections_on_the_cone(shape):
    grads = draw(*shape)
    matrix = np.asarray(grads, np.float64)
    projections = [row + matrix.T @ optimize.nnls(matrix.T, -row)[0] for row in matrix]
    expected = np.mean(projections, axis=0)
    np.testing.assert_allclose(jitted("upgrad")(grads), expected, atol=1e-4)


@pytest.mark.parametrize("c", [0.0, 0.3, 0.9, 2.0])
def test_cagrad_does_most_for_the_worst_in_its_ball(c):
    grads = draw(4, 6) + 0.2
    update = np.asarray(tuned(hardvary.cagrad)(c, grads), np.float64)
    matrix = np.asarray(grads, np.float64)
    mean = matrix.mean(0)
    radius = c * np.linalg.norm(mean)
    assert np.linalg.norm(update - mean) <= radius + 1e-5
    worst = (matrix @ update).min()
    rng = np.random.default_rng(0)
    for scale in (1.0, 0.1, 0.01):
        others = rng.normal(size=(3000, 6)) * scale * max(radius, 1e-9) + update - mean
        lengths = np.linalg.norm(others, axis=1, keepdims=True)
        others = mean + others * np.minimum(1, radius / lengths)
        assert (others @ matrix.T).min(1).max() <= worst + 1e-4


def deficient(kind, seed):
    """More gradients than dimensions: in most, no direction helps all."""
    matrix = np.array(draw(16, 8, seed=seed), np.float64)
    if kind == "a pair opposed":
        matrix[-1] = -matrix[0]
    if kind == "rank 2":
        matrix = matrix[:, :2] @ matrix[:2]
    if kind == "sum of 0":
        matrix[8:] = -matrix[:8]
    return matrix


DEFICIENT = ["half as many dimensions", "a pair opposed", "rank 2"]


@pytest.mark.parametrize("seed", [2, 4])
@pytest.mark.parametrize("kind", DEFICIENT)
def test_cagrad_of_dependent_gradients_stays_in_its_ball_and_is_best(kind, seed):
    matrix = deficient(kind, seed)
    mean, scale = matrix.mean(0), np.square(matrix).max()
    radius = 0.5 * np.linalg.norm(mean)

    def bound(shares):
        # Lagrange's dual: nobody can promise everyone more than any of these.
        combined = shares / shares.sum() @ matrix
        return combined @ mean + radius * np.linalg.norm(combined)

    starts = np.random.default_rng(0).dirichlet(np.ones(16), size=3)
    least = min(
        optimize.minimize(
            bound,
            start,
            method="SLSQP",
            bounds=[(0, 1)] * 16,
            constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1},
            options={"maxiter": 500, "ftol": 1e-15},
        ).fun
        for start in starts
    )
    with enable_x64(True):
        update = np.asarray(jitted("cagrad")(jnp.asarray(matrix)))
    assert np.linalg.norm(update - mean) <= radius * (1 + 1e-9)
    assert (matrix @ update).min() >= least - 1e-8 * scale


def test_cagrad_where_no_direction_helps_all_is_nearest_to_the_mean():
    # Two opposed, and a third across: the best for the worst is to leave the two alone.
    grads = jnp.asarray([[1.0, 0.0], [-1.2, 0.0], [0.0, 2.0]])
    for name in ("cagrad", "dualproj"):
        np.testing.assert_allclose(jitted(name)(grads), [0, 2 / 3], atol=1e-5)


@pytest.mark.parametrize("seed", [2, 4])
@pytest.mark.parametrize("kind", [*DEFICIENT, "sum of 0"])
def test_rules_of_dependent_gradients_equal_least_squares(kind, seed):
    matrix = deficient(kind, seed)
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    with enable_x64(True):
        shortest, of_all, of_mean = (
            np.asarray(jitted(name)(jnp.asarray(matrix)))
            for name in ("mgda", "upgrad", "dualproj")
        )
    gap = shortest @ shortest - (matrix @ shortest).min()
    assert gap <= 1e-12
    projections = [
        row + unit.T @ optimize.nnls(unit.T, -row)[0]
        for row in (*matrix, matrix.mean(0))
    ]
    np.testing.assert_allclose(of_all, np.mean(projections[:-1], axis=0), atol=1e-9)
    np.testing.assert_allclose(of_mean, projections[-1], atol=1e-9)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_fairgrad_of_lengths_far_apart_is_precise_in_every_direction(alpha):
    lengths = 10.0 ** np.arange(-4, 4)
    rotation = np.linalg.qr(np.asarray(draw(8, 8), np.float64))[0]
    with enable_x64(True):
        matrix = jnp.asarray(lengths[:, None] * rotation)
        update = np.asarray(tuned(hardvary.fairgrad)(alpha, matrix))
    # Of orthogonal gradients: w |g|**2 = w ** (-1 / alpha).
    weights = lengths ** (-2 / (1 + 1 / alpha))
    np.testing.assert_allclose(rotation @ update, weights * lengths, rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_fairgrad_and_nash_mtl_solve_their_equations(alpha):
    grads = draw(5, 20)
    update = np.asarray(tuned(hardvary.fairgrad)(alpha, grads), np.float64)
    gains = np.asarray(grads, np.float64) @ update
    weights = np.linalg.lstsq(np.asarray(grads, np.float64).T, update, rcond=None)[0]
    np.testing.assert_allclose(gains * weights ** (1 / alpha), 1, rtol=1e-3)
    if alpha == 1:
        np.testing.assert_allclose(jitted("nash_mtl")(grads), update, rtol=1e-3)


@pytest.mark.parametrize("name", CONFLICT_FREE)
def test_update_conflicts_with_no_environment(name):
    # The last shape has no direction that helps all: what is left is to be nothing.
    for shape in [(2, 4), (5, 9), (16, 40), (7, 3)]:
        for seed in range(3):
            grads = draw(*shape, seed=seed)
            if shape == (7, 3) and name in ("nash_mtl", "fairgrad"):
                continue
            products = np.asarray(grads @ jitted(name)(grads))
            assert products.min() >= -2e-3 * max(1, np.abs(products).max())


@every_rule
def test_permuting_environments_changes_nothing(name):
    grads, order = draw(*SHAPE), np.asarray([2, 0, 3, 1])
    if name == "pcgrad":
        grads = jnp.abs(grads)  # what conflicts is projected in an order drawn by row
    np.testing.assert_allclose(
        jitted(name)(grads[order]), jitted(name)(grads), rtol=2e-3, atol=2e-4
    )


@every_rule
def test_rotating_the_parameters_rotates_the_update(name):
    grads = draw(*SHAPE)
    rotation = np.linalg.qr(np.asarray(draw(10, 10)))[0]
    np.testing.assert_allclose(
        jitted(name)(grads @ rotation),
        jitted(name)(grads) @ rotation,
        rtol=5e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_scaling_the_gradients_scales_the_update(name, scale):
    grads = draw(*SHAPE)
    scaled = jitted(name)(grads * scale) / scale
    np.testing.assert_allclose(scaled, jitted(name)(grads), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_nash_mtl_and_fairgrad_have_the_length_that_they_promise(scale):
    grads = draw(*SHAPE)
    expected = jitted("nash_mtl")(grads)
    np.testing.assert_allclose(jitted("nash_mtl")(grads * scale), expected, rtol=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(expected), 2, rtol=1e-4)
    usual = jitted("fairgrad")(grads)
    factor = scale ** (1 - 2 / 1.5)
    np.testing.assert_allclose(
        jitted("fairgrad")(grads * scale), usual * factor, rtol=2e-3
    )


SPECIAL = {
    "one": [[1.0, -2.0, 3.0]],
    "zero": [[0.0, 0.0], [0.0, 0.0]],
    "one is zero": [[0.0, 0.0], [1.0, 2.0]],
    "identical": [[1.0, 2.0]] * 4,
    "opposed": [[1.0, 2.0], [-1.0, -2.0]],
    "more than dimensions": [[1.0, 0.2], [0.1, 1.0], [1.0, 1.0], [-0.1, 1.0]],
    "sizes apart": [[1e-8, 0.0, 1e-8], [0.0, 1e8, -1e8]],
}


@every_rule
def test_special_gradients_have_finite_updates(name):
    for kind, rows in SPECIAL.items():
        update = jitted(name)(jnp.asarray(rows, jnp.float32))
        assert np.isfinite(update).all(), kind


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "imtl_g"])
def test_identical_gradients_are_their_own_update(name):
    grads = jnp.asarray(SPECIAL["identical"])
    np.testing.assert_allclose(jitted(name)(grads), grads[0], rtol=1e-4)
    np.testing.assert_allclose(jitted(name)(grads[:1]), grads[0], rtol=1e-4)


@every_rule
def test_an_absent_environment_changes_nothing_whatever_it_holds(name):
    grads = draw(5, 10)
    weights = jnp.asarray([1.0, 1.0, 0.0, 1.0, 1.0])
    there = np.asarray([0, 1, 3, 4])
    for value in (0.0, 1e3, np.nan, np.inf):
        actual = jitted(name)(grads.at[2].set(value), weights)
        if name == "pcgrad":  # orders are drawn for another number of environments
            assert np.isfinite(actual).all()
        else:
            expected = jitted(name)(grads[there])
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@every_rule
def test_a_broken_environment_shows(name):
    for value in (np.nan, np.inf):
        assert np.isnan(jitted(name)(draw(*SHAPE).at[1, 2].set(value))).all()


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "cagrad", "aligned_mtl"])
def test_weights_of_environments_are_their_shares_of_the_mean(name):
    # Without a conflict, and orthogonal, so that each share can be read off.
    grads = 2 * jnp.eye(3)
    update = jitted(name)(grads, jnp.asarray([1.0, 2.0, 1.0]))
    if name == "cagrad":
        assert update[1] > update[0]
    else:
        np.testing.assert_allclose(update, [0.5, 1.0, 0.5], rtol=1e-5)


def test_pcgrad_draws_an_order_for_every_row_and_update():
    grads = draw(6, 4)
    tx = hardvary.pcgrad(3)
    state, found = tx.init(None), []
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state)
        found.append(np.asarray(updates))
    assert int(state.mask_count) == 3
    assert not np.allclose(found[0], found[1])
    again, _ = update(grads, tx.init(None))
    np.testing.assert_array_equal(again, found[0])

    def first(seed):
        tx = hardvary.pcgrad(seed)
        return tx.update(grads, tx.init(None))[0]

    seeds = jnp.arange(3)
    many = jax.jit(jax.vmap(first))(seeds)
    np.testing.assert_allclose(many[1], jax.jit(first)(1), rtol=1e-5)
    assert not np.allclose(many[0], many[1])


def test_pcgrad_without_conflicts_is_the_sum_and_with_two_known():
    grads = jnp.abs(draw(5, 7))
    np.testing.assert_allclose(jitted("pcgrad")(grads), grads.sum(0), rtol=1e-5)


def test_grad_vac_begins_as_pcgrad_and_learns_its_goals():
    grads = draw(4, 9)
    tx = hardvary.grad_vac(0, num_envs=4, beta=0.5)
    first, state = jax.jit(tx.update)(grads, tx.init(None))
    np.testing.assert_allclose(first, jitted("pcgrad")(grads), rtol=1e-4, atol=1e-5)
    assert state.memory.shape == (4, 4)
    assert not np.any(np.diag(state.memory))
    # Two gradients that agree at a cosine of 0.6, and then at -0.6: turned to the goal.
    agree = jnp.asarray([[1.0, 0.0], [0.6, 0.8]])
    tx = hardvary.grad_vac(0, num_envs=2, beta=0.5)
    turn = jax.jit(tx.update)
    _, state = turn(agree, tx.init(None))
    np.testing.assert_allclose(state.memory, [[0, 0.3], [0.3, 0]], atol=1e-6)
    part = jnp.asarray([[1.0, 0.0], [-0.6, 0.8]])
    update, state = turn(part, state)
    turned = []
    for one, other in ((part[0], part[1]), (part[1], part[0])):
        share = (0.3 * 0.8 + 0.6 * np.sqrt(1 - 0.09)) / np.sqrt(1 - 0.09)
        turned.append(one + share * other)
        cosine = turned[-1] @ other / np.linalg.norm(turned[-1])
        assert abs(cosine - 0.3) < 1e-6
    np.testing.assert_allclose(update, turned[0] + turned[1], rtol=1e-5)
    with pytest.raises(ValueError, match="num_envs=2, got gradients of 4"):
        tx.update(grads, tx.init(None))


def test_clip_env_norms_is_the_mean_of_shortened_gradients():
    params = {"w": draw(3, 2), "b": draw(2)}
    batch = draw(6, 4, 3)

    def loss(params, x):
        return jnp.sum(jnp.sin(x @ params["w"] + params["b"][None]))

    stacked = hardvary.per_env_grad(loss)(params, batch)
    norms = np.sqrt(
        sum(
            (np.asarray(g) ** 2).reshape(6, -1).sum(1) for g in jax.tree.leaves(stacked)
        )
    )
    bound = float(np.median(norms))
    factors = np.minimum(1, bound / norms) / 6
    expected = jax.tree.map(lambda g: np.tensordot(factors, g, 1), stacked)
    tx = hardvary.clip_env_norms(bound)

    @jax.jit
    def run(params):
        return [
            tx.update(oracle(loss)(params, batch), tx.init(params), params)[0]
            for oracle in (hardvary.per_env_grad, hardvary.env_grads)
        ]

    for update in run(params):
        assert_trees_close(update, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["upgrad", "dualproj", "mgda", "cagrad", "nash_mtl", "fairgrad"]
)
def test_rules_in_shard_map_work_for_models_that_differ_between_devices(name):
    grads = draw(2, 4, 6)
    axis_type = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("model",), axis_types=(axis_type,))
    spec = jax.sharding.PartitionSpec("model")
    tx = RULES[name]()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def run(grads):
        return tx.update(grads[0], tx.init(None))[0][None]

    expected = [jitted(name)(own) for own in grads]
    np.testing.assert_allclose(jax.jit(run)(grads), expected, rtol=1e-4, atol=1e-5)


@every_rule
def test_rules_on_env_grads_equal_those_on_stacked_gradients(name):
    params = {"w": draw(4, 3), "b": draw(3)}
    batch = draw(5, 2, 4)

    def loss(params, x):
        return jnp.sum(jnp.sin(jnp.sin(x @ params["w"] + params["b"][None])))

    tx = RULES[name]()

    @jax.jit
    def run(params):
        return [
            tx.update(oracle(loss)(params, batch), tx.init(params), params)[0]
            for oracle in (hardvary.per_env_grad, hardvary.env_grads)
        ]

    expected, actual = run(params)
    assert_trees_close(actual, expected, rtol=2e-3, atol=1e-4)


def test_grad_stats_hold_no_inner_products():
    stats = hardvary.GradStats(
        mean=jnp.ones(2), sign_sum=jnp.ones(2), num_envs=jnp.float32(2)
    )
    for make in RULES.values():
        with pytest.raises(ValueError, match="a GradStats holds no"):
            make().update(stats, make().init(None))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hardvary.cagrad(-0.1), ValueError, "c must be finite and >= 0"),
        (lambda: hardvary.cagrad(np.nan), ValueError, "c must be finite and >= 0"),
        (lambda: hardvary.cagrad(None), TypeError, "c must be a real scalar"),
        (lambda: hardvary.fairgrad(0.0), ValueError, "alpha must be finite and > 0"),
        (lambda: hardvary.fairgrad(np.inf), ValueError, "alpha must be finite and > 0"),
        (lambda: hardvary.clip_env_norms(0), ValueError, "max_norm must be finite an"),
        (lambda: hardvary.clip_env_norms("1"), TypeError, "max_norm must be a real"),
        (lambda: hardvary.pcgrad(-1), ValueError, "seed must be >= 0, got -1"),
        (lambda: hardvary.pcgrad(0.5), TypeError, "seed must be an integer >= 0 or a"),
        (
            lambda: hardvary.grad_vac(0, num_envs=0),
            ValueError,
            "num_envs must be >= 1, got 0",
        ),
        (
            lambda: hardvary.grad_vac(0, num_envs=2, beta=1.5),
            ValueError,
            r"beta must lie in \[0, 1\]",
        ),
    ],
)
def test_bad_hyperparameters_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_hyperparameters_may_be_schedules_or_traced():
    grads = draw(3, 5)

    traced = tuned(hardvary.cagrad)(0.5, grads)
    np.testing.assert_allclose(traced, jitted("cagrad")(grads), rtol=1e-4)
    tx = hardvary.cagrad(lambda count: 0.5)
    scheduled, _ = jax.jit(tx.update)(grads, tx.init(None))
    np.testing.assert_allclose(scheduled, traced, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_complementary_ends_where_exchanges_go_round_in_circles(dtype):
    # More vectors than dimensions: exchanges alone never end in most of these.
    with enable_x64(dtype == "float64"):
        solve = jax.jit(quadratic.complementary)
        eps = np.finfo(dtype).eps
        for seed in range(6):
            rows = np.asarray(draw(40, 20, seed=seed), np.float64)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            matrix = (rows @ rows.T).astype(dtype)
            found = np.asarray(solve(jnp.asarray(matrix), jnp.asarray(matrix[0])))
            slack = matrix @ found + matrix[0]
            allowed = 100 * eps * max(1, found.max())
            assert slack.min() >= -allowed
            assert np.abs(slack * found).max() <= allowed * max(1, found.max())


def test_solvers_take_a_thousand_environments():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1024, 3000)) + 0.02
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    matrix = jnp.asarray(rows @ rows.T, jnp.float32)
    found = jax.jit(quadratic.complementary)(matrix, -jnp.ones(1024))
    slack = np.asarray(matrix @ found) - 1
    assert slack.min() > -1e-3
    assert np.abs(slack * np.asarray(found)).max() < 1e-3
