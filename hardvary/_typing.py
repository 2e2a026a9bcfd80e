"""Types that public signatures share."""

from collections.abc import Callable, Mapping
from typing import Any

from jax.typing import ArrayLike

PyTree = Any

# Name of a mapped axis of `jax.shard_map` or `jax.vmap`, or several of them.
AxisName = str | tuple[str, ...]

# A number, traced or not, or a schedule, which takes the count of updates. optax's own
# name for it says nothing to type checkers: optax carries no types.
ScalarOrSchedule = ArrayLike | Callable[[Any], ArrayLike]

# A number, a schedule, or a tree prefix of params with these.
Threshold = ScalarOrSchedule | Mapping[Any, Any] | list[Any] | tuple[Any, ...]
