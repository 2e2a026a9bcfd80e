"""The rule for one outer product per environment.

Functions f with f(a b) = f(a) f(b) are summed over environments by one matrix product
of f of the factors: sums, sums of squares, sums of signs.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate, sharding
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
from hardvary.fused.rules.scan import Scan
from hardvary.fused.uses import Use

# Environments that are summed over at once, on CPU: their signs are a few words.
PART = 128


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
        totals = sum_in_parts(of, inputs, at_once, late=False)
        for statistic, total in zip(wanted, totals, strict=True):
            total = total.astype(_validate.wide(self.leaves[0].dtype))
            result[statistic] = [self._in_layout(total)]
        for statistic in votes:
            # Finite factors may have a product that is not.
            finite = jnp.isfinite(result[MEAN][0])
            result[statistic] = [jnp.where(finite, result[statistic][0], jnp.nan)]
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
    up = lambda axes: tuple(axis + 1 for axis in axes)  # noqa: E731
    product = jax.lax.dot_general(
        data,
        cotangent,
        (
            ((0, *up(free)), (0, *up(rows))),
            (up(batch), up(range(len(batch)))),
        ),
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
    narrow = num_envs <= np.iinfo(np.int16).max
    return _count_bits(use, data, cotangent).astype(jnp.int16 if narrow else jnp.int32)


def _count_bits(use: Use, left: jax.Array, right: jax.Array) -> jax.Array:
    """`_sum_of_signs` in int32, 32 environments in a word.

    A CPU multiplies 8 or 16 numbers at once, and so many times 32 signs. A factor that
    is not finite counts as its sign does.
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

    def spread(words: jax.Array, is_left: bool) -> jax.Array:
        """Axes [word, batch, contracted, free], of size 1 where there is none."""
        shape = words.shape
        ones = (1,) * len(mine_free if is_left else mine_contract)
        at = len(shape) if is_left else 1 + num_batch
        return words.reshape(*shape[:at], *ones, *shape[at:])

    left_nonzero, left_negative = (
        spread(words, True) for words in _packed([left != 0, left < 0])
    )
    # By themselves: masks of both at once are more memory, and no faster.
    right_nonzero, right_negative = (
        spread(words, False) for words in _packed([right != 0, right < 0])
    )
    total = jnp.zeros((), jnp.int32)
    for word in range(len(left_nonzero)):
        both = left_nonzero[word] & right_nonzero[word]
        differ = (left_negative[word] ^ right_negative[word]) & both
        total += jax.lax.population_count(both).astype(jnp.int32)
        total -= 2 * jax.lax.population_count(differ).astype(jnp.int32)
    axes = [*mine_batch, *mine_contract, *mine_free]
    return jnp.transpose(total, [axes.index(axis) for axis in range(ndim)])


def _packed(masks: Sequence[jax.Array]) -> list[jax.Array]:
    """Masks `[env, ...]` as words `[word, ...]` of 32 environments."""
    num_envs, shapes = len(masks[0]), [mask.shape[1:] for mask in masks]
    # Side by side, so that one sum packs them all. XLA would take anything else that
    # it can fuse into the loop over the parameter, and pack anew for each component.
    bits = jnp.concatenate([mask.reshape(num_envs, -1) for mask in masks], axis=1)
    bits = jnp.pad(bits, ((0, -num_envs % 32), (0, 0)))
    bits = bits.reshape(len(bits) // 32, 32, bits.shape[1]).astype(jnp.uint32)
    shifts = np.arange(32, dtype=np.uint32)[None, :, None]
    words = jnp.sum(bits << shifts, axis=1, dtype=jnp.uint32)
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [
        part.reshape(len(words), *shape)
        for part, shape in zip(jnp.split(words, ends, axis=1), shapes, strict=True)
    ]
