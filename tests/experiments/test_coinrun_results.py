"""The claims of docs/results/coinrun.md, from the committed files."""

import json
import statistics

import numpy as np
import pytest

from experiments.coinrun.evaluation import summarize_all
from experiments.coinrun.expert.config import EXPERT
from experiments.coinrun.expert.saved import load_expert
from experiments.coinrun.game import (
    EVALUATION_LEVELS,
    STUDENT_TEST_LEVELS,
    STUDENT_TRAIN_LEVELS,
    Episode,
)
from experiments.coinrun.student.commands import DRAWINGS
from experiments.coinrun.student.config import (
    METHODS,
    RERUN_PRESETS,
    SEARCH_PRESETS,
    TrainConfig,
)
from experiments.coinrun.student.rerun import DRAWINGS as RERUN_DRAWINGS
from experiments.coinrun.student.rerun import load_selected
from experiments.common.bootstrap import bootstrap
from experiments.common.figures import read_table
from experiments.common.files import file_sha256
from tests.experiments.conftest import ROOT

RESULTS = ROOT / "docs" / "results" / "coinrun"
PAGE = (RESULTS.parent / "coinrun.md").read_text()


def table(name):
    return read_table(RESULTS / f"{name}.csv")


def record(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def episodes_of(name):
    """The committed episodes of each policy."""
    episodes = {}
    for row in table(name):
        episode = Episode(
            int(row["level"]), row["return"], bool(row["solved"]), int(row["steps"])
        )
        episodes.setdefault(row["policy"], []).append(episode)
    return episodes


def cells(title):
    """Rows of the page's table whose header starts with `title`."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {title} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_expert_beats_the_scripted_policy_on_unseen_levels():
    episodes = episodes_of("expert_episodes")
    levels = [episode.level for episode in episodes["sampled"]]
    assert levels == list(EVALUATION_LEVELS[: len(levels)])
    assert len(levels) >= 500
    summary = summarize_all(episodes)
    assert {"mode": "easy", **summary} == record("expert_evaluation")
    for name in ("sampled", "greedy"):
        assert summary[name]["gain"] > 2 * summary[name]["gain_error"] > 0
    assert [row[0] for row in cells("policy")] == list(summary)
    for name, solved, mean_return, steps in cells("policy"):
        row = summary[name]
        assert solved == (
            f"{row['solved']:.1%} ± {row['solved_error']:.1%}".replace("%", " %")
        )
        assert mean_return == f"{row['mean_return']:.2f}"
        assert steps == f"{row['mean_steps']:.0f}"


def test_expert_file_is_what_the_dataset_was_made_with():
    expert = load_expert(EXPERT)
    assert expert.about["mode"] == "easy"
    assert table("expert")[-1]["frames"] == expert.about["frames"]
    dataset = record("dataset")
    assert dataset["expert_sha256"] == file_sha256(EXPERT)
    assert dataset["train_levels"] == list(STUDENT_TRAIN_LEVELS)
    assert dataset["test_levels"] == list(STUDENT_TEST_LEVELS)
    shapes = {name: each["shape"] for name, each in dataset["arrays"].items()}
    assert shapes["train_images.npy"] == [64, 100, 64, 64, 3]
    assert shapes["test_probabilities.npy"] == [2000, 15]


def test_search_has_the_same_budget_for_both_and_chose_the_lowest():
    trials, best = table("trials"), table("best")
    chosen = load_selected(RESULTS / "selected.json")
    summary = record("search_summary")
    for method in METHODS:
        own = [row for row in trials if row["method"] == method]
        assert [row["number"] for row in own] == list(range(len(own)))
        assert len(own) == SEARCH_PRESETS["cpu"].trials >= 25
        kept = [row for row in own if row["stopped"] == ""]
        lowest = sorted(kept, key=lambda row: row["min_test_kl"])[:10]
        shown = [row for row in best if row["method"] == method]
        assert [row["trial"] for row in shown] == [row["number"] for row in lowest]
        for name, value in chosen[method].items():
            if name in ("method", "decay"):
                assert shown[0][name] == value
            elif name != "weight_decay":  # of which there may be none
                assert shown[0][name] == pytest.approx(value)
        values = np.array([row["test_kl"] for row in shown])
        part = summary["methods"][method]
        assert part["top_mean_test_kl"] == pytest.approx(values.mean())
        interval = bootstrap(values)
        assert part["top_interval"] == pytest.approx([interval.low, interval.high])
        # Well below what can be had without looking at the state.
        assert values.max() < 0.5 * record("dataset_summary")["constant_test_kl"]


def test_rerun_has_every_seed_of_the_choice_and_its_means():
    rows, summary = table("reruns"), record("rerun_summary")
    first, last = RERUN_PRESETS["cpu"].seeds
    chosen = load_selected(RESULTS / "selected.json")
    for method in METHODS:
        TrainConfig(**chosen[method])
        final = [
            row
            for row in rows
            if row["method"] == method and row["epoch"] == RERUN_PRESETS["cpu"].epochs
        ]
        assert [row["seed"] for row in final] == list(range(first, last + 1))
        mean = statistics.fmean(row["test_kl"] for row in final)
        assert summary["methods"][method]["test_kl"]["mean"] == pytest.approx(mean)


@pytest.mark.parametrize("name", [*DRAWINGS, *RERUN_DRAWINGS])
def test_committed_figures_are_drawn_from_the_committed_tables(name, tmp_path):
    assert (RESULTS / f"{name}.png").stat().st_size > 10_000
    drawings = {**DRAWINGS, **RERUN_DRAWINGS}
    drawings[name](table(name)).savefig(tmp_path / "figure.png")


def test_student_at_play_was_measured_on_the_same_levels_as_its_expert():
    episodes = episodes_of("play_episodes")
    summary = summarize_all(episodes)
    assert summary == record("play_summary")
    assert len(episodes["student"]) >= 500
    assert summary["student"]["solved"] > summary["scripted"]["solved"]
