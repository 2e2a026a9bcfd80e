"""The definition of all statistics, and the comparison with it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# What these tests compile is small and runs once: compiling is all they cost, and these
# options make it four times faster.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # then it lost the option
    QUICK["xla_cpu_use_fusion_emitters"] = False


def compile_quickly(function):
    return jax.jit(function, compiler_options=QUICK)


class Stacked:
    """Losses, aux and gradients of every environment, from the definition.

    `vmap(grad)`, nothing of hardvary involved.

    Attributes:
      losses: `[env]`.
      aux: leaves `[env, ...]`.
      grads: path -> `[env, *param.shape]`, float64.
    """

    def __init__(self, loss_fn, params, batch, has_aux=False, promotion=None):
        self._one = functools.partial(
            jax.value_and_grad(loss_fn, has_aux=has_aux), params
        )
        self._batch = batch
        self._promotion = contextlib.ExitStack if promotion is None else promotion
        with self._promotion():
            value, grads = compile_quickly(jax.vmap(self._one))(batch)
        losses, self.aux = value if has_aux else (value, None)
        self.losses = np.asarray(losses, np.float64)
        self.grads = by_path(grads)

    @functools.cached_property
    def zero(self):
        """Path -> where the gradient is exactly zero, by `vmap` and one by one.

        Zero by one route alone is a cancellation: rounding, not what the model says.
        A compilation more, which is rarely needed.
        """
        with self._promotion():
            _, grads = compile_quickly(lambda batch: lax.map(self._one, batch))(
                self._batch
            )
        return {
            path: (grad == 0) & (self.grads[path] == 0)
            for path, grad in by_path(grads).items()
        }


def by_path(tree, dtype=np.float64):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).astype(dtype)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_stats_match(stats, params, stacked, weights=None, rounding=1e-5):
    """Compares GradStats with stacked gradients; returns the share of decided signs.

    Args:
      stats: `hardvary.GradStats`; statistics that are None are skipped.
      params: what the statistics are of.
      stacked: `Stacked`.
      weights: `[env]`, binary fractions so that sums of signs are exact.
      rounding: as in `Model`. A component is decided where every present environment's
        gradient is larger than this share of the largest one, or exactly zero: signs
        must then be equal, and may differ elsewhere by the undecided environments only.
    """
    num_envs = len(stacked.losses)
    weights = np.ones(num_envs) if weights is None else np.asarray(weights, np.float64)
    assert float(stats.num_envs) == weights.sum()
    fields = {}
    for name in ("mean", "sign_sum", "square_mean", "log_abs_mean"):
        tree = getattr(stats, name)
        if tree is None:
            continue
        assert jax.tree.structure(tree) == jax.tree.structure(params), name
        for leaf, param in zip(
            jax.tree.leaves(tree), jax.tree.leaves(params), strict=True
        ):
            wide = np.promote_types(leaf.dtype, np.float32)
            expected = jnp.result_type(param) if name == "mean" else wide
            assert leaf.dtype == expected, name
            assert leaf.shape == np.shape(param), name
        fields[name] = by_path(tree)

    zero = {path: grad == 0 for path, grad in stacked.grads.items()}
    try:
        return _compare(fields, stacked.grads, zero, weights, rounding)
    except AssertionError:
        unsure = any((zero[path] != stacked.zero[path]).any() for path in zero)
        if not unsure:
            raise
    return _compare(fields, stacked.grads, stacked.zero, weights, rounding)


def _compare(fields, grads, zeros, weights, rounding):
    present = weights > 0
    grads = {path: grad[present] for path, grad in grads.items()}
    weights = weights[present]
    largest = max((np.abs(g).max(initial=0) for g in grads.values()), default=0)
    count, total = 0, 0

    def check(name, path, off, allowed):
        allowed = np.broadcast_to(allowed, off.shape)
        # Not `off > allowed`: NaN is wrong too.
        wrong = ~(off <= allowed)
        if wrong.any():
            raise AssertionError(
                f"{name} of {path} is off by {off[wrong]}, of which {allowed[wrong]} "
                f"may be rounding, at {np.argwhere(wrong).tolist()}"
            )

    for path, grad in grads.items():
        zero = zeros[path][present]
        weight = weights.reshape(-1, *[1] * (grad.ndim - 1))

        def average(values, weight=weight):
            return (weight * values).sum(0) / weights.sum()

        undecided = (np.abs(grad) <= rounding * largest) & ~zero
        decided = ~undecided.any(0)
        count, total = count + decided.sum(), total + decided.size
        # What a gradient may be off by. A share of the tree's largest: terms of that
        # size may have cancelled.
        error = rounding * (2 * np.abs(grad).max(initial=0) + 0.1 * largest)

        if "mean" in fields:
            off = np.abs(fields["mean"][path] - average(grad))
            check("mean", path, off, error)
        if "sign_sum" in fields:
            off = np.abs(fields["sign_sum"][path] - (weight * np.sign(grad)).sum(0))
            check("sign", path, off, 2 * (weight * undecided).sum(0))
        if "square_mean" in fields:
            off = np.abs(fields["square_mean"][path] - average(grad**2))
            allowed = average(2 * np.abs(grad) * error) + error**2
            check("square", path, off, allowed)
        if "log_abs_mean" in fields:
            expected = average(np.log(np.abs(grad) + 1e-10))
            slope = np.where(zero, 0, 1 / (np.abs(grad) + 1e-10))
            allowed = average(error * slope) + 1e-5 * (1 + np.abs(expected))
            off = np.abs(fields["log_abs_mean"][path] - expected)
            check("log_abs", path, np.where(decided, off, 0), allowed)
    return count / total if total else 1.0


def poison(batch, env):
    """`batch` with NaN in every floating component of one environment."""

    def leaf(values):
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            return values
        values = np.array(values)
        values[env] = np.nan
        return jnp.asarray(values)

    return jax.tree.map(leaf, batch)
