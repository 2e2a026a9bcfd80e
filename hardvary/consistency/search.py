"""Inconsistency of a network: searches from its parameters, pair by pair."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate
from hardvary._typing import PyTree
from hardvary.consistency.walk import Found, Search


class Inconsistency(NamedTuple):
    """What `inconsistency` found, with the way to it.

    Attributes:
      score: scalar, a lower bound on the inconsistency score; reached at `params`.
      pair: int32 `[2]`, the `(e, e')` of the score.
      params: the parameters found, a tree like those given.
      pairs: int32 `[pair, 2]`, the pairs that were searched.
      pair_scores: `[pair]`, a lower bound for each of them.
      path: tree like the parameters with a leading axis `[num_steps + 1]`: corners of a
        polygonal path from the parameters given to those found.
      max_deviation: scalar, the largest change of the loss of `e` from its value at the
        parameters given, at `num_samples` points of every edge of the path: the
        certificate, at most epsilon.
      max_jump: scalar, the largest change of that loss from one of these points to the
        next. Where it is far below epsilon, the points are close enough together to
        trust them with what lies between.
    """

    score: jax.Array
    pair: jax.Array
    params: PyTree
    pairs: jax.Array
    pair_scores: jax.Array
    path: PyTree
    max_deviation: jax.Array
    max_jump: jax.Array


def inconsistency(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    epsilon: Any,
    *,
    key: jax.Array,
    pairs: Any = None,
    num_starts: int = 4,
    num_steps: int = 24,
    cg_steps: int = 20,
    damping: float = 1e-6,
    max_distance: Any = None,
    num_samples: int = 64,
    batch_size: int | None = None,
) -> Inconsistency:
    r"""Lower bound on the inconsistency score of a network's parameters.

    .. math::

      I_\epsilon(\theta^*) = \max_{e, e'} \max_{\theta \in N(e, \theta^*, \epsilon)}
          |L_{e'}(\theta) - L_e(\theta^*)|

    For each pair of environments and from several random starts, a search follows the
    neighbourhood :math:`N(e, \theta^*, \epsilon)` from :math:`\theta^*`, the way
    :math:`L_{e'}` changes most. Each step tries straight rays: along the gradient of
    :math:`L_{e'}`, plain and multiplied by the damped inverse Hessian of :math:`L_e`
    (conjugate gradients), turned inwards by several amounts, and a random one. Along
    each it goes no further than the loss of `e` allows without interruption, and takes
    the one with the largest change. All it claims lies on a path that it returns, with
    a certificate; what it did not find may still exist.

    Args:
      loss_fn: `loss_fn(params, env_batch) -> scalar`, the loss of one environment,
        twice differentiable.
      params: :math:`\theta^*`; tree of real floating leaves.
      batch: tree of leaves `[env, ...]`.
      epsilon: :math:`\epsilon` > 0, in units of the loss; may be traced.
      key: random key, `jax.random.key(seed)`.
      pairs: integer `[pair, 2]`, the ordered pairs `(e, e')` to search; without it, all
        with `e != e'`.
      num_starts: random starts for each pair.
      num_steps: steps of each search, and edges of a path.
      cg_steps: steps of conjugate gradients, two Hessian-vector products each; at most
        the number of parameters.
      damping: added to the Hessian, relative to its typical curvature.
      max_distance: searches stay within this Euclidean distance of `params`; may be
        traced. Without it ten times the larger of 1 and the norm of `params`.
        Neighbourhoods of networks are often unbounded, and scores in them too.
      num_samples: points on each edge of a path at which the loss of `e` is checked.
      batch_size: so many searches run at once; without it one after the other. Takes
        memory for some 900 copies of the parameters each, and what the loss takes at
        408 points at once.

    Returns:
      An `Inconsistency`. The dtype of its scores is that of the parameters.

    Raises:
      TypeError: parameters that are not real floating, a loss that is not a real
        scalar, an epsilon or max_distance that is no real scalar.
      ValueError: a batch whose leaves disagree on the number of environments, fewer
        than two of them, pairs outside of [0, env), numbers of steps and the like below
        1, an epsilon that is not positive or a max_distance that is not positive and
        finite (concrete values only).

    Edge cases:
      ======================================  ======================================
      the loss of `e` is flat somewhere       what is found within `max_distance`
      a NaN or infinite loss in `e`           a wall
      a NaN loss in `e'`                      never counted as a change
      NaN at `params`                         NaN
      `params` not a minimum                  any point will do; where environments
                                              differ in loss, so does the score
      ======================================  ======================================

    Example:
      >>> import jax, jax.numpy as jnp, hardvary
      >>> curvatures = jnp.array([[1.0, 2.0], [6.0, 1.0]])  # [env, parameter]
      >>> loss_fn = lambda params, curvature: 0.5 * jnp.sum(curvature * params**2)
      >>> find = lambda params, key: hardvary.consistency.inconsistency(
      ...     loss_fn, params, curvatures, 0.1, key=key)
      >>> found = jax.jit(find)(jnp.zeros(2), jax.random.key(0))
      >>> round(float(found.score), 2), found.pair.tolist()  # epsilon times 6
      (0.6, [0, 1])
      >>> bool(found.max_deviation <= 0.1)
      True

    References:
      Parascandolo et al., ICLR 2021, section 2, equation (1); the paper does not
      compute it.

    Warning:
      Everything is traced anew in each call. Call it inside `jax.jit`, as above, if you
      call it more than once.
    """
    _validate.real_floating(params, "inconsistency: params")
    _validate.at_least("epsilon", epsilon, 0.0, strict=True)
    if max_distance is not None:
        _validate.at_least("max_distance", max_distance, 0.0, strict=True)
        _validate.finite_at_least("max_distance", max_distance, 0.0)
    _validate.finite_at_least("damping", damping, 0.0)
    for name, number in {
        "num_starts": num_starts,
        "num_steps": num_steps,
        "cg_steps": cg_steps,
        "num_samples": num_samples,
        "batch_size": 1 if batch_size is None else batch_size,
    }.items():
        _validate.at_least(name, number, 1)
    num_envs = _validate.leading_size(
        jax.tree.leaves_with_path(batch), "inconsistency: batch"
    )
    if num_envs is None or num_envs < 2:
        raise ValueError(
            "inconsistency: the batch must hold at least two environments, got "
            f"{num_envs or 0}"
        )
    pairs = _pairs(pairs, num_envs)
    search = Search(
        loss_fn, params, batch, epsilon, cg_steps, damping, max_distance, num_samples
    )
    number, at_once = len(pairs) * num_starts, batch_size or 1
    chunks = -(-number // at_once)
    # The last chunk is filled up with searches that were made already.
    indices = jnp.minimum(jnp.arange(chunks * at_once), number - 1)
    runs = pairs[indices // num_starts]
    keys = jax.random.split(key, number)[indices]

    def run(pair: jax.Array, key: jax.Array) -> Found:
        return search.run(pair, key, num_steps)

    # The paths of all searches would take far more memory than that of the best so far.
    def body(best: tuple[Found, jax.Array], chunk: Any) -> Any:
        if at_once == 1:
            # Mapped over one, every loop inside would be traced again and again.
            found = jax.tree.map(lambda leaf: leaf[None], run(*(x[0] for x in chunk)))
        else:
            found = jax.vmap(run)(*chunk)
        index = jnp.argmax(found.value)  # NaN, if there is any
        better = ~(found.value[index] <= best[0].value)
        candidate = jax.tree.map(lambda leaf: leaf[index], (found, chunk[0]))
        chosen = jax.tree.map(
            lambda new, old: jnp.where(better, new, old), candidate, best
        )
        return chosen, found.value

    first = (search.nothing(num_steps), jnp.zeros_like(runs[0]))
    inputs = jax.tree.map(
        lambda leaf: leaf.reshape(chunks, at_once, *leaf.shape[1:]), (runs, keys)
    )
    (best, pair), scores = jax.lax.scan(body, first, inputs)
    scores = scores.reshape(-1)[:number].reshape(len(pairs), num_starts)
    return Inconsistency(
        score=best.value,
        pair=pair,
        params=search.unravel(best.path[-1]),
        pairs=pairs,
        pair_scores=scores.max(1),
        path=jax.vmap(search.unravel)(best.path),
        max_deviation=best.max_deviation,
        max_jump=best.max_jump,
    )


def _pairs(pairs: Any, num_envs: int) -> jax.Array:
    if pairs is None:
        every = [(e, o) for e in range(num_envs) for o in range(num_envs) if e != o]
        return jnp.array(every, jnp.int32)
    values = np.asarray(pairs)
    if values.ndim != 2 or values.shape[1] != 2 or len(values) == 0:
        raise ValueError(
            "inconsistency: pairs must have shape [pair, 2] with at least one, got "
            f"shape {values.shape}"
        )
    if (
        not np.issubdtype(values.dtype, np.integer)
        or not ((values >= 0) & (values < num_envs)).all()
    ):
        raise ValueError(
            f"inconsistency: pairs must be integers in [0, {num_envs}), the "
            f"environments of the batch, got {values.tolist()}"
        )
    return jnp.asarray(values, jnp.int32)
