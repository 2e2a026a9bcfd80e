"""Models and random data for timing single steps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.common.networks import Variables
from experiments.synthetic import model as synthetic
from experiments.vision import model as vision

WorkloadName = Literal[
    "mlp_80x1", "cnn_80x1", "mlp_16x128", "fastresnet_80x1", "transformer_16x4"
]
WORKLOADS: tuple[WorkloadName, ...] = get_args(WorkloadName)
# Of these `steps` takes those above; the last one is a network that TorchJD profiles.
AnyWorkloadName = Literal[WorkloadName, "grouped_cnn_64x1"]
ALL_WORKLOADS: tuple[AnyWorkloadName, ...] = get_args(AnyWorkloadName)

LABELS: dict[AnyWorkloadName, str] = {
    "mlp_80x1": "MLP 784-512-512-10\n80 of 1",
    "cnn_80x1": "CNN 32-64-128\n80 of 1",
    "mlp_16x128": "MLP 18-256-256-256-1\n16 of 128",
    "fastresnet_80x1": "FastResNet\n80 of 1",
    "transformer_16x4": "Transformer, 2 layers\n16 of 4",
    "grouped_cnn_64x1": "CNN, grouped\n64 of 1",
}

Params = Any
Batch = tuple[jax.Array, jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model's loss with parameters and a batch for every environment.

    `loss_fn(params, env_batch)` is the scalar loss of one environment; `batch` has
    the environments in front.
    """

    loss_fn: Callable[[Params, Batch], jax.Array]
    params: Params
    batch: Batch

    @property
    def num_envs(self) -> int:
        """Number of environments."""
        return len(self.batch[0])

    @property
    def param_bytes(self) -> int:
        """Size of one copy of the parameters."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that can be set."""

    shrink: int = 1
    """Divides environments, widths, image sides and sequence lengths."""
    resnet_width: int = 16
    """Channels after FastResNet's first convolution."""
    layers: int = 2
    """Layers of the transformer."""

    def scaled(self, size: int, least: int = 1) -> int:
        """`size` shrunk, at least `least`."""
        return max(least, size // self.shrink)


def build(name: AnyWorkloadName, sizes: Sizes) -> Workload:
    """A workload, with weights and data from a fixed key."""
    builders: dict[AnyWorkloadName, Callable[[Sizes], Workload]] = {
        "mlp_80x1": lambda sizes: image_mlp(
            sizes.scaled(80, 2), sizes.scaled(512), sizes.scaled(784)
        ),
        "cnn_80x1": _cnn,
        "mlp_16x128": _tabular_mlp,
        "fastresnet_80x1": _fast_resnet,
        "transformer_16x4": _transformer,
        "grouped_cnn_64x1": _grouped_cnn,
    }
    return builders[name](sizes)


def image_mlp(num_envs: int, width: int, inputs: int = 784) -> Workload:
    """The MLP inputs-width-width-10 with one example in each environment."""
    model = ImageMLP([inputs, width, width, 10], rngs=nnx.Rngs(0))
    return _workload(model, cross_entropy, _labelled(num_envs, (inputs,)))


def _cnn(sizes: Sizes) -> Workload:
    side = sizes.scaled(32, 16)
    channels = [3, *(sizes.scaled(width) for width in (32, 64, 128))]
    model = CNN(channels, side, rngs=nnx.Rngs(0))
    data = _labelled(sizes.scaled(80, 2), (side, side, 3))
    return _workload(model, cross_entropy, data)


def _tabular_mlp(sizes: Sizes) -> Workload:
    inputs, width, layers = 18, sizes.scaled(256), 3
    architecture = synthetic.Architecture(inputs, width, layers)
    apply = synthetic.make_apply(architecture)

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        features, labels = batch
        logits = apply(params, features)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    rows = (sizes.scaled(16, 2), sizes.scaled(128))
    features = jax.random.normal(jax.random.key(1), (*rows, inputs))
    labels = jax.random.bernoulli(jax.random.key(2), shape=rows).astype(jnp.float32)
    variables = synthetic.init_variables(jax.random.key(0), architecture)
    return Workload(loss_fn, variables, (features, labels))


def _fast_resnet(sizes: Sizes) -> Workload:
    """The network of `experiments.vision`, as it trains.

    Unlike there each environment is a batch of its own: batch norm takes its statistics
    over one example, and the running ones, which nobody reads, stay as they are.
    """
    side = sizes.scaled(32, 16)
    architecture = vision.Architecture(3, sizes.scaled(sizes.resnet_width, 2))
    apply = vision.make_train_apply(architecture)
    params, batch_stats = vision.init_variables(jax.random.key(0), architecture)

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        images, labels = batch
        logits, _ = apply(Variables(params, batch_stats), images)
        return cross_entropy(logits, labels)

    shape = (sizes.scaled(80, 2), 1, side, side, 3)
    images = jax.random.randint(jax.random.key(1), shape, 0, 256, jnp.uint8)
    return Workload(loss_fn, params, (images, _labels(len(images))))


def _transformer(sizes: Sizes) -> Workload:
    vocabulary, length = 256, sizes.scaled(64, 2)
    model = Transformer(
        vocabulary, length, sizes.scaled(128, 4), sizes.layers, rngs=nnx.Rngs(0)
    )
    shape = (sizes.scaled(16, 2), 4, length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, vocabulary)
    return _workload(model, cross_entropy, (tokens[..., :-1], tokens[..., 1:]))


def _grouped_cnn(sizes: Sizes) -> Workload:
    side = sizes.scaled(32, 16)
    model = GroupedCNN(sizes.scaled(32, 2), side, rngs=nnx.Rngs(0))
    data = _labelled(sizes.scaled(64, 2), (side, side, 3))
    return _workload(model, cross_entropy, data)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy with integer labels."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _labelled(num_envs: int, shape: tuple[int, ...]) -> Batch:
    inputs = jax.random.normal(jax.random.key(1), (num_envs, 1, *shape))
    return inputs, _labels(num_envs)


def _labels(num_envs: int) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (num_envs, 1), 0, 10)


def _workload(model: nnx.Module, loss: Loss, batch: Batch) -> Workload:
    parts: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = parts

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        inputs, labels = batch
        merged: Any = nnx.merge(graph, params, rest)
        return loss(merged(inputs), labels)

    return Workload(loss_fn, params, batch)


class ImageMLP(nnx.Module):
    """Dense layers with ReLU between them."""

    def __init__(self, sizes: list[int], *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Linear(fan_in, fan_out, rngs=rngs)
            for fan_in, fan_out in itertools.pairwise(sizes)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [..., classes]."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class CNN(nnx.Module):
    """3x3 convolutions, each with ReLU and 2x2 average pooling, then a dense layer."""

    def __init__(self, channels: list[int], side: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Conv(fan_in, fan_out, (3, 3), rngs=rngs)
            for fan_in, fan_out in itertools.pairwise(channels)
        )
        final_side = side // 2 ** len(self.layers)
        self.head = nnx.Linear(final_side**2 * channels[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits for images [batch, side, side, 3]."""
        for layer in self.layers:
            x = nnx.avg_pool(nnx.relu(layer(x)), (2, 2), strides=(2, 2))
        return self.head(x.reshape(len(x), -1))


class GroupedCNN(nnx.Module):
    """A 3x3 convolution, one in pairs, one by channel, then two dense layers."""

    def __init__(self, width: int, side: int, *, rngs: nnx.Rngs):
        def conv(fan_in: int, fan_out: int, groups: int) -> nnx.Conv:
            return nnx.Conv(
                fan_in,
                fan_out,
                (3, 3),
                padding="VALID",
                feature_group_count=groups,
                rngs=rngs,
            )

        self.convs = nnx.List(
            [
                conv(3, width, 1),
                conv(width, 2 * width, width),
                conv(2 * width, 2 * width, 2 * width),
            ]
        )
        final_side = ((side - 4) // 2 - 2) // 3
        self.hidden = nnx.Linear(final_side**2 * 2 * width, 4 * width, rngs=rngs)
        self.head = nnx.Linear(4 * width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits for images [batch, side, side, 3]."""
        first, pairs, channels = self.convs
        x = pairs(nnx.relu(first(x)))
        x = nnx.relu(nnx.max_pool(x, (2, 2), strides=(2, 2)))
        x = nnx.relu(nnx.max_pool(channels(x), (3, 3), strides=(3, 3)))
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class Block(nnx.Module):
    """Causal self-attention and an MLP, each behind a layer norm."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[batch, position, width]."""
        x = x + self.attention(self.norm_attention(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


class Transformer(nnx.Module):
    """A pre-norm decoder with learned positions and an output layer of its own."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, rngs=rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits [batch, position, vocabulary]."""
        mask = nnx.make_causal_mask(tokens)
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))
