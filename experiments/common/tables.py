"""Results as text, one line for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def format_rows(
    columns: Mapping[str, tuple[str, str]], rows: Iterable[Mapping[str, Any]]
) -> str:
    """Rows under a header.

    Args:
      columns: title -> (name in a row, format, which begins with alignment and width).
        What is not there stays blank, and what is no number has the width alone, such
        as the words that JSON has in place of NaN.
      rows: what to show.
    """

    def cell(value: Any, spec: str) -> str:
        width = re.match(r"[<>]\d+", spec)
        assert width is not None
        if isinstance(value, int | float):
            return format(value, spec)
        return format("" if value is None else value, width[0])

    header = " ".join(cell(title, spec) for title, (_, spec) in columns.items())
    lines = [
        " ".join(cell(row[name], spec) for name, spec in columns.values())
        for row in rows
    ]
    return "\n".join([header, "-" * len(header), *lines])
