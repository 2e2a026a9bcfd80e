import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.synthetic.data import (
    MIN_RADIUS,
    RADIUS_NOISE,
    TEST_EXAMPLES,
    Dataset,
    add_shortcuts,
    make_dataset,
    spiral_std,
    spirals,
)

ENVS, EXAMPLES, DIMS = 5, 40, 6


@pytest.fixture(scope="module")
def dataset():
    return make_dataset(jax.random.key(0), ENVS, EXAMPLES, DIMS)


def shortcuts_of(split):
    """Every example's shortcut with the sign of its label taken out."""
    signs = 2 * split.labels[..., None] - 1
    return np.asarray(signs * split.features[..., 2:])


def test_make_dataset_has_the_documented_shapes(dataset):
    assert dataset.train.features.shape == (ENVS, EXAMPLES, 2 + DIMS)
    assert dataset.train.labels.shape == (ENVS, EXAMPLES)
    assert dataset.validation.features.shape == (ENVS, 128, 2 + DIMS)
    assert dataset.validation.labels.shape == (ENVS, 128)
    assert dataset.held_out.features.shape == (128, 16, 2 + DIMS)
    assert dataset.held_out.labels.shape == (128, 16)
    assert dataset.test.features.shape == (2000, 2 + DIMS)
    assert dataset.test.labels.shape == (2000,)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(dataset))


@pytest.mark.parametrize("name", Dataset._fields)
def test_make_dataset_labels_are_binary_and_balanced(dataset, name):
    labels = np.asarray(getattr(dataset, name).labels)
    assert set(np.unique(labels)) == {0.0, 1.0}
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(labels.size)


@pytest.mark.parametrize("revolutions", [1.0, 3.0, 3.7])
def test_spirals_angle_follows_from_radius_and_label(revolutions):
    split = spirals(jax.random.key(1), (4000,), revolutions)
    points = np.asarray(split.features * spiral_std(revolutions))
    labels = np.asarray(split.labels)
    radius = np.linalg.norm(points, axis=-1)
    assert radius.min() >= MIN_RADIUS - RADIUS_NOISE - 1e-5
    assert radius.max() <= 1 + RADIUS_NOISE + 1e-5
    angle = np.arctan2(points[:, 1], points[:, 0])
    expected = 2 * np.pi * revolutions * radius + np.pi * labels
    error = np.angle(np.exp(1j * (angle - expected)))
    # The angle was taken before the radius was disturbed, by up to RADIUS_NOISE.
    limit = 2 * np.pi * revolutions * RADIUS_NOISE
    assert np.abs(error).max() <= limit + 1e-3
    assert np.abs(error).max() > 0.9 * limit


@pytest.mark.parametrize("revolutions", [0.5, 1.0, 3.0])
def test_spiral_std_gives_unit_variance(revolutions):
    points = spirals(jax.random.key(2), (400_000,), revolutions).features
    np.testing.assert_allclose(points.std(axis=0), 1.0, atol=0.005)
    np.testing.assert_allclose(points.mean(axis=0), 0.0, atol=0.01)


def test_spiral_std_agrees_with_numerical_integration():
    r = np.linspace(MIN_RADIUS, 1, 200_001)
    second_moment = r**2 + RADIUS_NOISE**2 / 3
    direction = np.stack([np.cos(6 * np.pi * r), np.sin(6 * np.pi * r)])
    variance = np.trapezoid(second_moment * direction**2, r, axis=-1) / (1 - MIN_RADIUS)
    np.testing.assert_allclose(spiral_std(3.0), np.sqrt(variance), rtol=1e-5)


def test_make_dataset_training_environment_has_one_shortcut(dataset):
    shortcuts = shortcuts_of(dataset.train)
    assert (shortcuts == shortcuts[:, :1]).all()
    assert len(np.unique(shortcuts[:, 0], axis=0)) == ENVS


def test_add_shortcuts_sign_is_the_label():
    mechanism = spirals(jax.random.key(0), (3, 4), 3.0)
    vectors = jnp.arange(1.0, 7.0).reshape(3, 1, 2)
    split = add_shortcuts(mechanism, vectors)
    expected = np.where(mechanism.labels[..., None] == 1, vectors, -vectors)
    np.testing.assert_array_equal(split.features[..., 2:], expected)
    np.testing.assert_array_equal(split.features[..., :2], mechanism.features)
    np.testing.assert_array_equal(split.labels, mechanism.labels)


def test_make_dataset_every_test_example_has_its_own_shortcut(dataset):
    assert len(np.unique(shortcuts_of(dataset.test), axis=0)) == TEST_EXAMPLES


def test_make_dataset_test_shortcuts_say_nothing_about_the_label(dataset):
    signs = np.asarray(2 * dataset.test.labels - 1)
    correlation = (signs[:, None] * dataset.test.features[:, 2:]).mean(axis=0)
    assert np.abs(correlation).max() < 4 / np.sqrt(TEST_EXAMPLES)


def test_make_dataset_splits_share_no_shortcut(dataset):
    seen = [
        {tuple(row) for row in shortcuts_of(split).reshape(-1, DIMS)}
        for split in dataset
    ]
    train, validation, held_out, test = seen
    assert [len(train), len(held_out), len(test)] == [ENVS, 128, TEST_EXAMPLES]
    assert validation == train
    assert train.isdisjoint(held_out)
    assert train.isdisjoint(test)
    assert held_out.isdisjoint(test)


def test_make_dataset_splits_share_no_spiral_point(dataset):
    points = [np.asarray(split.features[..., :2]).reshape(-1, 2) for split in dataset]
    stacked = np.concatenate(points)
    assert len(np.unique(stacked, axis=0)) == len(stacked)


def test_make_dataset_same_key_gives_the_same_data(dataset):
    again = make_dataset(jax.random.key(0), ENVS, EXAMPLES, DIMS)
    other = make_dataset(jax.random.key(1), ENVS, EXAMPLES, DIMS)
    for first, second, third in zip(
        jax.tree.leaves(dataset),
        jax.tree.leaves(again),
        jax.tree.leaves(other),
        strict=True,
    ):
        np.testing.assert_array_equal(first, second)
        assert (first != third).any()


def test_make_dataset_shortcut_std_scales_the_shortcuts_only(dataset):
    weak = make_dataset(jax.random.key(0), ENVS, EXAMPLES, DIMS, shortcut_std=0.1)
    for name in Dataset._fields:
        strong, scaled = getattr(dataset, name), getattr(weak, name)
        np.testing.assert_array_equal(
            strong.features[..., :2], scaled.features[..., :2]
        )
        np.testing.assert_allclose(
            0.1 * strong.features[..., 2:], scaled.features[..., 2:], rtol=1e-6
        )
    assert abs(np.asarray(shortcuts_of(dataset.test)).std() - 1) < 0.05
