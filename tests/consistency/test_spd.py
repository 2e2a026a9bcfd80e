"""What is no stack of symmetric positive definite matrices is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from hardvary.consistency import (
    determinant_bound,
    karcher_mean,
    quadratic_inconsistency,
)
from tests.test_errors import raises

FUNCTIONS = {
    "karcher_mean": karcher_mean,
    "quadratic_inconsistency": lambda hessians: quadratic_inconsistency(hessians, 0.1),
    "determinant_bound": lambda hessians: determinant_bound(hessians, 0.1),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


@functions
@pytest.mark.parametrize("shape", [(2, 2), (2, 3, 2), (0, 2, 2), (2, 0, 0)], ids=str)
def test_hessians_of_a_wrong_shape_are_refused(name, shape):
    with raises(ValueError, name, "[..., env, n, n]", shape):
        FUNCTIONS[name](jnp.ones(shape))


@functions
def test_hessians_of_a_wrong_kind_are_refused(name):
    with raises(TypeError, name, "real floating", "int"):
        FUNCTIONS[name](jnp.ones((2, 2, 2), int))
    with raises(ValueError, name, "finite", "nan"):
        FUNCTIONS[name](jnp.full((2, 2, 2), jnp.nan))
    with raises(ValueError, name, "symmetric", (1,), "transpose"):
        FUNCTIONS[name](np.array([np.eye(2), [[1.0, 0.5], [0.0, 1.0]]]))


@functions
def test_hessians_with_negative_curvature_are_refused(name):
    rule = "definite" if name == "karcher_mean" else "semidefinite"
    with raises(ValueError, name, f"positive {rule}", (1,), "-1"):
        FUNCTIONS[name](np.array([np.eye(2), np.diag([1.0, -1.0])]))


def test_karcher_mean_of_a_singular_matrix_is_refused():
    with raises(ValueError, "karcher_mean", "positive definite", "eigenvalue 0"):
        karcher_mean(np.array([np.eye(2), np.diag([1.0, 0.0])]))
