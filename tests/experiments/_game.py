"""Skips what needs CoinRun where it is not installed."""

import pytest

from experiments.coinrun.game import GameError, require_game


def _missing():
    try:
        require_game()
    except GameError as error:
        return str(error)
    return ""


_REASON = _missing()
needs_game = pytest.mark.skipif(bool(_REASON), reason=_REASON)
