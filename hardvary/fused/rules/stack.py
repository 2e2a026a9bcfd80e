"""The rule for small gradients, and for those of which nothing better is known."""

from collections.abc import Sequence

from hardvary._env_grads.statistics import EnvWeights, Statistic, Sums, sum_over_envs
from hardvary.fused.rules.base import Rule


class Stack(Rule):
    """Stacks the gradients of all environments."""

    def sums(self, statistics: Sequence[Statistic], weights: EnvWeights | None) -> Sums:
        return sum_over_envs(self.stack(), statistics, weights)
