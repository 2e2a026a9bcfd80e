"""The claims of docs/results/shifts.md, from the committed CSV."""

import json

import pytest

from experiments.common.figures import read_table
from experiments.shifts import commands
from experiments.shifts.commands import format_markdown, format_shifts, summarize
from experiments.shifts.look import format_look_markdown
from tests.experiments.conftest import ROOT

RESULTS = ROOT / "docs" / "results" / "shifts"
PAGE = (RESULTS.parent / "shifts.md").read_text()
TABLES = [path.stem for path in sorted(RESULTS.glob("*.csv")) if "_" not in path.stem]


def table(name):
    return read_table(RESULTS / f"{name}.csv")


@pytest.mark.parametrize("problem", ["example2s", "example3s"])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (6, 7, 8, 9, 10)])
def test_tables_of_scrambled_problems_are_of_the_committed_runs(problem, sizes):
    rows = [row for row in table("linear") if row["num_envs"] in sizes]
    assert format_markdown(rows, problem) in PAGE


def test_table_of_noise_that_differs_is_of_the_committed_runs():
    assert format_markdown(table("linear"), "example1s", "over_oracle") in PAGE


def test_table_with_weight_decay_is_of_the_committed_runs():
    rows = [row for row in table("decay/linear") if row["num_envs"] > 5]
    assert format_markdown(rows, "example3s") in PAGE


@pytest.mark.parametrize("name", ["linear", "fresh"])
def test_irm_with_weight_decay_is_as_strong_as_published_to_its_interval(name):
    (row,) = [
        row
        for row in table(f"decay/{name}")
        if (row["problem"], row["num_envs"], row["method"]) == ("example3s", 10, "irm")
    ]
    assert row["low"] <= 0.014
    assert f"{row['error']:.4f}"[1:] in PAGE


def test_weight_decay_was_chosen_by_the_least_error_of_all_trials():
    path = RESULTS / "decay" / "linear_chosen.json"
    chosen = json.loads(path.read_text())
    trials = table("decay/linear_trials")
    for method, setting in chosen.items():
        own = [row for row in trials if row["method"] == method]
        best = min(own, key=lambda row: row["held_out_share"])
        for name in ("l2", "learning_rate", "number"):
            assert best[name] == setting[name]


def test_table_of_levels_is_of_the_committed_runs():
    assert format_markdown(table("levels"), "levels") in PAGE


def test_table_of_plain_problems_is_of_the_committed_runs():
    assert format_markdown(table("plain/linear"), "example3") in PAGE


@pytest.mark.parametrize("problem", ["spirals", "spirals_rotated"])
def test_tables_of_spirals_are_of_the_committed_runs(problem):
    assert format_markdown(table("spirals"), problem) in PAGE


def test_tables_of_looks_at_gradients_are_of_the_committed_ones():
    page = (ROOT / "docs" / "does_it_help.md").read_text()
    assert format_look_markdown(table("images_look")) in page
    assert format_look_markdown(table("spirals_look")) in PAGE


def test_tables_of_images_are_of_the_committed_runs():
    for value in ("error", "oracle_chosen"):
        assert format_shifts(table("images"), value) in PAGE


def test_masks_win_the_own_shortcut_by_ten_points_and_nothing_else():
    found = {(row["problem"], row["method"]): row for row in table("images")}
    for method in ("and_mask", "sand_mask", "geometric_mean"):
        mask, plain = (found["own_shortcut", m] for m in (method, "averaging"))
        assert mask["error"] < plain["error"] - 0.1
        assert mask["high"] < plain["low"]
        for problem in ("coloured_labels", "rotated", "mixed_labels"):
            mask, plain = (found[problem, m] for m in (method, "averaging"))
            assert mask["high"] > plain["low"]


def test_nothing_whitened_wins_the_own_shortcut_and_all_gain_on_coloured_labels():
    found = {(row["problem"], row["method"]): row for row in table("images")}
    whitened = [row for key, row in found.items() if key[1].endswith("_whitened")]
    assert len(whitened) == 9 * 4
    for row in whitened:
        plain = found[row["problem"], "averaging"]
        if row["problem"] == "own_shortcut":
            assert row["error"] > plain["error"]
        if row["problem"] == "coloured_labels":
            assert row["high"] < plain["low"]


@pytest.mark.parametrize(
    "name", [*TABLES, "plain/linear", "decay/linear", "decay/fresh"]
)
def test_summary_is_of_the_committed_seeds(name):
    found = summarize(table(f"{name}_seeds"))
    for row, kept in zip(found, table(name), strict=True):
        for column, value in kept.items():
            if isinstance(value, str):
                assert row[column] == value
            else:
                assert row[column] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_committed_tables_draw_their_figures(name, tmp_path):
    assert (RESULTS / f"{name}.png").stat().st_size > 10_000
    commands.DRAWINGS[name](table(name)).savefig(tmp_path / "f.png")


def test_settings_were_chosen_for_every_method_that_is_reported():
    for name in TABLES:
        chosen = json.loads((RESULTS / f"{name}_chosen.json").read_text())
        # Where each problem has a choice of its own, METHOD-PROBLEM.
        assert {row["method"] for row in table(name)} <= {
            key.partition("-")[0] for key in chosen
        }


def test_committed_results_are_small():
    for path in RESULTS.rglob("*"):
        assert path.stat().st_size < 1_000_000, path
