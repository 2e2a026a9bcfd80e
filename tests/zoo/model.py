"""One kind of model, and the registry of all."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

NUM_ENVS = 6


@dataclasses.dataclass(frozen=True)
class Model:
    """One kind of model.

    Attributes:
      make: `make(rng) -> (params, loss_fn, batch)`.
      has_aux: whether loss_fn returns `(loss, aux)`.
      promotes: whether a library underneath promotes dtypes or ranks implicitly, which
        tests/conftest.py forbids.
      rounding: what counts as rounding, as a share of the largest gradient.
      decided: share of components whose signs must be beyond rounding, so that the
        comparison of signs says something.
    """

    make: Callable[[np.random.Generator], Any]
    has_aux: bool = False
    promotes: bool = False
    rounding: float = 1e-5
    decided: float = 0.9

    def __call__(self, rng: np.random.Generator) -> Any:
        with self.promotion():
            return self.make(rng)

    def promotion(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.promotes:
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        return stack


ZOO: dict[str, Model] = {}


def model(function=None, **settings):
    if function is None:
        return functools.partial(model, **settings)
    assert function.__name__ not in ZOO
    ZOO[function.__name__] = Model(function, **settings)
    return function
