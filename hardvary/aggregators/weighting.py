"""The way to write an aggregator that works by inner products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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


class WeightingState(NamedTuple):
    """State of a rule that remembers.

    Attributes:
      kept_fraction: see `AggregatorState`.
      mask_count: see `AggregatorState`.
      memory: what the rule keeps from update to update.
    """

    kept_fraction: jax.Array
    mask_count: Any
    memory: Any


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
    depends on the basis of the parameters. `EnvGrad` says what of the gradients of
    `value_and_env_grads` is stacked.

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
      TypeError: a rule that is not callable or takes something else, a hyperparameter
        that is no real scalar or schedule; (tracing) as `and_mask`.
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
    name = getattr(rule, "__name__", "weighting") if name is None else name
    gets = "the inner products of all environments"
    asks = _validate.takes(name, rule, gets, hyperparams, offered=["env_weights"])
    for key, value in hyperparams.items():
        _hyperparams.check_number(key, value)

    def weights_of(
        grads: forms.Gradients, given: dict[str, Any], memory: None
    ) -> tuple[jax.Array, None]:
        # Before anything else: it refuses a GradStats.
        products = total_gramian(grads)
        if asks:
            given = given | {"env_weights": grads.env_weights()}
        returned = rule(products, **given)
        try:
            return jnp.asarray(returned), memory
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name}: the rule must return an array of weights, one for each "
                f"environment, got {_validate.a_or_an(type(returned).__name__)}"
            ) from error

    return build(weights_of, name=name, axis_name=axis_name, hyperparams=hyperparams)


def build(
    weights_of: Callable[..., tuple[Any, ...]],
    *,
    name: str,
    axis_name: AxisName | None,
    hyperparams: dict[str, Any] | None = None,
    seed: Any = None,
    memory: Any = None,
    asks: dict[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """As `weighting`, of anything that weights environments.

    Args:
      weights_of: `(gradients, keywords, memory) -> (weights, memory)`, of
        `forms.Gradients`, hyperparameters as numbers and what it kept of the last
        update. A third result is `kept_fraction`.
      name: for messages.
      axis_name: see `and_mask`.
      hyperparams: see `weighting`, checked.
      seed: see `of_gramian`; a key is then among the keywords.
      memory: before the first update; the state is a `WeightingState` unless it is
        None.
      asks: numbers `[env]` that `update` has to be given, by name, and what they are;
        they are then among the keywords.
    """
    hyperparams, asks = hyperparams or {}, asks or {}
    counted = seed is not None or any(
        map(_hyperparams.is_scheduled, hyperparams.values())
    )

    def state_of(state: AggregatorState, memory: Any) -> Any:
        return state if memory is None else WeightingState(*state, memory)

    def init_fn(params: PyTree) -> Any:
        del params
        return state_of(initial_state(counted), memory)

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        env_weights: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        grads = forms.read(updates, name, params, env_weights, axis_name)
        count: Any = state.mask_count if counted else None
        fraction: Any = jnp.ones((), jnp.float32)
        kept = None if memory is None else state.memory
        if not grads.leaves:
            return updates, state_of(next_state(fraction, count), kept)
        given: dict[str, Any] = {
            key: _hyperparams.per_leaf(key, value, 0, count)[0]
            for key, value in hyperparams.items()
        }
        if seed is not None:
            given["key"] = jax.random.fold_in(_validate.prng_key("seed", seed), count)
        for key, what in asks.items():
            if extra_args.get(key) is None:
                raise TypeError(
                    f"{name}: update needs {key}, {what}: call "
                    f"update(grads, state, params, {key}=...)"
                )
            given[key] = grads.of_envs(key, extra_args[key])
        weights, kept, *masked = weights_of(grads, given, kept)
        fraction = masked[0].astype(jnp.float32) if masked else fraction
        if weights.shape != (grads.num_envs,):
            raise ValueError(
                f"{name}: the rule must return weights of shape ({grads.num_envs},), "
                f"one for each environment, got {weights.shape}"
            )
        weights = jnp.where(grads.env_weights() > 0, weights, 0)
        sums = grads.combine([weights] * len(grads.leaves))
        leaves = [
            leaf.astype(dtype) for leaf, dtype in zip(sums, grads.dtypes, strict=True)
        ]
        return grads.unflatten(leaves), state_of(next_state(fraction, count), kept)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def of_gramian(
    rule: Callable[..., Any],
    *,
    name: str,
    axis_name: AxisName | None,
    hyperparams: dict[str, Any] | None = None,
    seed: Any = None,
    memory: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """What this library's own rules on inner products share.

    A present environment whose gradient is not finite makes all weights NaN. An absent
    one is a row and a column of zeros, and its weight is 0.

    Args:
      rule: `rule(gramian, shares, size, **keywords) -> weights`: of a Gramian that is
        divided by `size`, its largest diagonal entry, so that no number leaves the
        range of its dtype; shares `[env]` are env_weights with the sum 1. With
        `memory` it takes the keyword `memory` and returns `(weights, memory)`.
      name: for messages.
      axis_name: see `and_mask`.
      hyperparams: see `weighting`, checked.
      seed: of the keyword `key`, another one in every update; None for none.
      memory: see `build`.
    """

    def weights_of(
        grads: forms.Gradients, given: dict[str, Any], memory: Any
    ) -> tuple[jax.Array, Any]:
        gramian, env_weights = total_gramian(grads), grads.env_weights()
        here = env_weights > 0
        gramian = jnp.where(here[:, None] & here[None, :], gramian, 0)
        known = jnp.all(jnp.isfinite(gramian))
        gramian = jnp.where(known, gramian, jnp.eye(len(gramian), dtype=gramian.dtype))
        size = jnp.max(jnp.diagonal(gramian))
        size = jnp.where(size > 0, size, 1)
        shares = jnp.where(here, env_weights, 0).astype(gramian.dtype)
        if memory is not None:
            given = given | {"memory": memory}
        result = rule(gramian / size, shares / jnp.sum(shares), size, **given)
        if memory is None:
            return jnp.where(known, result, jnp.nan), None
        weights, kept = result
        return jnp.where(known, weights, jnp.nan), jnp.where(known, kept, memory)

    return build(
        weights_of,
        name=name,
        axis_name=axis_name,
        hyperparams=hyperparams,
        seed=seed,
        memory=memory,
    )
