"""Networks that nobody thought of: layers of many kinds in random order."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.zoo import conv
from tests.zoo.blocks import floats, normal

WIDTHS = [1, 2, 3, 4]


@dataclasses.dataclass
class Builder:
    """A network under construction: layers that take all parameters and an array.

    Attributes:
      pick: picks one of several options, of which the first is the simplest.
      rng: values of parameters; what is picked is the structure alone.
      shape: of the activations of one environment at this point.
      params: name -> array.
      layers: `layer(params, x) -> x`.
      names: what was built, for the report of a failure.
      is_cut: see `Network`.
    """

    pick: Callable[[Sequence[Any]], Any]
    rng: np.random.Generator
    shape: tuple[int, ...]
    params: dict = dataclasses.field(default_factory=dict)
    layers: list = dataclasses.field(default_factory=list)
    names: list = dataclasses.field(default_factory=list)
    is_cut: bool = False

    def param(self, *shape, fan_in=1):
        name = f"p{len(self.params)}"
        values = self.rng.normal(size=shape) / math.sqrt(max(fan_in, 1))
        self.params[name] = floats(values)
        return name

    def add(self, name, layer):
        """Adds `layer(params, x) -> x`."""
        shapes = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in self.params.items()
        }
        x = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        self.shape = jax.eval_shape(layer, shapes, x).shape
        self.is_cut = self.is_cut or 0 in self.shape
        self.layers.append(layer)
        self.names.append(f"{name} -> {self.shape}")

    def forward(self, params, x):
        for layer in self.layers:
            x = layer(params, x)
        return x

    @property
    def features(self):
        return self.shape[-1]


# Wrappers that a layer may come in. Each must leave the gradients as they are.


def in_jit(layer):
    return lambda p, x: jax.jit(layer)(p, x)


def in_remat(layer):
    return lambda p, x: jax.checkpoint(layer)(p, x)


def in_scan(layer):
    # Over the first axis of x: as many uses as there are rows, of rows one at a time.
    def scanned(p, x):
        return lax.scan(lambda _, row: (None, layer(p, row[None])[0]), None, x)[1]

    return scanned


def in_vmap(layer):
    return lambda p, x: jax.vmap(lambda row: layer(p, row[None])[0])(x)


def in_cond(layer):
    return lambda p, x: lax.cond(jnp.sum(x) > 0, layer, lambda p, x: -layer(p, x), p, x)


def plain(layer):
    return layer


WRAPPERS = [plain, plain, plain, in_jit, in_remat, in_vmap, in_scan, in_cond]


def wrapped(build, name, layer):
    wrap = build.pick(WRAPPERS)
    build.add(f"{name} {wrap.__name__}", wrap(layer))


# What a weight may go through on its way into a layer.


@jax.custom_vjp
def quantised(w):
    return jnp.round(8 * w) / 8


quantised.defvjp(lambda w: (quantised(w), None), lambda _, g: (g,))


def frozen_in_part(w):
    return lax.stop_gradient(jnp.cos(w)) + w


def by_two_ways(w):
    return w + jnp.tanh(w)


def as_it_is(w):
    return w


def doubly_transposed(w):
    return w.T.T if w.ndim == 2 else jnp.swapaxes(jnp.swapaxes(w, 0, 1), 0, 1)


def negated(w):
    return -0.5 * w


def softplus(w):
    return jax.nn.softplus(w)


def standardised(w):
    # Not without the 1: a single component over its size is constant, and all that is
    # left of its gradient is rounding.
    return w / jnp.sqrt(jnp.sum(jnp.square(w)) + 1)


def half_precision_and_back(w):
    # The value loses bits; the gradient passes as it is, through casts of a constant.
    return w + lax.stop_gradient(w.astype(jnp.bfloat16).astype(jnp.float32) - w)


PREPARATIONS = [
    as_it_is,
    as_it_is,
    as_it_is,
    doubly_transposed,
    negated,
    softplus,
    standardised,
    half_precision_and_back,
    quantised,
    frozen_in_part,
    by_two_ways,
]

# The menu. An entry adds one layer, or none where its shapes do not fit.


def dense(build):
    out, prepare = build.pick(WIDTHS), build.pick(PREPARATIONS)
    w = build.param(build.features, out, fan_in=build.features)
    wrapped(build, f"dense {prepare.__name__}", lambda p, x: x @ prepare(p[w]))


def dense_transposed(build):
    w = build.param(build.pick(WIDTHS), build.features, fan_in=build.features)
    wrapped(build, "dense_transposed", lambda p, x: x @ p[w].T)


def dense_einsum(build):
    # A weight of three axes, split and merged again.
    w = build.param(2, build.features, 2, fan_in=build.features)
    letters = "abcde"[: len(build.shape) - 1]
    spec = f"{letters}i,hik->{letters}hk"

    def layer(p, x):
        y = jnp.einsum(spec, x, p[w])
        return y.reshape(*y.shape[:-2], 4)

    wrapped(build, "dense_einsum", layer)


def dense_sliced(build):
    out = build.pick(WIDTHS)
    w = build.param(build.features + 1, out + 2, fan_in=build.features)
    wrapped(build, "dense_sliced", lambda p, x: x @ p[w][1:, 1 : 1 + out])


def dense_tied(build):
    fitting = [
        (name, turn)
        for name, value in build.params.items()
        for turn in (False, True)
        if value.ndim == 2 and value.shape[1 if turn else 0] == build.features
    ]
    if not fitting:
        return
    w, turn = build.pick(fitting)
    wrapped(build, "dense_tied", lambda p, x: jnp.sin(x @ (p[w].T if turn else p[w])))


def dense_residual(build):
    w = build.param(build.features, build.features, fan_in=build.features)
    wrapped(build, "dense_residual", lambda p, x: x + jnp.sin(x @ p[w]))


def layers_scanned(build):
    w = build.param(2, build.features, build.features, fan_in=build.features)

    def layer(p, x):
        return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, p[w])[0]

    build.add("layers_scanned", layer)


def layer_repeated(build):
    w = build.param(build.features, build.features, fan_in=build.features)
    build.add(
        "layer_repeated",
        lambda p, x: lax.fori_loop(0, 2, lambda _, x: jnp.sin(x @ p[w]), x),
    )


def low_rank(build):
    out = build.pick(WIDTHS)
    a, b = (
        build.param(build.features, 2),
        build.param(2, out, fan_in=2 * build.features),
    )
    wrapped(build, "low_rank", lambda p, x: x @ (p[a] @ p[b]))


def bias(build):
    b = build.param(build.features)
    wrapped(build, "bias", lambda p, x: x + jnp.broadcast_to(p[b], x.shape))


def scale(build):
    s = build.param(build.features)
    ones = (1,) * (len(build.shape) - 1)
    wrapped(build, "scale", lambda p, x: x * (1 + p[s].reshape(*ones, -1)))


def scalar(build):
    s = build.param()
    build.add("scalar", lambda p, x: jnp.sin(p[s] * x) + p[s])


def table(build):
    # Rows of a table, chosen by the activations: the index has no gradient.
    if not build.features:  # nothing to choose by
        return
    t = build.param(3, build.features)

    def layer(p, x):
        index = jnp.argmax(lax.stop_gradient(x), axis=-1) % 3
        return jnp.sin(x) + p[t][index]

    wrapped(build, "table", layer)


def normalisation(build):
    s = build.param(build.features)
    # Axis 0 is one row inside of a vmap or a scan, and the result then zero.
    axis = -1 if build.features > 1 else tuple(range(len(build.shape)))
    ones = (1,) * (len(build.shape) - 1)

    def layer(p, x):
        x = x - jnp.mean(x, axis=axis, keepdims=True)
        size = lax.rsqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True) + 1e-1)
        return x * size * p[s].reshape(*ones, -1) + 0.1

    build.add("normalisation", layer)


def attention(build):
    if len(build.shape) != 3:
        return
    w = build.param(build.features, 3 * 2, fan_in=build.features)

    def layer(p, x):
        q, k, v = jnp.split(x @ p[w], 3, axis=-1)
        return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2), axis=-1) @ v

    wrapped(build, "attention", layer)


def convolution(build):
    if len(build.shape) not in (3, 4):
        return
    rank = len(build.shape) - 2
    pick = build.pick
    groups = pick([1, 1, max(build.features, 1)])
    size = tuple(pick(range(1, 4)) for _ in range(rank))
    dilation = tuple(pick(range(1, 3)) for _ in range(rank))
    padding = [(pick(range(2)) + s * d, s) for s, d in zip(size, dilation, strict=True)]
    settings = {
        "strides": tuple(pick(range(1, 3)) for _ in range(rank)),
        "padding": pick(["SAME", padding]),
        "rhs_dilation": dilation,
        "feature_group_count": groups,
    }
    if settings["padding"] != "SAME":
        settings["lhs_dilation"] = tuple(pick(range(1, 3)) for _ in range(rank))
    fan_in = math.prod(size) * build.features // groups
    out = groups * pick(range(1, 3))
    k = build.param(*size, build.features // groups, out, fan_in=fan_in)
    wrapped(build, f"convolution {settings}", lambda p, x: conv(x, p[k], **settings))


def transposed(build):
    # Rows become features: what was a batch axis is summed over by the next layer.
    axes = (*range(len(build.shape) - 2), len(build.shape) - 1, len(build.shape) - 2)
    build.add("transposed", lambda p, x: jnp.transpose(x, axes))


def flattened(build):
    size = math.prod(build.shape[1:])
    build.add("flattened", lambda p, x: x.reshape(x.shape[0], size))


def relu(build):
    build.add("relu", lambda p, x: jax.nn.relu(x + 0.3))


def sine(build):
    # Not tanh: where it saturates, the gradients of a whole network are rounding.
    build.add("sine", lambda p, x: jnp.sin(x))


def kept_beside(build):
    # The activations so far take part twice, by way of a concatenation.
    build.add("kept_beside", lambda p, x: jnp.concatenate([x, jnp.sin(x)], axis=-1))


@jax.custom_vjp
def product(x, w):
    return jnp.sin(x @ w)


def product_backward(residuals, g):
    x, w = residuals
    g = g * jnp.cos(x @ w)
    rows, outputs = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return g @ w.T, rows.T @ outputs


product.defvjp(lambda x, w: (product(x, w), (x, w)), product_backward)


def dense_with_a_rule_of_its_own(build):
    w = build.param(build.features, build.pick(WIDTHS), fan_in=build.features)
    wrapped(build, "dense_with_a_rule_of_its_own", lambda p, x: product(x, p[w]))


def recurrent(build):
    # Over the first axis: a state that every row changes, by two weights.
    w = build.param(build.features, build.features, fan_in=build.features)
    u = build.param(build.features, build.features, fan_in=build.features)
    reverse, remat = build.pick([False, True]), build.pick([False, True])

    def layer(p, x):
        def step(h, row):
            h = jnp.sin(h @ p[w] + row @ p[u])
            return h, h * row

        step = jax.checkpoint(step) if remat else step
        state = jnp.zeros(x.shape[1:], x.dtype)
        return lax.scan(step, state, x, reverse=reverse)[1]

    build.add(f"recurrent, reverse {reverse}, remat {remat}", layer)


def adapters_scanned(build):
    # A frozen base with a trained part beside it, for every layer.
    base = build.param(2, build.features, build.features, fan_in=build.features)
    down = build.param(2, build.features, 1, fan_in=build.features)
    up = build.param(2, 1, build.features)

    def layer(p, x):
        def step(x, weights):
            frozen, down, up = weights
            return jnp.sin(x @ lax.stop_gradient(frozen) + x @ down @ up), None

        return lax.scan(step, x, (p[base], p[down], p[up]))[0]

    build.add("adapters_scanned", layer)


def bilinear(build):
    w = build.param(build.features, build.features, build.pick(WIDTHS))
    scale = max(build.features, 1)
    spec = "...i,ijk,...j->...k"
    wrapped(build, "bilinear", lambda p, x: jnp.einsum(spec, x, p[w], x) / scale)


def filtered(build):
    # A weight of the frequencies: a transform has no rule, and none in half precision.
    size = build.features
    if size:
        w = build.param(size // 2 + 1)

        def layer(p, x):
            wide = jnp.promote_types(x.dtype, jnp.float32)
            weighted = jnp.fft.rfft(x.astype(wide)) * p[w].astype(wide)
            return jnp.fft.irfft(weighted, n=size).astype(x.dtype)

        build.add("filtered", layer)


def sorted_bias(build):
    b = build.param(build.features)

    def layer(p, x):
        # jax 0.7 cannot differentiate a sort of nothing.
        in_order = jnp.sort(p[b]) if p[b].size else p[b]
        return x + jnp.broadcast_to(in_order, x.shape)

    build.add("sorted_bias", layer)


def gated(build):
    w, v = (build.param(build.features, build.features) for _ in range(2))
    wrapped(
        build, "gated", lambda p, x: jnp.where(x > 0.1, jnp.sin(x @ p[w]), x @ p[v])
    )


def without_inputs(build):
    # A weight without entries, and what it gives beside the activations.
    w = build.param(0, build.pick(WIDTHS))
    build.add(
        "without_inputs",
        lambda p, x: jnp.concatenate([x, x[..., :0] @ p[w]], axis=-1),
    )


def pooled(build):
    # The largest of every two rows.
    if build.shape[0] % 2 == 0 and build.shape[0]:
        half = (build.shape[0] // 2, 2, *build.shape[1:])

        def layer(p, x):
            # Not jnp.max: its gradient looks for the entry that equals the largest one.
            # Compiled quickly, XLA may compute these twice, rounded in two ways, and
            # where none is equal divide by their number.
            first, second = (x.reshape(half)[:, i] for i in range(2))
            return jnp.where(first > second, first, second)

        build.add("pooled", layer)


def patches(build):
    # Windows side by side, and as large as one wants.
    if len(build.shape) in (3, 4, 5):
        size = tuple(build.pick(range(1, 6)) for _ in build.shape[1:-1])
        out = build.pick(WIDTHS)
        fan_in = math.prod(size) * build.features
        k = build.param(*size, build.features, out, fan_in=fan_in)
        padding = build.pick(["SAME", "VALID"])
        wrapped(
            build,
            f"patches of {size}, {padding}",
            lambda p, x: conv(x, p[k], size, padding),
        )


def softmax(build):
    build.add("softmax", lambda p, x: jax.nn.softmax(x, axis=-1) + 0.1 * x)


MENU = [
    dense,
    dense,
    dense_transposed,
    dense_einsum,
    dense_sliced,
    dense_tied,
    dense_tied,
    dense_residual,
    layers_scanned,
    layer_repeated,
    low_rank,
    bias,
    scale,
    scalar,
    table,
    normalisation,
    attention,
    convolution,
    convolution,
    transposed,
    flattened,
    relu,
    sine,
    kept_beside,
    dense_with_a_rule_of_its_own,
    recurrent,
    adapters_scanned,
    bilinear,
    filtered,
    sorted_bias,
    gated,
    without_inputs,
    pooled,
    patches,
    softmax,
]


@dataclasses.dataclass(frozen=True)
class Network:
    """A random network.

    Attributes:
      params: name -> array.
      loss_fn: of them and one environment.
      batch: leaves `[env, ...]`.
      names: what it consists of, for the report of a failure.
      is_cut: whether activations somewhere have no entries: nothing of the batch
        reaches the loss.
    """

    params: dict
    loss_fn: Callable
    batch: dict
    names: list
    is_cut: bool

    @property
    def num_envs(self):
        return len(self.batch["x"])


def looked_up(build, num_envs, shape):
    """Rows of a table in front of everything, by ids of the batch; the ids."""
    dtype = build.pick(["int32", "uint8", "int16", "int8"])
    rows = build.pick([3, 7, 300])
    mode = build.pick([None, "clip", "fill"])
    table = build.param(rows, shape[-1])
    high = min(rows, np.iinfo(dtype).max + 1)
    drawn = build.rng.integers(0, high, size=(num_envs, *shape[:-1]))
    build.names.append(f"looked up by {dtype} in {rows} rows, mode {mode}")

    def look_up(p, ids):
        return jnp.take(p[table], ids, axis=0, mode=mode)

    return look_up, jax.device_put(drawn.astype(dtype))


def network(head, layers):
    """A network.

    Args:
      head: picks one of several options: what the network is as a whole.
      layers: for each layer what picks which one and how.
    """
    num_envs, rows = head(range(1, 6)), head([1, 2, 3, 4, 4, 3, 2, 0])
    inner = head([(), (), (3,), (4, 3), (7,), (2, 3, 2)])
    shape = (rows, *inner, head([*WIDTHS, *WIDTHS, 5, 0]))
    rng = np.random.default_rng(head(range(2**16)))
    build = Builder(head, rng, shape)
    batch = {"x": normal(rng, num_envs, *shape)}
    look_up = None
    if head([False, False, False, True]):
        look_up, batch["ids"] = looked_up(build, num_envs, shape)
    for pick in layers:
        # What grows without end is none of this test's matter.
        build.pick, step = pick, pick(MENU)
        if math.prod(build.shape) <= 300:
            step(build)
    build.pick = head
    if not build.params:
        dense(build)
    decayed = head([None, *build.params])
    target = normal(rng, *build.shape)
    single_row, metric = head([False, True]), head([False, False, False, True])

    def loss_fn(params, env):
        x = env["x"]
        if look_up is not None:
            x = x + look_up(params, env["ids"]).astype(x.dtype)
        y = build.forward(params, x)
        # All components of the last activation, or one row: a single outer product.
        if single_row:
            loss = jnp.sum(jnp.sin(y[:1] * target[:1]))
        else:
            loss = jnp.sum(jnp.square(y - target)) / max(y.size, 1)
        if decayed is not None:
            loss = loss + 0.1 * jnp.sum(jnp.square(params[decayed]))
        if metric:
            # Nothing, with a slope that is infinite.
            first = next(iter(params.values()))
            loss = loss + lax.stop_gradient(jnp.sqrt(jnp.sum(0 * first)))
        return loss

    names = [f"{num_envs} environments of {shape}", *build.names]
    names.append(f"decayed {decayed}, a single row {single_row}, a metric {metric}")
    return Network(build.params, loss_fn, batch, names, build.is_cut)
