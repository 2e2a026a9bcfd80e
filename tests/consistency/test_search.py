"""Inconsistency of networks, by search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardvary import consistency
from hardvary.consistency import inconsistency
from tests._asserts import assert_trees_close
from tests._compat import enable_x64
from tests.consistency._matrices import draw
from tests.test_errors import raises

EPSILON = 0.01


def quadratic(params, hessian):
    return 0.5 * params @ hessian @ params


@functools.cache
def search(size, **options):
    def run(hessians, key):
        return inconsistency(
            quadratic, jnp.zeros(size), hessians, EPSILON, key=key, **options
        )

    return jax.jit(run)


@pytest.mark.optimized
@pytest.mark.parametrize("condition", [10.0, 1e3, 1e5])
@pytest.mark.parametrize(("size", "number"), [(2, 3), (6, 3), (20, 2)])
def test_score_found_for_quadratics_is_at_most_and_nearly_the_exact_one(
    size, number, condition
):
    for seed in range(5):
        hessians = draw(seed, size, number, condition)
        exact = consistency.quadratic_inconsistency(hessians, EPSILON)
        found = search(size)(hessians, jax.random.key(seed))
        assert 0.9 * exact <= found.score <= exact * (1 + 1e-9)
        assert found.score == found.pair_scores.max()
        e, other = found.pair
        end = quadratic(found.params, hessians[other])
        np.testing.assert_allclose(end, found.score, rtol=1e-9)
        assert_certified(quadratic, found, hessians[e], EPSILON)


@functools.partial(jax.jit, static_argnums=(0, 1))
def largest_deviation(loss_fn, num_points, path, env):
    """Between the corners of a path, from the loss at its start."""
    base = loss_fn(jax.tree.map(lambda leaf: leaf[0], path), env)
    shares = jnp.linspace(0, 1, num_points)

    def deviations(corner, following):
        def at(share):
            between = jax.tree.map(lambda a, b: a + share * (b - a), corner, following)
            return jnp.abs(loss_fn(between, env) - base)

        return jax.vmap(at)(shares)

    corners = jax.tree.map(lambda leaf: leaf[:-1], path)
    followings = jax.tree.map(lambda leaf: leaf[1:], path)
    return jax.vmap(deviations)(corners, followings).max()


def assert_certified(loss_fn, found, env, epsilon, num_points=2000):
    """The path starts at the minimum, ends at what was found, and stays inside."""
    end = jax.tree.map(lambda leaf: leaf[-1], found.path)
    assert_trees_close(end, found.params, rtol=0, atol=0)
    largest = largest_deviation(loss_fn, num_points, found.path, env)
    assert found.max_deviation <= epsilon
    # Between the points of the certificate there may be a little more.
    assert largest <= epsilon + found.max_jump
    assert found.max_jump < epsilon


def staircase(params, x):
    """The patchwork of appendix A.1 on one environment's inputs."""
    step = jax.nn.sigmoid
    a, b, c, d, e, f = params
    output = e * step(a * x + b) + f * step(c * x + d)
    target = jnp.interp(x, jnp.array([0.4, 0.5, 0.7, 0.8]), jnp.array([0.0, 1, 1, 2]))
    return jnp.mean((output - target) ** 2)


@pytest.mark.optimized
def test_sigmoid_patchwork_is_as_inconsistent_as_its_last_weight_shows():
    envs = jnp.stack([jnp.linspace(0, 0.5, 101), jnp.linspace(0.5, 1, 101)])
    minimum = jnp.array([100.0, -45.0, 100.0, -75.0, 1.0, 1.0])
    moved = minimum.at[5].set(-0.5)
    base, after = staircase(minimum, envs[0]), staircase(moved, envs[0])
    assert abs(after - base) < 1e-10
    shown = abs(staircase(moved, envs[1]) - base)
    assert shown > 1
    find = jax.jit(
        lambda key: inconsistency(
            staircase, minimum, envs, 1e-3, key=key, max_distance=1.5
        )
    )
    for seed in range(3):
        found = find(jax.random.key(seed))
        assert found.score >= shown
        assert found.pair.tolist() == [0, 1]
        distance = np.linalg.norm(np.asarray(found.params - minimum))
        assert distance <= 1.5 * (1 + 1e-9)
        assert_certified(staircase, found, envs[0], 1e-3)


def test_a_barrier_stops_the_search():
    def loss_fn(x, env):
        wells, slope = (x**2 - 1) ** 2, 10 * (1 + x)
        return jnp.where(env == 0, wells, slope)

    def find(epsilon):
        run = jax.jit(
            lambda key: inconsistency(
                loss_fn,
                jnp.asarray(1.0),
                jnp.arange(2),
                epsilon,
                key=key,
                pairs=[(0, 1)],
            )
        )
        return run(jax.random.key(0))

    # Downhill is to the left, behind the barrier; the edge to the right counts.
    closed, open_ = find(0.5), find(1.5)
    edge = np.sqrt(1 + np.sqrt(0.5))
    np.testing.assert_allclose(closed.score, 10 * (1 + edge), rtol=1e-3)
    assert (closed.path > 0).all()
    assert open_.score >= closed.score


def test_search_descends_where_the_other_loss_is_below_already():
    def loss_fn(x, env):
        return jnp.where(env == 0, 0.5 * jnp.sum(x**2), -1 - x[0])

    found = jax.jit(
        lambda key: inconsistency(
            loss_fn, jnp.zeros(2), jnp.arange(2), 0.5, key=key, pairs=[(0, 1)]
        )
    )(jax.random.key(0))
    np.testing.assert_allclose(found.score, 2.0, rtol=1e-3)
    np.testing.assert_allclose(found.params, [1.0, 0.0], atol=0.05)


def test_score_is_at_least_the_difference_at_the_start():
    flat = jnp.array([[0.0], [3.0]])
    found = inconsistency(
        lambda params, env: env[0] + 0 * params.sum(),
        jnp.zeros(2),
        flat,
        EPSILON,
        key=jax.random.key(0),
        num_steps=1,
    )
    assert found.score == 3.0
    np.testing.assert_array_equal(found.params, 0)
    assert found.max_deviation == 0


def test_searches_side_by_side_equal_one_after_the_other():
    hessians = draw(0, 4, 3)
    one = search(4, num_steps=6)(hessians, jax.random.key(0))
    many = search(4, num_steps=6, batch_size=5)(hessians, jax.random.key(0))
    assert_trees_close(many.pair_scores, one.pair_scores, rtol=1e-6)
    np.testing.assert_array_equal(one.pair, many.pair)


def test_pairs_are_those_asked_for():
    hessians = draw(0, 3, 4)
    every = search(3, num_steps=4)(hessians, jax.random.key(0))
    assert every.pairs.tolist() == [
        [e, other] for e in range(4) for other in range(4) if e != other
    ]
    chosen = search(3, num_steps=4, pairs=((2, 1), (0, 3)))(hessians, jax.random.key(0))
    assert chosen.pairs.tolist() == [[2, 1], [0, 3]]
    assert chosen.pair_scores.shape == (2,)
    assert chosen.pair.tolist() in chosen.pairs.tolist()


def test_search_of_a_network_in_float32_is_certified():
    key = jax.random.key(0)
    with enable_x64(False):
        params = {
            "w": 0.5 * jax.random.normal(key, (3, 4)),
            "v": jnp.ones(4, "bfloat16"),
        }
        envs = jax.random.normal(jax.random.key(1), (2, 8, 3))

        def loss_fn(params, x):
            hidden = jnp.tanh(x @ params["w"])
            return jnp.mean((hidden @ params["v"].astype("float32") - x[:, 0]) ** 2)

        found = jax.jit(
            lambda key: inconsistency(loss_fn, params, envs, 0.05, key=key, num_steps=8)
        )(key)
        assert jax.tree.map(jnp.result_type, found.params) == jax.tree.map(
            jnp.result_type, params
        )
        assert found.score.dtype == "float32"
        assert found.max_deviation <= 0.05
        assert_trees_close(
            jnp.abs(
                loss_fn(found.params, envs[found.pair[1]])
                - loss_fn(params, envs[found.pair[0]])
            ),
            found.score,
            rtol=1e-4,
        )


def test_nan_at_the_start_gives_a_score_of_nan():
    found = search(2, num_steps=2)(jnp.full((2, 2, 2), jnp.nan), jax.random.key(0))
    assert np.isnan(found.score)


def test_nan_losses_are_walls_and_never_changes():
    def loss_fn(x, env):
        own = jnp.where(x > 0.5, jnp.nan, 0.0)
        other = jnp.where(x < -0.5, jnp.nan, jnp.abs(x))
        return jnp.where(env == 0, own, other)

    found = jax.jit(
        lambda key: inconsistency(
            loss_fn, jnp.asarray(0.0), jnp.arange(2), 1.0, key=key, pairs=[(0, 1)]
        )
    )(jax.random.key(0))
    assert np.isfinite(found.score)
    np.testing.assert_allclose(found.score, 0.5, rtol=0.05)


def call(**changes):
    arguments = {
        "loss_fn": quadratic,
        "params": jnp.zeros(2),
        "batch": draw(0, 2, 3),
        "epsilon": 0.1,
        "key": jax.random.key(0),
    }
    return inconsistency(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"params": jnp.zeros(2, int)}, TypeError, ("params must be real",)),
        ({"params": {}}, ValueError, ("no parameters",)),
        ({"batch": jnp.zeros((1, 2, 2))}, ValueError, ("at least two", "got 1")),
        (
            {"batch": (jnp.zeros((2, 2)), jnp.zeros(3))},
            ValueError,
            ("agree on the number of environments",),
        ),
        ({"epsilon": 0.0}, ValueError, ("epsilon must be > 0",)),
        ({"max_distance": 0.0}, ValueError, ("max_distance must be > 0",)),
        ({"max_distance": np.inf}, ValueError, ("max_distance must be finite",)),
        ({"damping": -1.0}, ValueError, ("damping must be finite and >= 0",)),
        ({"num_starts": 0}, ValueError, ("num_starts must be >= 1, got 0",)),
        ({"num_steps": 0}, ValueError, ("num_steps must be >= 1, got 0",)),
        ({"cg_steps": 0}, ValueError, ("cg_steps must be >= 1, got 0",)),
        ({"num_samples": 0}, ValueError, ("num_samples must be >= 1, got 0",)),
        ({"batch_size": 0}, ValueError, ("batch_size must be >= 1, got 0",)),
        ({"pairs": [(0, 3)]}, ValueError, ("integers in [0, 3)", "[[0, 3]]")),
        ({"pairs": [0, 1]}, ValueError, ("shape [pair, 2]", "(2,)")),
        (
            {"loss_fn": lambda p, h: p},
            TypeError,
            ("must return a real floating scalar (average over", "of shape ("),
        ),
        ({"loss_fn": lambda p, h: (p[0],)}, TypeError, ("scalar", "got a tuple")),
        (
            {"loss_fn": lambda p, h: jnp.sum(p > 0)},
            TypeError,
            ("floating scalar", "int"),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_of_a_search_are_refused(changes, error, parts):
    with raises(error, *parts):
        call(**changes)
