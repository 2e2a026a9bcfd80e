"""Parameters whose gradients have to be computed together."""

import dataclasses

from hardvary.fused.program import Program
from hardvary.fused.uses import Use


@dataclasses.dataclass(eq=False)
class Group:
    """Parameters that meet in a use, or through a chain of uses.

    Attributes:
      leaves: positions among the parameters.
      uses: all uses of these.
    """

    leaves: tuple[int, ...]
    uses: list[Use]


def groups_of(program: Program, num_leaves: int) -> list[Group]:
    """Sorts the parameters, the first `num_leaves` inputs, into groups."""
    inputs = program.inputs[:num_leaves]
    position = {value: i for i, value in enumerate(inputs)}
    parent = list(range(num_leaves))

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    uses = program.uses
    roots = [[position[v] for v in program.roots(use.operands)] for use in uses]
    for together in roots:
        for other in together[1:]:
            parent[find(other)] = find(together[0])
    groups: dict[int, Group] = {}
    for i in range(num_leaves):
        group = groups.setdefault(find(i), Group((), []))
        group.leaves += (i,)
    for use, together in zip(uses, roots, strict=True):
        if together:
            groups[find(together[0])].uses.append(use)
    return list(groups.values())
