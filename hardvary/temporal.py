"""The AND-mask over time, for one environment per step (Algorithm 1)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from hardvary import _hyperparams, _validate
from hardvary._env_grads.statistics import sign_or_nan
from hardvary._typing import PyTree, ScalarOrSchedule, Threshold


class TemporalAndMaskState(NamedTuple):
    """State of `temporal_and_mask`.

    Attributes:
      sign_ema: moving average of the gradients' signs, in [-1, 1]; tree and shapes
        like params, at least float32.
      kept_fraction: float32 scalar, share of all components that passed the mask in
        the last update; 0 before the first, and for a tree without leaves. Read it
        with `optax.tree.get(opt_state, "kept_fraction")`.
      mask_count: int32 scalar, number of updates so far, for a threshold that is a
        schedule. No second `count` beside that of `inner_state`.
      inner_state: state of the wrapped transformation.
    """

    sign_ema: PyTree
    kept_fraction: jax.Array
    mask_count: jax.Array
    inner_state: optax.OptState


class ScaleByTemporalAndMaskAdamState(NamedTuple):
    """State of `scale_by_temporal_and_mask_adam`, first in `temporal_and_mask_adam`'s.

    Attributes:
      count: int32 scalar, number of updates so far.
      mu: first moment; tree and shapes like params, `mu_dtype` or at least float32.
      nu: second moment; tree and shapes like params, at least float32.
      sign_ema: moving average of the gradients' signs, in [-1, 1]; tree and shapes
        like params, at least float32.
      kept_fraction: float32 scalar, share of all components that passed the mask in
        the last update; 0 before the first, and for a tree without leaves. Read it
        with `optax.tree.get(opt_state, "kept_fraction")`.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    mu: PyTree
    nu: PyTree
    sign_ema: PyTree
    kept_fraction: jax.Array


def temporal_and_mask(
    inner: optax.GradientTransformation,
    *,
    threshold: Threshold,
    decay: ArrayLike,
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
      inner: any gradient transformation, also one with extra arguments. What it
        computes is its own: `optax.scale_by_adam` fails in float16, where
        `scale_by_temporal_and_mask_adam` does not.
      threshold: :math:`\tau` in [0, 1]; 0 lets everything pass. A scalar, a schedule
        (a function of the number of updates so far), or a tree of these that is a
        prefix of params. May be traced. What a schedule returns is not checked to be
        in [0, 1].
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
        that are not shaped like params, such as stacked ones; a tree of thresholds
        that is no prefix of params.

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
      >>> float(optax.tree.get(state, "kept_fraction"))
      0.5

    References:
      Parascandolo et al., `Learning explanations that are hard to vary
      <https://arxiv.org/abs/2009.00329>`_, ICLR 2021, Algorithm 1.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "inner must be an optax.GradientTransformation such as "
            f"optax.scale_by_adam(), got {inner!r}"
        )
    _hyperparams.check_unit_interval("threshold", threshold)
    _validate.decay_rate("decay", decay)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> TemporalAndMaskState:
        _validate.real_floating(params, "temporal_and_mask: params")
        return TemporalAndMaskState(
            sign_ema=_wide_zeros(params),
            kept_fraction=jnp.zeros((), jnp.float32),
            mask_count=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: PyTree,
        state: TemporalAndMaskState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, TemporalAndMaskState]:
        _check_gradients(updates, state.sign_ema, "temporal_and_mask")
        sign_ema = _average_signs(state.sign_ema, updates, decay)
        inner_updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        masked, kept_fraction = _let_pass(
            inner_updates, sign_ema, threshold, state.mask_count
        )
        return masked, TemporalAndMaskState(
            sign_ema=sign_ema,
            kept_fraction=kept_fraction,
            mask_count=optax.safe_increment(state.mask_count),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_temporal_and_mask_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    b3: ArrayLike = 0.9,
    threshold: Threshold = 0.4,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    bias_correction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction, masked by the agreement of signs over time.

    .. math::
      m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad
      v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
      a \leftarrow \beta_3 a + (1 - \beta_3) \operatorname{sign}(g) \\
      u &\leftarrow 1[\,|a| \ge \tau\,] \odot
      \frac{\hat m}{\sqrt{\hat v + \bar\epsilon} + \epsilon}

    `temporal_and_mask_adam` without learning rate and weight decay, for chains of
    your own. Moments and their ratio are computed in at least float32 whatever the
    dtype of the gradients, to which the update is cast at the end.

    Args:
      b1: :math:`\beta_1`, decay of the first moment, in [0, 1).
      b2: :math:`\beta_2`, decay of the second moment, in [0, 1).
      b3: :math:`\beta_3`, decay of the average of signs, in [0, 1); never
        bias-corrected.
      threshold: :math:`\tau` in [0, 1]. A scalar, a schedule (a function of the
        number of updates so far), or a tree of these that is a prefix of params. 0
        is `optax.scale_by_adam`, bit by bit in float32 and float64. What a schedule
        returns is not checked to be in [0, 1].
      eps: :math:`\epsilon` >= 0, added to the root of the second moment.
      eps_root: :math:`\bar\epsilon` >= 0, added to the second moment under the root.
      mu_dtype: dtype of the first moment in the state; None is float32, or float64
        for float64 parameters.
      nesterov: look ahead, :math:`\hat m \leftarrow \beta_1 \hat m + (1 - \beta_1)
        \hat g`, as `optax.scale_by_adam` does.
      bias_correction: correct the moments' start at zero, as Adam does. False is the
        paper's listing to the letter: :math:`\hat m = m`, :math:`\hat v = v`, and
        with `nesterov`, which the listing does not have, :math:`\beta_1 m + (1 -
        \beta_1) g`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state
      `ScaleByTemporalAndMaskAdamState`; gradients and updates are shaped like params.

    Raises:
      TypeError: a hyperparameter that is no real scalar, a `mu_dtype` that is not
        floating, `nesterov` or `bias_correction` other than True and False;
        (tracing) integer, boolean or complex gradients.
      ValueError: b1, b2 or b3 outside [0, 1), threshold outside [0, 1], eps or
        eps_root negative or not finite; (tracing) gradients that are not shaped like
        params, such as stacked ones; a tree of thresholds that is no prefix of
        params.

    Edge cases:
      ==========================  ==================================================
      threshold 0                 `optax.scale_by_adam`
      threshold 1                 open once the average has rounded to 1
      a zero gradient             moves the average towards 0; nothing but zeros so
                                  far: a zero update
      eps 0                       NaN, as in optax, where threshold is 0 and the
                                  gradient was nothing but zeros so far
      NaN or infinity             that component's update is NaN, and stays it: wrap
                                  the whole chain in `optax.apply_if_finite`
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, optax, hardvary
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     hardvary.scale_by_temporal_and_mask_adam(b3=0.5, threshold=0.4),
      ...     optax.scale_by_learning_rate(0.1),
      ... )
      >>> params = jnp.ones(2)
      >>> updates, state = tx.update(jnp.array([3.0, 0.0]), tx.init(params), params)
      >>> [round(p, 3) for p in optax.apply_updates(params, updates).tolist()]
      [0.9, 1.0]
      >>> float(optax.tree.get(state, "kept_fraction"))
      0.5

    References:
      Parascandolo et al., `Learning explanations that are hard to vary
      <https://arxiv.org/abs/2009.00329>`_, ICLR 2021, Algorithm 1.
    """
    return _scale_by_adam(
        "scale_by_temporal_and_mask_adam",
        b1=b1,
        b2=b2,
        b3=b3,
        threshold=threshold,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        bias_correction=bias_correction,
    )


def temporal_and_mask_adam(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    b3: ArrayLike = 0.9,
    threshold: Threshold = 0.4,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[optax.Params], PyTree] | None = None,
    nesterov: bool = False,
    bias_correction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam whose step is masked by the agreement of signs over time.

    .. math::
      m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad
      v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
      a \leftarrow \beta_3 a + (1 - \beta_3) \operatorname{sign}(g) \\
      \theta &\leftarrow \theta - \alpha \Big( 1[\,|a| \ge \tau\,] \odot
      \frac{\hat m}{\sqrt{\hat v + \bar\epsilon} + \epsilon} + \lambda \theta \Big)

    For training that sees one environment per step (paper, Algorithm 1 and
    section 3.3). The weight decay :math:`\lambda` is decoupled and comes after the
    mask, so masked weights decay too. All of it is computed in at least float32
    whatever the dtype of the parameters, and the update is cast at the end. Under
    `optax.inject_hyperparams`, pass `hyperparam_dtype=jnp.float32`: it rounds
    hyperparameters to the parameters' dtype, and 0.999 is 1 in bfloat16, 1e-8 is 0 in
    float16.

    Args:
      learning_rate: :math:`\alpha`, a scalar or a schedule.
      b1: :math:`\beta_1`, decay of the first moment, in [0, 1).
      b2: :math:`\beta_2`, decay of the second moment, in [0, 1).
      b3: :math:`\beta_3`, decay of the average of signs, in [0, 1); never
        bias-corrected.
      threshold: :math:`\tau` in [0, 1]. A scalar, a schedule (a function of the
        number of updates so far), or a tree of these that is a prefix of params. 0
        is `optax.adamw` with the same options, bit by bit in float32 and float64.
        What a schedule returns is not checked to be in [0, 1].
      eps: :math:`\epsilon` >= 0, added to the root of the second moment.
      eps_root: :math:`\bar\epsilon` >= 0, added to the second moment under the root.
      mu_dtype: dtype of the first moment in the state; None is float32, or float64
        for float64 parameters.
      weight_decay: :math:`\lambda` >= 0, a scalar or a schedule.
      mask: which parameters decay: a tree of booleans, a prefix of params, or a
        function from params to one. None decays everything.
      nesterov: look ahead as `optax.nadamw` does.
      bias_correction: correct the moments' start at zero, as Adam does; False is
        the paper's listing to the letter. See `scale_by_temporal_and_mask_adam`, also
        for both together.

    Returns:
      An `optax.GradientTransformationExtraArgs` over gradients shaped like params;
      its state is a tuple that begins with a `ScaleByTemporalAndMaskAdamState`.
      `update` needs `params` unless weight_decay is 0.

    Raises:
      TypeError: a hyperparameter that is no real scalar, a `mu_dtype` that is not
        floating, `nesterov` or `bias_correction` other than True and False;
        (tracing) integer, boolean or complex gradients.
      ValueError: b1, b2 or b3 outside [0, 1), threshold outside [0, 1]; eps, eps_root
        or weight_decay negative or not finite, a learning rate that is not finite;
        (tracing) gradients that are not shaped like params, such as stacked ones; a
        tree of thresholds that is no prefix of params; `update` without params where
        weight_decay is not 0.

    Edge cases:
      ==========================  ==================================================
      threshold 0                 `optax.adamw`
      threshold 1                 open once the average has rounded to 1
      a zero gradient             moves the average towards 0; nothing but zeros so
                                  far: no step but the decay
      eps 0                       NaN, as in optax, where threshold is 0 and the
                                  gradient was nothing but zeros so far
      NaN or infinity             that component's update is NaN, and stays it: wrap
                                  the whole chain in `optax.apply_if_finite`
      ==========================  ==================================================

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
    if not callable(learning_rate):
        _validate.scalar("learning_rate", learning_rate, rule="or a schedule")
        rate = _validate.concrete_value(learning_rate)
        if rate is not None and not math.isfinite(rate):
            raise ValueError(f"learning_rate must be finite, got {rate}")
    decays = True
    if not callable(weight_decay):
        _validate.finite_at_least("weight_decay", weight_decay, 0.0)
        decays = _validate.concrete_value(weight_decay) != 0.0
    if decays:
        decay = optax.add_decayed_weights(weight_decay, mask)
    else:
        # add_decayed_weights asks for params even where it adds nothing.
        decay = optax.identity()
        if mask is not None:
            # The state of a traced weight decay, which inject_hyperparams makes of 0.
            decay = optax.masked(decay, mask)
    adam = _scale_by_adam(
        "temporal_and_mask_adam",
        b1=b1,
        b2=b2,
        b3=b3,
        threshold=threshold,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        bias_correction=bias_correction,
    )
    return _computed_wide(
        optax.chain(adam, decay, optax.scale_by_learning_rate(learning_rate))
    )


def _scale_by_adam(
    name: str,
    *,
    b1: ArrayLike,
    b2: ArrayLike,
    b3: ArrayLike,
    threshold: Threshold,
    eps: ArrayLike,
    eps_root: ArrayLike,
    mu_dtype: DTypeLike | None,
    nesterov: bool,
    bias_correction: bool,
) -> optax.GradientTransformationExtraArgs:
    _validate.decay_rate("b1", b1)
    _validate.decay_rate("b2", b2)
    _validate.decay_rate("b3", b3)
    _hyperparams.check_unit_interval("threshold", threshold)
    _validate.finite_at_least("eps", eps, 0.0)
    _validate.finite_at_least("eps_root", eps_root, 0.0)
    mu_dtype = _floating_dtype("mu_dtype", mu_dtype)
    for flag, value in (("nesterov", nesterov), ("bias_correction", bias_correction)):
        if not isinstance(value, bool):
            raise TypeError(f"{flag} must be True or False, got {value!r}")
    b1, b2, eps, eps_root = map(_at_least_float32, (b1, b2, eps, eps_root))

    def init_fn(params: PyTree) -> ScaleByTemporalAndMaskAdamState:
        _validate.real_floating(params, f"{name}: params")
        return ScaleByTemporalAndMaskAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=_wide_zeros(params, mu_dtype),
            nu=_wide_zeros(params),
            sign_ema=_wide_zeros(params),
            kept_fraction=jnp.zeros((), jnp.float32),
        )

    def corrected(moment: PyTree, decay: ArrayLike, count: jax.Array) -> PyTree:
        if not bias_correction:
            return moment
        return optax.tree.bias_correction(moment, decay, count)

    def update_fn(
        updates: PyTree,
        state: ScaleByTemporalAndMaskAdamState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByTemporalAndMaskAdamState]:
        del params, extra_args
        _check_gradients(updates, state.sign_ema, name)
        sign_ema = _average_signs(state.sign_ema, updates, b3)
        # From here on optax.scale_by_adam, operation by operation: the bits agree.
        grads = _cast_like(updates, state.nu)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        if nesterov:
            mu_hat = jax.tree.map(
                lambda m, g: b1 * m + (1 - b1) * g,
                corrected(mu, b1, optax.safe_increment(count)),
                corrected(grads, b1, count),
            )
        else:
            mu_hat = corrected(mu, b1, count)
        direction = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v + eps_root) + eps),
            mu_hat,
            corrected(nu, b2, count),
        )
        masked, kept_fraction = _let_pass(direction, sign_ema, threshold, state.count)
        return _cast_like(masked, updates), ScaleByTemporalAndMaskAdamState(
            count=count,
            mu=_cast_like(mu, state.mu),
            nu=_cast_like(nu, state.nu),
            sign_ema=sign_ema,
            kept_fraction=kept_fraction,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _computed_wide(
    transform: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`transform` in at least float32, with updates in the dtype of the gradients."""

    def widen(leaf: Any) -> Any:
        # Other dtypes are for the checks in `transform` to refuse.
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            return leaf
        return jnp.asarray(leaf).astype(_validate.wide(dtype))

    def update_fn(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.OptState]:
        new_updates, state = transform.update(
            jax.tree.map(widen, updates),
            state,
            jax.tree.map(widen, params),
            **extra_args,
        )
        return _cast_like(new_updates, updates), state

    return optax.GradientTransformationExtraArgs(transform.init, update_fn)


def _check_gradients(grads: PyTree, sign_ema: PyTree, name: str) -> None:
    _validate.real_floating(grads, f"{name}: gradients")
    _validate.same_shapes(
        grads,
        sign_ema,
        f"{name}: gradients",
        "it takes the gradient of one environment per step; for stacked gradients "
        "use and_mask",
    )


def _average_signs(sign_ema: PyTree, grads: PyTree, decay: ArrayLike) -> PyTree:
    def average(ema: jax.Array, grad: Any) -> jax.Array:
        rate = jnp.asarray(decay).astype(ema.dtype)
        vote = sign_or_nan(jnp.asarray(grad)).astype(ema.dtype)
        return rate * ema + (1 - rate) * vote

    return jax.tree.map(average, sign_ema, grads)


def _let_pass(
    updates: PyTree,
    sign_ema: PyTree,
    threshold: Threshold,
    count: jax.Array,
) -> tuple[PyTree, jax.Array]:
    """Returns updates behind the mask, NaN where the average is, and the kept share."""

    def is_open(ema: jax.Array, value: ArrayLike) -> jax.Array:
        slack = 4 * float(jnp.finfo(ema.dtype).eps)
        return jnp.abs(ema) >= jnp.asarray(value).astype(ema.dtype) - slack

    def gate(passes: jax.Array, ema: jax.Array, update: jax.Array) -> jax.Array:
        masked = jnp.where(passes, update, 0)
        masked = jnp.where(jnp.isnan(ema), jnp.nan, masked)
        return masked.astype(jnp.result_type(update))

    thresholds = _hyperparams.per_leaf("threshold", threshold, sign_ema, count)
    thresholds = jax.tree.unflatten(jax.tree.structure(sign_ema), thresholds)
    mask = jax.tree.map(is_open, sign_ema, thresholds)
    leaves = jax.tree.leaves(mask)
    kept = [jnp.sum(leaf, dtype=jnp.float32) for leaf in leaves]
    size = sum(leaf.size for leaf in leaves)
    return (
        jax.tree.map(gate, mask, sign_ema, updates),
        sum(kept, jnp.zeros((), jnp.float32)) / max(size, 1),
    )


def _wide_zeros(params: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    def zeros(param: Any) -> jax.Array:
        # A half-precision average stalls: its steps round to nothing near 1.
        wide = _validate.wide(jnp.result_type(param))
        return jnp.zeros_like(param, dtype=wide if dtype is None else dtype)

    return jax.tree.map(zeros, params)


def _cast_like(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, other: jnp.asarray(leaf).astype(jnp.result_type(other)),
        tree,
        like,
    )


def _at_least_float32(value: ArrayLike) -> ArrayLike:
    """Widens a half-precision scalar; what is weakly typed stays so."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return value
    return jnp.asarray(value).astype(_validate.wide(dtype))


def _floating_dtype(name: str, value: DTypeLike | None) -> DTypeLike | None:
    if value is None:
        return None
    message = f"{name} must be a floating dtype such as jnp.bfloat16 or None, got "
    try:
        dtype = jax.dtypes.canonicalize_dtype(value)
    except TypeError as error:
        raise TypeError(f"{message}{value!r}") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{message}{value!r}")
    return dtype
