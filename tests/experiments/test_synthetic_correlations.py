import math

import jax
import numpy as np
import pytest

from experiments.synthetic.config import PRESETS, Settings
from experiments.synthetic.correlations import (
    MASKS,
    PARTS,
    agreement_levels,
    correlation,
    correlation_rows,
    learning_signals,
    masked_correlations,
    permute,
)
from experiments.synthetic.figures import draw_correlations
from experiments.synthetic.model import Architecture, init_variables, make_apply
from experiments.synthetic.training import dataset_for, make_keys
from tests._asserts import field_of

CONFIG = Settings(**PRESETS["smoke"])
INPUTS = 2 + CONFIG.shortcut_dims
SCALE = 0.01
LEVELS = [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def split():
    return dataset_for(CONFIG, 0).train


@pytest.fixture(scope="module")
def signals(split):
    keys = make_keys(0)
    architecture = Architecture(INPUTS, CONFIG.hidden_units, CONFIG.hidden_layers)
    variables = init_variables(keys.model, architecture)
    apply = make_apply(architecture)
    return learning_signals(apply, variables, split, keys.batches, SCALE)


@pytest.fixture(scope="module")
def rows():
    return correlation_rows(CONFIG, (0, 3), SCALE)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def in_order(features):
    """Rows of every environment, sorted."""
    return np.stack([np.array(sorted(env.tolist())) for env in np.asarray(features)])


@pytest.mark.parametrize("part", PARTS)
def test_permute_moves_the_rows_of_one_part_within_their_environment(split, part):
    permuted = permute(split, part, jax.random.key(0))
    dims = PARTS[part]
    before, after = split.features[..., dims], permuted.features[..., dims]
    np.testing.assert_array_equal(in_order(before), in_order(after))
    assert (np.asarray(before) != after).any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("part", "other"), [("mechanism", "shortcut"), ("shortcut", "mechanism")]
)
def test_permute_leaves_labels_and_the_other_part_alone(split, part, other):
    permuted = permute(split, part, jax.random.key(0))
    np.testing.assert_array_equal(permuted.labels, split.labels)
    dims = PARTS[other]
    np.testing.assert_array_equal(
        permuted.features[..., dims], split.features[..., dims]
    )


def test_permute_environments_get_permutations_of_their_own(split):
    same = jax.tree.map(lambda leaf: leaf[:1].repeat(2, axis=0), split)
    first, second = permute(same, "mechanism", jax.random.key(0)).features
    assert (first != second).any()


def test_permute_shuffled_shortcut_no_longer_tells_the_label():
    config = Settings(num_envs=4, examples_per_env=1024, shortcut_dims=1)
    split = permute(dataset_for(config, 0).train, "shortcut", jax.random.key(0))
    for features, labels in zip(split.features, split.labels, strict=True):
        assert abs(np.corrcoef(features[:, 2], labels)[0, 1]) < 4 / math.sqrt(1024)


@pytest.mark.parametrize(
    ("num_envs", "levels"),
    [(1, [1.0]), (2, [0.0, 1.0]), (5, [0.2, 0.6, 1.0]), (8, np.arange(5) / 4)],
)
def test_agreement_levels_are_what_signs_can_add_up_to(num_envs, levels):
    np.testing.assert_array_equal(agreement_levels(num_envs), levels)


def test_correlation_of_nested_trees_is_numpys_over_the_components_that_passed():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(2, 20)).astype(np.float32) for _ in range(2))
    x[0, ::3] = 0
    expected = np.corrcoef(x[x != 0], y[x != 0])[0, 1]
    trees = ({"a": v[0], "b": {"c": v[1].reshape(4, 5)}} for v in (x, y))
    np.testing.assert_allclose(correlation(*trees), expected, rtol=1e-5)


@pytest.mark.parametrize("passed", [0, 1])
def test_correlation_of_fewer_than_two_components_is_nan(passed):
    masked = np.zeros(5, np.float32)
    masked[:passed] = 3
    assert np.isnan(correlation(masked, np.arange(5, dtype=np.float32)))


def test_masked_correlations_at_threshold_0_are_those_of_the_plain_gradients(signals):
    plain = flat(field_of(signals.original, "mean"))
    found = masked_correlations("and", signals, np.zeros(1))
    assert found.kept_fraction == 1
    for actual, signal in (
        (found.mechanism_correlation, signals.mechanism),
        (found.shortcut_correlation, signals.shortcut),
    ):
        expected = np.corrcoef(plain, flat(signal))[0, 1]
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_masked_correlations_drop_what_the_mask_drops(signals):
    plain = flat(field_of(signals.original, "mean"))
    mechanism = flat(signals.mechanism)
    votes = flat(field_of(signals.original, "sign_sum"))
    agreement = np.abs(votes) / CONFIG.num_envs
    for mask, passed in (("and", agreement >= 1), ("xor", agreement < 1)):
        found = masked_correlations(mask, signals, np.ones(1))
        expected = np.corrcoef(plain[passed], mechanism[passed])[0, 1]
        np.testing.assert_allclose(found.mechanism_correlation, expected, rtol=1e-4)
        np.testing.assert_allclose(found.kept_fraction, passed.mean(), rtol=1e-6)


def test_masked_correlations_of_both_masks_share_all_components_out(signals):
    kept = {
        mask: masked_correlations(mask, signals, np.array(LEVELS)).kept_fraction
        for mask in MASKS
    }
    np.testing.assert_allclose(kept["and"] + kept["xor"], 1, rtol=1e-6)
    assert (np.diff(kept["and"]) < 0).all()


def test_learning_signals_mechanism_does_not_depend_on_the_shortcuts_direction(split):
    # With a linear model and mixed signs, shortcut weights get next to no gradient.
    def linear(params, features):
        return features @ params

    params = np.zeros(INPUTS, "f")
    signals = learning_signals(linear, params, split, jax.random.key(0), SCALE)
    plain = np.abs(np.asarray(signals.original.mean)[2:]).max()
    assert np.abs(signals.mechanism[2:]).max() < plain / 2
    np.testing.assert_allclose(signals.shortcut[2:], signals.original.mean[2:], 1e-5)
    np.testing.assert_allclose(signals.mechanism[:2], signals.original.mean[:2], 1e-5)


def test_learning_signals_of_scaled_logits_are_the_gradients_by_hand(split):
    def linear(params, features):
        return features @ params

    params = np.linspace(-1, 1, INPUTS, dtype="f")
    signals = learning_signals(linear, params, split, jax.random.key(0), 0.5)
    features = np.asarray(split.features, np.float64)
    error = 1 / (1 + np.exp(-0.5 * features @ params)) - np.asarray(split.labels)
    gradients = 0.5 * (error[..., None] * features).mean(axis=1)
    np.testing.assert_allclose(signals.original.mean, gradients.mean(axis=0), 1e-4)
    signs = np.sign(gradients).sum(axis=0)
    np.testing.assert_array_equal(signals.original.sign_sum, signs)


def test_correlation_rows_hold_every_seed_mask_and_threshold(rows):
    found = [(row["seed"], row["mask"], row["threshold"]) for row in rows]
    assert found == [
        (seed, mask, level) for seed in (0, 3) for mask in MASKS for level in LEVELS
    ]
    for row in rows:
        values = row["mechanism_correlation"], row["shortcut_correlation"]
        if row["mask"] == "xor" and row["threshold"] == 0:
            assert row["kept_fraction"] == 0
            assert np.isnan(values).all()
        else:
            assert 0 < row["kept_fraction"] <= 1
            assert np.abs(values).max() <= 1 + 1e-5


def test_correlation_rows_of_a_seed_do_not_depend_on_the_others(rows):
    alone = correlation_rows(CONFIG, [3], SCALE)
    assert [str(row) for row in alone] == [str(r) for r in rows if r["seed"] == 3]


def test_draw_correlations_puts_the_xor_mask_on_the_negative_side_up_to_0(rows):
    figure = draw_correlations(rows)
    [axes] = figure.axes
    dots = [line for line in axes.lines if line.get_alpha() is not None]
    assert len(dots) == 4
    found = {tuple(np.unique(line.get_xdata())) for line in dots}
    assert found == {(-0.5, 0.0), (0.0, 0.5, 1.0)}
    assert all(np.isfinite(line.get_ydata()).all() for line in dots)


def test_draw_correlations_legend_says_what_was_shuffled(rows, tmp_path):
    figure = draw_correlations(rows)
    figure.savefig(tmp_path / "figure.png")
    [legend] = figure.legends
    mechanism, shortcut = (text.get_text() for text in legend.get_texts())
    assert "whose shortcuts were shuffled" in mechanism
    assert "whose spirals were shuffled" in shortcut
