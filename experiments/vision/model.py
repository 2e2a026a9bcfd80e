"""FastResNet in Flax NNX, and its use through pure functions.

The nine-layer network of the authors' CIFAR-10 code (paper, section 3.2), from the
'fast CIFAR-10' line of work (Page 2018): 3x3 convolutions without bias, each followed
by a norm and ReLU; two residual blocks; a global maximum instead of an average; logits
times 0.125.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.common.maximum import larger
from experiments.vision.config import NUM_CLASSES, POOLING, Norm

Params = Any
BatchStats = Any

# The axis of examples: batch norm takes its statistics over all of them together.
ENV_AXIS = "env"

LOGIT_SCALE = 0.125
GROUPS = 8
# Of ImageNet's red, green and blue, in units of the largest value.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

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


class Variables(NamedTuple):
    """All that a network consists of.

    `batch_stats` are the running means and variances of batch norm, without leaves
    with group norm.
    """

    params: Params
    batch_stats: BatchStats


class Architecture(NamedTuple):
    """What a network depends on."""

    channels: int
    """Of the images: 1 or 3."""
    width: int = 64
    norm: Norm = "batch"


# Variables and images uint8 [batch, height, width, channel] to logits [batch, class].
Apply = Callable[[Variables, jax.Array], jax.Array]
# The same to logits and the new batch_stats.
TrainApply = Callable[[Variables, jax.Array], tuple[jax.Array, BatchStats]]


def normalize(images: jax.Array) -> jax.Array:
    """Images uint8 [..., channel] as float32, by ImageNet's mean and deviation.

    The authors' script does so for CIFAR-10. Gray images take the average over the
    three channels of both numbers, 0.449 and 0.226.
    """
    mean, deviation = jnp.array(MEAN), jnp.array(DEVIATION)
    if images.shape[-1] == 1:
        mean, deviation = mean.mean(keepdims=True), deviation.mean(keepdims=True)
    # One multiplication and one addition, written so that ranks agree.
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean, deviation = mean.reshape(shape), deviation.reshape(shape)
    return (images.astype(jnp.float32) / 255 - mean) / deviation


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
    model = FastResNet(architecture, rngs=nnx.Rngs(key))
    return Variables(nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat))


def make_apply(architecture: Architecture) -> Apply:
    """The network in evaluation, as a pure function to logits."""
    graph = _graph(architecture, None)

    def apply(variables: Variables, images: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graph, *variables)
        return model(images)

    return apply


def make_train_apply(
    architecture: Architecture, axis_name: str | None = None
) -> TrainApply:
    """The network in training, as a pure function to logits and new batch statistics.

    With an `axis_name` it is to be called under a vmap over that axis.
    """
    graph = _graph(architecture, axis_name)

    def apply(variables: Variables, images: jax.Array) -> tuple[jax.Array, BatchStats]:
        # Copies, because what was made outside of a trace cannot be updated inside.
        model: Any = nnx.merge(graph, *variables, copy=True)
        return model(images, training=True), nnx.state(model, nnx.BatchStat)

    return apply


@functools.lru_cache(maxsize=16)
def _graph(architecture: Architecture, axis_name: str | None) -> Any:
    model = nnx.eval_shape(
        lambda: FastResNet(architecture, axis_name, rngs=nnx.Rngs(0))
    )
    return nnx.graphdef(model)


def layer_of(path: tuple[Any, ...]) -> str:
    """The name in `LAYERS`, or `NORMS`, of a parameter with this path of keys."""
    keys = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    if "kernel" not in keys:
        return NORMS
    return "_".join(key for key in keys if key not in ("conv", "kernel", "value"))
