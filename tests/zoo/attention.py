"""Attention."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.blocks import ids, normal, normalise, pairs, regression, weight
from tests.zoo.model import model


def attention(q, k, v, causal=True):
    """[batch, time, head, feature]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if causal:
        time = q.shape[1]
        mask = jnp.tril(jnp.ones((time, time), bool))[None, None]
        scores = jnp.where(mask, scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def projections(rng, width, heads):
    shape = (width, heads, width // heads)
    return {name: weight(rng, *shape, fan_in=width) for name in "qkv"}


def projected(p, x):
    return (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")


def transformer_params(rng, vocabulary=7, width=6, heads=2, layers=2, time=5):
    def layer():
        return {
            "norm": jnp.abs(normal(rng, width)),
            **projections(rng, width, heads),
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
    q, k, v = projected(p, y)
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
    # One block: several are in the models of scanned layers and of NNX.
    return transformer_params(rng, layers=1), language_model_loss, ids(rng, 7, 2, 6)


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
    params = projections(rng, 6, 2)

    def predict(p, x):
        q, k, v = projected(p, x)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    return params, regression(predict), pairs(rng, (2, 4, 6), (2, 4, 2, 3))


@model
def attention_with_rotary_positions(rng):
    params = projections(rng, 6, 1)
    angles = jnp.arange(4.0)[:, None] * jnp.array([1.0, 0.3, 0.1])[None]

    def rotate(x):
        left, right = jnp.split(x, 2, axis=-1)
        cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
        return jnp.concatenate(
            [left * cos - right * sin, left * sin + right * cos], axis=-1
        )

    def predict(p, x):
        q, k, v = projected(p, x)
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
