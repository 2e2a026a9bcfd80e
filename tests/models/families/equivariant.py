"""Networks that turn with their inputs: e3nn-jax and Nequix."""

import e3nn_jax as e3nn
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from nequix.model import Nequix

from tests.models.families._parts import equinox, linen
from tests.zoo.blocks import NUM_ENVS, ids, inputs

ATOMS, EDGES = 4, 8


class _TensorProducts(nn.Module):
    @nn.compact
    def __call__(self, x):
        harmonics = e3nn.spherical_harmonics("0e + 1o + 2e", x, True)
        features = e3nn.flax.Linear("4x0e + 2x1o")(harmonics)
        for _ in range(2):
            product = e3nn.tensor_product(features, harmonics)
            features = e3nn.flax.Linear("4x0e + 2x0e + 2x1o")(product)
            features = e3nn.gate(features)
        weights = e3nn.flax.MultiLayerPerceptron((6, 4), jax.nn.silu)(
            jnp.linalg.norm(x, axis=-1, keepdims=True)
        )
        return e3nn.flax.Linear("2x0e + 1o")(features).array, weights


def tensor_products(rng):
    return linen(rng, _TensorProducts(), inputs(rng, ATOMS, 3))


def nequip(rng):
    def make(key):
        return Nequix(
            key,
            3,
            lmax=1,
            hidden_irreps="4x0e + 4x1o",
            n_layers=2,
            radial_mlp_size=6,
            radial_mlp_layers=1,
        )

    def call(model, molecule):
        def energy(displacements):
            return model.node_energies(
                displacements, molecule["species"], molecule["i"], molecule["j"]
            ).sum()

        value, slopes = jax.value_and_grad(energy)(molecule["displacements"])
        forces = jax.ops.segment_sum(slopes, molecule["i"], ATOMS)
        return value[None], forces

    def ends():
        return jax.device_put(rng.integers(0, ATOMS, (NUM_ENVS, EDGES), np.int32))

    batch = {
        "displacements": inputs(rng, EDGES, 3),
        "species": ids(rng, 3, ATOMS),
        "i": ends(),
        "j": ends(),
    }
    return equinox(rng, make, call, batch)
