"""The rules of the fused oracle, one a file, and which of them a group takes.

To add one: a file with a subclass of `Rule`, an entry in `RULES`, a case in `decide`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hardvary._env_grads.statistics import EnvWeights, Statistic, Sums
from hardvary.fused.grouping import Group, groups_of
from hardvary.fused.program import Program
from hardvary.fused.rules import convolution, factors, layout, lookup, product
from hardvary.fused.rules.base import Rule
from hardvary.fused.rules.scan import Scan
from hardvary.fused.rules.stack import Stack
from hardvary.fused.rules.unused import Unused
from hardvary.fused.traced import Traced

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


def sum_over_envs(
    traced: Traced, statistics: Sequence[Statistic], weights: EnvWeights | None
) -> Sums:
    """Sums of statistics, lists in the order of the parameters."""
    result: dict[Statistic, list[Any]] = {
        statistic: [None] * len(traced.leaves) for statistic in statistics
    }
    for rule in bound_rules(traced):
        sums = rule.sums(statistics, weights)
        for statistic in statistics:
            for i, total in zip(rule.group.leaves, sums[statistic], strict=True):
                result[statistic][i] = total
    return result
