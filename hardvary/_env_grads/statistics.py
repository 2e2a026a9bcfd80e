"""Statistics of gradients over environments: one definition for every route to them.

A statistic is a sum over environments of an elementwise function of their gradients. It
is taken in at least float32, an environment of weight 0 does not count whatever it
holds, and a gradient that is not finite shows as NaN.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _lax, _validate, sharding
from hardvary._loops import divisor
from hardvary._sums import TERMS, over_first_axis
from hardvary._typing import AxisName, PyTree

LOG_EPS = 1e-10
# Terms from which on XLA's library on CPU adds up, and nothing is compiled for it.
_LIBRARY = 2**12


@dataclasses.dataclass(frozen=True, eq=False)
class Statistic:
    """A sum over environments.

    Attributes:
      name: in the public `stats` argument.
      field: of `GradStats`.
      function: of a gradient, elementwise; its weighted sum is the statistic.
      averaged: whether the sum is divided by the total weight.
      multiplicative: whether `function(a * b) = function(a) * function(b)`.
      weight: field of `EnvWeights` that weights the sum.
      rest: a second sum that belongs to this one where environments are weighted.
      note: what it is, where it is not what a `GradStats` holds under its name.
    """

    name: str
    field: str
    function: Callable[[jax.Array], jax.Array]
    averaged: bool = True
    multiplicative: bool = False
    weight: str = "values"
    rest: "Statistic | None" = None
    note: str = ""


def _or_nan(function: Callable[[jax.Array], jax.Array], grad: jax.Array) -> jax.Array:
    if not jnp.issubdtype(grad.dtype, jnp.floating):
        # What an environment's data are made of, as pixels.
        grad = grad.astype(jnp.float32)
    return _lax.where(jax.lax.is_finite(grad), function(grad), np.nan)


def sign_or_nan(grad: jax.Array) -> jax.Array:
    """The vote of a gradient: its sign, NaN where it is not finite."""
    # The sign of an infinite gradient is finite: without this the sum of signs would
    # hide a diverged environment.
    return _or_nan(jax.lax.sign, grad)


def nonzero_or_nan(grad: jax.Array) -> jax.Array:
    """1 where a gradient is not zero, NaN where it is not finite."""
    return _or_nan(lambda grad: (grad != 0).astype(grad.dtype), grad)


def log_abs(eps: Any = LOG_EPS) -> Statistic:
    """The statistic `sum_e w_e log(|g_e| + eps)`."""

    def function(grad: jax.Array) -> jax.Array:
        # Adding nothing to 0 would make a sum of logarithms infinite.
        offset = jnp.maximum(
            jnp.asarray(eps).astype(grad.dtype), jnp.finfo(grad.dtype).tiny
        )
        return jnp.log(jnp.abs(grad) + offset)

    note = "" if eps is LOG_EPS else f"logarithms with eps {eps}, not {LOG_EPS:g}"
    return Statistic("log_abs", "log_abs_mean", function, note=note)


MEAN = Statistic("mean", "mean", lambda grad: grad, multiplicative=True)
_SIGN_REST = Statistic(
    "sign", "sign_sum", sign_or_nan, False, multiplicative=True, weight="rest"
)
SIGN = dataclasses.replace(_SIGN_REST, weight="coarse", rest=_SIGN_REST)
STATISTICS = {
    statistic.name: statistic
    for statistic in (
        MEAN,
        SIGN,
        Statistic("square", "square_mean", jnp.square, multiplicative=True),
        log_abs(),
        Statistic("abs", "abs_mean", jnp.abs, multiplicative=True),
        Statistic("nonzero", "nonzero_sum", nonzero_or_nan, False, multiplicative=True),
    )
}


class EnvWeights(NamedTuple):
    """Weights of environments, as summed.

    Attributes:
      values: `[env]`, at least float32; 0 is an absent environment.
      coarse: `values` rounded to a grid on which sums over all environments are exact
        in whatever order, so that a sum of votes and the total weight that it is
        compared with round in the same way.
      rest: `values - coarse`.
    """

    values: jax.Array
    coarse: jax.Array
    rest: jax.Array

    def of(self, statistic: Statistic) -> jax.Array:
        weight: jax.Array = getattr(self, statistic.weight)
        return weight


def make_weights(values: jax.Array, axis_name: AxisName | None = None) -> EnvWeights:
    """Weights of the environments, which may be spread over a mapped axis.

    Args:
      values: `[env]` floating, of any sign.
      axis_name: mapped axis over which further environments are spread.
    """
    total = jnp.sum(jnp.abs(values))
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    # Multiples of `step`, up to 2**23 of them in all: float32 has 24 bits.
    _, exponent = jnp.frexp(total)
    step = jnp.ldexp(jnp.ones((), values.dtype), exponent - 23)
    # Where weights are tiny the step rounds to 0.
    step = jnp.maximum(step, jnp.finfo(values.dtype).tiny)
    coarse = jnp.round(values / step) * step
    return EnvWeights(values, coarse, values - coarse)


def signed(values: jax.Array) -> EnvWeights:
    """Weights of any sign, for sums that nothing is compared with."""
    return EnvWeights(values, values, jnp.zeros_like(values))


def total_weight(num_envs: int, weights: EnvWeights | None) -> Any:
    """Total weight of (local) environments; an int if they are not weighted."""
    if weights is None:
        return num_envs
    return jnp.sum(weights.coarse) + jnp.sum(weights.rest)


def along_envs(weights: jax.Array, like: jax.Array) -> jax.Array:
    """`weights: [env]` with as many axes as `like: [env, ...]`."""
    return weights.reshape((-1,) + (1,) * (like.ndim - 1))


def present(values: jax.Array, weights: EnvWeights | None) -> jax.Array:
    """`values: [env, ...]` with zeros for absent environments, whatever these hold."""
    if weights is None:
        return values
    # 0 * NaN is NaN.
    return jnp.where(along_envs(weights.values, values) != 0, values, 0)


def zero_sum(param: Any) -> jax.Array:
    """The start of sums over a parameter's gradients."""
    return jnp.zeros(np.shape(param), _validate.wide(jnp.result_type(param)))


Sums = dict[Statistic, list[jax.Array]]


def summed(statistics: Sequence[Statistic], weighted: bool) -> list[Statistic]:
    """All sums that `statistics` are made of."""
    if not weighted:
        return list(statistics)
    rest = [statistic.rest for statistic in statistics if statistic.rest is not None]
    return [*statistics, *rest]


def sum_over_envs(
    grads: Sequence[jax.Array],
    statistics: Sequence[Statistic],
    weights: EnvWeights | None,
) -> Sums:
    """Sums statistics over axis 0 of stacked gradients, in at least float32.

    Args:
      grads: arrays `[env, *param.shape]`.
      statistics: as `summed` returns them.
      weights: of the environments, or None for 1 each.

    Returns:
      For each statistic a list of arrays `param.shape`.
    """

    def summand(grad: jax.Array, statistic: Statistic) -> jax.Array:
        dtype = _validate.wide(grad.dtype)
        values = statistic.function(grad.astype(dtype))
        if weights is None:
            return values
        weight = along_envs(weights.of(statistic), values).astype(dtype)
        return weight * present(values, weights)

    totals = [
        over_first_axis([summand(grad, statistic) for statistic in statistics])
        for grad in grads
    ]
    return {s: [of[i] for of in totals] for i, s in enumerate(statistics)}


def sum_of_mask(mask: jax.Array) -> jax.Array:
    """The sum of a mask in [0, 1], boolean or floating, in float32."""
    rows = math.prod(mask.shape[:-1])
    if mask.dtype == jnp.bool_ and mask.ndim and mask.size >= 2 * _LIBRARY:
        # A few rows first, in bytes, where XLA on CPU would write down what it is to
        # add up; and as many as its library adds up for no compilation are left.
        few = divisor(rows, min(TERMS, mask.size // _LIBRARY))
        mask = mask.reshape(rows // few, few, mask.shape[-1])
        mask = jnp.sum(mask, axis=1, dtype=jnp.int8)
    return jnp.sum(mask, dtype=jnp.float32)


def sum_of_masks(masks: Sequence[jax.Array]) -> jax.Array:
    """`sum_of_mask` of all of them together."""
    spread = not jax.sharding.get_abstract_mesh().empty
    parts, few = list(masks), [mask for mask in masks if mask.size < _LIBRARY]
    if len(few) > 1 and sharding.on_cpu() and not spread:
        parts = [mask for mask in masks if mask.size >= _LIBRARY]
        whole = all(mask.dtype == jnp.bool_ for mask in few)
        dtype = jnp.bool_ if whole else jnp.float32
        joined = jnp.concatenate([mask.reshape(-1).astype(dtype) for mask in few])
        # Or XLA takes the sum of each again, and compiles as many loops.
        parts.append(jax.lax.optimization_barrier(joined))
    zero = jnp.zeros((), jnp.float32)
    return functools.reduce(jax.lax.add, map(sum_of_mask, parts), zero)


def over_devices(
    sums: Sums, num_envs: Any, axis_name: AxisName | None
) -> tuple[Sums, Any]:
    """Sums, and the total weight, over the environments of all devices."""
    if axis_name is None:
        return sums, num_envs
    names = [s for s in sums if s is not SIGN or not isinstance(num_envs, int)]
    limit = num_envs * jax.lax.axis_size(axis_name)
    leaves, num_envs = jax.lax.psum(([sums[s] for s in names], num_envs), axis_name)
    result = dict(zip(names, leaves, strict=True))
    if SIGN in sums and SIGN not in result:
        result[SIGN] = sharding.psum_counts(
            sums[SIGN], limit, axis_name, result.get(MEAN)
        )
    return result, num_envs


def as_total(num_envs: Any) -> Any:
    """The total weight as a floating scalar, of NumPy if it is known."""
    if isinstance(num_envs, int):
        return np.float32(num_envs)
    total = jnp.asarray(num_envs)
    if not jnp.issubdtype(total.dtype, jnp.floating):
        return total.astype(jnp.float32)
    return total.astype(_validate.wide(total.dtype))


def finish(
    sums: Sums, statistics: Sequence[Statistic], total: jax.Array
) -> list[dict[str, Any]]:
    """Fields of `GradStats`, parameter by parameter, from sums over all environments.

    Args:
      sums: of everything in `summed(statistics, ...)`.
      statistics: those that were asked for.
      total: total weight of the environments.
    """

    def field(statistic: Statistic, i: int) -> jax.Array:
        value = sums[statistic][i]
        if statistic.rest is not None and statistic.rest in sums:
            value = value + sums[statistic.rest][i]
        if not statistic.averaged:
            return value
        return jax.lax.div(value, total.astype(value.dtype))

    count = len(next(iter(sums.values()), []))
    return [{s.field: field(s, i) for s in statistics} for i in range(count)]


def sums_by_parts(
    sums_of: Callable[..., tuple[Sums, PyTree]],
    inputs: PyTree,
    num_parts: int,
    like: Sequence[Any],
    statistics: Sequence[Statistic],
) -> tuple[Sums, PyTree]:
    """Adds up what `sums_of(*part)` returns for each part of the environments.

    Args:
      sums_of: `(*inputs) -> (sums, other)` of a part.
      inputs: trees with leaves `[env, ...]`, the arguments of `sums_of`.
      num_parts: number of parts, a divisor of the number of environments.
      like: the parameters whose statistics are summed.
      statistics: keys of `sums`.

    Returns:
      The sums, and `other` with leaves `[env, ...]`.
    """
    size = len(jax.tree.leaves(inputs)[0]) // num_parts

    def split(leaf: jax.Array) -> jax.Array:
        if size == 1:
            # XLA on CPU copies what is reshaped in front of a loop.
            return leaf
        return leaf.reshape(num_parts, size, *leaf.shape[1:])

    def body(total: list[Any], part: Any) -> tuple[list[Any], Any]:
        if size == 1:
            part = jax.tree.map(lambda leaf: leaf[None], part)
        sums, other = sums_of(*part)
        added = [sums[statistic] for statistic in statistics]
        return jax.tree.map(jax.lax.add, total, added), other

    # Zeros that wait for the inputs share memory with what was there before. XLA on
    # CPU runs side by side what shares none, and an MLP's step took a sixth longer.
    zeros = [[zero_sum(leaf) for leaf in like] for _ in statistics]
    zeros = sharding.vary_like(zeros, (inputs, like))
    totals, other = jax.lax.scan(body, zeros, jax.tree.map(split, inputs))

    def join(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])

    other = jax.tree.map(join, other)
    return dict(zip(statistics, totals, strict=True)), other


@functools.cache
def named(names: tuple[str, ...]) -> tuple[Statistic, ...]:
    return tuple(STATISTICS[name] for name in names)
