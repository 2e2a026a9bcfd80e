"""The maths of the theory experiments, against independent computations."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.theory import (
    landscapes,
    noise,
    quadratics,
    regression,
    smooth,
    staircase,
)
from experiments.theory.config import (
    METHODS,
    DescentConfig,
    LandscapesConfig,
    MeansConfig,
    NormsConfig,
    PairsConfig,
    RegressionConfig,
    StaircaseConfig,
)

ENVS = landscapes.make_environments(sharpness=20.0, angle=20.0)


@jax.jit
def by_env(params):
    """Losses, gradients and Hessians of both environments, [env, ...]."""

    def of_one(env):
        value, gradient = jax.value_and_grad(landscapes.loss)(params, env)
        return value, gradient, jax.hessian(landscapes.loss)(params, env)

    return jax.vmap(of_one)(ENVS)


def hessians_at(minimum):
    return np.asarray(by_env(jnp.array(minimum))[2])


@pytest.fixture(scope="module")
def descents():
    """Paths from 25 starts, by threshold."""
    starts = landscapes.start_grid(5)
    return {t: landscapes.descend(ENVS, starts, t, 0.02, 3000) for t in (0.0, 1.0)}


# Figure 1.


@pytest.mark.parametrize("minimum", landscapes.MINIMA.values(), ids=landscapes.MINIMA)
def test_landscape_loss_minima_have_loss_and_gradient_0_in_both_environments(minimum):
    losses, gradients, hessians = by_env(jnp.array(minimum))
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_array_equal(gradients, 0)
    assert (np.linalg.eigvalsh(hessians) > 0.5).all()


def test_landscape_loss_is_positive_elsewhere():
    points = 3 * jax.random.normal(jax.random.key(0), (500, 2))
    losses = jax.jit(jax.vmap(lambda point: by_env(point)[0]))(points)
    assert (losses > 0).all()


def test_landscape_hessians_agree_at_the_consistent_minimum_alone():
    consistent = hessians_at(landscapes.CONSISTENT)
    patchwork = hessians_at(landscapes.PATCHWORK)
    np.testing.assert_allclose(consistent[0], consistent[1], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.eigvalsh(patchwork), [[1, 20]] * 2, rtol=1e-4)
    ratios = np.linalg.eigvals(np.linalg.solve(patchwork[0], patchwork[1]))
    assert max(ratios) > 10
    # The average cannot tell the two apart.
    np.testing.assert_allclose(consistent.mean(0), patchwork.mean(0), rtol=1e-5)


def test_landscape_descend_averaging_reaches_both_minima_and_the_mask_one(descents):
    reached = {
        threshold: [landscapes.reached(end) for end in np.asarray(paths.params)[:, -1]]
        for threshold, paths in descents.items()
    }
    assert "neither" not in reached[0.0]
    assert {"consistent", "patchwork"} == set(reached[0.0])
    # One start lies on the line from which the masked path meets the patchwork.
    assert reached[1.0].count("patchwork") <= 1
    assert reached[1.0].count("consistent") >= 8


def test_landscape_descend_that_ends_at_neither_stops_where_nothing_passes(descents):
    paths = descents[1.0]
    stuck = [
        landscapes.reached(end) == "neither" for end in np.asarray(paths.params)[:, -1]
    ]
    assert any(stuck)
    assert (paths.kept[np.array(stuck), -1] == 0).all()


def test_rotated_has_the_eigenvalue_along_the_direction():
    matrix = np.asarray(quadratics.rotated(2.0, 5.0, 30.0))
    along = np.array([math.cos(math.pi / 6), 0.5])
    np.testing.assert_allclose(matrix @ along, 2 * along, rtol=1e-6)
    assert np.linalg.det(matrix) == pytest.approx(10)


# Figure 4.


@pytest.mark.parametrize(
    ("num_envs", "threshold", "needed"),
    [(10, 0.6, 8), (30, 0.6, 24), (300, 0.6, 240), (5, 0.0, 3), (4, 0.0, 2), (7, 1, 7)],
)
def test_needed_signs_is_the_least_majority_that_passes(num_envs, threshold, needed):
    assert noise.needed_signs(num_envs, threshold) == needed


@pytest.mark.parametrize("num_envs", [1, 2, 5, 8])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.6, 1.0])
def test_exact_masked_is_the_sum_over_all_patterns_of_signs(num_envs, threshold):
    """Raw moments of half-normals and a sum over patterns, not over their counts."""
    raw = [1, math.sqrt(2 / math.pi), 1, 2 * math.sqrt(2 / math.pi), 3]

    def moment(signs, power):
        """E[(sum of signs times half-normals)^power], by the multinomial theorem."""
        if not signs:
            return float(power == 0)
        return sum(
            math.comb(power, k) * signs[0] ** k * raw[k] * moment(signs[1:], power - k)
            for k in range(power + 1)
        )

    second = fourth = passed = 0.0
    for signs in itertools.product((-1, 1), repeat=num_envs):
        if abs(sum(signs)) >= threshold * num_envs - 1e-9:
            passed += 2.0**-num_envs
            second += 2.0**-num_envs * moment(signs, 2) / num_envs**2
            fourth += 2.0**-num_envs * moment(signs, 4) / num_envs**4
    needed = noise.needed_signs(num_envs, threshold)
    exact = noise.exact_masked(num_envs, needed, components=7)
    assert exact.mean == pytest.approx(7 * second)
    assert exact.std == pytest.approx(math.sqrt(7 * (fourth - second**2)))
    assert noise.pass_probability(num_envs, needed) == pytest.approx(passed)


def test_exact_masked_threshold_0_is_the_average():
    average = noise.exact_average(12, components=5)
    masked = noise.exact_masked(12, noise.needed_signs(12, 0.0), components=5)
    assert masked == pytest.approx(average)


def test_exact_masked_two_environments_by_quadrature():
    grid = np.linspace(-8, 8, 1600)  # not through 0, where signs jump
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    x, y = np.meshgrid(grid, grid)
    weights = np.outer(density, density) * (np.sign(x) == np.sign(y))
    exact = noise.exact_masked(2, needed=2, components=1)
    assert exact.mean == pytest.approx(np.sum(weights * ((x + y) / 2) ** 2), abs=1e-4)


def test_simulate_masks_as_the_definition():
    key = jax.random.key(3)
    simulated = noise.simulate(key, 10, 50, 4, 0.6)
    for index, own in enumerate(jax.random.split(key, 4)):
        gradients = np.asarray(jax.random.normal(own, (10, 50)), np.float64)
        passes = np.abs(np.sign(gradients).sum(axis=0)) >= 6
        mean = gradients.mean(axis=0)
        assert simulated.average[index] == pytest.approx(np.sum(mean**2), rel=1e-5)
        masked = np.sum(mean[passes] ** 2)
        assert simulated.masked[index] == pytest.approx(masked, rel=1e-5)
        assert simulated.passed[index] == passes.sum()


@pytest.mark.parametrize("num_envs", [40, 300])
def test_norms_row_estimates_are_within_three_standard_errors(num_envs):
    config = NormsConfig(components=1000, repetitions=20, conditional_draws=5000)
    row = noise.norms_row(config, num_envs, jax.random.key(num_envs))
    for name, exact in noise.ESTIMATES.items():
        assert abs(row[name] - row[exact]) < 3 * row[f"{name}_std_error"], name
    assert row["conditional_std_error"] < 0.05 * row["masked_exact"]
    assert row["bound"] > max(row["masked_exact"], row["masked"], row["conditional"])
    spread = math.sqrt(row["passed_expected"])
    assert abs(row["passed"] - row["passed_expected"]) <= 3 * max(spread, 0.1)


def test_proof_bound_holds_over_the_whole_range_of_the_figure():
    for num_envs in range(10, 301):
        needed = noise.needed_signs(num_envs, 0.6)
        masked = noise.exact_masked(num_envs, needed, components=1)
        assert noise.proof_bound(num_envs, needed, components=1) > masked.mean


def test_proof_bound_is_no_bound_for_unanimity():
    assert noise.proof_bound(10, 10, components=1) == 0
    assert noise.exact_masked(10, 10, components=1).mean > 0


def test_exact_masked_has_no_underflow_for_many_environments():
    exact = noise.exact_masked(1000, noise.needed_signs(1000, 0.6), components=1)
    assert 0 < exact.mean < exact.std < 1e-30


# Figure 10.


def test_staircase_theta_6_is_for_b_alone():
    envs = staircase.make_environments(101)
    at_star, ruined = staircase.losses_along(envs, jnp.array([1.0, -0.5])).T
    np.testing.assert_allclose(at_star, 0.0032, atol=1e-4)
    assert abs(ruined[0] - at_star[0]) < 1e-9
    assert ruined[1] > 1


def test_staircase_target_has_the_papers_corners():
    inputs = jnp.array([0.0, 0.4, 0.45, 0.5, 0.7, 0.75, 0.8, 1.0])
    expected = [0, 0, 0.5, 1, 1, 1.5, 2, 2]
    np.testing.assert_allclose(staircase.target(inputs), expected, atol=1e-6)


# Figures 3 and 11.


@pytest.mark.parametrize("axes", [1, 2])
def test_equal_mean_pair_averages_to_the_identity(axes):
    pair = np.asarray(quadratics.equal_mean_pair(5.0, axes))
    np.testing.assert_allclose(pair.mean(axis=0), np.eye(2), atol=1e-6)
    assert pair[0, 0, 0] / pair[1, 0, 0] == pytest.approx(5)
    assert pair[1, 1, 1] / pair[0, 1, 1] == pytest.approx(5 if axes == 2 else 1)


def test_level_set_has_the_loss_everywhere():
    hessian = np.asarray(quadratics.rotated(0.5, 6.0, 20.0))
    points = quadratics.level_set(hessian, 0.7)
    losses = 0.5 * np.einsum("ip,ij,jp->p", points, hessian, points)
    np.testing.assert_allclose(losses, 0.7, rtol=1e-6)
    np.testing.assert_allclose(points[:, 0], points[:, -1], atol=1e-6)


# The linear regression.


def by_hand(config, method, weights):
    """The run of a method without noise, as a plain loop in float64."""
    features = np.concatenate([3 * np.eye(4), np.full((4, 1), 0.3)], axis=1)
    features = features[: config.train_envs]
    for step in range(config.steps):
        gradients = (features @ weights - 1)[:, None] * features
        if config.decay == "before":
            gradients = gradients + config.weight_decay * weights
        update = gradients.mean(axis=0)
        if method == "geometric_mean":
            magnitude = np.exp(np.log(np.abs(gradients) + 1e-10).mean(axis=0))
            update = np.sign(update) * magnitude
        if method != "erm":
            update = update * (np.abs(np.sign(gradients).sum(0)) == len(features))
        if config.decay == "after":
            update = update + config.weight_decay * weights
        rate = config.learning_rate * config.learning_rate_decay**step
        weights = weights - rate * update
    return weights


def train(config, method):
    """Runs of seeds 0 to 9."""
    starts = regression.draw_starts(config, jnp.arange(10, dtype=jnp.uint32))
    return regression.train(config, method, starts)


@pytest.fixture(scope="module", params=[2, 4], ids="{} examples".format)
def trained(request):
    """The default setting, and every method's run."""
    config = RegressionConfig(train_envs=request.param)
    return config, {m: train(config, m) for m in METHODS}


def test_regression_train_follows_the_loop_by_hand(trained):
    config, runs = trained
    for method, run in runs.items():
        for path in np.asarray(run.weights, np.float64)[:3]:
            expected = by_hand(config, method, path[0])
            np.testing.assert_allclose(path[-1], expected, atol=1e-3)


def test_regression_averaging_ends_in_the_patchwork_of_what_it_sees(trained):
    config, runs = trained
    final = runs["erm"].weights[:, -1]
    np.testing.assert_allclose(final[:, : config.train_envs], 1 / 3, atol=0.05)
    np.testing.assert_allclose(final[:, config.train_envs :], 0, atol=0.2)


@pytest.mark.parametrize("method", ["and_mask", "geometric_mean"])
def test_regression_masks_end_at_the_shared_weight(trained, method):
    config, runs = trained
    final = np.asarray(runs[method].weights[:, -1], np.float64)
    np.testing.assert_allclose(final[:, :4], 0, atol=0.05)
    # What is left of the initial weights shifts the balance with the decay.
    shared = 3 - 9 * final[:, : config.train_envs].mean(axis=1)
    np.testing.assert_allclose(final[:, 4], shared, atol=0.1)
    assert final[:, 4].mean() == pytest.approx(3, abs=0.05)


def test_regression_patchwork_fails_on_examples_that_it_has_not_seen(trained):
    config, runs = trained
    assert (runs["erm"].train_loss[:, -1] < 1e-4).all()
    if config.train_envs == 4:
        assert np.isnan(runs["erm"].test_loss).all()
        return
    assert (runs["erm"].test_loss[:, -1] > 0.4).all()
    for method in ("and_mask", "geometric_mean"):
        assert (runs[method].test_loss[:, -1] < 0.02).all()


@pytest.mark.parametrize("method", ["and_mask", "geometric_mean"])
def test_regression_masks_end_within_005_of_3_from_every_seed(method):
    weights = train(RegressionConfig(seeds=(0, 29)), method).weights[:, -1]
    np.testing.assert_allclose(weights[:, 4], 3, atol=0.05)
    np.testing.assert_allclose(weights[:, :4], 0, atol=0.05)


def test_regression_decay_before_the_mask_does_not_find_the_shared_weight():
    config = RegressionConfig(decay="before")
    paths = np.asarray(train(config, "and_mask").weights, np.float64)
    assert (paths[:, -1, 4] < 2.5).mean() > 0.8
    for path in paths[:3]:
        early = dataclasses.replace(config, steps=20)
        expected = by_hand(early, "and_mask", path[0])
        np.testing.assert_allclose(path[20], expected, atol=1e-3)


def test_regression_fresh_noise_the_geometric_mean_holds_up_better():
    config = RegressionConfig(noise=0.001, fresh_noise=True)
    mask = train(config, "and_mask").weights[:, -1]
    geometric = train(config, "geometric_mean").weights[:, -1]
    assert (mask[:, 4] < 1).all()
    assert (geometric[:, 4] > 2.5).all()


def test_make_features_noise_leaves_the_shared_feature_alone():
    features = np.asarray(regression.make_features(jax.random.key(0), 0.5))
    clean = np.asarray(regression.make_features(jax.random.key(0), 0.0))
    np.testing.assert_allclose(features[:, 4], 0.3)
    np.testing.assert_array_equal(clean[:, :4], 3 * np.eye(4))
    gaps = np.abs(features - clean)[:, :4]
    assert 0.25 < gaps.max() <= 0.5
    assert gaps.min() > 0


# Proposition 1.


def test_descend_keeps_the_rate_of_proposition_1():
    config = DescentConfig(dims=10)
    problem = smooth.make_problem(config, jax.random.key(1))
    largest = 1 / float(smooth.lipschitz_constant(problem))
    for threshold, size in itertools.product((0.0, 0.25, 0.5, 1.0), (0.3, 1.0)):
        run = smooth.descend(problem, threshold, size * largest, steps=300)
        least = np.minimum.accumulate(np.asarray(run.masked))
        steps = jnp.arange(1, 301)
        bound = smooth.rate_bound(run.loss[0], size * largest, steps)
        assert (least <= bound).all()
        # What the proof rests on: no step raises the loss.
        assert (np.diff(run.loss) <= 1e-5).all()


def test_lipschitz_constant_is_above_the_curvature_everywhere():
    config = DescentConfig(dims=6)
    problem = smooth.make_problem(config, jax.random.key(2))
    constant = smooth.lipschitz_constant(problem)

    def mean_loss(params):
        return jax.vmap(smooth.loss, (None, 0))(params, problem).mean()

    hessians = jax.jit(jax.vmap(jax.hessian(mean_loss)))
    params = jax.random.normal(jax.random.key(3), (20, 6))
    assert (np.linalg.eigvalsh(hessians(params))[:, -1] <= constant).all()


# Configs.


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (LandscapesConfig, {"sharpness": 1.0}, r"sharpness must be in \(1, 1e4\]"),
        (LandscapesConfig, {"angle": 45.0}, r"angle must be in \(0, 45\), got 45.0"),
        (LandscapesConfig, {"learning_rate": 0.1}, r"below 2 / sharpness \(0.1\)"),
        (LandscapesConfig, {"threshold": math.nan}, r"threshold must be in \[0, 1\]"),
        (LandscapesConfig, {"resolution": 1}, "resolution must be at least 2, got 1"),
        (MeansConfig, {"first": (0.0, 1.0)}, "first must be between 1e-4 and 1e4"),
        (MeansConfig, {"epsilon": 0.0}, "epsilon must be positive and finite, got 0"),
        (NormsConfig, {"num_envs": ()}, "num_envs must be one or more different"),
        (NormsConfig, {"num_envs": (20, 10)}, "in ascending order"),
        (NormsConfig, {"num_envs": (0, 10)}, "num_envs must be at least 1, got 0"),
        (NormsConfig, {"repetitions": 1}, "repetitions must be at least 2, got 1"),
        (NormsConfig, {"seed": -1}, r"seed must be between 0 and 2\*\*32 - 1"),
        (StaircaseConfig, {"lowest": 0.0}, "lowest must be finite and at most -0.5"),
        (StaircaseConfig, {"highest": 0.5}, "highest must be finite and at least 1"),
        (PairsConfig, {"ratios": ()}, "ratios must be one or more numbers"),
        (PairsConfig, {"ratios": (0.5,)}, "ratios must be between 1 and 1e4, got 0.5"),
        (RegressionConfig, {"train_envs": 3}, "train_envs must be one of 2, 4, got 3"),
        (RegressionConfig, {"fresh_noise": True}, "fresh_noise needs noise above 0"),
        (RegressionConfig, {"decay": "never"}, "decay must be one of after, before"),
        (RegressionConfig, {"seeds": (3, 1)}, "seeds must be in ascending order"),
        (DescentConfig, {"step_size": 1.5}, r"step_size must be in \(0, 1\], got 1.5"),
        (DescentConfig, {"thresholds": (0.5, 0.5)}, "one or more different numbers"),
        (DescentConfig, {"thresholds": (2.0,)}, r"thresholds must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_config_refuses_what_makes_no_sense(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
