"""Choices of a search, apart from Optuna, which --help need not wait for."""

from __future__ import annotations

from typing import Literal

Sampler = Literal["tpe", "random"]
Pruner = Literal["none", "median", "hyperband"]
