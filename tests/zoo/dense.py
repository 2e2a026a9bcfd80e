"""Dense layers."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tests.zoo.blocks import (
    ids,
    inputs,
    mlp,
    mlp_params,
    mse,
    normal,
    pairs,
    regression,
    two_weights,
    weight,
)
from tests.zoo.model import model


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
    params = two_weights(rng, 5, 7, 3)

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
