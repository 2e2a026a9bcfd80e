"""Modules of Flax, Linen and NNX."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from tests.models.families._parts import flax_nnx, linen
from tests.zoo.blocks import ids, inputs


class _Bidirectional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(4)), nn.RNN(nn.GRUCell(4)))(x)
        x = nn.RNN(nn.MGUCell(3))(x)
        return nn.RNN(nn.SimpleCell(3))(x)


def linen_bidirectional_rnn(rng):
    return linen(rng, _Bidirectional(), inputs(rng, 2, 5, 3))


def linen_conv_lstm(rng):
    module = nn.RNN(nn.ConvLSTMCell(3, (3, 3)))
    return linen(rng, module, inputs(rng, 1, 3, 5, 5, 2))


class _Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = nn.MultiHeadAttention(2, normalize_qk=True)(nn.LayerNorm()(x))
                x = x + y
                return x + nn.Dense(8)(nn.silu(nn.Dense(16)(nn.RMSNorm()(x)))), None

        layers = nn.scan(
            nn.remat(Block), {"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers()(x, None)[0]


def linen_transformer_scanned_and_rematerialised(rng):
    return linen(rng, _Remat(), inputs(rng, 2, 5, 8))


class _Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Conv(4, (3, 3)))(x)
        x = nn.SpectralNorm(nn.Conv(4, (3, 3)))(x, update_stats=True)
        x = nn.InstanceNorm()(x)
        x = nn.BatchNorm(use_running_average=False)(nn.relu(x))
        x = nn.ConvLocal(3, (2, 2))(x)
        x = nn.DenseGeneral((2, 3), axis=(-3, -2, -1))(x)
        return nn.Einsum((2, 3, 4), "...ij,ijk->...k")(x)


def linen_norms_and_local_convolution(rng):
    return linen(rng, _Normalised(), inputs(rng, 2, 6, 6, 2))


class _Decoder(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(2)])
        self.up = nnx.LoRALinear(8, 16, lora_rank=2, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, tokens):
        x = self.table(tokens)
        mask = nnx.make_causal_mask(tokens)
        x = x + self.attention(self.norms[0](x), mask=mask)
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.table.attend(x)


def nnx_decoder_with_lora(rng):
    return flax_nnx(rng, _Decoder(nnx.Rngs(0)), lambda m, x: m(x), ids(rng, 11, 2, 6))


class _UNet(nnx.Module):
    def __init__(self, rngs):
        self.down = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.middle = nnx.Conv(
            4, 4, (3, 3), feature_group_count=2, kernel_dilation=2, rngs=rngs
        )
        self.group = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 3, (2, 2), strides=(2, 2), rngs=rngs)

    def __call__(self, x):
        down = nnx.relu(self.norm(self.down(x)))
        middle = nnx.swish(self.group(self.middle(down)))
        return self.up(jnp.concatenate([down, middle], -1))


def nnx_u_net(rng):
    return flax_nnx(rng, _UNet(nnx.Rngs(0)), lambda m, x: m(x), inputs(rng, 2, 8, 8, 2))


class _Seq2Seq(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.RNN(
            nnx.OptimizedLSTMCell(3, 5, rngs=rngs), return_carry=True
        )
        self.decoder = nnx.RNN(nnx.LSTMCell(2, 5, rngs=rngs))
        self.readout = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, pair):
        carry, _ = self.encoder(pair["x"])
        return self.readout(self.decoder(pair["y"], initial_carry=carry))


def nnx_seq2seq(rng):
    batch = {"x": inputs(rng, 2, 5, 3), "y": inputs(rng, 2, 4, 2)}
    return flax_nnx(rng, _Seq2Seq(nnx.Rngs(0)), lambda m, x: m(x), batch)


class _Vae(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(6, 8, rngs=rngs)
        self.mean, self.log_std = (nnx.Linear(8, 2, rngs=rngs) for _ in range(2))
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.decoder = nnx.Sequential(
            nnx.Linear(2, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 6, rngs=rngs)
        )

    def __call__(self, x, noise):
        h = self.dropout(nnx.relu(self.encoder(x)))
        mean, std = self.mean(h), jnp.exp(self.log_std(h))
        kl = jnp.sum(mean**2 + std**2 - 1 - 2 * jnp.log(std), -1) / 2
        return self.decoder(mean + std * noise), kl


def nnx_vae_with_dropout(rng):
    batch = (inputs(rng, 3, 6), inputs(rng, 3, 2))
    return flax_nnx(rng, _Vae(nnx.Rngs(0)), lambda m, x: m(*x), batch)
