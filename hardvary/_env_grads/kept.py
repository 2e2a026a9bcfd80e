"""Results that are computed once, where the same trace can use them again."""

from collections.abc import Callable
from typing import Any

from hardvary import _compat


class Kept:
    """Results by key, of the trace in which this was made.

    Inside of a branch or a loop results are of that trace, and of no use outside.
    """

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}
        self._trace = _current_trace()

    def __contains__(self, key: Any) -> bool:
        return key in self._results

    def __getitem__(self, key: Any) -> Any:
        return self._results[key]

    def keep(self, key: Any, result: Any) -> None:
        if _current_trace() == self._trace:
            self._results[key] = result

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` returned, or returns now."""
        if key in self:
            return self[key]
        result = compute()
        self.keep(key, result)
        return result


def _current_trace() -> Any:
    return _compat.get_opaque_trace_state(convention="hardvary")
