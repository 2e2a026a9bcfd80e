"""Gradients of which some sums are there already."""

from collections.abc import Sequence

import jax

from hardvary._env_grads.source import Source
from hardvary._env_grads.statistics import EnvWeights, Statistic, Sums
from hardvary._typing import AxisName


class Summed(Source):
    """Another source's gradients, and sums that were made on the way to them.

    Args:
      source: the gradients.
      sums: of them.
      weights: of the environments in these sums.
    """

    def __init__(self, source: Source, sums: Sums, weights: EnvWeights | None) -> None:
        self._source, self._sums, self._weights = source, sums, weights
        self.num_envs = source.num_envs

    def sums(self, statistics: Sequence[Statistic], weights: EnvWeights | None) -> Sums:
        known = self._sums if weights is self._weights else {}
        missing = [s for s in statistics if s not in known]
        found = self._source.sums(missing, weights) if missing else {}
        return {s: known[s] if s in known else found[s] for s in statistics}

    def combine(self, weights: EnvWeights) -> list[jax.Array]:
        return self._source.combine(weights)

    def stack(self) -> list[jax.Array]:
        return self._source.stack()

    def gramian(self, axis_name: AxisName | None = None) -> list[jax.Array]:
        return self._source.gramian(axis_name)

    def square_norms(self) -> list[jax.Array]:
        return self._source.square_norms()

    def alone(self, index: int) -> Source:
        return self._source.alone(index)
