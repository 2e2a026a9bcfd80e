"""The way to write an aggregator that works by inner products."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from hardvary import _hyperparams, _validate
from hardvary._env_grads import forms
from hardvary._env_grads.products import total_gramian
from hardvary._typing import AxisName, PyTree
from hardvary.aggregators.aggregator import (
    AggregatorState,
    initial_state,
    next_state,
)


def weighting(
    rule: Callable[..., Any],
    *,
    axis_name: AxisName | None = None,
    name: str | None = None,
    **hyperparams: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""An aggregator from a rule that weights environments by their inner products.

    .. math::
      u = \sum_e w_e \, g_e, \qquad w = \mathrm{rule}(G), \qquad
      G_{ef} = \langle g_e, g_f \rangle

    The inner products are over all parameters that the transformation sees:
    `optax.partition` gives each group of parameters its own. No rule of this kind
    depends on the basis of the parameters. Nothing is stacked where the gradients come
    from `value_and_env_grads`.

    Args:
      rule: `rule(gramian, **hyperparams) -> weights`, `[env, env]` to `[env]`, in at
        least float32 and of any sign. Pure, traced. An absent environment has a row
        and a column of zeros, and its weight is taken for 0 whatever the rule says. A
        rule with a parameter `env_weights` is given `[env]`, the environments' weights
        (1 unless given, 0 for absent ones), for the share of each in a mean, say.
      axis_name: see `and_mask`.
      name: for messages; the rule's own unless given.
      hyperparams: numbers for the rule, each possibly traced, or a schedule.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `AggregatorState` and the
      contract of `and_mask`, which takes stacked gradients or a tree of `EnvGrad`.
      `kept_fraction` is 1 after every update: nothing is masked.

    Raises:
      TypeError: a rule that is not callable, a hyperparameter that is no real scalar
        or schedule; (tracing) as `and_mask`.
      ValueError: (tracing) as `and_mask`; weights of another shape; a tree of
        `GradStats`, which has no inner products.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             inner products of that environment are NaN, and what
                                  the rule makes of them
      an environment of weight 0  as if it were not there, whatever it holds
      a tree without leaves       an empty update
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> def normalised(gramian):  # the mean of gradients of length 1
      ...     return 1 / jnp.sqrt(jnp.diagonal(gramian)) / len(gramian)
      >>> tx = hardvary.weighting(normalised)
      >>> grads = jnp.array([[3.0, 0.0], [0.0, 0.5]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> updates.tolist()
      [0.5, 0.5]

    Warning:
      Must come first in an `optax.chain`.
    """
    if not callable(rule):
        raise TypeError(f"rule must be callable, got {rule!r}")
    for key, value in hyperparams.items():
        _hyperparams.check_scalars(key, value)
    name = getattr(rule, "__name__", "weighting") if name is None else name
    asks = "env_weights" in inspect.signature(rule).parameters
    scheduled = any(map(_hyperparams.is_scheduled, hyperparams.values()))

    def init_fn(params: PyTree) -> AggregatorState:
        del params
        return initial_state(scheduled)

    def update_fn(
        updates: PyTree,
        state: AggregatorState,
        params: PyTree | None = None,
        *,
        env_weights: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, AggregatorState]:
        del extra_args
        grads = forms.read(updates, name, params, env_weights, axis_name)
        count = state.mask_count if scheduled else None
        new_state = next_state(jnp.ones((), jnp.float32), count)
        if not grads.leaves:
            return updates, new_state
        given = {
            key: _hyperparams.per_leaf(key, value, 0, count)[0]
            for key, value in hyperparams.items()
        }
        # Before anything else: it refuses a GradStats.
        products = total_gramian(grads)
        present = grads.env_weights()
        if asks:
            given["env_weights"] = present
        returned = rule(products, **given)
        try:
            weights = jnp.asarray(returned)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name}: the rule must return an array of weights, one for each "
                f"environment, got {_validate.a_or_an(type(returned).__name__)}"
            ) from error
        if weights.shape != (grads.num_envs,):
            raise ValueError(
                f"{name}: the rule must return weights of shape ({grads.num_envs},), "
                f"one for each environment, got {weights.shape}"
            )
        weights = jnp.where(present > 0, weights, 0)
        sums = grads.combine([weights] * len(grads.leaves))
        leaves = [
            leaf.astype(dtype) for leaf, dtype in zip(sums, grads.dtypes, strict=True)
        ]
        return grads.unflatten(leaves), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
