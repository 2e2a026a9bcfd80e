"""Inconsistency on a grid of losses, by flood fill.

The neighbourhood of a minimum, for one environment, is the path-connected set around it
on which that environment's loss changes by no more than epsilon (section 2 of the
paper).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardvary import _validate


class GridInconsistency(NamedTuple):
    """What `grid_inconsistency` found on a grid.

    Attributes:
      score: scalar, the inconsistency score of the starting point on this grid.
      pair_scores: `[env, env]`; row `e`, column `e'`: the largest change of environment
        `e'` in the neighbourhood of `e`.
      pair: int32 `[2]`, the `(e, e')` of the score.
      location: int32 `[grid dimensions]`, where on the grid it is reached.
      neighbourhoods: boolean `[env, *grid]`.
      touches_edge: boolean `[env]`: this neighbourhood reaches the border, so the score
        may be larger on a wider grid.
    """

    score: jax.Array
    pair_scores: jax.Array
    pair: jax.Array
    location: jax.Array
    neighbourhoods: jax.Array
    touches_edge: jax.Array


def grid_inconsistency(
    losses: Any, start: Sequence[int] | int, epsilon: Any
) -> GridInconsistency:
    r"""Inconsistency score of a point, on a grid of the losses around it.

    .. math::

      I_\epsilon(\theta^*) = \max_{e, e'} \max_{\theta \in N(e, \theta^*, \epsilon)}
          |L_{e'}(\theta) - L_e(\theta^*)|

    with the largest path-connected neighbourhood :math:`N(e, \theta^*, \epsilon)` on
    which :math:`|L_e(\theta) - L_e(\theta^*)| \le \epsilon`, found by flood fill: a
    path goes from a grid point to the next one along an axis. It is exact for the grid.
    For all parameters of a network, see `inconsistency`.

    Args:
      losses: floating `[env, *grid]`, the loss of every environment at every point of a
        grid of one or more dimensions, most often of a line or plane in the space of
        parameters.
      start: index of :math:`\theta^*` on the grid, an integer per dimension; may be
        traced.
      epsilon: :math:`\epsilon` > 0, in units of the loss; may be traced.

    Returns:
      A `GridInconsistency`.

    Raises:
      TypeError: losses that are not real floating, an epsilon that is no real scalar, a
        start that is not made of integers.
      ValueError: losses without a grid or an environment, a start with another number
        of dimensions; (concrete values only) a start outside of the grid, an epsilon
        that is not positive.

    Edge cases:
      ======================================  ======================================
      a valley narrower than the grid         is not seen: refine it
      NaN or infinity in one's own loss       a wall
      NaN in another environment's            NaN, where the neighbourhood holds it
      NaN at the start                        NaN
      ======================================  ======================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> x = jnp.linspace(-2.0, 2.0, 101)
      >>> losses = jnp.stack([0.5 * x**2, 2.0 * x**2])  # curvatures 1 and 4
      >>> found = hardvary.consistency.grid_inconsistency(losses, 50, 0.1)
      >>> round(float(found.score), 2), found.pair.tolist()  # exactly: 4 epsilon
      (0.39, [0, 1])

    References:
      Parascandolo et al., ICLR 2021, section 2, equation (1).
    """
    losses = jnp.asarray(losses)
    _validate.real_floating(losses, "grid_inconsistency: losses")
    if losses.ndim < 2 or losses.size == 0:
        raise ValueError(
            "grid_inconsistency: losses must have shape [env, *grid] with a grid of at "
            f"least one dimension, got shape {losses.shape}"
        )
    _validate.at_least("epsilon", epsilon, 0.0, strict=True)
    grid = losses.shape[1:]
    index = _grid_index(start, grid)
    # Compiled as a whole: one by one, its operations take seconds to compile.
    return _on_grid(losses, index, epsilon)


@jax.jit
def _on_grid(
    losses: jax.Array, index: Sequence[Any], epsilon: Any
) -> GridInconsistency:
    """`grid_inconsistency` of valid arguments."""
    grid = losses.shape[1:]
    wide = losses.astype(_validate.wide(losses.dtype))
    at_start = wide[(slice(None), *index)]
    own = at_start[(slice(None), *[None] * len(grid))]
    inside = jnp.abs(wide - own) <= jnp.asarray(epsilon, wide.dtype)
    seed = jnp.zeros(grid, bool).at[index].set(True)
    neighbourhoods = jax.vmap(lambda allowed: _flood(seed, allowed))(inside)

    def changes(neighbourhood: jax.Array, reference: jax.Array) -> jax.Array:
        return jnp.where(neighbourhood, jnp.abs(wide - reference), -jnp.inf)

    every = jax.vmap(changes)(neighbourhoods, at_start)
    # The starting point belongs to every neighbourhood, also where its loss is NaN.
    every = jnp.where(jnp.isnan(own)[:, None], jnp.nan, every)
    num_envs = len(losses)
    pair_scores = every.reshape(num_envs, num_envs, -1).max(-1)
    *pair, where = jnp.unravel_index(
        jnp.argmax(every), (num_envs, num_envs, math.prod(grid))
    )
    edges = [
        jnp.take(neighbourhoods, side, axis=axis + 1).reshape(num_envs, -1).any(-1)
        for axis in range(len(grid))
        for side in (0, grid[axis] - 1)
    ]
    return GridInconsistency(
        score=jnp.max(pair_scores),
        pair_scores=pair_scores,
        pair=jnp.stack(pair).astype(jnp.int32),
        location=jnp.stack(jnp.unravel_index(where, grid)).astype(jnp.int32),
        neighbourhoods=neighbourhoods,
        touches_edge=jnp.stack(edges).any(0),
    )


def _grid_index(start: Any, grid: tuple[int, ...]) -> tuple[Any, ...]:
    sequence = isinstance(start, Sequence) or getattr(start, "ndim", 0) > 0
    entries = list(start) if sequence else [start]
    if not all(jnp.issubdtype(jnp.result_type(i), jnp.integer) for i in entries):
        raise TypeError(
            f"grid_inconsistency: start must be made of integers, got {start!r}"
        )
    concrete = not any(isinstance(i, jax.core.Tracer) for i in entries)
    if len(entries) != len(grid) or (
        concrete
        and not all(0 <= i < size for i, size in zip(entries, grid, strict=True))
    ):
        raise ValueError(
            "grid_inconsistency: start must be the index of a point of the grid of "
            f"shape {grid}, got {tuple(entries)}"
        )
    return tuple(entries)


def _flood(seed: jax.Array, allowed: jax.Array) -> jax.Array:
    """The points that a path within `allowed` connects with `seed`, and `seed`."""

    def spread(reached: jax.Array) -> jax.Array:
        # Whole runs along an axis at once: as many rounds as a path has corners.
        for axis in range(allowed.ndim):
            for reverse in (False, True):
                reached = _along(reached, allowed, axis, reverse)
        return reached

    def grows(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        before, after = state
        return jnp.any(before != after)

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state[1], spread(state[1])

    return jax.lax.while_loop(grows, body, (seed, spread(seed)))[1]


def _along(
    reached: jax.Array, allowed: jax.Array, axis: int, reverse: bool
) -> jax.Array:
    """`reached`, carried on through allowed points along one direction."""

    def compose(first: Any, second: Any) -> Any:
        # Of x -> start | (through & x), the recurrence along the axis.
        start, through = first
        next_start, next_through = second
        return next_start | (next_through & start), next_through & through

    return jax.lax.associative_scan(
        compose, (reached, allowed), axis=axis, reverse=reverse
    )[0]
