"""Gradients turned towards each other, as far as they usually agree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hardvary import _hyperparams, _validate
from hardvary._typing import AxisName
from hardvary.aggregators.weighting import of_gramian


def grad_vac(
    seed: ArrayLike,
    *,
    num_envs: int,
    beta: ArrayLike = 0.01,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Each gradient, turned towards those that it agrees with less than usual; their
    sum.

    .. math::
      h_e \leftarrow h_e + \|h_e\| \, \frac{\hat\varphi_{ef} \sqrt{1 - \varphi^2} -
      \varphi \sqrt{1 - \hat\varphi_{ef}^2}}
      {\|g_f\| \sqrt{1 - \hat\varphi_{ef}^2}} \, g_f
      \quad\text{if } \varphi < \hat\varphi_{ef}, \qquad
      \varphi = \frac{\langle h_e, g_f \rangle}{\|h_e\| \|g_f\|}

    for all :math:`f \ne e` in random order, :math:`h_e = g_e` at first. The goal
    :math:`\hat\varphi_{ef}` is a moving average of the cosines that were met, 0 before
    the first update, which is that of `pcgrad`. Gradient vaccine, over all parameters
    that the transformation sees. A sum, as in the paper.

    Args:
      seed: an integer >= 0 or a key (`jax.random.key`), possibly traced. Every update
        draws anew, the same on all devices.
      num_envs: number of environments, on all devices, for the state.
      beta: in [0, 1], share of a new cosine in its moving average; the paper has 0.01.
      axis_name: see `and_mask`.

    Returns:
      A transformation with the contract of `weighting`. Its state has the fields of
      `AggregatorState`, where mask_count counts the updates, and `memory`, the goals,
      `[env, env]`.

    Raises:
      TypeError: a seed that is neither an integer nor a key, a num_envs that is no
        integer, a beta that is no real scalar or schedule; (tracing) as `weighting`.
      ValueError: a negative seed, num_envs < 1, beta outside [0, 1]; (tracing) as
        `weighting`; another number of environments.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in a present environment: everything is NaN
      an environment of weight 0  as if it were not there, whatever it holds
      env_weights                 tell who is there; their size changes nothing
      a zero gradient             turns nothing and is not turned
      gradients that long agreed  a goal near 1 is dear: what is turned to it becomes
                                  up to 1 / sqrt(1 - goal^2) times as long
      ==========================  ==================================================

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> tx = hardvary.grad_vac(seed=0, num_envs=2)
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])  # [env, 2]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates.tolist()]
      [0.5, 1.5]

    References:
      Wang et al., `Gradient Vaccine: Investigating and Improving Multi-task
      Optimization in Massively Multilingual Models
      <https://arxiv.org/abs/2010.05874>`_, ICLR 2021.

    Warning:
      Must come first in an `optax.chain`.
    """
    _validate.prng_key("seed", seed)
    number = _validate.whole_number("num_envs", num_envs, 1)
    _hyperparams.check_share("beta", beta, "a new cosine in its moving average")

    def rule(
        gramian: jax.Array,
        shares: jax.Array,
        size: Any,
        key: jax.Array,
        beta: Any,
        memory: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        del size
        if len(gramian) != number:
            raise ValueError(
                f"grad_vac was made for num_envs={number}, got gradients of "
                f"{len(gramian)} environments"
            )
        here = shares > 0
        squares = jnp.diagonal(gramian)
        order = jax.vmap(lambda k: jax.random.permutation(k, number))(
            jax.random.split(key, number)
        )
        rows = jnp.arange(number)
        beta = jnp.asarray(beta, gramian.dtype)

        def turn(state: Any, other: jax.Array) -> tuple[Any, None]:
            coefficients, products, norms, goals = state
            meets = here & here[other] & (other != rows)
            meets &= (squares[other] > 0) & (norms > 0)
            inner, goal = products[rows, other], goals[rows, other]
            # Roots before products: a square of a square leaves the range of float32.
            long, far = (
                jnp.sqrt(jnp.where(meets, square, 1))
                for square in (norms, squares[other])
            )
            cosine = jnp.clip(inner / long / far, -1, 1)
            # A goal of 1 is out of reach.
            sine = jnp.sqrt(jnp.maximum(1 - goal**2, jnp.finfo(goal.dtype).eps))
            turned = goal * jnp.sqrt(jnp.maximum(1 - cosine**2, 0)) - cosine * sine
            turns = meets & (cosine < goal)
            share = jnp.where(turns, long / far * turned / sine, 0)
            coefficients = coefficients.at[rows, other].add(share)
            products += share[:, None] * gramian[other]
            norms += share * (2 * inner + share * squares[other])
            moved = (1 - beta) * goal + beta * cosine
            goals = goals.at[rows, other].set(jnp.where(meets, moved, goal))
            return (coefficients, products, jnp.maximum(norms, 0), goals), None

        start = jnp.diag(here.astype(gramian.dtype))
        state = (start, gramian, squares, memory.astype(gramian.dtype))
        (coefficients, _, _, goals), _ = jax.lax.scan(turn, state, order.T)
        weights = jnp.sum(jnp.where(here[:, None], coefficients, 0), axis=0)
        return weights, goals.astype(memory.dtype)

    return of_gramian(
        rule,
        name="grad_vac",
        axis_name=axis_name,
        hyperparams={"beta": beta},
        seed=seed,
        memory=jnp.zeros((number, number), jnp.float32),
    )
