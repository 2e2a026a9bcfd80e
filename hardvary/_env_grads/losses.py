"""Gradients of losses that look at each other."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate, sharding
from hardvary._env_grads import statistics as st
from hardvary._env_grads.env_grad import answered, checked_weights
from hardvary._env_grads.problem import (
    check_arguments,
    describe_arguments,
    split_aux,
    take_params,
)
from hardvary._env_grads.source import Source
from hardvary._typing import PyTree


class _Rows(Source):
    """Rows of a Jacobian, from the backward pass of the losses."""

    def __init__(
        self,
        pull: Callable[[jax.Array], tuple[PyTree, ...]],
        losses: jax.Array,
        leaves: Sequence[Any],
        microbatch_size: int,
    ) -> None:
        self.num_envs = len(losses)
        self._pull, self._losses, self._leaves = pull, losses, leaves
        self._num_parts = self.num_envs // microbatch_size

    def _rows(self, cotangents: jax.Array) -> list[jax.Array]:
        rows: list[jax.Array] = jax.vmap(self._row)(cotangents)
        return rows

    def _row(self, cotangent: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(self._pull(cotangent.astype(self._losses.dtype)))

    def _basis(self) -> jax.Array:
        basis = jnp.eye(self.num_envs, dtype=self._losses.dtype)
        return sharding.vary_like(basis, self._losses)

    def sums(
        self, statistics: Sequence[st.Statistic], weights: st.EnvWeights | None
    ) -> st.Sums:
        def sums_of(cotangents: jax.Array, weights: st.EnvWeights | None) -> Any:
            return st.sum_over_envs(self._rows(cotangents), statistics, weights), None

        inputs = (self._basis(), weights)
        if self._num_parts == 1:
            return sums_of(*inputs)[0]
        sums, _ = st.sums_by_parts(
            sums_of, inputs, self._num_parts, self._leaves, statistics
        )
        return sums

    def combine(self, weights: st.EnvWeights) -> list[jax.Array]:
        if self._losses.dtype != weights.values.dtype:
            # Cotangents are in the losses' dtype, which may not hold the weights.
            return super().combine(weights)
        # One more backward pass, whatever the number of environments. An absent one
        # keeps its place in the others' losses.
        leaves = self._row(weights.values)
        return [leaf.astype(_validate.wide(leaf.dtype)) for leaf in leaves]

    def stack(self) -> list[jax.Array]:
        rows = jax.lax.map(
            self._row, self._basis(), batch_size=self.num_envs // self._num_parts
        )
        return list(rows)


@overload
def value_and_env_grads_of_losses(
    losses_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    microbatch_size: int = 1,
) -> Callable[..., tuple[jax.Array, PyTree]]: ...


@overload
def value_and_env_grads_of_losses(
    losses_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: Literal[True],
    microbatch_size: int = 1,
) -> Callable[..., tuple[tuple[jax.Array, Any], PyTree]]: ...


@overload
def value_and_env_grads_of_losses(
    losses_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    microbatch_size: int = 1,
) -> Callable[..., Any]: ...


def value_and_env_grads_of_losses(
    losses_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    microbatch_size: int = 1,
) -> Callable[..., Any]:
    """Losses of environments that look at each other, and the losses' gradients.

    For a batch norm over all environments, where the gradient of environment `e` is the
    full derivative of its loss through everyone's statistics, and for the losses of
    several tasks on shared parameters. One forward pass gives all losses; each gradient
    is a row of their Jacobian, which takes a backward pass of its own, so the cost
    grows with the number of environments. Where losses do not depend on each other,
    `value_and_env_grads` is faster.

    Args:
      losses_fn: `losses_fn(params, batch) -> losses`, real `[env]`.
      argnums: which positional arguments are parameters, as in `jax.grad`.
      has_aux: whether `losses_fn` returns `(losses, aux)`.
      microbatch_size: rows taken at once, a divisor of their number. More need more
        memory. Fewer than all of them go through a loop, in which XLA's convolutions on
        CPU are slow.

    Returns:
      A function `(*args, env_weights=None, **kwargs)` that returns
      `(losses, gradients)`, or `((losses, aux), gradients)`, as
      `value_and_env_grads` does; arguments reach `losses_fn` as they are. An
      environment of weight 0 has no vote and no part in any sum, but the other losses
      still see it: `losses_fn` has to leave it out where that matters.

    Raises:
      TypeError: a `losses_fn` that is not callable, a microbatch_size that is no
        integer; (tracing) parameters that are not real floating, losses that are no
        real vector.
      ValueError: a microbatch_size < 1; (tracing) one that does not divide the number
        of environments, no environment, env_weights of the wrong length or negative.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> def losses_fn(w, x):  # each loss is relative to the mean of all
      ...     outputs = x @ w
      ...     return (outputs - outputs.mean()) ** 2
      >>> oracle = hardvary.value_and_env_grads_of_losses(losses_fn)
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])  # [env, feature]
      >>> losses, grads = oracle(jnp.ones(2), x)
      >>> losses.tolist(), grads.stack().tolist()
      ([0.25, 0.25], [[-0.5, 1.0], [-0.5, 1.0]])
    """
    argnums = check_arguments(losses_fn, argnums, "losses_fn")
    size = _validate.whole_number("microbatch_size", microbatch_size, 1)

    def value_and_grads_fn(*args: Any, env_weights: Any = None, **kwargs: Any) -> Any:
        name = "value_and_env_grads_of_losses"
        positions, params = take_params(args, argnums)
        others = [arg for i, arg in enumerate(args) if i not in positions]
        params = sharding.vary_like(params, (others, kwargs))

        def losses_of(params: PyTree) -> Any:
            given = dict(enumerate(args))
            own = (params,) if isinstance(argnums, int) else params
            given |= zip(positions, own, strict=True)
            try:
                output = losses_fn(*given.values(), **kwargs)
            except Exception as error:
                shapes = describe_arguments(list(given.values()), kwargs)
                error.add_note(f"hardvary called losses_fn with {shapes}")
                raise
            losses, aux = split_aux(output, has_aux)
            return _checked(losses, has_aux), aux

        losses, pull, aux = jax.vjp(losses_of, params, has_aux=True)
        num_envs = len(losses)
        if num_envs % size:
            raise ValueError(
                f"microbatch_size must divide the number of environments, got {size} "
                f"for {num_envs}"
            )
        weights = checked_weights(env_weights, num_envs, None, name)
        leaves = jax.tree.leaves(params)
        source = _Rows(pull, losses, leaves, size)
        grads = answered([(range(len(leaves)), source)], params, weights, None)
        return ((losses, aux) if has_aux else losses), grads

    return value_and_grads_fn


def _checked(losses: Any, has_aux: bool) -> jax.Array:
    dtype = getattr(losses, "dtype", None)
    if dtype is None:
        received = _validate.a_or_an(type(losses).__name__)
        if isinstance(losses, tuple) and not has_aux:
            received += "; for (losses, aux) pass has_aux=True"
        elif isinstance(losses, tuple | list):
            received += "; jnp.stack makes an array of several losses"
    elif not jnp.issubdtype(dtype, jnp.floating) or np.ndim(losses) != 1:
        received = f"{dtype} of shape {np.shape(losses)}"
    elif len(losses) == 0:
        raise ValueError("losses_fn returned no loss; one environment is needed")
    else:
        result: jax.Array = losses
        return result
    raise TypeError(f"losses_fn must return a real array [env], got {received}")
