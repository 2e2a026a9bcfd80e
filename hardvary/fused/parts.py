"""How many environments a pass takes at a time, where nobody says so."""

import math
from typing import Any

import jax

from hardvary import _compat, sharding
from hardvary._loops import divisor
from hardvary.fused.program import Kind, Program

# Bytes of all cotangents from which on parts are faster, and of a part's. What is there
# at the same time is about three times as large, and above 32 MB an allocator takes it
# from the system anew at every call, page by page
# (`findings/xla_cpu_temporary_memory_is_new_each_call.sh`).
_LARGE, _PART = 20 * 10**6, 12 * 10**6
# Of a part below which operations are too small, as where there are a prime number of
# environments.
_SMALLEST = 3 * 10**6


def part_size(program: Program, num_envs: int) -> int:
    """Environments that are faster taken together, a divisor of their number.

    Measured on CPU, with jax 0.10.2 and 0.12.0; on accelerators and before, all.
    """
    spread = not jax.sharding.get_abstract_mesh().empty
    if spread or not sharding.on_cpu() or not _compat.NEW_CPU_LIBRARY:
        return num_envs
    one = _bytes(jax.eval_shape(program.zeros))
    if one * num_envs < _LARGE:
        return num_envs
    size = divisor(num_envs, _PART // one)
    params = [value.aval for value in program.inputs if value.kind is Kind.PARAM]
    # Every part adds to two sums for each parameter.
    added = 2 * _bytes(params) * (num_envs // size)
    few = size * one < _SMALLEST or added > num_envs * one
    return num_envs if few else size


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
