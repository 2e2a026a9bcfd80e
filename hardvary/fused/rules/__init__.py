"""The rules of the fused oracle, one a file, and which of them a group takes.

To add one: a file with a subclass of `Rule`, an entry in `RULES`, a case in `decide`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from hardvary._env_grads.source import Source
from hardvary._env_grads.statistics import EnvWeights, Statistic, Sums
from hardvary._typing import AxisName
from hardvary.fused.grouping import Group, groups_of
from hardvary.fused.program import Program
from hardvary.fused.rules import convolution, factors, layout, lookup, product
from hardvary.fused.rules.base import Rule
from hardvary.fused.rules.scan import Scan
from hardvary.fused.rules.stack import Stack
from hardvary.fused.rules.unused import Unused
from hardvary.fused.traced import Summing, Traced

RULES: dict[str, type[Rule]] = {
    "product": product.Product,
    "lookup": lookup.Lookup,
    "stack": Stack,
    "scan": Scan,
    "unused": Unused,
}
# Gradients this small are cheaper to stack than to go through one by one.
SMALL = 4096


@dataclasses.dataclass(frozen=True)
class Decision:
    """The rule for a group.

    Attributes:
      group: the parameters and their uses.
      rule: key of `RULES`.
      reason: why not a faster rule.
    """

    group: Group
    rule: str
    reason: str


def decisions(traced: Traced) -> list[Decision]:
    """A rule for every group of parameters."""
    groups = groups_of(traced.program, len(traced.leaves))
    return [decide(traced.program, group) for group in groups]


def decide(program: Program, group: Group) -> Decision:
    """Chooses the fastest rule that is right for a group."""
    if not group.uses:
        return Decision(group, "unused", "no gradient reaches it")
    size = sum(program.inputs[i].size for i in group.leaves)
    reason = ""
    if len(group.uses) == 1 and len(group.leaves) == 1:
        (only,) = group.uses
        plain = (
            only.primitive in ("dot_general", "gather")
            and not only.steps
            and layout.is_rearranged(program, only.operands[0])
            and factors.is_real(only)
        )
        if plain and only.primitive == "dot_general":
            num_rows = product.rows(only)
            if num_rows == 1:
                return Decision(group, "product", "one outer product each")
            reason = f"a sum of {num_rows} outer products"
        elif plain:
            found = lookup.lookups(only)
            if found is not None and found**2 <= size:
                return Decision(group, "lookup", f"{found} rows per environment")
    copies = all(use.primitive == "copy" for use in group.uses)
    small = size <= SMALL and not any(convolution.applies(use) for use in group.uses)
    if not reason or copies:
        names = sorted({f"in {use.reason or use.primitive}" for use in group.uses})
        reason = ", ".join(names)
        if len(group.uses) > 1:
            reason = f"{len(group.uses)} uses: {reason}"
    return Decision(group, "stack" if copies or small else "scan", reason)


def bound_rules(traced: Traced) -> list[Rule]:
    """The gradients of every group of parameters, as a rule has them."""
    return [RULES[d.rule](traced, d.group) for d in decisions(traced)]


class AllRules(Source):
    """The gradients of all parameters, as the rules of their groups have them."""

    def __init__(self, traced: Traced) -> None:
        self.num_envs = traced.num_envs
        self._rules = bound_rules(traced)
        self._at = {i: rule for rule in self._rules for i in rule.group.leaves}

    def sums(self, statistics: Sequence[Statistic], weights: EnvWeights | None) -> Sums:
        sums = {rule: rule.sums(statistics, weights) for rule in self._rules}

        def of(statistic: Statistic) -> list[jax.Array]:
            return self._of_all(lambda rule: sums[rule][statistic])

        return {statistic: of(statistic) for statistic in statistics}

    def combine(self, weights: EnvWeights) -> list[jax.Array]:
        return self._of_all(lambda rule: rule.combine(weights))

    def stack(self) -> list[jax.Array]:
        return self._of_all(lambda rule: rule.stack())

    def gramian(self, axis_name: AxisName | None = None) -> list[jax.Array]:
        return self._of_all(lambda rule: rule.gramian(axis_name))

    def square_norms(self) -> list[jax.Array]:
        return self._of_all(lambda rule: rule.square_norms())

    def alone(self, index: int) -> Source:
        return self._at[index]

    def _of_all(self, ask: Callable[[Rule], list[jax.Array]]) -> list[jax.Array]:
        """Answers in the order of the parameters."""
        found: dict[int, jax.Array] = {}
        for rule in self._rules:
            found.update(zip(rule.group.leaves, ask(rule), strict=True))
        return [found[i] for i in sorted(found)]


def summing(statistics: Sequence[Statistic], weights: EnvWeights | None) -> Summing:
    """Sums by the rules, for a pass that may take a few environments at a time."""
    return Summing(
        statistics,
        weights,
        lambda traced, weights: AllRules(traced).sums(statistics, weights),
    )


def sums_of_pass(traced: Traced, summing: Summing) -> Sums:
    """What is to be summed of all environments, on the way or now."""
    if traced.sums is not None:
        return traced.sums
    return summing.sums_of(traced, summing.weights)
