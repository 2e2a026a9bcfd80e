"""Hyperparameters as a number, a traced value, a schedule, or a tree of these.

A threshold may differ from parameter to parameter and from step to step. Whatever takes
one calls `check_unit_interval` at construction and `per_leaf` in its update. The count
that schedules need is an int32 scalar of the state, `mask_count`: a second `count`
would hide an optimizer's from `optax.tree.get(state, "count")`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.typing import ArrayLike

from hardvary import _validate
from hardvary._typing import PyTree

_Path = tuple[Any, ...]


def check_unit_interval(name: str, value: PyTree) -> None:
    """Raises unless every number in `value` lies in [0, 1], as far as it is known.

    Args:
      name: the argument, for messages.
      value: a scalar, a schedule or a tree of these. Traced values and what
        schedules return are not known yet and pass.

    Raises:
      TypeError: a leaf that is neither a real scalar nor callable; None.
      ValueError: a number outside [0, 1], or NaN.
    """
    for where, leaf in _checked_numbers(name, value, "in [0, 1], "):
        number = _validate.concrete_value(leaf)
        if number is not None and not 0.0 <= number <= 1.0:
            raise ValueError(
                f"{where} must lie in [0, 1] (0 keeps every component, 1 asks for "
                f"unanimity), got {number}"
            )


def check_scalars(name: str, value: PyTree) -> None:
    """Raises TypeError unless `value` is made of real scalars and schedules."""
    for _ in _checked_numbers(name, value, ""):
        pass


def check_number(name: str, value: Any) -> ArrayLike | None:
    """Returns one number as it is, and None for a schedule, of which none is known.

    For what belongs to all parameters together, where a tree would have no meaning.

    Raises:
      TypeError: neither a real scalar nor a schedule.
    """
    if _is_schedule(value):
        return None
    _validate.scalar(name, value, rule="or a schedule")
    return value


def check_share(name: str, value: Any, what: str) -> None:
    """Raises unless one number lies in [0, 1], as far as it is known.

    Args:
      name: the argument, for messages.
      value: see `check_number`.
      what: that the share is of.

    Raises:
      TypeError: neither a real scalar nor a schedule.
      ValueError: a number outside [0, 1], or NaN.
    """
    known = check_number(name, value)
    share = None if known is None else _validate.concrete_value(known)
    if share is not None and not 0.0 <= share <= 1.0:
        raise ValueError(
            f"{name} must lie in [0, 1]: it is the share of {what}, got {share}"
        )


def _checked_numbers(
    name: str, value: PyTree, rule: str
) -> Iterator[tuple[str, ArrayLike]]:
    """Names and values of all numbers in `value`, which is no more than `rule` says."""
    rule += "or a schedule, or a tree prefix of params with these"
    if value is None:
        _validate.scalar(name, value, rule=rule)
    for path, leaf in jax.tree.leaves_with_path(value, is_leaf=_is_schedule):
        if not _is_schedule(leaf):
            where = name + jax.tree_util.keystr(path)
            _validate.scalar(where, leaf, rule=rule)
            yield where, leaf


def is_scheduled(value: PyTree) -> bool:
    """Whether `value` is a schedule or a tree with one in it."""
    return any(map(_is_schedule, jax.tree.leaves(value, is_leaf=_is_schedule)))


def per_leaf(
    name: str,
    value: PyTree,
    tree: PyTree,
    count: ArrayLike | None,
    is_leaf: Callable[[Any], bool] | None = None,
) -> list[ArrayLike]:
    """Returns a number for every leaf of `tree`, in the order of `jax.tree.leaves`.

    Args:
      name: the argument, for messages.
      value: a scalar, a schedule or a tree of these.
      tree: shaped like params. Parts of it without leaves, such as None or an
        `optax.MaskedNode`, fit whatever stands there in `value`.
      count: number of updates so far, handed to schedules; None if there are none.
      is_leaf: which nodes of `tree` are leaves, as in `jax.tree.leaves`.

    Raises:
      TypeError: a schedule that returned no real scalar.
      ValueError: `value` is no prefix of `tree`; names the first path.
    """
    result: list[ArrayLike] = []
    rule = f"{name} must be a number, a schedule, or a tree of these"
    for path, leaf, size in spread(value, tree, rule, is_leaf):
        number = leaf
        if _is_schedule(leaf):
            number = leaf(count)
            where = name + jax.tree_util.keystr(path)
            _validate.scalar(
                f"what the schedule {where} returns", number, rule="for its count"
            )
        result.extend([number] * size)
    return result


def spread(
    value: PyTree,
    tree: PyTree,
    rule: str,
    is_leaf: Callable[[Any], bool] | None = None,
    path: _Path = (),
) -> Iterator[tuple[_Path, Any, int]]:
    """Leaves of a tree prefix, each with its path and the leaves of `tree` below it.

    Args:
      value: the prefix.
      tree: shaped like params; see `per_leaf`.
      rule: what the prefix must be, for messages.
      is_leaf: which nodes of `tree` are leaves.
      path: to both.

    Raises:
      ValueError: `value` is no prefix of `tree`; names the first path.
    """
    size = len(jax.tree.leaves(tree, is_leaf=is_leaf))
    if size == 0:
        return
    if _is_leaf(value):
        yield path, value, size
        return
    ends = _is_leaf(tree) or (is_leaf is not None and is_leaf(tree))
    if ends or _node(value) != _node(tree):
        raise ValueError(
            f"{rule} that is a prefix of params; "
            f"{_difference(value, tree, path, ends)}. Make it from params with "
            "jax.tree_util.tree_map_with_path, or put one where all leaves below are "
            "to share it. Containers count: of a flax State it is "
            "nnx.State({layer: ...}), with numbers in place of its Params"
        )
    children = zip(_children(value), _children(tree), strict=True)
    for (key, below), (_, part) in children:
        yield from spread(below, part, rule, is_leaf, path + key)


def _is_schedule(value: Any) -> bool:
    # Equinox models are callable trees, and what jax.tree.map makes of one as well.
    return callable(value) and (
        isinstance(value, jax.tree_util.Partial) or _is_leaf(value)
    )


def _is_leaf(value: Any) -> bool:
    return jax.tree_util.all_leaves([value]) or isinstance(value, jax.tree_util.Partial)


def _children(node: Any) -> list[tuple[_Path, Any]]:
    return jax.tree.leaves_with_path(node, is_leaf=lambda part: part is not node)


def _node(node: Any) -> Any:
    return jax.tree.structure(node, is_leaf=lambda part: part is not node)


def _difference(value: Any, tree: Any, path: _Path, ends: bool) -> str:
    if not ends and type(value) is type(tree):
        has, wanted = ([key for key, _ in _children(node)] for node in (value, tree))
        for key in wanted:
            if key not in has:
                return f"it has nothing at {_validate.leaf_path(path + key)}"
        for key in has:
            if key not in wanted:
                return f"params have nothing at {_validate.leaf_path(path + key)}"
    expected = "a leaf" if ends else f"a {type(tree).__name__}"
    found = "None" if value is None else f"a {type(value).__name__}"
    return f"at {_validate.leaf_path(path)} it has {found} where params have {expected}"
