"""Gradients of all environments, stacked: the definition."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from hardvary._env_grads.problem import InAxes, Problem, check_arguments
from hardvary._typing import PyTree


def per_env_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: InAxes = 0,
) -> Callable[..., Any]:
    """Gradients of a loss for every environment, stacked along a new axis 0.

    `jax.vmap(jax.grad(loss_fn))` over the environment axis, with checks. It holds one
    copy of the parameters per environment; `env_grads` needs none of them. Each
    environment has a forward pass of its own, so batch statistics are its own too.

    Args:
      loss_fn: `loss_fn(params, env_batch) -> loss`, a real scalar, of ONE environment.
      argnums: which positional arguments are parameters, shared by all environments;
        as in `jax.grad`. Every other argument is mapped over environments.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      in_axes: where the environment axis of an argument is, as in `jax.vmap`, and None
        for what all environments share: an integer for all arguments, a sequence with
        an entry for each positional one (None for parameters), or a mapping from
        positions and names such as `{1: 0, "key": None}`, where what is not named has
        its environments in front. Entries may be tree prefixes. Keywords that hold no
        array, a flag or a number, are shared in any case.

    Returns:
      A function of the same arguments, where every leaf of what is mapped has the
      environment axis, `[env, ...]` unless in_axes says otherwise. It returns gradients
      like the parameters with leaves `[env, *param.shape]`, or `(gradients, aux)` with
      aux leaves `[env, ...]`.

    Raises:
      TypeError: a `loss_fn` that is not callable; (tracing) integer, boolean or
        complex parameters, a loss that is not a real scalar, batch leaves that are no
        arrays.
      ValueError: (tracing) batch leaves with different leading sizes, without an
        environment axis, or with zero environments; no batch at all; in_axes that do
        not fit the arguments.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> loss = lambda w, x: 0.5 * (w * x) ** 2
      >>> hardvary.per_env_grad(loss)(jnp.array(3.0), jnp.array([1.0, 2.0])).tolist()
      [3.0, 12.0]
    """
    with_value = value_and_per_env_grad(loss_fn, argnums, has_aux, in_axes)

    def grad_fn(*args: Any, **kwargs: Any) -> Any:
        value, grads = with_value(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fn


@overload
def value_and_per_env_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    in_axes: InAxes = 0,
) -> Callable[..., tuple[jax.Array, PyTree]]: ...


@overload
def value_and_per_env_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: Literal[True],
    in_axes: InAxes = 0,
) -> Callable[..., tuple[tuple[jax.Array, Any], PyTree]]: ...


@overload
def value_and_per_env_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: InAxes = 0,
) -> Callable[..., Any]: ...


def value_and_per_env_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: InAxes = 0,
) -> Callable[..., Any]:
    """Losses and gradients of every environment.

    Args:
      loss_fn: see `per_env_grad`.
      argnums: see `per_env_grad`.
      has_aux: see `per_env_grad`.
      in_axes: see `per_env_grad`.

    Returns:
      A function like that of `per_env_grad` which returns `(losses, gradients)`, or
      `((losses, aux), gradients)`; losses are `[env]` in the loss's dtype.

    Raises:
      TypeError: as `per_env_grad`.
      ValueError: as `per_env_grad`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> loss = lambda w, x: 0.5 * (w * x) ** 2
      >>> losses, grads = hardvary.value_and_per_env_grad(loss)(
      ...     jnp.array(3.0), jnp.array([1.0, 2.0])
      ... )
      >>> losses.tolist(), grads.tolist()
      ([4.5, 18.0], [3.0, 12.0])
    """
    argnums = check_arguments(loss_fn, argnums)

    def value_and_grad_fn(*args: Any, **kwargs: Any) -> Any:
        problem = Problem(loss_fn, argnums, has_aux, in_axes, args, kwargs)
        (losses, aux), grads = jax.vmap(problem.value_and_grad, in_axes=(None, 0))(
            problem.params, problem.batch
        )
        return ((losses, aux) if has_aux else losses), grads

    return value_and_grad_fn


def value_and_stacked(
    problem: Problem,
    params: PyTree,
    batch: list[jax.Array],
    env_axis_name: str | None,
) -> Any:
    """`((losses, aux), grads)` of a part of a problem's environments."""
    if len(batch[0]) == 1 and env_axis_name is None:
        # Not vmap over one: a batched convolution gradient is far slower.
        return jax.tree.map(
            lambda leaf: jnp.asarray(leaf)[None],
            problem.value_and_grad(params, [leaf[0] for leaf in batch]),
        )
    run = jax.vmap(problem.value_and_grad, in_axes=(None, 0), axis_name=env_axis_name)
    return run(params, batch)
