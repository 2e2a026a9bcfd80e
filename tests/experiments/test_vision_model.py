"""FastResNet against a forward pass written by hand, and its gradients by example."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.vision.config import Settings
from experiments.vision.model import (
    ENV_AXIS,
    LAYERS,
    NORMS,
    Architecture,
    Variables,
    init_variables,
    layer_of,
    make_apply,
    make_train_apply,
    normalize,
)
from experiments.vision.training import make_plain_gradients, make_voting_gradients
from tests._asserts import assert_trees_close, assert_trees_equal, field_of
from tests.zoo.blocks import floats

EXAMPLES = 4
SETTINGS = Settings(dataset="generated", width=2, batch_size=EXAMPLES)
LABELS = jnp.array([3, 1, 4, 1])


@functools.cache
def initialize(architecture):
    init = functools.partial(init_variables, architecture=architecture)
    return jax.jit(init)(jax.random.key(0))


def images(channels=1, side=8, seed=0, examples=EXAMPLES):
    shape = (examples, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@functools.cache
def variables(channels=1, norm="batch"):
    """Random ones, also where initial ones are 0 or 1."""
    initial = initialize(Architecture(channels, 2, norm))
    rng = np.random.default_rng(1)

    def perturb(leaf):
        return leaf + floats(rng.uniform(-0.2, 0.3, leaf.shape), leaf.dtype)

    return jax.tree.map(perturb, initial)


def by_name(tree):
    """Leaves by dotted path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        ".".join(str(getattr(k, "key", k)) for k in path): np.asarray(leaf, np.float64)
        for path, leaf in leaves
    }


def find(leaves, *parts):
    [name] = [n for n in leaves if n.split(".")[: len(parts)] == list(parts)]
    return leaves[name]


class ByHand:
    """FastResNet in NumPy loops, from the paper's description."""

    def __init__(self, tree, norm, training):
        self.params, self.stats = by_name(tree.params), by_name(tree.batch_stats)
        self.norm, self.training, self.new_stats = norm, training, {}

    def logits(self, batch):
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        if batch.shape[-1] == 1:
            mean, std = mean.mean(), std.mean()
        x = (batch / 255.0 - mean) / std
        x = self.block("prep", x)
        x = self.pool(self.block("layer1", x))
        x = x + self.block("residual1.1", self.block("residual1.0", x))
        x = self.pool(self.block("layer2", x))
        x = self.pool(self.block("layer3", x))
        x = x + self.block("residual3.1", self.block("residual3.0", x))
        return 0.125 * x.max((1, 2)) @ find(self.params, "head", "kernel")

    def block(self, name, x):
        x = self.conv(x, find(self.params, *name.split("."), "conv", "kernel"))
        scale = find(self.params, *name.split("."), "norm", "scale")
        bias = find(self.params, *name.split("."), "norm", "bias")
        if self.norm == "group":
            mean, var = self.group_moments(x)
        elif self.training:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            old = [
                find(self.stats, *name.split("."), "norm", s) for s in ("mean", "var")
            ]
            self.new_stats[name] = 0.9 * old[0] + 0.1 * mean, 0.9 * old[1] + 0.1 * var
        else:
            mean = find(self.stats, *name.split("."), "norm", "mean")
            var = find(self.stats, *name.split("."), "norm", "var")
        return np.maximum(0, (x - mean) / np.sqrt(var + 1e-5) * scale + bias)

    @staticmethod
    def group_moments(x):
        channels = x.shape[-1]
        groups = int(np.gcd(8, channels))
        parts = x.reshape(*x.shape[:3], groups, channels // groups)
        mean, var = parts.mean((1, 2, 4)), parts.var((1, 2, 4))
        each = channels // groups
        return [np.repeat(m, each, axis=1)[:, None, None] for m in (mean, var)]

    @staticmethod
    def conv(x, kernel):
        _, height, width, _ = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        out = np.zeros((*x.shape[:3], kernel.shape[-1]))
        for i in range(height):
            for j in range(width):
                window = padded[:, i : i + 3, j : j + 3]
                out[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel)
        return out

    @staticmethod
    def pool(x):
        batch, height, width, channels = x.shape
        out = np.empty((batch, height // 2, width // 2, channels))
        for i in range(height // 2):
            for j in range(width // 2):
                out[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((1, 2))
        return out


# An odd side on the way (18, 9, 4, 2), and three channels.
@pytest.mark.parametrize(
    ("channels", "side", "norm"),
    [(1, 8, "batch"), (3, 18, "batch"), (1, 8, "group")],
    ids=["gray", "colour", "group norm"],
)
def test_fast_resnet_is_the_network_written_by_hand(channels, side, norm):
    architecture, tree = Architecture(channels, 2, norm), variables(channels, norm)
    batch = images(channels, side)
    evaluated = jax.jit(make_apply(architecture))(tree, batch)
    by_hand = ByHand(tree, norm, training=False)
    np.testing.assert_allclose(evaluated, by_hand.logits(batch), rtol=2e-4, atol=2e-5)

    trained, stats = jax.jit(make_train_apply(architecture))(tree, batch)
    by_hand = ByHand(tree, norm, training=True)
    np.testing.assert_allclose(trained, by_hand.logits(batch), rtol=2e-4, atol=2e-5)
    stats = by_name(stats)
    assert len(stats) == (16 if norm == "batch" else 0)
    for name, (mean, var) in by_hand.new_stats.items():
        for part, expected in (("mean", mean), ("var", var)):
            value = find(stats, *name.split("."), "norm", part)
            np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("channels", "count"),
    # 9 weights for each pair of channels; two numbers for each channel's norm; head.
    [
        (3, 9 * 729280 + 2 * 2240 + 5120),
        (1, 9 * (729280 - 128) + 2 * 2240 + 5120),
    ],
)
def test_fast_resnet_of_the_paper_has_its_number_of_parameters(channels, count):
    shapes = jax.eval_shape(
        functools.partial(init_variables, architecture=Architecture(channels)),
        jax.random.key(0),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes.params)) == count


def test_fast_resnet_initial_weights_are_uniform_in_pytorchs_range():
    params = by_name(initialize(Architecture(3, 8)).params)
    kernel = find(params, "layer3", "conv", "kernel")
    limit = 1 / np.sqrt(9 * 32)
    assert 0.99 * limit < np.abs(kernel).max() <= limit
    assert abs(kernel.std() / (limit / np.sqrt(3)) - 1) < 0.02


def test_fast_resnet_too_small_image_is_refused():
    architecture = Architecture(1, 2)
    with pytest.raises(ValueError, match=r"at least 8 x 8 .* got 7 x 9"):
        jax.eval_shape(
            make_apply(architecture), variables(), jnp.zeros((1, 7, 9, 1), jnp.uint8)
        )


def test_normalize_is_in_units_of_imagenets_deviation():
    colour = jnp.array([[[[0, 128, 255]]]], jnp.uint8)
    expected = (np.array([0, 128, 255]) / 255 - [0.485, 0.456, 0.406]) / [
        0.229,
        0.224,
        0.225,
    ]
    np.testing.assert_allclose(normalize(colour)[0, 0, 0], expected, rtol=1e-5)
    gray = normalize(jnp.array([255], jnp.uint8))
    np.testing.assert_allclose(gray, [(1 - 0.449) / 0.226], rtol=1e-5)


def test_layer_of_names_every_layer_once():
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables().params)
    names = [layer_of(path) for path, _ in leaves]
    assert sorted(name for name in names if name != NORMS) == sorted(LAYERS)
    assert names.count(NORMS) == 16


def losses_of(params, batch_stats, norm):
    """Losses [example] from one forward pass on the whole batch."""
    apply = make_train_apply(Architecture(1, 2, norm))
    logits, _ = apply(Variables(params, batch_stats), images())
    return -jax.nn.log_softmax(logits)[jnp.arange(EXAMPLES), LABELS]


@functools.cache
def gradients(norm="batch", voting=False, **changes):
    settings = dataclasses.replace(SETTINGS, norm=norm, **changes)
    make = make_voting_gradients if voting else make_plain_gradients
    return jax.jit(make(settings, 1))(variables(1, norm), images(), LABELS)


def test_plain_gradient_is_that_of_the_mean_loss():
    params, stats = variables()
    grad = jax.grad(lambda p: losses_of(p, stats, "batch").mean())
    expected = jax.jit(grad)(params)
    assert_trees_close(gradients().gradients, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_path_gradients_of_examples_add_up_to_the_batch_gradient(norm):
    tree = variables(1, norm)
    axis_name = ENV_AXIS if norm == "batch" else None
    apply = make_train_apply(Architecture(1, 2, norm), axis_name)

    def summed(copies):
        def loss(params, image, label):
            logits, _ = apply(Variables(params, tree.batch_stats), image[None])
            return -jax.nn.log_softmax(logits)[0, label]

        return jax.vmap(loss, axis_name=ENV_AXIS)(copies, images(), LABELS).sum()

    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * EXAMPLES), tree.params)
    stacked = jax.jit(jax.grad(summed))(copies)
    voting, plain = gradients(norm, voting=True), gradients(norm)
    mean = jax.tree.map(lambda leaf: leaf.mean(0), stacked)
    votes = jax.tree.map(lambda leaf: jnp.sign(leaf).sum(0), stacked)
    assert_trees_close(mean, plain.gradients, rtol=1e-3, atol=2e-6)
    assert_trees_close(field_of(voting.gradients, "mean"), mean, rtol=1e-3, atol=2e-6)
    assert_votes_agree(field_of(voting.gradients, "sign_sum"), votes, stacked)
    assert_trees_close(voting.losses, plain.losses, rtol=1e-4, atol=1e-6)
    assert_trees_close(voting.batch_stats, plain.batch_stats, rtol=1e-4, atol=1e-6)


def assert_votes_agree(actual, expected, stacked):
    """Equal wherever no gradient is nothing but rounding."""
    clear = jax.tree.map(
        lambda leaf: ((jnp.abs(leaf) > 1e-6) | (leaf == 0)).all(0), stacked
    )
    share = np.mean([np.mean(leaf) for leaf in jax.tree.leaves(clear)])
    assert share > 0.5
    masked = [
        jax.tree.map(lambda leaf, where: jnp.where(where, leaf, 0), tree, clear)
        for tree in (actual, expected)
    ]
    assert_trees_close(*masked, rtol=0, atol=0)


@pytest.fixture(scope="module")
def backward_passes():
    """The full gradient of each example's loss, one backward pass for each."""
    params, stats = variables()
    one = jax.jit(jax.grad(lambda p, e: losses_of(p, stats, "batch")[e]))
    passes = [one(params, e) for e in range(EXAMPLES)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *passes)


@pytest.mark.parametrize("size", [1, 4])
def test_coupled_gradients_are_separate_backward_passes(size, backward_passes):
    result = gradients(voting=True, batch_norm="coupled", microbatch_size=size)
    mean = jax.tree.map(lambda leaf: leaf.mean(0), backward_passes)
    votes = jax.tree.map(lambda leaf: jnp.sign(leaf).sum(0), backward_passes)
    assert_trees_close(field_of(result.gradients, "mean"), mean, rtol=1e-3, atol=2e-6)
    assert_votes_agree(field_of(result.gradients, "sign_sum"), votes, backward_passes)
    totals = jax.tree.leaves(field_of(result.gradients, "num_envs"))
    assert all(total == EXAMPLES for total in totals)
    assert_trees_close(result.losses, gradients().losses, rtol=1e-4, atol=1e-6)


def test_path_and_coupled_have_one_mean_and_different_votes():
    path = gradients(voting=True).gradients
    coupled = gradients(voting=True, batch_norm="coupled", microbatch_size=4).gradients
    means = (field_of(stats, "mean") for stats in (path, coupled))
    assert_trees_close(*means, rtol=1e-3, atol=2e-6)
    votes = (field_of(stats, "sign_sum") for stats in (path, coupled))
    different = jax.tree.map(lambda a, b: (a != b).mean(), *votes)
    assert max(jax.tree.leaves(different)) > 0.1


def test_fused_and_vmap_votes_are_equal():
    """Also as compiled for training: XLA gets gradients of some poolings wrong."""
    batch, labels = images(examples=20), jnp.arange(20) % 10
    fused, stacked = (
        jax.jit(make_voting_gradients(dataclasses.replace(SETTINGS, oracle=oracle), 1))(
            variables(), batch, labels
        )
        for oracle in ("fused", "vmap")
    )
    results = fused.gradients, stacked.gradients
    assert_trees_equal(*(field_of(stats, "sign_sum") for stats in results))
    assert_trees_close(*(field_of(stats, "mean") for stats in results), rtol=1e-4)
    assert_trees_close(fused.losses, stacked.losses)
