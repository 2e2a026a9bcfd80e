"""Statistics of the gradients of all environments, as plain arrays."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.extend.random as jex_random
import jax.numpy as jnp

from hardvary import _validate, sharding
from hardvary._env_grads import statistics as st
from hardvary._env_grads.no_array import NoArray
from hardvary._env_grads.problem import InAxes, Problem, check_arguments
from hardvary._env_grads.stacked import value_and_stacked
from hardvary._typing import AxisName, PyTree
from hardvary.fused.rules import summing, sums_of_pass
from hardvary.fused.traced import Traced, check_collectives

METHODS = ("fused", "scan", "vmap")
StatName = Literal["mean", "sign", "square", "log_abs", "abs", "nonzero"]
Method = Literal["fused", "scan", "vmap"]


def _no_arithmetic(*args: Any) -> Any:
    raise TypeError("a GradStats takes no arithmetic")


_MEND = (
    "counts and means take no arithmetic, put hardvary's aggregator in front and "
    "everything else behind it"
)

# An array of a dtype that nothing can be added to, multiplied by or compared with: JAX
# refuses with the name of the dtype, which says what to do.
_GUARD = jex_random.define_prng_impl(
    key_shape=(1,),
    seed=_no_arithmetic,
    split=_no_arithmetic,
    random_bits=_no_arithmetic,
    fold_in=_no_arithmetic,
    name="hardvary_grad_stats",
    tag=f"hardvary.GradStats: {_MEND}",
)


def make_guard() -> jax.Array:
    # Two axes: optax.centralize leaves alone what has fewer.
    return jax.random.wrap_key_data(jnp.zeros((1, 1, 1), jnp.uint32), impl=_GUARD)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradStats(NoArray):
    """Statistics of one parameter's gradients, reduced over all environments.

    With weights `w_e` (1 unless given) and gradients `g_e`, component by component; all
    arrays have the shape of the parameter.

    Attributes:
      mean: `sum_e w_e g_e / sum_e w_e`, in the dtype of the parameter.
      sign_sum: `sum_e w_e sign(g_e)`, where `sign(0) = 0` and a non-finite gradient
        counts as NaN; like all that follow at least float32.
      square_mean: `sum_e w_e g_e**2 / sum_e w_e`.
      log_abs_mean: `sum_e w_e log(|g_e| + 1e-10) / sum_e w_e`.
      abs_mean: `sum_e w_e |g_e| / sum_e w_e`.
      nonzero_sum: `sum_e w_e 1[g_e != 0]`, NaN where a gradient is not finite.
      num_envs: `sum_e w_e`, the number of environments unless weighted; a scalar of at
        least float32.
      axis_names: mapped axes over which the environments have been summed already;
        an aggregator does not sum over them again.
      guard: makes arithmetic on a tree of statistics fail, which would change votes
        and counts: clip, scale and add behind the aggregator.

    A statistic that was not asked for is None. The dataclass is a pytree, so it crosses
    `jit`, `scan` and `vmap`. A tree of them, one at every leaf of the parameters, goes
    wherever gradients go: `optax.chain`, `optax.partition`, `TrainState`,
    `nnx.Optimizer`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> stats = hardvary.GradStats(
      ...     mean=jnp.array([0.5, 0.0]),
      ...     sign_sum=jnp.array([2.0, 0.0]),
      ...     num_envs=jnp.float32(2),
      ... )
      >>> tx = hardvary.and_mask(threshold=1.0)
      >>> updates, _ = tx.update(stats, tx.init(jnp.zeros(2)))
      >>> updates.tolist()
      [0.5, 0.0]
    """

    mean: Any = None
    sign_sum: Any = None
    square_mean: Any = None
    log_abs_mean: Any = None
    abs_mean: Any = None
    nonzero_sum: Any = None
    num_envs: Any = None
    axis_names: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )
    guard: Any = dataclasses.field(default_factory=make_guard, repr=False)

    _mend = f"{_MEND}; give optax.partition and optax.masked a tree, not a function"


def grad_stats(
    loss_fn: Callable[..., Any],
    *,
    stats: Sequence[StatName] = ("mean", "sign"),
    method: Method = "fused",
    microbatch_size: int | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: InAxes = 0,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
) -> Callable[..., Any]:
    """Statistics of the gradients of all environments.

    For microbatches, for several devices and for crossing a `jit`; inside one `jit`,
    `env_grads` needs no list of statistics. Every aggregator of this library that works
    component by component accepts them in place of stacked gradients, at the memory of
    a few copies of the parameters instead of one per environment (paper, section 3:
    the same order of time and memory as gradient descent). Each environment has a
    forward pass of its own, so batch statistics are its own too.

    Args:
      loss_fn: `loss_fn(params, env_batch) -> loss`, a real scalar, of ONE environment.
      stats: which statistics to compute, from `"mean"`, `"sign"`, `"square"`,
        `"log_abs"`, `"abs"` and `"nonzero"`; see `GradStats` for what they are and each
        aggregator for what it needs.
      method: `"fused"` takes one forward and one backward pass for all environments,
        as plain training does, and reduces what they leave behind layer by layer;
        `explain` tells how. `"scan"` goes through the environments `microbatch_size`
        at a time and adds up; `"vmap"` stacks all gradients, then reduces. The results
        agree up to rounding; `"fused"` multiplies the signs of the two factors of a
        product where others take the sign of the product, so they differ where the
        product underflows, and takes products in at least float32, so that they
        overflow later than those of float16.
      microbatch_size: environments handled at once, a divisor of their number. Fewer
        bound the memory of their activations. For `"fused"`, unless given, all of them,
        but on a CPU and under `jit` as many as are fastest, which `explain` tells. For
        `"scan"` 1 unless given.
      argnums: see `per_env_grad`.
      has_aux: see `per_env_grad`.
      in_axes: see `per_env_grad`.
      axis_name: name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which
        environments are spread; the statistics are those of all of them. Losses and
        aux stay local. Parameters must be the same on all devices.
      env_axis_name: a name for the axis of environments that `loss_fn` may use in
        collectives, such as a batch norm over all environments; for `"fused"` without
        microbatches and `"vmap"`. Inside `jax.shard_map` it stands for the
        environments of one device, a collective over all names both axes, and jax
        0.10 wants `check_vma=False` there. The gradient of environment `e` is then the
        one of the sum of all losses with respect to `e`'s own copy of the parameters;
        these gradients add up to the gradient of the sum. On a mesh with explicit
        axes all results are replicated, and `loss_fn` takes arrays as arguments, rather
        than closing over them.

    Returns:
      A function `(*args, env_weights=None, **kwargs) -> stats`, or `(stats, aux)`;
      arguments as for `per_env_grad`, stats a tree like the parameters with a
      `GradStats` at every leaf. `env_weights: [env]`, non-negative, weights the
      environments in every statistic; 0 marks an absent one, whose batch may hold
      anything. Call it under `jax.jit`.

    Raises:
      TypeError: as `per_env_grad`; `stats` that is no sequence of names.
      ValueError: as `per_env_grad`; unknown stats or method, a microbatch_size < 1 or
        given for `"vmap"`, an env_axis_name where environments do not meet; (tracing) a
        microbatch_size that does not divide the number of environments, env_weights of
        the wrong length or (concrete) negative, side effects in `loss_fn` (`"fused"`),
        parameters that an explicit mesh has split or that differ between the devices of
        axis_name.

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
        in_axes=in_axes,
        axis_name=axis_name,
        env_axis_name=env_axis_name,
    )

    def stats_fn(*args: Any, env_weights: Any = None, **kwargs: Any) -> Any:
        value, result = with_value(*args, env_weights=env_weights, **kwargs)
        return (result, value[1]) if has_aux else result

    return stats_fn


@overload
def value_and_grad_stats(
    loss_fn: Callable[..., Any],
    *,
    stats: Sequence[StatName] = ("mean", "sign"),
    method: Method = "fused",
    microbatch_size: int | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    in_axes: InAxes = 0,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
) -> Callable[..., tuple[jax.Array, PyTree]]: ...


@overload
def value_and_grad_stats(
    loss_fn: Callable[..., Any],
    *,
    stats: Sequence[StatName] = ("mean", "sign"),
    method: Method = "fused",
    microbatch_size: int | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[True],
    in_axes: InAxes = 0,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
) -> Callable[..., tuple[tuple[jax.Array, Any], PyTree]]: ...


@overload
def value_and_grad_stats(
    loss_fn: Callable[..., Any],
    *,
    stats: Sequence[StatName] = ("mean", "sign"),
    method: Method = "fused",
    microbatch_size: int | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: InAxes = 0,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
) -> Callable[..., Any]: ...


def value_and_grad_stats(
    loss_fn: Callable[..., Any],
    *,
    stats: Sequence[StatName] = ("mean", "sign"),
    method: Method = "fused",
    microbatch_size: int | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: InAxes = 0,
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
      in_axes: see `grad_stats`.
      axis_name: see `grad_stats`.
      env_axis_name: see `grad_stats`.

    Returns:
      A function like that of `grad_stats` which returns `(losses, stats)`, or
      `((losses, aux), stats)`; losses are `[env]`, unweighted, in the loss's
      dtype.

    Raises:
      TypeError: as `grad_stats`.
      ValueError: as `grad_stats`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hardvary
      >>> loss = lambda w, x: 0.5 * jnp.sum((w * x - 1.0) ** 2)
      >>> oracle = jax.jit(hardvary.value_and_grad_stats(loss, microbatch_size=1))
      >>> tx = optax.chain(hardvary.and_mask(threshold=1.0), optax.sgd(0.1))
      >>> w = jnp.zeros(2)
      >>> batch = jnp.array([[1.0, 1.0], [2.0, -1.0]])  # [env, feature]
      >>> losses, stats = oracle(w, batch)
      >>> updates, state = tx.update(stats, tx.init(w), w)
      >>> [round(x, 3) for x in optax.apply_updates(w, updates).tolist()]
      [0.15, 0.0]
    """
    argnums = check_arguments(loss_fn, argnums)
    wanted = st.named(_validate.names("stats", stats, tuple(st.STATISTICS)))
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    size = _checked_size(microbatch_size, method)
    if env_axis_name is not None and (method == "scan" or size is not None):
        raise ValueError(
            "env_axis_name names the axis of all environments, which meet only with "
            f"method='fused' or 'vmap' and no microbatch_size, got {env_axis_name!r}"
        )

    def sums_of_batch(
        params: PyTree,
        problem: Problem,
        batch: list[jax.Array],
        weights: st.EnvWeights | None,
        axes: tuple[str, ...],
    ) -> Any:
        """`(sums, (losses, aux))` of (local) environments."""
        keys = st.summed(wanted, weights is not None)

        def sums_of(batch: Any, weights: st.EnvWeights | None) -> Any:
            if method == "fused":
                wished = summing(keys, weights)
                traced = Traced(
                    problem.loss,
                    params,
                    batch,
                    env_axis_name,
                    axes,
                    wished if size is None else None,
                )
                value = traced.losses, traced.aux
                return sums_of_pass(traced, wished), value
            value, grads = value_and_stacked(problem, params, batch, env_axis_name)
            leaves = jax.tree.leaves(grads)
            return st.sum_over_envs(leaves, keys, weights), value

        num_envs = len(batch[0])
        at_once = size or (1 if method == "scan" else num_envs)
        if at_once == num_envs:
            return sums_of(batch, weights)
        if num_envs % at_once:
            raise ValueError(
                f"microbatch_size must divide the number of environments, got "
                f"{at_once} for {num_envs}"
            )
        # Explicitly sharded environments: a scan goes through them in order.
        batch, weights = jax.tree.map(sharding.gather, (batch, weights))
        return st.sums_by_parts(
            sums_of,
            (batch, weights),
            num_envs // at_once,
            jax.tree.leaves(params),
            keys,
        )

    def everywhere(
        problem: Problem, values: jax.Array | None, axes: tuple[str, ...]
    ) -> Any:
        """`(sums, total weight, (losses, aux))` over `axes` as well as `axis_name`.

        Args:
          problem: with the batch of all devices, or the local one without `axes`.
          values: weights of its environments.
          axes: explicit mesh axes over which they are spread.
        """
        names = (*sharding.names_of(axis_name), *axes)

        def local(
            params: PyTree, shared: Any, batch: Any, values: jax.Array | None
        ) -> Any:
            own = problem.elsewhere(params, shared, batch)
            weights = None if values is None else st.make_weights(values, names or None)
            sums, value = sums_of_batch(params, own, batch, weights, names)
            total = st.total_weight(len(batch[0]), weights)
            sums, total = st.over_devices(sums, total, names or None)
            ordered = [sums[s] for s in st.summed(wanted, values is not None)]
            return ordered, st.as_total(total), value

        if not axes:
            return local(problem.params, problem.shared, problem.batch, values)
        out_specs = jax.P(), jax.P(), jax.P(axes)
        spread = problem.batch, values
        return sharding.on_devices(
            local, axes, problem.params, problem.shared, spread, out_specs
        )

    def value_and_stats_fn(*args: Any, env_weights: Any = None, **kwargs: Any) -> Any:
        problem = Problem(loss_fn, argnums, has_aux, in_axes, args, kwargs, axis_name)
        values = None
        if env_weights is not None:
            values = _validate.env_weights(env_weights, problem.num_envs, "grad_stats")
        axes: tuple[str, ...] = ()
        if method == "fused":
            sharding.refuse_sharded_parameters(problem.params, "grad_stats")
            axes = sharding.explicit_axes(problem.batch)
        elif axis_name is not None:
            check_collectives(
                problem.loss,
                problem.params,
                problem.batch,
                env_axis_name,
                sharding.names_of(axis_name),
            )
        ordered, total, (losses, aux) = everywhere(problem, values, axes)
        sums = dict(zip(st.summed(wanted, values is not None), ordered, strict=True))
        fields = st.finish(sums, wanted, total)
        total = jnp.asarray(total)
        leaves, treedef = jax.tree.flatten(problem.params)
        guard = make_guard()
        result = [
            mean_like(
                GradStats(
                    **of_leaf,
                    num_envs=total,
                    axis_names=sharding.names_of(axis_name),
                    guard=guard,
                ),
                leaf,
            )
            for of_leaf, leaf in zip(fields, leaves, strict=True)
        ]
        value = (losses, aux) if has_aux else losses
        return value, jax.tree.unflatten(treedef, result)

    if env_axis_name is None:
        return value_and_stats_fn
    # A collective in the loss is over all environments, wherever they are.
    return sharding.with_auto_axes(value_and_stats_fn)


def mean_like(stats: GradStats, param: Any) -> GradStats:
    """`stats` with its mean, if it has one, in the dtype of the parameter."""
    if stats.mean is None:
        return stats
    return dataclasses.replace(stats, mean=stats.mean.astype(jnp.result_type(param)))


def _checked_size(microbatch_size: int | None, method: str) -> int | None:
    if microbatch_size is None:
        return None
    size = _validate.whole_number("microbatch_size", microbatch_size, 1)
    if method == "vmap":
        raise ValueError(
            "microbatch_size is for 'fused' and 'scan'; method='vmap' takes all "
            f"environments at once, got {microbatch_size}"
        )
    return size
