"""Choices that configs name, apart from tyro and Optuna, which take long to import."""

from __future__ import annotations

from typing import Literal

Preset = Literal["smoke", "cpu", "paper"]
Sampler = Literal["tpe", "univariate_tpe", "random"]
