"""Configuration of the test run: devices, strictness, reproducible examples."""

import contextlib
import pathlib

import hypothesis
import jax
import pytest

EXPERIMENTS = pathlib.Path(__file__).parent / "experiments"

# Before anything uses a device: the number is fixed by then.
jax.config.update("jax_num_cpu_devices", 8)

# The same examples in every run, and no database directory left behind.
hypothesis.settings.register_profile(
    "hardvary", derandomize=True, deadline=None, database=None, max_examples=20
)
hypothesis.settings.load_profile("hardvary")


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


@pytest.fixture
def standard_promotion():
    """For tests of what optax does that strict promotion forbids, in Adam mostly."""
    with jax.numpy_dtype_promotion("standard"):
        yield
