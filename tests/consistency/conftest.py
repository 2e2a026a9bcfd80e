"""Everything here is measured against SciPy and mpmath, in float64."""

import pytest

from tests._compat import enable_x64


@pytest.fixture(autouse=True, scope="module")
def wide():
    with enable_x64(True):
        yield
