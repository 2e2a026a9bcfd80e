"""How the fused oracle treats each parameter, as a table."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate
from hardvary.fused.rules import bound_rules, decisions
from hardvary.fused.traced import Traced


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """How the fused oracle treats a parameter.

    Attributes:
      path: where the parameter is in the tree.
      shape: its shape.
      rule: `"product"`, `"lookup"`, `"stack"`, `"scan"` or `"unused"`.
      reason: why this rule.
      stacked_bytes: memory that the gradients of all environments would take.
      gramian: how its inner products are taken: `"rows"`, from the factors alone;
        `"tiles"`, a piece of all environments' gradients at a time; `"matching rows"`
        of a table; `"held"`, from all gradients, which are no more than what they are
        made of and are kept for a weighted sum; `"stacked"`; `"blocks"`, some
        environments' gradients at a time, computed again for each pair of blocks;
        `"none"`, they are zero.
      gramian_products: multiplications that this takes, beside forward and backward
        pass; of all parameters that are computed together.
      num_inputs: of the layer that it is the weights of, for `whiten_inputs`; None
        where it is no weights of a dense layer or a convolution, or of one that is used
        more than once.
    """

    path: str
    shape: tuple[int, ...]
    rule: str
    reason: str
    stacked_bytes: int
    gramian: str
    gramian_products: int
    num_inputs: int | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table.

    Attributes:
      parameters: a row for each parameter, in the order of the tree.
      part_size: environments that a pass takes at a time on this machine where no
        `microbatch_size` says so; all of them, but on a CPU and where activations are
        large. Statistics are then added up on the way.
      num_envs: number of environments.
    """

    parameters: tuple[ParameterRule, ...]
    part_size: int
    num_envs: int

    def __str__(self) -> str:
        rows = [
            ("parameter", "shape", "rule", "reason", "gramian", "inputs", "stacked")
        ]
        rows += [
            (
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                row.rule,
                row.reason,
                row.gramian,
                "none" if row.num_inputs is None else str(row.num_inputs),
                f"{row.stacked_bytes / 2**20:.2g} MiB",
            )
            for row in self.parameters
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])])
            for row in rows
        ]
        if self.part_size < self.num_envs:
            lines.append(f"{self.part_size} of {self.num_envs} environments at a time")
        return "\n".join(lines)


def explanation(traced: Traced) -> Explanation:
    decision_of = {i: d for d in decisions(traced) for i in d.group.leaves}
    forms = {
        i: (*rule.gramian_form(), rule.num_inputs)
        for rule in bound_rules(traced)
        for i in rule.group.leaves
    }
    paths = jax.tree.leaves_with_path(jax.tree.unflatten(traced.tree, traced.leaves))
    return Explanation(
        tuple(
            ParameterRule(
                _validate.leaf_path(path),
                np.shape(leaf),
                decision_of[i].rule,
                decision_of[i].reason,
                traced.num_envs
                * math.prod(np.shape(leaf))
                * jnp.result_type(leaf).itemsize,
                *forms[i],
            )
            for i, (path, leaf) in enumerate(paths)
        ),
        traced.part_size,
        traced.num_envs,
    )
