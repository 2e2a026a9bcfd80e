"""How policies do on levels that each of them plays once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.coinrun.expert.actors import (
    Probabilities,
    greedy,
    random_policy,
    sampled,
    scripted_policy,
)
from experiments.coinrun.game import Choose, Episode, GameMode, play

POLICIES = ("sampled", "greedy", "scripted", "random")


def policies(expert: Probabilities, seed: int) -> dict[str, Choose]:
    """The expert, by chance and by its most likely actions, and what it has to beat."""
    return {
        "sampled": sampled(expert, seed),
        "greedy": greedy(expert),
        "scripted": scripted_policy(seed),
        "random": random_policy(seed),
    }


def evaluate(
    chosen: Mapping[str, Choose],
    levels: Sequence[int],
    mode: GameMode,
    *,
    quiet: bool = False,
) -> dict[str, list[Episode]]:
    """Episodes of each policy, one on each level, in the order of `levels`.

    Args:
      chosen: policies by name.
      levels: seeds of different levels.
      mode: easy or hard.
      quiet: without a progress bar.
    """
    episodes = {}
    with tqdm(total=len(levels) * len(chosen), unit="level", disable=quiet) as bar:
        for name, choose in chosen.items():
            bar.set_description(name)
            played = {}
            for episode in play(levels, choose, mode):
                played[episode.level] = episode
                bar.update()
            episodes[name] = [played[level] for level in levels]
    return episodes


def summarize(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Means over levels, with standard errors."""
    returns = np.array([episode.total_reward for episode in episodes])
    solved = _solved(episodes)
    return {
        "levels": len(episodes),
        "mean_return": float(returns.mean()),
        "return_error": _error(returns),
        "solved": float(solved.mean()),
        "solved_error": _error(solved),
        "mean_steps": float(np.mean([episode.steps for episode in episodes])),
    }


def summarize_all(
    episodes: Mapping[str, Sequence[Episode]],
) -> dict[str, dict[str, Any]]:
    """`summarize` of each policy, and how many more levels it solves than the scripted.

    `gain` is the difference of the shares, `gain_error` the standard error of the
    difference on one level.
    """
    scripted = _solved(episodes["scripted"])
    results = {}
    for name, played in episodes.items():
        gains = _solved(played) - scripted
        gain = {"gain": float(gains.mean()), "gain_error": _error(gains)}
        results[name] = {**summarize(played), **gain}
    return results


def _solved(episodes: Sequence[Episode]) -> np.ndarray:
    return np.array([episode.solved for episode in episodes], float)


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def rows_of(episodes: Mapping[str, Sequence[Episode]]) -> list[dict[str, Any]]:
    """One row for each policy and level."""
    return [
        {
            "policy": name,
            "level": episode.level,
            "return": episode.total_reward,
            "solved": int(episode.solved),
            "steps": episode.steps,
        }
        for name, played in episodes.items()
        for episode in played
    ]


def format_summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results of `summarize_all`, as text."""
    lines = [
        "policy   levels        solved   more than scripted          return   steps"
    ]
    lines += [
        f"{name:<8} {row['levels']:>6}"
        f" {row['solved']:>7.1%} +-{row['solved_error']:5.1%}"
        f" {row['gain']:>+12.1%} +-{row['gain_error']:5.1%}"
        f" {row['mean_return']:>7.2f} +-{row['return_error']:5.2f}"
        f" {row['mean_steps']:>7.1f}"
        for name, row in results.items()
    ]
    return "\n".join(lines)
