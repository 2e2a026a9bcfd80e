"""Walks in the neighbourhood of one environment, the way another's loss changes most.

The neighbourhood of a minimum, for one environment, is the path-connected set around it
on which that environment's loss changes by no more than epsilon (section 2 of the
paper).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hardvary import _validate
from hardvary._typing import PyTree

# Points on a ray, each this factor further out than the one before it.
RAY_POINTS = 24
RAY_FACTOR = 1.35
BISECTIONS = 8
# How steeply a step from the edge of a neighbourhood turns inwards. Where that is an
# ellipsoid: tangents of half the angle by which the step goes round it.
TURNS = (0.0, 0.05, 0.15, 0.4, 1.0, 2.5)


class Found(NamedTuple):
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


class Search:
    """The searches of one call, on flat parameters."""

    def __init__(
        self,
        loss_fn: Callable[[PyTree, PyTree], jax.Array],
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
            found = _validate.a_or_an(type(shape).__name__)
            if hasattr(shape, "shape"):
                found = f"{shape.dtype} of shape {shape.shape}"
            raise TypeError(
                "inconsistency: loss_fn must return a real floating scalar (average "
                f"over the examples), got {found}"
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

    def run(self, pair: jax.Array, key: jax.Array, num_steps: int) -> Found:
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
        return Found(value, path, jnp.max(deviations), jnp.max(jumps))

    def nothing(self, num_steps: int) -> Found:
        """What is there before the first search."""
        zero = jnp.zeros((), self.origin.dtype)
        path = jnp.zeros((num_steps + 1, self.origin.size), self.origin.dtype)
        return Found(zero - jnp.inf, path, zero, zero)

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
        search: Search,
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
        (value, slope), derivative = jax.linearize(jax.value_and_grad(self._own), point)

        def hessian(vector: jax.Array) -> jax.Array:
            return derivative(vector)[1]

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
