"""How far environments agree on the sign of a gradient, and who passes a mask."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _hyperparams, _validate
from hardvary._env_grads import forms
from hardvary._env_grads import statistics as st
from hardvary._typing import AxisName, PyTree

# What rounding may do to a sum of weighted votes, as a share of the total weight.
ROUNDING = 16 * float(jnp.finfo(jnp.float32).eps)


def reaches(sign_sum: jax.Array, num_envs: Any, threshold: Any) -> jax.Array:
    """Whether `|sign_sum| >= threshold * num_envs`, exact at equality.

    A threshold k/d arrives rounded to its dtype, and weighted votes are sums of
    floats, so the comparison allows for both: the threshold's rounding, at most half
    a vote, and 2e-6 of the total. Up to some 250,000 environments of weight 1 that is
    less than the step between two sums of votes. NaN signs do not pass.
    """
    dtype = np.dtype(_validate.wide(sign_sum.dtype))
    known = not any(isinstance(x, jax.Array) for x in (num_envs, threshold))
    # What is known need not be traced, for every parameter anew.
    module: Any = np if known else jnp
    given = jnp.result_type(threshold)
    rounding = 0.0
    if jnp.issubdtype(given, jnp.floating):
        rounding = float(jnp.finfo(given).eps)
    threshold = module.asarray(threshold, given).astype(dtype)
    num_envs = module.asarray(num_envs).astype(dtype)
    slack = module.minimum(dtype.type(rounding) * threshold * num_envs, dtype.type(0.5))
    slack = slack + dtype.type(ROUNDING) * num_envs
    return jax.lax.ge(jax.lax.abs(sign_sum.astype(dtype)), threshold * num_envs - slack)


def agreement(
    grads: PyTree, *, env_weights: Any = None, axis_name: AxisName | None = None
) -> PyTree:
    r"""Share of environments by which one sign outnumbers the other.

    .. math:: a_j = |\sum_e w_e \operatorname{sign}([g_e]_j)| / \sum_e w_e

    The quantity that every mask compares with its threshold (paper, section 3). An
    agreement of `a` means that a share `(1 + a) / 2` of the environments have the
    same sign, if none is zero.

    Args:
      grads: gradients in any form: stacked, each leaf `[env, *param.shape]`; a tree of
        `EnvGrad`; a tree of `GradStats` with the statistic `"sign"`.
      env_weights: `[env]`, non-negative weights for stacked gradients; 0 marks an
        absent environment.
      axis_name: see `and_mask`.

    Returns:
      A tree like params with values in [0, 1], float32 (float64 for float64
      gradients); NaN where an environment's gradient is not finite.

    Raises:
      TypeError: gradients that are not real floating.
      ValueError: leaves that disagree on the number of environments, zero
        environments, a `GradStats` without signs, or bad `env_weights`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> hardvary.agreement(jnp.array([[1.0, 2.0], [3.0, -1.0], [2.0, 1.0]])).tolist()
      [1.0, 0.3333333432674408]
    """
    given = forms.read(grads, "agreement", None, env_weights, axis_name)

    def share(stats: Any) -> jax.Array:
        ratio = jnp.abs(stats.sign_sum) / stats.num_envs.astype(stats.sign_sum.dtype)
        # Sums of weights round.
        return jnp.minimum(ratio, 1)

    return given.unflatten([share(stats) for stats in given.stats([st.SIGN])])


def mask(
    grads: PyTree,
    threshold: Any = 1.0,
    *,
    env_weights: Any = None,
    axis_name: AxisName | None = None,
) -> PyTree:
    """Components that the AND-mask keeps.

    Exactly the comparison of `and_mask`, so that nobody has to rebuild it.

    Args:
      grads: gradients in any form, see `agreement`.
      threshold: in [0, 1]: a number, possibly traced, or a tree prefix of params with
        numbers.
      env_weights: see `agreement`.
      axis_name: see `and_mask`.

    Returns:
      A tree like params of booleans; False where a gradient is not finite.

    Raises:
      TypeError: as `agreement`; a threshold that is no real scalar.
      ValueError: as `agreement`; a threshold outside [0, 1], or a tree that is no
        prefix of params.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> grads = jnp.array([[1.0, 2.0], [3.0, -1.0], [2.0, 1.0]])  # [env, 2]
      >>> hardvary.mask(grads, threshold=0.5).tolist()
      [True, False]
    """
    return _masks(grads, threshold, env_weights, axis_name, "mask", lambda kept: kept)


def kept_fractions(
    grads: PyTree,
    threshold: Any = 1.0,
    *,
    env_weights: Any = None,
    axis_name: AxisName | None = None,
) -> PyTree:
    """Share of each parameter's components that the AND-mask keeps.

    Args:
      grads: gradients in any form, see `agreement`.
      threshold: see `mask`.
      env_weights: see `agreement`.
      axis_name: see `and_mask`.

    Returns:
      A tree like params of float32 scalars; 0 for a parameter without components.

    Raises:
      TypeError: as `mask`.
      ValueError: as `mask`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> grads = {"w": jnp.array([[1.0, 2.0], [3.0, -1.0]]), "b": jnp.ones(2)}
      >>> kept = hardvary.kept_fractions(grads, threshold=1.0)
      >>> {name: float(value) for name, value in kept.items()}
      {'b': 1.0, 'w': 0.5}
    """

    def share(kept: jax.Array) -> jax.Array:
        return st.sum_of_mask(kept) / max(kept.size, 1)

    return _masks(grads, threshold, env_weights, axis_name, "kept_fractions", share)


def _masks(
    grads: PyTree,
    threshold: Any,
    env_weights: Any,
    axis_name: AxisName | None,
    name: str,
    of: Any,
) -> PyTree:
    _hyperparams.check_unit_interval("threshold", threshold)
    if _hyperparams.is_scheduled(threshold):
        raise TypeError(
            f"{name}: a schedule for the threshold belongs to an aggregator, which "
            "counts the updates; pass its value, schedule(count)"
        )
    given = forms.read(grads, name, None, env_weights, axis_name)
    thresholds = _hyperparams.per_leaf(
        "threshold", threshold, grads, 0, is_leaf=forms.is_leaf
    )
    kept = [
        of(reaches(stats.sign_sum, stats.num_envs, value))
        for stats, value in zip(given.stats([st.SIGN]), thresholds, strict=True)
    ]
    return given.unflatten(kept)
