"""Gradients of every environment, stacked or reduced on the way."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate
from hardvary._env_grads.statistics import (
    FIELDS,
    AxisName,
    finalize,
    mean_like,
    names_of,
    sum_over_envs,
    total_weight,
    vary_like,
    zero_sum,
)
from hardvary.fused import grouping as _fused
from hardvary.fused.explain import Explanation, explanation
from hardvary.fused.traced import Traced

PyTree = Any

METHODS = ("fused", "scan", "vmap")


def per_env_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Gradients of a loss for every environment, stacked along a new axis 0.

    `jax.vmap(jax.grad(loss_fn))` over the environment axis, with checks. It holds one
    copy of the parameters per environment; `grad_stats` needs none of them. Each
    environment has a forward pass of its own, so batch statistics are its own too.

    Args:
      loss_fn: `loss_fn(params, env_batch) -> loss`, a real scalar, of ONE environment.
      argnums: which positional arguments are parameters, shared by all environments;
        as in `jax.grad`. Every other positional argument is a batch.
      has_aux: whether `loss_fn` returns `(loss, aux)`.

    Returns:
      A function of the same positional arguments, where every leaf of a batch has the
      environment axis in front, `[env, ...]`. It returns gradients like the
      parameters with leaves `[env, *param.shape]`, or `(gradients, aux)` with aux
      leaves `[env, ...]`. Keyword arguments reach `loss_fn` as they are, the same for
      every environment.

    Raises:
      TypeError: a `loss_fn` that is not callable; (tracing) integer, boolean or
        complex parameters, a loss that is not a real scalar.
      ValueError: (tracing) batch leaves with different leading sizes, without an
        environment axis, or with zero environments; no batch at all.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> loss = lambda w, x: 0.5 * (w * x) ** 2
      >>> hardvary.per_env_grad(loss)(jnp.array(3.0), jnp.array([1.0, 2.0])).tolist()
      [3.0, 12.0]
    """
    with_value = value_and_per_env_grad(loss_fn, argnums, has_aux)

    def grad_fn(*args: Any, **kwargs: Any) -> Any:
        value, grads = with_value(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fn


def value_and_per_env_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Losses and gradients of every environment.

    Args:
      loss_fn: see `per_env_grad`.
      argnums: see `per_env_grad`.
      has_aux: see `per_env_grad`.

    Returns:
      A function like that of `per_env_grad` which returns `(losses, gradients)`, or
      `((losses, aux), gradients)`; losses are `[env]` in the loss's dtype.

    Raises:
      TypeError: as `per_env_grad`.
      ValueError: as `per_env_grad`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> loss = lambda w, x: 0.5 * (w * x) ** 2
      >>> losses, grads = hardvary.value_and_per_env_grad(loss)(
      ...     jnp.array(3.0), jnp.array([1.0, 2.0])
      ... )
      >>> losses.tolist(), grads.tolist()
      ([4.5, 18.0], [3.0, 12.0])
    """
    argnums = _check_arguments(loss_fn, argnums)

    def value_and_grad_fn(*args: Any, **kwargs: Any) -> Any:
        problem = _Problem(loss_fn, argnums, has_aux, args, kwargs)
        (losses, aux), grads = jax.vmap(problem.value_and_grad)(problem.batch)
        return ((losses, aux) if has_aux else losses), grads

    return value_and_grad_fn


def grad_stats(
    loss_fn: Callable[..., Any],
    *,
    stats: Sequence[str] = ("mean", "sign"),
    method: str = "fused",
    microbatch_size: int | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
) -> Callable[..., Any]:
    """Statistics of the gradients of all environments.

    What every aggregator of this library accepts in place of stacked gradients, at
    the memory of a few copies of the parameters instead of one per environment
    (paper, section 3: the same order of time and memory as gradient descent). Each
    environment has a forward pass of its own, so batch statistics are its own too.

    Args:
      loss_fn: `loss_fn(params, env_batch) -> loss`, a real scalar, of ONE environment.
      stats: which statistics to compute, from `"mean"`, `"sign"`, `"square"` and
        `"log_abs"`; see `GradStats` for what they are and each aggregator for what it
        needs.
      method: `"fused"` takes one forward and one backward pass for all environments,
        as plain training does, and reduces what they leave behind layer by layer;
        `explain` tells how. `"scan"` goes through the environments `microbatch_size`
        at a time and adds up; `"vmap"` stacks all gradients, then reduces. The results
        agree up to rounding; `"fused"` multiplies the signs of the two factors of a
        product where others take the sign of the product, so they differ where the
        product underflows.
      microbatch_size: environments handled at once, a divisor of their number. For
        `"fused"` all of them unless given: fewer bound the memory of their activations.
        For `"scan"` 1 unless given.
      argnums: see `per_env_grad`.
      has_aux: see `per_env_grad`.
      axis_name: name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which
        environments are spread; the statistics are those of all of them. Losses and
        aux stay local.
      env_axis_name: a name for the axis of environments that `loss_fn` may use in
        collectives, such as a batch norm over all environments; for `"fused"` without
        microbatches and `"vmap"`. Inside `jax.shard_map` it stands for the
        environments of one device, a collective over all names both axes, and jax
        0.10 wants `check_vma=False` there. The gradient of environment `e` is then the
        one of the sum of all losses with respect to `e`'s own copy of the parameters;
        these gradients add up to the gradient of the sum.

    Returns:
      A function `(*args, env_weights=None, **kwargs) -> GradStats`, or
      `(GradStats, aux)`; arguments as for `per_env_grad`. `env_weights: [env]`,
      non-negative, weights the environments in every statistic; 0 marks an absent one,
      whose batch may hold anything. Call it under `jax.jit`.

    Raises:
      TypeError: as `per_env_grad`; `stats` that is no sequence of names.
      ValueError: as `per_env_grad`; unknown stats or method, a microbatch_size < 1 or
        given for `"vmap"`, an env_axis_name where environments do not meet; (tracing) a
        microbatch_size that does not divide the number of environments, env_weights of
        the wrong length or (concrete) negative, side effects in `loss_fn` (`"fused"`).

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> loss = lambda w, x: 0.5 * jnp.sum((w * x) ** 2)
      >>> stats = hardvary.grad_stats(loss)(
      ...     jnp.array([3.0, 1.0]), jnp.array([[1.0, 1.0], [2.0, 0.0]])
      ... )
      >>> stats.mean.tolist(), stats.sign_sum.tolist(), float(stats.num_envs)
      ([7.5, 0.5], [2.0, 1.0], 2.0)
    """
    with_value = value_and_grad_stats(
        loss_fn,
        stats=stats,
        method=method,
        microbatch_size=microbatch_size,
        argnums=argnums,
        has_aux=has_aux,
        axis_name=axis_name,
        env_axis_name=env_axis_name,
    )

    def stats_fn(*args: Any, env_weights: Any = None, **kwargs: Any) -> Any:
        value, result = with_value(*args, env_weights=env_weights, **kwargs)
        return (result, value[1]) if has_aux else result

    return stats_fn


def value_and_grad_stats(
    loss_fn: Callable[..., Any],
    *,
    stats: Sequence[str] = ("mean", "sign"),
    method: str = "fused",
    microbatch_size: int | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
) -> Callable[..., Any]:
    """Losses of all environments and statistics of their gradients.

    Args:
      loss_fn: see `grad_stats`.
      stats: see `grad_stats`.
      method: see `grad_stats`.
      microbatch_size: see `grad_stats`.
      argnums: see `grad_stats`.
      has_aux: see `grad_stats`.
      axis_name: see `grad_stats`.
      env_axis_name: see `grad_stats`.

    Returns:
      A function like that of `grad_stats` which returns `(losses, GradStats)`, or
      `((losses, aux), GradStats)`; losses are `[env]`, unweighted, in the loss's
      dtype.

    Raises:
      TypeError: as `grad_stats`.
      ValueError: as `grad_stats`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hardvary
      >>> loss = lambda w, x: 0.5 * jnp.sum((w * x - 1.0) ** 2)
      >>> oracle = hardvary.value_and_grad_stats(loss)
      >>> tx = optax.chain(hardvary.and_mask(threshold=1.0), optax.sgd(0.1))
      >>> @jax.jit
      ... def step(w, state, batch):
      ...     losses, stats = oracle(w, batch)
      ...     updates, state = tx.update(stats, state, w)
      ...     return optax.apply_updates(w, updates), state, losses.mean()
      >>> w = jnp.zeros(2)
      >>> batch = jnp.array([[1.0, 1.0], [2.0, -1.0]])  # [env, feature]
      >>> w, state, loss_value = step(w, tx.init(w), batch)
      >>> [round(x, 3) for x in w.tolist()], float(loss_value)
      ([0.15, 0.0], 1.0)
    """
    argnums = _check_arguments(loss_fn, argnums)
    stats = _validate.names("stats", stats, tuple(FIELDS))
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if microbatch_size is not None:
        if isinstance(microbatch_size, bool) or not isinstance(
            microbatch_size, int | np.integer
        ):
            raise TypeError(
                f"microbatch_size must be an integer, got {microbatch_size!r}"
            )
        if microbatch_size < 1:
            raise ValueError(f"microbatch_size must be >= 1, got {microbatch_size}")
        if method == "vmap":
            raise ValueError(
                "microbatch_size is for 'fused' and 'scan'; method='vmap' takes all "
                f"environments at once, got {microbatch_size}"
            )
    if env_axis_name is not None and (method == "scan" or microbatch_size is not None):
        raise ValueError(
            "env_axis_name names the axis of all environments, which meet only with "
            f"method='fused' or 'vmap' and no microbatch_size, got {env_axis_name!r}"
        )

    def on_every_device(
        axes: tuple[str, ...], args: Any, weights: Any, kwargs: Any
    ) -> Any:
        """Statistics of each device's environments, summed over `axes`."""
        outer = () if axis_name is None else names_of(axis_name)
        local = value_and_grad_stats(
            loss_fn,
            stats=stats,
            method=method,
            microbatch_size=microbatch_size,
            argnums=argnums,
            has_aux=has_aux,
            axis_name=(*outer, *axes),
            env_axis_name=env_axis_name,
        )
        positions = (argnums,) if isinstance(argnums, int) else argnums
        specs = tuple(
            jax.P() if i in positions else jax.P(axes) for i in range(len(args))
        )
        value, result = jax.shard_map(
            lambda args, weights: local(*args, env_weights=weights, **kwargs),
            in_specs=(specs, jax.P(axes)),
            out_specs=(jax.P(axes), jax.P()),
            axis_names=set(axes),
        )(args, weights)
        # For the caller these axes do not exist: the arrays are whole.
        return value, dataclasses.replace(result, axis_names=outer)

    def value_and_stats_fn(*args: Any, env_weights: Any = None, **kwargs: Any) -> Any:
        problem = _Problem(loss_fn, argnums, has_aux, args, kwargs, axis_name)
        axes = _explicit_axes(problem.batch)
        if axes and method == "fused":
            if env_axis_name is None:
                return on_every_device(axes, args, env_weights, kwargs)
            # A collective in the loss is over all environments: bring them together.
            problem.batch = jax.tree.map(_gather, problem.batch)
        weights = None
        if env_weights is not None:
            weights = _validate.env_weights(env_weights, problem.num_envs, "grad_stats")
        sums_of = functools.partial(
            _fused_sums if method == "fused" else _stacked_sums,
            problem,
            stats,
            env_axis_name,
        )
        size = 1 if method == "scan" else problem.num_envs
        size = size if microbatch_size is None else int(microbatch_size)
        if size == problem.num_envs:
            sums, (losses, aux) = sums_of(problem.batch, weights)
        else:
            sums, (losses, aux) = _add_up(problem, stats, weights, size, sums_of)
        num_envs = total_weight(problem.num_envs, weights)
        result = finalize(sums, num_envs, axis_name)
        result = mean_like(result, problem.params)
        return ((losses, aux) if has_aux else losses), result

    return value_and_stats_fn


def explain(
    loss_fn: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    env_axis_name: str | None = None,
    **kwargs: Any,
) -> Explanation:
    """How `grad_stats(loss_fn, method="fused")` treats each parameter, and why.

    Nothing is computed; a `jax.ShapeDtypeStruct` may stand for an array.

    Args:
      loss_fn: see `grad_stats`.
      args: as for the function that `grad_stats` returns, mostly `params, batch`.
      argnums: see `grad_stats`.
      has_aux: see `grad_stats`.
      env_axis_name: see `grad_stats`.
      kwargs: passed on to `loss_fn`.

    Returns:
      An `Explanation`, which prints as a table. Its rules are, fastest first,
      `"product"`, a single outer product per environment, whose signs are those of its
      factors; `"lookup"`, rows of a table; `"stack"`, small gradients, and those of
      which nothing better is known; `"scan"`, one environment at a time; `"unused"`, no
      gradient reaches it.

    Raises:
      TypeError: as `grad_stats`.
      ValueError: as `grad_stats`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"]))
      >>> params = {"w": jnp.ones((300, 20)), "b": jnp.ones(20)}
      >>> print(hardvary.explain(loss, params, jnp.ones((80, 300))))
      parameter  shape   rule     reason                                stacked
      ['b']      20      stack    in add                             0.0061 MiB
      ['w']      300x20  product  one outer product per environment     1.8 MiB
    """
    argnums = _check_arguments(loss_fn, argnums)

    def rows(args: Any) -> None:
        problem = _Problem(loss_fn, argnums, has_aux, args, kwargs)
        traced = Traced(problem.loss, problem.params, problem.batch, env_axis_name)
        found.append(explanation(traced))

    found: list[Explanation] = []
    jax.eval_shape(rows, args)
    return found[0]


def _explicit_axes(batch: PyTree) -> tuple[str, ...]:
    """Mesh axes over which the environments are spread for all to see."""
    for leaf in jax.tree.leaves(batch):
        if isinstance(leaf, jax.Array):
            axes = jax.typeof(leaf).sharding.spec[:1]
            if axes and axes[0] is not None:
                return names_of(axes[0])
    return ()


def _gather(leaf: Any) -> jax.Array:
    """`leaf` with all environments on every device, if it is sharded explicitly."""
    leaf = jnp.asarray(leaf)
    spec = jax.typeof(leaf).sharding.spec
    if spec and spec[0] is not None:
        leaf = jax.reshard(leaf, jax.P(None, *spec[1:]))
    return leaf


def _stacked_sums(
    problem: "_Problem",
    stats: Sequence[str],
    env_axis_name: str | None,
    batch: Any,
    weights: jax.Array | None,
) -> Any:
    """Sums of statistics and `(losses, aux)`, by stacking the gradients of `batch`."""
    if len(jax.tree.leaves(batch)[0]) == 1 and env_axis_name is None:
        # Not vmap over one: a batched convolution gradient is far slower.
        value, grads = jax.tree.map(
            lambda leaf: jnp.asarray(leaf)[None],
            problem.value_and_grad(jax.tree.map(lambda leaf: leaf[0], batch)),
        )
    else:
        run = jax.vmap(problem.value_and_grad, axis_name=env_axis_name)
        value, grads = run(batch)
    return sum_over_envs(grads, stats, weights), value


def _fused_sums(
    problem: "_Problem",
    stats: Sequence[str],
    env_axis_name: str | None,
    batch: Any,
    weights: jax.Array | None,
) -> Any:
    """As `_stacked_sums`, without stacking."""
    traced = Traced(problem.loss, problem.params, batch, env_axis_name)
    return _fused.sums(traced, stats, weights), (traced.losses, traced.aux)


def _add_up(
    problem: "_Problem",
    stats: Sequence[str],
    weights: jax.Array | None,
    size: int,
    sums_of: Callable[..., Any],
) -> Any:
    """What `sums_of(batch, weights)` returns, from `size` environments at a time."""
    count, rest = divmod(problem.num_envs, size)
    if rest:
        raise ValueError(
            f"microbatch_size must divide the number of environments, got "
            f"{size} for {problem.num_envs}"
        )

    def split(leaf: Any) -> jax.Array:
        # Explicitly sharded environments: a scan goes through them in order.
        leaf = _gather(leaf)
        return leaf.reshape(count, size, *leaf.shape[1:])

    def body(total: Any, inputs: Any) -> tuple[Any, Any]:
        sums, value = sums_of(*inputs)
        return jax.tree.map(jnp.add, total, sums), value

    zeros = {name: jax.tree.map(zero_sum, problem.params) for name in stats}
    zeros = vary_like(zeros, (problem.batch, problem.params, weights))
    inputs = jax.tree.map(split, (problem.batch, weights))
    sums, value = jax.lax.scan(body, zeros, inputs)
    return sums, jax.tree.map(
        lambda leaf: leaf.reshape(problem.num_envs, *leaf.shape[2:]), value
    )


def _check_arguments(
    loss_fn: Callable[..., Any], argnums: int | Sequence[int]
) -> int | tuple[int, ...]:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {loss_fn!r}")
    single = isinstance(argnums, int | np.integer)
    positions: Any = (argnums,) if single else argnums
    try:
        result = tuple(operator.index(position) for position in positions)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"argnums must be an integer or a sequence of integers, got {argnums!r}"
        ) from error
    if not result or min(result) < 0 or len(set(result)) < len(result):
        raise ValueError(f"argnums must name distinct positions >= 0, got {argnums!r}")
    return result[0] if single else result


class _Problem:
    """A loss with its parameters, and the batches of all environments, checked.

    Attributes:
      params: what is differentiated, a tuple of trees if argnums is a sequence.
      batch: positional argument number -> tree with leaves `[env, ...]`.
      num_envs: number of environments.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        argnums: int | tuple[int, ...],
        has_aux: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        axis_name: AxisName | None = None,
    ) -> None:
        self._single = isinstance(argnums, int)
        positions = (argnums,) if isinstance(argnums, int) else argnums
        if max(positions) >= len(args):
            raise ValueError(
                f"argnums {argnums!r} needs more than the {len(args)} positional "
                "arguments given"
            )
        self._loss_fn, self._has_aux = loss_fn, has_aux
        self._positions, self._kwargs, self._num_args = positions, kwargs, len(args)
        self.batch = {i: arg for i, arg in enumerate(args) if i not in positions}
        params = tuple(args[i] for i in positions)
        params = params[0] if self._single else params
        _validate.real_floating(params, "parameters")
        num_envs = _validate.leading_size(
            jax.tree.leaves_with_path(self.batch), "batch leaves"
        )
        if num_envs is None:
            raise ValueError(
                "a batch is needed beside the parameters: at least one positional "
                "argument with leaves [env, ...]"
            )
        self.num_envs = num_envs
        # Under shard_map the gradient of a replicated parameter is summed over
        # devices before anyone could look at its sign.
        # Its loss may also differ between devices by a keyword argument or, which only
        # axis_name tells, by what it closes over.
        self.params = vary_like(params, (self.batch, kwargs), axis_name)

    def loss(self, params: PyTree, env_batch: dict[int, Any]) -> tuple[jax.Array, Any]:
        """Returns `(loss, aux)` of one environment; aux is None if there is none."""
        own = (params,) if self._single else params
        args = [
            own[self._positions.index(i)] if i in self._positions else env_batch[i]
            for i in range(self._num_args)
        ]
        try:
            output = self._loss_fn(*args, **self._kwargs)
        except NameError as error:
            if "unbound axis name" not in str(error):
                raise
            raise ValueError(
                f"loss_fn uses a mapped axis that does not exist ({error}). For a "
                "collective over environments, such as a shared batch norm, pass its "
                "name as env_axis_name to grad_stats with method='fused' or 'vmap'"
            ) from error
        return self._checked(output)

    def value_and_grad(self, env_batch: dict[int, Any]) -> Any:
        """Returns `((loss, aux), grads)` of one environment."""
        return jax.value_and_grad(self.loss, has_aux=True)(self.params, env_batch)

    def _checked(self, output: Any) -> tuple[jax.Array, Any]:
        if self._has_aux:
            if not isinstance(output, tuple) or len(output) != 2:
                raise TypeError(
                    "with has_aux=True the loss function must return (loss, aux), got "
                    f"{type(output).__name__}"
                )
            loss, aux = output
        else:
            loss, aux = output, None
        if isinstance(loss, float):
            return jnp.asarray(loss), aux
        dtype = getattr(loss, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            if np.shape(loss) == ():
                return loss, aux
            received = f"{dtype} of shape {np.shape(loss)}"
            received += "; average over the examples inside loss_fn"
        elif dtype is not None:
            received = f"{dtype} of shape {np.shape(loss)}"
        else:
            received = f"a {type(loss).__name__}"
            if isinstance(loss, tuple) and not self._has_aux:
                received += "; for (loss, aux) pass has_aux=True"
        raise TypeError(
            f"the loss of one environment must be a real scalar, got {received}"
        )
