"""ResNet-18 in Flax NNX, and its use through pure functions.

He, Zhang, Ren and Sun, `Deep residual learning for image recognition`, CVPR 2016: a
7x7 convolution and a maximum, both with stride 2; eight blocks of two 3x3 convolutions
in four stages, each twice as wide as the one before; the mean over all places; a linear
layer. On frames of 64x64 the stages see 16x16, 8x8, 4x4 and 2x2 places.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.common.maximum import larger
from experiments.common.networks import (
    Apply,
    Graph,
    TrainApply,
    Variables,
    apply_of,
    graph_of,
    train_apply_of,
    variables_of,
)

STAGES = 4
# As many as the last stage has of a frame.
FEW_PLACES = 4


class Architecture(NamedTuple):
    """The sizes and kinds that make up a network."""

    width: int = 64
    """Channels of the first stage; the last has eight times as many."""
    blocks: int = 2
    """Blocks in each stage; 2 makes ResNet-18."""
    outputs: int = 15
    momentum: float = 0.9
    """Share of the running statistics that a batch leaves as they were."""
    channels: int = 3


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, as a matrix product where it gives few places.

    XLA's convolutions on CPU take ten times as long there (2x2 places, 64 channels).

    Args:
      x: [batch, height, width, fan_in].
      kernel: [rows, columns, fan_in, fan_out].
      strides: of rows and of columns.
      padding: zeros before and after the rows and the columns.
      options: the convolution's others; where the product is taken, those of a layer
        without dilation or groups.

    Returns:
      [batch, height', width', fan_out].
    """
    rows, columns, fan_in, fan_out = kernel.shape
    padded = [
        size + sum(ends) for size, ends in zip(x.shape[1:3], padding, strict=True)
    ]
    height, width = (
        (size - extent) // stride + 1
        for size, extent, stride in zip(padded, (rows, columns), strides, strict=True)
    )
    if height * width > FEW_PLACES:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    down, right = strides
    seen = [
        x[
            :,
            row : row + down * (height - 1) + 1 : down,
            column : column + right * (width - 1) + 1 : right,
        ]
        for row in range(rows)
        for column in range(columns)
    ]
    flat = jnp.concatenate(seen, -1).reshape(-1, rows * columns * fan_in)
    product = flat @ kernel.reshape(-1, fan_out)
    return product.reshape(len(x), height, width, fan_out)


class ConvNorm(nnx.Module):
    """Square convolution without bias, and batch norm.

    Weights are drawn as torchvision does: normal, with variance 2 / fan-out.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        size: int,
        stride: int,
        momentum: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            fan_in,
            fan_out,
            (size, size),
            strides=stride,
            padding=size // 2,
            use_bias=False,
            conv_general_dilated=convolve,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(fan_out, momentum=momentum, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """[batch, height / stride, width / stride, fan_out]."""
        return self.norm(self.conv(x), use_running_average=not training)


class Block(nnx.Module):
    """Two 3x3 convolutions beside a shortcut, projected where the shape changes."""

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        stride: int,
        momentum: float,
        *,
        rngs: nnx.Rngs,
    ):
        layer = functools.partial(ConvNorm, momentum=momentum, rngs=rngs)
        self.first = layer(fan_in, fan_out, 3, stride)
        self.second = layer(fan_out, fan_out, 3, 1)
        projects = stride > 1 or fan_in != fan_out
        self.shortcut = layer(fan_in, fan_out, 1, stride) if projects else None

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """[batch, height / stride, width / stride, fan_out]."""
        y = self.second(nnx.relu(self.first(x, training)), training)
        if self.shortcut is not None:
            x = self.shortcut(x, training)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """The network, at any width (the paper's is 64) and depth."""

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
        width, blocks_in_stage, outputs, momentum, channels = architecture
        self.stem = ConvNorm(channels, width, 7, 2, momentum, rngs=rngs)
        blocks, fan_in = [], width
        for stage in range(STAGES):
            fan_out = width * 2**stage
            for index in range(blocks_in_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(fan_in, fan_out, stride, momentum, rngs=rngs))
                fan_in = fan_out
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(
            fan_in,
            outputs,
            kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, training: bool = False) -> jax.Array:
        """Logits [batch, output] for images uint8 [batch, height, width, channel].

        In training batch norm uses the statistics of the batch, otherwise the running
        ones.
        """
        x = images.astype(jnp.float32) / 255 - 0.5
        x = _max_pool(nnx.relu(self.stem(x, training)))
        for block in self.blocks:
            x = block(x, training)
        return self.head(x.mean((1, 2)))


def _max_pool(x: jax.Array) -> jax.Array:
    """3x3 maxima with stride 2 of [batch, height, width, channel] that are >= 0."""
    return _max_of_three(_max_of_three(x, 1), 2)


def _max_of_three(x: jax.Array, axis: int) -> jax.Array:
    """Maxima over every second place of an axis and its two neighbours."""
    places = (x.shape[axis] + 1) // 2

    def every_second(first: int) -> jax.Array:
        return jax.lax.slice_in_dim(
            padded, first, first + 2 * places - 1, stride=2, axis=axis
        )

    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 1)
    padded = jnp.pad(x, padding)
    # The middle one first: where all are 0 the padding is not what is taken.
    return larger(larger(every_second(1), every_second(0)), every_second(2))


def init_variables(key: jax.Array, architecture: Architecture) -> Variables:
    """Initial parameters and batch statistics."""
    return variables_of(ResNet(architecture, rngs=nnx.Rngs(key)))


def make_apply(architecture: Architecture) -> Apply:
    """The network in evaluation, as a pure function to logits."""
    return apply_of(_graph(architecture))


def make_train_apply(architecture: Architecture) -> TrainApply:
    """The network in training, as a pure function to logits and batch statistics."""
    return train_apply_of(_graph(architecture))


@functools.lru_cache(maxsize=16)
def _graph(architecture: Architecture) -> Graph:
    return graph_of(lambda rngs: ResNet(architecture, rngs=rngs))
