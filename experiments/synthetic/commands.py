"""The subcommands: train, compare, rerun, search, consistency, placement, figure."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common.choices import Preset
from experiments.common.cli import (
    FigureOptions,
    Invocation,
    RunOptions,
    SearchOptions,
    WorkerOptions,
    announced,
    entered,
)
from experiments.common.figures import (
    Drawings,
    figure_dir,
    finish_figures,
    read_table,
    redraw,
)
from experiments.common.files import write_json
from experiments.common.parts import metrics_of, train_parts
from experiments.common.run_dir import RunDir, RunDirError
from experiments.common.settings import load_chosen
from experiments.common.tables import format_rows
from experiments.synthetic.config import (
    PRESETS,
    CompareConfig,
    ConsistencyConfig,
    CorrelationsConfig,
    EnvsConfig,
    Method,
    PlacementConfig,
    RerunConfig,
    SearchConfig,
    SelectedConfig,
    TrainConfig,
)
from experiments.synthetic.data import Dataset
from experiments.synthetic.figures import (
    Trained,
    draw,
    draw_accuracies,
    draw_consistency,
    draw_correlations,
    draw_curves,
    draw_envs,
    draw_seeds,
)
from experiments.synthetic.training import METRICS, dataset_for
from experiments.synthetic.training import train as train_to_the_end

EXPERIMENT = "synthetic"
TRAIN = f"{EXPERIMENT} train"
TRAIN_FIGURE = "train.png"
COMPARE_FIGURE = "compare.png"
COMPARE_TABLE = "compare.csv"
SEEDS_TABLE = "seeds.csv"
SEEDS_FIGURE = "seeds.png"
PLACEMENT_TABLE = "placement.csv"
PLACEMENT_SETTINGS = ("placement", "threshold", "weight_decay")
SELECTED = "selected.json"
SEARCHES_TABLE = "searches.csv"
SELECTED_FIGURES = ("figure6", "figure14")
SELECTED_COLUMNS = ("method", "run", "seed", *METRICS)
ENVS_COLUMNS = ("method", "num_envs", "threshold", "seed", "epochs", *METRICS)
DRAWINGS: Drawings = {
    "figure6": draw_accuracies,
    "figure7": draw_correlations,
    "figure14": draw_curves,
    "figure15": draw_envs,
    "consistency": draw_consistency,
}
SOLVED = 0.98  # of the o.o.d. test set


def train(call: Invocation[TrainConfig, RunOptions]) -> None:
    """One method, one seed: trains it, draws it, prints the result."""
    config = call.config
    name = f"{config.method}-{call.options.preset}-seed{config.seed}"
    path = call.run_path(EXPERIMENT, name, ("method", "seed"))
    overwrite = call.options.overwrite
    with _train_dir(path, config, call.command, overwrite) as run, announced(run):
        if not run.finished:
            _train(run, config, dataset_for(config, config.seed))
        print(format_table([_result(run)]))
        print(f"Figure: {run.path / TRAIN_FIGURE}")


def compare(call: Invocation[CompareConfig, RunOptions]) -> None:
    """Several methods on the same data: a table, and the figure."""
    config = call.config
    name = f"compare-{call.options.preset}-seed{config.seed}"
    path = call.run_path(EXPERIMENT, name, ("seed",))
    with entered(
        call,
        path,
        f"{EXPERIMENT} compare",
        outputs=(COMPARE_FIGURE, COMPARE_TABLE, TRAIN_FIGURE),
        parts=TRAIN,
    ) as run:
        if not run.finished:
            _compare(run, config, call.command)
        print(format_table(run.summary()["results"]))
        print(f"Figure: {run.path / COMPARE_FIGURE}")


def _compare(run: RunDir, config: CompareConfig, command: str) -> None:
    dataset = dataset_for(config, config.seed)
    trained: dict[Method, Trained] = {}
    results = []
    for method in config.methods:
        method_config = config.train_config(method)
        path = run.path / method
        with _train_dir(path, method_config, command) as method_run:
            trained[method] = _train(method_run, method_config, dataset)
            results.append(_result(method_run))
    rows = [
        {"method": method, **row}
        for method, result in trained.items()
        for row in result.history
    ]
    run.write_metrics(rows, COMPARE_TABLE)
    run.save_figure(COMPARE_FIGURE, draw(config, dataset, trained))
    run.finish({"seed": config.seed, "results": results})


def rerun(call: Invocation[RerunConfig, WorkerOptions]) -> None:
    """One method on many seeds: every seed's result, and how many solve the task."""
    config, options = call.config, call.options
    first, last = config.seeds
    name = f"rerun-{config.method}-{options.preset}-seeds{first}-{last}"
    path = call.run_path(EXPERIMENT, name, ("method", "seeds"))
    with entered(
        call,
        path,
        f"{EXPERIMENT} rerun",
        outputs=(SEEDS_TABLE, SEEDS_FIGURE, TRAIN_FIGURE),
        parts=TRAIN,
    ) as run:
        if not run.finished:
            jobs = [
                (run.path / f"seed{c.seed}", c, call.command)
                for c in config.train_configs()
            ]
            outcomes = _train_all(run, jobs, options.workers)
            results = [outcome.result for outcome in outcomes]
            run.write_metrics(results, SEEDS_TABLE)
            curves = [outcome.curve("test_accuracy") for outcome in outcomes]
            run.save_figure(SEEDS_FIGURE, draw_seeds(config.method, curves, SOLVED))
            run.finish({"method": config.method, **summarize_seeds(results)})
        for name, value in run.summary().items():
            print(f"{name:>24}  {value}")
        print(f"Every seed: {run.path / SEEDS_TABLE}")
        print(f"Figure: {run.path / SEEDS_FIGURE}")


Job = tuple[Path, TrainConfig, str]


class Outcome(NamedTuple):
    """The result of one run: its summary, and its metrics by epoch."""

    result: dict[str, Any]
    history: list[dict[str, float]]

    def curve(self, name: str) -> list[float]:
        """A metric by epoch."""
        return [row[name] for row in self.history]


def _train_all(
    run: RunDir, jobs: Sequence[Job], workers: int, unit: str = "seed"
) -> list[Outcome]:
    """Outcomes of all jobs, in their order."""
    return train_parts(run, _train_seed, jobs, workers, unit=unit, show=_solved)


def _solved(outcomes: Iterable[Outcome]) -> dict[str, str]:
    final = [outcome.result["test_accuracy"] for outcome in outcomes]
    solved = sum(accuracy >= SOLVED for accuracy in final)
    return {"solved": f"{solved}/{len(final)}", "worst": f"{min(final):.1%}"}


def _train_seed(path: Path, config: TrainConfig, command: str) -> Outcome:
    with _train_dir(path, config, command) as run:
        if not run.finished:
            _train(run, config, dataset_for(config, config.seed), quiet=True)
        rows = metrics_of(run, run.summary()["epochs"], ["test_accuracy"])
        return Outcome(_result(run), rows)


def search(call: Invocation[SearchConfig, SearchOptions]) -> None:
    """Searches settings; says which trial each rule of selection chooses."""
    from experiments.common.search_runs import TRIALS_TABLE, run_missing, search_dir
    from experiments.synthetic import search as trials

    config, options = call.config, call.options
    name = f"search-{config.method}-{options.preset}-seed{config.seed}"
    path = call.run_path(EXPERIMENT, name, ("method", "seed", "trials"))
    study = trials.study_of(config, path, options.storage)

    def show(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        best = max((row["value"] or 0.0 for row in rows), default=0.0)
        return {"best": f"{best:.1%}"}

    with search_dir(call, path, f"{EXPERIMENT} search") as run:
        if not run.finished:
            objective = trials.Objective(config)
            rows = run_missing(run, study, objective, options.workers, show)
            run.write_metrics(rows, TRIALS_TABLE)
            chosen = trials.chosen_settings(config, rows)
            write_json(run.path / SELECTED, chosen)
            run.finish(_summarize_search(config, rows))
        print(format_search(run.summary()))
        print(f"Every trial: {run.path / TRIALS_TABLE}")
        print(f"Chosen settings: {run.path / SELECTED}")


def _summarize_search(
    config: SearchConfig, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    from experiments.synthetic.search import select

    stopped = collections.Counter(row["stopped"] for row in rows)
    return {
        "method": config.method,
        "trials": len(rows),
        "fitted": stopped["fitted"],
        "memorised": stopped["memorised"],
        "diverged": stopped["diverged"],
        "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 1),
        "chosen": {rule: dict(select(rows, rule)) for rule in config.clean_rules},
    }


def format_search(summary: Mapping[str, Any]) -> str:
    """The choice of each rule, as text."""
    lines = [
        "{trials} trials of {method}: {fitted} ended when fitted, {memorised} when "
        "memorised, {diverged} diverged".format(**summary),
        f"{'rule':<10}{'trial':>7}{'train':>8}{'valid.':>8}{'held out':>10}{'test':>8}",
    ]
    for rule, row in summary["chosen"].items():
        names = ("train", "validation", "held_out", "test")
        train, *others = (f"{row[f'{name}_accuracy']:.1%}" for name in names)
        validation, held_out, test = others
        lines.append(
            f"{rule:<10}{row['number']:>7}{train:>8}{validation:>8}{held_out:>10}{test:>8}"
        )
    return "\n".join(lines)


def selected_figure(
    call: Invocation[SelectedConfig, FigureOptions], number: Literal[6, 14]
) -> None:
    """Figures 6 and 14, which show the same runs: accuracies, learning curves."""
    if redraw(call.options, DRAWINGS, (f"figure{number}",)):
        return
    config, options = call.config, call.options
    path = call.run_path(EXPERIMENT, f"selected-{options.preset}")
    settings = {
        method: selected_settings(config, method, options.preset)
        for method in config.methods
    }
    reruns = _rerun_rows(config.reruns)  # before hours of training, not after
    identity = {**dataclasses.asdict(config), "settings": settings}
    with figure_dir(
        path, f"{EXPERIMENT} selected", call, identity, SELECTED_FIGURES, TRAIN
    ) as run:
        if not run.finished:
            jobs = [
                (
                    run.path / f"{method}-seed{seed}",
                    TrainConfig(**settings[method], seed=seed),
                    call.command,
                )
                for method in config.methods
                for seed in config.seeds_of(method)
            ]
            outcomes = _train_all(run, jobs, options.workers)
            results = [outcome.result for outcome in outcomes]
            bars = [{**result, "run": ""} for result in results]
            bars += reruns
            finish_figures(
                run,
                DRAWINGS,
                {
                    "figure6": _columns(bars, SELECTED_COLUMNS),
                    "figure14": learning_curves(outcomes),
                },
                {
                    method: summarize_seeds(
                        [r for r in results if r["method"] == method]
                    )
                    for method in config.methods
                },
            )
        print(format_accuracies(run.summary()))
        print(f"Figure: {run.path / f'figure{number}.png'}")


def selected_settings(
    config: SelectedConfig, method: Method, preset: Preset
) -> dict[str, Any]:
    """Settings that a search chose for a method, on top of a preset."""
    settings: dict[str, Any] = {**PRESETS[preset], "method": method}
    if config.selected is None:
        if method == "sand_mask":
            settings["threshold"] = 0.8
        return settings
    source = f"{Path(config.selected) / method}.json:{config.rule}"
    mend = "make it with the search subcommand"
    return settings | load_chosen(source, TrainConfig(), method, mend)


def _rerun_rows(reruns: Sequence[str]) -> list[dict[str, Any]]:
    """The seeds of other runs, each LABEL=FILE; what a file does not have is NaN.

    Raises:
      RunDirError: a file is not there or is no table of seeds.
    """
    rows = []
    for rerun in reruns:
        label, _, file = rerun.partition("=")
        for row in read_table(Path(file)):
            if not row.keys() >= {"method", "seed", "train_accuracy", "test_accuracy"}:
                raise RunDirError(f"{file} is not a table of seeds: rerun writes one")
            known = {"run": label, **dict.fromkeys(METRICS, math.nan), **row}
            rows.append({**known, "seed": int(row["seed"])})
    return rows


def learning_curves(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Lowest, mean and highest accuracy over seeds, by method and epoch."""
    rows = []
    for method in dict.fromkeys(outcome.result["method"] for outcome in outcomes):
        runs = [o.history for o in outcomes if o.result["method"] == method]
        for epoch in zip(*runs, strict=True):
            row = {"method": method, "epoch": int(epoch[0]["epoch"])}
            for name in ("train", "test"):
                values = [seed[f"{name}_accuracy"] for seed in epoch]
                row |= {
                    f"{name}_lowest": min(values),
                    f"{name}_mean": sum(values) / len(values),
                    f"{name}_highest": max(values),
                }
            rows.append(row)
    return rows


def envs_figure(call: Invocation[EnvsConfig, FigureOptions]) -> None:
    """Figure 15: accuracy against the number of training environments."""
    if redraw(call.options, DRAWINGS, ("figure15",)):
        return
    config, options = call.config, call.options
    path = call.run_path(EXPERIMENT, f"envs-{options.preset}")
    with figure_dir(
        path, f"{EXPERIMENT} envs", call, config, ("figure15",), TRAIN
    ) as run:
        if not run.finished:
            jobs = []
            for c in config.train_configs():
                name = (
                    f"{c.method}-envs{c.num_envs}-threshold{c.threshold}-seed{c.seed}"
                )
                jobs.append((run.path / name, c, call.command))
            outcomes = _train_all(run, jobs, options.workers, unit="run")
            rows = [
                {"num_envs": c.num_envs, "threshold": c.threshold, **outcome.result}
                for (_, c, _), outcome in zip(jobs, outcomes, strict=True)
            ]
            finish_figures(
                run, DRAWINGS, {"figure15": _columns(rows, ENVS_COLUMNS)}, {}
            )
        print(f"Figure: {run.path / 'figure15.png'}")


def correlations_figure(call: Invocation[CorrelationsConfig, FigureOptions]) -> None:
    """Figure 7: what masks leave of gradients at random weights."""
    from experiments.synthetic.correlations import correlation_rows

    if redraw(call.options, DRAWINGS, ("figure7",)):
        return
    config = call.config
    path = call.run_path(EXPERIMENT, f"correlations-{call.options.preset}")
    with figure_dir(
        path, f"{EXPERIMENT} correlations", call, config, ("figure7",), TRAIN
    ) as run:
        if not run.finished:
            first, last = config.seeds
            rows = correlation_rows(config, range(first, last + 1), config.logit_scale)
            finish_figures(
                run, DRAWINGS, {"figure7": rows}, {"seeds": last + 1 - first}
            )
        print(f"Figure: {run.path / 'figure7.png'}")


def consistency(call: Invocation[ConsistencyConfig, FigureOptions]) -> None:
    """Trains networks and searches for the inconsistency of each."""
    from experiments.synthetic.consistency import VARIATIONS, rows_of

    options, config = call.options, call.config
    if redraw(options, DRAWINGS, ("consistency",)):
        return
    path = call.run_path(EXPERIMENT, f"consistency-{options.preset}")
    with figure_dir(
        path, f"{EXPERIMENT} consistency", call, config, ("consistency",), TRAIN
    ) as run:
        if not run.finished:
            jobs = [
                (run.path / f"{c.method}-seed{c.seed}", c, call.command)
                for c in config.train_configs()
            ]
            _train_all(run, jobs, options.workers)
            rows: list[dict[str, Any]] = []
            for job in tqdm(jobs, desc="search", unit="network"):
                rows += _network_rows(job, lambda *network: rows_of(config, *network))
            summary = summarize_consistency(rows, VARIATIONS)
            finish_figures(run, DRAWINGS, {"consistency": rows}, summary)
        print(format_consistency(run.summary()))
        print(f"Every search: {run.path / 'consistency.csv'}")
        print(f"Figure: {run.path / 'consistency.png'}")


def placement(call: Invocation[PlacementConfig, WorkerOptions]) -> None:
    """Where the AND-mask acts: on gradients, on moments, on updates."""
    config, options = call.config, call.options
    path = call.run_path(EXPERIMENT, f"placement-{options.preset}")
    with entered(
        call,
        path,
        f"{EXPERIMENT} placement",
        outputs=(PLACEMENT_TABLE, TRAIN_FIGURE),
        parts=TRAIN,
    ) as run:
        if not run.finished:
            jobs = []
            for c in config.train_configs():
                name = (
                    f"{c.placement}-threshold{c.threshold}-decay{c.weight_decay}"
                    f"-seed{c.seed}"
                )
                jobs.append((run.path / name, c, call.command))
            outcomes = _train_all(run, jobs, options.workers, unit="run")
            rows = [
                {name: getattr(c, name) for name in PLACEMENT_SETTINGS} | outcome.result
                for (_, c, _), outcome in zip(jobs, outcomes, strict=True)
            ]
            run.write_metrics(rows, PLACEMENT_TABLE)
            run.finish({"results": summarize_placement(rows)})
        print(format_placement(run.summary()["results"]))
        print(f"Every run: {run.path / PLACEMENT_TABLE}")


def summarize_placement(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Statistics over seeds of every placement with each of its settings."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[n] for n in PLACEMENT_SETTINGS), []).append(row)
    return [
        {
            **dict(zip(PLACEMENT_SETTINGS, settings, strict=True)),
            **summarize_seeds(own),
            "max_test_accuracy": max(row["test_accuracy"] for row in own),
            "mean_train_accuracy": sum(row["train_accuracy"] for row in own) / len(own),
        }
        for settings, own in groups.items()
    ]


def format_placement(results: Sequence[Mapping[str, Any]]) -> str:
    """The statistics as text."""
    columns = {
        "placement": ("placement", "<11"),
        "threshold": ("threshold", ">9"),
        "decay": ("weight_decay", ">5"),
        "seeds": ("seeds", ">5"),
        "train": ("mean_train_accuracy", ">7.1%"),
        "test": ("mean_test_accuracy", ">7.1%"),
        "lowest": ("min_test_accuracy", ">7.1%"),
        "highest": ("max_test_accuracy", ">7.1%"),
        "solved": ("solved", ">6"),
    }
    return format_rows(columns, results)


def _network_rows(
    job: Job, rows_of: Callable[..., Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The rows of a network that was trained, kept beside it for the next start."""
    path, config, command = job
    with _train_dir(path, config, command) as run:
        table = run.path / SEARCHES_TABLE
        if not table.exists():
            dataset = dataset_for(config, config.seed)
            variables = _train(run, config, dataset, quiet=True).variables
            found = rows_of(config.method, config.seed, variables, dataset.train)
            run.write_metrics(list(found), SEARCHES_TABLE)
        return read_table(table)


def summarize_consistency(
    rows: Sequence[Mapping[str, Any]], variations: Sequence[str]
) -> dict[str, Any]:
    """ILC (minus the mean score), its standard error, and accuracies.

    Lists have an entry for each distance; the scores are lower bounds, so the ILC is
    bounded from above.
    """
    summary: dict[str, Any] = {"distances": sorted({row["distance"] for row in rows})}
    for variation in variations:
        for method in dict.fromkeys(row["method"] for row in rows):
            of_method = [
                row
                for row in rows
                if row["method"] == method and row["variation"] == variation
            ]
            per_distance = [
                [row for row in of_method if row["distance"] == distance]
                for distance in summary["distances"]
            ]
            scores = [np.array([r["score"] for r in some]) for some in per_distance]
            summary[f"{variation}, {method}"] = {
                "ilc": [-float(some.mean()) for some in scores],
                # Of a single seed 0, since JSON has no NaN.
                "standard_error": [
                    float(some.std(ddof=min(1, len(some) - 1))) / math.sqrt(len(some))
                    for some in scores
                ],
                **{
                    name: [
                        float(np.mean([r[name] for r in some])) for some in per_distance
                    ]
                    for name in ("own_accuracy", "other_accuracy")
                },
            }
    return summary


def format_consistency(summary: Mapping[str, Any]) -> str:
    """The summary as text, one line per variation, method and distance."""
    lines = [
        f"{'varied':<10}{'method':<16}{'distance':>9}{'ILC':>12}{'+-':>10}"
        f"{'own':>8}{'other':>8}"
    ]
    for name, values in summary.items():
        if name == "distances":
            continue
        variation, method = name.split(", ")
        lines += [
            f"{variation:<10}{method:<16}{distance:>9g}{ilc:>12.4g}{error:>10.2g}"
            f"{own:>8.1%}{other:>8.1%}"
            for distance, ilc, error, own, other in zip(
                summary["distances"], *values.values(), strict=True
            )
        ]
    return "\n".join(lines)


def _columns(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows]


def summarize_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of the final o.o.d. test accuracy over seeds."""
    accuracies = [result["test_accuracy"] for result in results]
    solved = sum(accuracy >= SOLVED for accuracy in accuracies)
    return {
        "seeds": len(results),
        "mean_test_accuracy": sum(accuracies) / len(accuracies),
        "min_test_accuracy": min(accuracies),
        "solved_from": SOLVED,
        "solved": solved,
        "solved_share": solved / len(accuracies),
    }


def _train_dir(
    path: Path, config: TrainConfig, command: str, overwrite: bool = False
) -> RunDir:
    return RunDir(
        path,
        TRAIN,
        config,
        seed=config.seed,
        command=command,
        overwrite=overwrite,
        outputs=(TRAIN_FIGURE,),
    )


def _train(
    run: RunDir, config: TrainConfig, dataset: Dataset, *, quiet: bool = False
) -> Trained:
    """Trains unless that is done, and leaves a finished run."""
    trained = Trained(*train_to_the_end(config, run, dataset, quiet=quiet))
    if not run.finished:
        figure = draw(config, dataset, {config.method: trained})
        run.save_figure(TRAIN_FIGURE, figure)
        final = trained.history[-1]
        run.finish(
            {
                "method": config.method,
                "seed": config.seed,
                "epochs": len(trained.history),
                **{name: final[name] for name in METRICS},
            }
        )
    return trained


def _result(run: RunDir) -> dict[str, Any]:
    return {**run.summary(), "seconds": run.wall_time}


def format_accuracies(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """O.o.d. test accuracy of every method, as text."""
    columns = {
        "method": ("method", "<16"),
        "seeds": ("seeds", ">5"),
        "o.o.d. mean": ("mean_test_accuracy", ">13.1%"),
        "o.o.d. worst": ("min_test_accuracy", ">14.1%"),
        "solved": ("solved", ">7"),
    }
    rows = ({"method": method, **values} for method, values in summary.items())
    return format_rows(columns, rows)


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as text, one line per method."""
    columns = {
        "method": ("method", "<16"),
        "train": ("train_accuracy", ">9.1%"),
        "held out": ("held_out_accuracy", ">9.1%"),
        "o.o.d. test": ("test_accuracy", ">12.1%"),
        "loss": ("loss", ">8.4f"),
        "kept": ("kept_fraction", ">9.3%"),
        "seconds": ("seconds", ">8.1f"),
    }
    return format_rows(columns, results)
