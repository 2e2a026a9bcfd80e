"""FastResNet in Flax NNX, and its use through pure functions.

The nine-layer network of the authors' CIFAR-10 code (paper, section 3.2), from the
'fast CIFAR-10' line of work (Page 2018): 3x3 convolutions without bias, each followed
by a norm and ReLU; two residual blocks; a global maximum instead of an average; logits
times 0.125.
"""

from __future__ import annotations

import functools
import math
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
from experiments.vision.config import NUM_CLASSES, POOLING, Norm

# The axis of examples: batch norm takes its statistics over all of them together.
ENV_AXIS = "env"

LOGIT_SCALE = 0.125
GROUPS = 8
# Of ImageNet's red, green and blue, in units of the largest value.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Weight tensors in the order of the forward pass.
LAYERS = (
    "prep",
    "layer1",
    "residual1_0",
    "residual1_1",
    "layer2",
    "layer3",
    "residual3_0",
    "residual3_1",
    "head",
)
# All scales and offsets of norms together.
NORMS = "norms"


class Architecture(NamedTuple):
    """The sizes and kinds that make up a network."""

    channels: int
    """Of the images: 1 or 3."""
    width: int = 64
    norm: Norm = "batch"


def normalize(images: jax.Array) -> jax.Array:
    """Images uint8 [..., channel] as float32, by ImageNet's mean and std.

    The authors' script does so for CIFAR-10. Gray images take the average over the
    three channels of both numbers, 0.449 and 0.226.
    """
    mean, std = jnp.array(MEAN), jnp.array(STD)
    if images.shape[-1] == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    # One multiplication and one addition, written so that ranks agree.
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean, std = mean.reshape(shape), std.reshape(shape)
    return (images.astype(jnp.float32) / 255 - mean) / std


class Block(nnx.Module):
    """3x3 convolution without bias, norm, ReLU.

    Weights are drawn as PyTorch does, uniformly in +-1/sqrt(fan-in): behind a norm
    their scale is no matter for the output, but decides what a step of Adam's changes.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        norm: Norm,
        axis_name: str | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            fan_in,
            fan_out,
            (3, 3),
            padding=1,
            use_bias=False,
            kernel_init=_initializer(),
            rngs=rngs,
        )
        self.norm: nnx.BatchNorm | nnx.GroupNorm
        if norm == "batch":
            self.norm = nnx.BatchNorm(
                fan_out,
                momentum=0.9,
                epsilon=1e-5,
                axis_name=axis_name,
                rngs=rngs,
            )
        else:
            groups = math.gcd(GROUPS, fan_out)
            # The fast variance loses its digits where a group has few members.
            self.norm = nnx.GroupNorm(
                fan_out, groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs
            )

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """[batch, height, width, fan_out]."""
        x = self.conv(x)
        if isinstance(self.norm, nnx.BatchNorm):
            x = self.norm(x, use_running_average=not training)
        else:
            x = self.norm(x)
        return nnx.relu(x)


class FastResNet(nnx.Module):
    """The network, at any width (the paper's is 64).

    Args:
      architecture: what it depends on.
      axis_name: of the mapped axis of examples, over which batch norm takes its
        statistics, beside the batch that it is given; None without one.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        architecture: Architecture,
        axis_name: str | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        channels, width, norm = architecture

        def block(fan_in: int, fan_out: int) -> Block:
            return Block(fan_in, fan_out, norm, axis_name, rngs=rngs)

        self.prep = block(channels, width)
        self.layer1 = block(width, 2 * width)
        self.residual1 = nnx.List(block(2 * width, 2 * width) for _ in range(2))
        self.layer2 = block(2 * width, 4 * width)
        self.layer3 = block(4 * width, 8 * width)
        self.residual3 = nnx.List(block(8 * width, 8 * width) for _ in range(2))
        self.head = nnx.Linear(
            8 * width,
            NUM_CLASSES,
            use_bias=False,
            kernel_init=_initializer(),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, training: bool = False) -> jax.Array:
        """Logits [batch, class] for images uint8 [batch, height, width, channel].

        In training batch norm uses the statistics of the batch, otherwise the running
        ones.
        """
        require_poolable(images.shape[1:3])
        x = self.prep(normalize(images), training)
        x = _halve(self.layer1(x, training))
        first, second = self.residual1
        x = x + second(first(x, training), training)
        x = _halve(self.layer2(x, training))
        x = _halve(self.layer3(x, training))
        first, second = self.residual3
        x = x + second(first(x, training), training)
        places = jnp.unstack(x.reshape(len(x), -1, x.shape[-1]), axis=1)
        return LOGIT_SCALE * self.head(functools.reduce(larger, places))


def require_poolable(size: tuple[int, ...]) -> None:
    """Raises ValueError unless three poolings leave something of such images."""
    if min(size) < POOLING:
        raise ValueError(
            f"images must be at least {POOLING} x {POOLING} for three poolings, got "
            f"{' x '.join(map(str, size))}"
        )


def _initializer() -> Any:
    return nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _halve(x: jax.Array) -> jax.Array:
    """2x2 maxima of [batch, height, width, channel]; an odd last row is left out."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    # A tenth of the time of max_pool on CPU.
    rows = larger(x[:, 0:height:2], x[:, 1:height:2])
    return larger(rows[:, :, 0:width:2], rows[:, :, 1:width:2])


def init_variables(key: jax.Array, architecture: Architecture) -> Variables:
    """Initial parameters and batch statistics."""
    return variables_of(FastResNet(architecture, rngs=nnx.Rngs(key)))


def make_apply(architecture: Architecture) -> Apply:
    """The network in evaluation, as a pure function to logits."""
    return apply_of(_graph(architecture, None))


def make_train_apply(
    architecture: Architecture, axis_name: str | None = None
) -> TrainApply:
    """The network in training, as a pure function to logits and new batch statistics.

    With an `axis_name` it is to be called under a vmap over that axis.
    """
    return train_apply_of(_graph(architecture, axis_name))


@functools.lru_cache(maxsize=16)
def _graph(architecture: Architecture, axis_name: str | None) -> Graph:
    return graph_of(lambda rngs: FastResNet(architecture, axis_name, rngs=rngs))


def layer_of(path: tuple[Any, ...]) -> str:
    """The name in `LAYERS`, or `NORMS`, of a parameter with this path of keys."""
    keys = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    if "kernel" not in keys:
        return NORMS
    return "_".join(key for key in keys if key not in ("conv", "kernel", "value"))
