"""The rule for one outer product per environment.

Functions f with f(a b) = f(a) f(b) are summed over environments by one matrix product
of f of the factors: sums, sums of squares, sums of signs.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _lax, _validate, sharding
from hardvary._env_grads.statistics import (
    MEAN,
    SIGN,
    EnvWeights,
    Statistic,
    Sums,
    along_envs,
    present,
    sign_or_nan,
)
from hardvary._loops import sum_in_parts
from hardvary.fused.rules.factors import sides
from hardvary.fused.rules.multiply import multiply_rows
from hardvary.fused.rules.scan import Scan
from hardvary.fused.uses import Use

# Environments that are summed over at once, on CPU: 16 words. XLA unrolls the loop over
# so many; with twice as many a step takes half as long again.
PART = 256
_VOTES = (jnp.int8, jnp.int16, jnp.int32)


def rows(use: Use) -> int:
    """Number of outer products whose sum an environment's gradient is."""
    *_, free = sides(use)
    shape = use.eqn.invars[1 - use.side].aval.shape
    return math.prod(shape[i] for i in free)


class Product(Scan):
    """One more matrix product for each statistic."""

    def sums(self, statistics: Sequence[Statistic], weights: EnvWeights | None) -> Sums:
        # log(|a b| + eps) is no product of anything.
        rest = [s for s in statistics if not s.multiplicative]
        result = super().sums(rest, weights) if rest else {}
        votes = [s for s in statistics if not s.averaged]
        wanted = [s for s in statistics if s not in rest]
        if votes and MEAN not in wanted:
            wanted.append(MEAN)

        def of(data: Any, cotangent: Any, weights: EnvWeights | None) -> Any:
            data, cotangent = (present(x, weights) for x in (data, cotangent))
            return [self._sum(s, data, cotangent, weights) for s in wanted]

        inputs = (*self._pair(), weights)
        # What is multiplied is then copied, or packed in words, for a part of them.
        at_once = PART if sharding.on_cpu() else self.num_envs
        totals = sum_in_parts(of, inputs, at_once)
        for statistic, total in zip(wanted, totals, strict=True):
            total = total.astype(_validate.wide(self.leaves[0].dtype))
            result[statistic] = [self._in_layout(total)]
        for statistic in votes:
            # Finite factors may have a product that is not.
            finite = jax.lax.is_finite(result[MEAN][0])
            result[statistic] = [_lax.where(finite, result[statistic][0], np.nan)]
        return {s: result[s] for s in statistics}

    def _sum(
        self,
        statistic: Statistic,
        data: jax.Array,
        cotangent: jax.Array,
        weights: EnvWeights | None,
    ) -> jax.Array:
        """A statistic of environments, in the layout of the parameter as it is used.

        Where a product is not finite a sum of signs is of no meaning: `sums` makes it
        NaN.
        """
        (use,) = self.group.uses
        if statistic is SIGN and weights is None:
            return _sum_of_signs(use, data, cotangent, self.num_envs)
        dtype = _validate.wide(self.leaves[0].dtype)
        left, right = data, cotangent
        if statistic is not MEAN or weights is not None:
            # A square may leave the range of the factors' dtype.
            left, right = left.astype(dtype), right.astype(dtype)
        left, right = statistic.function(left), statistic.function(right)
        if weights is not None:
            weight = along_envs(weights.of(statistic), right)
            right = right * weight.astype(dtype)
        # What is precise enough for gradients would round the weights of signs.
        highest = jax.lax.Precision.HIGHEST
        precision = use.eqn.params["precision"] if statistic.averaged else highest
        return _outer(use, left, right, dtype, precision)

    def weighted_sum(self, weights: EnvWeights) -> list[jax.Array]:
        return self.sums([MEAN], weights)[MEAN]


def _outer(
    use: Use,
    data: jax.Array,
    cotangent: jax.Array,
    dtype: Any,
    precision: Any,
) -> jax.Array:
    """Sums the products of all environments, in the layout of the parameter."""
    mine_contract, mine_batch, contract, batch, free = sides(use)
    ndim = use.eqn.invars[use.side].aval.ndim
    mine_free = [i for i in range(ndim) if i not in (*mine_contract, *mine_batch)]
    # The output has batch axes, free axes of the left side, those of the right side.
    before = len(batch) + (len(mine_free) if use.side == 0 else 0)
    rows = range(before, before + len(free))
    # One row. XLA on CPU transposes data that are contracted over several axes.
    up = lambda axes: tuple(axis + 1 for axis in axes)  # noqa: E731
    data = jax.lax.squeeze(data, up(free))
    cotangent = jax.lax.squeeze(cotangent, up(rows))
    data_batch = [1 + sum(i not in free for i in range(axis)) for axis in batch]
    product = multiply_rows(
        data,
        cotangent,
        (((0,), (0,)), (data_batch, up(range(len(batch))))),
        precision=precision,
        preferred_element_type=dtype,
    )
    # Now: batch axes, contracted axes in the data's order, the parameter's free axes.
    in_order = sorted(range(len(contract)), key=lambda i: contract[i])
    axes = [*mine_batch, *(mine_contract[i] for i in in_order), *mine_free]
    return jnp.transpose(product, [axes.index(axis) for axis in range(len(axes))])


def _sum_of_signs(
    use: Use, data: jax.Array, cotangent: jax.Array, num_envs: int
) -> jax.Array:
    """Sums the signs of products as `_outer` does, for a sum over `num_envs` in all."""
    if not sharding.on_cpu():
        # bfloat16 holds signs exactly, NaN too, and the sums are in a wide type.
        left, right = (
            sign_or_nan(factor).astype(jnp.bfloat16) for factor in (data, cotangent)
        )
        return _outer(use, left, right, jnp.dtype(jnp.float32), None)
    # As narrow as they may be: sums are as large as the parameter.
    dtype = next(d for d in _VOTES if num_envs <= jnp.iinfo(d).max)
    word = np.uint8 if dtype == jnp.int8 else np.uint16
    return _count_bits(use, data, cotangent, np.dtype(word)).astype(dtype)


def _count_bits(
    use: Use, left: jax.Array, right: jax.Array, word: np.dtype
) -> jax.Array:
    """`_sum_of_signs` of up to 127 environments in uint8, up to 32767 in uint16.

    A CPU multiplies 8 or 16 numbers at once, and 256 or 512 signs. Words that are no
    wider than the sums leave room for the most of both in one instruction, whatever
    the instructions are. A factor that is not finite counts as its sign does.
    """
    mine_contract, mine_batch, contract, batch, free = sides(use)
    num_batch, ndim = len(batch), use.eqn.invars[use.side].aval.ndim
    mine_free = [i for i in range(ndim) if i not in (*mine_contract, *mine_batch)]
    left = jnp.transpose(
        left, (0, *(i + 1 for i in (*batch, *contract, *free)))
    ).reshape(*(left.shape[0], *(left.shape[i + 1] for i in (*batch, *contract))))
    # One row: what is not a batch axis of the output belongs to the parameter.
    sizes = [use.eqn.invars[use.side].aval.shape[i] for i in (*mine_batch, *mine_free)]
    right = right.reshape(len(right), *sizes)

    def spread(words: _Words, is_left: bool) -> _Words:
        """Axes [word, batch, contracted, free], of size 1 where there is none."""
        shape = words.nonzero.shape
        ones = (1,) * len(mine_free if is_left else mine_contract)
        at = len(shape) if is_left else 1 + num_batch
        return _Words(*(x.reshape(*shape[:at], *ones, *shape[at:]) for x in words))

    mine = spread(_packed(left, word), True)
    others = spread(_packed(right, word), False)
    both = mine.nonzero & others.nonzero
    differ = (mine.negative ^ others.negative) & both
    votes = jax.lax.population_count(both)
    against = jax.lax.mul(jax.lax.population_count(differ), word.type(2))
    votes = jax.lax.sub(votes, against)
    # A reduction is what XLA does not repeat for each that reads it.
    total = jax.lax.reduce(votes, word.type(0), jax.lax.add, (0,))
    # Below 0 it has wrapped around.
    total = jax.lax.bitcast_convert_type(total, f"int{8 * word.itemsize}")
    axes = [*mine_batch, *mine_contract, *mine_free]
    return jnp.transpose(total, [axes.index(axis) for axis in range(ndim)])


class _Words(NamedTuple):
    """Of signs, `[word, ...]`, an environment in a bit.

    Attributes:
      nonzero: where there is a sign.
      negative: where it is one.
    """

    nonzero: jax.Array
    negative: jax.Array


def _packed(factor: jax.Array, word: np.dtype) -> _Words:
    """The signs of `[env, ...]`, as many environments in a word as it has bits."""
    num_envs, shape, size = len(factor), factor.shape[1:], 8 * word.itemsize
    # One array and one sum for both: XLA would take anything else that it can fuse
    # into the loop over the parameter, and pack anew for each component.
    flat = jax.lax.broadcast_in_dim(
        factor.reshape(num_envs, -1), (num_envs, 2, math.prod(shape)), (0, 2)
    )
    zero = np.zeros((), factor.dtype)
    of_nonzero = jax.lax.broadcast_in_dim(np.array([True, False]), flat.shape, (1,))
    bits = jax.lax.select(of_nonzero, jax.lax.ne(flat, zero), jax.lax.lt(flat, zero))
    bits = jax.lax.pad(bits, np.False_, [(0, -num_envs % size, 0), *[(0, 0, 0)] * 2])
    bits = bits.reshape(len(bits) // size, size, *bits.shape[1:]).astype(word)
    shifts = np.arange(size, dtype=word)
    bits = jax.lax.shift_left(bits, jax.lax.broadcast_in_dim(shifts, bits.shape, (1,)))
    words = jax.lax.reduce(bits, word.type(0), jax.lax.add, (1,))
    return _Words(*(words[:, i].reshape(len(words), *shape) for i in range(2)))
