"""The rule for sums of products: a few environments at a time."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hardvary import sharding
from hardvary._env_grads.statistics import (
    EnvWeights,
    Statistic,
    Sums,
    sum_over_envs,
    sums_by_parts,
)
from hardvary.fused.rules import convolution
from hardvary.fused.rules.base import Rule

# Environments whose convolutions' gradients are added up at once, on CPU.
UNROLL = 2


class Scan(Rule):
    """Goes through the environments and adds up."""

    def sums(self, statistics: Sequence[Statistic], weights: EnvWeights | None) -> Sums:
        pull = self.pull()
        inputs = (*self.left_behind(), weights)

        def one(saved: Any, cotangents: Any, weight: EnvWeights | None) -> Any:
            saved, cotangents = jax.tree.map(lambda x: x[0], (saved, cotangents))
            grads = [grad[None] for grad in pull(saved, cotangents)]
            return sum_over_envs(grads, statistics, weight), None

        def several(saved: Any, cotangents: Any, weights: EnvWeights | None) -> Any:
            grads = jax.vmap(pull)(saved, cotangents)
            return sum_over_envs(grads, statistics, weights), None

        size = self._at_once(inputs)
        # Several in a row are added to the sums in one pass over these.
        convolved = any(convolution.applies(use) for use in self.group.uses)
        sums, _ = sums_by_parts(
            one if size == 1 else several,
            inputs,
            self.num_envs // size,
            self.leaves,
            statistics,
            unroll=UNROLL if convolved and size == 1 else 1,
        )
        return sums

    def _at_once(self, inputs: Any) -> int:
        """Number of environments to take together."""
        # One at a time stays in a CPU's cache and leaves an accelerator idle: there, as
        # many as need no more memory than what was left behind and two copies of all
        # parameters.
        if sharding.on_cpu():
            return 1
        elements = sum(leaf.size for leaf in jax.tree.leaves(inputs))
        elements += 2 * sum(np.size(leaf) for leaf in self.traced.leaves)
        gradient = sum(leaf.size for leaf in self.leaves)
        return _divisor(self.num_envs, elements // max(gradient, 1))


def _divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` up to a bound, at least 1."""
    return max(
        d for d in range(1, number + 1) if number % d == 0 and d <= max(at_most, 1)
    )
