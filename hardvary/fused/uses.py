"""Uses of the parameters: where what they determine meets the batch.

Each use hands out what its weight gradient is made of, the batch-dependent inputs and
the cotangents of its outputs, so that nobody has to stack the gradients themselves.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hardvary._compat import vary, varying_axes
from hardvary.fused import rewrites
from hardvary.fused.equations import REMAT, bind, run_jaxpr
from hardvary.fused.program import Atom, Bindings, Kind, Value, kind_of


@dataclasses.dataclass(eq=False)
class Use:
    """One way in which values that only parameters determine meet the batch.

    Attributes:
      primitive: name of the operation.
      operands: the values that parameters determine.
      local: `(operands, bindings, saved) -> outputs`, the operation for one
        environment.
      eqn, side: the equation and the position of the only operand in it, where the
        use is one equation with one operand; None and -1 elsewhere.
      steps: lengths of the loops around it: axes of what it saves, and of its
        cotangents.
      path: where a program's saved values and cotangents hold this use's.
      reason: why the operands were copied for each environment, if they were.
      constants: what `local` reads from `bindings`.
    """

    primitive: str
    operands: tuple[Value, ...]
    local: Callable[[Sequence[Any], Bindings, Any], list[Any]]
    eqn: Any = None
    side: int = -1
    steps: tuple[int, ...] = ()
    path: tuple[int, ...] = ()
    reason: str = ""
    constants: tuple[Value, ...] = ()

    def at(self, tree: Any) -> Any:
        for index in self.path:
            tree = tree[index]
        return tree

    def pull(
        self, operands: Sequence[Any], bindings: Bindings, saved: Any, cotangents: Any
    ) -> Any:
        """Cotangents of the operands, from those of the outputs; one environment."""
        _, vjp = jax.vjp(lambda *values: self.local(values, bindings, saved), *operands)
        return vjp(list(cotangents))


class Site(abc.ABC):
    """A place in a program where there are uses.

    `zeros()` are added to the outputs: their gradients are the cotangents.
    """

    uses: list[Use]

    @abc.abstractmethod
    def zeros(self) -> Any: ...

    @abc.abstractmethod
    def run(self, bindings: Bindings, zeros: Any) -> Any:
        """Computes the outputs into `bindings` and returns what uses need saved."""


class Copy(Site):
    """A copy of a value for each environment: right for any use whatsoever."""

    def __init__(self, value: Value, reason: str) -> None:
        self.value, self.output = value, Value(value.aval, Kind.BATCH)
        self.reason = reason
        self.uses = [
            Use(
                "copy",
                (value,),
                lambda operands, bindings, saved: list(operands),
                reason=reason,
            )
        ]

    def zeros(self) -> Any:
        return [_zeros(self.value.aval)]

    def run(self, bindings: Bindings, zeros: Any) -> Any:
        bindings[self.output] = _plus(bindings[self.value], zeros[0])
        return []


class Operation(Site):
    """An equation with parameters among its inputs.

    Args:
      eqn: the equation.
      inputs: its inputs.
      outputs: its outputs.
      sides: positions of the inputs that are operands.
      live: positions of the outputs that gradients come from.
    """

    def __init__(
        self,
        eqn: Any,
        inputs: Sequence[Atom],
        outputs: Sequence[Value],
        sides: Sequence[int],
        live: Sequence[int],
    ) -> None:
        self._eqn, self._inputs, self._outputs = eqn, inputs, outputs
        self._live = live
        self._saved = [
            i for i, atom in enumerate(inputs) if kind_of(atom) is Kind.BATCH
        ]
        constants = {
            i: atom
            for i, atom in enumerate(inputs)
            if i not in sides and i not in self._saved
        }

        def local(values: Sequence[Any], bindings: Bindings, saved: Any) -> list[Any]:
            given = {i: bindings[atom] for i, atom in constants.items()}
            given |= zip(sides, values, strict=True)
            given |= zip(self._saved, saved, strict=True)
            arguments = [given[i] for i in range(len(inputs))]
            if eqn.primitive.name in REMAT:
                # What is recomputed one environment at a time needs no second
                # recomputation.
                results = run_jaxpr(eqn.params["jaxpr"], arguments)
            else:
                results = bind(eqn, arguments)
            return [results[i] for i in live]

        self.uses = [
            Use(
                eqn.primitive.name,
                tuple(inputs[i] for i in sides),
                local,
                eqn,
                side=sides[0] if len(sides) == 1 else -1,
                constants=tuple(a for a in constants.values() if isinstance(a, Value)),
            )
        ]

    def zeros(self) -> Any:
        return [_zeros(self._outputs[i].aval) for i in self._live]

    def run(self, bindings: Bindings, zeros: Any) -> Any:
        arguments = [bindings[atom] for atom in self._inputs]
        mapped = [i in self._saved for i in range(len(self._inputs))]
        results = rewrites.run(self._eqn, arguments, mapped)
        for i, zero in zip(self._live, zeros, strict=True):
            results[i] = _plus(results[i], zero)
        bindings.update(self._outputs, results)
        return [bindings[self._inputs[i]] for i in self._saved]


def _zeros(aval: Any) -> jax.Array:
    zeros = jnp.zeros(aval.shape, aval.dtype)
    varying = tuple(sorted(varying_axes(aval)))
    # A gradient is summed over the axes that its variable does not vary over.
    return vary(zeros, varying) if varying else zeros


def _plus(value: Any, zero: jax.Array) -> jax.Array:
    return jax.lax.add(jnp.asarray(value, zero.dtype), zero)
