"""Configuration of the test run: devices, strictness, reproducible examples."""

import contextlib
import functools
import gc
import os
import pathlib

import hypothesis
import jax
import pytest
from jax._src import compiler  # no public way to its options for all that is compiled
from jax._src.interpreters import mlir  # nor to what it lowers in

from tests import zoo

QUICK = {**zoo.QUICK, "xla_llvm_disable_expensive_passes": True}
AS_USERS_DO = compiler.get_compile_options
# Needs another interpreter, with PyTorch.
collect_ignore = ["golden/make_torchjd.py"]
EXPERIMENTS = pathlib.Path(__file__).parent / "experiments"

# Before anything uses a device: the number is fixed by then.
jax.config.update("jax_num_cpu_devices", 8)
# Before anything decomposes a matrix: SciPy's OpenBLAS, which does it on CPUs, reads it
# when it is loaded. Its threads wait for more work in a busy loop, on processors that
# have tests of their own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# With all that is said of a program, which is nothing (`quick_lowering`):
# to leave it out it would be copied.
jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
# What JAX caches stays: looking it through as often as Python would is a twentieth of
# what the tests cost.
gc.set_threshold(50_000, 20, 50)

# The same examples in every run, and no database directory left behind.
hypothesis.settings.register_profile(
    "hardvary", derandomize=True, deadline=None, database=None, max_examples=20
)
hypothesis.settings.load_profile("hardvary")


def pytest_addoption(parser):
    parser.addoption(
        "--every-dtype",
        action="store_true",
        help="in tests/fused/test_zoo.py, take every model to float64, bfloat16 and "
        "float16, not three of them",
    )


@pytest.fixture(autouse=True, scope="module")
def strict_jax(request):
    """Implicit promotion of dtypes or ranks is an error in tests of the library.

    Not in tests/experiments: the libraries underneath promote in places.
    """
    with contextlib.ExitStack() as stack:
        if EXPERIMENTS not in request.path.parents:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_compilation():
    """Compiles everything as `QUICK` says, eager operations and library calls too.

    Compiling for a few steps is most of what these tests cost.
    """

    def quickly(*arguments, env_options_overrides=None, **options):
        overrides = {**QUICK, **(env_options_overrides or {})}
        return AS_USERS_DO(*arguments, env_options_overrides=overrides, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", quickly)
        yield


class _Everything(set):
    def __contains__(self, item):
        return True


@pytest.fixture(autouse=True, scope="session")
def quick_lowering():
    """Lowers programs without saying where each of their operations comes from.

    Nothing here reads it, and finding it out is a tenth of what lowering costs. Another
    fifth are functions that JAX makes of operations, for those that come again.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mlir, "source_info_to_location", lambda *_: mlir.ir.Location.unknown()
        )
        # Older versions make none.
        patch.setattr(mlir, "_uncacheable_primitives", _Everything(), raising=False)
        yield


@pytest.fixture(autouse=True, scope="module")
def one_executable_of_equal_programs():
    """Compiles a program once in a file, whichever of its functions it comes from.

    JAX looks every program up in its cache on disk, options and devices in the key,
    and none is set up here: this one is in memory, and ends with the file. It has no
    programs that call back: such a call belongs to one function.
    """
    executables = {}

    def read(name, key, options, backend, devices, host_callbacks=()):
        return (None if host_callbacks else executables.get(key)), 0

    def write(key, seconds, name, backend, executable, host_callbacks=()):
        if not host_callbacks:
            executables[key] = executable

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_cache_read", read)
        patch.setattr(compiler, "_cache_write", write)
        yield


@pytest.fixture(autouse=True, scope="module")
def one_lowering_context():
    """Lowers all programs of a file in one context, not in a context for each.

    Making it is about a tenth of what a small program costs. It keeps the constants of
    all that is lowered in it, so it ends with the file.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, "make_ir_context", functools.cache(mlir.make_ir_context))
        yield


@pytest.fixture(autouse=True)
def optimized_compilation(request, monkeypatch):
    """Compiles as users do in tests marked `optimized`.

    For what rounding decides, such as ties and equality to the bit, and for what runs
    longer than it compiles.
    """
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    monkeypatch.setattr(compiler, "get_compile_options", AS_USERS_DO)
    # Part of the key of all that JAX has traced and compiled, and read by nothing:
    # nothing that was compiled quickly is found.
    runs = jax.config.jax_pgle_profiling_runs
    jax.config.update("jax_pgle_profiling_runs", runs + 1)
    yield
    jax.config.update("jax_pgle_profiling_runs", runs)


@pytest.fixture
def standard_promotion():
    """For tests of what optax does that strict promotion forbids, in Adam mostly."""
    with jax.numpy_dtype_promotion("standard"):
        yield
