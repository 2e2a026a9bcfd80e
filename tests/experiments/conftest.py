"""Shared by the tests of the experiments: the command line, in and out of process."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.common.run_dir import RunDir
from tests._zoo import QUICK

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """The config of a run that trains nothing."""

    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    name: str = "toy"


@pytest.fixture
def open_run(tmp_path):
    """Opens the run directory tmp_path/run for a toy config."""

    def open_run(config=None, experiment="toy train", **kwargs):
        return RunDir(tmp_path / "run", experiment, config or ToyConfig(), **kwargs)

    return open_run


def toy_state():
    return {"x": jnp.float32(1.0), "count": jnp.int32(0)}


def toy_epoch(state, epoch):
    """A recursion whose every float32 depends on all the epochs before."""
    x = state["x"] * jnp.float32(1.1) + jnp.float32(0.01) * epoch
    return {"x": x, "count": state["count"] + 1}, {"loss": x, "square": x * x}


@pytest.fixture(scope="module")
def quick_compilation():
    """Without optimization, where compiling for a few steps is all that tests cost."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick_workers(tmp_path_factory):
    """Workers compile as with `quick_compilation`, and only once between them."""
    cache = tmp_path_factory.mktemp("compilation-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        flags = " ".join(f"--{name}={value}" for name, value in QUICK.items())
        patch.setenv("XLA_FLAGS", flags)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


@pytest.fixture(scope="session")
def command_environment(tmp_path_factory):
    """Environment of subprocesses; they share one compilation cache."""
    cache = tmp_path_factory.mktemp("compilation-cache")
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="session")
def start(command_environment):
    """Starts `python -m experiments.synthetic ...` as a process."""

    def start(*arguments, **options):
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.synthetic", *map(str, arguments)],
            cwd=ROOT,
            env=command_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return start
