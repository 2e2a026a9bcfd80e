"""Gradient aggregation that asks environments to agree.

AND-masks as optax transformations, and the gradient oracles that feed them, after
*Learning explanations that are hard to vary* (Parascandolo et al., ICLR 2021).
"""

from hardvary import consistency, objectives
from hardvary._env_grads.agreement import agreement, kept_fractions, mask
from hardvary._env_grads.env_grad import EnvGrad, env_grads, value_and_env_grads
from hardvary._env_grads.explain import explain
from hardvary._env_grads.grad_stats import (
    GradStats,
    grad_stats,
    value_and_grad_stats,
)
from hardvary._env_grads.losses import value_and_env_grads_of_losses
from hardvary._env_grads.products import combine, gramian, norms
from hardvary._env_grads.stacked import per_env_grad, value_and_per_env_grad
from hardvary.aggregators.aggregator import AggregatorState, aggregator
from hardvary.aggregators.agr_rand import agr_rand
from hardvary.aggregators.and_mask import and_mask
from hardvary.aggregators.disjoint_mean import disjoint_mean
from hardvary.aggregators.geometric_mean import geometric_mean
from hardvary.aggregators.grad_drop import grad_drop
from hardvary.aggregators.majority_sign import majority_sign
from hardvary.aggregators.sand_mask import sand_mask
from hardvary.aggregators.soft_and_mask import soft_and_mask
from hardvary.aggregators.weighting import weighting
from hardvary.aggregators.xor_mask import xor_mask
from hardvary.decay import add_l1_decay
from hardvary.fused.explain import Explanation, ParameterRule
from hardvary.temporal import (
    ScaleByTemporalAndMaskAdamState,
    TemporalAndMaskState,
    scale_by_temporal_and_mask_adam,
    temporal_and_mask,
    temporal_and_mask_adam,
)

__version__ = "0.1.0"

__all__ = [
    "AggregatorState",
    "EnvGrad",
    "Explanation",
    "GradStats",
    "ParameterRule",
    "ScaleByTemporalAndMaskAdamState",
    "TemporalAndMaskState",
    "add_l1_decay",
    "aggregator",
    "agr_rand",
    "agreement",
    "and_mask",
    "combine",
    "consistency",
    "disjoint_mean",
    "env_grads",
    "explain",
    "geometric_mean",
    "grad_drop",
    "grad_stats",
    "gramian",
    "kept_fractions",
    "majority_sign",
    "mask",
    "norms",
    "objectives",
    "per_env_grad",
    "sand_mask",
    "scale_by_temporal_and_mask_adam",
    "soft_and_mask",
    "temporal_and_mask",
    "temporal_and_mask_adam",
    "value_and_env_grads",
    "value_and_env_grads_of_losses",
    "value_and_grad_stats",
    "value_and_per_env_grad",
    "weighting",
    "xor_mask",
]
