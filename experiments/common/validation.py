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


def require_seeds(seeds: tuple[int, int]) -> None:
    """Raises ValueError unless `seeds` are a first and a last seed."""
    first, last = seeds
    require_seed("seeds", first)
    require_seed("seeds", last)
    require("seeds", seeds, first <= last, "in ascending order")


def require_seed(field: str, seed: int) -> None:
    """Raises ValueError unless `seed` is one that JAX takes."""
    require(field, seed, 0 <= seed < 2**32, "between 0 and 2**32 - 1")
