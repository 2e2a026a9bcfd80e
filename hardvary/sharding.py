"""Everything about devices: sums over mapped axes, varying values, explicit meshes."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _compat, _validate
from hardvary._typing import AxisName, PyTree


def on_cpu() -> bool:
    """Whether computations go to a CPU unless told otherwise.

    Results do not depend on it: it picks the faster of two ways, and is asked while
    tracing so that only that one is traced.
    """
    return jax.default_backend() == "cpu"


def cpu_threads() -> int:
    """Threads of XLA on CPU: one for every core that the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def names_of(axis_name: AxisName | None) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def check_bound(axis_name: AxisName | None, what: str) -> None:
    """Raises ValueError unless `axis_name` is mapped where this is traced."""
    for name in names_of(axis_name):
        try:
            jax.lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"{what}: axis_name={axis_name!r}, and no axis {name!r} is mapped "
                "here; call it inside of the jax.shard_map or jax.vmap that maps over "
                "it, by the name that it has there"
            ) from error


# Values that differ between the devices of a mapped axis.


def _varying(leaf: Any) -> frozenset[Any]:
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return frozenset()
    return _compat.varying_axes(jax.typeof(leaf))


def vary_like(
    tree: PyTree, reference: PyTree, axis_name: AxisName | None = None
) -> PyTree:
    """Marks `tree` as varying over the shard_map axes that `reference` varies over.

    And over `axis_name`, as far as it names such axes.
    """
    leaves = jax.tree.leaves(reference)
    wanted = frozenset().union(*(_varying(leaf) for leaf in leaves))
    if axis_name is not None:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        wanted |= set(names_of(axis_name)) & set(manual)

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(wanted - _varying(leaf)))
        return _compat.vary(leaf, missing) if missing else leaf

    return jax.tree.map(cast, tree) if wanted else tree


def axes_without(leaf: Any, axis_name: AxisName | None) -> tuple[str, ...]:
    """The shard_map axes among `axis_name` along which `leaf` is known not to vary.

    None of them where types do not tell: under vmap, or without `check_vma`.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(
        name
        for name in names_of(axis_name)
        if name in manual
        and name not in _varying(leaf)
        and name in _varying(jax.lax.axis_index(name))
    )


# Sums over the environments of all devices.


def psum_counts(
    counts: Sequence[jax.Array],
    limit: int,
    axis_name: AxisName,
    means: Sequence[jax.Array] | None,
) -> list[jax.Array]:
    """Sums counts of at most `limit` over devices, in the narrowest type that fits.

    Args:
      counts: whole numbers, or NaN for a gradient that is not finite.
      limit: bound on every sum.
      axis_name: mapped axis.
      means: sums of gradients over all devices, which are not finite where a
        gradient is not.
    """
    if means is not None and limit <= np.iinfo(np.int8).max:

        def sum_of(count: jax.Array, mean: jax.Array) -> jax.Array:
            whole = jnp.where(jnp.isfinite(count), count, 0).astype(jnp.int8)
            total = jax.lax.psum(whole, axis_name).astype(count.dtype)
            return jnp.where(jnp.isfinite(mean), total, jnp.nan)

        return [sum_of(*pair) for pair in zip(counts, means, strict=True)]
    # float16 holds every whole number up to here, and NaN.
    dtype = jnp.float16 if limit <= 2048 else None

    def narrow(count: jax.Array) -> jax.Array:
        sent = count if dtype is None else count.astype(dtype)
        return jax.lax.psum(sent, axis_name).astype(count.dtype)

    return [narrow(count) for count in counts]


def own_rows(array: jax.Array, axis_name: AxisName | None, num_rows: int) -> jax.Array:
    """The `num_rows` rows of the device at hand, of an array with those of all."""
    if axis_name is None:
        return array
    start = jax.lax.axis_index(axis_name) * num_rows
    return jax.lax.dynamic_slice_in_dim(array, start, num_rows)


def all_rows(array: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Rows of all devices, the same on each of them."""
    if axis_name is None:
        return array
    num_rows = len(array)
    total = num_rows * jax.lax.axis_size(axis_name)
    zeros = jnp.zeros((total, *array.shape[1:]), array.dtype)
    start = jax.lax.axis_index(axis_name) * num_rows
    placed = jax.lax.dynamic_update_slice_in_dim(
        vary_like(zeros, array, axis_name), array, start, 0
    )
    # Not all_gather: its result counts as different on each device.
    return jax.lax.psum(placed, axis_name)


# Meshes with explicit axes.


def _spec(leaf: Any) -> tuple[Any, ...]:
    if not isinstance(leaf, jax.Array):
        return ()
    return tuple(jax.typeof(leaf).sharding.spec)


def explicit_axes(batch: PyTree) -> tuple[str, ...]:
    """Mesh axes over which the environments are spread for all to see.

    Raises:
      ValueError: outside of their mesh.
    """
    for leaf in jax.tree.leaves(batch):
        first = _spec(leaf)[:1]
        if first and first[0] is not None:
            axes = names_of(first[0])
            if not set(axes) <= set(jax.sharding.get_abstract_mesh().explicit_axes):
                raise ValueError(
                    f"environments are spread over the explicit axes {axes} of a mesh "
                    f"that is not at hand: call this under {_compat.SET_MESH}(mesh)"
                )
            return axes
    return ()


def size_of(axes: tuple[str, ...]) -> int:
    """Number of devices along explicit axes, 1 for none."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in axes)


def spread_over(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """`tree` with axis 0 of every leaf spread over explicit axes, and nothing else."""

    def spread(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        spec = jax.P(axes, *(None,) * (leaf.ndim - 1))
        return _compat.reshard(leaf, spec)

    return jax.tree.map(spread, tree)


def on_devices(
    function: Callable[..., PyTree],
    axes: tuple[str, ...],
    params: PyTree,
    shared: PyTree,
    spread: Sequence[PyTree],
    out_specs: PyTree,
) -> PyTree:
    """`function(params, shared, *spread)`, on each device with its own environments.

    Args:
      function: what a device computes; collectives may name `axes`.
      axes: explicit axes over which environments are spread.
      params: the same on all devices; their gradients are not summed over these.
      shared: other arrays that `function` reads: it must not close over one.
      spread: trees with leaves `[env, ...]`.
      out_specs: as of `jax.shard_map`.
    """

    def local(params: PyTree, shared: PyTree, *own: PyTree) -> PyTree:
        return function(vary_like(params, own, axes), shared, *own)

    mesh = jax.sharding.get_abstract_mesh()
    run = jax.shard_map(
        local,
        in_specs=(jax.P(), jax.P(), *(jax.P(axes) for _ in spread)),
        out_specs=out_specs,
        # All that are explicit: jax 0.7 has no scatter beside one that is not used.
        axis_names=set(mesh.explicit_axes),
        # A loss that was written for one device knows nothing of values that vary: it
        # may begin a loop with zeros. Inside of another shard_map it has to.
        check_vma=bool(mesh.manual_axes),
    )
    # Compiled as a whole: one operation after the other takes minutes.
    run = jax.jit(run)
    shared = jax.tree.map(lambda leaf: _compat.reshard(leaf, jax.P()), shared)
    with _naming_closures(""):
        return run(params, shared, *(spread_over(tree, axes) for tree in spread))


@contextlib.contextmanager
def _naming_closures(what: str) -> Iterator[None]:
    """Says of a loss that closes over an array of a mesh what it is to do."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if re.search("context mesh|closing over inputs", str(error).lower()):
            error.add_note(
                f"{what}on a mesh with explicit axes a loss that closes over an array "
                "takes it as an argument instead; in_axes={argument: None} shares one "
                "with all environments"
            )
        raise


def gather(leaf: Any) -> jax.Array:
    """`leaf` with all environments on every device, if it is sharded explicitly."""
    leaf = jnp.asarray(leaf)
    spec = _spec(leaf)
    if spec and spec[0] is not None:
        leaf = _compat.reshard(leaf, jax.P(None, *spec[1:]))
    return leaf


def with_auto_axes(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """`function` with a mesh's explicit axes left to the compiler, if it has any.

    A collective over a mapped axis (`jax.vmap(..., axis_name=...)`) needs it: beside
    explicit axes, jax 0.11 and 0.12 refuse even one of replicated values.

    Returns:
      A function like `function`, whose results are replicated over such a mesh.
    """

    def run(*args: Any, **kwargs: Any) -> PyTree:
        if not jax.sharding.get_abstract_mesh().explicit_axes:
            return function(*args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        def of_arrays(given: Sequence[jax.Array]) -> PyTree:
            whole = list(leaves)
            for i, array in zip(arrays, given, strict=True):
                whole[i] = array
            args, kwargs = jax.tree.unflatten(tree, whole)
            return function(*args, **kwargs)

        everywhere = jax.sharding.auto_axes(of_arrays, out_sharding=jax.P())
        with _naming_closures("env_axis_name: "):
            return everywhere([leaves[i] for i in arrays])

    return run


def refuse_sharded_parameters(params: PyTree, what: str) -> None:
    """Raises ValueError for a parameter that an explicit mesh has split."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if any(axis is not None for axis in _spec(leaf)):
            raise ValueError(
                f"{what} needs parameters that are replicated over the mesh; the leaf "
                f"at {_validate.leaf_path(path)} is sharded as {_spec(leaf)}. Gather "
                "them first, jax.reshard(params, jax.P()), or use an explicit mesh for "
                "the environments only"
            )
