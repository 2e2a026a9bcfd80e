"""Properties that several test files check."""

import jax
import jax.numpy as jnp
import numpy as np

import hardvary


def _pairs(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    expected = jax.tree.leaves(expected)
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(actual), expected, strict=True
    ):
        # The guard of a GradStats has no values to compare.
        if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
            yield jax.tree_util.keystr(path), leaf, other


def field_of(stats, name):
    """A tree of arrays, one field of the `GradStats` at every leaf."""
    return jax.tree.map(
        lambda leaf: getattr(leaf, name),
        stats,
        is_leaf=lambda node: isinstance(node, hardvary.GradStats),
    )


def assert_trees_equal(actual, expected):
    """Same structure, dtypes and values to the last bit; NaN equals NaN."""
    for path, leaf, other in _pairs(actual, expected):
        assert jnp.result_type(leaf) == jnp.result_type(other), path
        np.testing.assert_array_equal(leaf, other, err_msg=path)


def assert_trees_close(actual, expected, *, rtol=1e-5, atol=1e-6):
    """Same structure and shapes, values within a tolerance; NaN equals NaN."""
    for path, leaf, other in _pairs(actual, expected):
        assert np.shape(leaf) == np.shape(other), path
        np.testing.assert_allclose(
            np.asarray(leaf, np.float64),
            np.asarray(other, np.float64),
            rtol=rtol,
            atol=atol,
            err_msg=path,
        )


def assert_like_params(updates, params):
    """Same structure, shapes and dtypes: what `optax.apply_updates` asks for."""
    for path, leaf, param in _pairs(updates, params):
        assert np.shape(leaf) == np.shape(param), path
        assert leaf.dtype == jnp.result_type(param), path
