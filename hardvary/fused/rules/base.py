"""What the rules of the fused oracle share."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate
from hardvary._env_grads.kept import Kept
from hardvary._env_grads.source import Source
from hardvary._env_grads.statistics import MEAN, EnvWeights, along_envs, present
from hardvary._loops import mapped
from hardvary.fused.equations import spreads_nan
from hardvary.fused.grouping import Group
from hardvary.fused.program import Bindings, Value
from hardvary.fused.rules import convolution, factors, layout
from hardvary.fused.rules.factors import Factors
from hardvary.fused.traced import Traced
from hardvary.fused.uses import Use

# Products of the factors' rows; of tiles of the gradients; of the rows of a table that
# two environments share; of gradients that are stacked, held in place of what they are
# made of, or made for some environments at a time; nothing, where there are none.
GramianForm = Literal[
    "rows", "tiles", "matching rows", "stacked", "held", "blocks", "none"
]


class Rule(Source):
    """Gradients of a group of parameters, from what a pass left behind.

    A rule knows how to sum over environments; the rest it overrides where it has a
    faster form than `Source`.

    Attributes:
      kept: what several answers share.
    """

    def __init__(self, traced: Traced, group: Group) -> None:
        self.traced, self.group = traced, group
        self.leaves = [jnp.asarray(traced.leaves[i]) for i in group.leaves]
        self.num_envs = traced.num_envs
        self.kept = Kept()

    def elements(self) -> int:
        """Elements that may be held at once.

        Eight copies of all parameters, or a small part of what the pass left behind.
        """
        traced = self.traced
        left = jax.tree.leaves((traced.saved, traced.cotangents))
        at_least = 8 * sum(np.size(leaf) for leaf in traced.leaves)
        return max(at_least, sum(np.size(leaf) for leaf in left) // 8)

    def stack(self) -> list[jax.Array]:
        return self.pull_several(*self.left_behind())

    def combine(self, weights: EnvWeights) -> list[jax.Array]:
        if self.root is None:
            return self.weighted_sum(weights)
        # One product, where each environment's gradient would take one.
        return self._whiten(self.whitened(None).weighted_sum(weights))

    def weighted_sum(self, weights: EnvWeights) -> list[jax.Array]:
        """As `combine`, of gradients without a root."""
        return self.sums([MEAN], weights)[MEAN]

    @functools.cached_property
    def factors(self) -> Factors | None:
        """Of the only parameter in its only use, None where these are not known."""
        if len(self.group.uses) != 1 or len(self.group.leaves) != 1:
            return None
        return factors.factors_of(
            self.traced.program, self.group.uses[0], self.num_envs
        )

    @property
    def num_inputs(self) -> int | None:
        return None if self.factors is None else self.factors.num_inputs

    def input_moment(self, weights: EnvWeights | None) -> jax.Array:
        assert self.factors is not None
        data, cotangent = (present(x, weights) for x in self._raw_pair())
        if weights is not None:
            roots = along_envs(jnp.sqrt(weights.values), data)
            data = data.astype(_validate.wide(data.dtype)) * roots
        return self.factors.moment(data, cotangent, self.elements())

    def whitened(self, root: jax.Array | None) -> "Rule":
        result = copy.copy(self)
        result.root, result.kept = root, Kept()
        return result

    def _raw_pair(self) -> tuple[jax.Array, jax.Array]:
        """The data that the only parameter meets, and the cotangent; `[env, ...]`."""
        ((data,),), ((cotangent,),) = self.left_behind()
        return data, cotangent

    def times(self, root: jax.Array, parameter: jax.Array) -> jax.Array:
        assert self.factors is not None
        (leaf,), (use,) = self.group.leaves, self.group.uses
        used = layout.as_used(self.traced, use.operands[0], leaf, parameter)
        product = self.factors.times(root, used)
        return layout.in_layout(self.traced, use.operands[0], leaf, product)

    def _whiten(self, parameters: list[jax.Array]) -> list[jax.Array]:
        """The root's transpose, if there is one, times gradients."""
        if self.root is None:
            return parameters
        return [self.times(self.root.T, parameter) for parameter in parameters]

    def gramian_form(self) -> tuple[GramianForm, int]:
        """How `gramian` goes about it, and its multiplications."""
        return "stacked", self.num_envs**2 * self.size

    @property
    def spreads_nan(self) -> bool:
        """Whether `pull` is not to be mapped over environments."""
        uses = [use for use in self.group.uses if not convolution.applies(use)]
        return any(use.eqn is not None and spreads_nan(use.eqn) for use in uses)

    @property
    def size(self) -> int:
        """Number of components of the group's parameters."""
        return sum(leaf.size for leaf in self.leaves)

    def left_behind(self) -> tuple[list[Any], list[Any]]:
        """Saved values and cotangents of all uses, leaves `[env, ...]`."""
        traced, uses = self.traced, self.group.uses
        return (
            [use.at(traced.saved) for use in uses],
            [use.at(traced.cotangents) for use in uses],
        )

    def pull_sum(
        self, saved: Any, cotangents: Any, weights: EnvWeights
    ) -> list[jax.Array]:
        """The weighted sum of all gradients, in one backward pass over the uses."""
        traced, uses = self.traced, self.group.uses
        operands, determine = self._determined()
        there = weights.values != 0
        stand_in = jnp.argmax(there)

        def known(leaf: jax.Array) -> jax.Array:
            # Whatever an absent environment holds, its share has to be 0: as that of
            # one that is there, and counts elsewhere, times a cotangent of 0.
            return jnp.where(along_envs(there, leaf), leaf, leaf[stand_in])

        def weighted(leaf: jax.Array) -> jax.Array:
            share = along_envs(weights.values, leaf).astype(leaf.dtype)
            return jnp.where(share != 0, share * leaf, 0)

        saved = jax.tree.map(known, saved)
        cotangents = jax.tree.map(weighted, cotangents)

        def outputs(*leaves: Any) -> list[Any]:
            given = dict(zip(operands, determine(*leaves), strict=True))

            def of_env(saved: Any) -> list[Any]:
                return [
                    use.local([given[o] for o in use.operands], traced.env, own)
                    for use, own in zip(uses, saved, strict=True)
                ]

            return jax.vmap(of_env, axis_size=self.num_envs)(saved)

        with traced.guard():
            _, back = jax.vjp(outputs, *self.leaves)
            sums = back(cotangents)
        return [
            jnp.where(jnp.any(there), total, 0).astype(_validate.wide(total.dtype))
            for total in sums
        ]

    def _determined(self) -> tuple[list[Value], Callable[..., list[Any]]]:
        """Operands of all uses, and the function of the parameters that makes them."""
        traced, uses = self.traced, self.group.uses
        operands = list(dict.fromkeys(o for use in uses for o in use.operands))
        inputs = [traced.program.inputs[i] for i in self.group.leaves]

        def determine(*leaves: Any) -> list[Any]:
            inside = Bindings(traced.env)
            for value, leaf in zip(inputs, leaves, strict=True):
                inside[value] = leaf
            traced.program.run_hoisted(inside, operands)
            return [inside[operand] for operand in operands]

        return operands, determine

    def pull_several(self, saved: Any, cotangents: Any) -> list[jax.Array]:
        """The gradients `[env, ...]`, from what several environments left behind."""
        if not self.spreads_nan:
            return jax.vmap(self.pull())(saved, cotangents)
        pull = self.pull(alone=True)
        return mapped(lambda left: pull(*left), (saved, cotangents))

    def pull(self, alone: bool = False) -> Callable[[Any, Any], list[jax.Array]]:
        """The gradients, as a function of what one environment left behind.

        Args:
          alone: whether it is taken of one after the other, not mapped over them.
        """
        traced, uses = self.traced, self.group.uses
        operands, determine = self._determined()
        values, back = jax.vjp(determine, *self.leaves)
        given = dict(zip(operands, values, strict=True))

        def pull_all(saved: Any, cotangents: Any) -> list[jax.Array]:
            with traced.guard():
                return pull_uses(saved, cotangents)

        def pull_uses(saved: Any, cotangents: Any) -> list[jax.Array]:
            totals: dict[Value, Any] = {}
            for use, use_saved, use_cotangents in zip(
                uses, saved, cotangents, strict=True
            ):
                arguments = [given[o] for o in use.operands]
                pull_use: Callable[..., Any] = Use.pull
                if convolution.applies(use):
                    pull_use = functools.partial(convolution.pull, alone=alone)
                elif factors.multiplies(use):
                    pull_use = factors.pull
                results = pull_use(
                    use, arguments, traced.env, use_saved, use_cotangents
                )
                for operand, result in zip(use.operands, results, strict=True):
                    if operand in totals:
                        result = jax.lax.add(totals[operand], result)
                    totals[operand] = result
            return self._whiten(list(back([totals[o] for o in operands])))

        return pull_all
