"""Modules of Flax, Linen and NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.blocks import ids, inputs, mix, normal, one_of, weight
from tests.zoo.model import NUM_ENVS, model


def drawn(rng, shape):
    return weight(rng, *shape) if len(shape) > 1 else normal(rng, *shape)


def linen_case(rng, module, x_shape):
    """Variables and a loss of a Linen module without state."""
    example = jax.ShapeDtypeStruct(x_shape, jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    params = jax.tree.map(lambda leaf: drawn(rng, leaf.shape), shapes)
    out = jax.eval_shape(lambda p, x: module.apply({"params": p}, x), params, example)
    top = mix(rng, out.shape)

    def loss_fn(params, batch):
        return top(module.apply({"params": params}, batch))

    return params, loss_fn, inputs(rng, *x_shape)


class LinenConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.GroupNorm(num_groups=2)(x)
        x = nn.ConvTranspose(3, (2, 2), (2, 2))(x)
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@model(promotes=True)
def linen_conv_net(rng):
    return linen_case(rng, LinenConvNet(), (2, 4, 4, 2))


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y)
        return x + nn.Dense(6)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))


@model(promotes=True)
def linen_transformer_block(rng):
    return linen_case(rng, LinenTransformer(), (2, 4, 6))


class LinenScanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return nn.tanh(layer(x)), None

        scan = nn.scan(
            nn.remat(body), variable_axes={"params": 0}, split_rngs={"params": True},
            length=3,
        )  # fmt: skip
        return scan(nn.Dense(5), x, None)[0]


@model(promotes=True)
def linen_scanned_remat_layers(rng):
    return linen_case(rng, LinenScanned(), (5,))


def nnx_case(rng, make, x_shape, call=None, more=None, draw=None):
    """Split parameters and a loss that merges them, as training with NNX does."""
    call = (lambda net, batch: net(batch["x"])) if call is None else call
    graph, shapes, rest = nnx.split(
        nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...
    )
    params = jax.tree.map(lambda leaf: drawn(rng, leaf.shape), shapes)
    # Running statistics: read by nobody in training mode, but finite.
    rest = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), rest)
    x = inputs(rng, *x_shape) if draw is None else draw
    batch = {"x": x, **(more or {})}

    def forward(params, batch):
        # Copies of the variables: NNX changes none from outside of a trace.
        state = jax.tree.map(lambda leaf: leaf, rest)
        return call(nnx.merge(graph, params, state), batch)

    top = mix(rng, jax.eval_shape(forward, params, one_of(batch)).shape)

    def loss_fn(params, batch):
        return top(forward(params, batch))

    return params, loss_fn, batch


class NnxNet(nnx.Module):
    """Convolution, batch norm with the batch's own statistics, dropout, dense."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.group = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x), use_running_average=False))
        return self.dense(self.group(x).mean((1, 2)))


# What enters a normalisation is defined up to a constant: the convolution's bias has
# nothing but rounding for a gradient.
@model(promotes=True)
def nnx_conv_net_with_batch_norm(rng):
    return nnx_case(rng, NnxNet, (3, 4, 4, 2))


class NnxDropout(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(5, 6, rngs=rngs)
        self.dropout = nnx.Dropout(0.4)
        self.two = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x, key):
        hidden = self.dropout(nnx.tanh(self.one(x)), rngs=nnx.Rngs(key))
        return self.two(hidden)


@model(promotes=True)
def nnx_dropout_with_keys_in_the_batch(rng):
    return nnx_case(
        rng,
        NnxDropout,
        (2, 5),
        call=lambda net, batch: net(batch["x"], batch["key"]),
        more={"key": jax.random.split(jax.random.key(1), NUM_ENVS)},
    )


class NnxTransformer(nnx.Module):
    """Tied embedding, causal attention with biases, layer norm."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        # Before Flax 0.12, lists themselves.
        as_list = getattr(nnx, "List", list)
        self.blocks = as_list([NnxBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(6, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(x)))


# Key biases have nothing but rounding for a gradient: they move all scores alike.
@model(promotes=True, decided=0.8)
def nnx_transformer_with_tied_embedding(rng):
    return nnx_case(rng, NnxTransformer, (), draw=ids(rng, 7, 2, 5))


@model(promotes=True)
def nnx_lstm(rng):
    def make(rngs):
        return nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=rngs))

    return nnx_case(rng, make, (2, 4, 3))


class NnxDenseGeneral(nnx.Module):
    def __init__(self, rngs):
        self.heads = nnx.LinearGeneral(6, (2, 3), rngs=rngs)
        self.merge = nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("bto,oe->bte", (4, 3), (3,), rngs=rngs)
        self.lora = nnx.LoRA(3, 2, 3, rngs=rngs)

    def __call__(self, x):
        x = self.einsum(nnx.tanh(self.merge(nnx.tanh(self.heads(x)))))
        return x + self.lora(x)


@model(promotes=True)
def nnx_dense_general_einsum_and_lora(rng):
    return nnx_case(rng, NnxDenseGeneral, (2, 3, 6))


@model(promotes=True, rounding=5e-3, decided=0.3)
def nnx_bfloat16_compute(rng):
    def make(rngs):
        return nnx.Sequential(
            nnx.Conv(2, 4, (3, 3), dtype=jnp.bfloat16, rngs=rngs),
            nnx.relu,
            nnx.Linear(4, 3, dtype=jnp.bfloat16, rngs=rngs),
            lambda x: x.astype(jnp.float32),
        )

    return nnx_case(rng, make, (2, 4, 4, 2))


@model(promotes=True)
def nnx_vmapped_and_scanned_layers(rng):
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_layers(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return nnx.tanh(layer(x))

    return nnx_case(
        rng,
        lambda rngs: make_layers(jax.random.split(rngs(), 3)),
        (4,),
        call=lambda net, batch: forward(batch["x"], net),
    )
