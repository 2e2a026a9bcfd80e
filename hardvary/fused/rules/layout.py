"""From the layout in which a parameter is used to its own."""

import math
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from hardvary.fused.program import Bindings, Program, Value
from hardvary.fused.traced import Traced

# Equations that rearrange a parameter, entry by entry.
LAYOUT = ("reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p")
CASTS = ("convert_element_type",)


def in_layout(traced: Traced, value: Value, leaf: int, total: jax.Array) -> jax.Array:
    """Rearranges an array in the layout of `value` to that of the parameter."""
    program = traced.program
    source = program.inputs[leaf]
    steps, _ = program.needed([value])

    def rearrange(entries: jax.Array) -> jax.Array:
        bindings = Bindings()
        bindings[source] = entries
        for step in steps:
            if step.eqn.primitive.name in CASTS:
                bindings[step.outputs[0]] = bindings[step.inputs[0]]
            else:
                step.run(bindings)
        return bindings[value]

    like = jax.ShapeDtypeStruct(source.aval.shape, total.dtype)
    if not steps:
        return total
    (result,) = jax.linear_transpose(rearrange, like)(total)
    return result


def is_rearranged(program: Program, value: Value) -> bool:
    """Whether `value` is a parameter with its entries rearranged or cast, no more."""
    steps, _ = program.needed([value])
    for step in steps:
        name = step.eqn.primitive.name if step.eqn is not None else "constant"
        if name in LAYOUT or name in CASTS:
            continue
        if name == "broadcast_in_dim" and step.outputs[0].size == _size(step.inputs[0]):
            continue
        return False
    return True


def _size(atom: Any) -> int:
    return math.prod(
        np.shape(atom.val) if isinstance(atom, jex.Literal) else atom.aval.shape
    )
