"""Vision models of Equimo, on Equinox."""

import jax
from equimo.models import convnext, mlla, mobilenet, vit

from tests.models.families._parts import KEY, equinox
from tests.zoo.blocks import inputs


def _vision(rng, make, channels, side):
    def call(module, images):
        return jax.vmap(lambda x: module(x, key=KEY, inference=True))(images)

    return equinox(rng, make, call, inputs(rng, 2, channels, side, side))


def vision_transformer(rng):
    def make(key):
        return vit.VisionTransformer(
            8, 3, 8, 4, 2, [1], num_classes=3, mlp_ratio=2.0, key=key
        )

    return _vision(rng, make, 3, 8)


def conv_next(rng):
    def make(key):
        return convnext.ConvNeXt(
            3,
            depths=[1, 1],
            dims=[4, 6],
            num_classes=3,
            key=key,
            layer_scale_init_value=0.5,
        )

    return _vision(rng, make, 3, 16)


def mobilenet_v3(rng):
    def make(key):
        # Three channels in a group of GroupNorm: of one alone, pooling leaves the bias.
        layers = [[6, 12, 3, 2, True, "relu"], [6, 12, 5, 1, True, "hard_swish"]]
        return mobilenet.MobileNetv3(3, layers, last_channels=6, num_classes=3, key=key)

    return _vision(rng, make, 3, 16)


def mamba_like_linear_attention(rng):
    def make(key):
        return mlla.Mlla(
            16,
            3,
            dim=8,
            depths=[1],
            num_heads=[2],
            num_classes=3,
            mlp_ratio=2.0,
            key=key,
        )

    return _vision(rng, make, 3, 16)
