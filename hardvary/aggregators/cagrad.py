"""As good for the worst environment as near the mean is possible."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hardvary import _hyperparams, _validate, sharding
from hardvary._typing import AxisName, ScalarOrSchedule
from hardvary.aggregators.quadratic import cosines, shortest_reaching
from hardvary.aggregators.weighting import of_gramian


def cagrad(
    c: ScalarOrSchedule = 0.5, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The update near the mean that does most for the environment it does least for.

    .. math::
      u = \arg\max_{u} \min_e \langle u, g_e \rangle \quad\text{subject to}\quad
      \|u - g_0\| \le c \, \|g_0\|, \qquad g_0 = \sum_e p_e g_e

    Conflict-averse gradient descent. With `c < 1` it still converges to a minimum of
    the mean loss; with `c = 0` it is the mean. The weights :math:`p` are `env_weights`
    with the sum 1, equal unless given. Solved exactly; what some codes do to
    its length afterwards is left to `optax.scale`.

    Args:
      c: >= 0, how far from the mean the update may go, in lengths of the mean; possibly
        traced, or a schedule.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `weighting`.

    Raises:
      TypeError: a c that is no real scalar or schedule; (tracing) as `weighting`.
      ValueError: a negative, infinite or NaN c; (tracing) as `weighting`.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in a present environment: everything is NaN
      an environment of weight 0  as if it were not there, whatever it holds
      a mean of 0                 0
      no direction helps all      of all updates that are best for the worst, the one
                                  nearest to the mean: that of `dualproj`, if `c` allows
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.cagrad(c=0.5)
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[2.0, 0.0], [0.0, 2.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates.tolist()]
      [1.5, 1.5]

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, NeurIPS 2021.

    Warning:
      Must come first in an `optax.chain`.
    """
    number = _hyperparams.check_number("c", c)
    if number is not None:
        _validate.finite_at_least("c", number, 0.0)

    def rule(gramian: jax.Array, shares: jax.Array, size: Any, c: Any) -> jax.Array:
        del size
        matrix, lengths = cosines(gramian)
        product = lambda w: jnp.matmul(  # noqa: E731
            matrix, w, precision=jax.lax.Precision.HIGHEST
        )
        here = shares > 0
        mean = shares * lengths
        slopes = product(mean)  # <g_e, g_0> / |g_e|
        norm = jnp.sqrt(jnp.maximum(mean @ slopes, 0))
        radius = jnp.asarray(c, norm.dtype) * norm
        inverse = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
        safe = jnp.where(radius > 0, radius, 1)
        # Where no direction helps all, what is best is at the edge of what can be had:
        # rounding is not to push it over.
        slack = 8 * jnp.finfo(norm.dtype).eps * (jnp.abs(slopes) + radius)

        def go_on(state: Any) -> jax.Array:
            *_, moves, count = state
            return moves & (count < 60)

        def step(state: Any) -> Any:
            # The shortest way from the mean to a gain of t for all. Where too long,
            # its multipliers say what nobody can have more than: Newton's method for a
            # convex function, from above, and Lagrange's dual.
            gain, x, *_, count = state
            heights = (gain * inverse - slopes) / safe
            heights = jnp.where(lengths > 0, heights, 0)
            x, rest = shortest_reaching(matrix, heights, x > 0)
            length = jnp.sqrt(jnp.maximum(x @ product(x), 0))
            total = jnp.sum(x * inverse)
            bound = x @ (slopes - slack) + radius * length
            bound /= jnp.where(total > 0, total, 1)
            moves = ((length > rest) | (rest < 0.25)) & (bound < gain)
            return jnp.where(moves, bound, gain), x, rest, length, moves, count + 1

        most = jnp.min(jnp.where(here, (slopes + radius) * lengths, jnp.inf))
        nothing, one = jnp.zeros_like(mean), jnp.ones_like(norm)
        start = (most, nothing, one, one, jnp.asarray(True), jnp.asarray(0))
        start = sharding.vary_like(start, (most, radius))
        _, x, rest, length, *_ = jax.lax.while_loop(go_on, step, start)
        # The length is at most the radius: rest >= 1/2, but for rounding.
        weights = mean + radius * x / jnp.maximum(jnp.maximum(rest, length), 0.25)
        return jnp.where(lengths > 0, weights * inverse, shares)

    return of_gramian(rule, name="cagrad", axis_name=axis_name, hyperparams={"c": c})
