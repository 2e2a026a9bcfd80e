"""Shared by the tests of the experiments: the command line, in and out of process."""

import csv
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from experiments.common.cli import main
from experiments.common.run_dir import RunDir
from experiments.shifts.__main__ import COMMANDS
from tests.conftest import QUICK

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """The config of a run that trains nothing."""

    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    name: str = "toy"


def only_error(printed):
    """The one line of an error; where the preset is smoke, behind a note on that."""
    lines = printed.splitlines()
    (error,) = [line for line in lines if not line.startswith("note: --preset smoke")]
    assert error.startswith("error: ")
    return error


def read_csv(file):
    """The rows of a file, each as its cells by column."""
    return list(csv.DictReader(file.read_text().splitlines()))


def shifts(*arguments):
    """Runs a command of the shifts in this process; returns its exit code."""
    return main("python -m experiments.shifts", COMMANDS, list(map(str, arguments)))


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


@pytest.fixture(scope="session")
def command_environment(tmp_path_factory):
    """Environment of subprocesses; they share one compilation cache.

    They compile as this process does, so that results are the same to the bit.
    """
    cache = tmp_path_factory.mktemp("compilation-cache")
    flags = [f"--{name}={value}" for name, value in QUICK.items()]
    return {
        **os.environ,
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip(),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(autouse=True, scope="package")
def quick_workers(command_environment):
    """Processes that a command starts have that environment.

    And this one not: XLA reads its flags once, when it is first used.
    """
    jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in command_environment.items():
            patch.setenv(name, value)
        yield


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


def kill_at_random(start, journal, times):
    """Starts a search that often, and kills it each time; says how often it lived.

    The first time once there is a journal, then in a trial that it has begun: a fixed
    time would come too late on a fast machine, and too early on a slow one.
    """

    def begun():
        return journal.read_bytes().count(b'"op_code":4') if journal.exists() else -1

    moment, kills = random.Random(1), 0
    for _ in range(times):
        before = begun()
        process = start()
        while process.poll() is None and begun() == before:
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.5))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        time.sleep(0.5)  # the worker notices that its parent is gone
    return kills
