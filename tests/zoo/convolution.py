"""Convolutions."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.blocks import (
    conv,
    inputs,
    mix,
    normal,
    pairs,
    per_channel,
    regression,
    weight,
)
from tests.zoo.model import model


def conv_case(rng, x_shape, kernel_shape, bias=True, one_more=True, **settings):
    """A convolution, tanh, and a 1x1 convolution on top."""
    rank = len(kernel_shape) - 2
    out = kernel_shape[-1]
    params = {"kernel": weight(rng, *kernel_shape)}
    if bias:
        params["bias"] = normal(rng, out)
    if one_more:
        params["top"] = weight(rng, *[1] * rank, out, 2)

    def forward(params, x):
        y = conv(x, params["kernel"], **settings)
        if bias:
            y = y + params["bias"].reshape(*[1] * (rank + 1), out)
        y = jnp.tanh(y)
        return conv(y, params["top"]) if one_more else y

    example = jax.ShapeDtypeStruct(x_shape, jnp.float32)
    top = mix(rng, jax.eval_shape(forward, params, example).shape)

    def loss_fn(params, batch):
        return top(forward(params, batch))

    return params, loss_fn, inputs(rng, *x_shape)


@model
def conv_1d(rng):
    return conv_case(rng, (3, 9, 2), (3, 2, 4))


@model
def conv_1d_causal_dilated(rng):
    return conv_case(rng, (2, 9, 2), (3, 2, 4), padding=[(4, 0)], rhs_dilation=(2,))


@model
def conv_2d_one_example(rng):
    return conv_case(rng, (1, 6, 5, 2), (3, 3, 2, 4))


@model
def conv_2d_several_examples(rng):
    return conv_case(rng, (3, 6, 5, 2), (3, 2, 2, 4))


@model
def conv_2d_valid_strides(rng):
    # Strides that leave a rest: rows at the edge that no window sees.
    return conv_case(rng, (2, 8, 7, 2), (3, 2, 2, 3), strides=(3, 2), padding="VALID")


@model
def conv_2d_same_strides(rng):
    return conv_case(rng, (2, 7, 6, 2), (3, 3, 2, 3), strides=(2, 2))


@model
def conv_2d_explicit_padding(rng):
    return conv_case(
        rng, (2, 5, 5, 2), (3, 3, 2, 3), strides=(2, 1), padding=[(2, 0), (1, 3)]
    )


@model
def conv_2d_negative_padding(rng):
    return conv_case(rng, (2, 6, 6, 2), (2, 2, 2, 3), padding=[(-1, 0), (1, -2)])


@model
def conv_2d_rhs_dilation(rng):
    return conv_case(rng, (2, 8, 7, 2), (3, 2, 2, 3), rhs_dilation=(2, 3))


@model
def conv_2d_dilation_and_strides(rng):
    return conv_case(
        rng,
        (2, 9, 8, 2),
        (2, 3, 2, 3),
        strides=(2, 3),
        rhs_dilation=(3, 2),
        padding=[(1, 2), (2, 2)],
    )


@model
def conv_2d_lhs_dilation(rng):
    return conv_case(
        rng, (2, 4, 3, 2), (3, 3, 2, 3), lhs_dilation=(2, 3), padding=[(1, 2), (2, 1)]
    )


@model
def conv_2d_every_dilation(rng):
    return conv_case(
        rng,
        (2, 5, 4, 4),
        (2, 3, 2, 4),
        strides=(2, 1),
        lhs_dilation=(2, 2),
        rhs_dilation=(1, 2),
        padding=[(3, 1), (2, 2)],
        feature_group_count=2,
    )


@model
def conv_2d_groups(rng):
    return conv_case(rng, (2, 5, 5, 4), (3, 3, 2, 6), feature_group_count=2)


@model
def conv_2d_depthwise(rng):
    return conv_case(rng, (2, 5, 5, 3), (3, 3, 1, 3), feature_group_count=3)


@model
def conv_2d_depthwise_multiplier(rng):
    return conv_case(
        rng, (1, 5, 5, 3), (3, 3, 1, 6), strides=(2, 2), feature_group_count=3
    )


@model
def conv_2d_pointwise(rng):
    return conv_case(rng, (2, 4, 3, 5), (1, 1, 5, 3))


@model
def conv_2d_kernel_covers_the_input(rng):
    # One output position: a dense layer in disguise.
    return conv_case(rng, (1, 4, 3, 2), (4, 3, 2, 5), padding="VALID")


@model
def conv_2d_batch_groups(rng):
    return conv_case(rng, (4, 5, 5, 2), (3, 3, 2, 4), batch_group_count=2)


@model
def conv_2d_single_channel(rng):
    return conv_case(rng, (2, 5, 5, 1), (3, 3, 1, 1), bias=False)


@model
def conv_3d(rng):
    return conv_case(
        rng, (1, 4, 3, 4, 2), (2, 2, 3, 2, 3), strides=(2, 1, 1), padding="SAME"
    )


@model
def conv_2d_nchw(rng):
    params = {"one": weight(rng, 4, 2, 3, 3, fan_in=18), "b": normal(rng, 4)}

    def predict(p, x):
        y = lax.conv_general_dilated(
            x, p["one"], (1, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        return y + p["b"].reshape(1, 4, 1, 1)

    return params, regression(predict), pairs(rng, (2, 2, 5, 6), (2, 4, 5, 3))


@model
def conv_2d_mixed_layouts(rng):
    params = {"one": weight(rng, 2, 3, 4, 3, fan_in=18)}

    def predict(p, x):
        return lax.conv_general_dilated(
            x, p["one"], (1, 1), "VALID", dimension_numbers=("CWNH", "IWOH", "HNWC")
        )

    # x: channels 2, width 6, batch 3, height 5; kernel 3 by 3.
    return params, regression(predict), pairs(rng, (2, 6, 3, 5), (3, 3, 4, 4))


@model
def conv_transpose(rng):
    params = {"one": weight(rng, 3, 3, 2, 4), "two": weight(rng, 2, 2, 3, 4)}

    def predict(p, x):
        y = lax.conv_transpose(x, p["one"], (2, 2), "SAME")
        return lax.conv_transpose(
            jnp.tanh(y), p["two"], (1, 2), "VALID", transpose_kernel=True
        )

    return params, regression(predict), pairs(rng, (2, 3, 3, 2), (2, 7, 12, 3))


@model
def conv_with_a_flipped_kernel(rng):
    params = {"k": weight(rng, 3, 3, 2, 3)}

    def predict(p, x):
        return conv(x, jnp.flip(p["k"], axis=(0, 1)), padding="VALID")

    return params, regression(predict), pairs(rng, (2, 5, 5, 2), (2, 3, 3, 3))


@model
def conv_one_image_under_vmap(rng):
    params = {"k": weight(rng, 3, 3, 2, 3)}

    def predict(p, x):
        return jax.vmap(lambda image: conv(image[None], p["k"])[0])(x)

    return params, regression(predict), pairs(rng, (3, 4, 4, 2), (3, 4, 4, 3))


@model
def conv_of_patches(rng):
    # A convolution with a constant kernel, then a dense layer.
    params = {"w": weight(rng, 8, 3)}

    def predict(p, x):
        patches = lax.conv_general_dilated_patches(
            x, (2, 2), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return patches @ p["w"]

    return params, regression(predict), pairs(rng, (2, 4, 4, 2), (2, 3, 3, 3))


@model
def conv_numpy_convolve(rng):
    params = {"k": normal(rng, 3)}

    def predict(p, x):
        return jnp.convolve(x, p["k"], mode="full")

    return params, regression(predict), pairs(rng, (6,), (8,))


@model
def conv_net_with_max_pool(rng):
    params = {
        "conv": weight(rng, 3, 3, 2, 4),
        "bias": normal(rng, 4),
        "dense": weight(rng, 16, 3),
    }

    def predict(p, x):
        y = jax.nn.relu(conv(x, p["conv"]) + per_channel(p["bias"]))
        y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return y.reshape(len(y), -1) @ p["dense"]

    return params, regression(predict), pairs(rng, (2, 4, 4, 2), (2, 3))


@model
def conv_residual_block(rng):
    params = {
        "one": weight(rng, 3, 3, 2, 2),
        "two": weight(rng, 3, 3, 2, 2),
        "alpha": jnp.float32(0.7),
    }

    def predict(p, x):
        y = conv(jax.nn.relu(conv(x, p["one"])), p["two"])
        return jnp.mean(jax.nn.relu(x + p["alpha"] * y), axis=(1, 2))

    return params, regression(predict), pairs(rng, (2, 5, 5, 2), (2, 2))
