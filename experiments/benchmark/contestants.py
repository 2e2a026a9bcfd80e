"""One training step, written in every way that is compared, compiled and timed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

import hardvary
from experiments.benchmark.workloads import Workload
from experiments.common import plots

JaxContestant = Literal["plain", "vmap", "scan", "fused"]
CONTESTANTS: tuple[JaxContestant, ...] = get_args(JaxContestant)

LABELS: dict[str, str] = {
    "plain": "mean gradient, no mask",
    "vmap": "hardvary, stacked gradients",
    "scan": "hardvary, scan over environments",
    "fused": "hardvary, fused",
    "torch_plain": "PyTorch, mean gradient, no mask",
    "torch_shared_forward": "PyTorch, autograd.grad for each environment",
    "torch_functional": "PyTorch, torch.func vmap(grad)",
    "torch_backpack": "PyTorch, BackPACK BatchGrad",
}
COLORS: dict[str, str] = {
    "plain": plots.BLACK,
    "vmap": plots.SKY_BLUE,
    "scan": plots.GREEN,
    "fused": plots.BLUE,
    "torch_plain": "0.6",
    "torch_shared_forward": plots.VERMILION,
    "torch_functional": plots.ORANGE,
    "torch_backpack": plots.PINK,
}

THRESHOLD = 0.2
# So small that the parameters stay where they are: the work of a step may depend on
# values (denormal numbers), and every contestant should have the same.
LEARNING_RATE = 1e-4
# Stacked gradients above this are not tried: they would fill a small machine's memory.
STACKED_LIMIT = 2e9

# Takes so many steps; says how long one took and what the first one's loss was.
Contestant = Callable[[int], Mapping[str, Any]]


def jax_contestants(workload: Workload) -> tuple[JaxContestant, ...]:
    """The contestants whose memory suffices."""
    too_large = workload.num_envs * workload.param_bytes >= STACKED_LIMIT
    return tuple(name for name in CONTESTANTS if not (name == "vmap" and too_large))


def make_step(
    contestant: JaxContestant, workload: Workload
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A whole step and its first arguments.

    Returns:
      `step(params, state, batch) -> (params, state, loss)`, not yet jitted, and the
      arguments of the first call.
    """
    loss_fn, sgd = workload.loss_fn, optax.sgd(LEARNING_RATE)
    if contestant == "plain":
        tx: Any = sgd

        def mean_loss(params: Any, batch: Any) -> jax.Array:
            return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(params, batch))

        gradient = jax.value_and_grad(mean_loss)
    else:
        tx = optax.chain(hardvary.and_mask(THRESHOLD), sgd)
        if contestant == "fused":
            gradient = hardvary.value_and_env_grads(loss_fn)
        else:
            gradient = hardvary.value_and_grad_stats(loss_fn, method=contestant)

    return step_of(gradient, tx, workload)


def step_of(
    gradient: Callable[..., Any], tx: Any, workload: Workload
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """As `make_step`, of `gradient(params, batch) -> (loss, gradients)`."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, jnp.mean(loss)

    params = workload.params
    return step, (params, tx.init(params), workload.batch)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step ready to run, and what compiling it took."""

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    compile_seconds: float
    """To trace, lower and compile it."""
    temp_bytes: int
    """Peak memory besides arguments and results."""

    def run(self, num_steps: int) -> dict[str, float]:
        """Takes steps from the initial parameters; see `Contestant`."""
        params, state, batch = self.arguments
        losses = []
        start = time.perf_counter()
        for _ in range(num_steps):
            params, state, loss = self.step(params, state, batch)
            losses.append(loss)
        jax.block_until_ready((params, state, losses))
        seconds = (time.perf_counter() - start) / num_steps
        return {"seconds": seconds, "loss": float(losses[0])}


def compile_step(contestant: JaxContestant, workload: Workload) -> CompiledStep:
    """Compiles a step from scratch: nothing of earlier traces is reused."""
    return compile_made(*make_step(contestant, workload))


def compile_made(step: Callable[..., Any], arguments: tuple[Any, ...]) -> CompiledStep:
    """Compiles a step as `make_step` returns it."""
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(step).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    return CompiledStep(compiled, arguments, seconds, memory.temp_size_in_bytes)


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Keeps a persistent compilation cache from serving what is to be timed."""
    config: Any = jax.config  # its flags are attributes that no type checker sees
    enabled = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def fitting_steps(contestant: Contestant, seconds: float) -> int:
    """How many steps take about so many seconds, at least one."""
    # The second call, because the first one may allocate and load.
    for _ in range(2):
        one = contestant(1)["seconds"]
    return max(1, round(seconds / one))


def milliseconds(seconds: float) -> str:
    """Three significant digits, and never an exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def num_threads() -> int:
    """Usable cores: the threads that XLA takes, and that PyTorch is told to."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
