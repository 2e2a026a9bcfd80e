"""Inner products of sums of outer products, by every way to them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardvary
from hardvary.fused import rules
from hardvary.fused.rules import inner_products
from hardvary.fused.rules.scan import Scan
from tests.fused._answers import make_env_oracle
from tests.fused._models import build
from tests.fused.test_zoo import SIGNED, WEIGHTS, check_env_grads
from tests.zoo import compile_quickly, poison

GRAMIANS = [inner_products.gramian_by_rows, inner_products.gramian_by_tiles]
NORMS = [inner_products.square_norms_by_rows, inner_products.square_norms_by_tiles]
# Environments, batch, rows, inputs, outputs; columns that no tile divides among them.
SIZES = [
    (6, 1, 1, 3, 5),
    (4, 2, 3, 7, 2),
    (4, 1, 3, 7, 2),
    (1, 1, 2, 1, 1),
    (5, 3, 1, 2, 11),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_way_at_every_budget_equals_the_products_of_stacked_gradients(sizes):
    num_envs, batch, num_rows, inputs, outputs = sizes
    rng = np.random.default_rng(sizes)
    left = rng.normal(size=(num_envs, batch, num_rows, inputs))
    right = rng.normal(size=(num_envs, batch, num_rows, outputs))
    stacked = np.einsum("ebri,ebro->ebio", left, right).reshape(num_envs, -1)
    expected = stacked @ stacked.T

    @compile_quickly
    def run(left, right):
        return [
            (
                [way(left, right, elements) for way in GRAMIANS],
                [way(left, right, elements) for way in NORMS],
            )
            for elements in (0, 17, 40, 10**6)
        ]

    for gramians, squares in run(*(jnp.asarray(x, jnp.float32) for x in (left, right))):
        for gramian in gramians:
            np.testing.assert_allclose(gramian, expected, rtol=1e-4, atol=1e-4)
        for square in squares:
            np.testing.assert_allclose(square, np.diag(expected), rtol=1e-4)


@pytest.mark.parametrize("form", ["rows", "tiles", "held"])
@pytest.mark.parametrize(
    "name",
    [
        "dense_one_row",
        "dense_several_rows",
        "dense_of_every_head",
        "bilinear",
        "conv_2d_every_dilation",
        "conv_2d_depthwise",
        "gru_by_scan",
        "bfloat16_products_summed_in_float32",
    ],
)
def test_models_by_the_way_that_is_not_the_cheaper_one(name, form, monkeypatch):
    monkeypatch.setattr(rules, "SMALL", 0)
    monkeypatch.setattr(inner_products, "_cheaper", lambda *_: (form, 0))
    monkeypatch.setattr(Scan, "held", form == "held")
    monkeypatch.setattr(rules.Rule, "elements", lambda rule: 30)
    params, _, batch = build(name)
    batch = poison(batch, int(np.argmin(WEIGHTS)))
    result = compile_quickly(make_env_oracle(name))(params, batch, SIGNED, WEIGHTS)
    check_env_grads(name, result, WEIGHTS)


def test_the_way_is_chosen_by_multiplications():
    sizes = inner_products.Sizes(80, 1, 2, 512, 512)
    assert inner_products.gramian_form(sizes)[0] == "rows"
    many = inner_products.Sizes(16, 1, 256, 128, 512)
    assert inner_products.gramian_form(many) == (
        "tiles",
        128 * 512 * (16 * 256 + 16**2),
    )
    # One environment with all: its own rows alone.
    assert inner_products.norms_form(many)[1] < inner_products.gramian_form(many)[1]


def dense(params, x):
    return jnp.mean(jnp.square(jnp.sin(x @ params)))


def convolved(params, x):
    return jnp.mean(jnp.square(jax.lax.conv(x, params, (1, 1), "SAME")))


@pytest.mark.parametrize(
    ("loss_fn", "shape", "batch"),
    [(dense, (128, 64), (64, 16, 128)), (convolved, (64, 64, 3, 3), (64, 1, 64, 4, 4))],
    ids=["dense", "convolution"],
)
def test_gramian_and_norms_take_less_memory_than_stacked_gradients(
    loss_fn, shape, batch
):
    def ask(params, batch):
        grad = hardvary.env_grads(loss_fn)(params, batch)
        weights = 1 / grad.norms()
        return grad.gramian(), grad.combine(weights)

    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, batch)]
    compiled = compile_quickly(ask).lower(*arguments).compile()
    stacked = 4 * batch[0] * np.prod(shape)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * stacked


@pytest.mark.parametrize("loss_fn", [dense, convolved])
def test_gradients_of_many_rows_are_made_once_for_products_and_a_weighted_sum(loss_fn):
    shape, batch = {
        dense: ((300, 40), (8, 64, 300)),
        convolved: ((8, 8, 3, 3), (8, 4, 8, 12, 12)),
    }[loss_fn]

    def plain(params, batch):
        return jax.grad(lambda p: jax.vmap(loss_fn, (None, 0))(p, batch).sum())(params)

    def ask(params, batch):
        grad = hardvary.env_grads(loss_fn)(params, batch)
        return grad.combine(1 / jnp.sqrt(jnp.diagonal(grad.gramian())))

    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, batch)]
    (row,) = hardvary.explain(loss_fn, *arguments).parameters
    assert row.gramian == "held"
    costs = {}
    for function in (plain, ask):
        text = jax.jit(function).lower(*arguments).as_text()
        # A loop over environments makes one gradient in its body.
        costs[function] = len(
            re.findall(r"stablehlo.(?:dot_general|convolution)", text)
        )
    # Forward, the gradients; then their products and the weighted sum, or that of
    # gradients some of which are not finite.
    assert costs[ask] - costs[plain] <= 3


@pytest.mark.parametrize(("rows", "num_loops"), [(64, 0), (8, 1)])
def test_statistics_of_many_rows_need_no_loop_and_none_that_is_larger(rows, num_loops):
    def statistics(params, batch):
        return hardvary.env_grads(dense)(params, batch).stats(("mean", "sign"))

    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((300, 40), (8, rows, 300))
    ]
    text = jax.jit(statistics).lower(*arguments).as_text()
    assert len(re.findall("stablehlo.while", text)) == num_loops


def test_weights_and_their_bias_share_the_products_of_cotangents():
    def loss_fn(params, x):
        return jnp.sum(jnp.tanh(x @ params["weights"] + params["bias"]))

    def gramian(params, x):
        return hardvary.gramian(hardvary.env_grads(loss_fn)(params, x))

    params = {"weights": jnp.ones((300, 200)), "bias": jnp.ones(200)}
    program = jax.jit(gramian).lower(params, jnp.ones((7, 300))).compile().as_text()
    # Of data, and of cotangents.
    assert len(re.findall(r"= f32\[7,7\]\S* dot\(", program)) == 2


def test_gradients_are_held_where_they_take_no_more_bytes():
    def form(dtype):
        arguments = [jax.ShapeDtypeStruct(s, dtype) for s in ((300, 40), (8, 60, 300))]
        return hardvary.explain(dense, *arguments).parameters[0].gramian

    # Gradients are float32, whatever they are made of.
    assert (form(jnp.float32), form(jnp.bfloat16)) == ("held", "tiles")


def test_held_gradients_of_absent_environments_may_be_anything():
    params = jnp.ones((3, 2))
    x = jnp.ones((4, 16, 3)).at[1].set(jnp.nan).at[2].multiply(0.5)

    @compile_quickly
    def run(params, x, weights):
        grad = hardvary.env_grads(dense)(params, x)
        alone = grad.combine(weights + 0.0)
        in_a_branch = jax.lax.cond(weights[0] > 0, grad.gramian, grad.gramian)
        return grad.gramian(), in_a_branch, grad.combine(weights), alone

    gramian, in_a_branch, held, alone = run(params, x, jnp.array([1.0, 0.0, -2.0, 0.0]))
    np.testing.assert_array_equal(jnp.isnan(gramian).sum(), 7)
    np.testing.assert_allclose(in_a_branch, gramian, rtol=1e-6)
    assert np.isfinite(held).all()
    np.testing.assert_allclose(held, alone, rtol=1e-5)
    *_, held, _ = run(params, x, jnp.array([1.0, 1.0, 0.0, 0.0]))
    assert np.isnan(held).all()


@pytest.mark.parametrize(
    ("loss_fn", "shape", "batch", "form", "products"),
    [
        (dense, (300, 40), (8, 1, 300), "rows", 64 * (300 + 40 + 4)),
        (dense, (300, 40), (8, 16, 300), "tiles", 300 * 40 * (8 * 16 + 64)),
        (dense, (300, 40), (8, 64, 300), "held", 64 * 300 * 40),
        (convolved, (8, 8, 3, 3), (8, 1, 8, 9, 9), "held", 64 * 576),
        (convolved, (8, 8, 3, 3), (8, 1, 8, 3, 3), "stacked", 64 * 576),
        (lambda p, x: jnp.sum(jnp.sin(p) * x), (7,), (8, 7), "stacked", 64 * 7),
        (lambda p, x: jnp.sum(x), (7,), (8, 7), "none", 0),
    ],
    ids=[
        *("one row", "some rows", "many rows"),
        *("convolution", "convolution of few places", "small", "unused"),
    ],
)
def test_explain_says_how_inner_products_are_taken(
    loss_fn, shape, batch, form, products
):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, batch)]
    (row,) = hardvary.explain(loss_fn, *arguments).parameters
    assert (row.gramian, row.gramian_products) == (form, products)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bool_])
@pytest.mark.parametrize("rows", [1, 8])
def test_data_that_are_whole_numbers_meet_a_weight(rows, dtype):
    rng = np.random.default_rng(rows)
    weight = jnp.asarray(rng.normal(size=(70, 80)), jnp.float32)
    batch = jnp.asarray(rng.integers(-1, 2, size=(3, rows, 70)), dtype)
    weights = jnp.asarray([0.5, -1.0, 2.0])

    def loss(weight, x):
        product = jax.lax.dot_general(
            x, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return jnp.sum(jnp.sin(product))

    @compile_quickly
    def run(weight, batch):
        _, grads = hardvary.value_and_env_grads(loss)(weight, batch)
        sums = grads.stats(("mean",)).mean
        combined = hardvary.combine(grads, weights)
        return sums, hardvary.gramian(grads), hardvary.norms(grads), combined

    mean, gramian, norms, combined = run(weight, batch)
    stacked = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(weight, batch))
    flat = stacked.reshape(3, -1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(mean, stacked.mean(0), **close)
    np.testing.assert_allclose(gramian, flat @ flat.T, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(norms, np.linalg.norm(flat, axis=1), rtol=1e-5)
    np.testing.assert_allclose(
        combined, np.tensordot(weights, stacked, axes=1), **close
    )
