"""The gradients of all environments in any of their three forms, read as one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _compat, _validate, sharding
from hardvary._env_grads import statistics as st
from hardvary._env_grads.env_grad import EnvGrad
from hardvary._env_grads.grad_stats import GradStats
from hardvary._env_grads.source import inner_products, square_norms
from hardvary._typing import AxisName, PyTree


def is_leaf(node: Any) -> bool:
    """Whether a node of a tree of gradients stands for one parameter."""
    return isinstance(node, EnvGrad | GradStats)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Gradients in one of the three forms, checked.

    Attributes:
      name: the function that was given them, for messages.
      treedef: of the parameters.
      leaves: all `EnvGrad`, all `GradStats`, or all stacked arrays.
      weights: of the environments of stacked arrays, None for 1 each.
      axis_name: mapped axis over which environments are spread, None if the leaves
        know.
    """

    name: str
    treedef: Any
    leaves: Sequence[Any]
    weights: st.EnvWeights | None
    axis_name: AxisName | None

    @property
    def dtypes(self) -> list[Any]:
        """Of the parameters, as far as the form knows them."""
        # Not the dtype as it is: NumPy's may be one that JAX does not have.
        return [
            leaf.dtype
            if isinstance(leaf, EnvGrad)
            else jnp.result_type(_first(leaf) if isinstance(leaf, GradStats) else leaf)
            for leaf in self.leaves
        ]

    def unflatten(self, leaves: Sequence[Any]) -> PyTree:
        return jax.tree.unflatten(self.treedef, leaves)

    def stats(self, statistics: Sequence[st.Statistic]) -> list[GradStats]:
        """Statistics of every parameter over the environments of all devices.

        Raises:
          ValueError: a `GradStats` that lacks one.
        """
        if not self.leaves:
            return []
        if isinstance(self.leaves[0], EnvGrad):
            return [leaf._stats(statistics) for leaf in self.leaves]
        if isinstance(self.leaves[0], GradStats):
            return [self._held(leaf, statistics) for leaf in self.leaves]
        sums = st.sum_over_envs(
            self.leaves,
            st.summed(statistics, self.weights is not None),
            self.weights,
        )
        total = st.total_weight(len(self.leaves[0]), self.weights)
        sums, total = st.over_devices(sums, total, self.axis_name)
        total = st.as_total(total)
        fields = st.finish(sums, statistics, total)
        return [GradStats(**field, num_envs=total) for field in fields]

    def _held(self, leaf: GradStats, statistics: Sequence[st.Statistic]) -> GradStats:
        for statistic in statistics:
            if statistic.note:
                raise ValueError(
                    f"{self.name} needs {statistic.note} as a GradStats holds them; "
                    "pass stacked gradients, or those of value_and_env_grads"
                )
            if getattr(leaf, statistic.field) is None:
                names = tuple(s.name for s in statistics)
                raise ValueError(
                    f"{self.name} needs the statistic {statistic.name!r}, which this "
                    f"GradStats does not hold; ask for it with grad_stats(loss_fn, "
                    f"stats={names}), or use value_and_env_grads, which needs no list"
                )
        leaf = dataclasses.replace(leaf, num_envs=st.as_total(leaf.num_envs))
        rest = tuple(
            name
            for name in sharding.names_of(self.axis_name)
            if name not in leaf.axis_names
        )
        return _combined(leaf, statistics, rest) if rest else leaf

    def gramian(self) -> list[jax.Array]:
        """`[env, env]` of every parameter, over the environments of all devices."""
        if self.leaves and isinstance(self.leaves[0], EnvGrad):
            return [leaf.gramian() for leaf in self.leaves]
        return [inner_products(leaf) for leaf in self._stacked("inner products")]

    def square_norms(self) -> list[jax.Array]:
        """`[env]` of every parameter, over the environments of all devices."""
        if self.leaves and isinstance(self.leaves[0], EnvGrad):
            return [leaf._square_norms() for leaf in self.leaves]
        return [square_norms(leaf) for leaf in self._stacked("norms")]

    def combine(self, weights: Sequence[Any]) -> list[jax.Array]:
        """`sum_e w_e g_e` of every parameter; `[env]` weights of its own each."""
        if self.leaves and isinstance(self.leaves[0], EnvGrad):
            return [
                leaf.combine(w) for leaf, w in zip(self.leaves, weights, strict=True)
            ]

        def weighted(grad: jax.Array, w: Any) -> jax.Array:
            values = st.signed(_validate.combination(w, len(grad)))
            return st.sum_over_envs([grad], [st.MEAN], values)[st.MEAN][0]

        stacked = self._stacked("weighted sums")
        return [weighted(*pair) for pair in zip(stacked, weights, strict=True)]

    def _stacked(self, what: str) -> list[jax.Array]:
        if any(isinstance(leaf, GradStats) for leaf in self.leaves):
            raise ValueError(
                f"{self.name}: a GradStats holds no {what}; use value_and_env_grads, "
                "inside the same jit, or stacked gradients from per_env_grad"
            )
        return [
            sharding.all_rows(
                st.present(sharding.gather(leaf), self.weights), self.axis_name
            )
            for leaf in self.leaves
        ]

    @property
    def num_envs(self) -> int:
        """Number of environments, on all devices, of a form that keeps them apart."""
        if not self.leaves:
            return 0
        if isinstance(self.leaves[0], EnvGrad):
            return self.leaves[0].num_envs
        local = len(self.leaves[0])
        devices = 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)
        return local * devices

    def env_weights(self) -> jax.Array:
        """`[env]`, weights of the environments, 1 unless given."""
        first = self.leaves[0]
        if isinstance(first, EnvGrad):
            weights = first._answers.env_weights()
        elif self.weights is not None:
            weights = sharding.all_rows(self.weights.values, self.axis_name)
        else:
            weights = None
        return jnp.ones(self.num_envs) if weights is None else weights

    def of_envs(self, what: str, values: Any) -> jax.Array:
        """`[env]`, a number of every environment of all devices, in at least float32.

        Args:
          what: the argument, for messages.
          values: `[env]`, of the environments of this device.

        Raises:
          TypeError: values that are not real.
          ValueError: values of another shape.
        """
        first = self.leaves[0]
        inside = isinstance(first, EnvGrad)
        if not inside:
            self._stacked("inner products")
        axis_name = first._answers.axis_name if inside else self.axis_name
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        if devices > 1:
            what += " of this device's environments"
        array = _validate.of_envs(what, values, self.num_envs // devices, self.name)
        return sharding.all_rows(sharding.gather(array), axis_name)


def read(
    grads: PyTree,
    name: str,
    params: PyTree | None = None,
    env_weights: Any = None,
    axis_name: AxisName | None = None,
) -> Gradients:
    """Checks gradients in any form.

    Args:
      grads: tree of stacked arrays, of `EnvGrad` or of `GradStats`.
      name: the function that was given them, for messages.
      params: what they must be shaped like, None if it is not known.
      env_weights: `[env]`, for stacked gradients.
      axis_name: mapped axis over which environments are spread.

    Raises:
      TypeError: gradients that are not real floating, forms that are mixed.
      ValueError: trees or shapes that do not match, stacked gradients without an
        environment axis or that disagree on it, or that are the same on all devices
        although `axis_name` says that environments are spread over them, an `EnvGrad`
        whose oracle was not given these axes, env_weights beside another form.
    """
    leaves, treedef = jax.tree.flatten(grads, is_leaf=is_leaf)
    kinds = {type(leaf) if is_leaf(leaf) else jax.Array for leaf in leaves}
    if len(kinds) > 1:
        raise TypeError(
            f"{name}: gradients must come in one form, got "
            f"{sorted(kind.__name__ for kind in kinds)} in one tree"
        )
    if not kinds or kinds == {jax.Array}:
        num_envs = _validate.stacked_gradients(grads, params, name)
        _check_spread(grads, name, axis_name)
        weights = None
        if env_weights is not None and num_envs is not None:
            values = _validate.env_weights(env_weights, num_envs, name)
            weights = st.make_weights(sharding.gather(values), axis_name)
        return Gradients(name, treedef, leaves, weights, axis_name)
    if env_weights is not None:
        raise ValueError(
            f"{name}: env_weights belong to stacked gradients; these are already "
            "weighted, give them to the function that made the gradients"
        )
    if params is not None:
        _validate.same_structure(grads, params, f"{name}: gradients", is_leaf)
    like = leaves if params is None else jax.tree.leaves(params)
    paths = [path for path, _ in jax.tree.leaves_with_path(grads, is_leaf=is_leaf)]
    for path, leaf, param in zip(paths, leaves, like, strict=True):
        shape = np.shape(_first(param) if isinstance(param, GradStats) else param)
        if isinstance(leaf, GradStats):
            _check_stats(leaf, name, path, shape)
        elif leaf.shape != shape:
            raise ValueError(_other_shape(name, path, leaf.shape, shape))
        else:
            _check_summed(leaf, name, axis_name)
    return Gradients(name, treedef, leaves, None, axis_name)


def _check_spread(grads: PyTree, name: str, axis_name: AxisName | None) -> None:
    """Raises ValueError for stacked gradients that shard_map has summed over devices.

    As it does with those of replicated parameters.
    """
    for path, leaf in jax.tree.leaves_with_path(grads):
        axes = sharding.axes_without(leaf, axis_name)
        if axes:
            raise ValueError(
                f"{name}: the stacked gradients at {_validate.leaf_path(path)} are the "
                f"same on all devices of the axis {', '.join(map(repr, axes))}, over "
                "which axis_name says that environments are spread: shard_map sums "
                "gradients of replicated parameters over devices; stack those of "
                f"{_compat.vary_call('params', axes)}, or use per_env_grad, which does"
            )


def _check_summed(leaf: EnvGrad, name: str, axis_name: AxisName | None) -> None:
    """Raises ValueError where an `EnvGrad` answers for fewer devices than asked."""
    own = sharding.names_of(leaf._answers.axis_name)
    missing = [axis for axis in sharding.names_of(axis_name) if axis not in own]
    if missing:
        raise ValueError(
            f"{name}: axis_name={axis_name!r}, but these gradients are of one device's "
            f"environments, not of all along {', '.join(map(repr, missing))}: an "
            "EnvGrad answers for the axes that its oracle was given, so give axis_name "
            "to value_and_env_grads or env_grads"
        )


def _first(stats: GradStats) -> Any:
    """A statistic that a `GradStats` holds, the mean if it does."""
    for statistic in st.STATISTICS.values():
        value = getattr(stats, statistic.field)
        if value is not None:
            return value
    return np.zeros((), np.float32)


def _check_stats(leaf: GradStats, name: str, path: Any, shape: Any) -> None:
    for statistic in st.STATISTICS.values():
        value = getattr(leaf, statistic.field)
        if value is None:
            continue
        if not _validate.is_array(value):
            raise TypeError(
                f"{name}: the fields of a GradStats must be arrays, of one parameter; "
                f"{statistic.field} of the leaf at {_validate.leaf_path(path)} is "
                f"{_validate.a_or_an(type(value).__name__)}. grad_stats returns a tree "
                "like the parameters with a GradStats at every leaf"
            )
        _validate.real_floating(value, f"{name}: statistics")
        if np.shape(value) != shape:
            raise ValueError(_other_shape(name, path, np.shape(value), shape))
    if leaf.num_envs is None:
        raise ValueError(
            f"{name}: the GradStats at {_validate.leaf_path(path)} does not say "
            "num_envs, the total weight of the environments; grad_stats fills it in"
        )


def _other_shape(name: str, path: Any, got: Any, shape: Any) -> str:
    return (
        f"{name}: gradients must have the shapes of params; the leaf at "
        f"{_validate.leaf_path(path)} has shape {got} for a parameter of shape "
        f"{shape}: compute them for these parameters"
    )


def _combined(
    leaf: GradStats, statistics: Sequence[st.Statistic], axes: tuple[str, ...]
) -> GradStats:
    """Statistics over all devices, from those that each made of its environments."""
    num_envs = leaf.num_envs

    def total(statistic: st.Statistic) -> jax.Array:
        value = getattr(leaf, statistic.field)
        value = value.astype(_validate.wide(value.dtype))
        if not statistic.averaged:
            return value
        # A device whose environments are all absent holds 0/0, not information.
        return jnp.where(num_envs > 0, value * num_envs.astype(value.dtype), 0)

    sums = {statistic: [total(statistic)] for statistic in statistics}
    sums, num_envs = st.over_devices(sums, num_envs, axes)
    (fields,) = st.finish(sums, statistics, num_envs)
    return dataclasses.replace(
        leaf,
        **fields,
        num_envs=num_envs,
        axis_names=(*leaf.axis_names, *axes),
    )
