"""One form for every complaint about a config value.

What takes a config and names of its fields looks at each value of a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args


def require(field: str, value: object, holds: bool, rule: str) -> None:
    """Raises ValueError naming `field`, `rule` and `value` unless `holds`."""
    if not holds:
        raise ValueError(f"{field} must be {rule}, got {value!r}")


def require_each(
    config: Any, fields: Sequence[str], holds: Callable[[Any], bool], rule: str
) -> None:
    """Raises ValueError unless all values of the fields meet a rule."""
    for field in fields:
        values = getattr(config, field)
        for value in values if isinstance(values, tuple) else (values,):
            require(field, value, holds(value), rule)


def require_at_least(config: Any, least: int, *fields: str) -> None:
    """Raises ValueError unless the fields have at least this value."""
    require_each(config, fields, lambda value: value >= least, f"at least {least}")


def require_positive(config: Any, *fields: str) -> None:
    """Raises ValueError unless the fields are positive and finite."""
    require_each(config, fields, lambda v: 0 < v < math.inf, "positive and finite")


def require_non_negative(config: Any, *fields: str) -> None:
    """Raises ValueError unless the fields are finite, and 0 or more."""
    rule = "non-negative and finite"
    require_each(config, fields, lambda value: 0 <= value < math.inf, rule)


def require_share(config: Any, *fields: str) -> None:
    """Raises ValueError unless the fields are in [0, 1]."""
    require_each(config, fields, lambda value: 0 <= value <= 1, "in [0, 1]")


def require_positive_share(config: Any, *fields: str) -> None:
    """Raises ValueError unless the fields are in (0, 1]."""
    require_each(config, fields, lambda value: 0 < value <= 1, "in (0, 1]")


def require_decay(config: Any, *fields: str) -> None:
    """Raises ValueError unless the fields are in [0, 1)."""
    require_each(config, fields, lambda value: 0 <= value < 1, "in [0, 1)")


def require_max_rescale(config: Any) -> None:
    """Raises ValueError unless `max_rescale` goes with `rescale`."""
    cap = config.max_rescale
    require("max_rescale", cap, cap is None or cap >= 1, "at least 1, or None")
    if cap is not None and not config.rescale:
        raise ValueError(f"max_rescale needs rescale=True, got {cap!r} without it")


def require_distinct(config: Any, what: str, *fields: str) -> None:
    """Raises ValueError unless the fields are some of `what`, each once."""
    for field in fields:
        values = getattr(config, field)
        distinct = len(set(values)) == len(values) > 0
        require(field, values, distinct, f"one or more different {what}")


def require_ascending(config: Any, *fields: str) -> None:
    """Raises ValueError unless the fields are some numbers, each above the last."""
    for field in fields:
        values = getattr(config, field)
        ascending = list(values) == sorted(set(values)) != []
        rule = "one or more different numbers in ascending order"
        require(field, values, ascending, rule)


def require_kinds(config: Any, **kinds: Any) -> None:
    """Raises ValueError unless each field has values of its `Literal`."""
    for field, kind in kinds.items():
        choices = get_args(kind)
        rule = f"one of {', '.join(map(str, choices))}"
        require_each(config, [field], choices.__contains__, rule)


def require_choice(field: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    require(field, value, value in choices, f"one of {', '.join(map(str, choices))}")


def require_seeds(config: Any, *fields: str) -> None:
    """Raises ValueError unless the fields are seeds, or a first and a last one."""
    rule = "between 0 and 2**32 - 1"
    require_each(config, fields, lambda seed: 0 <= seed < 2**32, rule)
    for field in fields:
        seeds = getattr(config, field)
        if isinstance(seeds, tuple):
            require(field, seeds, seeds[0] <= seeds[1], "in ascending order")
