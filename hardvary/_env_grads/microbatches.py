"""Gradients of more environments than fit at once."""

from collections.abc import Sequence
from typing import Any

import jax

from hardvary import sharding
from hardvary._env_grads.problem import Problem
from hardvary._env_grads.source import Source, square_norms
from hardvary._env_grads.statistics import (
    EnvWeights,
    Statistic,
    Sums,
    sums_by_parts,
)
from hardvary._loops import in_parts
from hardvary._typing import AxisName
from hardvary.fused.rules import AllRules
from hardvary.fused.rules.inner_products import gramian_by_blocks
from hardvary.fused.traced import Traced


class Microbatches(Source):
    """Of all parameters, with a forward and a backward pass for every question.

    Args:
      problem: the loss and the batch.
      size: environments in a pass, a divisor of their number.
      axis_name: mapped axis over which further environments are spread.
    """

    def __init__(self, problem: Problem, size: int, axis_name: AxisName | None) -> None:
        self.num_envs = problem.num_envs
        self._problem, self._size = problem, size
        self._axes = sharding.names_of(axis_name)
        self._leaves = jax.tree.leaves(problem.params)

    def value(self) -> Any:
        """`(losses, aux)` of all environments, from a forward pass alone."""
        problem = self._problem

        def some(batch: Any) -> Any:
            return jax.vmap(problem.loss, (None, 0))(problem.params, batch)

        return in_parts(some, problem.batch, self._size)

    def sums(self, statistics: Sequence[Statistic], weights: EnvWeights | None) -> Sums:
        def sums_of(batch: Any, weights: EnvWeights | None) -> Any:
            return self._pass(batch).sums(statistics, weights), None

        sums, _ = sums_by_parts(
            sums_of,
            (self._problem.batch, weights),
            self.num_envs // self._size,
            self._leaves,
            statistics,
        )
        return sums

    def stack(self) -> list[jax.Array]:
        return in_parts(self._stacked, self._problem.batch, self._size)

    def gramian(self, axis_name: AxisName | None = None) -> list[jax.Array]:
        return gramian_by_blocks(
            self._stacked, self._problem.batch, self._size, axis_name
        )

    def square_norms(self) -> list[jax.Array]:
        def some(batch: Any) -> list[jax.Array]:
            return [square_norms(grad) for grad in self._stacked(batch)]

        return in_parts(some, self._problem.batch, self._size)

    def _stacked(self, batch: Any) -> list[jax.Array]:
        return self._pass(batch).stack()

    def _pass(self, batch: Any) -> AllRules:
        problem = self._problem
        traced = Traced(problem.loss, problem.params, batch, None, self._axes)
        return AllRules(traced)
