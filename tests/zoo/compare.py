"""The definition of all that gradients are asked for, and comparisons with it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hardvary import GradStats

# What these tests compile is small and runs once: compiling is all they cost, and these
# options make it four to six times faster.
QUICK = {
    "xla_backend_optimization_level": 0,
    # Parts for several threads to compile, each with costs of its own.
    "xla_cpu_parallel_codegen_split_count": 1,
    # Both processors are busy with tests of their own.
    "xla_cpu_multi_thread_eigen": False,
}
if jax.__version_info__ < (0, 11):  # then it lost the option
    QUICK["xla_cpu_use_fusion_emitters"] = False

# Name of a statistic -> field of GradStats.
FIELDS = {
    "mean": "mean",
    "sign": "sign_sum",
    "square": "square_mean",
    "log_abs": "log_abs_mean",
    "abs": "abs_mean",
    "nonzero": "nonzero_sum",
}
# Of a cancellation, about two in three are exactly zero: few remain that always are.
NEARBY = 16


def compile_quickly(function):
    return jax.jit(function, compiler_options=QUICK)


# --------------------------------------------------------------------------------------
# The definition.


class Stacked:
    """Losses, aux and gradients of every environment, from the definition.

    `vmap(grad)`, nothing of hardvary involved. What follows from the gradients is
    computed in float64.

    Attributes:
      losses: `[env]`.
      aux: leaves `[env, ...]`.
      grads: path -> `[env, *param.shape]`, float64.
    """

    def __init__(self, loss_fn, params, batch, has_aux=False, promotion=None):
        self._one = jax.value_and_grad(loss_fn, has_aux=has_aux)
        self._every = compile_quickly(jax.vmap(self._one, (None, 0)))
        self._params, self._batch = params, batch
        self._promotion = contextlib.ExitStack if promotion is None else promotion
        value, self.grads = self._run(self._every, batch)
        losses, self.aux = value if has_aux else (value, None)
        self.losses = np.asarray(losses, np.float64)

    def _run(self, function, batch, params=None):
        params = self._params if params is None else params
        with self._promotion():
            value, grads = function(params, batch)
        return value, by_path(grads)

    def grads_of(self, batch):
        """`grads` of another batch, without compiling anything again."""
        return self._run(self._every, batch)[1]

    def zero(self, rounding=1e-5):
        """Path -> where the gradient is zero because the model says so.

        Zero by one route alone, by `vmap` or one by one, is a cancellation: rounding.
        So is what a little beside these parameters is no longer zero, but rounding:
        the gradient of a vector of one component that is divided by its norm.

        Args:
          rounding: as in `Model`.
        """
        largest = max(
            (np.abs(g).max(initial=0) for g in self.grads.values()), default=0
        )
        zero = {
            path: (grad == 0) & (self.grads[path] == 0)
            for path, grad in self.one_by_one.items()
        }
        for grads in self._nearby:
            for path, grad in grads.items():
                zero[path] &= (grad == 0) | (np.abs(grad) > rounding * largest)
        return zero

    @functools.cached_property
    def one_by_one(self):
        """`grads` without `vmap`: a compilation more, which is rarely needed."""

        @compile_quickly
        def one_by_one(params, batch):
            return lax.map(functools.partial(self._one, params), batch)

        return self._run(one_by_one, self._batch)[1]

    @functools.cached_property
    def _nearby(self):
        """`grads` of parameters that are moved by up to 3 %, several times.

        Zeros stay: of a masked weight, and of what was switched off.
        """
        rng = np.random.default_rng(0)

        def move(leaf):
            factors = rng.uniform(0.97, 1.03, np.shape(leaf))
            return leaf * jnp.asarray(factors, jnp.result_type(leaf))

        moved = (jax.tree.map(move, self._params) for _ in range(NEARBY))
        return [self._run(self._every, self._batch, params)[1] for params in moved]

    def rows(self, env_weights=None):
        """Path -> `[env, component]`, absent environments as rows of zeros."""
        present = present_of(env_weights, len(self.losses))
        return {
            path: np.where(present[:, None], grad.reshape(len(grad), -1), 0)
            for path, grad in self.grads.items()
        }

    def gramian(self, env_weights=None):
        """Path -> `[env, env]`, inner products of the environments' gradients."""
        return {path: rows @ rows.T for path, rows in self.rows(env_weights).items()}

    def norms(self, env_weights=None):
        """Path -> `[env]`."""
        return {
            path: np.linalg.norm(rows, axis=1)
            for path, rows in self.rows(env_weights).items()
        }

    def combine(self, weights, env_weights=None):
        """Path -> `sum_e weights_e grad_e`, the shape of the parameter."""
        weights = np.asarray(weights, np.float64)
        return {
            path: (weights @ rows).reshape(self.grads[path].shape[1:])
            for path, rows in self.rows(env_weights).items()
        }

    def errors(self, rounding=1e-5, env_weights=None):
        """Path -> what a component of a present environment's gradient may be off by.

        Args:
          rounding: as in `Model`. A share of the parameter's largest gradient, and of
            the tree's largest: terms of that size may have cancelled.
          env_weights: `[env]`, or None for 1 each.
        """
        largest = {
            path: np.abs(rows).max(initial=0)
            for path, rows in self.rows(env_weights).items()
        }
        of_all = max(largest.values(), default=0)
        return {
            path: rounding * (2 * size + 0.1 * of_all) for path, size in largest.items()
        }


def present_of(env_weights, num_envs):
    return np.ones(num_envs, bool) if env_weights is None else env_weights > 0


def by_path(tree, dtype=np.float64):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).astype(dtype)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def fields_by_path(stats, params):
    """Path of a parameter -> name of a field -> array, `num_envs` among them.

    Fields that are None are left out.

    Args:
      stats: a tree like params of `GradStats`.
      params: what the statistics are of.
    """
    leaves, structure = jax.tree.flatten(
        stats, is_leaf=lambda node: isinstance(node, GradStats)
    )
    assert structure == jax.tree.structure(params)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)
    ]
    return {
        path: {
            name: getattr(leaf, name)
            for name in ("num_envs", *FIELDS.values())
            if getattr(leaf, name) is not None
        }
        for path, leaf in zip(paths, leaves, strict=True)
    }


# --------------------------------------------------------------------------------------
# Comparisons with it.


def assert_within(off, allowed, what):
    allowed = np.broadcast_to(allowed, np.shape(off))
    # Not `off > allowed`: NaN is wrong too.
    wrong = ~(off <= allowed)
    if np.any(wrong):
        raise AssertionError(
            f"{what} is off by {off[wrong]}, of which {allowed[wrong]} may be "
            f"rounding, at {np.argwhere(wrong).tolist()}"
        )


def assert_stats_match(fields, params, stacked, weights=None, rounding=1e-5):
    """Compares statistics with stacked gradients; returns the share of decided signs.

    Args:
      fields: path -> name of a field -> array, as from `fields_by_path`.
      params: what the statistics are of.
      stacked: `Stacked`.
      weights: `[env]`, binary fractions so that sums of signs are exact.
      rounding: as in `Model`. A component is decided where every present environment's
        gradient is larger than this share of the largest one, or exactly zero: signs
        must then be equal, and may differ elsewhere by the undecided environments only.
    """
    num_envs = len(stacked.losses)
    weights = np.ones(num_envs) if weights is None else np.asarray(weights, np.float64)
    params = {
        jax.tree_util.keystr(path): param
        for path, param in jax.tree.leaves_with_path(params)
    }
    assert fields.keys() == params.keys()
    for path, param in params.items():
        of_path = dict(fields[path])
        assert float(of_path.pop("num_envs")) == weights.sum(), path
        for name, leaf in of_path.items():
            wide = np.promote_types(leaf.dtype, np.float32)
            expected = jnp.result_type(param) if name == "mean" else wide
            assert leaf.dtype == expected, (name, path)
            assert leaf.shape == np.shape(param), (name, path)

    zero = {path: grad == 0 for path, grad in stacked.grads.items()}
    try:
        return _compare(fields, stacked, zero, weights, rounding)
    except AssertionError:
        sure = stacked.zero(rounding)
        if all((zero[path] == sure[path]).all() for path in zero):
            raise
    return _compare(fields, stacked, sure, weights, rounding)


def _compare(fields, stacked, zeros, env_weights, rounding):
    present = env_weights > 0
    weights = env_weights[present]
    grads = {path: grad[present] for path, grad in stacked.grads.items()}
    errors = stacked.errors(rounding, env_weights)
    largest = max((np.abs(g).max(initial=0) for g in grads.values()), default=0)
    count, total = 0, 0
    for path, grad in grads.items():
        zero, error = zeros[path][present], errors[path]
        weight = weights.reshape(-1, *[1] * (grad.ndim - 1))

        def average(values, weight=weight):
            return (weight * values).sum(0) / weights.sum()

        undecided = (np.abs(grad) <= rounding * largest) & ~zero
        decided = ~undecided.any(0)
        count, total = count + decided.sum(), total + decided.size
        # Votes that may go either way, or not be cast.
        unsure = (weight * undecided).sum(0)
        slope = np.where(zero, 0, 1 / (np.abs(grad) + 1e-10))
        log_abs = average(np.log(np.abs(grad) + 1e-10))
        # Name of a field -> what it must be, what it may be off by, where it counts.
        expected = {
            "mean": (average(grad), error, True),
            "sign_sum": ((weight * np.sign(grad)).sum(0), 2 * unsure, True),
            "square_mean": (
                average(grad**2),
                average(2 * np.abs(grad) * error) + error**2,
                True,
            ),
            "log_abs_mean": (
                log_abs,
                average(error * slope) + 1e-5 * (1 + np.abs(log_abs)),
                decided,
            ),
            "abs_mean": (average(np.abs(grad)), error, True),
            "nonzero_sum": ((weight * (grad != 0)).sum(0), unsure, True),
        }
        for name, leaf in fields[path].items():
            if name == "num_envs":
                continue
            value, allowed, counts = expected[name]
            off = np.abs(np.asarray(leaf).astype(np.float64) - value)
            assert_within(np.where(counts, off, 0), allowed, f"{name} of {path}")
    return count / total if total else 1.0


def assert_gramians_match(gramians, stacked, env_weights=None, rounding=1e-5):
    """Compares path -> `[env, env]`; rows and columns of absent environments are 0."""
    present = present_of(env_weights, len(stacked.losses))
    both = np.multiply.outer(present, present)
    rows, errors = stacked.rows(env_weights), stacked.errors(rounding, env_weights)
    for path, expected in stacked.gramian(env_weights).items():
        sizes, error = np.abs(rows[path]).sum(1), errors[path]
        allowed = error * np.add.outer(sizes, sizes) + error**2 * rows[path].shape[1]
        actual = np.asarray(gramians[path], np.float64)
        assert actual.shape == expected.shape, path
        assert_within(np.abs(actual - expected), both * allowed, f"gramian of {path}")


def assert_norms_match(norms, stacked, env_weights=None, rounding=1e-5):
    """Compares path -> `[env]`; absent environments have none."""
    errors = stacked.errors(rounding, env_weights)
    for path, expected in stacked.norms(env_weights).items():
        size = stacked.grads[path][0].size
        allowed = np.sqrt(size) * errors[path] * present_of(env_weights, len(expected))
        actual = np.asarray(norms[path], np.float64)
        assert actual.shape == expected.shape, path
        assert_within(np.abs(actual - expected), allowed, f"norms of {path}")


def assert_combinations_match(
    combined, stacked, weights, env_weights=None, rounding=1e-5
):
    """Compares path -> `sum_e weights_e grad_e`, the shape of the parameter."""
    errors = stacked.errors(rounding, env_weights)
    present = present_of(env_weights, len(stacked.losses))
    total = np.abs(np.asarray(weights, np.float64))[present].sum()
    for path, expected in stacked.combine(weights, env_weights).items():
        actual = np.asarray(combined[path], np.float64)
        assert actual.shape == expected.shape, path
        allowed = total * errors[path]
        assert_within(np.abs(actual - expected), allowed, f"combination of {path}")


def poison(batch, env):
    """`batch` with NaN in every floating component of one environment."""

    def leaf(values):
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            return values
        values = np.array(values)
        values[env] = np.nan
        return jax.device_put(values)

    return jax.tree.map(leaf, batch)
