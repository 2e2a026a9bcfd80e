"""Collectives in a loss: over which axes, and of what."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

from hardvary._compat import scan_counts
from hardvary.fused.equations import (
    CUSTOM_RULES,
    INLINED,
    REMAT,
    axes_of,
    consts_of,
    has_references,
    open_jaxpr,
)
from hardvary.fused.liveness import Liveness
from hardvary.fused.program import Kind


def refuse_mixed_parameters(
    closed: Any,
    kinds: Sequence[Kind],
    live: Sequence[bool],
    axis_names: Sequence[str],
) -> None:
    """Raises ValueError for parameters that a loss collects from several devices.

    Args:
      closed: the loss as a jaxpr.
      kinds: of its inputs.
      live: outputs through which gradients flow.
      axis_names: axes over which environments are spread, so that parameters must be
        the same along them.
    """
    axes = frozenset(axis_names)
    if not any(axes & axes_of(eqn) for eqn in closed.jaxpr.eqns):
        return
    search = _Search(axes)
    search.outputs(closed, kinds, live)
    if search.found:
        eqn = search.found[0]
        names = sorted(axes & axes_of(eqn))
        raise ValueError(
            f"loss_fn collects parameters over the axis {', '.join(map(repr, names))} "
            f"({eqn.primitive.name}), over which axis_name says that environments are "
            "spread: a parameter must be whole, and the same, on each of its devices; "
            "gather it before the call (jax.lax.all_gather, then grad_stats)"
        )


class _Search:
    """A walk through a jaxpr, for collectives of what parameters determine."""

    def __init__(self, axes: frozenset[str]) -> None:
        self.found: list[Any] = []
        self._axes = axes
        self._liveness = Liveness()

    def outputs(
        self, jaxpr: Any, kinds: Sequence[Kind], live: Sequence[bool]
    ) -> list[Kind]:
        """Kinds of a jaxpr's outputs, from those of its inputs."""
        consts, jaxpr = consts_of(jaxpr), open_jaxpr(jaxpr)
        matters = self._liveness.variables(jaxpr, live)
        known = dict.fromkeys(jaxpr.constvars[: len(consts)], Kind.CONST)
        known |= zip(jaxpr.invars, kinds, strict=True)

        def read(atom: Any) -> Kind:
            if isinstance(atom, jex.Literal):
                return Kind.CONST
            return known.get(atom, Kind.CONST)

        for eqn in jaxpr.eqns:
            flags = [var in matters for var in eqn.outvars]
            slopes = self._liveness.inputs(eqn, flags)
            inputs = [
                Kind.CONST if kind is Kind.PARAM and not slope else kind
                for kind, slope in zip(map(read, eqn.invars), slopes, strict=True)
            ]
            known |= zip(eqn.outvars, self._equation(eqn, inputs, flags), strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: Any, inputs: list[Kind], live: Sequence[bool]
    ) -> list[Kind]:
        name, params = eqn.primitive.name, eqn.params
        if has_references(eqn):
            return self._whole(eqn, inputs, live)
        if name in INLINED or name in REMAT or name in CUSTOM_RULES:
            key = "call_jaxpr" if "call_jaxpr" in params else "jaxpr"
            if key in params:
                return self.outputs(params[key], inputs, live)
        if name == "cond":
            branches = [self.outputs(b, inputs[1:], live) for b in params["branches"]]
            return [_join([inputs[0], *kinds]) for kinds in zip(*branches, strict=True)]
        if name == "scan":
            consts, carries = scan_counts(eqn)
            return self._loop(eqn, params["jaxpr"], inputs, consts, carries, live)
        if name == "while" and "body_nconsts" in params:
            before, consts = params["cond_nconsts"], params["body_nconsts"]
            return self._loop(
                eqn, params["body_jaxpr"], inputs[before:], consts, len(live), live
            )
        return self._whole(eqn, inputs, live)

    def _whole(self, eqn: Any, inputs: list[Kind], live: Sequence[bool]) -> list[Kind]:
        together = _join(inputs)
        if together is Kind.PARAM and any(live) and self._axes & axes_of(eqn):
            self.found.append(eqn)
        return [together] * len(eqn.outvars)

    def _loop(
        self,
        eqn: Any,
        jaxpr: Any,
        inputs: list[Kind],
        consts: int,
        carries: int,
        live: Sequence[bool],
    ) -> list[Kind]:
        live = self._liveness.body_outputs(jaxpr, consts, carries, live)
        inputs, before = list(inputs), len(self.found)
        while True:
            # What a first look found may depend on the batch from the second step on.
            del self.found[before:]
            outputs = self.outputs(jaxpr, inputs, live)
            carry = [
                _join(pair)
                for pair in zip(inputs[consts:], outputs[:carries], strict=False)
            ]
            if carry == inputs[consts : consts + carries]:
                return outputs
            inputs[consts : consts + carries] = carry


def _join(kinds: Sequence[Kind]) -> Kind:
    for kind in (Kind.BATCH, Kind.PARAM):
        if kind in kinds:
            return kind
    return Kind.CONST
