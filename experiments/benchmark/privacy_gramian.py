"""JAX Privacy's clipped gradient, as a process that times steps on request.

Started by `python -m experiments.benchmark gramian` with an interpreter that has JAX
Privacy beside what this project pins; the dozen packages that it brings along are of no
use here otherwise. One JSON object per line, as in torch_gramian.py, but for

    {"load": WORKLOAD, "sizes": {...}, "max_norm": M, "rounds": N}
        -> {"jax_privacy": VERSION, "temp_bytes": B, "compile_seconds": S}
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax_privacy
import optax

from experiments.benchmark import gramian
from experiments.benchmark.contestants import (
    CompiledStep,
    compile_made,
    no_compilation_cache,
)
from experiments.benchmark.steps import compile_all
from experiments.benchmark.workloads import Sizes, Workload, build


def make_step(workload: Workload, max_norm: float) -> Any:
    """See `gramian.make_step`; the environments are groups of examples."""
    clipped = jax_privacy.clipped_grad(
        workload.loss_fn,
        l2_clip_norm=max_norm,
        normalize_by=workload.num_envs,
        keep_batch_dim=False,
        return_values=True,
    )

    def gradients(params: Any, batch: Any) -> tuple[Any, Any]:
        grads, aux = clipped(params, batch)
        return aux.values, grads

    return gramian.finish_step(gradients, optax.identity(), workload)


def load(request: dict[str, Any]) -> tuple[CompiledStep, dict[str, Any]]:
    """The compiled step, and what is answered."""
    workload = build(request["load"], Sizes(**request["sizes"]))

    def compiler() -> CompiledStep:
        return compile_made(*make_step(workload, request["max_norm"]))

    compiled, seconds = compile_all(
        {"jax_privacy": compiler}, request["rounds"], "JAX Privacy"
    )
    step = compiled["jax_privacy"]
    return step, {
        "jax_privacy": jax_privacy.__version__,
        "temp_bytes": step.temp_bytes,
        "compile_seconds": seconds["jax_privacy"],
    }


def serve() -> None:
    """Answers requests until standard input closes."""
    step: CompiledStep | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            step, answer = load(request)
        else:
            assert step is not None, "load comes first"
            if "check" in request:
                answer = gramian.check(step)
            else:
                count = request["steps"]
                answer = step.run(count)
                answer["seconds"] *= count
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with no_compilation_cache():
        serve()
