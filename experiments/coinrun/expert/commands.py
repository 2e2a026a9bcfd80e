"""The subcommands that train and evaluate an expert."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.coinrun.evaluation import (
    evaluate,
    format_summary,
    policies,
    rows_of,
    summarize_all,
)
from experiments.coinrun.expert.config import (
    EvaluateConfig,
    ExpertConfig,
    ExpertFileOptions,
)
from experiments.coinrun.expert.figures import draw_learning_curve
from experiments.coinrun.expert.saved import Expert, load_expert, save_expert
from experiments.coinrun.expert.training import SPEED, train
from experiments.coinrun.game import EVALUATION_LEVELS, GameMode, require_game
from experiments.common.cli import Invocation, RunOptions, entered
from experiments.common.figures import read_table
from experiments.common.files import file_sha256
from experiments.common.run_dir import METRICS, RunDir

EXPERIMENT = "coinrun"
EXPERT = "expert.npz"
EPISODES = "episodes.csv"
CURVE = "learning_curve.png"


def expert(call: Invocation[ExpertConfig, RunOptions]) -> None:
    """Trains an expert, saves it, evaluates it and draws its learning curve."""
    config, options = call.config, call.options
    require_game()
    path = call.run_path(EXPERIMENT, f"expert-{options.preset}")
    with entered(
        call, path, f"{EXPERIMENT} expert", outputs=(EXPERT, EPISODES, SPEED, CURVE)
    ) as run:
        if not run.finished:
            trained, _ = train(config, run)
            save_expert(run.path / EXPERT, trained)
            # From the file, because that is what others get.
            saved = load_expert(run.path / EXPERT)
            results = _evaluate(
                run, saved, config.evaluation_levels, config.mode, config.seed
            )
            curve = draw_learning_curve(read_table(run.path / METRICS), results)
            run.save_figure(CURVE, curve)
            run.finish({"mode": config.mode, "frames": config.frames, **results})
        _show(run)
        print(f"Expert: {run.path / EXPERT}\nFigure: {run.path / CURVE}")


def evaluate_expert(call: Invocation[EvaluateConfig, ExpertFileOptions]) -> None:
    """Plays unseen levels with a saved expert and with what it has to beat."""
    config, options = call.config, call.options
    require_game()
    saved = load_expert(options.expert_file)
    mode = saved.about["mode"]
    sha256 = file_sha256(options.expert_file)
    identity = {**dataclasses.asdict(config), "expert_sha256": sha256}
    path = call.run_path(EXPERIMENT, f"evaluate-{options.preset}-{sha256[:8]}")
    with entered(
        call, path, f"{EXPERIMENT} evaluate", identity, outputs=(EPISODES,)
    ) as run:
        if not run.finished:
            results = _evaluate(run, saved, config.levels, mode, config.seed)
            run.finish({"mode": mode, **results})
        _show(run)


def _evaluate(
    run: RunDir, expert: Expert, levels: int, mode: GameMode, seed: int
) -> dict[str, dict[str, Any]]:
    """Results by policy; episodes.csv has every level."""
    played = EVALUATION_LEVELS[:levels]
    episodes = evaluate(policies(expert.probabilities, seed), played, mode)
    run.write_metrics(rows_of(episodes), EPISODES)
    return summarize_all(episodes)


def _show(run: RunDir) -> None:
    summary = run.summary()
    results = {name: row for name, row in summary.items() if isinstance(row, dict)}
    print(format_summary(results))
