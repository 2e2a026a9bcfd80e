"""Inconsistency on grids."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st

from hardvary import consistency
from hardvary.consistency import grid_inconsistency
from tests.consistency._matrices import draw
from tests.test_errors import raises

EPSILON = 0.01

grid_of = jax.jit(grid_inconsistency)


@given(st.integers(0, 10_000))
def test_neighbourhoods_are_connected_components_by_scipy(seed):
    rng = np.random.default_rng(seed)
    losses = rng.uniform(size=(2, 12, 15))
    start = (int(rng.integers(12)), int(rng.integers(15)))
    found = grid_of(losses, start, 0.45)
    for env in range(2):
        inside = np.abs(losses[env] - losses[env][start]) <= 0.45
        labels, _ = scipy.ndimage.label(inside)
        expected = labels == labels[start]
        np.testing.assert_array_equal(found.neighbourhoods[env], expected)
        border = np.concatenate(
            [expected[[0, -1]].ravel(), expected[:, [0, -1]].ravel()]
        )
        assert found.touches_edge[env] == border.any()
    changes = np.where(
        found.neighbourhoods[:, None],
        np.abs(losses[None] - losses[:, *start][:, None, None, None]),
        -np.inf,
    )
    np.testing.assert_array_equal(found.pair_scores, changes.max((2, 3)))
    assert found.score == changes.max()
    assert changes[(*found.pair, *found.location)] == found.score


def test_a_winding_corridor_is_followed_to_its_end():
    size = 41
    walls = np.ones((size, size))
    walls[::2] = 0
    walls[1::4, -1] = 0
    walls[3::4, 0] = 0
    found = grid_of(
        np.stack([walls, np.arange(size)[:, None] * np.ones(size)]), (0, 0), 0.5
    )
    np.testing.assert_array_equal(found.neighbourhoods[0], walls == 0)
    assert found.pair_scores[0, 1] == size - 1


def test_score_on_a_fine_grid_approaches_that_of_the_hessians():
    hessians = draw(0, 2, 3, condition=20)
    exact = consistency.quadratic_inconsistency(hessians, EPSILON)
    axis = np.linspace(-1, 1, 801) * 0.15
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    losses = 0.5 * np.einsum("xyi,eij,xyj->exy", points, hessians, points)
    found = grid_of(losses, (400, 400), EPSILON)
    assert not found.touches_edge.any()
    assert 0.98 * exact < found.score <= exact * (1 + 1e-9)


def test_another_valley_does_not_belong_to_the_neighbourhood():
    x = np.linspace(-2, 2, 401)
    wells = (x**2 - 1) ** 2
    slope = 10 * (1 + x)
    start = int(np.argmin(np.abs(x - 1)))
    losses = np.stack([wells, slope])
    found = grid_of(losses, start, 0.5)
    assert (x[found.neighbourhoods[0]] > 0).all()
    assert found.pair_scores[0, 1] < 10 * (1 + 1.5)
    # With a higher epsilon the barrier between them is passable.
    assert (
        x[grid_of(np.stack([wells, slope]), start, 1.5).neighbourhoods[0]] < 0
    ).any()


def test_a_line_is_a_grid_of_one_dimension():
    losses = np.array([[3.0, 0.0, 0.0, 0.0, 3.0], [0.0, 1.0, 0.0, 2.0, 9.0]])
    found = grid_inconsistency(losses, 2, 0.5)
    assert (found.score, *found.pair.tolist(), *found.location) == (2.0, 0, 1, 3)
    assert found.touches_edge.tolist() == [False, False]


def test_reference_is_the_loss_of_the_environment_that_stays():
    losses = np.array([[0.0, 0.0], [5.0, 5.0]])
    assert grid_inconsistency(losses, (0,), 0.1).score == 5.0


def test_infinite_and_nan_losses_are_walls_of_their_own_neighbourhood():
    wall = np.zeros(5)
    for value in (np.nan, np.inf):
        wall[1] = value
        found = grid_inconsistency(np.stack([wall, np.arange(5.0)]), 2, 0.1)
        assert found.neighbourhoods[0].tolist() == [False, False, True, True, True]


def test_nan_in_reach_is_not_hidden_by_a_score():
    nan_there = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, np.nan]])
    assert np.isnan(grid_inconsistency(nan_there, 0, 0.1).score)
    assert np.isnan(grid_inconsistency(nan_there, 2, 0.1).score)
    out_of_reach = np.array([[0.0, 9.0, 0.0], [0.0, 0.0, np.nan]])
    assert grid_inconsistency(out_of_reach, 0, 0.1).pair_scores[0, 1] == 0.0


def test_score_of_a_grid_in_float16_is_float32():
    losses = jnp.asarray([[0.0, 0.0], [0.0, 1.0]], "float16")
    found = grid_inconsistency(losses, 0, 0.5)
    assert found.score.dtype == "float32"
    assert found.score == 1.0


def test_wrong_grids_are_refused():
    good = np.zeros((2, 3, 4))
    with raises(ValueError, "losses must have shape [env, *grid]", "(3,)"):
        grid_inconsistency(np.zeros(3), 0, 0.1)
    with raises(TypeError, "losses must be real floating", "int"):
        grid_inconsistency(np.zeros((2, 3), int), 0, 0.1)
    with raises(TypeError, "start must be made of integers", "0.5"):
        grid_inconsistency(good, (0, 0.5), 0.1)
    for start in (0, (0, 4), (-1, 0), (0, 0, 0)):
        with raises(ValueError, "start must be the index of a point", "(3, 4)"):
            grid_inconsistency(good, start, 0.1)
    with raises(ValueError, "epsilon must be > 0, got 0.0"):
        grid_inconsistency(good, (0, 0), 0.0)
