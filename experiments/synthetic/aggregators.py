"""The rules that turn the gradients of environments into one, by the method's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import hardvary
from experiments.synthetic.config import Method, TrainConfig

Make = Callable[[TrainConfig, jax.Array], optax.GradientTransformationExtraArgs]


class Aggregator(NamedTuple):
    """How a method aggregates.

    Attributes:
      make: from a config and a random key to the transformation, first in a chain.
      stats: the statistics that it reads, names as in `hardvary.grad_stats`; none for a
        rule by inner products, which reads the gradients themselves.
    """

    make: Make
    stats: tuple[Any, ...] = ()


def _mask(rule: Callable[..., Any], *stats: Any) -> Aggregator:
    return Aggregator(
        lambda c, _: rule(c.threshold, rescale=c.rescale, max_rescale=c.max_rescale),
        ("mean", "sign", *stats),
    )


def _sand_mask(c: TrainConfig, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    del key
    return hardvary.sand_mask(
        c.threshold, c.sharpness, rescale=c.rescale, max_rescale=c.max_rescale
    )


AGGREGATE: dict[Method, Aggregator] = {
    "and_mask": _mask(hardvary.and_mask),
    "geometric_mean": _mask(hardvary.geometric_mean, "log_abs"),
    "sand_mask": Aggregator(_sand_mask, ("mean", "sign", "square")),
    "soft_and_mask": _mask(hardvary.soft_and_mask),
    "grad_drop": Aggregator(lambda _, key: hardvary.grad_drop(key), ("mean", "abs")),
    "disjoint_mean": Aggregator(
        lambda *_: hardvary.disjoint_mean(), ("mean", "sign", "abs", "nonzero")
    ),
    "majority_sign": Aggregator(lambda *_: hardvary.majority_sign(), ("sign",)),
    "agr_rand": Aggregator(lambda _, key: hardvary.agr_rand(key), ("mean", "sign")),
    "upgrad": Aggregator(lambda *_: hardvary.upgrad()),
    "dualproj": Aggregator(lambda *_: hardvary.dualproj()),
    "mgda": Aggregator(lambda *_: hardvary.mgda()),
    "cagrad": Aggregator(lambda c, _: hardvary.cagrad(c.cagrad_c)),
    "nash_mtl": Aggregator(lambda *_: hardvary.nash_mtl()),
    "fairgrad": Aggregator(lambda c, _: hardvary.fairgrad(c.fairgrad_alpha)),
    "imtl_g": Aggregator(lambda *_: hardvary.imtl_g()),
    "aligned_mtl": Aggregator(lambda *_: hardvary.aligned_mtl()),
    "config": Aggregator(lambda *_: hardvary.config()),
    "pcgrad": Aggregator(lambda _, key: hardvary.pcgrad(key)),
    "grad_vac": Aggregator(
        lambda c, key: hardvary.grad_vac(key, num_envs=c.num_envs, beta=c.grad_vac_beta)
    ),
    "clip_env_norms": Aggregator(lambda c, _: hardvary.clip_env_norms(c.max_norm)),
}
