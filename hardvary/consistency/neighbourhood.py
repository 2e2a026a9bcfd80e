"""How far one environment's loss can move while another's stays: on grids, by search.

The neighbourhood of a minimum, for one environment, is the path-connected set around it
on which that environment's loss changes by no more than epsilon (section 2 of the
paper).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hardvary import _validate

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

# Points on a ray, each this factor further out than the one before it.
RAY_POINTS = 24
RAY_FACTOR = 1.35
BISECTIONS = 8
# How steeply a step from the edge of a neighbourhood turns inwards. Where that is an
# ellipsoid: tangents of half the angle by which the step goes round it.
TURNS = (0.0, 0.05, 0.15, 0.4, 1.0, 2.5)


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


class Inconsistency(NamedTuple):
    """What `inconsistency` found, with the way to it.

    Attributes:
      score: scalar, a lower bound on the inconsistency score; reached at `params`.
      pair: int32 `[2]`, the `(e, e')` of the score.
      params: the parameters found, a tree like those given.
      pairs: int32 `[pair, 2]`, the pairs that were searched.
      pair_scores: `[pair]`, a lower bound for each of them.
      path: tree like the parameters with a leading axis `[num_steps + 1]`: corners of a
        polygonal path from the parameters given to those found.
      max_deviation: scalar, the largest change of the loss of `e` from its value at the
        parameters given, at `num_samples` points of every edge of the path: the
        certificate, at most epsilon.
      max_jump: scalar, the largest change of that loss from one of these points to the
        next. Where it is far below epsilon, the points are close enough together to
        trust them with what lies between.
    """

    score: jax.Array
    pair: jax.Array
    params: PyTree
    pairs: jax.Array
    pair_scores: jax.Array
    path: PyTree
    max_deviation: jax.Array
    max_jump: jax.Array


class ILC(NamedTuple):
    """Invariant learning consistency of an algorithm, estimated by `ilc`.

    Attributes:
      value: scalar, minus the mean score; higher is better, 0 is the best.
      standard_error: scalar, of the mean; NaN for one initialisation.
      scores: `[initialisation]`.
    """

    value: jax.Array
    standard_error: jax.Array
    scores: jax.Array


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
      >>> x = jnp.linspace(-2.0, 2.0, 401)
      >>> losses = jnp.stack([0.5 * x**2, 2.0 * x**2])  # curvatures 1 and 4
      >>> found = hardvary.consistency.grid_inconsistency(losses, 200, 0.1)
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


def inconsistency(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    epsilon: Any,
    *,
    key: jax.Array,
    pairs: Any = None,
    num_starts: int = 4,
    num_steps: int = 24,
    cg_steps: int = 20,
    damping: float = 1e-6,
    max_distance: Any = None,
    num_samples: int = 64,
    batch_size: int | None = None,
) -> Inconsistency:
    r"""Lower bound on the inconsistency score of a network's parameters.

    .. math::

      I_\epsilon(\theta^*) = \max_{e, e'} \max_{\theta \in N(e, \theta^*, \epsilon)}
          |L_{e'}(\theta) - L_e(\theta^*)|

    For each pair of environments and from several random starts, a search follows the
    neighbourhood :math:`N(e, \theta^*, \epsilon)` from :math:`\theta^*`, the way
    :math:`L_{e'}` changes most. Each step tries straight rays: along the gradient of
    :math:`L_{e'}`, plain and multiplied by the damped inverse Hessian of :math:`L_e`
    (conjugate gradients), turned inwards by several amounts, and a random one. Along
    each it goes no further than the loss of `e` allows without interruption, and takes
    the one with the largest change. All it claims lies on a path that it returns, with
    a certificate; what it did not find may still exist.

    Args:
      loss_fn: `loss_fn(params, env_batch) -> scalar`, the loss of one environment,
        twice differentiable.
      params: :math:`\theta^*`; tree of real floating leaves.
      batch: tree of leaves `[env, ...]`.
      epsilon: :math:`\epsilon` > 0, in units of the loss; may be traced.
      key: random key, `jax.random.key(seed)`.
      pairs: integer `[pair, 2]`, the ordered pairs `(e, e')` to search; without it, all
        with `e != e'`.
      num_starts: random starts for each pair.
      num_steps: steps of each search, and edges of a path.
      cg_steps: steps of conjugate gradients, two Hessian-vector products each; at most
        the number of parameters.
      damping: added to the Hessian, relative to its typical curvature.
      max_distance: searches stay within this Euclidean distance of `params`; may be
        traced. Without it ten times the larger of 1 and the norm of `params`.
        Neighbourhoods of networks are often unbounded, and scores in them too.
      num_samples: points on each edge of a path at which the loss of `e` is checked.
      batch_size: so many searches run at once; without it one after the other. Takes
        memory for some 240 copies of the parameters each.

    Returns:
      An `Inconsistency`. The dtype of its scores is that of the parameters.

    Raises:
      TypeError: parameters that are not real floating, a loss that is not a real
        scalar, an epsilon or max_distance that is no real scalar.
      ValueError: a batch whose leaves disagree on the number of environments, fewer
        than two of them, pairs outside of [0, env), numbers of steps and the like below
        1, an epsilon that is not positive or a max_distance that is not positive and
        finite (concrete values only).

    Edge cases:
      ======================================  ======================================
      the loss of `e` is flat somewhere       what is found within `max_distance`
      a NaN or infinite loss in `e`           a wall
      a NaN loss in `e'`                      never counted as a change
      NaN at `params`                         NaN
      `params` not a minimum                  any point will do; where environments
                                              differ in loss, so does the score
      ======================================  ======================================

    Example:
      >>> import jax, jax.numpy as jnp, hardvary
      >>> curvatures = jnp.array([[1.0, 2.0], [6.0, 1.0]])  # [env, parameter]
      >>> loss_fn = lambda params, curvature: 0.5 * jnp.sum(curvature * params**2)
      >>> find = lambda params, key: hardvary.consistency.inconsistency(
      ...     loss_fn, params, curvatures, 0.1, key=key)
      >>> found = jax.jit(find)(jnp.zeros(2), jax.random.key(0))
      >>> round(float(found.score), 2), found.pair.tolist()  # epsilon times 6
      (0.6, [0, 1])
      >>> bool(found.max_deviation <= 0.1)
      True

    References:
      Parascandolo et al., ICLR 2021, section 2, equation (1); the paper does not
      compute it.

    Warning:
      Everything is traced anew in each call. Call it inside `jax.jit`, as above, if you
      call it more than once.
    """
    _validate.real_floating(params, "inconsistency: params")
    _validate.at_least("epsilon", epsilon, 0.0, strict=True)
    if max_distance is not None:
        _validate.at_least("max_distance", max_distance, 0.0, strict=True)
        _validate.finite_at_least("max_distance", max_distance, 0.0)
    _validate.finite_at_least("damping", damping, 0.0)
    for name, number in {
        "num_starts": num_starts,
        "num_steps": num_steps,
        "cg_steps": cg_steps,
        "num_samples": num_samples,
        "batch_size": 1 if batch_size is None else batch_size,
    }.items():
        _validate.at_least(name, number, 1)
    num_envs = _validate.leading_size(
        jax.tree.leaves_with_path(batch), "inconsistency: batch"
    )
    if num_envs is None or num_envs < 2:
        raise ValueError(
            "inconsistency: the batch must hold at least two environments, got "
            f"{num_envs or 0}"
        )
    pairs = _pairs(pairs, num_envs)
    search = _Search(
        loss_fn, params, batch, epsilon, cg_steps, damping, max_distance, num_samples
    )
    number, at_once = len(pairs) * num_starts, batch_size or 1
    chunks = -(-number // at_once)
    # The last chunk is filled up with searches that were made already.
    indices = jnp.minimum(jnp.arange(chunks * at_once), number - 1)
    runs = pairs[indices // num_starts]
    keys = jax.random.split(key, number)[indices]

    def run(pair: jax.Array, key: jax.Array) -> _Found:
        return search.run(pair, key, num_steps)

    # The paths of all searches would take far more memory than that of the best so far.
    def body(best: tuple[_Found, jax.Array], chunk: Any) -> Any:
        found = jax.vmap(run)(*chunk)
        index = jnp.argmax(found.value)  # NaN, if there is any
        better = ~(found.value[index] <= best[0].value)
        candidate = jax.tree.map(lambda leaf: leaf[index], (found, chunk[0]))
        chosen = jax.tree.map(
            lambda new, old: jnp.where(better, new, old), candidate, best
        )
        return chosen, found.value

    first = (jax.eval_shape(run, runs[0], keys[0]), runs[0])
    first = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    first = (first[0]._replace(value=jnp.full_like(first[0].value, -jnp.inf)), first[1])
    inputs = jax.tree.map(
        lambda leaf: leaf.reshape(chunks, at_once, *leaf.shape[1:]), (runs, keys)
    )
    (best, pair), scores = jax.lax.scan(body, first, inputs)
    scores = scores.reshape(-1)[:number].reshape(len(pairs), num_starts)
    return Inconsistency(
        score=best.value,
        pair=pair,
        params=search.unravel(best.path[-1]),
        pairs=pairs,
        pair_scores=scores.max(1),
        path=jax.vmap(search.unravel)(best.path),
        max_deviation=best.max_deviation,
        max_jump=best.max_jump,
    )


def ilc(
    train_fn: Callable[[jax.Array], PyTree],
    score_fn: Callable[[PyTree, jax.Array], Any],
    *,
    key: jax.Array,
    num_inits: int = 10,
) -> ILC:
    r"""Invariant learning consistency of an algorithm.

    .. math::

      \mathrm{ILC}(\mathcal{A}, p_{\theta_0}) = -\mathbb{E}_{\theta_0 \sim p_{\theta_0}}
          [I_\epsilon(\mathcal{A}_\infty(\theta_0))]

    Args:
      train_fn: `train_fn(key) -> params`: draws parameters, trains them with the
        algorithm and returns what it converged to. Called once for each
        initialisation, from Python: jit it yourself.
      score_fn: `score_fn(params, key) -> scalar`, the inconsistency score, such as the
        `score` of `inconsistency`.
      key: random key, `jax.random.key(seed)`.
      num_inits: initialisations.

    Returns:
      An `ILC`.

    Raises:
      TypeError: a score that is not a real scalar.
      ValueError: num_inits below 1.

    Edge cases:
      ======================================  ======================================
      an infinite score                       the value is -infinity
      scores that are lower bounds            the value is an upper bound
      ======================================  ======================================

    Example:
      >>> import jax, jax.numpy as jnp, hardvary
      >>> hessians = jnp.stack([jnp.eye(2), jnp.diag(jnp.array([4.0, 1.0]))])
      >>> train_fn = lambda key: hessians  # of a quadratic: the same at every minimum
      >>> score_fn = lambda hessians, key: (
      ...     hardvary.consistency.quadratic_inconsistency(hessians, 0.1))
      >>> result = hardvary.consistency.ilc(
      ...     train_fn, score_fn, key=jax.random.key(0), num_inits=3)
      >>> round(float(result.value), 3), round(float(result.standard_error), 3)
      (-0.4, 0.0)

    References:
      Parascandolo et al., ICLR 2021, section 2, equation (2).
    """
    _validate.at_least("num_inits", num_inits, 1)
    scores = []
    for init_key in jax.random.split(key, num_inits):
        train_key, score_key = jax.random.split(init_key)
        score = jnp.asarray(score_fn(train_fn(train_key), score_key))
        _validate.real_floating(score, "ilc: scores")
        if score.ndim:
            raise TypeError(f"ilc: a score must be a scalar, got shape {score.shape}")
        scores.append(score)
    stacked = jnp.stack(scores)
    mean = jnp.mean(stacked)
    spread = jnp.sqrt(jnp.sum(jnp.square(stacked - mean)) / max(num_inits - 1, 1))
    error = spread / math.sqrt(num_inits) if num_inits > 1 else mean * jnp.nan
    return ILC(value=-mean, standard_error=error, scores=stacked)


# Grids.


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


# Networks.


def _pairs(pairs: Any, num_envs: int) -> jax.Array:
    if pairs is None:
        every = [(e, o) for e in range(num_envs) for o in range(num_envs) if e != o]
        return jnp.array(every, jnp.int32)
    values = np.asarray(pairs)
    if values.ndim != 2 or values.shape[1] != 2 or len(values) == 0:
        raise ValueError(
            "inconsistency: pairs must have shape [pair, 2] with at least one, got "
            f"shape {values.shape}"
        )
    if (
        not np.issubdtype(values.dtype, np.integer)
        or not ((values >= 0) & (values < num_envs)).all()
    ):
        raise ValueError(
            f"inconsistency: pairs must be integers in [0, {num_envs}), the "
            f"environments of the batch, got {values.tolist()}"
        )
    return jnp.asarray(values, jnp.int32)


class _Found(NamedTuple):
    """What one search found.

    Attributes:
      value: the largest change of the pair's second loss.
      path: [num_steps + 1, n], corners of the way there.
      max_deviation: the largest deviation of the first loss at the points checked.
      max_jump: its largest change between neighbours among them.
    """

    value: jax.Array
    path: jax.Array
    max_deviation: jax.Array
    max_jump: jax.Array


class _Search:
    """The searches of one call, on flat parameters."""

    def __init__(
        self,
        loss_fn: LossFn,
        params: PyTree,
        batch: PyTree,
        epsilon: Any,
        cg_steps: int,
        damping: float,
        max_distance: Any,
        num_samples: int,
    ) -> None:
        self._loss_fn, self._batch = loss_fn, batch
        if not jax.tree.leaves(params):
            raise ValueError("inconsistency: params hold no parameters")
        # Leaves of several dtypes become one array of the widest.
        with jax.numpy_dtype_promotion("standard"):
            self.origin, self.unravel = ravel_pytree(params)
        dtype = self.origin.dtype
        shape = jax.eval_shape(
            loss_fn, params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], batch)
        )
        if getattr(shape, "shape", None) != () or not jnp.issubdtype(
            shape.dtype, jnp.floating
        ):
            raise TypeError(
                f"inconsistency: loss_fn must return a real scalar, got {shape}"
            )
        self.epsilon = jnp.asarray(epsilon, dtype)
        self.damping = damping
        self._cg_steps = min(cg_steps, self.origin.size)
        self.num_samples = num_samples
        self._max_distance = (
            10 * jnp.maximum(jnp.linalg.norm(self.origin), 1)
            if max_distance is None
            else jnp.asarray(max_distance, dtype)
        )

    def run(self, pair: jax.Array, key: jax.Array, num_steps: int) -> _Found:
        """One search, for one pair of environments."""
        own_env, other_env = (
            jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf)[i], self._batch)
            for i in pair
        )
        dtype = self.origin.dtype

        def own(point: jax.Array) -> jax.Array:
            return self._loss_fn(self.unravel(point), own_env).astype(dtype)

        def other(point: jax.Array) -> jax.Array:
            return self._loss_fn(self.unravel(point), other_env).astype(dtype)

        base = own(self.origin)

        def change(point: jax.Array) -> jax.Array:
            return jnp.abs(other(point) - base)

        walk = _Walk(self, own, other, base, change)

        def step(state: Any, inputs: Any) -> Any:
            point, value = state
            key, first = inputs
            moved, moved_value, deviation, jump = walk.step(point, key, first)
            better = moved_value > value
            state = jax.tree.map(
                lambda new, old: jnp.where(better, new, old),
                (moved, moved_value),
                (point, value),
            )
            checks = jax.tree.map(lambda x: jnp.where(better, x, 0), (deviation, jump))
            return state, (state[0], *checks)

        start = (self.origin, change(self.origin))
        first = jnp.arange(num_steps) == 0
        keys = jax.random.split(key, num_steps)
        (_, value), (corners, deviations, jumps) = jax.lax.scan(
            step, start, (keys, first)
        )
        path = jnp.concatenate([self.origin[None], corners])
        value = jnp.where(jnp.isnan(base), jnp.nan, value)
        return _Found(value, path, jnp.max(deviations), jnp.max(jumps))

    def allowed(self, deviation: jax.Array, point: jax.Array) -> jax.Array:
        near = jnp.linalg.norm(point - self.origin) <= self._max_distance
        return (deviation <= self.epsilon) & near

    def solve(
        self,
        product: Callable[[jax.Array], jax.Array],
        target: jax.Array,
        shift: jax.Array,
    ) -> jax.Array:
        """(product + shift)^-1 target, as far as curvature is positive."""

        def body(_: Any, state: Any) -> Any:
            x, residual, direction, square, active = state
            image = product(direction) + shift * direction
            curvature = direction @ image
            go_on = active & (curvature > 0) & (square > 0)
            length = jnp.where(go_on, square / jnp.where(go_on, curvature, 1), 0)
            x = x + length * direction
            residual = residual - length * image
            new = residual @ residual
            ratio = jnp.where(go_on, new / jnp.where(go_on, square, 1), 0)
            direction = jnp.where(go_on, residual + ratio * direction, direction)
            return x, residual, direction, jnp.where(go_on, new, square), go_on

        start = (
            jnp.zeros_like(target),
            target,
            target,
            target @ target,
            jnp.asarray(True),
        )
        x = jax.lax.fori_loop(0, self._cg_steps, body, start)[0]
        # Negative curvature at once: the gradient itself.
        return jnp.where(jnp.any(x != 0), x, target)

    def reach(
        self, point: jax.Array, direction: jax.Array, slope: Any, bend: Any, gap: Any
    ) -> jax.Array:
        """How far along a ray it is worth to look.

        Args:
          point: [n], where the ray starts.
          direction: [n].
          slope: derivative of the loss along it.
          bend: its second derivative.
          gap: the loss at the point, less that at the origin.
        """
        crossings = jnp.stack(
            [
                _smallest_root(bend / 2, slope, gap - self.epsilon),
                _smallest_root(bend / 2, slope, gap + self.epsilon),
            ]
        )
        offset = point - self.origin
        to_the_edge = _smallest_root(
            direction @ direction,
            2 * offset @ direction,
            offset @ offset - self._max_distance**2,
        )
        # The quadratic model may well be wrong.
        return jnp.minimum(4 * jnp.min(crossings), to_the_edge)


class _Walk:
    """Steps of one search inside the neighbourhood of one environment."""

    def __init__(
        self,
        search: _Search,
        own: Callable[[jax.Array], jax.Array],
        other: Callable[[jax.Array], jax.Array],
        base: jax.Array,
        change: Callable[[jax.Array], jax.Array],
    ) -> None:
        self._search, self._own, self._other = search, own, other
        self._base, self._change = base, change

    def step(
        self, point: jax.Array, key: jax.Array, first: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The best point on rays from `point`, its change, and the two checks."""
        directions, reaches = self._rays(point, key, first)
        factors = RAY_FACTOR ** jnp.arange(1.0 - RAY_POINTS, 1.0)
        lengths = reaches[:, None] * factors.astype(point.dtype)[None, :]
        over_lengths = jax.vmap(self._look, (None, None, 0))
        changes, fine = jax.vmap(over_lengths, (None, 0, 0))(point, directions, lengths)
        changes = jnp.where(jnp.cumprod(fine, axis=1).astype(bool), changes, -jnp.inf)
        ray, last = jnp.unravel_index(jnp.argmax(changes), changes.shape)
        direction = directions[ray]
        length = self._bisect(point, direction, lengths[ray], last, changes[ray, last])
        length = jnp.where(changes[ray, last] > -jnp.inf, length, 0)
        return self._checked(point, direction, length)

    def _rays(
        self, point: jax.Array, key: jax.Array, first: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Directions [ray, n], and how far to look along them [ray]."""
        search = self._search
        value, slope = jax.value_and_grad(self._own)(point)

        def hessian(vector: jax.Array) -> jax.Array:
            return jax.jvp(jax.grad(self._own), (point,), (vector,))[1]

        probe, stray = jax.random.normal(key, (2, len(point)), point.dtype)
        shift = (
            search.damping * jnp.linalg.norm(hessian(probe)) / jnp.linalg.norm(probe)
        )
        # Not the gradient of the change, which has a kink where it is 0.
        sign = jnp.where(self._other(point) >= self._base, 1, -1).astype(point.dtype)
        uphill, curved = jax.jvp(jax.grad(self._other), (point,), (probe,))
        uphill, curved = sign * uphill, sign * curved
        # A minimum of both has no gradient to follow.
        uphill = jnp.where(first, curved, uphill)
        outwards = search.solve(hessian, uphill, shift)
        inwards = search.solve(hessian, slope, shift)
        rays = [outwards, -outwards, uphill, stray, -stray]
        rays += _turned(outwards, inwards, slope, hessian)
        rays += _turned(uphill, slope, slope, hessian)
        directions = jnp.stack(rays)
        norms = jnp.linalg.norm(directions, axis=1, keepdims=True)
        usable = jnp.isfinite(norms) & (norms > 0)
        directions = jnp.where(usable, directions / jnp.where(usable, norms, 1), probe)
        bends = jax.vmap(lambda v: v @ hessian(v))(directions)
        reach = jax.vmap(search.reach, (None, 0, 0, 0, None))
        return directions, reach(
            point, directions, directions @ slope, bends, value - self._base
        )

    def _look(
        self, point: jax.Array, direction: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The change at a point of a ray, and whether the point is allowed."""
        there = point + length * direction
        change = self._change(there)
        fine = self._search.allowed(jnp.abs(self._own(there) - self._base), there)
        return jnp.where(jnp.isnan(change), -jnp.inf, change), fine

    def _bisect(
        self,
        point: jax.Array,
        direction: jax.Array,
        lengths: jax.Array,
        last: jax.Array,
        best: jax.Array,
    ) -> jax.Array:
        """A length between that of the best point of a ray and the next, if better."""
        inside = lengths[last]
        outside = jnp.where(
            last + 1 < RAY_POINTS,
            lengths[jnp.minimum(last + 1, RAY_POINTS - 1)],
            inside,
        )

        def body(_: Any, state: Any) -> Any:
            inside, outside = state
            middle = (inside + outside) / 2
            _, fine = self._look(point, direction, middle)
            return jnp.where(fine, middle, inside), jnp.where(fine, outside, middle)

        edge, _ = jax.lax.fori_loop(0, BISECTIONS, body, (inside, outside))
        change, _ = self._look(point, direction, edge)
        return jnp.where(change > best, edge, inside)

    def _checked(
        self, point: jax.Array, direction: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The last point before any of many samples of the edge is not allowed."""
        shares = jnp.linspace(0, 1, self._search.num_samples + 1, dtype=point.dtype)
        lengths = length * shares
        values = jax.vmap(lambda t: self._own(point + t * direction))(lengths)
        deviations = jnp.abs(values - self._base)
        fine = jax.vmap(lambda t, d: self._search.allowed(d, point + t * direction))(
            lengths, deviations
        )
        prefix = jnp.cumprod(fine).astype(bool).at[0].set(True)
        there = point + lengths[jnp.sum(prefix) - 1] * direction
        jumps = jnp.abs(jnp.diff(values))
        change = self._change(there)
        return (
            there,
            jnp.where(jnp.isnan(change), -jnp.inf, change),
            jnp.max(jnp.where(prefix, deviations, 0)),
            jnp.max(jnp.where(prefix[1:], jumps, 0)),
        )


def _turned(
    ray: jax.Array,
    inwards: jax.Array,
    slope: jax.Array,
    hessian: Callable[[jax.Array], jax.Array],
) -> list[jax.Array]:
    """A ray made tangent to a level set, and turned by several amounts.

    Args:
      ray: [n].
      inwards: [n], against which the loss falls.
      slope: [n], the gradient of the loss.
      hessian: its products with vectors. Its norm is the one that counts: in it the
        neighbourhood of a quadratic loss is a ball.
    """
    fall = slope @ inwards
    steep = fall > 0
    tangent = (
        ray - jnp.where(steep, ray @ slope / jnp.where(steep, fall, 1), 0) * inwards
    )

    def unit(vector: jax.Array) -> jax.Array:
        square = jnp.abs(vector @ hessian(vector))
        return vector / jnp.sqrt(jnp.where(square > 0, square, 1))

    tangent, inwards = unit(tangent), unit(inwards)
    return [tangent - turn * inwards for turn in TURNS]


def _smallest_root(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """The smallest t > 0 with a t^2 + b t + c = 0, or infinity."""
    discriminant = b * b - 4 * a * c
    root = jnp.sqrt(jnp.maximum(discriminant, 0))
    # Without cancellation: one root from the sum, the other from their product.
    half = -(b + jnp.where(b < 0, -root, root)) / 2

    def ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
        value = top / jnp.where(bottom == 0, 1, bottom)
        usable = (bottom != 0) & (value > 0) & (discriminant >= 0)
        return jnp.where(usable, value, jnp.inf)

    return jnp.minimum(ratio(half, a), ratio(c, half))
