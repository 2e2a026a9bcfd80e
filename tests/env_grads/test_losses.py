"""Losses that look at each other: every gradient is a row of their Jacobian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardvary
from tests._asserts import assert_trees_close
from tests._compat import enable_x64
from tests.fused._answers import ask, check_answers, signed_weights
from tests.zoo import compile_quickly
from tests.zoo.compare import Stacked, by_path

NUM_ENVS = 4
WEIGHTS = np.array([1.0, 0.0, 0.5, 2.0], np.float32)


def normal(*shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng([seed, *shape])
    return jax.device_put(rng.normal(size=shape).astype(dtype))


class Jacobian(Stacked):
    """The definition: `jax.jacrev`, nothing of hardvary involved."""

    def __init__(self, losses_fn, params, batch):
        @compile_quickly
        def run(params, batch):
            losses = losses_fn(params, batch)
            return losses, jax.jacrev(losses_fn)(params, batch)

        losses, grads = run(params, batch)
        self.losses, self.grads = np.asarray(losses, np.float64), by_path(grads)

    @property
    def zero(self):
        return {path: grad == 0 for path, grad in self.grads.items()}


def shared_batch_norm():
    """Statistics over the examples of all environments."""
    params = {
        "hidden": normal(3, 4),
        "scale": 1 + 0.1 * normal(4),
        "readout": normal(4, 1),
    }
    batch = {"x": normal(NUM_ENVS, 5, 3), "y": normal(NUM_ENVS, 5, 1)}

    def losses_fn(params, batch):
        hidden = batch["x"] @ params["hidden"]
        mean = jnp.mean(hidden, axis=(0, 1), keepdims=True)
        variance = jnp.var(hidden, axis=(0, 1), keepdims=True)
        hidden = (hidden - mean) * jax.lax.rsqrt(variance + 1e-3)
        hidden = jnp.tanh(hidden * params["scale"][None, None])
        error = hidden @ params["readout"] - batch["y"]
        return jnp.mean(jnp.square(error), axis=(1, 2))

    return params, losses_fn, batch


def three_tasks():
    """Three losses of one batch, on a trunk that they share and heads that not."""
    params = {"trunk": normal(3, 4), "heads": [normal(4, k) for k in (1, 2, 3)]}
    batch = {"x": normal(6, 3), "y": [normal(6, k) for k in (1, 2, 3)]}

    def losses_fn(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["trunk"])
        errors = [
            hidden @ head - y
            for head, y in zip(params["heads"], batch["y"], strict=True)
        ]
        first, second, third = errors
        return jnp.stack(
            [
                jnp.mean(jnp.square(first)),
                jnp.mean(jnp.abs(second)),
                jnp.mean(optax.losses.huber_loss(third)),
            ]
        )

    return params, losses_fn, batch


PROBLEMS = {"shared_batch_norm": shared_batch_norm, "three_tasks": three_tasks}


@functools.cache
def problem(name):
    params, losses_fn, batch = PROBLEMS[name]()
    return params, losses_fn, batch, Jacobian(losses_fn, params, batch)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("shared_batch_norm", 1),
        ("shared_batch_norm", 2),
        ("shared_batch_norm", 4),
        ("three_tasks", 1),
        ("three_tasks", 3),
    ],
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gradients_of_losses_are_the_rows_of_their_jacobian(name, size, weighted):
    params, losses_fn, batch, expected = problem(name)
    num_envs = len(expected.losses)
    signed = signed_weights(num_envs)
    weights = WEIGHTS[:num_envs] if weighted else None

    @compile_quickly
    def run(params, batch, signed, weights):
        oracle = hardvary.value_and_env_grads_of_losses(losses_fn, microbatch_size=size)
        losses, grads = oracle(params, batch, env_weights=weights)
        return losses, ask(grads, signed, stack=True)

    losses, answers = run(params, batch, signed, weights)
    # All of them: others see the loss of an absent environment.
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-5)
    assert check_answers(answers, params, expected, signed, weights) > 0.9


def test_gradient_through_the_statistics_of_others_is_not_that_of_env_axis_name():
    # The two readings of a shared batch norm agree on the sum alone.
    params, _, batch, expected = problem("shared_batch_norm")

    def loss_fn(params, batch):
        hidden = batch["x"] @ params["hidden"]
        mean = jax.lax.pmean(jnp.mean(hidden, axis=0), "env")
        square = jax.lax.pmean(jnp.mean(jnp.square(hidden), axis=0), "env")
        variance = square - jnp.square(mean)
        hidden = (hidden - mean[None]) * jax.lax.rsqrt(variance + 1e-3)[None]
        hidden = jnp.tanh(hidden * params["scale"][None])
        return jnp.mean(jnp.square(hidden @ params["readout"] - batch["y"]))

    @compile_quickly
    def run(params, batch):
        oracle = hardvary.value_and_env_grads(loss_fn, env_axis_name="env")
        losses, grads = oracle(params, batch)
        return losses, jax.tree.map(lambda grad: grad.stack(), grads)

    losses, grads = run(params, batch)
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-4)
    copies = by_path(grads)
    for path, rows in expected.grads.items():
        np.testing.assert_allclose(copies[path].sum(0), rows.sum(0), atol=1e-4)
    assert np.abs(copies["['hidden']"] - expected.grads["['hidden']"]).max() > 1e-2


def test_gradients_of_losses_feed_every_kind_of_aggregator():
    params, losses_fn, batch, expected = problem("three_tasks")

    def shortened(gramian):
        return 1 / jnp.sqrt(jnp.diagonal(gramian))

    rules = {
        "mask": hardvary.and_mask(0.3),
        "smooth": hardvary.sand_mask(0.1, sharpness=5.0),
        "products": hardvary.weighting(shortened),
    }

    @compile_quickly
    def run(params, batch, stacked):
        _, grads = hardvary.value_and_env_grads_of_losses(losses_fn)(params, batch)
        return [
            [tx.update(given, tx.init(params), params)[0] for tx in rules.values()]
            for given in (grads, stacked)
        ]

    stacked = jax.tree.unflatten(
        jax.tree.structure(params),
        [jnp.asarray(grad, jnp.float32) for grad in expected.grads.values()],
    )
    fast, plain = run(params, batch, stacked)
    assert_trees_close(fast, plain, rtol=1e-4)


def test_gradients_of_losses_with_argnums_aux_and_keywords():
    x = normal(NUM_ENVS, 3)

    def losses_fn(x, w, b, *, scale, mode):
        assert mode == "train"
        outputs = jnp.sin(x @ w + b) * scale
        return jnp.square(outputs - jnp.mean(outputs)), {"outputs": outputs}

    w, b, scale = normal(3), normal(), jnp.float32(2)
    oracle = hardvary.value_and_env_grads_of_losses(
        losses_fn, argnums=(1, 2), has_aux=True, microbatch_size=2
    )
    call = functools.partial(oracle, x, scale=scale, mode="train")

    @compile_quickly
    def run(w, b):
        value, grads = call(w, b)
        return value, tuple(grad.stack() for grad in grads)

    (losses, aux), grads = run(w, b)
    of = functools.partial(losses_fn, x, scale=scale, mode="train")
    assert_trees_close((losses, aux), of(w, b))
    rows = jax.jit(jax.jacrev(lambda w, b: of(w, b)[0], argnums=(0, 1)))(w, b)
    assert_trees_close(grads, rows)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_gradients_of_losses_in_another_precision(dtype):
    with enable_x64(dtype == "float64"):
        params = normal(3).astype(dtype)
        x = normal(NUM_ENVS, 3, dtype=np.float64).astype(dtype)

        def losses_fn(params, x):
            outputs = jnp.sin(x @ params)
            return jnp.square(outputs - jnp.mean(outputs))

        expected = Jacobian(losses_fn, params, x)
        signed = signed_weights(NUM_ENVS)

        @compile_quickly
        def run(params, x, signed):
            losses, grads = hardvary.value_and_env_grads_of_losses(losses_fn)(params, x)
            return losses, ask(grads, signed, stack=True)

        losses, answers = run(params, x, signed)
        assert losses.dtype == dtype
        rounding = {"float64": 1e-12, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
        check_answers(answers, params, expected, signed, None, rounding)


# --------------------------------------------------------------------------------------
# Errors.


def make(**settings):
    return hardvary.value_and_env_grads_of_losses(lambda w, x: x @ w, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"microbatch_size": 0}, ValueError, "microbatch_size must be >= 1, got 0"),
        ({"microbatch_size": 1.0}, TypeError, "microbatch_size must be an integer"),
        ({"microbatch_size": True}, TypeError, "microbatch_size must be an integer"),
        ({"argnums": "0"}, TypeError, "argnums must be an integer or a sequence"),
        ({"argnums": (0, 0)}, ValueError, "argnums must name distinct positions"),
    ],
)
def test_gradients_of_losses_with_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


def test_losses_that_are_no_function_are_refused():
    with pytest.raises(TypeError, match="losses_fn must be callable, got 3"):
        hardvary.value_and_env_grads_of_losses(3)


@pytest.mark.parametrize(
    ("losses_fn", "error", "message"),
    [
        (
            lambda w, x: jnp.sum(x @ w),
            TypeError,
            r"real array \[env\], got .* shape \(\)",
        ),
        (
            lambda w, x: x * w[None],
            TypeError,
            r"\[env\], got float32 of shape \(4, 3\)",
        ),
        (lambda w, x: jnp.sign(x @ w).astype(int), TypeError, r"got int32 of shape"),
        (lambda w, x: (x @ w).astype(complex), TypeError, r"got complex64 of shape"),
        (lambda w, x: [x[0] @ w], TypeError, r"got a list; jnp\.stack makes an array"),
        (lambda w, x: (x @ w, x), TypeError, r"got a tuple; .* pass has_aux=True"),
        (lambda w, x: x[:0] @ w, ValueError, "losses_fn returned no loss"),
        (lambda w, x: None, TypeError, "real array .* got a NoneType"),
    ],
)
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_losses_that_are_no_real_vector_are_refused(losses_fn, error, message):
    with pytest.raises(error, match=message):
        hardvary.value_and_env_grads_of_losses(losses_fn)(jnp.ones(3), jnp.ones((4, 3)))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.ones(3), ValueError, r"env_weights must have shape \(4,\)"),
        (np.array([1.0, -1, 1, 1]), ValueError, "finite and non-negative"),
        (np.array([1.0, np.nan, 1, 1]), ValueError, "finite and non-negative"),
        (np.zeros(4), ValueError, "mark every environment absent"),
        (np.ones(4) * 1j, TypeError, "env_weights must be real"),
    ],
)
def test_gradients_of_losses_with_bad_weights_are_refused(weights, error, message):
    name = "value_and_env_grads_of_losses"
    with pytest.raises(error, match=f"{name}: .*{message}"):
        make()(jnp.ones(3), jnp.ones((4, 3)), env_weights=weights)


def test_gradients_of_losses_of_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"must divide .*, got 3 for 4"):
        make(microbatch_size=3)(jnp.ones(3), jnp.ones((4, 3)))
    with pytest.raises(TypeError, match="parameters must be real floating"):
        make()(jnp.ones(3, int), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="argnums 2 needs more than the 2 positional"):
        make(argnums=2)(jnp.ones(3), jnp.ones((4, 3)))


@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 1.0), ("float16", 1e6)])
def test_combination_of_losses_in_half_precision_keeps_its_weights(dtype, scale):
    x = normal(50, 3)
    weights = scale * normal(50) / 3
    oracle = hardvary.env_grads(lambda w, row: jnp.sum(w * row))
    expected = oracle(jnp.ones(3), x).combine(weights)
    oracle = hardvary.value_and_env_grads_of_losses(lambda w, x: (x @ w).astype(dtype))
    _, grads = oracle(jnp.ones(3), x)
    np.testing.assert_allclose(grads.combine(weights), expected, rtol=1e-4)
