"""How many environments at a time fit a budget of memory."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from hardvary import _validate


def largest_microbatch_size(
    make_step: Callable[[int], Callable[..., Any]],
    args: Sequence[Any],
    *,
    num_envs: int,
    memory_budget: int,
) -> int:
    """The largest `microbatch_size` with which a step fits a budget of memory.

    Compiles the step, without running it, and asks the compiler: for all environments
    at once, then for fewer by bisection. Activations and gradients, the optimizer and
    whatever else the step does are all in it.

    Args:
      make_step: from a `microbatch_size` to the step, jitted or not, a pure function of
        `args`. Jit it as it will be run: what it donates counts.
      args: arguments of the step; arrays, or `jax.ShapeDtypeStruct` in their place.
      num_envs: number of environments, of which sizes are divisors. On several
        devices, of those on one of them.
      memory_budget: bytes that the step may take besides `args`: temporaries, and
        results that do not go where a donated argument was. On several devices, of one
        of them.

    Returns:
      A divisor of `num_envs`. The step with it was compiled and fits; more does not,
      if more environments never take less memory.

    Raises:
      TypeError: a `make_step` that is not callable, a `num_envs` or `memory_budget`
        that is no integer.
      ValueError: a `num_envs` or `memory_budget` below 1; a budget that not even one
        environment at a time fits, with what that takes.
      NotImplementedError: a backend that does not tell how much memory a program takes.

    Example:
      >>> import jax, jax.numpy as jnp, hardvary
      >>> loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
      >>> w, x = jnp.ones((64, 64)), jnp.ones((16, 100, 64))  # [env, example, input]
      >>> make_step = lambda size: hardvary.grad_stats(loss, microbatch_size=size)
      >>> size = hardvary.largest_microbatch_size(
      ...     make_step, (w, x), num_envs=16, memory_budget=300_000
      ... )
      >>> 1 <= size < 16
      True
    """
    if not callable(make_step):
        raise TypeError(
            "make_step must be a function of a microbatch_size that returns a step, "
            f"got {make_step!r}"
        )
    count = _validate.whole_number("num_envs", num_envs, 1)
    budget = _validate.whole_number("memory_budget", memory_budget, 1)
    sizes = [size for size in range(1, count + 1) if count % size == 0]

    def needed(size: int) -> int:
        step: Any = make_step(size)
        if not hasattr(step, "lower"):
            step = jax.jit(step)
        memory = step.lower(*args).compile().memory_analysis()
        if memory is None:
            raise NotImplementedError(
                f"the backend {jax.default_backend()!r} does not tell how much memory "
                "a program takes: try sizes until one fits"
            )
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return int(memory.temp_size_in_bytes + results)

    if needed(count) <= budget:
        return count
    low, high = -1, len(sizes) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if needed(sizes[middle]) <= budget:
            low = middle
        else:
            high = middle
    if low < 0:
        raise ValueError(
            f"memory_budget={budget} is less than the step takes with one environment "
            f"at a time: {needed(1)} bytes besides its arguments"
        )
    return sizes[low]
