"""Penalties and a gradient reversal that plain training uses against shortcuts.

What the AND-mask is compared with: each changes the loss where a mask changes the
gradient, so they work with any optimizer. `vrex_penalty` is of all environments
together; the others go into the `loss_fn` of one.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hardvary import _validate
from hardvary._typing import PyTree

__all__ = ["irm_penalty", "reverse_gradient", "vrex_penalty"]


def irm_penalty(logits: Any, labels: Any) -> jax.Array:
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


def vrex_penalty(losses: Any) -> jax.Array:
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


def reverse_gradient(x: PyTree, scale: Any = 1.0) -> PyTree:
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
