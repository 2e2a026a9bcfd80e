"""Checks of arguments and shapes, raised at construction or while tracing."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary._typing import PyTree


def concrete_value(value: Any) -> float | None:
    """Returns `value` as a float, or None where only its type is known (traced)."""
    if isinstance(value, jax.core.Tracer):
        return None
    return float(value)


def scalar(name: str, value: Any, *, rule: str) -> None:
    """Raises TypeError unless `value` is a real number or a 0-d floating array."""
    # Not numbers.Real: a Fraction is one, and no array can be made of it.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, np.number) or np.shape(value) != ():
        if callable(value):
            rule += " and no schedule (optax.inject_hyperparams would call one)"
        raise TypeError(f"{name} must be a real scalar {rule}, got {value!r}")
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be a real scalar {rule}, got {value!r}")


def decay_rate(name: str, value: Any) -> None:
    """Raises unless a (possibly traced) scalar lies in [0, 1)."""
    scalar(name, value, rule="in [0, 1)")
    number = concrete_value(value)
    if number is not None and not 0.0 <= number < 1.0:
        raise ValueError(
            f"{name} must lie in [0, 1): it is the share of the moving average that "
            f"survives a step, got {number}"
        )


def at_least(name: str, value: Any, minimum: float, *, strict: bool = False) -> None:
    """Raises unless a (possibly traced) scalar is >= `minimum` (> if `strict`)."""
    bound = f"{'>' if strict else '>='} {minimum:g}"
    scalar(name, value, rule=bound)
    number = concrete_value(value)
    if number is None:
        return
    if not (number > minimum if strict else number >= minimum):
        raise ValueError(f"{name} must be {bound}, got {number}")


def finite_at_least(
    name: str, value: Any, minimum: float, *, strict: bool = False
) -> None:
    """Raises unless a (possibly traced) scalar is finite and >= `minimum`.

    Args:
      name: the argument, for messages.
      value: the scalar.
      minimum: a bound below.
      strict: whether the bound itself is refused.
    """
    bound = f"finite and {'>' if strict else '>='} {minimum:g}"
    scalar(name, value, rule=f"that is {bound}")
    number = concrete_value(value)
    if number is None:
        return
    large_enough = number > minimum if strict else number >= minimum
    if not (large_enough and number < math.inf):
        raise ValueError(f"{name} must be {bound}, got {number}")


def names(what: str, values: Any, allowed: Sequence[str]) -> tuple[str, ...]:
    """Returns `values` as a tuple after checking each against `allowed`."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(
            f"{what} must be a sequence of names such as ('mean', 'sign'), "
            f"got {values!r}"
        )
    if not values:
        raise ValueError(f"{what} must name at least one of {tuple(allowed)}, got ()")
    for value in values:
        if value not in allowed:
            raise ValueError(
                f"{what} must be drawn from {tuple(allowed)}, got {value!r}"
            )
    return tuple(dict.fromkeys(values))


def wide(dtype: Any) -> Any:
    """float64 for float64, float32 for anything less: the dtype that sums are in.

    Raises:
      TypeError: a dtype that is not real floating: a sum in float32 would lose an
        imaginary part.
    """
    # Without x64 there is no float64, whatever NumPy holds.
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"a real floating dtype is needed, got {dtype}")
    # Not jnp.promote_types: it refuses under strict promotion.
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def is_array(leaf: Any) -> bool:
    """Whether JAX takes `leaf` for an array, numbers included."""
    if isinstance(leaf, bool | int | float | complex | np.generic | np.ndarray):
        return not isinstance(leaf, np.ndarray) or leaf.dtype != object
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def takes(
    name: str,
    rule: Any,
    gets: str,
    keywords: Iterable[str],
    offered: Iterable[str] = (),
) -> list[str]:
    """Checks that a rule takes what it will be called with.

    Args:
      name: of the rule, for messages.
      rule: called with one argument by position.
      gets: what that is.
      keywords: that it is given beside it.
      offered: that it is given where it has a parameter of this name.

    Returns:
      Those of `offered` that it has.

    Raises:
      TypeError: it is not callable, or takes something else.
    """
    if not callable(rule):
        raise TypeError(f"rule must be callable, got {rule!r}")
    try:
        signature = inspect.signature(rule)
    except ValueError:  # of some functions that are not Python's
        return []
    taken = [keyword for keyword in offered if keyword in signature.parameters]
    given = [*keywords, *taken]
    try:
        signature.bind(None, **dict.fromkeys(given))
    except TypeError as error:
        named = f" and, by keyword, {', '.join(given)}" if given else " alone"
        raise TypeError(
            f"{name}: the rule is called with {gets}{named}; it takes {signature}: "
            f"{error}"
        ) from None
    return taken


def a_or_an(noun: str) -> str:
    vowel = noun[:1].lower() in "aeiou" or noun == "ndarray"
    return f"an {noun}" if vowel else f"a {noun}"


def leaf_path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path) or "the root"


def real_floating(tree: PyTree, what: str) -> None:
    """Raises TypeError, naming the leaf, unless every leaf is real floating."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not is_array(leaf):
            found = f"is {a_or_an(type(leaf).__name__)}"
        elif not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            found = f"has dtype {jnp.result_type(leaf)}"
        else:
            continue
        raise TypeError(
            f"{what} must be real floating-point arrays; the leaf at "
            f"{leaf_path(path)} {found}. Keep other leaves out of the "
            "differentiated tree (flax.nnx.split, eqx.partition, optax.partition)"
        )


def same_structure(
    tree: PyTree,
    params: PyTree,
    what: str,
    is_leaf: Callable[[Any], bool] | None = None,
) -> None:
    """Raises ValueError, naming the first difference, unless two trees are alike.

    Args:
      tree: shaped like params, if it is right.
      params: the tree to compare with.
      what: for messages.
      is_leaf: which nodes of `tree` are leaves.
    """
    got: Any = jax.tree.structure(tree, is_leaf=is_leaf)
    if got == jax.tree.structure(params):
        return
    paths = [path for path, _ in jax.tree.leaves_with_path(tree, is_leaf=is_leaf)]
    expected = [path for path, _ in jax.tree.leaves_with_path(params)]
    # The first of each: two trees in full are more than anyone reads.
    extra = [leaf_path(path) for path in paths if path not in expected][:1]
    missing = [leaf_path(path) for path in expected if path not in paths][:1]
    differences = [f"a leaf at {path}, where params have none" for path in extra]
    differences += [f"no leaf at {path}, where params have one" for path in missing]
    difference = ", and ".join(differences) or (
        "the leaves at the same paths, in containers of other types"
    )
    raise ValueError(f"{what} must have the tree structure of params; got {difference}")


def same_shapes(tree: PyTree, params: PyTree, what: str, mend: str) -> None:
    """Raises ValueError unless two trees have the same structure and leaf shapes."""
    same_structure(tree, params, what)
    for (path, leaf), param in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(params), strict=True
    ):
        if np.shape(leaf) != np.shape(param):
            raise ValueError(
                f"{what} must have the shapes of params; the leaf at "
                f"{leaf_path(path)} has shape {np.shape(leaf)} for a parameter of "
                f"shape {np.shape(param)}: {mend}"
            )


def stacked_gradients(grads: PyTree, params: PyTree | None, name: str) -> int | None:
    """Checks stacked gradients and returns the number of environments.

    Args:
      grads: tree whose leaves are `[env, *param.shape]`.
      params: tree like `grads` without the environment axis, or None.
      name: the function to name in messages.

    Returns:
      The number of environments, None for a tree without leaves.

    Raises:
      TypeError: gradients that are not real floating.
      ValueError: a leaf without an environment axis, environments that disagree
        in number, none at all, or trees that do not match.
    """
    real_floating(grads, f"{name}: gradients")
    leaves = jax.tree.leaves_with_path(grads)
    if params is not None:
        same_structure(grads, params, f"{name}: gradients")
        for (path, grad), param in zip(leaves, jax.tree.leaves(params), strict=True):
            shape = np.shape(grad)
            if len(shape) != np.ndim(param) + 1 or shape[1:] != np.shape(param):
                hint = (
                    "it has no environment axis: pass what hardvary's "
                    "value_and_env_grads, grad_stats or per_env_grad return, and put "
                    "what averages or adds up gradients behind the aggregator, "
                    "optax.MultiSteps too; of two aggregators in a chain the first "
                    "leaves nothing to the second"
                    if shape == np.shape(param)
                    else "the axes after the first must be the parameter's"
                )
                raise ValueError(
                    f"{name}: gradients must have shape [env, *param.shape]; the leaf "
                    f"at {leaf_path(path)} has shape {shape} for a parameter of "
                    f"shape {np.shape(param)}: {hint}"
                )
    return leading_size(leaves, f"{name}: gradients")


def leading_size(
    leaves: list[tuple[Any, Any]], what: str, mend: str = ""
) -> int | None:
    """Returns the common size of axis 0 of leaves given with their paths.

    Raises:
      ValueError: a leaf without an axis, sizes that differ, a size of zero.
    """
    first: tuple[Any, int] | None = None
    for path, leaf in leaves:
        shape = np.shape(leaf)
        if not shape:
            raise ValueError(
                f"{what} need an environment axis in front; the leaf at "
                f"{leaf_path(path)} is a scalar"
            )
        if first is None:
            first = (path, shape[0])
        elif shape[0] != first[1]:
            raise ValueError(
                f"{what} must agree on the number of environments (axis 0); "
                f"{leaf_path(first[0])} has {first[1]}, {leaf_path(path)} has "
                f"{shape[0]}{mend}"
            )
    if first is None:
        return None
    if first[1] == 0:
        raise ValueError(f"{what} hold zero environments; at least one is needed")
    return first[1]


def env_weights(weights: Any, num_envs: int, name: str) -> jax.Array:
    """Checks the weights of environments and returns them as a floating array.

    Raises:
      TypeError: weights that are not real.
      ValueError: not of shape `[env]`, or (concrete values only) negative, not
        finite, or all zero.
    """
    if np.shape(weights) != (num_envs,):
        raise ValueError(
            f"{name}: env_weights must have shape ({num_envs},), one weight for each "
            f"environment, got shape {np.shape(weights)}"
        )
    array = jnp.asarray(weights)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name}: env_weights must be real, got dtype {array.dtype}")
    # jnp.asarray makes a tracer of a constant under jit.
    if not any(isinstance(w, jax.core.Tracer) for w in jax.tree.leaves(weights)):
        values = np.asarray(weights, np.float64)
        if not np.all(np.isfinite(values)) or np.any(values < 0):
            raise ValueError(
                f"{name}: env_weights must be finite and non-negative (0 marks an "
                f"absent environment), got {values.tolist()}"
            )
        if not np.any(values > 0):
            raise ValueError(
                f"{name}: env_weights mark every environment absent; at least one "
                "must be positive"
            )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        # Whole numbers beyond 2**24 need float64, where there is one.
        array = array.astype(jnp.result_type(float))
    # A negative weight that could not be seen above must not count in the total only.
    return jnp.maximum(array.astype(wide(array.dtype)), 0)


def combination(weights: Any, num_envs: int) -> jax.Array:
    """Checks the weights of a sum of gradients and returns them as a floating array.

    Raises:
      TypeError: weights that are not real.
      ValueError: not of shape `[env]`.
    """
    return of_envs("weights", weights, num_envs)


def of_envs(what: str, values: Any, num_envs: int, name: str = "") -> jax.Array:
    """Checks numbers of environments and returns them in at least float32.

    Args:
      what: the argument, for messages.
      values: `[env]`.
      num_envs: their number.
      name: of the function, for messages.

    Raises:
      TypeError: values that are not real.
      ValueError: not of shape `[env]`.
    """
    where = f"{name}: {what}" if name else what
    if np.shape(values) != (num_envs,):
        raise ValueError(
            f"{where} must have shape ({num_envs},), one for each environment, got "
            f"shape {np.shape(values)}"
        )
    array = jnp.asarray(values)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{where} must be real, got dtype {array.dtype}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.result_type(float))
    return array.astype(wide(array.dtype))


def whole_number(name: str, value: Any, minimum: int) -> int:
    """Returns a count as an int.

    Raises:
      TypeError: a value that is no integer; a float, a bool and an array of one
        element are none, because they hint at a mistake.
      ValueError: one below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer >= {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
    return int(value)


def prng_key(name: str, seed: Any) -> jax.Array:
    """Returns a typed key scalar, from a seed or as it is.

    Args:
      name: the argument, for messages.
      seed: an integer >= 0, an integer array [] that may be traced, or a key.

    Raises:
      TypeError: anything else, raw keys `uint32[2]` among it.
      ValueError: a negative integer.
    """
    if isinstance(seed, jax.Array) and np.shape(seed) == ():
        if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
            return seed
        if jnp.issubdtype(seed.dtype, jnp.integer):
            return jax.random.key(seed)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(
            f"{name} must be an integer >= 0 or a key such as jax.random.key(0), "
            f"got {seed!r}"
        )
    return jax.random.key(whole_number(name, seed, 0))
