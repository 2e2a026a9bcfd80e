"""Small models of every kind, and what their gradient statistics must be.

`ZOO` maps a name to a `Model`; calling it with a `numpy.random.Generator` returns
`(params, loss_fn, batch)`, where every leaf of batch is `[env, ...]`. Parameters are
drawn with NumPy: one eager JAX initialiser costs more than the whole test of a model.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

NUM_ENVS = 6


@dataclasses.dataclass(frozen=True)
class Model:
    """One kind of model.

    Attributes:
      make: `make(rng) -> (params, loss_fn, batch)`.
      has_aux: whether loss_fn returns `(loss, aux)`.
      promotes: whether a library underneath promotes dtypes or ranks implicitly, which
        tests/conftest.py forbids.
      rounding: what counts as rounding, as a share of the largest gradient.
      decided: share of components whose signs must be beyond rounding, so that the
        comparison of signs says something.
    """

    make: Callable[[np.random.Generator], Any]
    has_aux: bool = False
    promotes: bool = False
    rounding: float = 1e-5
    decided: float = 0.9

    def __call__(self, rng: np.random.Generator) -> Any:
        with self.promotion():
            return self.make(rng)

    def promotion(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.promotes:
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        return stack


ZOO: dict[str, Model] = {}


def model(function=None, **settings):
    if function is None:
        return functools.partial(model, **settings)
    assert function.__name__ not in ZOO
    ZOO[function.__name__] = Model(function, **settings)
    return function


# --------------------------------------------------------------------------------------
# The definition, and the comparison with it.


# What these tests compile is small and runs once: compiling is all they cost, and these
# options make it four times faster.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # then it lost the option
    QUICK["xla_cpu_use_fusion_emitters"] = False


def compile_quickly(function):
    return jax.jit(function, compiler_options=QUICK)


class Stacked:
    """Losses, aux and gradients of every environment, from the definition.

    `vmap(grad)`, nothing of hardvary involved.

    Attributes:
      losses: `[env]`.
      aux: leaves `[env, ...]`.
      grads: path -> `[env, *param.shape]`, float64.
    """

    def __init__(self, loss_fn, params, batch, has_aux=False, promotion=None):
        self._one = functools.partial(
            jax.value_and_grad(loss_fn, has_aux=has_aux), params
        )
        self._batch = batch
        self._promotion = contextlib.ExitStack if promotion is None else promotion
        with self._promotion():
            value, grads = compile_quickly(jax.vmap(self._one))(batch)
        losses, self.aux = value if has_aux else (value, None)
        self.losses = np.asarray(losses, np.float64)
        self.grads = by_path(grads)

    @functools.cached_property
    def zero(self):
        """Path -> where the gradient is exactly zero, by `vmap` and one by one.

        Zero by one route alone is a cancellation: rounding, not what the model says.
        A compilation more, which is rarely needed.
        """
        with self._promotion():
            _, grads = compile_quickly(lambda batch: lax.map(self._one, batch))(
                self._batch
            )
        return {
            path: (grad == 0) & (self.grads[path] == 0)
            for path, grad in by_path(grads).items()
        }


def by_path(tree, dtype=np.float64):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).astype(dtype)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_stats_match(stats, params, stacked, weights=None, rounding=1e-5):
    """Compares GradStats with stacked gradients; returns the share of decided signs.

    Args:
      stats: `hardvary.GradStats`; statistics that are None are skipped.
      params: what the statistics are of.
      stacked: `Stacked`.
      weights: `[env]`, binary fractions so that sums of signs are exact.
      rounding: as in `Model`. A component is decided where every present environment's
        gradient is larger than this share of the largest one, or exactly zero: signs
        must then be equal, and may differ elsewhere by the undecided environments only.
    """
    num_envs = len(stacked.losses)
    weights = np.ones(num_envs) if weights is None else np.asarray(weights, np.float64)
    assert float(stats.num_envs) == weights.sum()
    fields = {}
    for name in ("mean", "sign_sum", "square_mean", "log_abs_mean"):
        tree = getattr(stats, name)
        if tree is None:
            continue
        assert jax.tree.structure(tree) == jax.tree.structure(params), name
        for leaf, param in zip(
            jax.tree.leaves(tree), jax.tree.leaves(params), strict=True
        ):
            wide = np.promote_types(leaf.dtype, np.float32)
            expected = jnp.result_type(param) if name == "mean" else wide
            assert leaf.dtype == expected, name
            assert leaf.shape == np.shape(param), name
        fields[name] = by_path(tree)

    zero = {path: grad == 0 for path, grad in stacked.grads.items()}
    try:
        return _compare(fields, stacked.grads, zero, weights, rounding)
    except AssertionError:
        unsure = any((zero[path] != stacked.zero[path]).any() for path in zero)
        if not unsure:
            raise
    return _compare(fields, stacked.grads, stacked.zero, weights, rounding)


def _compare(fields, grads, zeros, weights, rounding):
    present = weights > 0
    grads = {path: grad[present] for path, grad in grads.items()}
    weights = weights[present]
    largest = max((np.abs(g).max(initial=0) for g in grads.values()), default=0)
    count, total = 0, 0

    def check(name, path, off, allowed):
        allowed = np.broadcast_to(allowed, off.shape)
        # Not `off > allowed`: NaN is wrong too.
        wrong = ~(off <= allowed)
        if wrong.any():
            raise AssertionError(
                f"{name} of {path} is off by {off[wrong]}, of which {allowed[wrong]} "
                f"may be rounding, at {np.argwhere(wrong).tolist()}"
            )

    for path, grad in grads.items():
        zero = zeros[path][present]
        weight = weights.reshape(-1, *[1] * (grad.ndim - 1))

        def average(values, weight=weight):
            return (weight * values).sum(0) / weights.sum()

        undecided = (np.abs(grad) <= rounding * largest) & ~zero
        decided = ~undecided.any(0)
        count, total = count + decided.sum(), total + decided.size
        # What a gradient may be off by. A share of the tree's largest: terms of that
        # size may have cancelled.
        error = rounding * (2 * np.abs(grad).max(initial=0) + 0.1 * largest)

        if "mean" in fields:
            off = np.abs(fields["mean"][path] - average(grad))
            check("mean", path, off, error)
        if "sign_sum" in fields:
            off = np.abs(fields["sign_sum"][path] - (weight * np.sign(grad)).sum(0))
            check("sign", path, off, 2 * (weight * undecided).sum(0))
        if "square_mean" in fields:
            off = np.abs(fields["square_mean"][path] - average(grad**2))
            allowed = average(2 * np.abs(grad) * error) + error**2
            check("square", path, off, allowed)
        if "log_abs_mean" in fields:
            expected = average(np.log(np.abs(grad) + 1e-10))
            slope = np.where(zero, 0, 1 / (np.abs(grad) + 1e-10))
            allowed = average(error * slope) + 1e-5 * (1 + np.abs(expected))
            off = np.abs(fields["log_abs_mean"][path] - expected)
            check("log_abs", path, np.where(decided, off, 0), allowed)
    return count / total if total else 1.0


def poison(batch, env):
    """`batch` with NaN in every floating component of one environment."""

    def leaf(values):
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            return values
        values = np.array(values)
        values[env] = np.nan
        return jnp.asarray(values)

    return jax.tree.map(leaf, batch)


# --------------------------------------------------------------------------------------
# Building blocks.


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def weight(rng, *shape, fan_in=None):
    fan_in = math.prod(shape[:-1]) if fan_in is None else fan_in
    return jnp.asarray(rng.normal(size=shape) / math.sqrt(fan_in), jnp.float32)


def inputs(rng, *shape, num_envs=NUM_ENVS):
    return normal(rng, num_envs, *shape)


def ids(rng, high, *shape, low=0):
    return jnp.asarray(rng.integers(low, high, size=(NUM_ENVS, *shape)), jnp.int32)


def pairs(rng, x_shape, y_shape):
    """A regression batch."""
    return {"x": inputs(rng, *x_shape), "y": inputs(rng, *y_shape)}


def mse(prediction, target):
    assert prediction.shape == target.shape
    return jnp.mean(jnp.square(prediction - target))


def regression(predict):
    return lambda params, batch: mse(predict(params, batch["x"]), batch["y"])


def mix(rng, shape):
    """A loss for outputs of any shape that treats all components differently."""
    factors = normal(rng, *shape)
    return lambda y: jnp.mean(jnp.sin(y * factors) + 0.3 * jnp.square(y))


# --------------------------------------------------------------------------------------
# Dense layers.


def mlp_params(rng, sizes, bias=True):
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layer = {"w": weight(rng, fan_in, fan_out)}
        if bias:
            layer["b"] = normal(rng, fan_out)
        layers.append(layer)
    return layers


def mlp(params, x):
    """`x`: [features] or [row, features]."""
    for i, layer in enumerate(params):
        bias = layer["b"] if x.ndim == 1 else layer["b"][None]
        x = x @ layer["w"] + bias
        if i < len(params) - 1:
            x = jax.nn.relu(x)
    return x


@model
def dense_one_row(rng):
    return mlp_params(rng, [5, 7, 3]), regression(mlp), pairs(rng, (5,), (3,))


@model
def dense_one_row_with_a_row_axis(rng):
    return mlp_params(rng, [5, 7, 3]), regression(mlp), pairs(rng, (1, 5), (1, 3))


@model
def dense_several_rows(rng):
    return mlp_params(rng, [5, 7, 3]), regression(mlp), pairs(rng, (4, 5), (4, 3))


@model
def dense_scalar_output(rng):
    params = {"w": normal(rng, 5), "b": normal(rng)}
    return (
        params,
        regression(lambda p, x: x @ p["w"] + p["b"]),
        pairs(rng, (4, 5), (4,)),
    )


@model
def dense_vector_weight_one_row(rng):
    return normal(rng, 5), regression(lambda w, x: w @ x), pairs(rng, (5,), ())


@model
def dense_cross_entropy(rng):
    def loss_fn(params, batch):
        logits = mlp(params, batch["x"])
        picked = jnp.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)

    batch = {"x": inputs(rng, 4, 5), "label": ids(rng, 3, 4)}
    return mlp_params(rng, [5, 6, 3]), loss_fn, batch


@model(promotes=True)
def dense_optax_loss_of_one_example(rng):
    def loss_fn(params, batch):
        logits = mlp(params, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    batch = {"x": inputs(rng, 5), "label": ids(rng, 3)}
    return mlp_params(rng, [5, 6, 3]), loss_fn, batch


@model
def dense_transposed_weight(rng):
    params = {"one": weight(rng, 7, 5), "two": weight(rng, 3, 7)}

    def predict(p, x):
        return jnp.tanh(x @ p["one"].T) @ jnp.transpose(p["two"], (1, 0))

    return params, regression(predict), pairs(rng, (4, 5), (4, 3))


@model
def dense_transposed_weight_one_row(rng):
    params = {"one": weight(rng, 7, 5), "two": weight(rng, 3, 7)}

    def predict(p, x):
        return jnp.tanh(x @ p["one"].T) @ p["two"].T

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def dense_weight_on_the_left(rng):
    params = {"one": weight(rng, 7, 5), "two": weight(rng, 3, 7)}

    def predict(p, x):
        return p["two"] @ jnp.tanh(p["one"] @ x)

    return params, regression(predict), pairs(rng, (5, 4), (3, 4))


@model
def einsum_oi_i(rng):
    params = {"one": weight(rng, 7, 5), "two": weight(rng, 3, 7)}

    def predict(p, x):
        hidden = jnp.tanh(jnp.einsum("oi,i->o", p["one"], x))
        return jnp.einsum("oi,i->o", p["two"], hidden)

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def einsum_bi_io(rng):
    params = {"one": weight(rng, 5, 7), "two": weight(rng, 7, 3)}

    def predict(p, x):
        hidden = jnp.tanh(jnp.einsum("bi,io->bo", x, p["one"]))
        # The weight comes first and the output transposed.
        return jnp.einsum("io,bi->ob", p["two"], hidden)

    return params, regression(predict), pairs(rng, (4, 5), (3, 4))


@model
def einsum_three_operands(rng):
    params = {"u": weight(rng, 5, 4), "v": weight(rng, 4, 3)}

    def predict(p, x):
        return jnp.einsum("bi,ir,ro->bo", x, p["u"], p["v"])

    return params, regression(predict), pairs(rng, (4, 5), (4, 3))


@model
def einsum_reduced_axes(rng):
    # Axes that occur in one operand only are summed before the product.
    params = {"w": normal(rng, 5, 3, 2)}
    return (
        params,
        regression(lambda p, x: jnp.einsum("bti,iok->bo", x, p["w"])),
        pairs(rng, (4, 2, 5), (4, 3)),
    )


@model
def einsum_elementwise_axes(rng):
    # Weight and input share an axis that stays: a batch axis of the dot_general.
    params = {"scale": normal(rng, 5), "mix": normal(rng, 3, 5)}

    def predict(p, x):
        return jnp.einsum("bi,i,oi->bo", x, p["scale"], p["mix"])

    return params, regression(predict), pairs(rng, (4, 5), (4, 3))


@model
def dense_over_four_axes(rng):
    params = {"w": weight(rng, 4, 3), "b": normal(rng, 3)}

    def predict(p, x):
        return x @ p["w"] + p["b"][None, None, None]

    return params, regression(predict), pairs(rng, (2, 3, 2, 4), (2, 3, 2, 3))


@model
def dot_general_contracting_leading_axes(rng):
    params = {"w": weight(rng, 3, 5, fan_in=5)}

    def predict(p, x):
        return lax.dot_general(x, p["w"], (((0,), (1,)), ((), ())))

    return params, regression(predict), pairs(rng, (5, 4), (4, 3))


@model
def tensordot_over_two_axes(rng):
    params = {"w": weight(rng, 3, 2, 4)}

    def predict(p, x):
        return jnp.tensordot(x, p["w"], axes=((2, 1), (0, 1)))

    return params, regression(predict), pairs(rng, (5, 2, 3), (5, 4))


@model
def dense_general_multi_head(rng):
    params = {
        "in": weight(rng, 6, 2, 3, fan_in=6),
        "in_bias": normal(rng, 2, 3),
        "out": weight(rng, 2, 3, 6),
        "out_bias": normal(rng, 6),
    }

    def predict(p, x):
        heads = jnp.einsum("bsd,dhk->bshk", x, p["in"]) + p["in_bias"][None, None]
        return (
            jnp.einsum("bshk,hkd->bsd", jnp.tanh(heads), p["out"])
            + p["out_bias"][None, None]
        )

    return params, regression(predict), pairs(rng, (2, 4, 6), (2, 4, 6))


@model
def dense_of_every_head(rng):
    # The weight has a batch axis: one matrix per head.
    params = {"w": weight(rng, 2, 5, 3, fan_in=5), "v": weight(rng, 2, 3, 2, fan_in=3)}

    def predict(p, x):
        hidden = jnp.tanh(jnp.einsum("hbi,hio->hbo", x, p["w"]))
        return jnp.einsum("hbi,hio->bho", hidden, p["v"])

    return params, regression(predict), pairs(rng, (2, 4, 5), (4, 2, 2))


@model
def dense_of_every_head_one_row(rng):
    params = {"w": weight(rng, 2, 5, 3, fan_in=5)}

    def predict(p, x):
        return jnp.tanh(jnp.einsum("hi,hio->ho", x, p["w"]))

    return params, regression(predict), pairs(rng, (2, 5), (2, 3))


@model
def bilinear(rng):
    params = {"w": weight(rng, 5, 4), "b": normal(rng)}

    def loss_fn(p, batch):
        return jnp.square(batch["x"] @ p["w"] @ batch["y"] + p["b"])

    return params, loss_fn, pairs(rng, (5,), (4,))


@model
def bilinear_several_rows(rng):
    params = {"w": weight(rng, 3, 5, 4, fan_in=20)}

    def loss_fn(p, batch):
        y = jnp.einsum("bi,kij,bj->bk", batch["x"], p["w"], batch["y"])
        return jnp.mean(jnp.tanh(y))

    return params, loss_fn, pairs(rng, (4, 5), (4, 4))


@model
def outer_product(rng):
    params = {"w": normal(rng, 3)}

    def predict(p, x):
        return jnp.tanh(jnp.outer(p["w"], x))

    return params, regression(predict), pairs(rng, (5,), (3, 5))


@model
def dense_rank_one_in_a_sum_of_losses(rng):
    # One row each, but twice: two losses of the same output.
    def loss_fn(params, batch):
        y = mlp(params, batch["x"])
        return mse(y, batch["y"]) + 0.1 * jnp.sum(jnp.abs(y))

    return mlp_params(rng, [5, 7, 3]), loss_fn, pairs(rng, (5,), (3,))


# --------------------------------------------------------------------------------------
# Convolutions.


def conv(x, kernel, strides=None, padding="SAME", **settings):
    """Channels last, any number of spatial axes."""
    rank = x.ndim - 2
    spatial = "DHW"[-rank:]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides or (1,) * rank,
        padding,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        **settings,
    )


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

    shape = jax.eval_shape(forward, params, jnp.zeros(x_shape)).shape
    top = mix(rng, shape)

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
        y = jax.nn.relu(conv(x, p["conv"]) + p["bias"].reshape(1, 1, 1, 4))
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


# --------------------------------------------------------------------------------------
# Embeddings and gathers.


def lookup_case(rng, tokens, lookup, rows=7):
    params = {"table": normal(rng, rows, 4), "w": weight(rng, 4, 3)}
    shape = jax.eval_shape(lookup, params["table"], tokens[0]).shape
    top = mix(rng, (*shape[:-1], 3))

    def loss_fn(params, tokens):
        return top(jnp.tanh(lookup(params["table"], tokens)) @ params["w"])

    return params, loss_fn, tokens


@model
def embedding_take(rng):
    return lookup_case(
        rng, ids(rng, 7, 5), lambda table, tokens: jnp.take(table, tokens, axis=0)
    )


@model
def embedding_repeated_ids(rng):
    # Only three of seven rows in use: most environments repeat themselves.
    return lookup_case(rng, ids(rng, 3, 5), lambda table, tokens: table[tokens])


@model
def embedding_one_id(rng):
    return lookup_case(rng, ids(rng, 3), lambda table, tokens: table[tokens])


@model
def embedding_id_matrix(rng):
    return lookup_case(rng, ids(rng, 7, 2, 3), lambda table, tokens: table[tokens])


@model
def embedding_out_of_range_ids(rng):
    # Dropped by mode fill, as nothing was looked up; clipped by the other.
    def lookup(table, tokens):
        filled = table.at[tokens].get(mode="fill", fill_value=0)
        return filled + 2 * table.at[tokens].get(mode="clip")

    return lookup_case(rng, ids(rng, 12, 5), lookup)


@model
def embedding_clipped_ids(rng):
    return lookup_case(
        rng,
        ids(rng, 12, 5),
        lambda table, tokens: jnp.take(table, tokens, axis=0, mode="clip"),
    )


@model
def embedding_filled_ids(rng):
    return lookup_case(
        rng,
        ids(rng, 12, 5),
        lambda table, tokens: table.at[tokens].get(mode="fill", fill_value=0.5),
    )


@model
def embedding_negative_ids(rng):
    return lookup_case(rng, ids(rng, 7, 5, low=-7), lambda table, tokens: table[tokens])


@model
def embedding_wrapped_ids(rng):
    return lookup_case(
        rng,
        ids(rng, 15, 5, low=-15),
        lambda table, tokens: jnp.take(table, tokens, axis=0, mode="wrap"),
    )


@model
def embedding_of_columns(rng):
    def lookup(table, tokens):
        return table[:, tokens].T[:, :4]

    return lookup_case(rng, ids(rng, 4, 5), lookup)


@model
def embedding_one_hot(rng):
    def lookup(table, tokens):
        return jax.nn.one_hot(tokens, 7, dtype=jnp.float32) @ table

    return lookup_case(rng, ids(rng, 7, 5), lookup)


@model
def embedding_one_hot_one_id(rng):
    def lookup(table, tokens):
        return jax.nn.one_hot(tokens, 7, dtype=jnp.float32) @ table

    return lookup_case(rng, ids(rng, 7), lookup)


@model
def embedding_bag(rng):
    def lookup(table, tokens):
        return jnp.sum(table[tokens], axis=0)

    return lookup_case(rng, ids(rng, 7, 5), lookup)


@model
def embedding_with_positions(rng):
    params = {"token": normal(rng, 7, 4), "position": normal(rng, 8, 4)}
    top = mix(rng, (2, 5, 4))

    def loss_fn(p, tokens):
        x = jnp.take(p["token"], tokens, axis=0)
        return top(x + p["position"][None, : tokens.shape[1]])

    return params, loss_fn, ids(rng, 7, 2, 5)


@model
def gather_of_a_scalar_per_example(rng):
    # A bias for each user, and one for each pair.
    params = {"user": normal(rng, 5), "pair": normal(rng, 5, 3)}

    def loss_fn(p, batch):
        user, item = batch["user"], batch["item"]
        return mse(p["user"][user] + p["pair"][user, item], batch["y"])

    batch = {"user": ids(rng, 5, 4), "item": ids(rng, 3, 4), "y": inputs(rng, 4)}
    return params, loss_fn, batch


@model
def gather_take_along_axis(rng):
    params = {"w": normal(rng, 4, 5)}

    def loss_fn(p, batch):
        picked = jnp.take_along_axis(p["w"], batch["i"][:, None], axis=1)[:, 0]
        return mse(jnp.tanh(picked), batch["y"])

    return params, loss_fn, {"i": ids(rng, 5, 4), "y": inputs(rng, 4)}


@model
def scatter_of_a_parameter(rng):
    params = {"w": normal(rng, 3, 2)}
    top = mix(rng, (6, 2))

    def loss_fn(p, batch):
        canvas = batch["x"].at[batch["i"]].add(p["w"])
        return top(jnp.tanh(canvas))

    return params, loss_fn, {"x": inputs(rng, 6, 2), "i": ids(rng, 6, 3)}


@model
def matrix_factorisation(rng):
    params = {"user": normal(rng, 5, 3), "item": normal(rng, 6, 3)}

    def loss_fn(p, batch):
        dot = jnp.sum(p["user"][batch["user"]] * p["item"][batch["item"]], axis=-1)
        return mse(dot, batch["y"])

    batch = {"user": ids(rng, 5, 4), "item": ids(rng, 6, 4), "y": inputs(rng, 4)}
    return params, loss_fn, batch


@model
def mixture_of_experts(rng):
    # The router is a plain use of its weight; each example gathers an expert's matrix.
    params = {"router": weight(rng, 5, 3), "experts": weight(rng, 3, 5, 4, fan_in=5)}

    def predict(p, x):
        gate = jax.nn.softmax(x @ p["router"], axis=-1)
        best = jnp.argmax(gate, axis=-1)
        y = jnp.einsum("bi,bio->bo", x, p["experts"][best])
        return y * jnp.max(gate, axis=-1, keepdims=True)

    return params, regression(predict), pairs(rng, (4, 5), (4, 4))


@model
def mixture_of_experts_one_example(rng):
    params = {"experts": weight(rng, 3, 5, 4, fan_in=5), "bias": normal(rng, 3, 4)}

    def loss_fn(p, batch):
        y = batch["x"] @ p["experts"][batch["i"]] + p["bias"][batch["i"]]
        return mse(y, batch["y"])

    return params, loss_fn, {**pairs(rng, (5,), (4,)), "i": ids(rng, 3)}


# --------------------------------------------------------------------------------------
# Biases, scales, normalisation.


def normalise(x, axis, eps=1e-5):
    mean = jnp.mean(x, axis=axis, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=axis, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + eps)


@model
def bias_only(rng):
    return (
        normal(rng, 4),
        regression(lambda b, x: jnp.tanh(x + b)),
        pairs(rng, (4,), (4,)),
    )


@model
def bias_and_scale_broadcast(rng):
    params = {"scale": normal(rng, 4), "bias": normal(rng, 1, 4), "row": normal(rng, 3)}

    def predict(p, x):
        y = x * p["scale"][None] + p["bias"]
        return jnp.tanh(y + p["row"][:, None])

    return params, regression(predict), pairs(rng, (3, 4), (3, 4))


@model
def scale_under_explicit_broadcasts(rng):
    params = {"scale": normal(rng, 4), "shift": normal(rng, 3)}

    def predict(p, x):
        y = x * jnp.broadcast_to(p["scale"], (2, 3, 4))
        y = y - lax.broadcast_in_dim(p["shift"], (2, 3, 4), (1,))
        return jnp.tanh(y)

    return params, regression(predict), pairs(rng, (2, 3, 4), (2, 3, 4))


@model
def division_by_a_parameter(rng):
    params = {"scale": 2 + jnp.abs(normal(rng, 4)), "shift": normal(rng, 4)}

    def predict(p, x):
        return jnp.tanh((p["shift"][None] - x) / p["scale"][None])

    return params, regression(predict), pairs(rng, (3, 4), (3, 4))


@model
def scalar_parameters(rng):
    params = {"a": jnp.float32(0.5), "b": jnp.float32(-0.2), "log_c": jnp.float32(0.1)}

    def predict(p, x):
        return p["a"] * jnp.tanh(x + p["b"]) + jnp.exp(p["log_c"])

    return params, regression(predict), pairs(rng, (3,), (3,))


@model
def scalar_parameter_and_scalar_example(rng):
    def loss_fn(w, x):
        return jnp.sin(w * x)

    return jnp.float32(0.5), loss_fn, inputs(rng)


def norm_case(rng, axis, scale_shape, x_shape=(3, 4, 6)):
    features = x_shape[-1]
    params = {
        "in": weight(rng, features, features),
        "scale": normal(rng, *scale_shape),
        "bias": normal(rng, *scale_shape),
        "out": weight(rng, features, 2),
    }

    def predict(p, x):
        lead = (None,) * (len(x_shape) - len(scale_shape))
        y = normalise(x @ p["in"], axis) * p["scale"][lead] + p["bias"][lead]
        return jnp.tanh(y) @ p["out"]

    return params, regression(predict), pairs(rng, x_shape, (*x_shape[:-1], 2))


@model
def layer_norm(rng):
    return norm_case(rng, -1, (6,))


@model
def layer_norm_one_row(rng):
    return norm_case(rng, -1, (6,), (6,))


@model
def layer_norm_of_two_axes(rng):
    return norm_case(rng, (-2, -1), (4, 6))


@model
def batch_norm_of_own_examples(rng):
    return norm_case(rng, (0, 1), (6,))


@model
def group_norm(rng):
    params = {
        "k": weight(rng, 3, 3, 2, 4),
        "scale": normal(rng, 4),
        "b": normal(rng, 4),
    }

    def predict(p, x):
        y = conv(x, p["k"])
        grouped = normalise(y.reshape(*y.shape[:3], 2, 2), (1, 2, 4))
        y = grouped.reshape(y.shape)
        return jnp.tanh(y * p["scale"].reshape(1, 1, 1, 4) + p["b"].reshape(1, 1, 1, 4))

    return params, regression(predict), pairs(rng, (2, 4, 4, 2), (2, 4, 4, 4))


@model
def rms_norm(rng):
    params = {"scale": normal(rng, 6), "w": weight(rng, 6, 3)}

    def predict(p, x):
        size = lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return (x * size * (1 + p["scale"][None])) @ p["w"]

    return params, regression(predict), pairs(rng, (4, 6), (4, 3))


@model
def prelu(rng):
    params = {"w": weight(rng, 5, 4), "alpha": normal(rng, 4)}

    def predict(p, x):
        y = x @ p["w"]
        return jnp.where(y > 0, y, p["alpha"][None] * y)

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


# --------------------------------------------------------------------------------------
# Functions of parameters alone, and several uses.


@model
def weight_norm(rng):
    params = {"v": normal(rng, 5, 4), "g": normal(rng, 4)}

    def predict(p, x):
        norm = jnp.sqrt(jnp.sum(jnp.square(p["v"]), axis=0, keepdims=True))
        return x @ (p["g"][None] * p["v"] / norm)

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


@model
def weight_standardised_conv(rng):
    params = {"k": normal(rng, 3, 3, 2, 3)}

    def predict(p, x):
        return conv(x, normalise(p["k"], (0, 1, 2)))

    return params, regression(predict), pairs(rng, (2, 4, 4, 2), (2, 4, 4, 3))


@model
def spectral_norm_by_power_iteration(rng):
    params = {"w": normal(rng, 5, 4)}

    def predict(p, x):
        u = jnp.ones(5) / jnp.sqrt(5.0)
        for _ in range(3):
            v = p["w"].T @ u
            v = v / jnp.linalg.norm(v)
            u = p["w"] @ v
            u = u / jnp.linalg.norm(u)
        u, v = lax.stop_gradient((u, v))
        return x @ (p["w"] / (u @ p["w"] @ v))

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


@model
def softplus_of_a_parameter(rng):
    params = {"w": normal(rng, 5, 3), "b": normal(rng, 3)}

    def predict(p, x):
        return x @ jax.nn.softplus(p["w"]) + jnp.square(p["b"])[None]

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def weight_scaled_by_a_constant(rng):
    # Linear in the parameter, one use: equalised learning rate, and a mask.
    params = {"w": normal(rng, 5, 3), "v": normal(rng, 3, 2)}
    mask = jnp.asarray(rng.integers(0, 2, size=(3, 2)), jnp.float32)

    def predict(p, x):
        return jnp.tanh(x @ (p["w"] * -0.3)) @ (p["v"] * mask)

    return params, regression(predict), pairs(rng, (5,), (2,))


@model
def orthogonal_by_cayley(rng):
    params = {"w": normal(rng, 4, 4)}

    def predict(p, x):
        # Not `w - w.T`: the gradient of its diagonal is a difference of equals, which
        # is zero only where the compiler rounds both alike.
        upper = 0.3 * jnp.triu(p["w"], 1)
        skew = upper - upper.T
        return x @ jnp.linalg.solve(jnp.eye(4) + skew, jnp.eye(4) - skew)

    return params, regression(predict), pairs(rng, (3, 4), (3, 4))


@model
def gaussian_likelihood_by_cholesky(rng):
    params = {"root": normal(rng, 3, 3), "mean": normal(rng, 3)}

    def loss_fn(p, x):
        covariance = p["root"] @ p["root"].T + jnp.eye(3)
        root = jnp.linalg.cholesky(covariance)
        white = jax.scipy.linalg.solve_triangular(
            root, (x - p["mean"][None]).T, lower=True
        )
        log_det = jnp.sum(jnp.log(jnp.diagonal(root)))
        return 0.5 * jnp.mean(jnp.sum(jnp.square(white), axis=0)) + log_det

    return params, loss_fn, inputs(rng, 4, 3)


@model
def unused_parameter(rng):
    params = {"used": weight(rng, 5, 3), "unused": normal(rng, 2, 2), "none": None}
    return params, regression(lambda p, x: x @ p["used"]), pairs(rng, (5,), (3,))


@model
def parameter_without_components(rng):
    params = {"w": weight(rng, 5, 3), "empty": jnp.zeros((0, 3)), "more": jnp.zeros(0)}

    def predict(p, x):
        w = jnp.concatenate([p["w"], p["empty"]])
        return x @ w + jnp.sum(p["more"])

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def parameter_used_but_without_effect(rng):
    # It reaches the output through an integer, a comparison and a product with zero.
    params = {"w": weight(rng, 5, 3), "t": normal(rng, 3)}

    def predict(p, x):
        y = x @ p["w"]
        steps = jnp.floor(p["t"]).astype(jnp.int32).astype(jnp.float32)
        y = jnp.where(y > p["t"][None], y, 0.5 * y)
        return y + steps[None] + 0.0 * p["t"][None]

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def dense_used_twice(rng):
    params = {"w": weight(rng, 5, 5), "b": normal(rng, 5)}

    def predict(p, x):
        y = jnp.tanh(x @ p["w"] + p["b"])
        return y @ p["w"] + p["b"]

    return params, regression(predict), pairs(rng, (5,), (5,))


@model
def dense_used_twice_beside_each_other(rng):
    # A siamese net: both uses see inputs of their own, at one row each.
    def loss_fn(params, batch):
        left, right = mlp(params, batch["x"]), mlp(params, batch["y"])
        return jnp.sum(jnp.square(left - right)) - 0.1 * jnp.sum(left * right)

    return mlp_params(rng, [5, 4, 3]), loss_fn, pairs(rng, (5,), (5,))


@model
def dense_used_transposed_as_well(rng):
    params = {"w": weight(rng, 5, 3), "b": normal(rng, 5)}

    def predict(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T + p["b"]

    return params, regression(predict), pairs(rng, (5,), (5,))


@model
def conv_used_twice(rng):
    params = {"k": weight(rng, 3, 3, 2, 2)}

    def predict(p, x):
        return conv(jnp.tanh(conv(x, p["k"])), p["k"])

    return params, regression(predict), pairs(rng, (2, 4, 4, 2), (2, 4, 4, 2))


@model
def embedding_used_as_output_too(rng):
    params = {"table": normal(rng, 6, 4)}

    def loss_fn(p, tokens):
        logits = jnp.tanh(p["table"][tokens[:-1]]) @ p["table"].T
        target = jax.nn.one_hot(tokens[1:], 6, dtype=jnp.float32)
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), axis=-1))

    return params, loss_fn, ids(rng, 6, 5)


@model
def parameter_shared_by_aliasing(rng):
    # One array under two names is two parameters.
    shared = weight(rng, 4, 4)
    params = {"one": shared, "two": shared}

    def predict(p, x):
        return jnp.tanh(x @ p["one"]) @ p["two"]

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def regulariser_beside_the_model(rng):
    def loss_fn(params, batch):
        penalty = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
        return mse(mlp(params, batch["x"]), batch["y"]) + 0.05 * penalty

    return mlp_params(rng, [5, 7, 3]), loss_fn, pairs(rng, (5,), (3,))


@model
def regulariser_only(rng):
    # The gradient is the same in all environments and nothing depends on the batch.
    def loss_fn(params, batch):
        del batch
        return jnp.sum(jnp.square(params["w"])) + jnp.sum(jnp.abs(params["b"]))

    return {"w": normal(rng, 3, 4), "b": normal(rng, 4)}, loss_fn, inputs(rng, 2)


@model
def regulariser_weighed_by_the_batch(rng):
    def loss_fn(params, strength):
        return strength * jnp.sum(jnp.square(params["w"]))

    return {"w": normal(rng, 3, 4)}, loss_fn, inputs(rng)


@model
def reshaped_parameter(rng):
    params = {
        "flat": weight(rng, 15, fan_in=5),
        "square": weight(rng, 2, 2, 3, fan_in=3),
    }

    def predict(p, x):
        hidden = jnp.tanh(x @ p["flat"].reshape(5, 3))
        return hidden @ p["square"].reshape(4, 3).T

    return params, regression(predict), pairs(rng, (5,), (4,))


@model
def everything_in_one_flat_vector(rng):
    tree = mlp_params(rng, [4, 5, 3])
    flat, unravel = jax.flatten_util.ravel_pytree(tree)

    def predict(p, x):
        return mlp(unravel(p), x)

    return flat, regression(predict), pairs(rng, (4,), (3,))


@model
def concatenated_parameters(rng):
    params = {
        "left": weight(rng, 5, 2),
        "right": weight(rng, 5, 2),
        "b": normal(rng, 2),
    }

    def predict(p, x):
        w = jnp.concatenate([p["left"], p["right"]], axis=1)
        b = jnp.concatenate([p["b"], jnp.ones(2)])
        return x @ w + b

    return params, regression(predict), pairs(rng, (5,), (4,))


@model
def stacked_parameters(rng):
    params = [weight(rng, 4, 4), weight(rng, 4, 4), weight(rng, 4, 4)]

    def predict(p, x):
        for w in jnp.stack(p):
            x = jnp.tanh(x @ w)
        return x

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def bias_as_an_extra_row(rng):
    params = {"w": weight(rng, 5, 3)}

    def predict(p, x):
        return jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1) @ p["w"]

    return params, regression(predict), pairs(rng, (3, 4), (3, 3))


@model
def sliced_parameter(rng):
    params = {"w": weight(rng, 6, 5)}

    def predict(p, x):
        # Two disjoint parts, each used once, and a row that nobody uses.
        return jnp.tanh(x @ p["w"][:4, :3]) @ p["w"][4:5, 2:].T

    return params, regression(predict), pairs(rng, (4,), (1,))


@model
def dynamic_slice_of_a_parameter(rng):
    params = {"w": normal(rng, 6, 3)}

    def loss_fn(p, batch):
        part = lax.dynamic_slice_in_dim(p["w"], batch["start"], 2, axis=0)
        return mse(batch["x"] @ part, batch["y"])

    batch = {**pairs(rng, (3, 2), (3, 3)), "start": ids(rng, 5)}
    return params, loss_fn, batch


@model
def padded_parameter(rng):
    params = {"w": normal(rng, 3, 2)}

    def predict(p, x):
        return x @ jnp.pad(p["w"], ((1, 1), (0, 1)), constant_values=0.5)

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def low_rank_adapter(rng):
    params = {"w": weight(rng, 5, 4), "a": weight(rng, 5, 2), "b": normal(rng, 2, 4)}

    def predict(p, x):
        return x @ (p["w"] + 0.5 * p["a"] @ p["b"])

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


@model
def hypernetwork(rng):
    params = {"generator": weight(rng, 3, 20), "bias": normal(rng, 20)}

    def loss_fn(p, batch):
        w = jnp.tanh(batch["task"] @ p["generator"] + p["bias"]).reshape(5, 4)
        return mse(batch["x"] @ w, batch["y"])

    batch = {**pairs(rng, (3, 5), (3, 4)), "task": inputs(rng, 3)}
    return params, loss_fn, batch


@model
def model_of_an_inner_gradient_step(rng):
    # As in MAML: the adapted weight is a function of parameter and batch together.
    params = {"w": weight(rng, 5, 3)}

    def loss_fn(p, batch):
        def inner(w):
            return mse(jnp.tanh(batch["x"][:2] @ w), batch["y"][:2])

        adapted = p["w"] - 0.1 * jax.grad(inner)(p["w"])
        return mse(jnp.tanh(batch["x"][2:] @ adapted), batch["y"][2:])

    return params, loss_fn, pairs(rng, (4, 5), (4, 3))


@model
def cumulative_sum_of_a_parameter(rng):
    params = {"steps": normal(rng, 5)}

    def predict(p, x):
        return jnp.sum(jax.nn.relu(x[:, None] - jnp.cumsum(p["steps"])[None]), axis=1)

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def sorted_parameter(rng):
    params = {"w": normal(rng, 5)}
    return params, regression(lambda p, x: jnp.sort(p["w"]) * x), pairs(rng, (5,), (5,))


@model
def sorted_activations(rng):
    params = {"w": weight(rng, 5, 6)}

    def predict(p, x):
        return jnp.sort(x @ p["w"], axis=-1)

    return params, regression(predict), pairs(rng, (3, 5), (3, 6))


@model
def stopped_gradient(rng):
    params = {"w": weight(rng, 5, 5), "target": weight(rng, 5, 5)}

    def loss_fn(p, x):
        online = jnp.tanh(x @ p["w"])
        target = lax.stop_gradient(jnp.tanh(x @ p["target"]))
        frozen = x @ lax.stop_gradient(p["w"])
        return mse(online, target) + 0.1 * jnp.mean(online * frozen)

    return params, loss_fn, inputs(rng, 3, 5)


@model
def straight_through_quantisation(rng):
    params = {"w": normal(rng, 5, 3)}

    def predict(p, x):
        rounded = jnp.round(2 * p["w"]) / 2
        return x @ (p["w"] + lax.stop_gradient(rounded - p["w"]))

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def polynomial_of_a_scalar(rng):
    def loss_fn(w, batch):
        return mse(w**3 - 2 * w**2 * batch["x"] + w, batch["y"])

    return jnp.float32(0.7), loss_fn, pairs(rng, (4,), (4,))


# --------------------------------------------------------------------------------------
# Attention and recurrence.


def attention(q, k, v, causal=True):
    """[batch, time, head, feature]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if causal:
        time = q.shape[1]
        mask = jnp.tril(jnp.ones((time, time), bool))[None, None]
        scores = jnp.where(mask, scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def transformer_params(rng, vocabulary=7, width=6, heads=2, layers=2, time=5):
    def layer():
        return {
            "norm": jnp.abs(normal(rng, width)),
            "q": weight(rng, width, heads, width // heads, fan_in=width),
            "k": weight(rng, width, heads, width // heads, fan_in=width),
            "v": weight(rng, width, heads, width // heads, fan_in=width),
            "o": weight(rng, heads, width // heads, width),
            "norm_2": jnp.abs(normal(rng, width)),
            "up": weight(rng, width, 2 * width),
            "up_bias": normal(rng, 2 * width),
            "down": weight(rng, 2 * width, width),
        }

    return {
        "embedding": normal(rng, vocabulary, width),
        "position": normal(rng, time, width),
        "layers": [layer() for _ in range(layers)],
        "norm": jnp.abs(normal(rng, width)),
    }


def transformer_block(p, x):
    y = normalise(x, -1) * p["norm"][None, None]
    q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in "qkv")
    x = x + jnp.einsum("bthk,hkd->btd", attention(q, k, v), p["o"])
    y = normalise(x, -1) * p["norm_2"][None, None]
    return x + jax.nn.gelu(y @ p["up"] + p["up_bias"][None, None]) @ p["down"]


def language_model_loss(p, tokens, block=transformer_block, head=None):
    x = p["embedding"][tokens[:, :-1]] + p["position"][None, : tokens.shape[1] - 1]
    for layer in p["layers"]:
        x = block(layer, x)
    x = normalise(x, -1) * p["norm"][None, None]
    logits = x @ (p["embedding"].T if head is None else p[head])
    target = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1], dtype=jnp.float32)
    return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), axis=-1))


@model
def transformer_with_tied_embedding(rng):
    return transformer_params(rng), language_model_loss, ids(rng, 7, 2, 6)


@model
def transformer_with_a_head_and_remat(rng):
    params = {**transformer_params(rng, layers=1), "head": weight(rng, 6, 7)}
    loss_fn = functools.partial(
        language_model_loss, block=jax.checkpoint(transformer_block), head="head"
    )
    return params, loss_fn, ids(rng, 7, 1, 6)


@model
def transformer_scanned_layers(rng):
    params = transformer_params(rng)
    params["layers"] = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *params["layers"]
    )

    @jax.checkpoint
    def body(x, layer):
        return transformer_block(layer, x), None

    def loss_fn(p, tokens):
        x = p["embedding"][tokens] + p["position"][None]
        x, _ = lax.scan(body, x, p["layers"])
        return jnp.mean(jnp.sin(3 * normalise(x, -1) * p["norm"][None, None]))

    return params, loss_fn, ids(rng, 7, 2, 5)


@model
def attention_with_a_sliced_qkv_weight(rng):
    params = {"qkv": weight(rng, 6, 18), "b": normal(rng, 18), "out": weight(rng, 6, 6)}

    def predict(p, x):
        w, b = p["qkv"], p["b"]
        parts = [
            (x @ w[:, i : i + 6] + b[None, None, i : i + 6]).reshape(*x.shape[:2], 2, 3)
            for i in (0, 6, 12)
        ]
        return attention(*parts).reshape(x.shape) @ p["out"]

    # The key bias moves all scores of a query alike: its gradient is rounding.
    return params, regression(predict), pairs(rng, (2, 4, 6), (2, 4, 6))


@model
def attention_with_split_activations(rng):
    params = {"qkv": weight(rng, 6, 18), "out": weight(rng, 6, 6)}

    def predict(p, x):
        parts = jnp.split((x @ p["qkv"]).reshape(*x.shape[:2], 3, 2, 3), 3, axis=2)
        return attention(*(part[:, :, 0] for part in parts)).reshape(x.shape) @ p["out"]

    return params, regression(predict), pairs(rng, (1, 4, 6), (1, 4, 6))


@model
def attention_of_jax_nn(rng):
    params = {name: weight(rng, 6, 2, 3, fan_in=6) for name in "qkv"}

    def predict(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    return params, regression(predict), pairs(rng, (2, 4, 6), (2, 4, 2, 3))


@model
def attention_with_rotary_positions(rng):
    params = {name: weight(rng, 6, 1, 6, fan_in=6) for name in "qkv"}
    angles = jnp.arange(4.0)[:, None] * jnp.array([1.0, 0.3, 0.1])[None]

    def rotate(x):
        left, right = jnp.split(x, 2, axis=-1)
        cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
        return jnp.concatenate(
            [left * cos - right * sin, left * sin + right * cos], axis=-1
        )

    def predict(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        return attention(rotate(q), rotate(k), v)

    return params, regression(predict), pairs(rng, (2, 4, 6), (2, 4, 1, 6))


@model
def attention_with_a_learned_query(rng):
    # Parameters that start a computation: nothing of the batch enters before them.
    params = {
        "query": normal(rng, 2, 4),
        "k": weight(rng, 5, 4),
        "bias": normal(rng, 2, 3),
    }

    def predict(p, x):
        scores = jnp.einsum("qd,td->qt", p["query"], x @ p["k"]) + p["bias"]
        return jax.nn.softmax(scores, axis=-1) @ x

    return params, regression(predict), pairs(rng, (3, 5), (2, 5))


def gru_params(rng, features=3, width=4):
    return {
        "in": weight(rng, features, 3 * width),
        "hidden": weight(rng, width, 3 * width),
        "b": normal(rng, 3 * width),
        "out": weight(rng, width, 2),
    }


def gru_cell(p, h, x):
    gates_x, gates_h = x @ p["in"] + p["b"][None], h @ p["hidden"]
    rx, zx, nx = jnp.split(gates_x, 3, axis=-1)
    rh, zh, nh = jnp.split(gates_h, 3, axis=-1)
    r, z = jax.nn.sigmoid(rx + rh), jax.nn.sigmoid(zx + zh)
    return (1 - z) * jnp.tanh(nx + r * nh) + z * h


@model
def gru_by_scan(rng):
    def predict(p, x):
        def step(h, x):
            h = gru_cell(p, h, x)
            return h, h

        _, hs = lax.scan(step, jnp.zeros((x.shape[1], 4)), x)
        return hs @ p["out"]

    return gru_params(rng), regression(predict), pairs(rng, (5, 2, 3), (5, 2, 2))


@model
def gru_by_reversed_scan_with_remat(rng):
    def predict(p, x):
        @jax.checkpoint
        def step(h, x):
            return gru_cell(p, h, x), None

        h, _ = lax.scan(step, jnp.zeros((x.shape[1], 4)), x, reverse=True, unroll=2)
        return h @ p["out"]

    return gru_params(rng), regression(predict), pairs(rng, (5, 1, 3), (1, 2))


@model
def recurrence_unrolled(rng):
    params = {"in": weight(rng, 3, 4), "hidden": weight(rng, 4, 4)}

    def predict(p, x):
        h = jnp.zeros(4)
        for step in x:
            h = jnp.tanh(step @ p["in"] + h @ p["hidden"])
        return h

    return params, regression(predict), pairs(rng, (4, 3), (4,))


@model
def linear_recurrence_by_associative_scan(rng):
    params = {"decay": normal(rng, 3), "in": weight(rng, 3, 3)}

    def predict(p, x):
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), x.shape)

        def combine(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        return lax.associative_scan(combine, (decay, x @ p["in"]))[1]

    return params, regression(predict), pairs(rng, (5, 3), (5, 3))


@model
def scan_over_stacked_layers(rng):
    params = {"w": weight(rng, 3, 4, 4, fan_in=4), "b": normal(rng, 3, 4)}

    def predict(p, x):
        def body(x, layer):
            return jnp.tanh(x @ layer["w"] + layer["b"]), None

        return lax.scan(body, x, p)[0]

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def scan_with_parameters_in_the_carry(rng):
    params = {"w": weight(rng, 4, 4), "b": normal(rng, 4)}

    def predict(p, x):
        def body(carry, _):
            p, x = carry
            x = jnp.tanh(x @ p["w"] + p["b"][None])
            # The weight changes on the way.
            return ({"w": 0.9 * p["w"], "b": p["b"]}, x), None

        return lax.scan(body, (p, x), length=3)[0][1]

    return params, regression(predict), pairs(rng, (2, 4), (2, 4))


@model
def scan_with_an_unchanged_parameter_in_the_carry(rng):
    params = {"w": weight(rng, 4, 4)}

    def predict(p, x):
        def body(carry, x):
            return carry, jnp.tanh(x @ carry)

        return lax.scan(body, p["w"], x)[1]

    return params, regression(predict), pairs(rng, (3, 4), (3, 4))


@model
def scan_over_examples_of_one_use_each(rng):
    # One use in the program, as many as there are examples when it runs.
    params = {"w": weight(rng, 4, 3)}

    def loss_fn(p, batch):
        def body(total, pair):
            return total + jnp.sum(jnp.abs(pair["x"] @ p["w"] - pair["y"])), None

        return lax.scan(body, jnp.float32(0), batch)[0]

    return params, loss_fn, pairs(rng, (3, 4), (3, 3))


@model
def scan_of_length_one(rng):
    params = {"w": weight(rng, 1, 4, 3, fan_in=4), "v": weight(rng, 3, 3)}

    def predict(p, x):
        def body(_, w):
            return None, jnp.tanh(x @ w) @ p["v"]

        return lax.scan(body, None, p["w"])[1][0]

    return params, regression(predict), pairs(rng, (4,), (3,))


@model
def nested_scans(rng):
    params = {"outer": weight(rng, 2, 4, 4, fan_in=4), "inner": weight(rng, 4, 4)}

    def predict(p, x):
        def inner(h, _):
            return jnp.tanh(h @ p["inner"]), None

        def outer(h, w):
            h, _ = lax.scan(inner, h @ w, length=2)
            return h, None

        return lax.scan(outer, x, p["outer"])[0]

    return params, regression(predict), pairs(rng, (2, 4), (2, 4))


@model
def lax_map_over_examples(rng):
    def predict(params, x):
        return lax.map(functools.partial(mlp, params), x)

    return mlp_params(rng, [4, 5, 3]), regression(predict), pairs(rng, (3, 4), (3, 3))


# --------------------------------------------------------------------------------------
# Transformations and control flow inside the loss.


@model
def nested_jit(rng):
    @jax.jit
    def layer(p, x):
        return jnp.tanh(x @ p["w"] + p["b"])

    @jax.jit
    def predict(params, x):
        # The same cached function for two layers of equal shapes.
        for p in params:
            x = layer(p, x)
        return x

    return mlp_params(rng, [4, 4, 4, 4]), regression(predict), pairs(rng, (4,), (4,))


@model
def nested_jit_used_twice(rng):
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    params = {"w": weight(rng, 4, 4), "v": weight(rng, 4, 4)}

    def predict(p, x):
        return layer(p["v"], layer(p["w"], layer(p["w"], x)))

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def jit_that_returns_parameters(rng):
    # The parameter passes through a call and comes out as it was, beside a function.
    @jax.jit
    def prepare(p):
        return p["w"], jnp.square(p["w"]), p["b"]

    params = {"w": weight(rng, 5, 3), "b": normal(rng, 3)}

    def loss_fn(p, batch):
        w, squares, b = prepare(p)
        return mse(batch["x"] @ w + b, batch["y"]) + 0.1 * jnp.sum(squares)

    return params, loss_fn, pairs(rng, (5,), (3,))


@model
def remat_blocks(rng):
    @jax.checkpoint
    def block(p, x):
        return jnp.tanh(x @ p["w"] + p["b"])

    def predict(params, x):
        for p in params:
            x = block(p, x)
        return x

    return mlp_params(rng, [5, 4, 3]), regression(predict), pairs(rng, (5,), (3,))


@model
def remat_with_a_policy_and_a_closure(rng):
    params = {"one": weight(rng, 5, 4), "two": weight(rng, 4, 3)}

    def predict(p, x):
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

        @functools.partial(jax.checkpoint, policy=policy)
        def block(x):
            return jnp.tanh(x @ p["one"]) @ p["two"]

        return block(x)

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def custom_jvp_activation(rng):
    @jax.custom_jvp
    def activation(x, slope):
        return jnp.where(x > 0, x, slope * x)

    @activation.defjvp
    def _(primals, tangents):
        (x, slope), (dx, dslope) = primals, tangents
        # Not the true derivative: whoever differentiates the body is found out.
        return activation(x, slope), jnp.where(x > 0, 2 * dx, slope * dx + x * dslope)

    params = {"w": weight(rng, 5, 4), "slope": normal(rng)}

    def predict(p, x):
        return activation(x @ p["w"], p["slope"])

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


@model
def custom_vjp_dense(rng):
    @jax.custom_vjp
    def dense(w, x):
        return x @ w

    def forward(w, x):
        return dense(w, x), (w, x)

    def backward(residuals, cotangent):
        w, x = residuals
        # Not the true derivative, as above: clipped.
        return x.T @ jnp.clip(cotangent, -0.1, 0.1), cotangent @ w.T

    dense.defvjp(forward, backward)
    params = {"one": weight(rng, 5, 4), "two": weight(rng, 4, 3)}

    def predict(p, x):
        return dense(p["two"], jnp.tanh(dense(p["one"], x)))

    return params, regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def custom_vjp_with_static_arguments(rng):
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def scaled_gradient(x, scale):
        return x

    scaled_gradient.defvjp(
        lambda x, scale: (x, None), lambda scale, _, ct: (scale * ct,)
    )
    params = {"one": weight(rng, 5, 4), "two": weight(rng, 4, 3)}

    def predict(p, x):
        # The gradient of the first weight is turned around, of the second doubled.
        hidden = jnp.tanh(x @ scaled_gradient(p["one"], -1.0))
        return hidden @ scaled_gradient(p["two"], 2.0)

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def cond_on_the_batch(rng):
    params = {"one": weight(rng, 5, 3), "two": weight(rng, 5, 3)}

    def predict(p, x):
        return lax.cond(
            jnp.sum(x) > 0,
            lambda: jnp.tanh(x @ p["one"]),
            lambda: x @ p["two"] - 0.1 * (x @ p["one"]),
        )

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def cond_on_a_parameter(rng):
    params = {"w": weight(rng, 5, 3), "switch": jnp.float32(0.3)}

    def predict(p, x):
        return lax.cond(
            p["switch"] > 0,
            lambda w, x: p["switch"] * jnp.tanh(x @ w),
            lambda w, x: x @ w,
            p["w"],
            x,
        )

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def switch_between_experts(rng):
    params = [weight(rng, 5, 3), weight(rng, 5, 3), weight(rng, 5, 3)]

    def loss_fn(p, batch):
        branches = [lambda x, w=w: jnp.tanh(x @ w) for w in p]
        return mse(lax.switch(batch["i"], branches, batch["x"]), batch["y"])

    return params, loss_fn, {**pairs(rng, (2, 5), (2, 3)), "i": ids(rng, 3)}


@model
def fori_loop_with_static_bounds(rng):
    params = {"w": weight(rng, 4, 4), "b": normal(rng, 3, 4)}

    def predict(p, x):
        def body(i, x):
            return jnp.tanh(x @ p["w"] + p["b"][i])

        return lax.fori_loop(0, 3, body, x)

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def while_loop_on_values_without_gradient(rng):
    params = {"w": weight(rng, 4, 4)}

    def predict(p, x):
        # How long depends on batch and parameters; the result counts as a constant.
        w = lax.stop_gradient(p["w"])
        x = lax.while_loop(
            lambda state: (state[0] < 5) & (jnp.sum(jnp.square(state[1])) > 0.5),
            lambda state: (state[0] + 1, jnp.tanh(state[1] @ w)),
            (jnp.int32(0), lax.stop_gradient(x)),
        )[1]
        return x @ p["w"]

    return params, regression(predict), pairs(rng, (4,), (4,))


@model
def vmap_over_examples(rng):
    def predict(params, x):
        return jax.vmap(functools.partial(mlp, params))(x)

    return mlp_params(rng, [5, 4, 3]), regression(predict), pairs(rng, (3, 5), (3, 3))


@model
def vmap_over_an_ensemble(rng):
    params = {"w": weight(rng, 3, 5, 4, fan_in=5), "b": normal(rng, 3, 4)}

    def predict(p, x):
        each = jax.vmap(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), (0, None))(p, x)
        return jnp.mean(each, axis=0)

    return params, regression(predict), pairs(rng, (5,), (4,))


@model
def vmap_with_a_collective(rng):
    params = {"w": weight(rng, 5, 4), "scale": normal(rng, 4)}

    def predict(p, x):
        def one(x):
            y = x @ p["w"]
            return (y - lax.pmean(y, "example")) * p["scale"]

        return jax.vmap(one, axis_name="example")(x)

    return params, regression(predict), pairs(rng, (3, 5), (3, 4))


@model
def gradient_penalty(rng):
    params = mlp_params(rng, [5, 4, 1])

    def loss_fn(p, batch):
        def score(x):
            hidden = jnp.tanh(x @ p[0]["w"] + p[0]["b"])
            return (hidden @ p[1]["w"] + p[1]["b"])[0]

        values, slopes = jax.vmap(jax.value_and_grad(score))(batch)
        norms = jnp.sqrt(jnp.sum(jnp.square(slopes), axis=1))
        return jnp.mean(values) + jnp.mean(jnp.square(norms - 1))

    return params, loss_fn, inputs(rng, 3, 5)


@model
def hamiltonian_by_jvp(rng):
    params = {"w": weight(rng, 4, 4)}

    def loss_fn(p, batch):
        value, slope = jax.jvp(
            lambda x: jnp.tanh(x @ p["w"]), (batch["x"],), (batch["y"],)
        )
        return jnp.mean(jnp.square(value - slope))

    return params, loss_fn, pairs(rng, (2, 4), (2, 4))


@model
def penalty_on_the_parameters_gradient(rng):
    # As in IRM: the gradient of the loss with respect to a parameter, in the loss.
    params = {"w": weight(rng, 5, 3), "scale": jnp.float32(1.0)}

    def loss_fn(p, batch):
        def risk(scale):
            return mse(scale * jnp.tanh(batch["x"] @ p["w"]), batch["y"])

        return risk(p["scale"]) + jnp.square(jax.grad(risk)(p["scale"]))

    return params, loss_fn, pairs(rng, (3, 5), (3, 3))


# --------------------------------------------------------------------------------------
# Dtypes, unusual values, unusual batches.


# bfloat16 has 8 bits, and XLA keeps more of them where it fuses: two routes to the same
# gradient differ by a percent, and the signs of small components say nothing.
@model(rounding=5e-3, decided=0.3)
def bfloat16_compute_of_float32_parameters(rng):
    def predict(params, x):
        x = x.astype(jnp.bfloat16)
        for layer in jax.tree.map(lambda p: p.astype(jnp.bfloat16), params):
            x = jnp.tanh(x @ layer["w"] + layer["b"][None])
        return x.astype(jnp.float32)

    return mlp_params(rng, [5, 4, 3]), regression(predict), pairs(rng, (3, 5), (3, 3))


@model(rounding=5e-3, decided=0.3)
def bfloat16_compute_one_row(rng):
    def predict(params, x):
        x = x.astype(jnp.bfloat16)
        for layer in jax.tree.map(lambda p: p.astype(jnp.bfloat16), params):
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x.astype(jnp.float32)

    return mlp_params(rng, [5, 4, 3]), regression(predict), pairs(rng, (5,), (3,))


@model(rounding=5e-3, decided=0.3)
def bfloat16_products_summed_in_float32(rng):
    params = {"w": weight(rng, 5, 3), "k": weight(rng, 2, 1, 2)}

    def predict(p, x):
        y = jnp.matmul(
            x.astype(jnp.bfloat16),
            p["w"].astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
        y = conv(
            y[..., None].astype(jnp.bfloat16),
            p["k"].astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
        return jnp.tanh(y)

    return params, regression(predict), pairs(rng, (3, 5), (3, 3, 2))


@model(rounding=5e-3, decided=0.3)
def bfloat16_parameters(rng):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), mlp_params(rng, [5, 4, 3]))

    def loss_fn(params, batch):
        return mse(mlp(params, batch["x"].astype(jnp.bfloat16)), batch["y"]).astype(
            jnp.float32
        )

    batch = pairs(rng, (2, 5), (2, 3))
    return params, loss_fn, {**batch, "y": batch["y"].astype(jnp.bfloat16)}


@model(rounding=1e-3, decided=0.5)
def float16_parameters(rng):
    params = jax.tree.map(lambda p: p.astype(jnp.float16), mlp_params(rng, [5, 4, 3]))
    batch = jax.tree.map(lambda x: x.astype(jnp.float16), pairs(rng, (2, 5), (2, 3)))
    return params, regression(mlp), batch


@model(rounding=1e-3, decided=0.5)
def parameters_of_several_dtypes(rng):
    params = {"half": weight(rng, 5, 4).astype(jnp.float16), "full": weight(rng, 4, 3)}

    def predict(p, x):
        hidden = jnp.tanh(x @ p["half"].astype(jnp.float32))
        return hidden @ p["full"]

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def complex_intermediate(rng):
    params = {
        "real": weight(rng, 4, 3),
        "imag": weight(rng, 4, 3),
        "phase": normal(rng, 3),
    }

    def predict(p, x):
        y = lax.complex(x, jnp.flip(x, -1)) @ lax.complex(p["real"], p["imag"])
        y = y * jnp.exp(1j * lax.complex(p["phase"], jnp.zeros(3)))[None]
        return jnp.abs(y) + jnp.real(y)

    return params, regression(predict), pairs(rng, (2, 4), (2, 3))


@model
def fourier_layer(rng):
    params = {"real": normal(rng, 5), "imag": normal(rng, 5), "w": normal(rng, 8)}

    def predict(p, x):
        y = jnp.fft.rfft(x * p["w"]) * lax.complex(p["real"], p["imag"])
        return jnp.tanh(jnp.fft.irfft(y, 8))

    return params, regression(predict), pairs(rng, (8,), (8,))


@model
def logsumexp_and_norms(rng):
    params = {"w": weight(rng, 5, 4), "centres": normal(rng, 3, 4)}

    def loss_fn(p, x):
        y = x @ p["w"]
        distances = jnp.sum(jnp.square(y[:, None] - p["centres"][None]), axis=-1)
        return -jnp.mean(jax.nn.logsumexp(-distances, axis=1)) + jnp.linalg.norm(y)

    return params, loss_fn, inputs(rng, 3, 5)


@model(decided=0.0)
def inputs_of_zeros(rng):
    # No weight of the first layer has a gradient, in any environment.
    _, loss_fn, batch = dense_several_rows(rng)
    batch["x"] = jnp.zeros_like(batch["x"])
    return mlp_params(rng, [5, 7, 3]), loss_fn, batch


@model
def inputs_with_zero_components(rng):
    # Signs of zero: a bag of words leaves most rows of the weight alone.
    params, loss_fn, batch = dense_one_row(rng)
    mask = rng.integers(0, 2, size=batch["x"].shape).astype(np.float32)
    return params, loss_fn, {**batch, "x": batch["x"] * mask}


@model
def environment_with_a_gradient_of_zero(rng):
    params, plain, batch = dense_several_rows(rng)

    def loss_fn(params, batch):
        return batch["on"] * plain(params, batch)

    on = jnp.asarray([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    return params, loss_fn, {**batch, "on": on}


@model
def environments_that_cancel(rng):
    # One row each, in pairs of opposite gradients.
    def loss_fn(params, batch):
        return batch["side"] * jnp.sum(mlp(params, batch["x"]))

    x = normal(rng, NUM_ENVS // 2, 5)
    batch = {"x": jnp.repeat(x, 2, axis=0), "side": jnp.tile(jnp.array([1.0, -1]), 3)}
    return mlp_params(rng, [5, 7, 3]), loss_fn, batch


@model
def gradients_of_tiny_and_huge_environments(rng):
    # The smallest still votes.
    def loss_fn(params, batch):
        y = jnp.tanh(batch["x"] @ params["w"])
        return batch["size"] * jnp.sum(y * batch["y"])

    size = jnp.asarray([0.1, 1.0, 30.0, 0.1, 1.0, 0.1])
    return {"w": weight(rng, 5, 3)}, loss_fn, {**pairs(rng, (5,), (3,)), "size": size}


@model
def batch_of_numpy_integers_and_booleans(rng):
    params = {"w": weight(rng, 5, 3), "b": normal(rng, 3)}

    def loss_fn(p, batch):
        x = batch["count"].astype(jnp.float32) @ p["w"]
        return jnp.mean(jnp.where(batch["mask"], jnp.tanh(x + p["b"]), 0.1 * x))

    batch = {
        "count": rng.integers(-3, 4, size=(NUM_ENVS, 5)),
        "mask": rng.integers(0, 2, size=(NUM_ENVS, 3)).astype(bool),
    }
    return params, loss_fn, batch


@model
def random_keys_as_a_batch(rng):
    params = mlp_params(rng, [5, 4, 3])

    def loss_fn(params, batch):
        x = batch["x"] + 0.1 * jax.random.normal(batch["key"], batch["x"].shape)
        keep = jax.random.bernoulli(jax.random.fold_in(batch["key"], 1), 0.7, x.shape)
        return mse(mlp(params, jnp.where(keep, x / 0.7, 0)), batch["y"])

    keys = jax.random.split(jax.random.key(0), NUM_ENVS)
    return params, loss_fn, {**pairs(rng, (3, 5), (3, 3)), "key": keys}


@model(has_aux=True)
def loss_with_aux(rng):
    params = mlp_params(rng, [5, 4, 3])

    def loss_fn(params, batch):
        y = mlp(params, batch["x"])
        aux = {"y": y, "norm": jnp.sum(jnp.square(params[0]["w"])), "three": 3}
        return mse(y, batch["y"]), aux

    return params, loss_fn, pairs(rng, (2, 5), (2, 3))


@model(has_aux=True)
def loss_with_parameters_in_aux(rng):
    params = {"w": weight(rng, 5, 3)}

    def loss_fn(p, batch):
        y = batch["x"] @ p["w"]
        return mse(y, batch["y"]), {"w": p["w"], "key": batch["x"], "none": None}

    return params, loss_fn, pairs(rng, (5,), (3,))


Point = collections.namedtuple("Point", ["w", "b"])


@model
def parameters_in_named_tuples(rng):
    params = (Point(weight(rng, 5, 3), normal(rng, 3)), [Point(normal(rng, 3), None)])

    def predict(p, x):
        return jnp.tanh(x @ p[0].w + p[0].b) * p[1][0].w

    return params, regression(predict), pairs(rng, (5,), (3,))


@model
def optimization_barrier_and_names(rng):
    params = {"w": weight(rng, 5, 4), "v": weight(rng, 4, 3)}

    def predict(p, x):
        with jax.named_scope("block"):
            w, x = lax.optimization_barrier((p["w"], x))
            y = checkpoint_name(jnp.tanh(x @ w), "hidden")
        return y @ checkpoint_name(p["v"], "v")

    return params, regression(predict), pairs(rng, (5,), (3,))


# --------------------------------------------------------------------------------------
# Flax.


def linen_case(rng, module, x_shape):
    """Variables and a loss of a Linen module without state."""
    example = jnp.zeros(x_shape)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    params = jax.tree.map(lambda leaf: _draw(rng, leaf.shape), shapes)
    out = jax.eval_shape(lambda p, x: module.apply({"params": p}, x), params, example)
    top = mix(rng, out.shape)

    def loss_fn(params, batch):
        return top(module.apply({"params": params}, batch))

    return params, loss_fn, inputs(rng, *x_shape)


def _draw(rng, shape):
    return weight(rng, *shape) if len(shape) > 1 else normal(rng, *shape)


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
    params = jax.tree.map(lambda leaf: _draw(rng, leaf.shape), shapes)
    # Running statistics: read by nobody in training mode, but finite.
    rest = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), rest)
    x = inputs(rng, *x_shape) if draw is None else draw
    batch = {"x": x, **(more or {})}

    def forward(params, batch):
        # Copies of the variables: NNX changes none from outside of a trace.
        state = jax.tree.map(lambda leaf: leaf, rest)
        return call(nnx.merge(graph, params, state), batch)

    one = jax.tree.map(lambda leaf: leaf[0], batch)
    top = mix(rng, jax.eval_shape(forward, params, one).shape)

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
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
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
