"""Types that public signatures share."""

from collections.abc import Callable, Mapping
from typing import Any

from jax.typing import ArrayLike

PyTree = Any

# Name of a mapped axis of `jax.shard_map` or `jax.vmap`, or several of them.
AxisName = str | tuple[str, ...]

# A number, traced or not, an optax schedule, or a tree prefix of params with these.
Threshold = (
    ArrayLike
    | Callable[[Any], ArrayLike]
    | Mapping[Any, Any]
    | list[Any]
    | tuple[Any, ...]
)
