"""One form for every complaint about a config value."""

from __future__ import annotations

from collections.abc import Sequence


def require(field: str, value: object, holds: bool, rule: str) -> None:
    """Raises ValueError naming `field`, `rule` and `value` unless `holds`."""
    if not holds:
        raise ValueError(f"{field} must be {rule}, got {value!r}")


def require_choice(field: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    require(field, value, value in choices, f"one of {', '.join(map(str, choices))}")
