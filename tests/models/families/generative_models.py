"""Distributions and flows of Distrax and Surjectors."""

import distrax
import haiku as hk
import jax.numpy as jnp
import surjectors
from surjectors.nn import MADE, make_mlp

from tests.models.families._parts import haiku
from tests.zoo.blocks import inputs


def distrax_spline_coupling(rng):
    def predict(x):
        def conditioner(x):
            out = hk.nets.MLP((8, 3 * 13))(x)
            return out.reshape(*x.shape, 13)

        def spline(params):
            return distrax.RationalQuadraticSpline(params, -3.0, 3.0)

        layers = [
            distrax.MaskedCoupling(jnp.arange(3) % 2 == parity, conditioner, spline)
            for parity in (0, 1)
        ]
        base = distrax.MultivariateNormalDiag(jnp.zeros(3), jnp.ones(3))
        flow = distrax.Transformed(base, distrax.Inverse(distrax.Chain(layers)))
        return flow.log_prob(x)

    return haiku(rng, predict, inputs(rng, 2, 3))


def distrax_hidden_markov_model(rng):
    def predict(x):
        def parameter(name, *shape):
            init = hk.initializers.RandomNormal()
            return hk.get_parameter(name, shape, init=init)

        model = distrax.HMM(
            distrax.Categorical(parameter("start", 3)),
            distrax.Categorical(parameter("transition", 3, 3)),
            distrax.Normal(parameter("mean", 3), jnp.exp(parameter("log_std", 3))),
        )
        return model.forward(x)[1][None]

    return haiku(rng, predict, inputs(rng, 6))


def surjective_flow(rng):
    def predict(x):
        def conditioner(size):
            return make_mlp((8, size))

        def bijector(params):
            shift, log_scale = jnp.split(params, 2, -1)
            return surjectors.ScalarAffine(shift, jnp.exp(log_scale))

        def decoder(z):
            mean, log_std = jnp.split(make_mlp((8, 2))(z), 2, -1)
            return distrax.Independent(distrax.Normal(mean, jnp.exp(log_std)), 1)

        flow = surjectors.Chain(
            [
                surjectors.MaskedCoupling(
                    jnp.arange(4) % 2 == 0, conditioner(8), bijector_fn=bijector
                ),
                surjectors.AffineMaskedAutoregressiveInferenceFunnel(
                    3, decoder, MADE(3, (8,), 2)
                ),
            ]
        )
        base = distrax.Independent(distrax.Normal(jnp.zeros(3), 1.0), 1)
        return surjectors.TransformedDistribution(base, flow).log_prob(x)

    return haiku(rng, predict, inputs(rng, 2, 4))
