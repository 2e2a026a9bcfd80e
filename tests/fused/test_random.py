"""The fused oracle equals stacked gradients on networks that nobody thought of."""

import dataclasses
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import hardvary
from hardvary.fused import rules
from tests._inputs import STATISTICS, weights_for
from tests.fused._answers import ask, check_answers, signed_weights
from tests.fused._precision import PRECISIONS, allowed, at
from tests.zoo import (
    Stacked,
    assert_stats_match,
    compile_quickly,
    conv,
    fields_by_path,
    poison,
)
from tests.zoo.blocks import floats, normal

METHOD = "fused"
WIDTHS = st.sampled_from([1, 2, 3, 4])


@dataclasses.dataclass
class Builder:
    """A network under construction: layers that take all parameters and an array.

    Attributes:
      draw: of Hypothesis.
      rng: values of parameters; Hypothesis only chooses the structure.
      shape: of the activations of one environment at this point.
      params: name -> array.
      layers: `layer(params, x) -> x`.
      names: what was built, for the report of a failure.
    """

    draw: object
    rng: np.random.Generator
    shape: tuple[int, ...]
    params: dict = dataclasses.field(default_factory=dict)
    layers: list = dataclasses.field(default_factory=list)
    names: list = dataclasses.field(default_factory=list)

    def param(self, *shape, fan_in=1):
        name = f"p{len(self.params)}"
        values = self.rng.normal(size=shape) / math.sqrt(max(fan_in, 1))
        self.params[name] = floats(values)
        return name

    def add(self, name, layer):
        shapes = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in self.params.items()
        }
        x = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        self.shape = jax.eval_shape(layer, shapes, x).shape
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


wrappers = st.sampled_from(
    [plain, plain, plain, in_jit, in_remat, in_vmap, in_scan, in_cond]
)


def wrapped(build, name, layer):
    wrap = build.draw(wrappers)
    build.add(f"{name} {wrap.__name__}", wrap(layer))


# What a weight may go through on its way into a layer.


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


preparations = st.sampled_from(
    [
        as_it_is,
        as_it_is,
        as_it_is,
        doubly_transposed,
        negated,
        softplus,
        standardised,
        half_precision_and_back,
    ]
)

# The menu. An entry adds one layer, or none where its shapes do not fit.


def dense(build):
    out, prepare = build.draw(WIDTHS), build.draw(preparations)
    w = build.param(build.features, out, fan_in=build.features)
    wrapped(build, f"dense {prepare.__name__}", lambda p, x: x @ prepare(p[w]))


def dense_transposed(build):
    w = build.param(build.draw(WIDTHS), build.features, fan_in=build.features)
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
    out = build.draw(WIDTHS)
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
    w, turn = build.draw(st.sampled_from(fitting))
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
    out = build.draw(WIDTHS)
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
    draw = build.draw
    groups = draw(st.sampled_from([1, 1, build.features]))
    size = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    padding = [
        (draw(st.integers(0, 1)) + s * d, s)
        for s, d in zip(size, dilation, strict=True)
    ]
    settings = {
        "strides": tuple(draw(st.integers(1, 2)) for _ in range(rank)),
        "padding": draw(st.sampled_from(["SAME", padding])),
        "rhs_dilation": dilation,
        "feature_group_count": groups,
    }
    if settings["padding"] != "SAME":
        settings["lhs_dilation"] = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    fan_in = math.prod(size) * build.features // groups
    out = groups * draw(st.integers(1, 2))
    k = build.param(*size, build.features // groups, out, fan_in=fan_in)
    wrapped(build, f"convolution {settings}", lambda p, x: conv(x, p[k], **settings))


def transposed(build):
    # Rows become features: what was a batch axis is summed over by the next layer.
    axes = (*range(len(build.shape) - 2), len(build.shape) - 1, len(build.shape) - 2)
    build.add("transposed", lambda p, x: jnp.transpose(x, axes))


def flattened(build):
    build.add("flattened", lambda p, x: x.reshape(x.shape[0], -1))


def relu(build):
    build.add("relu", lambda p, x: jax.nn.relu(x + 0.3))


def sine(build):
    # Not tanh: where it saturates, the gradients of a whole network are rounding.
    build.add("sine", lambda p, x: jnp.sin(x))


def kept_beside(build):
    # The activations so far take part twice, by way of a concatenation.
    build.add("kept_beside", lambda p, x: jnp.concatenate([x, jnp.sin(x)], axis=-1))


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
]


@st.composite
def networks(draw):
    """`(params, loss_fn, batch, names of the layers)`."""
    num_envs, rows = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    inner = draw(st.sampled_from([(), (), (3,), (4, 3)]))
    shape = (rows, *inner, draw(WIDTHS))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    build = Builder(draw, rng, shape)
    for step in draw(st.lists(st.sampled_from(MENU), min_size=1, max_size=5)):
        # What grows without end is none of this test's matter.
        if math.prod(build.shape) <= 300:
            step(build)
    if not build.params:
        dense(build)
    decayed = draw(st.sampled_from([None, *build.params]))
    target = normal(rng, *build.shape)
    single_row = draw(st.booleans())

    def loss_fn(params, x):
        y = build.forward(params, x)
        # All components of the last activation, or one row: a single outer product.
        loss = jnp.sum(jnp.sin(y[:1] * target[:1])) if single_row else 0
        loss = loss + (0 if single_row else jnp.mean(jnp.square(y - target)))
        if decayed is not None:
            loss = loss + 0.1 * jnp.sum(jnp.square(params[decayed]))
        return loss

    batch = normal(rng, num_envs, *shape)
    names = [f"{num_envs} environments of {shape}", *build.names]
    return build.params, loss_fn, batch, [*names, f"decayed {decayed}"]


@st.composite
def weighted_networks(draw):
    network = draw(networks())
    num_envs = len(network[2])
    weights = draw(st.one_of(st.none(), weights_for(num_envs)))
    divisors = [size for size in range(1, num_envs + 1) if num_envs % size == 0]
    return network, weights, draw(st.sampled_from([None, None, None, *divisors]))


# Below this size gradients are stacked: 0 has the scan take them.
@given(weighted_networks(), st.sampled_from([0, rules.SMALL]))
def test_gradients_of_a_random_network_equal_stacked_gradients(drawn, small):
    (params, loss_fn, batch, names), weights, microbatch_size = drawn
    expected = Stacked(loss_fn, params, batch)
    if weights is not None and 0 in weights:
        batch = poison(batch, int(np.argmin(weights)))
    signed = signed_weights(len(batch))

    @compile_quickly
    def run(params, batch, signed, weights):
        if microbatch_size is None:
            oracle = hardvary.value_and_env_grads(loss_fn)
            losses, grads = oracle(params, batch, env_weights=weights)
            return losses, ask(grads, signed)
        oracle = hardvary.value_and_grad_stats(
            loss_fn, method=METHOD, stats=STATISTICS, microbatch_size=microbatch_size
        )
        return oracle(params, batch, env_weights=weights)

    with mock.patch.object(rules, "SMALL", small):
        losses, found = run(params, batch, signed, weights)
    try:
        present = slice(None) if weights is None else weights > 0
        np.testing.assert_allclose(
            np.asarray(losses)[present],
            expected.losses[present],
            rtol=2e-5,
            atol=2e-5 * np.abs(expected.losses).max(),
        )
        if microbatch_size is None:
            check_answers(found, params, expected, signed, weights)
        else:
            fields = fields_by_path(found, params)
            assert_stats_match(fields, params, expected, weights)
    except AssertionError as error:
        error.add_note("\n".join(names))
        raise


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=8)
@given(drawn=networks())
def test_gradients_of_a_random_network_in_another_precision(precision, drawn):
    *model, names = drawn
    with allowed(precision), mock.patch.object(rules, "SMALL", 0):
        params, loss_fn, batch = at(precision, *model)
        expected = Stacked(loss_fn, params, batch)
        signed = signed_weights(len(batch))

        @compile_quickly
        def run(params, batch, signed):
            return ask(hardvary.env_grads(loss_fn)(params, batch), signed)

        try:
            found = run(params, batch, signed)
            check_answers(
                found, params, expected, signed, rounding=PRECISIONS[precision]
            )
        except AssertionError as error:
            error.add_note("\n".join(names))
            raise
