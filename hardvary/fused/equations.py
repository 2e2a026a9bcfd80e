"""Equations of jaxprs: applying them again, and what is inside of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from hardvary import _compat, sharding

# Calls whose jaxpr may as well stand in their place: name -> where they hold it.
INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
REMAT = ("checkpoint", "remat", "remat2")
# Functions with derivatives of their own, which are Python code of the user's.
CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")

# Operations whose first input is indexed by the others.
INDEXING = ("gather", "dynamic_slice")

# Equations that name an axis and send nothing over it.
_SILENT = (
    "axis_index",
    "pvary",
    "preduced",
    "reduced_vary_cast",
    "vary_unreduced_cast",
    "vary_unreduced_cast_p",
)

_NO_DEBUG_INFO = _compat.DebugInfo("hardvary", "", (), ())


def bind(eqn: Any, arguments: Sequence[Any]) -> list[Any]:
    """Applies an equation to other arguments."""
    if eqn.primitive.name in INDEXING:
        eqn, arguments = _with_wide_indices(eqn, arguments)
    if eqn.primitive.name in CUSTOM_RULES:
        eqn, arguments = _with_arrays(eqn, arguments)
    given = {
        var: argument
        for var, argument in zip(eqn.invars, arguments, strict=True)
        if not isinstance(var, jex.Literal)
    }
    jaxpr = jex.Jaxpr(
        constvars=(),
        invars=list(given),
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=_NO_DEBUG_INFO,
    )
    return list(jax.core.eval_jaxpr(jaxpr, (), *given.values()))


def bind_mapped(
    eqn: Any, arguments: Sequence[Any], mapped: Sequence[bool]
) -> list[Any]:
    """As `bind`, of arguments of which some are mapped over environments.

    Where a condition is mapped, JAX maps all that the branches are given, kernels too.
    """
    branches = eqn.primitive.name == "cond" and mapped[0]
    branches = branches or (any(mapped) and _holds_branches(eqn))
    alone = branches and spreads_nan(eqn) and not (eqn.effects or axes_of(eqn))
    return (_one_by_one if alone else bind)(eqn, arguments)


def _holds_branches(eqn: Any) -> bool:
    """Whether there is a condition inside, of which nobody knows if it is mapped."""
    inside = [e for jaxpr in _compat.jaxprs_in_params(eqn.params) for e in jaxpr.eqns]
    names = [e.primitive.name for e in inside]
    return "cond" in names or any(map(_holds_branches, inside))


def _one_by_one(eqn: Any, arguments: Sequence[Any]) -> list[Any]:
    """As `bind_mapped`, for one environment after the other."""
    slopes = [i for i, var in enumerate(eqn.invars) if inexact(var.aval)]

    def apply(*arguments: Any) -> list[Any]:
        return bind(eqn, arguments)

    def pull(arguments: Sequence[Any], cotangents: Any) -> list[Any]:
        def of_slopes(*values: Any) -> list[Any]:
            given = dict(zip(slopes, values, strict=True))
            return apply(*(given.get(i, x) for i, x in enumerate(arguments)))

        _, vjp = jax.vjp(of_slopes, *(arguments[i] for i in slopes))
        return list(vjp(cotangents))

    repeated = jax.custom_batching.sequential_vmap(apply)

    def back(arguments: Any, cotangents: Any) -> tuple[Any, ...]:
        pulled = jax.custom_batching.sequential_vmap(pull)(arguments, cotangents)
        given = dict(zip(slopes, pulled, strict=True))
        return tuple(given.get(i) for i in range(len(arguments)))

    result = jax.custom_vjp(repeated)
    result.defvjp(lambda *arguments: (repeated(*arguments), arguments), back)
    return list(result(*arguments))


def _with_arrays(eqn: Any, arguments: Sequence[Any]) -> tuple[Any, list[Any]]:
    """`eqn` and its arguments with JAX arrays where a jaxpr holds NumPy's.

    A user's rule may index them with a traced integer or use `.at`.
    """
    invars, results, new_var = [], [], _compat.gensym()
    for var, argument in zip(eqn.invars, arguments, strict=True):
        # A Python number is what the user's function was given.
        if isinstance(var, jex.Literal) and hasattr(argument, "ndim"):
            var = new_var(var.aval)
        invars.append(var)
        results.append(as_array(argument) if hasattr(argument, "ndim") else argument)
    return eqn.replace(invars=invars), results


def _with_wide_indices(eqn: Any, arguments: Sequence[Any]) -> tuple[Any, list[Any]]:
    """`eqn` and its arguments with the indices of one type, literal ones too."""
    (operand, *indices), new_var = arguments, _compat.gensym()
    invars = [eqn.invars[0], *(new_var(var.aval) for var in eqn.invars[1:])]
    return eqn.replace(invars=invars), [operand, *map(wide_indices, indices)]


def wide_indices(indices: Any) -> jax.Array:
    """`indices` in a type of at least 32 bits.

    A narrow one may be too small for the size of what they index, with which they are
    compared: XLA's scatter, of the gradients, may then wrap that size around.
    """
    indices = jnp.asarray(indices)
    narrow = jnp.iinfo(indices.dtype).bits < 32
    return indices.astype(jnp.int32) if narrow else indices


def as_array(constant: Any) -> Any:
    """A JAX array of a constant that a jaxpr holds."""
    return constant if isinstance(constant, jax.Array) else jnp.asarray(constant)


def run_jaxpr(jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
    closed = jex.ClosedJaxpr(open_jaxpr(jaxpr), list(map(as_array, consts_of(jaxpr))))
    return list(jex.jaxpr_as_fun(closed)(*arguments))


def open_jaxpr(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


def consts_of(jaxpr: Any) -> Sequence[Any]:
    return jaxpr.consts if isinstance(jaxpr, jex.ClosedJaxpr) else ()


def has_references(eqn: Any) -> bool:
    """Whether an equation holds mutable references (`jax.new_ref`) of its own."""
    return any("MutableArray" in type(effect).__name__ for effect in eqn.effects)


def axes_of(eqn: Any) -> frozenset[str]:
    """Names of the axes that an equation, or what it holds, communicates over."""
    own: set[str] = set()
    if eqn.primitive.name not in _SILENT:
        for key in ("axes", "axis_name"):
            names = eqn.params.get(key, ())
            names = names if isinstance(names, tuple) else (names,)
            own |= {name for name in names if isinstance(name, str)}
    for jaxpr in _compat.jaxprs_in_params(eqn.params):
        own = own.union(*map(axes_of, jaxpr.eqns))
    return frozenset(own)


def spreads_nan(eqn: Any) -> bool:
    """Whether a NaN of one environment may reach others, where an equation is mapped.

    A convolution, by itself or inside of the equation, gets groups, or more of them,
    where its kernel or the gradient of one is mapped. XLA on a CPU multiplies what is
    outside of a group by zeros, but for float32 and narrower without groups before.
    """
    inside = (e for jaxpr in _compat.jaxprs_in_params(eqn.params) for e in jaxpr.eqns)
    if eqn.primitive.name != "conv_general_dilated":
        return any(map(spreads_nan, inside))
    groups = max(eqn.params["feature_group_count"], eqn.params["batch_group_count"])
    wide = eqn.outvars[0].aval.dtype.itemsize > 4
    return sharding.on_cpu() and (groups > 1 or wide)


def inexact(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
