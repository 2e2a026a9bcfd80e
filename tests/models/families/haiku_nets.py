"""Haiku's own networks."""

import haiku as hk
import jax.numpy as jnp

from tests.models.families._parts import haiku
from tests.zoo.blocks import inputs


def _resnet(rng, blocks, channels, **settings):
    def predict(x):
        net = hk.nets.ResNet(
            blocks,
            5,
            channels_per_group=channels,
            strides=(1, 2, 1, 1),
            initial_conv_config={"kernel_shape": 3, "stride": 1},
            **settings,
        )
        return net(x, is_training=True)

    return haiku(rng, predict, inputs(rng, 3, 12, 12, 3))


def resnet_v1(rng):
    return _resnet(
        rng,
        (1, 1, 1, 1),
        (4, 6, 6, 4),
        bottleneck=False,
        use_projection=(True, True, False, True),
    )


def resnet_v2(rng):
    return _resnet(rng, (2, 1, 1, 1), (8, 8, 8, 8), resnet_v2=True)


def mobilenet_v1(rng):
    def predict(x):
        net = hk.nets.MobileNetV1(strides=(1, 2, 1), channels=(4, 8, 8), num_classes=3)
        return net(x, is_training=True)

    return haiku(rng, predict, inputs(rng, 2, 12, 12, 3))


def vq_vae(rng):
    def predict(x):
        encoded = hk.Conv2D(6, 3, stride=2)(x)
        quantized = hk.nets.VectorQuantizer(6, 8, commitment_cost=0.25)(
            encoded, is_training=True
        )
        decoded = hk.Conv2DTranspose(3, 3, stride=2)(quantized["quantize"])
        return decoded, quantized["loss"][None]

    return haiku(rng, predict, inputs(rng, 2, 8, 8, 3))


def vq_vae_ema(rng):
    def predict(x):
        encoded = hk.Conv2D(6, 3, stride=2)(x)
        quantized = hk.nets.VectorQuantizerEMA(6, 8, commitment_cost=0.25, decay=0.9)(
            encoded, is_training=True
        )
        decoded = hk.Conv2DTranspose(3, 3, stride=2)(quantized["quantize"])
        return decoded, quantized["loss"][None]

    return haiku(rng, predict, inputs(rng, 2, 8, 8, 3))


def transformer(rng):
    def predict(x):
        for _ in range(2):
            attention = hk.MultiHeadAttention(2, 4, w_init_scale=1.0, model_size=8)
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + attention(h, h, h)
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.nets.MLP((16, 8))(h)
        return x

    return haiku(rng, predict, inputs(rng, 2, 5, 8))


def deep_rnn(rng):
    def predict(x):
        core = hk.DeepRNN([hk.LSTM(5), jnp.tanh, hk.GRU(4), hk.VanillaRNN(3)])
        return hk.dynamic_unroll(core, x, core.initial_state(2))[0]

    return haiku(rng, predict, inputs(rng, 6, 2, 4))


def conv_lstm(rng):
    def predict(x):
        core = hk.Conv2DLSTM((5, 5), 3, 3)
        return hk.dynamic_unroll(core, x, core.initial_state(1))[0]

    return haiku(rng, predict, inputs(rng, 3, 1, 5, 5, 2))
