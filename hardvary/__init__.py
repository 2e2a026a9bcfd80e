"""Gradient aggregation that asks environments to agree.

AND-masks as optax transformations, and the gradient oracles that feed them, after
*Learning explanations that are hard to vary* (Parascandolo et al., ICLR 2021).
"""

from hardvary import consistency, objectives
from hardvary._env_grads.oracles import (
    explain,
    grad_stats,
    per_env_grad,
    value_and_grad_stats,
    value_and_per_env_grad,
)
from hardvary._env_grads.statistics import GradStats, agreement
from hardvary.aggregators.and_mask import and_mask, xor_mask
from hardvary.aggregators.geometric_mean import geometric_mean
from hardvary.aggregators.masked import AggregatorState
from hardvary.aggregators.sand_mask import sand_mask
from hardvary.decay import add_l1_decay
from hardvary.fused.explain import Explanation, ParameterRule
from hardvary.temporal import (
    TemporalAndMaskState,
    temporal_and_mask,
    temporal_and_mask_adam,
)

__version__ = "0.1.0"

__all__ = [
    "AggregatorState",
    "Explanation",
    "GradStats",
    "ParameterRule",
    "TemporalAndMaskState",
    "add_l1_decay",
    "agreement",
    "and_mask",
    "consistency",
    "explain",
    "geometric_mean",
    "grad_stats",
    "objectives",
    "per_env_grad",
    "sand_mask",
    "temporal_and_mask",
    "temporal_and_mask_adam",
    "value_and_grad_stats",
    "value_and_per_env_grad",
    "xor_mask",
]
