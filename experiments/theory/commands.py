"""The subcommands: figures, regression, descent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import hardvary
from experiments.common.cli import Invocation, RunOptions, entered
from experiments.theory import figures, noise, quadratics, regression, smooth, staircase
from experiments.theory import landscapes as surfaces
from experiments.theory.config import (
    METHODS,
    DescentConfig,
    LandscapesConfig,
    MeansConfig,
    Method,
    NormsConfig,
    PairsConfig,
    RegressionConfig,
    StaircaseConfig,
)

EXPERIMENT = "theory"
WRITTEN_STEPS = 40  # of a path, in a table


class Outcome(NamedTuple):
    """All that a subcommand writes."""

    rows: Sequence[Mapping[str, Any]]
    figure: Figure
    summary: Mapping[str, Any]


def run(call: Invocation[Any, RunOptions], name: str) -> None:
    """Computes what is not there yet, writes NAME.csv and NAME.png, prints."""
    table, picture = f"{name}.csv", f"{name}.png"
    with entered(
        call,
        call.run_path(EXPERIMENT, f"{name}-{call.options.preset}", ("seed", "seeds")),
        f"{EXPERIMENT} {name}",
        outputs=(table, picture),
    ) as run:
        if not run.finished:
            outcome = COMPUTE[name](call.config)
            run.write_metrics(outcome.rows, table)
            run.save_figure(picture, outcome.figure)
            run.finish(outcome.summary)
        for label, value in run.summary().items():
            print(f"{label:>32}  {_short(value)}")
        print(f"Table: {run.path / table}")
        print(f"Figure: {run.path / picture}")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return str(value)


def _landscapes(config: LandscapesConfig) -> Outcome:
    envs = surfaces.make_environments(config.sharpness, config.angle)
    starts = surfaces.start_grid(config.starts_per_side)
    thresholds: dict[Method, float] = {"erm": 0.0, "and_mask": config.threshold}
    paths = {
        method: surfaces.descend(
            envs, starts, threshold, config.learning_rate, config.steps
        )
        for method, threshold in thresholds.items()
    }
    both = jax.jit(jax.vmap(surfaces.loss, (None, 0)))
    steps = np.unique(np.geomspace(1, config.steps + 1, WRITTEN_STEPS).astype(int)) - 1
    rows = []
    summary: dict[str, Any] = {}
    for method, descents in paths.items():
        losses = jax.vmap(jax.vmap(lambda p: both(p, envs)))(descents.params[:, steps])
        rows += [
            {
                "method": method,
                "start": start,
                "step": step,
                "theta1": x,
                "theta2": y,
                "loss_a": a,
                "loss_b": b,
            }
            for start, path in enumerate(descents.params[:, steps].tolist())
            for step, (x, y), (a, b) in zip(
                steps.tolist(), path, losses[start].tolist(), strict=True
            )
        ]
        ends = [surfaces.reached(end) for end in np.asarray(descents.params[:, -1])]
        for place in (*surfaces.MINIMA, "neither"):
            summary[f"{method}_to_{place}"] = ends.count(place)
    summary |= _minima(config, envs)
    figure = figures.draw_landscapes(envs, paths, config.threshold, config.resolution)
    return Outcome(rows, figure, summary)


def _minima(
    config: LandscapesConfig, envs: surfaces.Environments
) -> dict[str, float | list[list[float]]]:
    """Hessians at both minima, and how inconsistent these are."""
    found: dict[str, float | list[list[float]]] = {}

    @jax.jit
    def measure(place: jax.Array) -> tuple[jax.Array, jax.Array]:
        hessians = jax.vmap(jax.hessian(surfaces.loss), (None, 0))(place, envs)
        searched = hardvary.consistency.inconsistency(
            surfaces.loss,
            place,
            envs,
            config.epsilon,
            key=jax.random.key(0),
            num_starts=config.searches,
        )
        return hessians, searched.score

    for name, minimum in surfaces.MINIMA.items():
        hessians, searched = measure(jnp.array(minimum))
        for env, hessian in zip("ab", hessians, strict=True):
            found[f"{name}_hessian_{env}"] = hessian.tolist()
        found[f"{name}_mean_hessian"] = hessians.mean(axis=0).tolist()
        quadratic = hardvary.consistency.quadratic_inconsistency(
            hessians, config.epsilon
        )
        found[f"{name}_inconsistency_quadratic"] = float(quadratic)
        found[f"{name}_inconsistency_searched"] = float(searched)
    return found


def _means(config: MeansConfig) -> Outcome:
    cases = {}
    rows = []
    for case, angle in (
        ("Same axes", 0.0),
        (f"B turned by {config.angle:g}°", config.angle),
    ):
        pair = quadratics.turned_pair(config.first, config.second, angle)
        matrices = {
            "A": pair[0],
            "B": pair[1],
            "arithmetic mean": pair.mean(axis=0),
            "geometric mean": quadratics.geometric_mean(pair),
        }
        scores = quadratics.scores(pair, config.epsilon)
        cases[case] = matrices, scores
        rows += [
            {
                "case": case,
                "matrix": name,
                "h11": float(matrix[0, 0]),
                "h12": float(matrix[0, 1]),
                "h22": float(matrix[1, 1]),
                "determinant": float(jnp.linalg.det(matrix)),
                **scores._asdict(),
            }
            for name, matrix in matrices.items()
        ]
    summary = {
        f"{case}, {name}": value
        for case, (_, scores) in cases.items()
        for name, value in scores._asdict().items()
    }
    return Outcome(rows, figures.draw_means(cases, config.epsilon), summary)


def _norms(config: NormsConfig) -> Outcome:
    rows = [
        noise.norms_row(config, num_envs, key)
        for num_envs, key in zip(
            config.num_envs,
            jax.random.split(jax.random.key(config.seed), len(config.num_envs)),
            strict=True,
        )
    ]
    errors = {
        f"largest_{name}_error": max(
            abs(row[name] - row[exact]) / row[f"{name}_std_error"] for row in rows
        )
        for name, exact in noise.ESTIMATES.items()
    }
    summary = {
        **errors,
        "least_bound_over_exact": min(r["bound"] / r["masked_exact"] for r in rows),
        "bound_above_exact": all(r["bound"] > r["masked_exact"] for r in rows),
        "bound_above_simulated": all(
            r["bound"] > max(r["masked"], r["conditional"]) for r in rows
        ),
    }
    return Outcome(rows, figures.draw_norms(rows), summary)


def _staircase(config: StaircaseConfig) -> Outcome:
    envs = staircase.make_environments(config.points)
    heights = jnp.linspace(config.lowest, config.highest, config.resolution)
    losses = staircase.losses_along(envs, heights)
    rows = [
        {"theta6": height, "loss_a": a, "loss_b": b, "difference": abs(b - a)}
        for height, a, b in zip(
            heights.tolist(), *(env.tolist() for env in losses), strict=True
        )
    ]
    at_star, ruined = (
        jax.vmap(staircase.loss, (None, 0))(staircase.with_height(height), envs)
        for height in (staircase.STAR[5], staircase.RUINED_HEIGHT)
    )
    nearest = int(jnp.argmin(jnp.abs(heights - staircase.STAR[5])))
    on_line = hardvary.consistency.grid_inconsistency(losses, nearest, config.epsilon)

    @jax.jit
    def search(params: jax.Array) -> hardvary.consistency.Inconsistency:
        return hardvary.consistency.inconsistency(
            staircase.loss,
            params,
            envs,
            config.epsilon,
            key=jax.random.key(0),
            num_starts=config.searches,
            max_distance=config.max_distance,
        )

    searched = search(jnp.array(staircase.STAR))
    summary = {
        "loss_at_star": at_star.tolist(),
        "loss_at_ruined": ruined.tolist(),
        "inconsistency_on_line": float(on_line.score),
        "inconsistency_searched": float(searched.score),
        "searched_params": searched.params.tolist(),
    }
    return Outcome(rows, figures.draw_staircase(rows), summary)


def _pairs(config: PairsConfig) -> Outcome:
    pairs = []
    rows = []
    for axes in (2, 1):
        for ratio in config.ratios:
            pair = quadratics.equal_mean_pair(ratio, axes)
            scores = quadratics.scores(pair, config.epsilon)
            pairs.append((axes, ratio, pair, scores))
            curvatures = {
                f"{env}{axis + 1}": float(pair[index, axis, axis])
                for index, env in enumerate("ab")
                for axis in range(2)
            }
            rows.append(
                {"axes": axes, "ratio": ratio, **curvatures, **scores._asdict()}
            )
    summary = {
        f"ratio {row['ratio']:g} on {row['axes']} axes": [
            row[name] for name in quadratics.Scores._fields
        ]
        for row in rows
    }
    return Outcome(rows, figures.draw_pairs(pairs, config.epsilon), summary)


def _regression(config: RegressionConfig) -> Outcome:
    first, last = config.seeds
    seeds = range(first, last + 1)
    starts = regression.draw_starts(config, jnp.array(seeds, jnp.uint32))
    runs = {method: regression.train(config, method, starts) for method in METHODS}
    steps = np.unique(np.linspace(0, config.steps, WRITTEN_STEPS + 1).astype(int))
    rows = []
    summary: dict[str, Any] = {}
    for method, run in runs.items():
        run = jax.tree.map(np.asarray, run)
        rows += [
            {
                "method": method,
                "seed": seed,
                "step": int(step),
                **{
                    f"weight{i + 1}": float(weight)
                    for i, weight in enumerate(run.weights[index, step])
                },
                "train_loss": float(run.train_loss[index, step]),
                "test_loss": float(run.test_loss[index, step]),
            }
            for index, seed in enumerate(seeds)
            for step in steps
        ]
        final = run.weights[:, -1]
        summary |= {
            f"{method}_mean_weights": final.mean(axis=0).tolist(),
            f"{method}_lowest_weights": final.min(axis=0).tolist(),
            f"{method}_highest_weights": final.max(axis=0).tolist(),
            f"{method}_train_loss": float(run.train_loss[:, -1].mean()),
        }
        if config.train_envs < regression.NUM_ENVS:
            summary[f"{method}_test_loss"] = float(run.test_loss[:, -1].mean())
    return Outcome(rows, figures.draw_regression(config, runs), summary)


def _descent(config: DescentConfig) -> Outcome:
    problem = smooth.make_problem(config, jax.random.key(config.seed))
    learning_rate = config.step_size / float(smooth.lipschitz_constant(problem))
    runs = {
        threshold: smooth.descend(problem, threshold, learning_rate, config.steps)
        for threshold in config.thresholds
    }
    counts = jnp.arange(1, config.steps + 1)
    initial = next(iter(runs.values())).loss[0]  # the same for all thresholds
    bound = np.asarray(smooth.rate_bound(initial, learning_rate, counts))
    least = {
        threshold: np.minimum.accumulate(np.asarray(run.masked))
        for threshold, run in runs.items()
    }
    written = np.unique(np.geomspace(1, config.steps, WRITTEN_STEPS).astype(int))
    rows = [
        {
            "threshold": threshold,
            "steps": int(count),
            "loss": float(run.loss[count - 1]),
            "kept_fraction": float(run.kept[count - 1]),
            "least_squared_norm": float(least[threshold][count - 1]),
            "bound": float(bound[count - 1]),
        }
        for threshold, run in runs.items()
        for count in written
    ]
    summary: dict[str, Any] = {"learning_rate": learning_rate}
    for threshold, run in runs.items():
        ratio = float(np.max(least[threshold] / bound))
        summary[f"threshold {threshold:g}, final loss"] = float(run.loss[-1])
        summary[f"threshold {threshold:g}, largest share of bound"] = ratio
    return Outcome(rows, figures.draw_descent(least, bound), summary)


COMPUTE: dict[str, Callable[[Any], Outcome]] = {
    "figure1": _landscapes,
    "figure3": _means,
    "figure4": _norms,
    "figure10": _staircase,
    "figure11": _pairs,
    "regression": _regression,
    "descent": _descent,
}
