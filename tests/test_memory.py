"""The largest microbatch that fits, as the compiler says."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import hardvary

NUM_ENVS = 12
SIZES = [1, 2, 3, 4, 6, 12]


def loss_fn(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


W, X = jax.ShapeDtypeStruct((40, 30), "float32"), jnp.ones((NUM_ENVS, 50, 40))


def make_step(size, compiled=None):
    """A whole step; notes for what sizes it was made."""
    if compiled is not None:
        compiled.append(size)
    tx = optax.chain(hardvary.and_mask(), optax.sgd(0.1))
    oracle = hardvary.grad_stats(loss_fn, microbatch_size=size)

    def step(w, x):
        updates, _ = tx.update(oracle(w, x), tx.init(w), w)
        return optax.apply_updates(w, updates)

    return step


@functools.cache
def needed(size):
    memory = jax.jit(make_step(size)).lower(W, X).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def fitting(memory_budget, make_step=make_step, num_envs=NUM_ENVS):
    return hardvary.largest_microbatch_size(
        make_step, (W, X), num_envs=num_envs, memory_budget=memory_budget
    )


def test_memory_of_the_example_grows_with_the_microbatch():
    assert list(map(needed, SIZES)) == sorted({needed(size) for size in SIZES})


@pytest.mark.parametrize("size", SIZES)
def test_largest_microbatch_size_is_the_largest_that_fits(size):
    assert fitting(needed(size)) == size
    if size > 1:
        assert fitting(needed(size) - 1) == SIZES[SIZES.index(size) - 1]


def test_largest_microbatch_size_compiles_once_where_all_environments_fit():
    compiled = []
    fitting(10**9, lambda size: jax.jit(make_step(size, compiled)))
    assert compiled == [NUM_ENVS]


def test_largest_microbatch_size_counts_results_that_replace_an_argument_as_nothing():
    def donating(size):
        return jax.jit(make_step(size), donate_argnums=0)

    memory = donating(4).lower(W, X).compile().memory_analysis()
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes == 4 * 40 * 30
    assert fitting(memory.temp_size_in_bytes, donating) == 4


def test_largest_microbatch_size_budget_for_no_environment_names_what_one_takes():
    with pytest.raises(ValueError, match=f"memory_budget=100 .*: {needed(1)} bytes"):
        fitting(100)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"make_step": 3}, TypeError, "make_step must be a function"),
        ({"num_envs": 0}, ValueError, "num_envs must be >= 1, got 0"),
        ({"memory_budget": 1e6}, TypeError, "memory_budget must be an integer"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be >= 1, got 0"),
    ],
)
def test_largest_microbatch_size_wrong_arguments_are_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        fitting(**{"memory_budget": 10**6, **wrong})


def test_largest_microbatch_size_backend_that_tells_nothing_is_refused():
    class Silent:
        def lower(self, *_):
            return self

        compile = lower

        def memory_analysis(self):
            return None

    with pytest.raises(NotImplementedError, match="does not tell how much memory"):
        fitting(10**6, lambda size: Silent())
