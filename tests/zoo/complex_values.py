"""Complex numbers between real parameters and a real loss."""

import jax.numpy as jnp
from jax import lax

from tests.zoo.blocks import normal, pairs, regression, weight
from tests.zoo.model import model


@model
def complex_intermediate(rng):
    params = {
        "real": weight(rng, 4, 3),
        "imag": weight(rng, 4, 3),
        "phase": normal(rng, 3),
    }

    def predict(p, x):
        y = lax.complex(x, jnp.flip(x, -1)) @ lax.complex(p["real"], p["imag"])
        y = y * jnp.exp(1j * lax.complex(p["phase"], jnp.zeros(3)))[None]
        return jnp.abs(y) + jnp.real(y)

    return params, regression(predict), pairs(rng, (2, 4), (2, 3))


@model
def fourier_layer(rng):
    params = {"real": normal(rng, 5), "imag": normal(rng, 5), "w": normal(rng, 8)}

    def predict(p, x):
        y = jnp.fft.rfft(x * p["w"]) * lax.complex(p["real"], p["imag"])
        return jnp.tanh(jnp.fft.irfft(y, 8))

    return params, regression(predict), pairs(rng, (8,), (8,))
