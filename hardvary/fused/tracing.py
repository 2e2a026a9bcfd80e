"""Where parameters meet the batch: a jaxpr as a program whose every use is known.

A loss is traced to a jaxpr and sorted into three kinds of values: what depends on the
batch, what depends on parameters only, and constants. The places where the first two
meet are the *uses* of the parameters.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex

from hardvary._compat import scan_counts
from hardvary.fused.equations import (
    INLINED,
    REMAT,
    axes_of,
    consts_of,
    has_references,
    open_jaxpr,
    spreads_nan,
)
from hardvary.fused.liveness import Liveness
from hardvary.fused.loops import Loop, fixed_inputs
from hardvary.fused.program import (
    Atom,
    Constant,
    Kind,
    Program,
    Step,
    Value,
    kind_of,
)
from hardvary.fused.uses import Copy, Operation

# Operations whose gradient one can take by themselves, environment by environment.
OPERATIONS = (
    "dot_general",
    "conv_general_dilated",
    "gather",
    "dynamic_slice",
    "ragged_dot_general",
    *REMAT,
)


def build(
    jaxpr: Any,
    consts: Sequence[Value],
    kinds: Sequence[Kind],
    live: Sequence[bool],
    liveness: Liveness | None = None,
) -> Program:
    """Sorts a jaxpr.

    Args:
      jaxpr: an open jaxpr.
      consts: values for its constvars.
      kinds: of its inputs.
      live: for each of its outputs, whether gradients flow through it.
      liveness: what is known of the jaxprs inside.

    Returns:
      The program.
    """
    inputs = [
        Value(var.aval, kind) for var, kind in zip(jaxpr.invars, kinds, strict=True)
    ]
    program = Program(inputs)
    builder = _Builder(program, Liveness() if liveness is None else liveness)
    outputs = builder.add(jaxpr, consts, inputs, live)
    program.outputs = [
        builder.copy(atom, "the output") if flag else atom
        for atom, flag in zip(outputs, live, strict=True)
    ]
    return program


class _Builder:
    def __init__(self, program: Program, liveness: Liveness) -> None:
        self._program, self._liveness = program, liveness
        self._copies: dict[Value, Copy] = {}

    def copy(self, atom: Atom, reason: str) -> Atom:
        """`atom`, or its copy for each environment if parameters determine it."""
        if kind_of(atom) is not Kind.PARAM:
            return atom
        if atom not in self._copies:
            self._copies[atom] = Copy(atom, reason)
            self._program.steps.append(self._copies[atom])
        return self._copies[atom].output

    def add(
        self,
        jaxpr: Any,
        consts: Sequence[Atom],
        inputs: Sequence[Atom],
        live: Sequence[bool],
    ) -> list[Atom]:
        """Adds a jaxpr's equations and returns its outputs."""
        matters = self._liveness.variables(jaxpr, live)
        known: dict[Any, Atom] = {}
        known.update(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, jex.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            results = self._equation(
                eqn,
                [read(atom) for atom in eqn.invars],
                [var in matters for var in eqn.outvars],
            )
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: Any, inputs: list[Atom], live: Sequence[bool]
    ) -> list[Atom]:
        name = eqn.primitive.name
        slopes = self._liveness.inputs(eqn, live)
        # What no gradient goes through is a constant to it.
        sides = [
            i
            for i, (atom, slope) in enumerate(zip(inputs, slopes, strict=True))
            if slope and kind_of(atom) is Kind.PARAM
        ]
        taken_apart = bool(sides) and not has_references(eqn)
        if taken_apart and name in INLINED:
            inner = eqn.params[INLINED[name]]
            return self.add(open_jaxpr(inner), self._constants(inner), inputs, live)
        here = bool(eqn.effects) or bool(axes_of(eqn))
        if not here and not any(kind_of(atom) is Kind.BATCH for atom in inputs):
            outputs = [
                Value(var.aval, Kind.PARAM if sides and flag else Kind.CONST)
                for var, flag in zip(eqn.outvars, live, strict=True)
            ]
            self._program.hoisted.append(Step(eqn, inputs, outputs))
            return list(outputs)
        outputs = [Value(var.aval, Kind.BATCH) for var in eqn.outvars]
        if taken_apart and name == "scan" and eqn.params["length"] > 0:
            return self._loop(eqn, inputs, outputs, slopes, live)
        # Copies of a kernel would have their gradients mapped.
        apart = name in OPERATIONS or (taken_apart and spreads_nan(eqn))
        if sides and apart and not here:
            live_outputs = [i for i, flag in enumerate(live) if flag]
            self._program.steps.append(
                Operation(eqn, inputs, outputs, sides, live_outputs)
            )
            return list(outputs)
        for i in sides:
            inputs[i] = self.copy(inputs[i], name)
        self._program.steps.append(Step(eqn, inputs, outputs))
        return list(outputs)

    def _constants(self, jaxpr: Any) -> list[Value]:
        """Values for the constants that a jaxpr holds."""
        values = []
        for const in consts_of(jaxpr):
            values.append(Value(jax.typeof(const), Kind.CONST))
            self._program.hoisted.append(Constant(values[-1], const))
        return values

    def _loop(
        self,
        eqn: Any,
        inputs: list[Atom],
        outputs: list[Value],
        slopes: Sequence[bool],
        live: Sequence[bool],
    ) -> list[Atom]:
        closed = eqn.params["jaxpr"]
        jaxpr = open_jaxpr(closed)
        consts, carries = scan_counts(eqn)
        invariant = [
            i
            for i in range(carries)
            if jaxpr.outvars[i] is jaxpr.invars[consts + i]
            and kind_of(inputs[consts + i]) is not Kind.BATCH
        ]
        kinds = [
            Kind.CONST if kind_of(atom) is Kind.PARAM and not slope else kind_of(atom)
            for atom, slope in zip(inputs, slopes, strict=True)
        ]
        for i in range(carries):
            if i not in invariant:
                where = consts + i
                if kinds[where] is Kind.PARAM:
                    inputs[where] = self.copy(inputs[where], "a loop changes it")
                kinds[where] = Kind.BATCH
        inner_consts = [
            Value(jax.typeof(const), Kind.CONST) for const in consts_of(closed)
        ]
        flags = self._liveness.body_outputs(closed, consts, carries, live)
        flags = [flag and i not in invariant for i, flag in enumerate(flags)]
        body = build(jaxpr, inner_consts, kinds, flags, self._liveness)
        body.hoisted[:0] = map(Constant, inner_consts, consts_of(closed))
        fixed = {body.inputs[i]: inputs[i] for i in fixed_inputs(eqn, invariant)}
        copied = self._copies_outside(body, fixed)
        self._program.steps.append(Loop(eqn, inputs, outputs, body, invariant, copied))
        results: list[Atom] = list(outputs)
        for i in invariant:
            results[i] = inputs[consts + i]
        return results

    def _copies_outside(
        self, body: Program, fixed: dict[Value, Atom]
    ) -> list[tuple[Value, Value]]:
        """Copies what no step of a loop changes here, rather than at each step.

        Args:
          body: of the loop; these copies are removed from it.
          fixed: its inputs that are the same at each step, and what they are here.

        Returns:
          For each copy its value in the body and the one here.
        """
        copied, known = [], dict(fixed)
        for site in body.sites:
            if not isinstance(site, Copy):
                continue
            steps, wanted = body.computing([site.value])
            if any(value in wanted and value not in fixed for value in body.inputs):
                continue
            for step in steps:
                if step.outputs[0] not in known:
                    here = [Value(value.aval, value.kind) for value in step.outputs]
                    inputs = [
                        known[atom] if isinstance(atom, Value) else atom
                        for atom in step.inputs
                    ]
                    self._program.hoisted.append(step.elsewhere(inputs, here))
                    known.update(zip(step.outputs, here, strict=True))
            copied.append((site.output, self.copy(known[site.value], site.reason)))
            body.steps.remove(site)
        return copied
