"""The expert's network in Flax NNX, and its use through pure functions.

The nature CNN (Mnih et al. 2015) with fewer channels: convolutions 8x8 with stride 4,
4x4 with stride 2 and 3x3, a dense layer, and two heads. XLA's convolutions are slow on
CPU, and their gradients slower. Here blocks of pixels become channels, which turns the
strides into plain 2x2 convolutions, and those are matrix products; examples come after
height and width, so that the shifted slices are long runs of memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.coinrun.game import NUM_ACTIONS

Params = Any

BLOCK = 4


class Architecture(NamedTuple):
    """The sizes that make up a network."""

    width: int = 16
    """Channels of the first convolution; the others have twice as many."""
    hidden: int = 256
    """Units of the dense layer."""


class Output(NamedTuple):
    """Of the network: `logits` float32 [n, action], `values` float32 [n]."""

    logits: jax.Array
    values: jax.Array


# Parameters and frames uint8 [n, 64, 64, 3] to the output.
Apply = Callable[[Params, jax.Array], Output]


def to_blocks(frames: jax.Array, block: int = BLOCK) -> jax.Array:
    """Frames uint8 [n, height, width, channel] as float32 in [0, 1], by blocks.

    Returns:
      [height / block, width / block, n, block * block * channel].
    """
    n, height, width, channels = frames.shape
    shape = (n, height // block, block, width // block, block, channels)
    blocks = frames.reshape(shape).transpose(1, 3, 0, 2, 4, 5)
    return blocks.reshape(*blocks.shape[:3], -1).astype(jnp.float32) / 255


def merge(x: jax.Array) -> jax.Array:
    """2x2 neighbours [2 h, 2 w, n, channel] as channels [h, w, n, 4 channel]."""
    parts = [x[row::2, column::2] for row in range(2) for column in range(2)]
    return jnp.concatenate(parts, axis=-1)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution with stride 1 and without padding, by matrix products.

    Args:
      x: [height, width, n, fan_in].
      kernel: [rows, columns, fan_in, fan_out].

    Returns:
      [height - rows + 1, width - columns + 1, n, fan_out].
    """
    rows, columns, fan_in, fan_out = kernel.shape
    height, width = x.shape[0] - rows + 1, x.shape[1] - columns + 1
    offsets = [(row, column) for row in range(rows) for column in range(columns)]
    if fan_in >= rows * fan_out:
        # One product for all offsets, then sums of shifted parts of its result.
        flat = kernel.transpose(2, 0, 1, 3).reshape(fan_in, -1)
        parts = _product(x, flat)
        shifted = [
            parts[row : row + height, column : column + width, :, start:stop]
            for index, (row, column) in enumerate(offsets)
            for start, stop in [(index * fan_out, (index + 1) * fan_out)]
        ]
    else:
        shifted = [
            _product(
                x[row : row + height, column : column + width], kernel[row, column]
            )
            for row, column in offsets
        ]
    return functools.reduce(jnp.add, shifted)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    # Of two matrices: XLA takes twice as long for more axes, with gradients.
    flat = x.reshape(-1, x.shape[-1]) @ matrix
    return flat.reshape(*x.shape[:-1], -1)


class Convolution(nnx.Module):
    """`convolve` with a bias and ReLU."""

    def __init__(self, size: int, fan_in: int, fan_out: int, *, rngs: nnx.Rngs):
        flat = (size * size * fan_in, fan_out)
        initial = nnx.initializers.orthogonal(math.sqrt(2))(rngs.params(), flat)
        self.kernel = nnx.Param(initial.reshape(size, size, fan_in, fan_out))
        self.bias = nnx.Param(jnp.zeros(fan_out))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[height, width, n, fan_in] to [height', width', n, fan_out]."""
        return nnx.relu(convolve(x, self.kernel[...]) + self.bias[...])


class ActorCritic(nnx.Module):
    """Policy and value of frames of 64x64 pixels."""

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
        width, hidden = architecture
        self.conv1 = Convolution(2, BLOCK * BLOCK * 3, width, rngs=rngs)
        self.conv2 = Convolution(2, 4 * width, 2 * width, rngs=rngs)
        self.conv3 = Convolution(3, 2 * width, 2 * width, rngs=rngs)
        self.dense = _linear(4 * 4 * 2 * width, hidden, math.sqrt(2), rngs)
        self.policy = _linear(hidden, NUM_ACTIONS, 0.01, rngs)
        self.value = _linear(hidden, 1, 1.0, rngs)

    def __call__(self, frames: jax.Array) -> Output:
        """Logits and values for frames uint8 [n, 64, 64, 3]."""
        x = self.conv1(to_blocks(frames))
        # As in the nature CNN, the second stride leaves out the last row and column.
        x = self.conv3(self.conv2(merge(x[:14, :14])))
        x = x.transpose(2, 0, 1, 3).reshape(len(frames), -1)
        x = nnx.relu(self.dense(x))
        return Output(self.policy(x), self.value(x)[:, 0])


def _linear(fan_in: int, fan_out: int, gain: float, rngs: nnx.Rngs) -> nnx.Linear:
    initial = nnx.initializers.orthogonal(gain)
    return nnx.Linear(fan_in, fan_out, kernel_init=initial, rngs=rngs)


def init_params(key: jax.Array, architecture: Architecture) -> Params:
    """Initial parameters."""
    return nnx.state(ActorCritic(architecture, rngs=nnx.Rngs(key)), nnx.Param)


def make_apply(architecture: Architecture) -> Apply:
    """The network as a pure function."""
    graph = _graph(architecture)

    def apply(params: Params, frames: jax.Array) -> Output:
        model: Any = nnx.merge(graph, params)
        return model(frames)

    return apply


@functools.lru_cache(maxsize=16)
def _graph(architecture: Architecture) -> Any:
    model = nnx.eval_shape(lambda: ActorCritic(architecture, rngs=nnx.Rngs(0)))
    return nnx.graphdef(model)
