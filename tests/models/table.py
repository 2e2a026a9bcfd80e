"""The architectures, from released packages, in one table.

Importing this imports none of the packages: a family's module does, in a process of its
own for each architecture.
"""

import dataclasses
import importlib
import importlib.metadata
from typing import Any

from tests.zoo import Model

# Gates that are all but closed and biases in front of a norm leave less than the zoo's.
DECIDED = 0.75


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model of somebody else.

    Attributes:
      what: for a reader who doesn't know the package.
      settings: of `tests.zoo.Model`, where other than its own.
      double: whether in float64, where float32 rounds more than signs can bear.
    """

    what: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    double: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """What one package, or a few that go together, have.

    Attributes:
      packages: distributions, those first that readers know the models by.
      architectures: name of a function of the module `families.NAME` -> what it makes.
    """

    packages: tuple[str, ...]
    architectures: dict[str, Architecture]

    def versions(self) -> dict[str, str]:
        """Distribution -> installed version."""
        return {name: importlib.metadata.version(name) for name in self.packages}


FAMILIES = {
    "flax_nn": Family(
        ("flax",),
        {
            "linen_bidirectional_rnn": Architecture("LSTM, GRU, MGU and plain RNN"),
            "linen_conv_lstm": Architecture("convolutional LSTM"),
            "linen_transformer_scanned_and_rematerialised": Architecture(
                "transformer, `nn.scan` over `nn.remat`"
            ),
            "linen_norms_and_local_convolution": Architecture(
                "weight, spectral, instance and batch norm; local convolution"
            ),
            "nnx_decoder_with_lora": Architecture("decoder, LoRA, tied embedding"),
            "nnx_u_net": Architecture("U-Net"),
            "nnx_seq2seq": Architecture("LSTM encoder and decoder"),
            "nnx_vae_with_dropout": Architecture("VAE with dropout"),
        },
    ),
    "haiku_nets": Family(
        ("dm-haiku",),
        {
            "resnet_v1": Architecture("ResNet v1, batch norm in each environment"),
            "resnet_v2": Architecture("ResNet v2 with bottlenecks"),
            "mobilenet_v1": Architecture("MobileNet v1"),
            "vq_vae": Architecture("VQ-VAE"),
            "vq_vae_ema": Architecture("VQ-VAE, codes by moving averages"),
            "transformer": Architecture("transformer"),
            "deep_rnn": Architecture("LSTM, GRU and plain RNN in a scan"),
            "conv_lstm": Architecture("convolutional LSTM"),
        },
    ),
    "equinox_nn": Family(
        ("equinox",),
        {
            "mlp": Architecture("MLP"),
            "recurrent_cells": Architecture("GRU and LSTM cells in a scan"),
            "conv_net": Architecture("grouped, dilated, transposed convolutions"),
            "transformer": Architecture("tied transformer, rotary positions"),
            "weight_norm": Architecture("weight-normalised MLP"),
            "batch_and_spectral_norm": Architecture("spectral and batch norm"),
        },
    ),
    "keras_hub_backbones": Family(
        ("keras-hub", "keras"),
        {
            "bert": Architecture("BERT"),
            "llama": Architecture("Llama"),
            "mixtral": Architecture("Mixtral, a mixture of experts"),
            "vision_transformer": Architecture("ViT"),
            "lstm_and_gru": Architecture("Keras: bidirectional LSTM, GRU"),
            "separable_conv_net": Architecture("Keras: separable convolutions"),
        },
    ),
    "transformers_flax": Family(
        ("transformers", "flax"),
        {
            "bert": Architecture("BERT"),
            "gpt2": Architecture("GPT-2"),
            "clip": Architecture("CLIP"),
        },
    ),
    "equimo_vision": Family(
        ("equimo", "equinox"),
        {
            "vision_transformer": Architecture("ViT"),
            "conv_next": Architecture("ConvNeXt"),
            "mobilenet_v3": Architecture("MobileNet v3"),
            "mamba_like_linear_attention": Architecture("MLLA"),
        },
    ),
    "sequence_models": Family(
        ("mamba2-jax", "penzai", "spyx", "signax"),
        {
            "mamba2": Architecture("Mamba-2"),
            "penzai_gemma": Architecture("Penzai: Gemma, layers stacked"),
            "spiking_network": Architecture("Spyx: spiking neurons"),
            "deep_signature": Architecture("Signax: signatures of paths"),
        },
    ),
    "diffrax_solvers": Family(
        ("diffrax", "optimistix", "lineax"),
        {
            "neural_ode": Architecture("neural ODE"),
            "neural_ode_adaptive": Architecture("neural ODE, adaptive steps"),
            "neural_ode_direct": Architecture("neural ODE, `DirectAdjoint`"),
            "neural_ode_backsolve": Architecture("neural ODE, `BacksolveAdjoint`"),
            "neural_ode_stiff": Architecture("neural ODE, an implicit solver"),
            "neural_cde": Architecture("neural CDE"),
            "neural_sde": Architecture("neural SDE"),
            "deep_equilibrium": Architecture("Optimistix: deep equilibrium model"),
            "bilevel_least_squares": Architecture("Optimistix: nested least squares"),
            "linear_solve_layer": Architecture("Lineax: Cholesky and CG"),
        },
    ),
    "jraph_graphs": Family(
        ("jraph", "dm-haiku"),
        {
            "graph_network": Architecture("graph network with attention"),
            "interaction_network": Architecture("interaction network"),
            "graph_convolution": Architecture("graph convolution"),
            "graph_attention": Architecture("graph attention"),
            "deep_sets": Architecture("deep sets"),
        },
    ),
    "equivariant": Family(
        ("e3nn-jax", "nequix"),
        {
            "tensor_products": Architecture("e3nn: tensor products, gates"),
            "nequip": Architecture("Nequix: NequIP, energy and forces"),
        },
    ),
    "flowjax_flows": Family(
        ("flowjax", "paramax"),
        {
            "masked_autoregressive": Architecture("masked autoregressive flow"),
            "coupling_with_splines": Architecture("neural spline flow"),
            "block_neural_autoregressive": Architecture(
                "block neural flow", double=True
            ),
            "block_neural_autoregressive_inverted": Architecture(
                "block neural flow, inverted by bisection"
            ),
            "planar": Architecture("planar flow"),
            "triangular_spline": Architecture("triangular spline flow"),
        },
    ),
    "generative_models": Family(
        ("distrax", "surjectors"),
        {
            "distrax_spline_coupling": Architecture("Distrax: spline couplings"),
            "distrax_hidden_markov_model": Architecture("Distrax: HMM", double=True),
            "surjective_flow": Architecture("Surjectors: coupling and funnel"),
        },
    ),
    "numpyro_models": Family(
        ("numpyro", "flax"),
        {
            "variational_autoencoder": Architecture("VAE by `flax_module`"),
            "hierarchical_regression": Architecture("`AutoMultivariateNormal`"),
            "inverse_autoregressive_guide": Architecture("`AutoIAFNormal`"),
            "bayesian_network": Architecture("Bayesian network, `AutoNormal`"),
            "mixture_density": Architecture("mixture density"),
        },
    ),
    "scientific_models": Family(
        ("pdequinox", "jaxkan", "jax-md", "dynamax", "ott-jax", "tinygp", "jaxopt"),
        {
            "fourier_neural_operator": Architecture("PDEquinox: FNO"),
            "u_net_of_a_pde": Architecture("PDEquinox: U-Net"),
            "kolmogorov_arnold": Architecture("jaxKAN: KAN"),
            "behler_parrinello_potential": Architecture(
                "JAX MD: Behler-Parrinello, energy and forces", double=True
            ),
            "kalman_filter": Architecture("Dynamax: Kalman filter"),
            "sinkhorn_divergence_of_a_map": Architecture("OTT: Sinkhorn divergence"),
            "input_convex_network": Architecture("OTT: input-convex network"),
            "gaussian_process": Architecture("tinygp: Gaussian process"),
            "quadratic_program_layer": Architecture("JAXopt: a QP as a layer"),
            "ridge_by_lbfgs": Architecture("JAXopt: nested L-BFGS"),
        },
    ),
}


def build(family: str, name: str) -> Model:
    """The model; imports its package."""
    module = importlib.import_module(f"tests.models.families.{family}")
    settings = {"decided": DECIDED, **FAMILIES[family].architectures[name].settings}
    return Model(getattr(module, name), promotes=True, **settings)
