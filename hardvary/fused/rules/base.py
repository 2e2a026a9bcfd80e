"""What the rules of the fused oracle share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hardvary._env_grads.source import Source
from hardvary.fused.grouping import Group
from hardvary.fused.program import Bindings, Value
from hardvary.fused.rules import convolution
from hardvary.fused.traced import Traced
from hardvary.fused.uses import Use


class Rule(Source):
    """Gradients of a group of parameters, from what a pass left behind.

    A rule knows how to sum over environments; the rest it overrides where it has a
    faster form than `Source`.
    """

    def __init__(self, traced: Traced, group: Group) -> None:
        self.traced, self.group = traced, group
        self.leaves = [jnp.asarray(traced.leaves[i]) for i in group.leaves]
        self.num_envs = traced.num_envs

    def stack(self) -> list[jax.Array]:
        return jax.vmap(self.pull())(*self.left_behind())

    def left_behind(self) -> tuple[list[Any], list[Any]]:
        """Saved values and cotangents of all uses, leaves `[env, ...]`."""
        traced, uses = self.traced, self.group.uses
        return (
            [use.at(traced.saved) for use in uses],
            [use.at(traced.cotangents) for use in uses],
        )

    def pull(self) -> Callable[[Any, Any], list[jax.Array]]:
        """The gradients, as a function of what one environment left behind."""
        traced, uses = self.traced, self.group.uses
        program = traced.program
        operands = list(dict.fromkeys(o for use in uses for o in use.operands))
        inputs = [program.inputs[i] for i in self.group.leaves]

        def determine(*leaves: Any) -> list[Any]:
            inside = Bindings(traced.env)
            for value, leaf in zip(inputs, leaves, strict=True):
                inside[value] = leaf
            program.run_hoisted(inside, operands)
            return [inside[operand] for operand in operands]

        values, back = jax.vjp(determine, *self.leaves)
        given = dict(zip(operands, values, strict=True))

        def pull_all(saved: Any, cotangents: Any) -> list[jax.Array]:
            totals: dict[Value, Any] = {}
            for use, use_saved, use_cotangents in zip(
                uses, saved, cotangents, strict=True
            ):
                arguments = [given[o] for o in use.operands]
                pull_use = convolution.pull if convolution.applies(use) else Use.pull
                results = pull_use(
                    use, arguments, traced.env, use_saved, use_cotangents
                )
                for operand, result in zip(use.operands, results, strict=True):
                    if operand in totals:
                        result = jax.lax.add(totals[operand], result)
                    totals[operand] = result
            return list(back([totals[operand] for operand in operands]))

        return pull_all
