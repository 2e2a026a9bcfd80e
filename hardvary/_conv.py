"""Weight gradients of convolutions, one environment at a time."""

from collections.abc import Sequence
from typing import Any

import jax

from hardvary._trace import Env, Use


def applies(use: Use) -> bool:
    return False


def pull(
    use: Use, operands: Sequence[Any], env: Env, saved: Any, cotangents: Any
) -> Any:
    raise NotImplementedError
