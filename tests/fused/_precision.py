"""The same model in another precision."""

import contextlib

import jax
import jax.numpy as jnp

from tests._compat import enable_x64

# Share of the largest gradient that two routes to it may differ by.
PRECISIONS = {"float64": 1e-12, "bfloat16": 1e-2, "float16": 2e-3}


@contextlib.contextmanager
def allowed(precision):
    """Where a model of `at` can run: its constants are still float32."""
    with enable_x64(precision == "float64"), jax.numpy_dtype_promotion("standard"):
        yield


def at(precision, params, loss_fn, batch):
    """`(params, loss_fn, batch)`: parameters of float64, or computations in half."""
    wide = precision == "float64"

    def loss(params, batch):
        if not wide:
            params, batch = _cast((params, batch), precision)
        return loss_fn(params, batch).astype(precision if wide else "float32")

    if wide:
        params, batch = _cast((params, batch), precision)
    return params, loss, batch


def _cast(tree, dtype):
    def leaf(values):
        floating = jnp.issubdtype(values.dtype, jnp.floating)
        return values.astype(dtype) if floating else values

    return jax.tree.map(leaf, tree)
