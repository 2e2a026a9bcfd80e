"""Sequence models of smaller packages: Mamba2, Penzai's transformers, Spyx, Signax."""

import equinox as eqx
import jax
import jax.numpy as jnp
import signax
import spyx
from flax import nnx
from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from penzai import pz
from penzai.models.transformer.variants import llamalike_common

from tests.models.families._parts import KEY, case, equinox, flax_nnx, stir
from tests.zoo.blocks import ids, inputs


def mamba2(rng):
    config = Mamba2Config(
        vocab_size=13,
        hidden_size=8,
        state_size=4,
        head_dim=4,
        chunk_size=4,
        num_hidden_layers=1,
    )
    module = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    return flax_nnx(rng, module, lambda m, x: m(x)["logits"], ids(rng, 13, 2, 8))


def penzai_gemma(rng):
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=1,
        query_head_multiplier=2,
        embedding_dim=8,
        projection_dim=4,
        mlp_hidden_dim=12,
        num_decoder_blocks=2,
        vocab_size=13,
        mlp_variant="geglu_approx",
        tie_embedder_and_logits=True,
        final_logit_softcap=30.0,
        use_layer_stack=True,
    )
    model = llamalike_common.build_llamalike_transformer(config, KEY)
    bare, variables = pz.unbind_params(model, freeze=True)
    params = {variable.label: variable.value for variable in variables}

    def predict(params, tokens):
        frozen = [
            pz.ParameterValue(label=label, value=value, metadata={})
            for label, value in params.items()
        ]
        bound = pz.bind_variables(bare, frozen)
        out = bound(pz.nx.wrap(tokens).tag("batch", "seq"))
        return out.untag("batch", "seq", "vocabulary").unwrap()

    return case(rng, predict, stir(rng, params), ids(rng, 13, 2, 5))


class _Spiking(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(3, 6, rngs=rngs)
        self.spiking = spyx.nn.LIF((6,), rngs=rngs)
        self.down = nnx.Linear(6, 2, rngs=rngs)
        self.readout = spyx.nn.LI((2,), rngs=rngs)

    def __call__(self, xs):
        def step(carry, x):
            one, two = carry
            spikes, one = self.spiking(self.up(x), one)
            out, two = self.readout(self.down(spikes), two)
            return (one, two), out

        start = jnp.zeros((2, 6)), jnp.zeros((2, 2))
        return jax.lax.scan(step, start, xs)[1]


def spiking_network(rng):
    return flax_nnx(
        rng, _Spiking(nnx.Rngs(0)), lambda m, x: m(x), 3 * inputs(rng, 6, 2, 3)
    )


class _DeepSignature(eqx.Module):
    augment: eqx.nn.Conv1d
    readout: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.augment = eqx.nn.Conv1d(2, 3, 2, key=one)
        self.readout = eqx.nn.Linear(3 + 9, 2, key=two)

    def __call__(self, path):
        return self.readout(signax.signature(self.augment(path.T).T, 2))


def deep_signature(rng):
    return equinox(rng, _DeepSignature, lambda m, x: m(x), inputs(rng, 6, 2))
