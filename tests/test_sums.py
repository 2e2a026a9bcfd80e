"""Sums over environments, several in one reduction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import hardvary
from hardvary import _sums
from hardvary._sums import over_first_axis, sums_and_minima
from tests._compat import enable_x64

SIZES = [1, 2, 3, 15, 16, 17, 32, 48, 80, 97, 256, 272, 1024]


@pytest.fixture(autouse=True)
def take_small_arrays_for_large(monkeypatch):
    monkeypatch.setattr(_sums, "_LARGE", 1)


def arrays_of(num_terms, shape=(3, 4), dtype=np.float32, count=2):
    rng = np.random.default_rng(num_terms)
    return [rng.normal(size=(num_terms, *shape)).astype(dtype) for _ in range(count)]


def assert_sums(found, arrays, rtol=1e-5):
    assert len(found) == len(arrays)
    for total, array in zip(found, arrays, strict=True):
        expected = np.sum(np.asarray(array, np.float64), axis=0)
        assert (total.shape, total.dtype) == (expected.shape, array.dtype)
        scale = np.sum(np.abs(np.asarray(array, np.float64)), axis=0)
        assert np.all(np.abs(np.asarray(total) - expected) <= rtol * scale + 1e-30)


@pytest.mark.parametrize("num_terms", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_of_any_number_of_terms(num_terms, count):
    arrays = arrays_of(num_terms, count=count)
    assert_sums(jax.jit(over_first_axis)(arrays), arrays)


@pytest.mark.parametrize("num_terms", SIZES)
def test_minima_beside_sums(num_terms):
    first, second, third = arrays_of(num_terms, count=3)
    third[0] = np.inf
    *sums, least = jax.jit(sums_and_minima)([first, second], [third])
    assert_sums(sums, [first, second])
    np.testing.assert_array_equal(least, np.min(third, axis=0))


@pytest.mark.parametrize("num_terms", [9, 80])
def test_sums_outside_of_a_jit_compile_once(num_terms, caplog):
    arrays = arrays_of(num_terms, (num_terms,))
    with jax.log_compiles():
        over_first_axis(arrays)
        assert "Compiling" in caplog.text
        caplog.clear()
        over_first_axis(arrays)
    assert "Compiling" not in caplog.text


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (2, 1, 3, 2)])
def test_sums_of_any_shape(shape):
    arrays = arrays_of(32, shape)
    assert_sums(over_first_axis(arrays), arrays)


def test_sums_of_float64():
    with enable_x64(True):
        arrays = arrays_of(48, dtype=np.float64)
        assert_sums(jax.jit(over_first_axis)(arrays), arrays, rtol=1e-14)


def test_what_is_not_finite_stays_in_its_component_and_its_sum():
    first, second = arrays_of(32)
    first[3, 0, 0], first[20, 1, 1] = np.nan, np.inf
    sums = jax.jit(over_first_axis)([first, second])
    assert np.isnan(sums[0][0, 0])
    assert np.isposinf(sums[0][1, 1])
    assert np.sum(~np.isfinite(sums[0])) == 2
    assert np.all(np.isfinite(sums[1]))


@pytest.mark.parametrize("num_terms", [5, 32, 272])
def test_derivatives_are_those_of_sums(num_terms):
    arrays, tangents = arrays_of(num_terms), arrays_of(num_terms + 1)
    tangents = [x[1:] for x in tangents]

    def value(sums_of, arrays):
        first, second = sums_of(arrays)
        return jnp.sum(first * jnp.tanh(second))

    ours = functools.partial(value, over_first_axis)
    plain = functools.partial(value, lambda arrays: [jnp.sum(x, 0) for x in arrays])
    for transform in (
        lambda f: jax.grad(f)(arrays),
        lambda f: jax.jvp(f, (arrays,), (tangents,)),
        lambda f: jax.jvp(jax.grad(f), (arrays,), (tangents,)),
    ):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            jax.jit(lambda t=transform: t(ours))(),
            jax.jit(lambda t=transform: t(plain))(),
        )


def test_mapped_sums_are_sums_of_each():
    arrays = arrays_of(32, (5, 3))
    found = jax.vmap(over_first_axis, in_axes=1)(arrays)
    assert_sums(found, arrays)


def test_sums_on_devices_are_sums_of_their_part():
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("env",))
    arrays = arrays_of(64)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("env"),), out_specs=P("env")
    )
    def parts(arrays):
        return [total[None] for total in over_first_axis(arrays)]

    found = jax.jit(parts)(arrays)
    assert_sums([jnp.sum(total, 0) for total in found], arrays)


@pytest.mark.parametrize("num_envs", [16, 80])
def test_a_mask_of_stacked_gradients_writes_down_no_copy_of_them(num_envs):
    tx = hardvary.and_mask(0.2)
    param = jnp.zeros((128, 256))
    grads = jnp.zeros((num_envs, *param.shape))
    update = jax.jit(lambda grads: tx.update(grads, tx.init(param), param))
    memory = update.lower(grads).compile().memory_analysis()
    # Sums of two statistics, of sixteen environments each.
    copies = 2 * (num_envs // 16) + 2
    assert memory.temp_size_in_bytes < copies * param.nbytes
