"""Everything here is measured against SciPy and mpmath, in float64."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def wide():
    with jax.enable_x64(True):
        yield
