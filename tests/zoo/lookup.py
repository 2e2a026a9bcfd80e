"""Embeddings, gathers and scatters."""

import jax
import jax.numpy as jnp

from tests.zoo.blocks import (
    ids,
    inputs,
    mix,
    mse,
    normal,
    one_of,
    pairs,
    regression,
    weight,
)
from tests.zoo.model import model


def rows(table, tokens):
    return table[tokens]


def lookup_case(rng, tokens, lookup):
    params = {"table": normal(rng, 7, 4), "w": weight(rng, 4, 3)}
    shape = jax.eval_shape(lookup, params["table"], one_of(tokens)).shape
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
    return lookup_case(rng, ids(rng, 3, 5), rows)


@model
def embedding_one_id(rng):
    return lookup_case(rng, ids(rng, 3), rows)


@model
def embedding_id_matrix(rng):
    return lookup_case(rng, ids(rng, 7, 2, 3), rows)


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
    return lookup_case(rng, ids(rng, 7, 5, low=-7), rows)


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
