"""`pcgrad` and `grad_vac`, beside every update that an order of visits can give."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardvary
from tests._compat import enable_x64

# Every pair conflicts, at cosines of its own.
GRADS = np.array(
    [[1.0, 0.2, 0.0, 0.3], [-0.8, 1.0, 0.1, 0.0], [-0.1, -0.9, 0.7, -0.2]], np.float32
)
GOALS = np.array([[0, 0.3, -0.2], [0.1, 0, 0.6], [0.4, -0.3, 0]], np.float32)
SEEDS = 64


def pcgrad(seed):
    return hardvary.pcgrad(seed)


def grad_vac(seed, num_envs=3):
    return hardvary.grad_vac(seed, num_envs=num_envs, beta=0.25)


def projected(row, others, goals):
    """`row` off each of the others that it conflicts with, in their order."""
    del goals
    for other in others:
        row = row - min(row @ other, 0) / (other @ other) * other
    return row


def vaccinated(row, others, goals):
    """`row` turned to its goal with each of the others, in their order."""
    for other, goal in zip(others, goals, strict=True):
        lengths = np.linalg.norm(row), np.linalg.norm(other)
        cosine = row @ other / lengths[0] / lengths[1]
        if cosine < goal:
            sine = np.sqrt(1 - goal**2)
            turn = goal * np.sqrt(1 - cosine**2) - cosine * sine
            row = row + lengths[0] * turn / (lengths[1] * sine) * other
    return row


def state_of(name):
    state = MAKERS[name](0).init(None)
    return state._replace(memory=jnp.asarray(GOALS)) if name == "grad_vac" else state


MAKERS = {"pcgrad": pcgrad, "grad_vac": grad_vac}
BY_NUMPY = {"pcgrad": projected, "grad_vac": vaccinated}
every_rule = pytest.mark.parametrize("name", MAKERS)


@functools.cache
def of_seeds(name):
    """Updates of three environments, a row for each seed."""
    state = state_of(name)

    def run(seed):
        return MAKERS[name](seed).update(jnp.asarray(GRADS), state)[0]

    return np.asarray(jax.jit(jax.vmap(run))(jnp.arange(SEEDS)))


@every_rule
def test_every_row_has_an_order_of_its_own(name):
    rows, goals = GRADS.astype(np.float64), GOALS.astype(np.float64)
    ways = []
    for e, row in enumerate(rows):
        first, second = (f for f in range(3) if f != e)
        ways.append(
            [
                BY_NUMPY[name](row, rows[list(order)], goals[e, list(order)])
                for order in ((first, second), (second, first))
            ]
        )
    possible = np.array([sum(parts) for parts in itertools.product(*ways)])
    distances = np.abs(of_seeds(name)[:, None] - possible).max(2)
    np.testing.assert_allclose(distances.min(1), 0, atol=1e-5)
    # One order for all rows would give two of the eight.
    assert set(distances.argmin(1)) == set(range(8))


@every_rule
def test_draws_follow_from_the_seed_whatever_its_type(name):
    for seed in (3, np.int64(3), jnp.uint32(3), jax.random.key(3)):
        update, _ = MAKERS[name](seed).update(jnp.asarray(GRADS), state_of(name))
        np.testing.assert_allclose(update, of_seeds(name)[3], rtol=1e-4, atol=1e-6)


@every_rule
def test_an_absent_environment_is_not_visited_whatever_it_holds(name):
    # Of two that are there, no order is drawn.
    state, small = state_of(name), MAKERS[name](0).init(None)
    if name == "grad_vac":
        small = small._replace(memory=jnp.asarray(GOALS[1:, 1:]))
        pair = grad_vac(0, num_envs=2)
    else:
        pair = pcgrad(0)
    expected, after = pair.update(jnp.asarray(GRADS[1:]), small)
    run = jax.jit(MAKERS[name](0).update)
    weights = jnp.asarray([0.0, 1.0, 2.0])
    for value in (0.5, np.nan, np.inf):
        grads = jnp.asarray(GRADS).at[0].set(value)
        update, new = run(grads, state, env_weights=weights)
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6)
        if name == "grad_vac":
            goals = GOALS.copy()
            goals[1:, 1:] = after.memory
            np.testing.assert_allclose(new.memory, goals, atol=1e-6)


def test_pcgrad_of_two_is_known_by_hand():
    # (1, 0) + 1/2 (-1, 1), and (-1, 1) + (1, 0).
    grads = jnp.asarray([[1.0, 0.0], [-1.0, 1.0]])
    for scale in (1e-15, 1.0, 1e15):
        update, _ = pcgrad(0).update(grads * scale, pcgrad(0).init(None))
        np.testing.assert_allclose(update, np.array([0.5, 1.5]) * scale, rtol=1e-6)


@every_rule
def test_one_gradient_alone_is_the_update(name):
    tx = pcgrad(0) if name == "pcgrad" else grad_vac(0, num_envs=1)
    update, _ = tx.update(jnp.asarray(GRADS[:1]), tx.init(None))
    np.testing.assert_allclose(update, GRADS[0], rtol=1e-6)


@every_rule
def test_degenerate_gradients_have_finite_updates(name):
    tx = MAKERS[name](0)

    @jax.jit
    def run(grads):
        state, found = tx.init(None), []
        for _ in range(3):
            update, state = tx.update(grads, state)
            found.append(update)
        return found, state

    for kind, rows in {
        "zero": [[0.0, 0.0]] * 3,
        "one is zero": [[0.0, 0.0], [1.0, 2.0], [-1.0, 1.0]],
        "identical": [[1.0, 2.0]] * 3,
        "opposed": [[1.0, 2.0], [-1.0, -2.0], [1.0, 2.0]],
        "sizes apart": [[1e-8, 1e-8], [-1e8, 1e7], [1.0, -1.0]],
    }.items():
        found, state = run(jnp.asarray(rows, jnp.float32))
        for leaf in jax.tree.leaves((found, state)):
            assert np.isfinite(leaf).all(), kind


def test_grad_vac_keeps_its_goals_where_a_gradient_is_broken():
    tx, state = grad_vac(0), state_of("grad_vac")
    update, new = tx.update(jnp.asarray(GRADS).at[1, 1].set(jnp.nan), state)
    assert np.isnan(update).all()
    np.testing.assert_array_equal(new.memory, GOALS)
    assert int(new.mask_count) == 1


def test_grad_vac_moves_every_goal_by_beta_to_the_cosine_met():
    # No goal is above a cosine: nothing is turned, and all cosines are those of G.
    tx, low = grad_vac(0), jnp.full((3, 3), -1.0) + jnp.eye(3)
    state = tx.init(None)._replace(memory=low)
    update, new = tx.update(jnp.asarray(GRADS), state)
    units = GRADS / np.linalg.norm(GRADS, axis=1, keepdims=True)
    expected = np.where(np.eye(3), 0, 0.75 * low + 0.25 * units @ units.T)
    np.testing.assert_allclose(new.memory, expected, atol=1e-6)
    np.testing.assert_allclose(update, GRADS.sum(0), rtol=1e-5)


def test_grad_vac_takes_float64_and_gradients_of_one_trace():
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(x @ params))

    batch = GRADS[:, None, :]
    for dtype in (np.float32, np.float64):
        with enable_x64(dtype == np.float64):
            params, data = jnp.ones(4, dtype), jnp.asarray(batch, dtype)
            tx = grad_vac(0)

            @jax.jit
            def run(params, data, tx=tx):
                return [
                    tx.update(oracle(loss_fn)(params, data), state_of("grad_vac"))
                    for oracle in (hardvary.per_env_grad, hardvary.env_grads)
                ]

            (expected, _), (actual, state) = run(params, data)
            assert actual.dtype == dtype
            assert state.memory.dtype == np.float32
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("beta", "error", "message"),
    [
        (
            1.5,
            ValueError,
            r"beta must lie in \[0, 1\]: it is the share of a new cosine",
        ),
        (np.nan, ValueError, r"beta must lie in \[0, 1\]: .* got nan"),
        ([0.5], TypeError, "beta must be a real scalar or a schedule"),
    ],
)
def test_grad_vac_of_a_bad_beta_is_refused(beta, error, message):
    with pytest.raises(error, match=message):
        hardvary.grad_vac(0, num_envs=2, beta=beta)


def test_grad_vac_takes_schedules_and_traced_numbers_for_beta():
    def run(beta):
        tx, state = hardvary.grad_vac(0, num_envs=3, beta=beta), state_of("grad_vac")
        return tx.update(jnp.asarray(GRADS), state)[1].memory

    expected = run(0.25)
    np.testing.assert_array_equal(run(lambda count: 0.25), expected)
    np.testing.assert_allclose(jax.jit(run)(0.25), expected, atol=1e-6)
