"""Settings from files: values for the fields of a config."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.common.run_dir import RunDirError, with_present_names
from experiments.common.validation import require_choice


def load_settings(source: str, config: Any) -> dict[str, Any]:
    """Values for some of the fields of `config`, from a JSON file.

    Args:
      source: the file, or FILE:KEY for the object under that key.
      config: dataclass that the settings are for.

    Raises:
      ValueError: there is no such file, key or field.
    """
    path, key = source, ""
    if not Path(source).is_file() and ":" in source:
        path, _, key = source.rpartition(":")
    try:
        settings: Any = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"settings {path!r} cannot be read: {error}") from None
    if key:
        if not isinstance(settings, dict) or key not in settings:
            raise ValueError(f"settings {path!r} has no {key!r}")
        settings = settings[key]
    if not isinstance(settings, dict):
        raise ValueError(f"settings {source!r} must be a JSON object, got {settings!r}")
    settings = with_present_names(settings, config)
    defaults = vars(config)
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise ValueError(
            f"settings {source!r} has {', '.join(unknown)}, which this command does "
            f"not know{'' if key else '; FILE:KEY picks a part of the file'}"
        )
    return {
        name: _as_type_of(defaults[name], value, f"settings {source!r}: {name}")
        for name, value in settings.items()
    }


def load_chosen(source: str, config: Any, method: str, mend: str) -> dict[str, Any]:
    """Settings that a search has chosen for a method, the method among them.

    Raises:
      RunDirError: there is no such choice, it is another method's or not valid; the
        message ends with `mend`.
    """
    try:
        chosen = {"method": method, **load_settings(source, config)}
        require_choice("method", chosen["method"], [method])
        dataclasses.replace(config, **chosen)
    except ValueError as error:
        raise RunDirError(f"{error}: {mend}") from None
    return chosen


def fields_of(config: Any, kind: type) -> dict[str, Any]:
    """The values that `config` has for the fields of a dataclass that it extends."""
    return {
        field.name: getattr(config, field.name) for field in dataclasses.fields(kind)
    }


def _as_type_of(default: Any, value: Any, what: str) -> Any:
    """`value` from JSON, if the field that has this default takes it."""
    if default is None or value is None:  # what an optional field takes, it checks
        return value
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{what} must be {type(default).__name__}, got {value!r}")
    return value
