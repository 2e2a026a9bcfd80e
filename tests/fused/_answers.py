"""Everything that a tree of `EnvGrad` answers, and what the answers must be."""

import jax
import jax.numpy as jnp
import numpy as np

import hardvary
from tests._inputs import STATISTICS
from tests.fused._models import build
from tests.zoo import ZOO, assert_stats_match, fields_by_path
from tests.zoo.compare import (
    assert_combinations_match,
    assert_gramians_match,
    assert_norms_match,
    assert_within,
    by_path,
)

ANSWERS = {
    "stats": lambda grad, weights: grad.stats(STATISTICS),
    "mean": lambda grad, weights: grad.mean(),
    "gramian": lambda grad, weights: grad.gramian(),
    "norms": lambda grad, weights: grad.norms(),
    "combine": lambda grad, weights: grad.combine(weights),
    "stack": lambda grad, weights: grad.stack(),
}


def signed_weights(num_envs):
    """Weights of either sign for a sum of gradients, one of them 0."""
    return (np.arange(num_envs, dtype=np.float32) - num_envs // 2) / 4


def ask(grads, weights, stack=False):
    """Name of an answer -> a tree of them."""
    return {
        name: jax.tree.map(lambda grad, f=answer: f(grad, weights), grads)
        for name, answer in ANSWERS.items()
        if stack or name != "stack"
    }


def make_env_oracle(name, stack=False):
    """`(params, batch, weights, env_weights=None) -> (losses, aux, answers)`."""
    entry = ZOO[name]
    oracle = hardvary.value_and_env_grads(build(name)[1], has_aux=entry.has_aux)

    def run(params, batch, weights, env_weights=None):
        with entry.promotion():
            value, grads = oracle(params, batch, env_weights=env_weights)
        losses, aux = value if entry.has_aux else (value, None)
        return losses, aux, ask(grads, weights, stack)

    return run


def check_answers(answers, params, expected, weights, env_weights=None, rounding=1e-5):
    """Compares what `ask` found; returns the share of decided signs.

    Args:
      answers: of `ask`.
      params: what the gradients are of.
      expected: `Stacked`.
      weights: of either sign, which `combine` was given.
      env_weights: as in `assert_stats_match`.
      rounding: as in `assert_stats_match`.
    """
    dtypes = [jnp.result_type(param) for param in jax.tree.leaves(params)]
    wide = [np.promote_types(dtype, np.float32) for dtype in dtypes]
    for name in ("mean", "gramian", "norms", "combine"):
        assert [leaf.dtype for leaf in jax.tree.leaves(answers[name])] == wide, name
    fields = fields_by_path(answers["stats"], params)
    means = jax.tree.leaves(answers["mean"])
    for of_path, mean, dtype in zip(fields.values(), means, dtypes, strict=True):
        np.testing.assert_array_equal(mean, of_path["mean"])
        assert mean.dtype == of_path["mean"].dtype
        # In a GradStats of an oracle it has the dtype of the parameter.
        of_path["mean"] = of_path["mean"].astype(dtype)
    decided = assert_stats_match(fields, params, expected, env_weights, rounding)

    rest = (env_weights, rounding)
    assert_gramians_match(by_path(answers["gramian"]), expected, *rest)
    assert_norms_match(by_path(answers["norms"]), expected, *rest)
    assert_combinations_match(by_path(answers["combine"]), expected, weights, *rest)
    if "stack" in answers:
        rows, errors = expected.rows(env_weights), expected.errors(*reversed(rest))
        for path, grad in by_path(answers["stack"]).items():
            assert grad.shape == expected.grads[path].shape
            off = np.abs(grad.reshape(rows[path].shape) - rows[path])
            assert_within(off, errors[path], f"stack of {path}")
        assert [leaf.dtype for leaf in jax.tree.leaves(answers["stack"])] == dtypes
    return decided
