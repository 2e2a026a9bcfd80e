"""The AND-mask over time, for one environment per step (Algorithm 1)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hardvary import _validate
from hardvary._env_grads.statistics import sign_or_nan

PyTree = Any


class TemporalAndMaskState(NamedTuple):
    """State of `temporal_and_mask`.

    Attributes:
      sign_ema: moving average of the gradients' signs, in [-1, 1]; tree and shapes
        like params, at least float32.
      inner_state: state of the wrapped transformation.
    """

    sign_ema: PyTree
    inner_state: optax.OptState

    def kept_fraction(self, threshold: Any) -> jax.Array:
        """Share of all components that passed the mask in the latest step.

        Args:
          threshold: the mask's, in [0, 1].

        Returns:
          float32 scalar; 0 for a tree without leaves.

        Example:
          >>> import jax.numpy as jnp, optax, hardvary
          >>> tx = hardvary.temporal_and_mask_adam(0.1, b3=0.5, threshold=0.4)
          >>> state = tx.init(jnp.ones(2))
          >>> _, state = tx.update(jnp.array([3.0, 0.0]), state, jnp.ones(2))
          >>> mask_state = optax.tree.get(state, "TemporalAndMaskState")
          >>> float(mask_state.kept_fraction(0.4))
          0.5
        """
        leaves = jax.tree.leaves(self.sign_ema)
        kept = [
            jnp.sum(_is_open(leaf, threshold), dtype=jnp.float32) for leaf in leaves
        ]
        size = sum(leaf.size for leaf in leaves)
        return sum(kept, jnp.zeros((), jnp.float32)) / max(size, 1)


def temporal_and_mask(
    inner: optax.GradientTransformation, *, threshold: Any, decay: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Lets updates of `inner` pass where gradient signs agreed over recent steps.

    .. math::
      a \leftarrow \beta a + (1 - \beta) \operatorname{sign}(g), \qquad
      u \leftarrow 1[\,|a| \ge \tau\,] \odot \mathrm{inner}(g)

    The inner transformation sees the raw gradient, so its moments are those of
    unmasked training; only the step is masked (paper, Algorithm 1). Cycle through the
    environments, one per step, and the average stands for a vote among the latest
    `1 / (1 - decay)` of them.

    Args:
      inner: any gradient transformation, also one with extra arguments.
      threshold: :math:`\tau` in [0, 1]; 0 lets everything pass. May be traced.
      decay: :math:`\beta` in [0, 1). The average starts at 0 and is never
        bias-corrected, so nothing passes until `1 - decay**steps >= threshold`, up
        to rounding.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `TemporalAndMaskState`;
      gradients and updates are shaped like params. Extra arguments go to `inner`.

    Raises:
      TypeError: an `inner` that is no gradient transformation, a threshold or decay
        that is no real scalar; (tracing) integer, boolean or complex gradients.
      ValueError: threshold outside [0, 1], decay outside [0, 1); (tracing) gradients
        that are not shaped like params, such as stacked ones.

    Edge cases:
      ==========================  ==================================================
      threshold 0                 the updates of `inner`, bit by bit
      threshold 1                 open once the average has rounded to 1
      a zero gradient             moves the average towards 0
      NaN or infinity             that component's update is NaN; its average stays
                                  NaN, so wrap the whole chain in
                                  `optax.apply_if_finite` where this may happen
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, optax, hardvary
      >>> tx = hardvary.temporal_and_mask(optax.sgd(1.0), threshold=0.6, decay=0.5)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([1.0, 1.0]), state, params)
      >>> updates.tolist()  # averages 0.5, 0.5
      [0.0, 0.0]
      >>> updates, state = tx.update(jnp.array([1.0, -1.0]), state, params)
      >>> updates.tolist()  # averages 0.75, -0.25
      [-1.0, 0.0]

    References:
      Parascandolo et al., `Learning explanations that are hard to vary
      <https://arxiv.org/abs/2009.00329>`_, ICLR 2021, Algorithm 1.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "inner must be an optax.GradientTransformation such as "
            f"optax.scale_by_adam(), got {inner!r}"
        )
    _validate.in_unit_interval("threshold", threshold)
    _validate.decay_rate("decay", decay)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> TemporalAndMaskState:
        def zeros(param: Any) -> jax.Array:
            # A half-precision average stalls: its steps round to nothing near 1.
            dtype = _validate.wide(jnp.result_type(param))
            return jnp.zeros_like(param, dtype=dtype)

        return TemporalAndMaskState(
            sign_ema=jax.tree.map(zeros, params), inner_state=inner.init(params)
        )

    def update_fn(
        updates: PyTree,
        state: TemporalAndMaskState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, TemporalAndMaskState]:
        _validate.real_floating(updates, "temporal_and_mask: gradients")
        _validate.same_shapes(
            updates,
            state.sign_ema,
            "temporal_and_mask: gradients",
            "it takes the gradient of one environment per step; for stacked gradients "
            "use and_mask",
        )

        def average(ema: jax.Array, grad: jax.Array) -> jax.Array:
            rate = jnp.asarray(decay).astype(ema.dtype)
            return rate * ema + (1 - rate) * sign_or_nan(grad.astype(ema.dtype))

        def gate(ema: jax.Array, update: jax.Array) -> jax.Array:
            masked = jnp.where(_is_open(ema, threshold), update, 0)
            return jnp.where(jnp.isnan(ema), jnp.nan, masked).astype(update.dtype)

        sign_ema = jax.tree.map(average, state.sign_ema, updates)
        inner_updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        return (
            jax.tree.map(gate, sign_ema, inner_updates),
            TemporalAndMaskState(sign_ema=sign_ema, inner_state=inner_state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_open(ema: jax.Array, threshold: Any) -> jax.Array:
    slack = 4 * float(jnp.finfo(ema.dtype).eps)
    return jnp.abs(ema) >= jnp.asarray(threshold).astype(ema.dtype) - slack


def temporal_and_mask_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    b3: Any = 0.9,
    threshold: Any = 0.4,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    bias_correction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam whose step is masked by the agreement of signs over time.

    .. math::
      m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad
      v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
      a \leftarrow \beta_3 a + (1 - \beta_3) \operatorname{sign}(g) \\
      \theta &\leftarrow \theta - \alpha \Big( 1[\,|a| \ge \tau\,] \odot
      \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda \theta \Big)

    For training that sees one environment per step (paper, Algorithm 1 and
    section 3.3). The weight decay :math:`\lambda` is decoupled and comes after the
    mask, so masked weights decay too.

    Args:
      learning_rate: :math:`\alpha`, a scalar or a schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      b3: decay of the average of signs, in [0, 1); never bias-corrected.
      threshold: :math:`\tau` in [0, 1]. 0 is `optax.adamw`, bit by bit.
      eps: added to the root of the second moment, >= 0.
      weight_decay: :math:`\lambda` >= 0.
      bias_correction: correct the moments' start at zero, as Adam does; False is
        the paper's listing to the letter.

    Returns:
      An `optax.GradientTransformationExtraArgs` over gradients shaped like params.
      `update` needs `params` unless weight_decay is 0.

    Raises:
      TypeError: a hyperparameter that is no real scalar; (tracing) integer, boolean
        or complex gradients.
      ValueError: b1, b2 or b3 outside [0, 1), threshold outside [0, 1], eps or
        weight_decay negative.

    Example:
      >>> import jax.numpy as jnp, optax, hardvary
      >>> tx = hardvary.temporal_and_mask_adam(0.1, b3=0.5, threshold=0.6)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for grad in (jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])):
      ...     updates, state = tx.update(grad, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> [round(p, 3) for p in params.tolist()]
      [0.9, 1.0]

    References:
      Parascandolo et al., `Learning explanations that are hard to vary
      <https://arxiv.org/abs/2009.00329>`_, ICLR 2021, Algorithm 1.
    """
    _validate.decay_rate("b1", b1)
    _validate.decay_rate("b2", b2)
    _validate.decay_rate("b3", b3)
    _validate.at_least("eps", eps, 0.0)
    _validate.at_least("weight_decay", weight_decay, 0.0)
    if bias_correction:
        adam = optax.scale_by_adam(b1, b2, eps)
    else:
        adam = _scale_by_uncorrected_adam(b1, b2, eps)
    # add_decayed_weights asks for params even where it adds nothing.
    decays = _validate.concrete_value(weight_decay) != 0.0
    return optax.chain(
        temporal_and_mask(adam, threshold=threshold, decay=b3),
        optax.add_decayed_weights(weight_decay) if decays else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_uncorrected_adam(
    b1: Any, b2: Any, eps: Any
) -> optax.GradientTransformation:
    corrected = optax.scale_by_adam(b1, b2, eps)

    def update_fn(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        _, state = corrected.update(updates, state, params)
        return (
            jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), state.mu, state.nu),
            state,
        )

    return optax.GradientTransformation(corrected.init, update_fn)
