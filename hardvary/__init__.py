"""Gradient aggregation that asks environments to agree.

AND-masks as optax transformations, and the gradient oracles that feed them, after
*Learning explanations that are hard to vary* (Parascandolo et al., ICLR 2021).
"""

# First, so that a JAX that is too old is called that.
from hardvary import _compat  # noqa: F401  # isort: skip
from hardvary import consistency, objectives
from hardvary._env_grads.agreement import agreement, kept_fractions, mask
from hardvary._env_grads.disagreement import Disagreement, disagreement
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
from hardvary.aggregators.aligned_mtl import aligned_mtl
from hardvary.aggregators.and_mask import and_mask
from hardvary.aggregators.cagrad import cagrad
from hardvary.aggregators.clip_env_norms import clip_env_norms
from hardvary.aggregators.config import config
from hardvary.aggregators.disjoint_mean import disjoint_mean
from hardvary.aggregators.drop_disagreement import drop_disagreement
from hardvary.aggregators.dualproj import dualproj
from hardvary.aggregators.fairgrad import fairgrad
from hardvary.aggregators.geometric_mean import geometric_mean
from hardvary.aggregators.grad_drop import grad_drop
from hardvary.aggregators.grad_vac import grad_vac
from hardvary.aggregators.imtl_g import imtl_g
from hardvary.aggregators.majority_sign import majority_sign
from hardvary.aggregators.mgda import mgda
from hardvary.aggregators.nash_mtl import nash_mtl
from hardvary.aggregators.pcgrad import pcgrad
from hardvary.aggregators.relative_gauss_newton import relative_gauss_newton
from hardvary.aggregators.sand_mask import sand_mask
from hardvary.aggregators.soft_and_mask import soft_and_mask
from hardvary.aggregators.spectral_and_mask import spectral_and_mask
from hardvary.aggregators.upgrad import upgrad
from hardvary.aggregators.weighting import weighting
from hardvary.aggregators.whiten_inputs import WhitenInputsState, whiten_inputs
from hardvary.aggregators.xor_mask import xor_mask
from hardvary.decay import add_l1_decay
from hardvary.fused.explain import Explanation, ParameterRule
from hardvary.memory import largest_microbatch_size
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
    "Disagreement",
    "EnvGrad",
    "Explanation",
    "GradStats",
    "ParameterRule",
    "ScaleByTemporalAndMaskAdamState",
    "TemporalAndMaskState",
    "WhitenInputsState",
    "add_l1_decay",
    "aggregator",
    "agr_rand",
    "agreement",
    "aligned_mtl",
    "and_mask",
    "cagrad",
    "clip_env_norms",
    "combine",
    "config",
    "consistency",
    "disagreement",
    "disjoint_mean",
    "drop_disagreement",
    "dualproj",
    "env_grads",
    "explain",
    "fairgrad",
    "geometric_mean",
    "grad_drop",
    "grad_stats",
    "grad_vac",
    "gramian",
    "imtl_g",
    "kept_fractions",
    "largest_microbatch_size",
    "majority_sign",
    "mask",
    "mgda",
    "nash_mtl",
    "norms",
    "objectives",
    "pcgrad",
    "per_env_grad",
    "relative_gauss_newton",
    "sand_mask",
    "scale_by_temporal_and_mask_adam",
    "soft_and_mask",
    "spectral_and_mask",
    "temporal_and_mask",
    "temporal_and_mask_adam",
    "upgrad",
    "value_and_env_grads",
    "value_and_env_grads_of_losses",
    "value_and_grad_stats",
    "value_and_per_env_grad",
    "weighting",
    "whiten_inputs",
    "xor_mask",
]
