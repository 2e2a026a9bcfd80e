"""Penalties and a gradient reversal that plain training uses against shortcuts.

What the AND-mask is compared with: each changes the loss where a mask changes the
gradient, so they work with any optimizer. `vrex_penalty`, `iga_penalty` and
`fishr_penalty` are of all environments together; the others go into the `loss_fn` of
one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hardvary import _validate
from hardvary._env_grads import grad_stats
from hardvary._typing import PyTree

__all__ = [
    "fishr_penalty",
    "iga_penalty",
    "irm_penalty",
    "reverse_gradient",
    "vrex_penalty",
]


def irm_penalty(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    r"""Invariant risk minimisation's penalty on one environment (IRMv1).

    .. math:: \Big(\tfrac{\partial}{\partial w} R(w \cdot z)\Big|_{w=1}\Big)^2

    with the logits :math:`z` and the mean cross-entropy :math:`R`. It is 0 where
    stretching or shrinking all logits of the environment would not lower its loss: an
    invariant classifier is that in every environment at once.

    Args:
      logits: floating; `[...]` with `labels` of the same shape for two classes (the
        logit of class 1, sigmoid cross-entropy), or `[..., classes]` with integer
        `labels` of shape `[...]` (softmax cross-entropy). All axes but the classes'
        are examples.
      labels: two classes: 0 or 1 (or a probability), floating, integer or boolean.
        More: integers in [0, classes).

    Returns:
      A scalar >= 0 in the dtype of the logits; sums are in float32 or wider.

    Raises:
      TypeError: logits that are not real floating, complex labels.
      ValueError: labels that are neither of the shape of the logits nor, as integers,
        of that shape without its last axis; no examples.

    Edge cases:
      ==========================  ==================================================
      one-hot labels              have the shape of the logits: as many two-class
                                  problems. Pass integers for a softmax
      a class outside the range   NaN, also for -1
      an infinite logit           infinite or NaN
      ==========================  ==================================================

    Example:
      >>> import jax, jax.numpy as jnp, hardvary
      >>> logits = jnp.array([[2.0, -1.0], [2.0, 1.0]])  # [env, example]
      >>> labels = jnp.array([[1, 0], [1, 0]])
      >>> penalties = jax.vmap(hardvary.objectives.irm_penalty)(logits, labels)
      >>> [round(p, 4) for p in penalties.tolist()]
      [0.0644, 0.0607]

    References:
      Arjovsky, Bottou, Gulrajani and Lopez-Paz, `Invariant Risk Minimization
      <https://arxiv.org/abs/1907.02893>`_, 2019, equation (IRMv1).

    Warning:
      The square of a gradient over few examples is biased upwards by its variance.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    _validate.real_floating(logits, "irm_penalty: logits")
    if jnp.issubdtype(labels.dtype, jnp.complexfloating):
        raise TypeError(f"irm_penalty: labels must be real, got dtype {labels.dtype}")
    if logits.size == 0:
        raise ValueError(
            "irm_penalty: logits must hold at least one example, got shape "
            f"{logits.shape}"
        )
    z = logits.astype(_validate.wide(logits.dtype))
    # d/dw of the loss of w * z, at w = 1, in closed form.
    if labels.shape == logits.shape:
        slopes = z * (jax.nn.sigmoid(z) - labels.astype(z.dtype))
    elif labels.shape == logits.shape[:-1] and jnp.issubdtype(
        labels.dtype, jnp.integer
    ):
        classes = logits.shape[-1]
        labels = labels.astype(jnp.int32)  # 256 classes are no uint8
        chosen = jnp.take_along_axis(z, labels[..., None], axis=-1)[..., 0]
        # Indexing would wrap -1 around to the last class.
        chosen = jnp.where((labels >= 0) & (labels < classes), chosen, jnp.nan)
        slopes = jnp.sum(jax.nn.softmax(z) * z, axis=-1) - chosen
    else:
        raise ValueError(
            "irm_penalty: labels must have the shape of the logits (two classes), or "
            "be integers of that shape without the last axis (classes), got shape "
            f"{labels.shape} and dtype {labels.dtype} for logits of shape "
            f"{logits.shape}"
        )
    return jnp.square(jnp.mean(slopes)).astype(logits.dtype)


def vrex_penalty(losses: ArrayLike) -> jax.Array:
    r"""Variance of the loss over environments (V-REx).

    .. math:: \tfrac1d \sum_e \Big(R_e - \tfrac1d \sum_{e'} R_{e'}\Big)^2

    It ties environments together: the loss of one alone has no such gradient, so it
    goes with plain gradients of the mean loss, not into the `loss_fn` of an oracle.

    Args:
      losses: floating `[env]`, the mean loss of each environment.

    Returns:
      A scalar >= 0 in the dtype of the losses; sums are in float32 or wider. The
      variance of the environments given, not an estimate for others: the divisor is
      their number.

    Raises:
      TypeError: losses that are not real floating.
      ValueError: losses that are not one-dimensional, or none.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> losses = jnp.array([1.0, 3.0])  # [env]
      >>> float(losses.mean() + 10.0 * hardvary.objectives.vrex_penalty(losses))
      12.0

    References:
      Krueger et al., `Out-of-Distribution Generalization via Risk Extrapolation
      (REx) <https://arxiv.org/abs/2003.00688>`_, ICML 2021, V-REx.
    """
    losses = jnp.asarray(losses)
    _validate.real_floating(losses, "vrex_penalty: losses")
    if losses.ndim != 1 or losses.size == 0:
        raise ValueError(
            "vrex_penalty: losses must have shape [env], one mean loss for each of at "
            f"least one environment, got shape {losses.shape}"
        )
    wide = losses.astype(_validate.wide(losses.dtype))
    return jnp.var(wide).astype(losses.dtype)


def iga_penalty(stats: PyTree) -> jax.Array:
    r"""Variance of the gradient over environments (IGA).

    .. math:: \tfrac1d \sum_e \|g_e - \bar g\|^2 = \sum_j \tfrac1d \sum_e g_{e,j}^2
      - \bar g_j^2

    Exact from two statistics; no gradient is stacked for its value. A gradient of it is
    a second derivative of the loss, through the oracle.

    Args:
      stats: tree of `GradStats` that hold `"mean"` and `"square"` over the
        environments.

    Returns:
      A scalar, at least float32. As a difference it is known to the rounding of the
      gradients' squares, and may be slightly below 0 where all environments have the
      same gradient.

    Raises:
      TypeError: a leaf that is no `GradStats`.
      ValueError: a statistic that it does not hold, statistics of several sets of
        environments; no leaves.

    Example:
      >>> import jax, jax.numpy as jnp, hardvary
      >>> loss = lambda w, x: 0.5 * (w * x - 1.0) ** 2
      >>> stats = hardvary.grad_stats(loss, stats=("mean", "square"))
      >>> x = jnp.array([1.0, 2.0])  # [env]
      >>> penalty = lambda w: hardvary.objectives.iga_penalty(stats(w, x))
      >>> float(penalty(0.0)), float(jax.grad(penalty)(0.0))
      (0.25, -1.5)

    References:
      Koyama and Yamaguchi, `When is invariance useful in an Out-of-Distribution
      Generalization problem? <https://arxiv.org/abs/2008.01883>`_, 2020.
    """
    return sum(map(jnp.sum, _variances("iga_penalty", stats, 0)), jnp.zeros(()))


def fishr_penalty(stats: PyTree) -> jax.Array:
    r"""How far environments differ in the variance of examples' gradients (Fishr).

    .. math:: \tfrac1d \sum_e \|v_e - \bar v\|^2, \qquad
      v_e = \operatorname{Var}_{i \in e} \, \nabla \ell_i

    component by component. The method takes the gradients of the last layer alone, and
    averages the variances over time; both are up to the caller.

    Args:
      stats: tree of `GradStats` that hold `"mean"` and `"square"` over the examples of
        each environment, arrays `[env, *param.shape]`: `grad_stats` of the loss of one
        example, under `jax.vmap` over environments.

    Returns:
      A scalar >= 0, at least float32.

    Raises:
      TypeError: a leaf that is no `GradStats`.
      ValueError: a statistic that it does not hold, statistics without an axis of
        environments; no leaves.

    Example:
      >>> import jax, jax.numpy as jnp, hardvary
      >>> loss = lambda w, x: 0.5 * (w * x - 1.0) ** 2
      >>> of_env = hardvary.grad_stats(loss, stats=("mean", "square"))
      >>> x = jnp.array([[1.0, 2.0], [1.0, 1.0]])  # [env, example]
      >>> stats = jax.vmap(of_env, (None, 0))(0.0, x)
      >>> float(hardvary.objectives.fishr_penalty(stats))
      0.015625

    References:
      Rame, Dancette and Cord, `Fishr: Invariant Gradient Variances for
      Out-of-Distribution Generalization <https://arxiv.org/abs/2109.02934>`_, ICML
      2022.
    """

    def spread(variances: jax.Array) -> jax.Array:
        return jnp.sum(jnp.var(variances, axis=0))

    return sum(map(spread, _variances("fishr_penalty", stats, 1)), jnp.zeros(()))


def _variances(name: str, stats: PyTree, ndim: int) -> list[jax.Array]:
    """Variances of gradients, a parameter each, in at least float32.

    Args:
      name: for messages.
      stats: see `iga_penalty`.
      ndim: number of axes in front of those of a parameter.
    """
    leaves = jax.tree.leaves(
        stats, is_leaf=lambda node: isinstance(node, grad_stats.GradStats)
    )
    if not leaves:
        raise ValueError(f"{name}: a tree without leaves has no gradients")
    result = []
    for leaf in leaves:
        if not isinstance(leaf, grad_stats.GradStats):
            raise TypeError(
                f"{name} takes a tree of GradStats, as grad_stats returns it, got "
                f"{_validate.a_or_an(type(leaf).__name__)}"
            )
        if leaf.mean is None or leaf.square_mean is None:
            raise ValueError(
                f"{name} needs the mean and the square of gradients; ask for them with "
                'grad_stats(loss_fn, stats=("mean", "square"))'
            )
        if jnp.ndim(leaf.num_envs) != ndim:
            raise ValueError(
                f"{name} takes statistics over "
                + ("the examples of each environment" if ndim else "environments")
                + f", so num_envs of shape {('env',) * ndim}, got a GradStats with "
                f"num_envs of shape {jnp.shape(leaf.num_envs)}: grad_stats "
                + ("under jax.vmap" if ndim else "without jax.vmap")
            )
        mean = leaf.mean.astype(_validate.wide(leaf.mean.dtype))
        result.append(leaf.square_mean - mean**2)
    return result


def reverse_gradient(x: PyTree, scale: ArrayLike = 1.0) -> PyTree:
    r"""The identity, with a derivative of `-scale`.

    .. math:: R(x) = x, \qquad \frac{\partial R}{\partial x} = -\lambda I

    Between features and a classifier of environments, it makes one descent train both
    against each other: the classifier tells environments apart, the features stop it
    (DANN).

    Args:
      x: array or tree of arrays, real floating.
      scale: :math:`\lambda` >= 0, finite; may be traced, for a schedule. Its own
        gradient is 0.

    Returns:
      `x`, as it is. In backward mode every cotangent that passes is multiplied by
      `-scale`, in its dtype; in forward mode every tangent. Each derivative taken
      through it reverses once more: the second derivative of `f(R(x))` is
      :math:`\lambda^2 f''(x)`.

    Raises:
      TypeError: a leaf of x that is not real floating, a scale that is no real
        scalar.
      ValueError: a scale that is negative or not finite (concrete values only).

    Example:
      >>> import jax, jax.numpy as jnp, hardvary
      >>> x = jnp.array([1.0, 2.0])
      >>> f = lambda x: jnp.sum(hardvary.objectives.reverse_gradient(x, 0.5) ** 2)
      >>> float(f(x)), jax.grad(f)(x).tolist()
      (5.0, [-1.0, -2.0])

    References:
      Ganin et al., `Domain-Adversarial Training of Neural Networks
      <https://jmlr.org/papers/v17/15-239.html>`_, JMLR 17(59), 2016: its
      gradient reversal layer.
    """
    _validate.finite_at_least("scale", scale, 0.0)
    _validate.real_floating(x, "reverse_gradient: x")
    return _reverse(x, scale)


# A custom_jvp, not a custom_vjp: forward mode works too, and agrees.
@jax.custom_jvp
def _reverse(x: PyTree, scale: Any) -> PyTree:
    return x


@_reverse.defjvp
def _reverse_jvp(
    primals: tuple[PyTree, Any], tangents: tuple[PyTree, Any]
) -> tuple[PyTree, PyTree]:
    x, scale = primals
    factor = -jnp.asarray(scale)
    reversed_ = jax.tree.map(lambda t: factor.astype(t.dtype) * t, tangents[0])
    # Not x itself: a derivative of the derivative would miss the reversal.
    return _reverse(x, scale), reversed_
