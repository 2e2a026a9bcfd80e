"""What the fused oracle says of a loss that it cannot take apart."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex

from hardvary._typing import PyTree
from hardvary.fused.equations import consts_of, open_jaxpr

# Faults of the machine or found by a debugger, not of the program.
_OF_RUNNING = (jax.errors.JaxRuntimeError, FloatingPointError, MemoryError)


def refuse_side_effects(effects: Any) -> None:
    """Raises ValueError for what a loss must not do while it is differentiated.

    Printing for debugging may stay, references that the loss makes itself are no one
    else's matter, and a use of a mapped axis counts as an effect.
    """
    harmless = (
        "DebugEffect",
        "OrderedDebugEffect",
        "NamedAxisEffect",
        "InternalMutableArrayEffect",
    )
    harmful = sorted(
        {str(effect) for effect in effects if type(effect).__name__ not in harmless}
    )
    if harmful:
        raise ValueError(
            f"loss_fn must not have side effects, got {', '.join(harmful)}: return the "
            "value as aux (has_aux=True) and act on it outside"
        )


@contextlib.contextmanager
def naming_the_way_out(
    loss_fn: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
    params: PyTree,
    batch: PyTree,
    axis_name: str | None,
) -> Iterator[None]:
    """Turns errors into a ValueError that says which method takes this loss.

    If none does, the error is the loss's own, as plain JAX raises it. Of a loss whose
    functions close over its values, the mend alone is said if no method takes it.

    Args:
      loss_fn: `loss_fn(params, env_batch) -> (loss, aux)`.
      params: its parameters.
      batch: leaves `[env, ...]`.
      axis_name: a name for the axis of environments.

    Raises:
      ValueError: in place of any error that comes from the fused oracle's surgery.
    """
    try:
        yield
    except _OF_RUNNING:
        raise
    except Exception as error:
        grad = jax.value_and_grad(loss_fn, has_aux=True)

        def one(params: PyTree, batch: PyTree) -> Any:
            return grad(params, jax.tree.map(lambda leaf: leaf[0], batch))

        def stacked(params: PyTree, batch: PyTree) -> Any:
            return jax.vmap(grad, (None, 0), axis_name=axis_name)(params, batch)

        ways = {"grad_stats(loss_fn, method='vmap') and per_env_grad take": stacked}
        if axis_name is None:
            ways["grad_stats(loss_fn, method='scan') takes"] = one
        refusal = f"method='fused' cannot take this loss apart: {_cause(error)}"
        traced = False
        for way, function in ways.items():
            try:
                jax.eval_shape(function, params, batch)
            except _OF_RUNNING:
                raise
            except Exception as own:
                natural = own
                continue
            traced = True
            if not _leaks(error) or not _holds_tracers(function, params, batch):
                raise ValueError(f"{refusal}. {way} it") from error
        if traced:
            raise ValueError(refusal) from error
        raise natural from None


def _leaks(error: BaseException | None) -> bool:
    """Whether a function of the user's has used a value from outside of it."""
    if error is None or isinstance(error, jax.errors.UnexpectedTracerError):
        return error is not None
    # A constant of a branch or a body. jax 0.7 raises another error behind it.
    constant = r"(?s)constant handler.*Tracer|Tracer.*valid JAX type"
    return bool(re.search(constant, str(error))) or _leaks(error.__context__)


def _holds_tracers(function: Callable[..., Any], params: PyTree, batch: PyTree) -> bool:
    """Whether a program would fail when it runs: tracing it hands on what has leaked.

    A value that is bound only here looks the same; then nothing is promised.
    """
    program = jax.make_jaxpr(function)(*jax.tree.map(shape_of, (params, batch)))
    return any(isinstance(const, jax.core.Tracer) for const in _constants(program))


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _constants(jaxpr: Any) -> Iterator[Any]:
    """Those of a jaxpr and of the jaxprs in its equations."""
    yield from consts_of(jaxpr)
    for eqn in open_jaxpr(jaxpr).eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
                yield from _constants(value)


def _cause(error: Exception) -> str:
    if _leaks(error):
        return (
            "a function with derivatives of its own (custom_jvp, custom_vjp) closes "
            "over a value of the loss, which it should take as an argument"
        )
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}{': ' if first else ''}{first.rstrip('.')}"
