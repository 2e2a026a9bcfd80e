"""Normalizing flows of FlowJAX."""

import equinox as eqx
import flowjax.bijections as bijections
import flowjax.flows as flows
import jax.numpy as jnp
import paramax
from flowjax.distributions import Normal

from tests.models.families._parts import KEY, case, stir
from tests.zoo.blocks import inputs

SIZE = 3


def _density(rng, make, scale=0.05, **settings):
    def build(key):
        return make(
            key, base_dist=Normal(jnp.zeros(SIZE)), **{"flow_layers": 2, **settings}
        )

    params, static = eqx.partition(
        build(KEY),
        eqx.is_inexact_array,
        is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
    )

    def predict(params, x):
        flow = paramax.unwrap(eqx.combine(params, static))
        return flow.log_prob(x)

    return case(rng, predict, stir(rng, params, scale), inputs(rng, 2, SIZE))


def masked_autoregressive(rng):
    return _density(rng, flows.masked_autoregressive_flow, nn_width=8)


def coupling_with_splines(rng):
    transformer = bijections.RationalQuadraticSpline(knots=4, interval=4)
    return _density(rng, flows.coupling_flow, nn_width=8, transformer=transformer)


def block_neural_autoregressive(rng):
    return _density(
        rng,
        flows.block_neural_autoregressive_flow,
        nn_block_dim=3,
        flow_layers=1,
        invert=False,
    )


def block_neural_autoregressive_inverted(rng):
    return _density(
        rng, flows.block_neural_autoregressive_flow, nn_block_dim=3, flow_layers=1
    )


def planar(rng):
    return _density(rng, flows.planar_flow, width_size=6, depth=1, negative_slope=0.1)


def triangular_spline(rng):
    return _density(rng, flows.triangular_spline_flow, knots=4)
