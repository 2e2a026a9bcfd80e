"""The rule for parameters that no gradient reaches."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hardvary import _validate
from hardvary._env_grads.statistics import (
    EnvWeights,
    Statistic,
    Sums,
    zero_sum,
)
from hardvary._typing import AxisName
from hardvary.fused.rules.base import GramianForm, Rule


class Unused(Rule):
    """Gradients that are zero in every environment."""

    def sums(self, statistics: Sequence[Statistic], weights: EnvWeights | None) -> Sums:
        def total(leaf: jax.Array, statistic: Statistic) -> jax.Array:
            zero = zero_sum(leaf)
            count = self.num_envs if weights is None else jnp.sum(weights.of(statistic))
            return statistic.function(zero) * jnp.asarray(count, zero.dtype)

        return {s: [total(leaf, s) for leaf in self.leaves] for s in statistics}

    def stack(self) -> list[jax.Array]:
        return [
            jnp.zeros((self.num_envs, *leaf.shape), leaf.dtype) for leaf in self.leaves
        ]

    def gramian_form(self) -> tuple[GramianForm, int]:
        return "none", 0

    def gramian(self, axis_name: AxisName | None = None) -> list[jax.Array]:
        num_envs = self.num_envs
        if axis_name is not None:
            num_envs *= jax.lax.axis_size(axis_name)
        shape = (num_envs, num_envs)
        return [jnp.zeros(shape, _validate.wide(leaf.dtype)) for leaf in self.leaves]
