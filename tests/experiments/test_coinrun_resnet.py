"""ResNet-18 against a forward pass written by hand, and its pooling's gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.coinrun.student import resnet
from experiments.coinrun.student.resnet import (
    Architecture,
    Variables,
    init_variables,
    make_apply,
    make_train_apply,
)
from tests._asserts import assert_trees_close
from tests.zoo.blocks import floats

ARCHITECTURE = Architecture(width=2, momentum=0.8)


def by_name(tree):
    """Leaves by dotted path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        ".".join(str(k.key) for k in path if hasattr(k, "key")): np.asarray(
            leaf, np.float64
        )
        for path, leaf in leaves
    }


@functools.cache
def variables():
    """Random ones, also where initial ones are 0 or 1."""
    init = functools.partial(init_variables, architecture=ARCHITECTURE)
    initial = jax.jit(init)(jax.random.key(0))
    rng = np.random.default_rng(1)

    def perturb(leaf):
        return leaf + floats(rng.uniform(-0.2, 0.3, leaf.shape), leaf.dtype)

    return jax.tree.map(perturb, initial)


class ByHand:
    """ResNet-18 in NumPy, from the paper's table 1."""

    def __init__(self, tree, training):
        self.params, self.stats = by_name(tree.params), by_name(tree.batch_stats)
        self.training, self.new_stats = training, {}

    def logits(self, batch):
        x = self.layer("stem", batch / 255.0 - 0.5, 2)
        x = self.pool(np.maximum(x, 0))
        for index in range(8):
            halves = index in (2, 4, 6)
            name, stride = f"blocks.{index}", 2 if halves else 1
            y = np.maximum(self.layer(f"{name}.first", x, stride), 0)
            y = self.layer(f"{name}.second", y, 1)
            if halves:
                x = self.layer(f"{name}.shortcut", x, 2)
            x = np.maximum(x + y, 0)
        kernel, bias = self.params["head.kernel"], self.params["head.bias"]
        return x.mean((1, 2)) @ kernel + bias

    def layer(self, name, x, stride):
        x = self.conv(x, self.params[f"{name}.conv.kernel"], stride)
        mean, var = self.stats[f"{name}.norm.mean"], self.stats[f"{name}.norm.var"]
        if self.training:
            old = mean, var
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.new_stats[f"{name}.norm.mean"] = 0.8 * old[0] + 0.2 * mean
            self.new_stats[f"{name}.norm.var"] = 0.8 * old[1] + 0.2 * var
        scale = self.params[f"{name}.norm.scale"]
        bias = self.params[f"{name}.norm.bias"]
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    @staticmethod
    def windows(x, size, stride, value):
        """[batch, row, column, size, size, channel]."""
        side = size // 2
        edges = ((0, 0), (side, side), (side, side), (0, 0))
        padded = np.pad(x, edges, constant_values=value)
        view = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
        return view[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)

    @classmethod
    def conv(cls, x, kernel, stride):
        windows = cls.windows(x, len(kernel), stride, 0)
        return np.einsum("brcijk,ijko->brco", windows, kernel)

    @classmethod
    def pool(cls, x):
        return cls.windows(x, 3, 2, -np.inf).max((3, 4))


@pytest.mark.parametrize("shape", [(64, 64), (34, 47)], ids=["paper", "odd"])
def test_resnet_is_the_network_written_by_hand(shape):
    batch = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), np.uint8)
    tree = variables()
    evaluated = jax.jit(make_apply(ARCHITECTURE))(tree, batch)
    by_hand = ByHand(tree, training=False)
    np.testing.assert_allclose(evaluated, by_hand.logits(batch), rtol=1e-3, atol=1e-4)

    trained, stats = jax.jit(make_train_apply(ARCHITECTURE))(tree, batch)
    by_hand = ByHand(tree, training=True)
    np.testing.assert_allclose(trained, by_hand.logits(batch), rtol=1e-3, atol=1e-3)
    stats = by_name(stats)
    assert set(stats) == set(by_hand.new_stats)
    for name, expected in by_hand.new_stats.items():
        np.testing.assert_allclose(
            stats[name], expected, rtol=1e-3, atol=1e-4, err_msg=name
        )


@pytest.mark.parametrize("shape", [(2, 2), (4, 3), (1, 1), (5, 5)], ids=str)
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2), (1, 1), (7, 2)])
def test_convolve_is_xlas_convolution(shape, size, stride):
    rng = np.random.default_rng(0)
    x = floats(rng.normal(size=(3, *shape, 5)))
    kernel = floats(rng.normal(size=(size, size, 5, 4)))
    strides, padding = (stride, stride), ((size // 2, size // 2),) * 2
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def pull(function):
        def of(x, kernel):
            return function(x, kernel, strides, padding, **numbers)

        y, back = jax.vjp(of, x, kernel)
        return y, back(jnp.cos(y))

    ours = jax.jit(lambda: pull(resnet.convolve))()
    xlas = jax.jit(lambda: pull(jax.lax.conv_general_dilated))()
    assert_trees_close(ours, xlas, rtol=1e-4, atol=1e-5)


def count(architecture):
    init = functools.partial(init_variables, architecture=architecture)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes.params))


def test_resnet_18_of_the_paper_has_its_number_of_parameters():
    # torchvision's resnet18 has 11,689,512 with the head for 1000 classes.
    body = 11_689_512 - (512 * 1000 + 1000)
    assert count(Architecture()) == body + 512 * 15 + 15
    assert count(Architecture(outputs=1000)) == 11_689_512


def test_resnet_initial_weights_are_torchvisions():
    init = functools.partial(init_variables, architecture=Architecture(16, blocks=1))
    tree = jax.jit(init)(jax.random.key(0))
    params = by_name(tree.params)
    kernel = params["blocks.3.second.conv.kernel"]
    assert kernel.shape == (3, 3, 128, 128)
    deviation = np.sqrt(2 / (9 * 128))
    assert abs(kernel.std() / deviation - 1) < 0.02
    assert np.abs(kernel).max() > 3.5 * deviation  # not truncated
    assert abs(params["head.kernel"]).max() <= 1 / np.sqrt(128)
    assert isinstance(tree, Variables)
    assert "blocks.0.shortcut.conv.kernel" not in params


@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
def test_max_pool_gives_the_whole_gradient_to_the_largest(jitted):
    rng = np.random.default_rng(0)
    # After ReLU: many zeros, and maxima that are not tied.
    x = np.maximum(rng.permutation(2 * 7 * 8 * 3).reshape(2, 7, 8, 3) - 150.0, 0)
    cotangent = rng.normal(size=(2, 4, 4, 3))

    def pull(x):
        pooled, back = jax.vjp(resnet._max_pool, x)
        return pooled, back(jnp.asarray(cotangent, jnp.float32))[0]

    if jitted:
        pull = jax.jit(pull)
    pooled, grads = pull(jnp.asarray(x, jnp.float32))
    expected = np.zeros_like(x)
    for place in np.ndindex(2, 4, 4, 3):
        image, row, column, channel = place
        rows, columns = (slice(max(0, 2 * i - 1), 2 * i + 2) for i in (row, column))
        window = x[image, rows, columns, channel]
        assert pooled[place] == window.max()
        if window.max() > 0:
            target = expected[image, rows, columns, channel]
            target[window == window.max()] += cotangent[place]
    np.testing.assert_allclose(np.where(x > 0, grads, 0), expected, rtol=1e-6)
