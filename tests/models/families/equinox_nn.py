"""Modules of `equinox.nn`."""

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.models.families._parts import equinox
from tests.zoo.blocks import ids, inputs


def mlp(rng):
    def make(key):
        return eqx.nn.MLP(5, 3, 16, 3, activation=jax.nn.gelu, key=key)

    return equinox(rng, make, lambda m, x: jax.vmap(m)(x), inputs(rng, 4, 5))


class _Cells(eqx.Module):
    gru: eqx.nn.GRUCell
    lstm: eqx.nn.LSTMCell
    readout: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.gru = eqx.nn.GRUCell(3, 6, key=one)
        self.lstm = eqx.nn.LSTMCell(6, 5, key=two)
        self.readout = eqx.nn.Linear(5, 2, key=three)

    def __call__(self, xs):
        def step(carry, x):
            h, state = carry
            h = self.gru(x, h)
            state = self.lstm(h, state)
            return (h, state), self.readout(state[0])

        zeros = jnp.zeros(5)
        return jax.lax.scan(step, (jnp.zeros(6), (zeros, zeros)), xs)[1]


def recurrent_cells(rng):
    return equinox(rng, _Cells, lambda m, x: m(x), inputs(rng, 7, 3))


class _ConvNet(eqx.Module):
    layers: eqx.nn.Sequential

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.layers = eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(3, 6, 3, padding=1, key=keys[0]),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.MaxPool2d(2, 2),
                eqx.nn.GroupNorm(2, 6),
                eqx.nn.Conv2d(
                    6, 8, 3, groups=2, dilation=2, padding="SAME", key=keys[1]
                ),
                eqx.nn.Lambda(jax.nn.silu),
                eqx.nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, key=keys[2]),
                eqx.nn.AdaptiveAvgPool2d((2, 2)),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.Linear(16, 3, key=keys[3]),
            ]
        )

    def __call__(self, x):
        return self.layers(x)


def conv_net(rng):
    return equinox(rng, _ConvNet, lambda m, x: jax.vmap(m)(x), inputs(rng, 2, 3, 8, 8))


class _Transformer(eqx.Module):
    table: eqx.nn.Embedding
    rope: eqx.nn.RotaryPositionalEmbedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.RMSNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.table = eqx.nn.Embedding(11, 8, key=one)
        self.rope = eqx.nn.RotaryPositionalEmbedding(4)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=two)
        self.norm = eqx.nn.RMSNorm(8)
        self.mlp = eqx.nn.MLP(8, 8, 16, 1, key=three)

    def __call__(self, tokens):
        x = jax.vmap(self.table)(tokens)
        h = jax.vmap(self.norm)(x)

        def turn(query, key, value):
            turned = jax.vmap(self.rope, in_axes=1, out_axes=1)
            return turned(query), turned(key), value

        x = x + self.attention(h, h, h, process_heads=turn)
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))
        return x @ self.table.weight.T


def transformer(rng):
    return equinox(rng, _Transformer, lambda m, x: jax.vmap(m)(x), ids(rng, 11, 2, 6))


def weight_norm(rng):
    def make(key):
        one, two = jax.random.split(key)
        return eqx.nn.Sequential(
            [
                eqx.nn.WeightNorm(eqx.nn.Linear(5, 8, key=one)),
                eqx.nn.Lambda(jnp.tanh),
                eqx.nn.WeightNorm(eqx.nn.Linear(8, 3, key=two)),
            ]
        )

    return equinox(rng, make, lambda m, x: jax.vmap(m)(x), inputs(rng, 4, 5))


def batch_and_spectral_norm(rng):
    one, two = jax.random.split(jax.random.key(1))

    def make(key):
        conv = eqx.nn.Conv2d(3, 4, 3, key=key)
        return eqx.nn.make_with_state(
            lambda: eqx.nn.Sequential(
                [
                    eqx.nn.SpectralNorm(conv, "weight", key=one),
                    eqx.nn.BatchNorm(4, "example", mode="batch"),
                    eqx.nn.Lambda(jnp.tanh),
                    eqx.nn.Lambda(jnp.ravel),
                    eqx.nn.Linear(64, 3, key=two),
                ]
            )
        )()

    _, state = make(jax.random.key(0))

    def call(module, x):
        run = jax.vmap(
            module, in_axes=(0, None), out_axes=(0, None), axis_name="example"
        )
        return run(x, state)[0]

    return equinox(rng, lambda key: make(key)[0], call, inputs(rng, 3, 3, 6, 6))
