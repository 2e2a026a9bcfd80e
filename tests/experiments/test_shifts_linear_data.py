"""The laws of the linear unit tests."""

import numpy as np
import pytest

from experiments.shifts.config import PROBLEMS
from experiments.shifts.linear_data import (
    FEATURES,
    HELD_OUT_ENVS,
    INVARIANT,
    make_data,
    random_rotation,
)

ENVS, EXAMPLES = 4, 4000


@pytest.fixture(scope="module")
def drawn():
    return {problem: make_data(0, problem, ENVS, EXAMPLES) for problem in PROBLEMS}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_make_data_has_the_shapes_that_it_says(drawn, problem):
    for name, envs in (("train", ENVS), ("test", ENVS), ("held_out", HELD_OUT_ENVS)):
        split = getattr(drawn[problem], name)
        assert split.features.shape == (envs, EXAMPLES, FEATURES)
        assert split.labels.shape == (envs, EXAMPLES)
        assert split.features.dtype == split.labels.dtype == np.float32


@pytest.mark.parametrize("problem", PROBLEMS)
def test_make_data_is_the_seeds_alone(drawn, problem):
    again = make_data(0, problem, ENVS, EXAMPLES)
    other = make_data(1, problem, ENVS, EXAMPLES)
    np.testing.assert_array_equal(again.test.features, drawn[problem].test.features)
    assert not np.array_equal(other.test.features, again.test.features)


@pytest.mark.parametrize("problem", ["example1", "example2", "example3"])
def test_scrambled_twin_is_a_rotation_of_the_same_examples(drawn, problem):
    for plain, scrambled in zip(drawn[problem], drawn[f"{problem}s"], strict=True):
        np.testing.assert_array_equal(plain.labels, scrambled.labels)
        x, turned = (s.features[0].astype(float) for s in (plain, scrambled))
        found = np.linalg.lstsq(x, turned)[0]
        np.testing.assert_allclose(found @ found.T, np.eye(FEATURES), atol=1e-4)
        assert not np.allclose(found, np.eye(FEATURES), atol=0.1)


def test_random_rotation_is_orthogonal():
    q = random_rotation(np.random.default_rng(0), 7)
    np.testing.assert_allclose(q @ q.T, np.eye(7), atol=1e-12)


def _weight_of_spurious(split, env=1):
    """Share of the explained variance that a fit loses without them."""
    x, y = split.features[env].astype(float), split.labels[env].astype(float)
    x, y = x - x.mean(axis=0), y - y.mean()

    def residual(columns):
        fit = np.linalg.lstsq(x[:, columns], y)[0]
        return np.mean(np.square(x[:, columns] @ fit - y))

    return residual(slice(0, INVARIANT)) / residual(slice(None)) - 1


@pytest.mark.parametrize("problem", ["example1", "example2", "example3"])
def test_spurious_features_tell_the_label_but_not_in_the_test(drawn, problem):
    data = drawn[problem]
    assert _weight_of_spurious(data.train) > 0.01
    assert _weight_of_spurious(data.held_out) > 0.01
    assert _weight_of_spurious(data.test) < 0.005


@pytest.mark.parametrize("problem", ["example1", "example2", "example3"])
def test_oracle_trains_on_shuffled_features(problem):
    data = make_data(0, problem, ENVS, EXAMPLES, oracle=True)
    for split in data:
        assert _weight_of_spurious(split) < 0.005


def test_example1_has_the_noise_that_it_names(drawn):
    # Of the invariant features, which are nothing but the environment's noise.
    stds = drawn["example1"].train.features[..., :INVARIANT].std(axis=(1, 2))
    np.testing.assert_allclose(stds[:3], [0.1, 1.5, 2.0], rtol=0.05)
    assert 0.009 < stds[3] < 10.5


def test_example2_has_small_animals_and_backgrounds_that_go_with_them(drawn):
    split = drawn["example2"].train
    x, z = split.features[..., :INVARIANT], split.features[..., INVARIANT:]
    np.testing.assert_allclose(np.abs(x.mean(-1)).mean(), 0.01, rtol=0.05)
    np.testing.assert_allclose(np.abs(z.mean(-1)).mean(), 1.0, rtol=0.05)
    np.testing.assert_array_equal(split.labels, x.sum(-1) > 0)
    together = np.mean((x.mean(-1) > 0) == (z.mean(-1) > 0), axis=1)
    np.testing.assert_allclose(together[:3], [0.95, 0.97, 0.99], atol=0.012)
    cows = split.labels.mean(axis=1)
    np.testing.assert_allclose(cows[:3], [0.3, 0.5, 0.7], atol=0.03)


def test_example3_has_a_small_margin_that_is_shared_and_a_large_one_of_its_own(drawn):
    split = drawn["example3"].train
    half = EXAMPLES // 2
    np.testing.assert_array_equal(split.labels.sum(axis=1), [half] * ENVS)
    centers = split.features[:, :half].mean(axis=1)
    np.testing.assert_allclose(centers[:, :INVARIANT], 0.1, atol=0.02)
    np.testing.assert_allclose(
        split.features[:, half:].mean(axis=1), -centers, atol=0.02
    )
    assert np.abs(centers[:, INVARIANT:]).mean() > 0.3
