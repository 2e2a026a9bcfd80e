"""`in_axes`: what environments have each, along which axis, and what they share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import hardvary
from tests._asserts import assert_trees_close, field_of
from tests.zoo import compile_quickly
from tests.zoo.blocks import floats

NUM_ENVS = 4
STATS = {
    "fused": {"method": "fused"},
    "fused in parts": {"method": "fused", "microbatch_size": 2},
    "scan": {"method": "scan"},
    "vmap": {"method": "vmap"},
}
ORACLES = {
    "per_env_grad": hardvary.value_and_per_env_grad,
    "env_grads": hardvary.value_and_env_grads,
    "grad_stats": hardvary.value_and_grad_stats,
}
every_oracle = pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)


def of_methods(methods, loss_fn, in_axes, params, *args, **kwargs):
    """Name of a method -> `(losses, mean)`, from one compilation.

    What is no array is closed over: a flag does not pass a jit.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]

    @compile_quickly
    def run(params, arrays):
        arrays = iter(arrays)
        given = [
            next(arrays) if array else leaf
            for leaf, array in zip(leaves, is_array, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(treedef, given)
        found = {}
        for name in methods:
            settings = STATS[name]
            oracle = hardvary.value_and_grad_stats(loss_fn, in_axes=in_axes, **settings)
            losses, stats = oracle(params, *args, **kwargs)
            found[name] = losses, field_of(stats, "mean")
        oracle = hardvary.value_and_env_grads(loss_fn, in_axes=in_axes)
        losses, grads = oracle(params, *args, **kwargs)
        found["env_grads"] = losses, jax.tree.map(lambda grad: grad.mean(), grads)
        oracle = hardvary.value_and_per_env_grad(loss_fn, in_axes=in_axes)
        losses, grads = oracle(params, *args, **kwargs)
        found["stacked"] = losses, jax.tree.map(lambda grad: grad.mean(0), grads)
        return found

    return run(params, [x for x, array in zip(leaves, is_array, strict=True) if array])


of_every_method = functools.partial(of_methods, STATS)
# The arguments are sorted before a method sees them.
of_two_methods = functools.partial(of_methods, ())


def check(found, losses, grads):
    expected = losses, jax.tree.map(lambda grad: grad.mean(0), grads)
    assert len(found) >= 2
    for name, actual in found.items():
        try:
            assert_trees_close(actual, expected)
        except AssertionError as error:
            error.add_note(name)
            raise


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return floats(rng.normal(size=shape))


PARAMS = {"w": normal(3, 2), "b": normal(2)}


def loss_fn(params, x, extra, *, shift=0.0, mode="square"):
    """Of one environment: `x` [5, 3]; extra a tree with `y` [5, 2] and `scale` []."""
    y = jnp.sin(x @ params["w"] + params["b"][None]) * extra["scale"] + shift
    function = {"square": jnp.square, "abs": jnp.abs}[mode]
    return jnp.mean(function(y - extra["y"]))


def arguments(x_axis=0, y_axis=0, scale_axis=0):
    """`(x, extra)` with environments along the given axes; None shares."""

    def along(values, axis):
        return values[0] if axis is None else jnp.moveaxis(values, 0, axis)

    x, y, scale = normal(NUM_ENVS, 5, 3), normal(NUM_ENVS, 5, 2), normal(NUM_ENVS)
    return (
        along(x, x_axis),
        {"y": along(y, y_axis), "scale": along(scale, scale_axis)},
    )


def by_vmap(in_axes, *args, **settings):
    loss = functools.partial(loss_fn, **settings)
    run = jax.vmap(jax.value_and_grad(loss), in_axes=in_axes)
    return jax.jit(run)(PARAMS, *args)


@pytest.mark.parametrize(
    ("in_axes", "like_vmap"),
    [
        (0, (None, 0, 0)),
        ((None, 0, 0), (None, 0, 0)),
        ([None, 0, 0], (None, 0, 0)),
        ((None, 1, 0), (None, 1, 0)),
        ((None, 2, {"y": 1, "scale": 0}), (None, 2, {"y": 1, "scale": 0})),
        ((None, -1, {"y": -2, "scale": -1}), (None, -1, {"y": -2, "scale": -1})),
        ((None, 0, {"y": 0, "scale": None}), (None, 0, {"y": 0, "scale": None})),
        ((None, None, {"y": None, "scale": 0}), (None, None, {"y": None, "scale": 0})),
        ((None, 0, None), (None, 0, None)),
        ({1: 1}, (None, 1, 0)),
        (np.int64(0), (None, 0, 0)),
        ({1: np.int32(1)}, (None, 1, 0)),
        ({2: None}, (None, 0, None)),
        ({0: None, 1: 0, 2: {"y": 2, "scale": 0}}, (None, 0, {"y": 2, "scale": 0})),
        ({}, (None, 0, 0)),
    ],
    ids=str,
)
def test_in_axes_of_positional_arguments_mean_what_they_mean_in_vmap(
    in_axes, like_vmap
):
    _, x_axis, extra = like_vmap
    if not isinstance(extra, dict):
        extra = {"y": extra, "scale": extra}
    args = arguments(x_axis, extra["y"], extra["scale"])
    found = of_two_methods(loss_fn, in_axes, PARAMS, *args)
    check(found, *by_vmap(like_vmap, *args))


def test_in_axes_of_one_integer_are_for_all_arguments():
    x, scale = jnp.moveaxis(normal(NUM_ENVS, 5, 3), 0, 1), normal(2, NUM_ENVS)

    def loss(params, x, scale):
        return jnp.mean(jnp.sin(x @ params["w"]) * scale[None])

    for axis in (1, -1):
        args = (x if axis == 1 else jnp.moveaxis(x, 1, -1)), scale
        vmapped = jax.vmap(jax.value_and_grad(loss), in_axes=(None, axis, axis))
        found = of_two_methods(loss, axis, PARAMS, *args)
        check(found, *jax.jit(vmapped)(PARAMS, *args))


@pytest.mark.parametrize("mapped", [True, False])
def test_in_axes_of_keywords_map_or_share(mapped):
    args = arguments()
    shift = normal(NUM_ENVS) if mapped else normal(2)
    # Mapped unless named; flags and numbers are shared in any case.
    in_axes = 0 if mapped else {"shift": None}

    def by_position(params, x, extra, shift):
        return loss_fn(params, x, extra, shift=shift, mode="abs")

    def one(params, x, extra, *, shift, mode, scale):
        assert mode == "abs"
        assert scale == 1.0
        if not mapped:
            shift = shift[None]
        return loss_fn(params, x, extra, shift=shift, mode=mode)

    def of_one(params, x, extra, shift):
        return one(params, x, extra, shift=shift, mode="abs", scale=1.0)

    vmapped = jax.vmap(
        jax.value_and_grad(of_one), in_axes=(None, 0, 0, 0 if mapped else None)
    )
    expected = jax.jit(vmapped)(PARAMS, *args, shift)
    given = {"shift": shift, "mode": "abs", "scale": 1.0}
    check(of_every_method(one, in_axes, PARAMS, *args, **given), *expected)


@pytest.mark.parametrize("in_axes", [{"shift": 1}, {"shift": -1}])
def test_in_axes_of_a_keyword_along_an_inner_axis(in_axes):
    args, shift = arguments(), normal(2, NUM_ENVS)

    def one(params, x, extra, *, shift):
        return loss_fn(params, x, extra, shift=shift[None])

    def by_position(params, x, extra, shift):
        return one(params, x, extra, shift=shift)

    vmapped = jax.vmap(jax.value_and_grad(by_position), in_axes=(None, 0, 0, 1))
    expected = jax.jit(vmapped)(PARAMS, *args, shift)
    check(of_two_methods(one, in_axes, PARAMS, *args, shift=shift), *expected)


def test_in_axes_with_argnums_leave_the_named_arguments_alone():
    args = arguments()

    def loss(x, w, extra, b):
        return loss_fn({"w": w, "b": b}, x, extra)

    w, b = PARAMS["w"], PARAMS["b"]
    _, expected = by_vmap((None, 0, 0), *args)
    for in_axes in (0, (0, None, 0, None), {0: 0, 1: None}):
        oracle = hardvary.env_grads(loss, argnums=(1, 3), in_axes=in_axes)
        grads = oracle(args[0], w, args[1], b)
        means = tuple(grad.mean() for grad in grads)
        assert_trees_close(means, (expected["w"].mean(0), expected["b"].mean(0)))


@pytest.mark.parametrize("kind", ["matrix of one each", "batched", "keyword"])
def test_sparse_batches_are_mapped_as_vmap_maps_them(kind):
    dense = jax.nn.relu(normal(NUM_ENVS, 5, 3))
    batch = sparse.BCOO.fromdense(dense, n_batch=1)
    w = PARAMS["w"]

    def loss(params, x, *, other=None):
        x = x if other is None else other
        return jnp.mean(jnp.sin(sparse.todense(x) @ params))

    def of_dense(params, x):
        return jnp.mean(jnp.sin(x @ params))

    expected = jax.jit(jax.vmap(jax.value_and_grad(of_dense), (None, 0)))(w, dense)
    if kind == "keyword":
        found = of_two_methods(loss, 0, w, jnp.zeros(NUM_ENVS), other=batch)
    elif kind == "batched":
        found = of_two_methods(loss, {1: 0}, w, batch)
    else:
        # A product with the sparse matrix itself.
        def loss(params, x):
            return jnp.mean(jnp.sin(x @ params))

        found = of_every_method(loss, (None, 0), w, batch)
    check(found, *expected)


def test_random_keys_as_keywords_are_mapped():
    keys = jax.random.split(jax.random.key(0), NUM_ENVS)
    args = arguments()

    def one(params, x, extra, *, key):
        return loss_fn(params, x, extra, shift=jax.random.normal(key))

    def by_position(params, x, extra, key):
        return one(params, x, extra, key=key)

    vmapped = jax.vmap(jax.value_and_grad(by_position), in_axes=(None, 0, 0, 0))
    expected = jax.jit(vmapped)(PARAMS, *args, keys)
    found = of_every_method(one, 0, PARAMS, *args, key=keys)
    check(found, *expected)


# --------------------------------------------------------------------------------------
# Explanations.


def test_explain_with_keywords_and_axes_knows_the_same_arguments():
    def one(params, x, extra, *, shift, mode):
        return loss_fn(params, x, extra, shift=shift[None], mode=mode)

    x, extra = arguments(1)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (PARAMS, x, extra)
    )
    shift = jax.ShapeDtypeStruct((2,), jnp.float32)
    settings = {"in_axes": {1: 1, "shift": None}}
    explained = hardvary.explain(one, *shapes, shift=shift, mode="abs", **settings)
    again = hardvary.explain(
        one, PARAMS, x, extra, shift=jnp.zeros(2), mode="abs", **settings
    )
    assert str(explained) == str(again)
    assert {rule.path for rule in explained.parameters} == {"['w']", "['b']"}
    with pytest.raises(ValueError, match=r"number of environments.*'shift'.* has 2"):
        hardvary.explain(one, *shapes, shift=shift, mode="abs", in_axes={1: 1})


# --------------------------------------------------------------------------------------
# Errors.


def call(oracle, in_axes, *args, loss=loss_fn, **kwargs):
    return oracle(loss, in_axes=in_axes)(PARAMS, *args, **kwargs)


@every_oracle
@pytest.mark.parametrize(
    ("in_axes", "error", "message"),
    [
        ("0", TypeError, r"in_axes must be an integer, a sequence .* or a mapping"),
        (None, TypeError, r"in_axes must be an integer, a sequence .* got None"),
        (True, TypeError, r"in_axes must be an integer.* got True"),
        (0.0, TypeError, r"in_axes must be an integer.* got 0\.0"),
        (
            (None, 0),
            ValueError,
            r"an entry for each of the 3 positional arguments .*\(None, 0\); a mapping",
        ),
        (
            {"shfit": None},
            ValueError,
            r"in_axes names the argument 'shfit', which was not given; given are",
        ),
        ({3: 0}, ValueError, r"in_axes names the argument 3, which was not given"),
        (
            (1, 0, 0),
            ValueError,
            r"in_axes must be None for parameters, which all environments share",
        ),
        ({0: 1}, ValueError, r"in_axes must be None for parameters.* position 0"),
        (
            (None, 0, {"y": 0}),
            ValueError,
            r"in_axes of the argument 2 must be an integer, None, or a tree prefix",
        ),
        (
            (None, 0, {"y": "0", "scale": 0}),
            TypeError,
            r"in_axes of the argument 2 must be integers or None, got '0'",
        ),
        (
            (None, 3, 0),
            ValueError,
            r"leaf at argument 1 has no axis 3\. To share it .* in_axes=\{1: None\}",
        ),
        (
            (None, 0, 1),
            ValueError,
            r"leaf at argument 2\['scale'\] has no axis 1\. .* in_axes=\{2: None\}",
        ),
        (
            (None, 1, 0),
            ValueError,
            r"must agree on the number of environments.* argument 1 has 5, .* has 4\. "
            r".*To share an argument with all environments: in_axes=\{argument: None\}",
        ),
        (
            (None, None, None),
            ValueError,
            r"a batch is needed beside the parameters.* that in_axes does not share",
        ),
    ],
)
def test_in_axes_that_do_not_fit_are_refused(oracle, in_axes, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call(oracle, in_axes, *arguments())


@every_oracle
def test_arguments_that_cannot_be_mapped_name_the_way_to_share_them(oracle):
    x, extra = arguments()
    with pytest.raises(ValueError, match=r"'scale'\] is a scalar\..*in_axes=\{2: None"):
        call(oracle, 0, x, {**extra, "scale": jnp.float32(1)})
    with pytest.raises(
        ValueError, match=r"argument 'shift' is a scalar.*\{'shift': None\}"
    ):
        call(oracle, 0, x, extra, shift=jnp.float32(1))
    with pytest.raises(ValueError, match=r"argument 'shift' has 2"):
        call(oracle, 0, x, extra, shift=jnp.zeros(2))
    with pytest.raises(TypeError, match=r"is an? str\. Turn it .* in_axes=\{1: None"):
        call(oracle, 0, "x", extra)


@every_oracle
def test_what_is_no_array_may_be_shared_by_position(oracle):
    x, extra = arguments()

    def loss(params, x, extra, mode):
        return loss_fn(params, x, extra, mode=mode)

    losses, _ = oracle(loss, in_axes={3: None})(PARAMS, x, extra, "abs")
    assert losses.shape == (NUM_ENVS,)
