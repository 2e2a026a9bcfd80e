"""The answer to how the fused oracle treats a model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from hardvary import _validate
from hardvary._env_grads.problem import InAxes, Problem, check_arguments
from hardvary.fused.explain import Explanation, explanation
from hardvary.fused.traced import Traced


def explain(
    loss_fn: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: InAxes = 0,
    env_axis_name: str | None = None,
    **kwargs: Any,
) -> Explanation:
    """How `value_and_env_grads(loss_fn)` treats each parameter, and why.

    Nothing is computed; a `jax.ShapeDtypeStruct` may stand for an array.

    Args:
      loss_fn: see `grad_stats`.
      args: as for the function that `value_and_env_grads` returns, mostly
        `params, batch`.
      argnums: see `grad_stats`.
      has_aux: see `grad_stats`.
      in_axes: see `grad_stats`.
      env_axis_name: see `grad_stats`.
      kwargs: passed on to `loss_fn`.

    Returns:
      An `Explanation`, which prints as a table. Its rules are, fastest first,
      `"product"`, a single outer product per environment, whose signs are those of its
      factors; `"lookup"`, rows of a table; `"stack"`, small gradients, and those of
      which nothing better is known; `"scan"`, one environment at a time; `"unused"`, no
      gradient reaches it.

    Raises:
      TypeError: as `grad_stats`.
      ValueError: as `grad_stats`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"]))
      >>> params = {"w": jnp.ones((300, 20)), "b": jnp.ones(20)}
      >>> print(hardvary.explain(loss, params, jnp.ones((80, 300))))
      parameter  shape   rule     reason                  gramian  inputs     stacked
      ['b']      20      stack    in add                  stacked  none    0.0061 MiB
      ['w']      300x20  product  one outer product each  rows     300        1.8 MiB
    """
    argnums = check_arguments(loss_fn, argnums)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if _validate.is_array(leaf)]

    def rows(values: list[Any]) -> None:
        given = dict(enumerate(leaves)) | dict(zip(arrays, values, strict=True))
        args, kwargs = jax.tree.unflatten(treedef, given.values())
        problem = Problem(loss_fn, argnums, has_aux, in_axes, args, kwargs)
        traced = Traced(problem.loss, problem.params, problem.batch, env_axis_name)
        found.append(explanation(traced))

    found: list[Explanation] = []
    jax.eval_shape(rows, [leaves[i] for i in arrays])
    return found[0]
