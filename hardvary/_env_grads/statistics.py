"""Statistics of per-environment gradients: one definition for every route to them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate

PyTree = Any
AxisName = str | tuple[str, ...]

LOG_EPS = 1e-10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradStats:
    """Statistics of the gradients of all environments, reduced over environments.

    With weights `w_e` (1 unless given) and gradients `g_e`, component by component:

    Attributes:
      mean: `sum_e w_e g_e / sum_e w_e`; tree, shapes and dtypes like params.
      sign_sum: `sum_e w_e sign(g_e)`, where `sign(0) = 0` and a non-finite gradient
        counts as NaN; tree and shapes like params, at least float32.
      square_mean: `sum_e w_e g_e**2 / sum_e w_e`; likewise at least float32.
      log_abs_mean: `sum_e w_e log(|g_e| + 1e-10) / sum_e w_e`; likewise.
      num_envs: `sum_e w_e`, the number of environments unless weighted; float32
        scalar.
      axis_names: mapped axes over which the environments have been summed already;
        an aggregator does not sum over them again.

    A statistic that was not asked for is None. The dataclass is a pytree, so it
    passes through `jit`, `scan` and `vmap`.
    """

    mean: PyTree = None
    sign_sum: PyTree = None
    square_mean: PyTree = None
    log_abs_mean: PyTree = None
    num_envs: Any = None
    axis_names: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )


# Name in the public `stats` argument -> field of GradStats.
FIELDS = {
    "mean": "mean",
    "sign": "sign_sum",
    "square": "square_mean",
    "log_abs": "log_abs_mean",
}


def names_of(axis_name: AxisName) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def sign_or_nan(grad: jax.Array) -> jax.Array:
    """The vote of a gradient: its sign, NaN where it is not finite."""
    # The sign of an infinite gradient is finite: without this the sum of signs would
    # hide a diverged environment.
    return jnp.where(jnp.isfinite(grad), jnp.sign(grad), jnp.nan)


def contribution(statistic: str, log_eps: Any = LOG_EPS) -> Callable[..., jax.Array]:
    """Returns the elementwise function whose sum over environments is `statistic`."""

    def log_abs(grad: jax.Array) -> jax.Array:
        # float16 rounds 1e-10 to zero, and log(0) would turn a weighted sum into NaN.
        eps = jnp.maximum(
            jnp.asarray(log_eps).astype(grad.dtype), jnp.finfo(grad.dtype).tiny
        )
        return jnp.log(jnp.abs(grad) + eps)

    functions: dict[str, Callable[..., jax.Array]] = {
        "mean": lambda grad: grad,
        "sign": sign_or_nan,
        "square": jnp.square,
        "log_abs": log_abs,
    }
    return functions[statistic]


def along_envs(weights: jax.Array, like: jax.Array) -> jax.Array:
    """`weights: [env]` in the dtype of `like: [env, ...]`, to multiply it with."""
    return weights.astype(like.dtype).reshape((-1,) + (1,) * (like.ndim - 1))


def zero_sum(param: Any) -> jax.Array:
    """What sums of a parameter's statistics start from."""
    return jnp.zeros(np.shape(param), _validate.wide(jnp.result_type(param)))


def sum_over_envs(
    grads: PyTree,
    statistics: Sequence[str],
    weights: jax.Array | None,
    log_eps: Any = LOG_EPS,
) -> dict[str, PyTree]:
    """Sums statistics over axis 0 of stacked gradients, in at least float32.

    Args:
      grads: leaves `[env, *param.shape]`.
      statistics: names, keys of `FIELDS`.
      weights: `[env]`, or None for 1 each.
      log_eps: offset inside the logarithm of `log_abs`.

    Returns:
      For each name a tree with leaves `param.shape`.
    """

    def leaf_sum(grad: jax.Array, function: Callable[..., jax.Array]) -> jax.Array:
        dtype = _validate.wide(grad.dtype)
        values = function(grad.astype(dtype))
        if weights is not None:
            weight = along_envs(weights, values)
            # 0 * NaN is NaN: an absent environment may hold anything.
            values = jnp.where(weight > 0, weight * values, 0)
        return jnp.sum(values, axis=0)

    def tree_sum(name: str) -> PyTree:
        function = contribution(name, log_eps)
        return jax.tree.map(lambda grad: leaf_sum(grad, function), grads)

    return {name: tree_sum(name) for name in statistics}


def finalize(
    sums: dict[str, PyTree], num_envs: Any, axis_name: AxisName | None
) -> GradStats:
    """Turns sums over (local) environments into GradStats, all in at least float32.

    Args:
      sums: as `sum_over_envs` returns them.
      num_envs: total weight of the environments in `sums`.
      axis_name: mapped axis over which further environments are spread.

    Returns:
      The statistics over the environments of all devices.
    """
    axis_names: tuple[str, ...] = ()
    if axis_name is not None:
        sums = dict(sums)
        counts = sums.pop("sign", None) if isinstance(num_envs, int) else None
        devices = jax.lax.axis_size(axis_name)
        total = num_envs * devices
        sums, num_envs = jax.lax.psum((sums, num_envs), axis_name)
        if counts is not None:
            sums["sign"] = _sum_counts(counts, total, axis_name, sums.get("mean"))
        axis_names = names_of(axis_name)
    num_envs = jnp.asarray(num_envs)
    num_envs = num_envs.astype(_validate.wide(num_envs.dtype))

    def average(total: jax.Array) -> jax.Array:
        return total / num_envs.astype(total.dtype)

    fields = {
        FIELDS[name]: tree if name == "sign" else jax.tree.map(average, tree)
        for name, tree in sums.items()
    }
    return GradStats(num_envs=num_envs, axis_names=axis_names, **fields)


def _sum_counts(
    counts: PyTree, limit: int, axis_name: AxisName, means: PyTree | None
) -> PyTree:
    """Sums counts of at most `limit` over devices, in the narrowest type that fits.

    Args:
      counts: whole numbers, or NaN for a gradient that is not finite.
      limit: what no sum exceeds.
      axis_name: mapped axis.
      means: sums of gradients over all devices, which are not finite where a
        gradient is not.
    """
    if means is not None and limit <= np.iinfo(np.int8).max:

        def sum_of(count: jax.Array, mean: jax.Array) -> jax.Array:
            whole = jnp.where(jnp.isfinite(count), count, 0).astype(jnp.int8)
            total = jax.lax.psum(whole, axis_name).astype(count.dtype)
            return jnp.where(jnp.isfinite(mean), total, jnp.nan)

        return jax.tree.map(sum_of, counts, means)
    # float16 holds every whole number up to here, and NaN.
    dtype = jnp.float16 if limit <= 2048 else None

    def narrow(count: jax.Array) -> jax.Array:
        sent = count if dtype is None else count.astype(dtype)
        return jax.lax.psum(sent, axis_name).astype(count.dtype)

    return jax.tree.map(narrow, counts)


def mean_like(stats: GradStats, params: PyTree) -> GradStats:
    """`stats` with its mean, if it has one, in the dtypes of params."""
    if stats.mean is None:
        return stats
    mean = jax.tree.map(
        lambda leaf, param: leaf.astype(jnp.result_type(param)), stats.mean, params
    )
    return dataclasses.replace(stats, mean=mean)


def total_weight(num_envs: int, weights: jax.Array | None) -> Any:
    return num_envs if weights is None else jnp.sum(weights)


def combine_over_axis(stats: GradStats, axis_name: AxisName) -> GradStats:
    """Reduces GradStats that each device made of its own environments."""
    num_envs = stats.num_envs
    sums: dict[str, PyTree] = {}
    for name, field in FIELDS.items():
        tree = getattr(stats, field)
        if tree is None:
            continue
        if name == "sign":
            sums[name] = tree
        else:
            # A device whose environments are all absent holds 0/0, not information.
            sums[name] = jax.tree.map(
                lambda leaf: jnp.where(
                    num_envs > 0,
                    leaf.astype(_validate.wide(leaf.dtype))
                    * num_envs.astype(_validate.wide(leaf.dtype)),
                    0,
                ),
                tree,
            )
    return finalize(sums, num_envs, axis_name)


def reduce_stacked(
    grads: PyTree,
    statistics: Sequence[str],
    weights: jax.Array | None,
    num_envs: int,
    axis_name: AxisName | None,
    log_eps: Any = LOG_EPS,
) -> GradStats:
    """GradStats of stacked gradients, leaves `[env, *param.shape]`."""
    sums = sum_over_envs(grads, statistics, weights, log_eps)
    return finalize(sums, total_weight(num_envs, weights), axis_name)


def vary_like(
    tree: PyTree, reference: PyTree, axis_name: AxisName | None = None
) -> PyTree:
    """Marks `tree` as varying over the shard_map axes that `reference` varies over.

    And over `axis_name`, as far as it names such axes.
    """

    def axes(leaf: Any) -> frozenset[Any]:
        if not isinstance(leaf, jax.Array):
            return frozenset()
        return jax.typeof(leaf).manual_axis_type.varying

    wanted = frozenset().union(*(axes(leaf) for leaf in jax.tree.leaves(reference)))
    if axis_name is not None:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        wanted |= set(names_of(axis_name)) & set(manual)

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(wanted - axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if wanted else tree


def agreement(grads_or_stats: PyTree, *, env_weights: Any = None) -> PyTree:
    r"""Share of environments by which one sign outnumbers the other.

    .. math:: a_j = |\sum_e w_e \operatorname{sign}([g_e]_j)| / \sum_e w_e

    The quantity that every mask compares with its threshold (paper, section 3). An
    agreement of `a` means that a share `(1 + a) / 2` of the environments have the
    same sign, if none is zero.

    Args:
      grads_or_stats: stacked per-environment gradients, each leaf
        `[env, *param.shape]`, or a `GradStats` with the statistic `"sign"`.
      env_weights: `[env]`, non-negative weights for stacked gradients; 0 marks an
        absent environment.

    Returns:
      A tree like params with values in [0, 1], float32 (float64 for float64
      gradients); NaN where an environment's gradient is not finite.

    Raises:
      TypeError: gradients that are not real floating.
      ValueError: leaves that disagree on the number of environments, zero
        environments, a `GradStats` without signs, or bad `env_weights`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> hardvary.agreement(jnp.array([[1.0, 2.0], [3.0, -1.0], [2.0, 1.0]])).tolist()
      [1.0, 0.3333333432674408]
    """
    stats = as_grad_stats(
        grads_or_stats, None, ("sign",), env_weights, None, "agreement"
    )
    return jax.tree.map(
        lambda total: jnp.abs(total) / stats.num_envs.astype(total.dtype),
        stats.sign_sum,
    )


def as_grad_stats(
    grads: PyTree,
    params: PyTree | None,
    statistics: Sequence[str],
    env_weights: Any,
    axis_name: AxisName | None,
    name: str,
    log_eps: Any = LOG_EPS,
) -> GradStats:
    """Checks what a transformation was given and returns it as GradStats.

    Raises:
      TypeError: gradients that are not real floating.
      ValueError: everything else that DESIGN asks of stacked gradients, a `GradStats`
        that lacks a statistic, or one given together with `env_weights`.
    """
    if isinstance(grads, GradStats):
        if env_weights is not None:
            raise ValueError(
                f"{name}: env_weights belong to stacked gradients; a GradStats is "
                "already weighted, give them to the function from grad_stats"
            )
        for statistic in statistics:
            if getattr(grads, FIELDS[statistic]) is None:
                raise ValueError(
                    f"{name} needs the statistic {statistic!r}, which this GradStats "
                    f"does not hold; ask for it with grad_stats(loss_fn, "
                    f"stats={tuple(statistics)})"
                )
        if grads.num_envs is None:
            raise ValueError(
                f"{name}: this GradStats does not say num_envs, the total weight of "
                "the environments; grad_stats fills it in"
            )
        like = getattr(grads, FIELDS[statistics[0]]) if params is None else params
        for statistic in statistics:
            tree = getattr(grads, FIELDS[statistic])
            what = f"{name}: statistics"
            _validate.real_floating(tree, what)
            mend = "compute them with grad_stats for these parameters"
            _validate.same_shapes(tree, like, what, mend)
        total = jnp.asarray(grads.num_envs)
        grads = dataclasses.replace(
            grads, num_envs=total.astype(_validate.wide(total.dtype))
        )
        if axis_name is not None:
            rest = tuple(n for n in names_of(axis_name) if n not in grads.axis_names)
            if rest:
                return combine_over_axis(grads, rest)
        return grads
    num_envs = _validate.stacked_gradients(grads, params, name)
    if num_envs is None:
        # Nothing to vote on: every leaf is masked out, or the model has none.
        return GradStats(
            num_envs=jnp.ones((), jnp.float32),
            **{FIELDS[statistic]: grads for statistic in statistics},
        )
    weights = None
    if env_weights is not None:
        weights = _validate.env_weights(env_weights, num_envs, name)
    return reduce_stacked(grads, statistics, weights, num_envs, axis_name, log_eps)
