"""A loss as a program: its values, what determines them, and its steps."""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.extend.core as jex

from hardvary.fused import equations, rewrites

if TYPE_CHECKING:
    from hardvary.fused.uses import Site, Use

Atom = Any  # Value | jex.Literal


class Kind(enum.Enum):
    """What a value depends on."""

    # Or parameters, by ways that no gradient takes.
    CONST = "constants"
    PARAM = "parameters"
    BATCH = "batch"


@dataclasses.dataclass(eq=False)
class Value:
    """A value of the program; compared by identity, as jaxpr variables are."""

    aval: Any
    kind: Kind

    @property
    def size(self) -> int:
        return math.prod(self.aval.shape)


def kind_of(atom: Atom) -> Kind:
    return atom.kind if isinstance(atom, Value) else Kind.CONST


class Bindings:
    """Results of values that have been computed, on top of those of an outer one."""

    def __init__(self, outer: "Bindings | None" = None) -> None:
        self._own: dict[Value, Any] = {}
        self._outer = outer

    def __setitem__(self, value: Value, result: Any) -> None:
        self._own[value] = result

    def __getitem__(self, atom: Atom) -> Any:
        if isinstance(atom, jex.Literal):
            return atom.val
        if atom in self._own:
            return self._own[atom]
        assert self._outer is not None
        return self._outer[atom]

    def update(self, values: Sequence[Value], results: Sequence[Any]) -> None:
        self._own.update(zip(values, results, strict=True))


@dataclasses.dataclass(eq=False)
class Step:
    """An equation as it stands."""

    eqn: Any
    inputs: Sequence[Atom]
    outputs: Sequence[Value]

    def run(self, bindings: Bindings) -> None:
        arguments = [bindings[atom] for atom in self.inputs]
        mapped = [kind_of(atom) is Kind.BATCH for atom in self.inputs]
        results = rewrites.run(self.eqn, arguments, mapped)
        bindings.update(self.outputs, results)

    def elsewhere(self, inputs: Sequence[Atom], outputs: Sequence[Value]) -> "Step":
        """The same of other values."""
        return Step(self.eqn, inputs, outputs)


class Constant(Step):
    """A constant that a nested jaxpr holds."""

    def __init__(self, output: Value, const: Any) -> None:
        super().__init__(None, [], [output])
        self._const = const

    def run(self, bindings: Bindings) -> None:
        bindings[self.outputs[0]] = equations.as_array(self._const)

    def elsewhere(self, inputs: Sequence[Atom], outputs: Sequence[Value]) -> Step:
        del inputs
        return Constant(outputs[0], self._const)


@dataclasses.dataclass(eq=False)
class Program:
    """A jaxpr, sorted.

    Attributes:
      inputs: as in the jaxpr.
      hoisted: what parameters and constants determine, the same for all environments.
      steps: everything else, in order.
      outputs: as in the jaxpr.
    """

    inputs: list[Value]
    hoisted: list[Step] = dataclasses.field(default_factory=list)
    steps: "list[Step | Site]" = dataclasses.field(default_factory=list)
    outputs: list[Atom] = dataclasses.field(default_factory=list)

    @property
    def sites(self) -> "list[Site]":
        return [step for step in self.steps if not isinstance(step, Step)]

    @property
    def uses(self) -> "list[Use]":
        return [
            dataclasses.replace(use, path=(index, *use.path))
            for index, site in enumerate(self.sites)
            for use in site.uses
        ]

    def needed(self, targets: Sequence[Atom]) -> tuple[list[Step], set[Value]]:
        """The steps by which parameters determine `targets`, and what these read.

        Gradients go back by these steps. What else they read has a value of its own.
        """
        return self._leading_to(targets, (Kind.PARAM,))

    def computing(self, targets: Sequence[Atom]) -> tuple[list[Step], set[Value]]:
        """All hoisted steps that compute `targets`, and what these read."""
        return self._leading_to(targets, (Kind.PARAM, Kind.CONST))

    def _leading_to(
        self, targets: Sequence[Atom], kinds: Sequence[Kind]
    ) -> tuple[list[Step], set[Value]]:
        wanted = {t for t in targets if isinstance(t, Value)}
        steps = []
        for step in reversed(self.hoisted):
            if any(
                output in wanted and output.kind in kinds for output in step.outputs
            ):
                steps.append(step)
                wanted |= {a for a in step.inputs if isinstance(a, Value)}
        return steps[::-1], wanted

    def roots(self, targets: Sequence[Atom]) -> list[Value]:
        """The inputs of kind PARAM that `targets` depend on."""
        _, wanted = self.needed(targets)
        return [v for v in self.inputs if v in wanted and v.kind is Kind.PARAM]

    def run_hoisted(
        self, bindings: Bindings, targets: Sequence[Atom] | None = None
    ) -> None:
        """Computes all that is hoisted, or `targets` again, from other parameters."""
        for step in self.hoisted if targets is None else self.needed(targets)[0]:
            step.run(bindings)

    def zeros(self) -> Any:
        return [site.zeros() for site in self.sites]

    def run(self, bindings: Bindings, zeros: Any) -> Any:
        """Computes all that depends on the batch and returns what uses need saved."""
        saved, zeros = [], iter(zeros)
        for step in self.steps:
            if isinstance(step, Step):
                step.run(bindings)
            else:
                saved.append(step.run(bindings, next(zeros)))
        return saved
