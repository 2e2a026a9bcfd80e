"""Numbers, schedules and trees of them as hyperparameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hardvary._hyperparams import check_unit_interval, is_scheduled, per_leaf
from tests._inputs import make_params


def rising(count):
    return count / 10


def raises(error, *parts):
    """pytest.raises for a message that contains the parts in this order."""
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


SCALARS = {
    "int": 1,
    "float": 0.5,
    "numpy": np.float64(0.5),
    "numpy_0d": np.array(1, np.int8),
    "jax_0d": jnp.float16(0.5),
    "schedule": rising,
    "partial": jax.tree_util.Partial(rising),
}


@pytest.mark.parametrize("value", SCALARS.values(), ids=SCALARS)
def test_scalar_and_schedule_pass_alone_and_in_trees(value):
    check_unit_interval("threshold", value)
    check_unit_interval("threshold", {"dense": [value, 0.1], "none": None})
    expected = 0.3 if callable(value) else value
    assert per_leaf("threshold", value, jnp.ones(2), 3) == [expected]
    assert per_leaf("threshold", {"w": value}, {"w": (1.0, 2.0)}, 3) == 2 * [expected]
    assert is_scheduled(value) == is_scheduled([0.1, value]) == callable(value)


def test_traced_values_pass_unseen():
    @jax.jit
    def run(value):
        check_unit_interval("threshold", {"w": value})
        return per_leaf("threshold", {"w": value}, {"w": (1.0, 2.0)}, 0)

    assert [float(value) for value in run(5.0)] == [5.0, 5.0]


@pytest.mark.parametrize(
    "value",
    ["0.5", True, np.bool_(True), 0.5j, np.array([0.5]), jnp.ones(1), object()],
    ids=["str", "bool", "numpy_bool", "complex", "array", "jax_array", "object"],
)
def test_check_unit_interval_of_no_real_scalar_raises(value):
    with raises(TypeError, "threshold must be a real scalar in [0, 1]", "schedule"):
        check_unit_interval("threshold", value)
    with raises(TypeError, "threshold['a'][1] must be a real scalar", "got"):
        check_unit_interval("threshold", {"a": [0.5, value]})


def test_check_unit_interval_of_none_raises():
    with raises(TypeError, "threshold must be a real scalar", "got None"):
        check_unit_interval("threshold", None)


@pytest.mark.parametrize("value", [-0.1, 2, np.float32(1.5), jnp.float32(-1), np.nan])
def test_check_unit_interval_outside_raises(value):
    with raises(ValueError, "threshold must lie in [0, 1]", f"got {float(value)}"):
        check_unit_interval("threshold", value)
    with raises(ValueError, "threshold['a'][1] must lie", f"got {float(value)}"):
        check_unit_interval("threshold", {"a": [0.5, value]})


def test_per_leaf_of_a_prefix_gives_every_leaf_its_own():
    params = make_params("nested")
    value = {"dense": rising, "scale": 0.25, "none": None}
    # bias, kernel, scale: the order of jax.tree.leaves.
    assert per_leaf("threshold", value, params, 7) == [0.7, 0.7, 0.25]
    value["dense"] = {"bias": 0.5, "kernel": 0.75}
    assert per_leaf("threshold", value, params, 0) == [0.5, 0.75, 0.25]


def test_per_leaf_evaluates_a_schedule_once():
    counts = []

    def schedule(count):
        counts.append(count)
        return 0.5

    per_leaf(
        "threshold",
        {"dense": schedule, "scale": 0.0},
        {"dense": (1, 2)} | {"scale": 1},
        4,
    )
    assert counts == [4]


def test_per_leaf_where_the_tree_has_no_leaves_takes_anything():
    value = {"a": {"w": 0.5, "b": 0.1}, "c": 0.25}
    for nothing in (optax.MaskedNode(), None, {}):
        tree = {"a": nothing, "c": 1.0}
        assert per_leaf("threshold", value, tree, 0) == [0.25]
    assert per_leaf("threshold", 0.5, {}, 0) == []


def test_per_leaf_under_masked_and_partition_fits_the_whole_tree():
    value = {"dense": {"kernel": 0.5, "bias": 0.25}, "scale": 1.0, "none": None}
    seen = []

    def update_fn(updates, state, params=None):
        seen.append(per_leaf("threshold", value, updates, 0))
        return updates, state

    tx = optax.GradientTransformation(lambda _: optax.EmptyState(), update_fn)
    params = make_params("nested")
    mask = {"dense": True, "scale": False, "none": None}
    masked = optax.masked(tx, mask)
    masked.update(params, masked.init(params))
    labels = {"dense": "a", "scale": "b", "none": None}
    parts = optax.partition({"a": optax.identity(), "b": tx}, labels)
    parts.update(params, parts.init(params))
    assert seen == [[0.25, 0.5], [1.0]]


def test_per_leaf_stops_at_what_is_leaf_names():
    params = {"w": [1.0, 2.0], "b": 3.0}

    def is_pair(node):
        return isinstance(node, list)

    value = {"w": 0.5, "b": 0.25}
    assert per_leaf("threshold", value, params, 0, is_leaf=is_pair) == [0.25, 0.5]
    with raises(ValueError, "at ['w'] it has a list where params have a leaf"):
        per_leaf("threshold", {"w": [0.1, 0.2], "b": 0.0}, params, 0, is_leaf=is_pair)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"w": 0.1}, "c": 0.1}, "it has nothing at ['a']['b']"),
        ({"a": 0.1, "c": 0.1, "d": 0.1}, "params have nothing at ['d']"),
        (
            {"a": 0.1, "c": {"w": 0.1}},
            "at ['c'] it has a dict where params have a leaf",
        ),
        (
            {"a": [0.1, 0.2], "c": 0.1},
            "at ['a'] it has a list where params have a dict",
        ),
        ({"a": None, "c": 0.1}, "at ['a'] it has None where params have a dict"),
        ([0.1], "at the root it has a list where params have a dict"),
    ],
    ids=["missing", "unknown", "too_deep", "other_node", "none", "root"],
)
def test_per_leaf_of_no_prefix_names_the_first_path(value, message):
    params = {"a": {"w": 1.0, "b": 2.0}, "c": 3.0}
    with raises(ValueError, "threshold must be", "prefix of params; " + message):
        per_leaf("threshold", value, params, 0)


@pytest.mark.parametrize(
    "value", [None, jnp.ones(2), "0.5"], ids=["none", "array", "str"]
)
def test_per_leaf_of_a_schedule_without_a_scalar_raises(value):
    with raises(TypeError, "what the schedule threshold['w'] returns must be a real"):
        per_leaf("threshold", {"w": lambda count: value}, {"w": 1.0}, 0)


@jax.tree_util.register_pytree_node_class
class CallableModel:
    """Parameters that can be called, as Equinox has them."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return self.weight * x

    def tree_flatten(self):
        return (self.weight,), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def test_tree_that_is_callable_is_no_schedule():
    value = jax.tree.map(lambda _: 0.5, CallableModel(jnp.ones(2)))
    check_unit_interval("threshold", value)
    assert not is_scheduled(value)
    assert per_leaf("threshold", value, CallableModel(jnp.ones(2)), 3) == [0.5]
