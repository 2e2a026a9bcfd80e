"""A loss with its parameters and the batches of all environments, checked."""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate, sharding
from hardvary._typing import AxisName, PyTree

# An integer or None, a tree prefix of these, a sequence of them for the positional
# arguments, or a mapping from positions and names of arguments.
InAxes = Any
_Key = int | str
_UNEQUAL = (
    "Environments of unequal size: draw as many examples from each, or pad them and "
    "give the padding weight 0 in the loss"
)
# Arrays of an argument that a message shows.
_SHOWN = 4


class _Argument(NamedTuple):
    """The beginning of a path."""

    key: _Key

    def __str__(self) -> str:
        return f"argument {self.key!r}"


def check_arguments(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    name: str = "loss_fn",
) -> int | tuple[int, ...]:
    """Returns argnums as an int or a tuple of ints.

    Raises:
      TypeError: a `loss_fn` that is not callable, argnums that are no integers.
      ValueError: argnums that are negative, empty or named twice.
    """
    if not callable(loss_fn):
        raise TypeError(f"{name} must be callable, got {loss_fn!r}")
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


def take_params(
    args: tuple[Any, ...], argnums: int | tuple[int, ...]
) -> tuple[tuple[int, ...], PyTree]:
    """Positions of the differentiated arguments, and these: a tuple for several.

    Raises:
      TypeError: parameters that are not real floating.
      ValueError: a position that is not given.
    """
    positions = (argnums,) if isinstance(argnums, int) else argnums
    if max(positions) >= len(args):
        raise ValueError(
            f"argnums {argnums!r} needs more than the {len(args)} positional "
            "arguments given"
        )
    for i in positions:
        where = (
            "parameters" if isinstance(argnums, int) else f"parameters, argument {i}"
        )
        _validate.real_floating(args[i], where)
    params = tuple(args[i] for i in positions)
    return positions, params[0] if isinstance(argnums, int) else params


def describe_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The arguments of a loss, each with the shapes of its first arrays."""
    given = [*enumerate(args), *kwargs.items()]
    return "; ".join(f"argument {key!r}: {_shapes(arg)}" for key, arg in given)


def _shapes(arg: Any) -> str:
    leaves = [
        f"{jax.tree_util.keystr(path)} {jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for path, leaf in jax.tree.leaves_with_path(arg)
        if _validate.is_array(leaf)
    ]
    rest = [f"{len(leaves) - _SHOWN} more"] if len(leaves) > _SHOWN else []
    return ", ".join([*leaves[:_SHOWN], *rest]).strip() or "no array"


class Problem:
    """A loss with its parameters and the batches of all environments, checked.

    Attributes:
      params: the differentiated arguments, a tuple of trees if argnums is a sequence.
      batch: arrays `[env, ...]`, all that is mapped over.
      num_envs: number of environments.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        argnums: int | tuple[int, ...],
        has_aux: bool,
        in_axes: InAxes,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        axis_name: AxisName | None = None,
    ) -> None:
        sharding.check_bound(axis_name, "gradients of environments")
        self._single = isinstance(argnums, int)
        self._loss_fn, self._has_aux = loss_fn, has_aux
        self._in_axes, self._num_args = in_axes, len(args)
        self._positions, params = positions, params = take_params(args, argnums)
        others: dict[Any, Any] = {
            i: arg for i, arg in enumerate(args) if i not in positions
        }
        others |= kwargs
        axes = _axes_of(in_axes, positions, len(args), kwargs)
        self._parts = {key: _Mapped(key, arg, axes[key]) for key, arg in others.items()}
        leaves = [leaf for part in self._parts.values() for leaf in part.paths]
        num_envs = _validate.leading_size(
            leaves,
            "batch leaves",
            f". {_UNEQUAL}. To share an argument with all environments: "
            "in_axes={argument: None}",
        )
        if num_envs is None:
            raise ValueError(
                "a batch is needed beside the parameters: at least one argument with "
                "leaves [env, ...] that in_axes does not share"
            )
        self.num_envs = num_envs
        self.batch = [leaf for part in self._parts.values() for leaf in part.elements()]
        # Under shard_map the gradient of a replicated parameter is summed over
        # devices before anyone could look at its sign.
        # Its loss may also differ between devices by a shared argument or, which only
        # axis_name tells, by what it closes over.
        self.params = sharding.vary_like(params, list(others.values()), axis_name)

    @property
    def shared(self) -> list[list[jax.Array]]:
        """Arrays that all environments share, a list for each argument."""
        return [part.shared() for part in self._parts.values()]

    def elsewhere(
        self, params: PyTree, shared: Sequence[Any], batch: Sequence[jax.Array]
    ) -> "Problem":
        """The same loss of other arrays, and of other environments."""
        result = copy.copy(self)
        result.params, result.batch = params, list(batch)
        result._parts = {
            key: part.sharing(own)
            for (key, part), own in zip(self._parts.items(), shared, strict=True)
        }
        result.num_envs = len(batch[0])
        return result

    def loss(
        self, params: PyTree, env_batch: Sequence[jax.Array]
    ) -> tuple[jax.Array, Any]:
        """Returns `(loss, aux)` of one environment; aux is None if there is none."""
        own = (params,) if self._single else params
        given: dict[Any, Any] = dict(zip(self._positions, own, strict=True))
        remaining = list(env_batch)
        for key, part in self._parts.items():
            given[key] = part.rebuild(remaining)
        args = [given.pop(i) for i in range(self._num_args)]
        try:
            output = self._loss_fn(*args, **given)
        except NameError as error:
            if "unbound axis name" not in str(error):
                raise
            raise ValueError(
                f"loss_fn uses a mapped axis that does not exist ({error}). For a "
                "collective over environments, such as a shared batch norm, pass its "
                "name as env_axis_name to the gradient oracle"
            ) from error
        except Exception as error:
            error.add_note(self._note(args, given))
            raise
        return self._checked(output)

    def _note(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        given = describe_arguments(args, kwargs)
        one = _is_axis(self._in_axes)
        axes = f"axis {self._in_axes}" if one else f"in_axes={self._in_axes!r}"
        return (
            f"hardvary called loss_fn for ONE of {self.num_envs} environments, with "
            f"{given}. It took {axes} of the batch as environments; in_axes can name "
            "another axis, or None for what all environments share"
        )

    def value_and_grad(self, params: PyTree, env_batch: Sequence[jax.Array]) -> Any:
        """Returns `((loss, aux), grads)` of one environment."""
        return jax.value_and_grad(self.loss, has_aux=True)(params, env_batch)

    def _checked(self, output: Any) -> tuple[jax.Array, Any]:
        loss, aux = split_aux(output, self._has_aux)
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
            received = _validate.a_or_an(type(loss).__name__)
            if isinstance(loss, tuple) and not self._has_aux:
                received += "; for (loss, aux) pass has_aux=True"
        raise TypeError(
            f"the loss of one environment must be a real scalar, got {received}"
        )


def split_aux(output: Any, has_aux: bool) -> tuple[Any, Any]:
    """`(loss, aux)` from what a loss function returned; aux is None without."""
    if not has_aux:
        return output, None
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            "with has_aux=True the loss function must return (loss, aux), got "
            f"{type(output).__name__}"
        )
    return output


def _axes_of(
    in_axes: InAxes,
    positions: Sequence[int],
    num_args: int,
    kwargs: Mapping[str, Any],
) -> dict[_Key, Any]:
    """A tree prefix of axes for every argument that is no parameter."""
    axes: dict[_Key, Any] = dict.fromkeys([*range(num_args), *kwargs], 0)
    if isinstance(in_axes, Mapping):
        unknown = [key for key in in_axes if key not in axes]
        if unknown:
            raise ValueError(
                f"in_axes names the argument {unknown[0]!r}, which was not given; "
                f"given are {list(axes)}"
            )
        axes |= in_axes
    elif isinstance(in_axes, tuple | list):
        if len(in_axes) != num_args:
            raise ValueError(
                f"in_axes must have an entry for each of the {num_args} positional "
                f"arguments (None for parameters), got {in_axes!r}; a mapping such as "
                "{1: 0, 'name': None} names only some, keywords too"
            )
        axes |= enumerate(in_axes)
    elif _is_axis(in_axes):
        axes = dict.fromkeys(axes, int(in_axes))
        axes |= dict.fromkeys(positions)
    else:
        raise TypeError(
            "in_axes must be an integer, a sequence with an entry for each positional "
            f"argument, or a mapping from positions and names, got {in_axes!r}"
        )
    for i in positions:
        if axes.pop(i) not in (None, 0):
            raise ValueError(
                f"in_axes must be None for parameters, which all environments share, "
                f"got {in_axes!r} with parameters at position {i}"
            )
    return axes


class _Mapped:
    """An argument: its parts that environments have each, and those that they share.

    Attributes:
      paths: of all leaves that are mapped over, each with its number of environments
        as a shape.
    """

    def __init__(self, key: _Key, arg: Any, axes: Any) -> None:
        is_axis = lambda node: node is None or _is_axis(node)  # noqa: E731
        self._subtrees: list[tuple[int | None, Any]] = []
        self._treedefs: list[Any] = []
        self.paths: list[tuple[Any, Any]] = []
        try:
            whole: Any = jax.tree.structure(axes, is_leaf=is_axis)
            subtrees = whole.flatten_up_to(arg)
        except ValueError as error:
            raise ValueError(
                f"in_axes of the argument {key!r} must be an integer, None, or a tree "
                f"prefix of it: {error}"
            ) from error
        self._whole = whole
        for axis, subtree in zip(
            jax.tree.leaves(axes, is_leaf=is_axis), subtrees, strict=True
        ):
            self._add(key, axis, subtree)

    def _add(self, key: _Key, axis: Any, subtree: Any) -> None:
        if axis is not None and not _is_axis(axis):
            raise TypeError(
                f"in_axes of the argument {key!r} must be integers or None, "
                f"got {axis!r}"
            )
        leaves = jax.tree.leaves_with_path(subtree)
        flags = isinstance(key, str) and not any(_may_be_mapped(x) for _, x in leaves)
        if flags or not leaves:
            # A flag or a number has no axis to be mapped over.
            axis = None
        if axis is not None:
            for path, leaf in leaves:
                where = (_Argument(key), *path)
                size = self._size(key, where, leaf, axis)
                self.paths.append((where, jax.ShapeDtypeStruct((size,), jnp.float32)))
        self._subtrees.append((None if axis is None else int(axis), subtree))

    def _size(self, key: _Key, path: Any, leaf: Any, axis: int) -> int:
        """The number of environments of a leaf that is mapped over."""
        if not _validate.is_array(leaf):
            mend = "Turn it into an array"
            if isinstance(leaf, np.ndarray):
                mend = f"Its elements are {leaf.dtype}s. {_UNEQUAL}"
            found = _validate.a_or_an(type(leaf).__name__)
            raise TypeError(
                f"batch leaves must be arrays; the leaf at {_validate.leaf_path(path)} "
                f"is {found}. {mend}, or share it with all environments: "
                f"in_axes={{{key!r}: None}}"
            )
        ndim = np.ndim(leaf)
        if not -ndim <= axis < ndim:
            raise ValueError(
                "batch leaves need an environment axis in front; the leaf at "
                f"{_validate.leaf_path(path)} "
                + ("is a scalar" if ndim == 0 else f"has no axis {axis}")
                + f". To share it with all environments, pass in_axes={{{key!r}: None}}"
            )
        return np.shape(leaf)[axis]

    def elements(self) -> list[jax.Array]:
        """Arrays `[env, ...]`, the leaves of one environment's argument."""
        result: list[jax.Array] = []
        self._treedefs = []
        for axis, subtree in self._subtrees:
            if axis is None:
                self._treedefs.append(None)
                continue

            def flatten(element: Any) -> list[Any]:
                leaves, treedef = jax.tree.flatten(element)
                self._treedefs.append(treedef)
                return leaves

            # jax.vmap knows containers that it maps as a whole, such as BCOO: an
            # element of one is not what has the elements of its leaves.
            result += jax.vmap(flatten, in_axes=axis)(subtree)
        return result

    def shared(self) -> list[jax.Array]:
        """Arrays of the parts that environments share."""
        subtrees = [subtree for axis, subtree in self._subtrees if axis is None]
        return [x for x in jax.tree.leaves(subtrees) if isinstance(x, jax.Array)]

    def sharing(self, arrays: Sequence[jax.Array]) -> "_Mapped":
        """The argument with others in the place of `shared()`."""
        result, rest = copy.copy(self), iter(arrays)

        def other(leaf: Any) -> Any:
            return next(rest) if isinstance(leaf, jax.Array) else leaf

        result._subtrees = [
            (axis, jax.tree.map(other, subtree) if axis is None else subtree)
            for axis, subtree in self._subtrees
        ]
        return result

    def rebuild(self, remaining: list[Any]) -> Any:
        """The argument of one environment; takes its leaves off `remaining`."""
        parts = []
        for (_, subtree), treedef in zip(self._subtrees, self._treedefs, strict=True):
            if treedef is None:
                parts.append(subtree)
                continue
            leaves = [remaining.pop(0) for _ in range(treedef.num_leaves)]
            parts.append(jax.tree.unflatten(treedef, leaves))
        return jax.tree.unflatten(self._whole, parts)


def _is_axis(axis: Any) -> bool:
    return isinstance(axis, int | np.integer) and not isinstance(axis, bool)


def _may_be_mapped(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
