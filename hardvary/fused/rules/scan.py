"""The rule for sums of products: a few environments at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate, sharding
from hardvary._env_grads.source import inner_products, square_norms, weighted_sum
from hardvary._env_grads.statistics import (
    EnvWeights,
    Statistic,
    Sums,
    along_envs,
    present,
    sum_over_envs,
    sums_by_parts,
    zero_sum,
)
from hardvary._loops import divisor, in_parts, sum_in_parts
from hardvary._typing import AxisName
from hardvary.fused.rules import convolution
from hardvary.fused.rules.base import GramianForm, Rule
from hardvary.fused.rules.factors import DotGeneral
from hardvary.fused.rules.inner_products import gramian_by_blocks
from hardvary.fused.rules.layout import in_layout

# Environments whose convolutions' gradients are added up at once, on CPU.
UNROLL = 2
_STACK = "stack"


class Scan(Rule):
    """Goes through the environments and adds up."""

    def sums(self, statistics: Sequence[Statistic], weights: EnvWeights | None) -> Sums:
        if self._multiplies_together():
            grads = [grad.astype(self.leaves[0].dtype) for grad in self._all_grads()]
            sums = sum_over_envs(grads, statistics, weights)
            return {s: [self._in_layout_of(total) for total in sums[s]] for s in sums}
        size = self._at_once()
        pull = self.pull(alone=size == 1)
        inputs = (*self.left_behind(), weights)

        def one(saved: Any, cotangents: Any, weight: EnvWeights | None) -> Any:
            saved, cotangents = jax.tree.map(lambda x: x[0], (saved, cotangents))
            grads = [grad[None] for grad in pull(saved, cotangents)]
            return sum_over_envs(grads, statistics, weight), None

        def several(saved: Any, cotangents: Any, weights: EnvWeights | None) -> Any:
            grads = self.pull_several(saved, cotangents)
            return sum_over_envs(grads, statistics, weights), None

        if size == 1 and self._is_convolved():

            def alone(*inputs: Any) -> list[list[jax.Array]]:
                sums, _ = one(*inputs)
                return [sums[statistic] for statistic in statistics]

            like = [[zero_sum(leaf) for leaf in self.leaves] for _ in statistics]
            totals = sum_in_parts(alone, inputs, 1, UNROLL, like)
            return dict(zip(statistics, totals, strict=True))
        sums, _ = sums_by_parts(
            one if size == 1 else several,
            inputs,
            self.num_envs // size,
            self.leaves,
            statistics,
        )
        return sums

    def combine(self, weights: EnvWeights) -> list[jax.Array]:
        if _STACK in self.kept:
            totals = [weighted_sum(grad, weights) for grad in self.kept[_STACK]]
            if not isinstance(self.factors, DotGeneral):
                return totals
            return [self._in_layout_of(totals[0])]
        if self.root is not None and isinstance(self.factors, DotGeneral):
            sizes = self.factors.sizes
            if self.num_envs * sizes.rows < sizes.outputs:
                # The root times all rows of the data, not times all outputs.
                return self.weighted_sum(weights)
        return super().combine(weights)

    def weighted_sum(self, weights: EnvWeights) -> list[jax.Array]:
        left_behind = self.left_behind()
        narrow = self._is_narrow(jax.tree.leaves(left_behind))
        if isinstance(self.factors, DotGeneral):
            (use,) = self.group.uses
            data, cotangent = (present(x, weights) for x in self._pair())
            dtype = _validate.wide(self.leaves[0].dtype)
            cotangent = cotangent.astype(_validate.wide(cotangent.dtype))
            cotangent *= along_envs(weights.values, cotangent).astype(cotangent.dtype)
            precision = use.eqn.params["precision"]
            total = self.factors.sum(data, cotangent, dtype, precision)
            return [self._in_layout(total)]
        # Sums in a narrow type would round, and may leave its range.
        convolved = self._is_convolved() and sharding.on_cpu()
        if narrow or convolved or self.spreads_nan:
            return super().weighted_sum(weights)
        return self.pull_sum(*left_behind, weights)

    def gramian(self, axis_name: AxisName | None = None) -> list[jax.Array]:
        (form, _), factors = self.gramian_form(), self.factors
        if self.held:
            return [
                inner_products(sharding.all_rows(grad, axis_name))
                for grad in self._all_grads()
            ]
        if self.root is not None and factors is not None:
            data, cotangent = self._raw_pair()
            data = sharding.all_rows(data, axis_name)
            cotangent = sharding.all_rows(cotangent, axis_name)
            factors, budget = factors.of(len(data)), self.elements()
            return [factors.whitened_gramian(data, cotangent, self.root, budget)]
        if factors is None or form in ("stacked", "blocks"):
            if form == "blocks":
                # Two blocks meet.
                size = divisor(self.num_envs, max(self._block() // 2, 1))
                of_block = lambda block: self.pull_several(*block)  # noqa: E731
                return gramian_by_blocks(of_block, self.left_behind(), size, axis_name)
            grads = self._of_envs(lambda grad: grad)
            return [inner_products(sharding.all_rows(x, axis_name)) for x in grads]
        data, cotangent = (sharding.all_rows(x, axis_name) for x in self._pair())
        factors = factors.of(len(data))
        return [factors.gramian(data, cotangent, self.elements())]

    @functools.cached_property
    def held(self) -> bool:
        """Whether the gradients take the place of what they are made of.

        Where they are no more than that: made once for their inner products, they are
        there for a weighted sum.
        """
        if self._is_narrow(self.leaves) and not isinstance(self.factors, DotGeneral):
            # They would be rounded.
            return False
        if self.factors is not None and self.factors.gramian_form()[0] == "rows":
            return False
        wide = [(x.size, _validate.wide(x.dtype)) for x in self.leaves]
        grads = self.num_envs * sum(size * dtype.itemsize for size, dtype in wide)
        left_behind = jax.tree.leaves(self.left_behind())
        return grads <= sum(np.size(x) * x.dtype.itemsize for x in left_behind)

    def _all_grads(self) -> list[jax.Array]:
        """All gradients `[env, ...]`, of factors in their layout."""

        def make() -> list[jax.Array]:
            if isinstance(self.factors, DotGeneral):
                return [self.factors.stack(*self._raw_pair(), self.root)]
            plain = cast(Scan, self.whitened(None))
            return plain._of_envs(jax.vmap(lambda grad: self._whiten([grad])[0]))

        return self.kept.once(_STACK, make)

    def gramian_form(self) -> tuple[GramianForm, int]:
        if self.held:
            return "held", super().gramian_form()[1]
        fits = self.num_envs * self.size <= self.elements()
        if self.factors is not None and not (self._is_convolved() and fits):
            return self.factors.gramian_form()
        form, products = super().gramian_form()
        return form if fits else "blocks", products

    def square_norms(self) -> list[jax.Array]:
        if self.held:
            return [square_norms(grad) for grad in self._all_grads()]
        if self.factors is None or self._is_convolved():
            return self._of_envs(square_norms)
        return [self.factors.square_norms(*self._pair(), self.elements())]

    def _of_envs(self, function: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
        """`function` of gradients `[env, ...]`, of as many environments as fit."""
        size = self._at_once()
        pull = self.pull(alone=size == 1)

        def one(left_behind: Any) -> list[jax.Array]:
            left_behind = jax.tree.map(lambda x: x[0], left_behind)
            return [function(grad[None]) for grad in pull(*left_behind)]

        def some(left_behind: Any) -> list[jax.Array]:
            return [function(grad) for grad in self.pull_several(*left_behind)]

        like = [
            jax.eval_shape(function, jax.ShapeDtypeStruct((size, *x.shape), x.dtype))
            for x in self.leaves
        ]
        return in_parts(one if size == 1 else some, self.left_behind(), size, like)

    def _multiplies_together(self) -> bool:
        """Whether one product makes all gradients, where they would be made in turn.

        In place of what they are made of they take no more memory, and XLA on CPU is
        faster at one operation than at a loop, and compiles it sooner.
        """
        return (
            sharding.on_cpu()
            and isinstance(self.factors, DotGeneral)
            and not self._is_narrow(self.leaves)
            and self.held
        )

    def _in_layout_of(self, total: jax.Array) -> jax.Array:
        """A sum of what `DotGeneral.stack` returns, as the parameter lies."""
        assert isinstance(self.factors, DotGeneral)
        used = self.factors.of_stack(total)
        return self._in_layout(used.astype(_validate.wide(self.leaves[0].dtype)))

    def _in_layout(self, total: jax.Array) -> jax.Array:
        """A sum in the layout of the parameter as it is used."""
        (use,), (leaf,) = self.group.uses, self.group.leaves
        return in_layout(self.traced, use.operands[0], leaf, total)

    def _is_narrow(self, arrays: Sequence[jax.Array]) -> bool:
        return any(
            jnp.issubdtype(array.dtype, jnp.inexact)
            and jnp.finfo(array.dtype).bits < 32
            for array in arrays
        )

    def _is_convolved(self) -> bool:
        return any(convolution.applies(use) for use in self.group.uses)

    def _pair(self) -> tuple[jax.Array, jax.Array]:
        """As `_raw_pair`, of gradients that are multiplied by the root."""
        data, cotangent = self._raw_pair()
        if self.root is not None and isinstance(self.factors, DotGeneral):
            data = self.factors.whitened(data, self.root)
        return data, cotangent

    def _block(self) -> int:
        """Number of environments whose gradients may be held at once."""
        return divisor(self.num_envs, self.elements() // max(self.size, 1))

    def _at_once(self) -> int:
        """Number of environments to take together."""
        # One at a time stays in a CPU's cache and leaves an accelerator idle: there, as
        # many as need no more memory than what was left behind and two copies of all
        # parameters.
        if sharding.on_cpu():
            return 1
        return self._block()
