"""Symmetric matrices of environments: their check, and exact products of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate


def checked(
    name: str, matrices: Any, what: str, *, definite: bool = False
) -> jax.Array:
    """`matrices` as an array, checked as the public functions promise."""
    array = jnp.asarray(matrices)
    _validate.real_floating(array, f"{name}: {what}")
    shape = array.shape
    if array.ndim < 3 or shape[-1] != shape[-2] or 0 in shape[-3:]:
        raise ValueError(
            f"{name}: {what} must have shape [..., env, n, n] with at least one "
            f"environment and one row, got shape {shape}"
        )
    if isinstance(array, jax.core.Tracer):
        return array
    values = np.asarray(array, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: {what} must be finite, got {values.tolist()}")
    values = values.reshape(-1, *shape[-2:])
    slack = shape[-1] * float(jnp.finfo(array.dtype).eps)
    for index, matrix in enumerate(values):
        where = tuple(int(i) for i in np.unravel_index(index, shape[:-2]))
        size = np.abs(matrix).max()
        if np.abs(matrix - matrix.T).max() > 8 * slack * size:
            raise ValueError(
                f"{name}: {what} must be symmetric; the one at {where} differs from "
                f"its transpose by {np.abs(matrix - matrix.T).max():.3g}"
            )
        smallest = np.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
        if definite and not smallest > 0:
            raise ValueError(
                f"{name}: {what} must be positive definite; the one at {where} has "
                f"the eigenvalue {smallest:.3g}: add a multiple of the identity, or "
                "leave its flat directions out"
            )
        if smallest < -8 * slack * size:
            raise ValueError(
                f"{name}: {what} must be positive semidefinite, as at a minimum; the "
                f"one at {where} has the eigenvalue {smallest:.3g}"
            )
    return array


def symmetric(matrices: jax.Array) -> jax.Array:
    return (matrices + jnp.swapaxes(matrices, -1, -2)) / 2


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the accelerators' short cuts for float32 matrix products."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return wrapped
