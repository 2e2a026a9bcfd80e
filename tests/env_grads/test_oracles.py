"""The gradient oracles: arguments, routes, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardvary
from tests._asserts import (
    assert_like_params,
    assert_trees_close,
    assert_trees_equal,
    field_of,
)
from tests._compat import enable_x64
from tests._inputs import SHAPES, STATISTICS, make_params
from tests.zoo.blocks import floats

ROUTES = {
    "fused": {"method": "fused"},
    "fused_by_3": {"method": "fused", "microbatch_size": 3},
    "vmap": {"method": "vmap"},
    "scan": {"method": "scan"},
    "scan_by_3": {"method": "scan", "microbatch_size": 3},
}
every_route = pytest.mark.parametrize("route", ROUTES)
NUM_ENVS = 6


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        "w": floats(rng.normal(size=(3, 2))),
        "b": floats(rng.normal(size=2)),
        "none": None,
        "scale": jnp.float32(0.5),
    }


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    x = floats(rng.normal(size=(NUM_ENVS, 4, 3)))
    y = floats(rng.normal(size=(NUM_ENVS, 4, 2)))
    return {"x": x, "y": y, "none": None}


def predict(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) * params["scale"]


def loss_fn(params, batch):
    return jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2)


@pytest.fixture(scope="module")
def expected(params, batch):
    """Losses and stacked gradients from the definition."""
    one = jax.jit(jax.value_and_grad(loss_fn))
    results = [
        one(params, jax.tree.map(lambda leaf: leaf[env], batch))  # noqa: B023
        for env in range(NUM_ENVS)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def reduce(grads, num_envs=NUM_ENVS):
    """A tree of GradStats with all statistics, from the definition."""

    def leaf(g):
        return hardvary.GradStats(
            mean=g.mean(0),
            sign_sum=jnp.sign(g).sum(0),
            square_mean=jnp.square(g).mean(0),
            log_abs_mean=jnp.log(jnp.abs(g) + 1e-10).mean(0),
            abs_mean=jnp.abs(g).mean(0),
            nonzero_sum=jnp.sum(g != 0, axis=0).astype(jnp.float32),
            num_envs=jnp.float32(num_envs),
        )

    return jax.tree.map(leaf, grads)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_per_env_grad_of_a_model_equals_a_loop(params, batch, expected, jit):
    losses, grads = expected
    only_grads = hardvary.per_env_grad(loss_fn)
    both = hardvary.value_and_per_env_grad(loss_fn)
    if jit:
        only_grads, both = jax.jit(only_grads), jax.jit(both)
    assert_trees_close(only_grads(params, batch), grads)
    assert_trees_close(both(params, batch), (losses, grads))


@every_route
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_grad_stats_of_a_model_equal_a_loop(params, batch, expected, route, jit):
    losses, grads = expected
    settings = {"stats": STATISTICS, **ROUTES[route]}
    only_stats = hardvary.grad_stats(loss_fn, **settings)
    both = hardvary.value_and_grad_stats(loss_fn, **settings)
    if jit:
        only_stats, both = jax.jit(only_stats), jax.jit(both)
    assert_trees_close(only_stats(params, batch), reduce(grads))
    # Losses in the order of the environments.
    assert_trees_close(both(params, batch), (losses, reduce(grads)))


@every_route
def test_grad_stats_holds_what_was_asked_for(params, batch, route):
    fields = {
        "mean": "mean",
        "sign": "sign_sum",
        "square": "square_mean",
        "log_abs": "log_abs_mean",
        "abs": "abs_mean",
        "nonzero": "nonzero_sum",
    }
    assert set(fields) == set(STATISTICS)
    for stats in [("sign",), ("square", "mean"), ["log_abs", "abs"], ["nonzero"]]:
        oracle = hardvary.grad_stats(loss_fn, stats=stats, **ROUTES[route])
        result = jax.eval_shape(oracle, params, batch)["w"]
        held = {name for name in fields if getattr(result, fields[name]) is not None}
        assert held == set(stats)


def test_grad_stats_by_default_serve_the_and_mask(params, batch):
    stats = jax.eval_shape(hardvary.grad_stats(loss_fn), params, batch)
    assert stats["w"].square_mean is None
    assert stats["w"].log_abs_mean is None
    assert_like_params(field_of(stats, "mean"), params)
    assert_like_params(field_of(stats, "sign_sum"), params)


@every_route
@pytest.mark.parametrize("argnums", [1, (1,), (0, 2), (2, 0)], ids=str)
def test_oracles_with_argnums_differentiate_those_arguments(argnums, route):
    def loss(a, b, c, x):
        return jnp.sum(a * x) * b + jnp.sum(jnp.square(c) * x)

    a, b, c = jnp.arange(2.0), jnp.float32(3), jnp.array([1.0, -1.0])
    x = floats(np.random.default_rng(0).normal(size=(NUM_ENVS, 2)))
    wanted = (argnums,) if isinstance(argnums, int) else argnums
    # Positional arguments that are not differentiated are batches.
    args = [
        value if i in wanted else jnp.stack([value] * NUM_ENVS)
        for i, value in enumerate((a, b, c))
    ]
    definition = [jax.grad(loss, argnums)(a, b, c, x[env]) for env in range(NUM_ENVS)]
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *definition)
    stacked = jax.jit(hardvary.per_env_grad(loss, argnums))
    assert_trees_close(stacked(*args, x), grads)
    oracle = hardvary.grad_stats(
        loss, argnums=argnums, stats=STATISTICS, **ROUTES[route]
    )
    assert_trees_close(jax.jit(oracle)(*args, x), reduce(grads))


@pytest.mark.parametrize("route", ["per_env", *ROUTES])
def test_oracles_with_aux_return_it_for_every_environment(params, batch, route):
    def with_aux(params, batch):
        aux = {"prediction": predict(params, batch["x"]), "count": 4, "none": None}
        return loss_fn(params, batch), aux

    if route == "per_env":
        make, make_value = hardvary.per_env_grad, hardvary.value_and_per_env_grad
        settings = {}
    else:
        make, make_value = hardvary.grad_stats, hardvary.value_and_grad_stats
        settings = ROUTES[route]
    plain = make_value(loss_fn, **settings)(params, batch)
    result, aux = make(with_aux, has_aux=True, **settings)(params, batch)
    (losses, value_aux), value_result = make_value(with_aux, has_aux=True, **settings)(
        params, batch
    )

    assert_trees_close((losses, value_result), plain)
    assert_trees_close(result, plain[1])
    assert_trees_close(aux, value_aux, rtol=0, atol=0)
    for env in range(NUM_ENVS):
        np.testing.assert_allclose(
            aux["prediction"][env], predict(params, batch["x"][env]), rtol=1e-5
        )
    np.testing.assert_array_equal(aux["count"], [4] * NUM_ENVS)


@every_route
def test_oracles_hand_keyword_arguments_to_every_environment(params, batch, route):
    def loss(params, batch, *, shift, mode):
        assert mode == "train"
        return loss_fn(params, batch) + jnp.sum(params["b"] * shift)

    shift = jnp.array([1.0, 2.0])
    oracle = hardvary.value_and_grad_stats(
        loss, in_axes={"shift": None}, **ROUTES[route]
    )
    losses, stats = oracle(params, batch, shift=shift, mode="train")
    plain_losses, plain = hardvary.value_and_grad_stats(loss_fn)(params, batch)
    expected = plain_losses + jnp.sum(params["b"] * shift)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(stats["b"].mean, plain["b"].mean + shift, rtol=1e-5)


@every_route
def test_oracles_take_several_batch_arguments(params, batch, route):
    def loss(params, x, y):
        return loss_fn(params, {"x": x, "y": y})

    oracle = hardvary.value_and_grad_stats(loss, **ROUTES[route])
    expected = hardvary.value_and_grad_stats(loss_fn)(params, batch)
    assert_trees_close(oracle(params, batch["x"], batch["y"]), expected)


@every_route
@pytest.mark.parametrize("typed", [False, True], ids=["raw_keys", "typed_keys"])
def test_oracles_take_random_keys_as_a_batch(route, typed):
    make = jax.random.key if typed else jax.random.PRNGKey
    keys = jax.random.split(make(0), NUM_ENVS)

    def loss(w, key):
        return w * jax.random.normal(key)

    noise = jnp.stack([jax.random.normal(key) for key in keys])
    oracle = hardvary.value_and_grad_stats(loss, **ROUTES[route])
    losses, stats = oracle(jnp.float32(2), keys)
    np.testing.assert_allclose(losses, 2 * noise, rtol=1e-6)
    np.testing.assert_allclose(stats.mean, noise.mean(), rtol=1e-5)
    assert float(stats.sign_sum) == np.sign(noise).sum()


@every_route
@pytest.mark.parametrize("shape", SHAPES)
def test_grad_stats_of_any_tree_are_like_params(shape, route):
    params = make_params(shape)

    def loss(params, x):
        return x * sum((leaf.sum() for leaf in jax.tree.leaves(params)), jnp.float32(1))

    oracle = hardvary.value_and_grad_stats(loss, stats=STATISTICS, **ROUTES[route])
    losses, stats = jax.jit(oracle)(params, jnp.arange(NUM_ENVS, dtype=jnp.float32))
    assert losses.shape == (NUM_ENVS,)
    for name, value in (("mean", 2.5), ("sign_sum", 5), ("nonzero_sum", 5)):
        assert_trees_equal(
            field_of(stats, name),
            jax.tree.map(lambda p: jnp.full_like(p, value), params),  # noqa: B023
        )
    for name in ("square_mean", "log_abs_mean", "abs_mean"):
        assert_like_params(field_of(stats, name), params)


@every_route
def test_oracles_of_a_loss_without_parameters_return_zeros(route):
    oracle = hardvary.value_and_grad_stats(lambda w, x: 1.0, **ROUTES[route])
    losses, stats = oracle(jnp.ones(2), jnp.arange(NUM_ENVS, dtype=jnp.float32))
    np.testing.assert_array_equal(losses, np.ones(NUM_ENVS))
    np.testing.assert_array_equal(stats.mean, [0, 0])
    np.testing.assert_array_equal(stats.sign_sum, [0, 0])


@every_route
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_grad_stats_keep_the_dtype_and_count_in_float32_or_more(dtype, route):
    with enable_x64(dtype == "float64"):
        params = {"w": jnp.ones(3, dtype), "b": jnp.zeros((), dtype)}
        x = floats(np.random.default_rng(0).normal(size=(300, 3)), dtype)

        def loss(params, x):
            return jnp.sum(params["w"] * x) + params["b"]

        oracle = hardvary.value_and_grad_stats(loss, stats=STATISTICS, **ROUTES[route])
        losses, stats = jax.jit(oracle)(params, x)
        wide = "float64" if dtype == "float64" else "float32"
        assert losses.dtype == dtype
        assert_like_params(field_of(stats, "mean"), params)
        for name in ("sign_sum", "square_mean", "log_abs_mean", "abs_mean"):
            tree = field_of(stats, name)
            assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == {wide}
        # bfloat16 cannot count beyond 256.
        assert float(stats["b"].sign_sum) == 300
        signs = np.sign(np.asarray(x, np.float64)).sum(0)
        np.testing.assert_array_equal(stats["w"].sign_sum, signs)


@every_route
def test_grad_stats_inside_scan_train_a_model(params, batch, route):
    oracle = hardvary.value_and_grad_stats(loss_fn, **ROUTES[route])

    def step(params, _):
        losses, stats = oracle(params, batch)
        means = field_of(stats, "mean")
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, means), losses

    trained, losses = jax.jit(lambda p: jax.lax.scan(step, p, length=20))(params)
    assert losses.shape == (20, NUM_ENVS)
    assert float(losses[-1].mean()) < float(losses[0].mean())
    assert_like_params(trained, params)


@every_route
def test_grad_stats_under_vmap_over_seeds_equal_one_by_one(params, batch, route):
    oracle = jax.jit(hardvary.value_and_grad_stats(loss_fn, **ROUTES[route]))
    seeds = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    together = jax.jit(jax.vmap(oracle, (0, None)))(seeds, batch)
    for seed in range(2):
        alone = oracle(jax.tree.map(lambda p: p[seed], seeds), batch)  # noqa: B023
        assert_trees_close(
            jax.tree.map(lambda leaf: leaf[seed], together),  # noqa: B023
            alone,
        )


@every_route
def test_grad_stats_of_python_and_numpy_inputs_equal_jax_arrays(route):
    def loss(params, x):
        return jnp.sum(params["w"] * x) * params["b"]

    oracle = hardvary.grad_stats(loss, **ROUTES[route])
    x = np.arange(6, dtype=np.float32).reshape(NUM_ENVS, 1)
    actual = oracle({"w": np.ones(1, np.float32), "b": 2.0}, x)
    expected = oracle({"w": jnp.ones(1), "b": jnp.float32(2)}, jnp.asarray(x))
    assert_trees_close(actual, expected)


def test_grad_stats_env_weights_weigh_every_statistic_but_not_the_losses(
    params, batch, expected
):
    losses, grads = expected
    weights = np.array([2, 0, 1, 0, 0, 1])
    repeated = jax.tree.map(lambda g: jnp.asarray(np.repeat(g, weights, axis=0)), grads)
    for settings in ROUTES.values():
        oracle = hardvary.value_and_grad_stats(loss_fn, stats=STATISTICS, **settings)
        run = jax.jit(lambda w: oracle(params, batch, env_weights=w))  # noqa: B023
        actual = run(weights.astype(np.float32))
        assert_trees_close(actual, (losses, reduce(repeated, 4)))


def temporary_bytes(*batch_shape, **settings):
    """Scratch memory of a compiled oracle on a model of 4 MiB of parameters."""
    params = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    batch = jax.ShapeDtypeStruct((*batch_shape, 1024), jnp.float32)

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    oracle = hardvary.grad_stats(loss, **settings)
    compiled = jax.jit(oracle).lower(params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_grad_stats_scan_memory_does_not_grow_with_environments():
    copy = 4 * 1024 * 1024
    few, many = (temporary_bytes(n, method="scan") for n in (4, 32))
    assert many < few + copy / 2
    assert many <= 6 * copy
    by_4 = temporary_bytes(32, method="scan", microbatch_size=4)
    assert by_4 <= 12 * copy
    # The measure sees what it is to see: the stacked form holds a copy for each. (Of
    # several rows: outer products of one jax 0.7 makes where they are added up.)
    assert temporary_bytes(32, 4, method="vmap") >= 31 * copy
