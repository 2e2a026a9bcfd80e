"""From the layout in which a parameter is used to its own."""

import functools
import math
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from hardvary import sharding
from hardvary.fused.program import Bindings, Program, Value
from hardvary.fused.traced import Traced

# Equations that rearrange a parameter, entry by entry.
LAYOUT = ("reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p")
CASTS = ("convert_element_type",)


def in_layout(traced: Traced, value: Value, leaf: int, total: jax.Array) -> jax.Array:
    """Rearranges an array in the layout of `value` to that of the parameter."""
    source = traced.program.inputs[leaf]
    # Not jax.linear_transpose, which knows nothing of values that differ between
    # devices.
    zeros = sharding.vary_like(jnp.zeros(source.aval.shape, total.dtype), total)
    _, back = jax.vjp(functools.partial(as_used, traced, value, leaf), zeros)
    (result,) = back(total)
    return result


def as_used(traced: Traced, value: Value, leaf: int, entries: jax.Array) -> jax.Array:
    """Rearranges an array in the layout of the parameter to that of `value`."""
    program = traced.program
    steps, _ = program.needed([value])
    bindings = Bindings()
    bindings[program.inputs[leaf]] = entries
    for step in steps:
        if step.eqn.primitive.name in CASTS:
            bindings[step.outputs[0]] = bindings[step.inputs[0]]
        else:
            step.run(bindings)
    return bindings[value]


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
