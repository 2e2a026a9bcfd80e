"""Objectives of NumPyro: ELBOs, densities, flows as guides."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.module import flax_module, random_flax_module
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO, autoguide
from numpyro.infer.util import log_density

from tests.models.families._parts import KEY, case, stir
from tests.zoo.blocks import inputs


def _elbo(rng, model, guide, objective, batch):
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), objective)
    example = jax.tree.map(lambda leaf: leaf[0], batch)
    state = svi.init(KEY, example)
    params = svi.optim.get_params(state.optim_state)

    def predict(params, x):
        return svi.loss.loss(KEY, svi.constrain_fn(params), svi.model, svi.guide, x)[
            None
        ]

    return case(rng, predict, stir(rng, params), batch)


class _Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.softplus(nn.Dense(8)(x))
        return nn.Dense(2)(h), jnp.exp(nn.Dense(2)(h))


class _Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(5)(nn.softplus(nn.Dense(8)(z)))


def variational_autoencoder(rng):
    def model(x):
        decode = flax_module("decoder", _Decoder(), input_shape=(3, 2))
        with numpyro.plate("row", 3):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(decode(z), 0.5).to_event(1), obs=x)

    def guide(x):
        encode = flax_module("encoder", _Encoder(), input_shape=(3, 5))
        mean, scale = encode(x)
        with numpyro.plate("row", 3):
            numpyro.sample("z", dist.Normal(mean, scale).to_event(1))

    return _elbo(rng, model, guide, TraceMeanField_ELBO(), inputs(rng, 3, 5))


def _regression(x):
    """Hierarchical: a slope for each of three groups, around a common one."""
    common = numpyro.sample("common", dist.Normal(0, 1))
    spread = numpyro.sample("spread", dist.LogNormal(0, 1))
    with numpyro.plate("group", 3):
        slopes = numpyro.sample("slopes", dist.Normal(common, spread))
    mean = x[:, :3] @ slopes
    numpyro.sample("y", dist.StudentT(4.0, mean, 0.5), obs=x[:, 3])


def hierarchical_regression(rng):
    guide = autoguide.AutoMultivariateNormal(_regression)
    return _elbo(rng, _regression, guide, Trace_ELBO(), inputs(rng, 5, 4))


def inverse_autoregressive_guide(rng):
    guide = autoguide.AutoIAFNormal(_regression, hidden_dims=[8])
    return _elbo(rng, _regression, guide, Trace_ELBO(), inputs(rng, 5, 4))


def bayesian_network(rng):
    def model(x):
        net = random_flax_module(
            "net", _Decoder(), prior=dist.Normal(), input_shape=(3, 2)
        )
        with numpyro.plate("row", 3):
            target = dist.Normal(net(x[:, :2]), 1.0).to_event(1)
            numpyro.sample("y", target, obs=x[:, 2:])

    guide = autoguide.AutoNormal(model)
    return _elbo(rng, model, guide, Trace_ELBO(), inputs(rng, 3, 7))


def mixture_density(rng):
    """The log density of a mixture whose components are summed out."""

    def model(x):
        shares = numpyro.param("shares", jnp.ones(3) / 3)
        means = numpyro.param("means", jnp.zeros((3, 2)))
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=shares), dist.Normal(means, 0.7).to_event(1)
        )
        with numpyro.plate("row", 4):
            numpyro.sample("x", mixture, obs=x)

    params = {"shares": jnp.zeros(3), "means": jnp.ones((3, 2))}

    def predict(params, x):
        seeded = numpyro.handlers.substitute(model, data=params)
        return log_density(seeded, (x,), {}, {})[0][None]

    return case(rng, predict, stir(rng, params, 0.5), inputs(rng, 4, 2))
