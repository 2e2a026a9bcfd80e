"""The subcommands of the students: each fills one run directory."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.image import imsave
from tqdm import tqdm

from experiments.coinrun import dataset as data
from experiments.coinrun import game
from experiments.coinrun.evaluation import (
    evaluate,
    format_summary,
    rows_of,
    summarize_all,
)
from experiments.coinrun.expert.actors import (
    Probabilities,
    greedy,
    in_batches,
    sampled,
    scripted_policy,
)
from experiments.coinrun.expert.config import MICROBATCH, ExpertFileOptions
from experiments.coinrun.expert.saved import Expert, load_expert
from experiments.coinrun.student import search as trials
from experiments.coinrun.student.config import (
    DataOptions,
    DatasetConfig,
    Method,
    PlayConfig,
    PlayOptions,
    SearchConfig,
    SearchOptions,
    TrainConfig,
)
from experiments.coinrun.student.figures import animation, draw_best, draw_curves
from experiments.coinrun.student.resnet import make_apply
from experiments.coinrun.student.training import (
    METRICS,
    architecture_for,
    constant_kl,
    make_keys,
    make_trainer,
)
from experiments.coinrun.student.training import train as train_student
from experiments.common.bootstrap import bootstrap, bootstrap_difference
from experiments.common.checkpoints import Checkpoints
from experiments.common.cli import Invocation, announced, entered
from experiments.common.epochs import State
from experiments.common.figures import Drawings, finish_figures, redraw
from experiments.common.files import atomic_write, file_sha256, write_json
from experiments.common.run_dir import CHECKPOINT, RunDir, RunDirError
from experiments.common.run_dir import METRICS as METRICS_FILE
from experiments.common.search_runs import (
    SELECTED,
    TRIALS_TABLE,
    run_missing,
    search_dir,
)
from experiments.common.tables import format_rows

EXPERIMENT = "coinrun"
TRAIN = f"{EXPERIMENT} train"
SHEET = "levels.png"
EPISODES = "episodes.csv"
ANIMATION = "play.gif"
DRAWINGS: Drawings = {"best": draw_best, "figure18": draw_curves}

# Columns of best.csv, which is table 3 with what else there is to say.
TABLE_3 = ("learning_rate", "b1", "b3", "threshold", "weight_decay", "decay")


def dataset(call: Invocation[DatasetConfig, ExpertFileOptions]) -> None:
    """Collects the dataset, and draws six of its levels."""
    config, options = call.config, call.options
    identity, expert = dataclasses.asdict(config), None
    levels = levels_of(config)
    if config.source == "coinrun":
        game.require_game()
        expert = _expert_for(config.mode, options.expert_file)
        identity["expert_sha256"] = file_sha256(options.expert_file)
    with entered(
        call,
        _default_path(call, "dataset"),
        f"{EXPERIMENT} dataset",
        identity,
        outputs=(data.MANIFEST, *data.ARRAYS, SHEET),
    ) as run:
        if not run.finished:
            if expert is None:
                collected = data.generate(config)
            else:
                collected = data.collect(
                    functools.partial(_play, mode=config.mode),
                    expert.probabilities,
                    config,
                    levels.train,
                    levels.test,
                )
            about = {
                f"{part}_levels": list(each) for part, each in levels._asdict().items()
            }
            data.save(run.path, collected, {**identity, **about})
            _save_image(run.path / SHEET, data.contact_sheet(collected.train.images))
            run.finish(_summarize_dataset(collected))
        data.open_dataset(run.path)
        for name, value in run.summary().items():
            print(f"{name}: {value}")
        print(f"Six levels: {run.path / SHEET}")


class Levels(NamedTuple):
    """Seeds of the levels that students learn on and are tested on."""

    train: Sequence[int]
    test: Sequence[int]


def levels_of(config: DatasetConfig) -> Levels:
    """The first ones that are set aside for each.

    Raises:
      DataError: more levels are wanted than are set aside.
    """

    def first(name: str, reserved: range) -> range:
        count: int = getattr(config, name)
        if count > len(reserved):
            raise data.DataError(
                f"{name} must be at most {len(reserved)}, which are set aside, got "
                f"{count}"
            )
        return reserved[:count]

    return Levels(
        first("levels", game.STUDENT_TRAIN_LEVELS),
        first("test_levels", game.STUDENT_TEST_LEVELS),
    )


def _expert_for(mode: game.GameMode, path: Path) -> Expert:
    expert = load_expert(path)
    learnt = expert.about["mode"]
    if learnt != mode:
        raise RunDirError(
            f"the expert in {path} was trained on {learnt} levels, not on {mode} ones: "
            f"give --mode {learnt}, or another --expert"
        )
    return expert


def _play(
    levels: Sequence[int], choose: game.Choose, mode: game.GameMode
) -> Iterator[game.Episode]:
    """The game, with a progress bar."""
    yield from tqdm(
        game.play(levels, choose, mode),
        total=len(levels),
        unit="level",
        desc="expert",
        # A log file wants a line now and then, not ten a second.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )


def _default_path(call: Invocation[Any, Any], name: str) -> Path:
    return call.run_path(EXPERIMENT, f"{name}-{call.options.preset}")


def _save_image(path: Path, image: np.ndarray) -> None:
    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    atomic_write(path, buffer.getvalue())


def _summarize_dataset(collected: data.Dataset) -> dict[str, Any]:
    train, test = collected
    levels, states = train.images.shape[:2]
    return {
        "train_states": levels * states,
        "test_states": len(test.images),
        "train_entropy": _entropy(train.probabilities),
        "test_entropy": _entropy(test.probabilities),
        "constant_test_kl": float(constant_kl(test.probabilities)),
    }


def _entropy(probabilities: np.ndarray) -> float:
    """Mean entropy in nats of distributions [..., action]."""
    safe = np.where(probabilities > 0, probabilities, 1)
    return float(-(probabilities * np.log(safe)).sum(-1).mean())


def train(call: Invocation[TrainConfig, DataOptions]) -> None:
    """Trains one student."""
    config, options = call.config, call.options
    collected, digest = data.load(config.dataset, options.data_dir(config.dataset))
    name = f"train-{config.method}-{options.preset}-seed{config.seed}"
    path = call.run_path(EXPERIMENT, name, ("method", "seed"))
    with (
        train_dir(
            path, config, digest, call.command, overwrite=options.overwrite
        ) as run,
        announced(run),
    ):
        train_in(run, config, collected)
        print(format_training(run.summary()))
        print(f"Metrics: {run.path / METRICS_FILE}")


def train_dir(
    path: Path,
    config: TrainConfig,
    digest: str,
    command: str,
    *,
    overwrite: bool = False,
) -> RunDir:
    """The run directory of one student; `digest` tells its dataset from others."""
    identity = {**dataclasses.asdict(config), "data_sha256": digest}
    return RunDir(
        path, TRAIN, identity, seed=config.seed, command=command, overwrite=overwrite
    )


def train_in(
    run: RunDir, config: TrainConfig, collected: data.Dataset, *, quiet: bool = False
) -> None:
    """Trains to the end, if that is still to be done, and writes the summary."""
    if not run.finished:
        _, history = train_student(config, run, collected, quiet=quiet)
        run.finish(_summarize_training(collected, history))


def _summarize_training(
    collected: data.Dataset, history: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    best = min(history, key=lambda row: (math.isnan(row["test_kl"]), row["test_kl"]))
    return {
        **{name: history[-1][name] for name in METRICS},
        "min_test_kl": best["test_kl"],
        "min_test_kl_epoch": int(best["epoch"]),
        # What can be had without looking at the state.
        "constant_test_kl": float(constant_kl(collected.test.probabilities)),
    }


def format_training(summary: Mapping[str, Any]) -> str:
    """The result of a run, as text."""
    # JSON has words in place of the NaN that runs that diverged have.
    numbers = {name: float(value) for name, value in summary.items()}
    return (
        "KL: {train_kl:.4f} train, {test_kl:.4f} test (lowest {min_test_kl:.4f}, epoch "
        "{min_test_kl_epoch:.0f}; a constant {constant_test_kl:.4f}); the expert's "
        "first choice: {train_accuracy:.1%} train, {test_accuracy:.1%} test".format(
            **numbers
        )
    )


class Student(NamedTuple):
    """A trained student, and what tells it from others."""

    probabilities: Probabilities
    identity: dict[str, Any]


def load_student(path: Path) -> Student:
    """The student of a finished training run.

    Args:
      path: the run's directory.

    Raises:
      RunDirError: there is none.
    """
    mend = (
        "finish it with `python -m experiments.coinrun train` first, or choose another "
        "with --student"
    )
    try:
        identity = json.loads((path / "config.json").read_text())
        summary = json.loads((path / "summary.json").read_text())
    except (OSError, ValueError):
        raise RunDirError(f"{path} is no finished training run: {mend}") from None
    if identity.get("experiment") != TRAIN:
        raise RunDirError(
            f"{path} is a run of {identity.get('experiment')}, not of {TRAIN}: choose "
            "another with --student"
        )
    settings = dict(identity["config"])
    digest = settings.pop("data_sha256")
    config = TrainConfig(**settings)
    like = make_trainer(config, config.method).init(make_keys(config.seed).model)
    checkpoints = Checkpoints(path / CHECKPOINT)
    try:
        restored: tuple[int, State] | None = checkpoints.restore_latest(like)
    except ValueError as error:
        raise RunDirError(
            f"the checkpoint in {path} does not fit this version of the program: train "
            f"again with --overwrite ({error})"
        ) from error
    finally:
        checkpoints.close()
    if restored is None or restored[0] != config.epochs:
        raise RunDirError(
            f"{path} has no intact checkpoint of its last epoch: train again with "
            "--overwrite, or choose another with --student"
        )
    apply, variables = make_apply(architecture_for(config)), restored[1].variables

    @jax.jit
    def policy(frames: jax.Array) -> jax.Array:
        return jax.nn.softmax(apply(variables, frames))

    return Student(
        in_batches(lambda frames: np.asarray(policy(frames)), MICROBATCH),
        {**settings, "data_sha256": digest, "test_kl": summary["test_kl"]},
    )


def play(call: Invocation[PlayConfig, PlayOptions]) -> None:
    """Plays unseen levels with student and expert; writes a table and an animation."""
    config, options = call.config, call.options
    student = load_student(options.student_dir)
    game.require_game()
    expert = load_expert(options.expert_file)
    mode = expert.about["mode"]
    identity = dataclasses.asdict(config) | {
        "student": student.identity,
        "expert_sha256": file_sha256(options.expert_file),
    }
    with entered(
        call,
        _default_path(call, "play"),
        f"{EXPERIMENT} play",
        identity,
        outputs=(EPISODES, ANIMATION),
    ) as run:
        if not run.finished:
            levels = game.EVALUATION_LEVELS[: config.levels]

            def recorded(probabilities: Probabilities) -> Recorder:
                choose = (
                    greedy(probabilities)
                    if config.actions == "greedy"
                    else sampled(probabilities, config.seed)
                )
                return Recorder(choose, levels[: config.shown], config.max_frames)

            recorders = {
                "expert": recorded(expert.probabilities),
                "student": recorded(student.probabilities),
            }
            policies: dict[str, game.Choose] = {
                **recorders,
                "scripted": scripted_policy(config.seed),
            }
            episodes = evaluate(policies, levels, mode)
            run.write_metrics(rows_of(episodes), EPISODES)
            frames = {name: each.frames() for name, each in recorders.items()}
            atomic_write(run.path / ANIMATION, animation(frames))
            run.finish(summarize_all(episodes))
        print(format_summary(run.summary()))
        print(f"Animation: {run.path / ANIMATION}")


class Recorder:
    """A policy of which some episodes are kept.

    Args:
      choose: the policy.
      levels: whose episodes to keep.
      max_frames: of an episode, from its start.
    """

    def __init__(self, choose: game.Choose, levels: Sequence[int], max_frames: int):
        self._choose = choose
        self._frames: dict[int, list[np.ndarray]] = {level: [] for level in levels}
        self._max_frames = max_frames

    def __call__(self, turn: game.Turn) -> np.ndarray:
        """The policy's actions."""
        for slot in np.flatnonzero(turn.active & (turn.steps < self._max_frames)):
            if (level := int(turn.levels[slot])) in self._frames:
                self._frames[level].append(turn.frames[slot].copy())
        return self._choose(turn)

    def frames(self) -> list[list[np.ndarray]]:
        """Frames uint8 [64, 64, 3] of each level's episode."""
        return list(self._frames.values())


def search(call: Invocation[SearchConfig, SearchOptions]) -> None:
    """Searches with every method; draws and tabulates the best trials of each."""
    config, options = call.config, call.options
    if redraw(options, DRAWINGS, tuple(DRAWINGS)):
        return
    directory = options.data_dir(config.dataset).absolute()
    _, digest = data.load(config.dataset, directory)
    name = f"search-{options.preset}-seed{config.seed}"
    with search_dir(
        call,
        call.run_path(EXPERIMENT, name, ("seed", "trials", "top")),
        f"{EXPERIMENT} search",
        {"data_sha256": digest},
        # It can also show more or fewer of the best.
        ("trials", "top"),
        [f"{figure}{end}" for figure in DRAWINGS for end in (".csv", ".png")],
    ) as run:
        if not run.finished:
            tables = {
                method: _search(run, config, method, options, directory, digest)
                for method in config.methods
            }
            _finish_search(run, config, tables)
        print(format_search(run.summary()))
        print(f"Every trial: {run.path / TRIALS_TABLE}")
        for figure in DRAWINGS:
            print(f"Figure: {run.path / f'{figure}.png'}")


Table = list[dict[str, Any]]


def _search(
    run: RunDir,
    config: SearchConfig,
    method: Method,
    options: SearchOptions,
    directory: Path,
    digest: str,
) -> Table:
    """The rows of all trials of a method."""
    study = trials.study_of(config, method, run.path, options.storage, digest)
    objective = trials.Objective(config, method, directory, digest)

    def show(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        return {"lowest test KL": f"{_lowest(rows):.4f}"}

    return run_missing(run, study, objective, options.workers, show, method)


def _lowest(rows: Sequence[Mapping[str, Any]]) -> float:
    kept = trials.best_trials(rows, 1)
    return kept[0]["min_test_kl"] if kept else math.inf


def _finish_search(
    run: RunDir, config: SearchConfig, tables: Mapping[Method, Table]
) -> None:
    """Writes all that follows from the studies' records, and the summary."""
    best = {
        method: trials.best_trials(rows, config.top) for method, rows in tables.items()
    }
    for method, rows in best.items():
        if not rows:
            raise RunDirError(
                f"all {len(tables[method])} trials of {method} diverged: ask for more "
                "trials"
            )
    run.write_metrics(_trial_rows(tables), TRIALS_TABLE)
    selected = {
        method: {"method": method, **_settings_of(rows[0])}
        for method, rows in best.items()
    }
    write_json(run.path / SELECTED, selected)
    finish_figures(
        run,
        DRAWINGS,
        {"best": _best_rows(best), "figure18": _curve_rows(best)},
        _summarize_search(config, tables, best),
    )


def _trial_rows(tables: Mapping[Method, Table]) -> Table:
    """All trials, without their curves and with columns that both methods have."""
    rows = [
        {"method": method, **row} for method, table in tables.items() for row in table
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [
        {name: row.get(name) for name in columns if not name.endswith("_curve")}
        for row in rows
    ]


def _settings_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TrainConfig` that a trial drew."""
    drawn = {name: row[name] for name in TABLE_3 if row.get(name) is not None}
    return {"weight_decay": 0.0, **drawn}


Best = Mapping[Method, Sequence[Mapping[str, Any]]]


def _ranked(best: Best) -> Iterable[tuple[dict[str, Any], Mapping[str, Any]]]:
    for method, rows in best.items():
        for rank, row in enumerate(rows, 1):
            yield {"method": method, "rank": rank, "trial": row["number"]}, row


def _best_rows(best: Best) -> Table:
    """Table 3, of every method, with the metrics of the last epoch."""
    last = ("last_train_kl", "last_test_kl", "last_test_accuracy", "last_open_fraction")
    return [
        {
            **place,
            "test_kl": row["min_test_kl"],
            **{name: row.get(name) for name in (*TABLE_3, *last)},
        }
        for place, row in _ranked(best)
    ]


def _curve_rows(best: Best) -> Table:
    return [
        {**place, "epoch": epoch, "train_kl": train_kl, "test_kl": test_kl}
        for place, row in _ranked(best)
        for epoch, (train_kl, test_kl) in enumerate(
            zip(*(row[f"{name}_curve"] for name in trials.CURVES), strict=True), 1
        )
    ]


def _summarize_search(
    config: SearchConfig, tables: Mapping[Method, Table], best: Best
) -> dict[str, Any]:
    values = {
        method: np.array([row["min_test_kl"] for row in rows])
        for method, rows in best.items()
    }
    intervals = {method: bootstrap(each) for method, each in values.items()}
    summary: dict[str, Any] = {
        "trials": config.trials,
        "top": config.top,
        "methods": {
            method: {
                "trials": len(rows),
                "diverged": sum(row["stopped"] == "diverged" for row in rows),
                "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 1),
                "lowest_test_kl": float(values[method].min()),
                "top": len(values[method]),
                "top_mean_test_kl": float(intervals[method].mean),
                "top_interval": [
                    float(intervals[method].low),
                    float(intervals[method].high),
                ],
                "best": _best_rows({method: best[method]}),
            }
            for method, rows in tables.items()
        },
    }
    if set(values) == {"adam", "and_mask"}:
        gain = bootstrap_difference(values["adam"], values["and_mask"])
        summary["adam_minus_and_mask"] = gain.as_row()
    return summary


def format_search(summary: Mapping[str, Any]) -> str:
    """The best trials, as text."""
    columns = {
        "method": ("method", "<9"),
        "test KL": ("test_kl", ">9.5f"),
        "lr": ("learning_rate", ">8.2g"),
        "b1": ("b1", ">6.2f"),
        "b3": ("b3", ">6.2f"),
        "tau": ("threshold", ">6.2f"),
        "decay": ("weight_decay", ">9.2g"),
        "kind": ("decay", ">10"),
        "open": ("last_open_fraction", ">6.0%"),
    }
    best = [row for each in summary["methods"].values() for row in each["best"]]
    lines = [format_rows(columns, best)]
    for method, each in summary["methods"].items():
        low, high = each["top_interval"]
        lines.append(
            f"{method}: {each['trials']} trials, {each['diverged']} diverged; the best "
            f"{each['top']}: {each['top_mean_test_kl']:.5f} [{low:.5f}, {high:.5f}]"
        )
    if gain := summary.get("adam_minus_and_mask"):
        lines.append(
            "adam minus and_mask: {mean:+.5f} [{low:+.5f}, {high:+.5f}]".format(**gain)
        )
    return "\n".join(lines)
