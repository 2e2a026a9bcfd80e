"""Values of a jaxpr that a gradient of its outputs goes through.

Where none goes through, slopes do not matter, and they may be infinite: a metric that
is reported beside the loss must not touch the gradient. Symbolic zeros of JAX's own
differentiation say the same, from the loss backwards, once it runs.
"""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

from hardvary._compat import scan_counts
from hardvary.fused.equations import (
    INLINED,
    REMAT,
    has_references,
    inexact,
    open_jaxpr,
)

# Operations on floating-point numbers whose derivative is zero everywhere.
FLAT = (
    "stop_gradient",
    "sign",
    "floor",
    "ceil",
    "round",
    "bitcast_convert_type",
)


class Liveness:
    """The analysis; it remembers the jaxprs that it has seen."""

    def __init__(self) -> None:
        # With the jaxpr itself, so that its id stays its own.
        self._known: dict[tuple[int, tuple[bool, ...]], tuple[Any, set[Any]]] = {}

    def variables(self, jaxpr: Any, outputs: Sequence[bool]) -> set[Any]:
        """Variables of an open jaxpr that gradients of `outputs` go through."""
        key = (id(jaxpr), tuple(outputs))
        if key not in self._known:
            live = {
                var
                for var, flag in zip(jaxpr.outvars, outputs, strict=True)
                if flag and _differentiable(var)
            }
            for eqn in reversed(jaxpr.eqns):
                flags = [var in live for var in eqn.outvars]
                if any(flags):
                    live |= {
                        var
                        for var, flag in zip(
                            eqn.invars, self.inputs(eqn, flags), strict=True
                        )
                        if flag and _differentiable(var)
                    }
            self._known[key] = (jaxpr, live)
        return self._known[key][1]

    def inputs(self, eqn: Any, outputs: Sequence[bool]) -> list[bool]:
        """Whether gradients of an equation's `outputs` reach each of its inputs."""
        name, params = eqn.primitive.name, eqn.params
        if name in FLAT or not any(outputs):
            return [False] * len(eqn.invars)
        if has_references(eqn):
            # What is written to one comes out where it is read.
            return [True] * len(eqn.invars)
        if name in INLINED or name in REMAT:
            return self._inside(params[INLINED.get(name, "jaxpr")], outputs)
        if name == "cond":
            branches = [self._inside(b, outputs) for b in params["branches"]]
            return [False, *map(any, zip(*branches, strict=True))]
        if name == "scan":
            consts, carries = scan_counts(eqn)
            return self._loop(
                params["jaxpr"], consts, carries, params["length"], outputs
            )
        if name == "while" and "body_nconsts" in params:
            before, consts = params["cond_nconsts"], params["body_nconsts"]
            carries = len(outputs)
            inside = self._loop(params["body_jaxpr"], consts, carries, None, outputs)
            return [False] * before + inside
        # A rule of somebody's own may do anything.
        return [True] * len(eqn.invars)

    def _inside(self, jaxpr: Any, outputs: Sequence[bool]) -> list[bool]:
        jaxpr = open_jaxpr(jaxpr)
        live = self.variables(jaxpr, outputs)
        return [var in live for var in jaxpr.invars]

    def body_outputs(
        self, jaxpr: Any, consts: int, carries: int, outputs: Sequence[bool]
    ) -> list[bool]:
        """Whether each output of a loop's body is live, where the loop's `outputs` are.

        Args:
          jaxpr: the body: constants, carries, and slices of what it runs over, to
            carries and further outputs.
          consts: how many constants.
          carries: how many carries.
          outputs: flags of the loop's outputs.
        """
        flags = list(outputs)
        while True:
            inputs = self._inside(jaxpr, flags)
            # What a step hands to the next one matters if it matters there.
            again = inputs[consts : consts + carries]
            carry = [i or j for i, j in zip(flags[:carries], again, strict=True)]
            if carry == flags[:carries]:
                return flags
            flags[:carries] = carry

    def _loop(
        self,
        jaxpr: Any,
        consts: int,
        carries: int,
        length: int | None,
        outputs: Sequence[bool],
    ) -> list[bool]:
        inputs = self._inside(jaxpr, self.body_outputs(jaxpr, consts, carries, outputs))
        if not length:
            # No step, perhaps: then what goes in comes out.
            inputs = inputs if length is None else [False] * len(inputs)
            for i in range(carries):
                inputs[consts + i] |= outputs[i]
        return inputs


def _differentiable(var: Any) -> bool:
    return (
        not isinstance(var, jex.Literal)
        and inexact(var.aval)
        # What has no entries has no gradient.
        and 0 not in var.aval.shape
    )
