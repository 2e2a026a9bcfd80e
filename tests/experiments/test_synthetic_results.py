"""The claims of docs/results/synthetic.md, from the committed CSV."""

import csv
import json
import pathlib
import statistics

import pytest

from experiments.common.figures import read_table
from experiments.common.plots import METHOD_LABELS
from experiments.synthetic.commands import DRAWINGS, selected_settings
from experiments.synthetic.config import (
    OBJECTIVES,
    RULES,
    SEARCHED_METHODS,
    SelectedConfig,
    TrainConfig,
)
from experiments.synthetic.search import select
from tests.experiments.conftest import ROOT

RESULTS = ROOT / "docs" / "results" / "synthetic"


def seeds(name):
    return [row["test_accuracy"] for row in read_table(RESULTS / f"seeds_{name}.csv")]


def mean(rows, name):
    return statistics.fmean(row[name] for row in rows)


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("erm", "averaging (ERM)"),
        ("and_mask", "AND-mask"),
        ("geometric_mean", "geometric mean"),
    ],
)
def test_first_table_is_that_of_its_last_epochs(method, label):
    *_, last = [r for r in read_table(RESULTS / "methods.csv") if r["method"] == method]
    columns = [
        f"{part}_accuracy" for part in ("train", "validation", "held_out", "test")
    ]
    shares = [last[name] for name in (*columns, "kept_fraction")]
    cells = [label, *(f"{share:.1%}".replace("%", " %") for share in shares)]
    assert f"| {' | '.join(cells)} |" in (RESULTS.parent / "synthetic.md").read_text()


@pytest.mark.parametrize("method", OBJECTIVES)
def test_figure_6_baselines_memorise(method):
    rows = [r for r in read_table(RESULTS / "figure6.csv") if r["method"] == method]
    assert all(row["run"] == "" for row in rows)
    assert len(rows) >= 5
    if method != "irm":  # whose penalty keeps some seeds from fitting anything
        assert mean(rows, "train_accuracy") >= 0.97
    assert mean(rows, "test_accuracy") <= 0.6


@pytest.mark.parametrize("size", ["cpu", "paper"])
def test_fifty_seeds_and_mask_solves_at_least_48(size):
    accuracies = seeds(size)
    assert len(accuracies) == 50
    assert sum(accuracy >= 0.98 for accuracy in accuracies) >= 48


@pytest.mark.parametrize(
    ("name", "label", "first"),
    [
        ("demo_erm", "averaging (ERM)", 0),
        ("demo", "AND-mask", 0),
        ("demo_fresh", "AND-mask", 20),
    ],
)
def test_demo_table_is_that_of_its_seeds(name, label, first):
    rows = read_table(RESULTS / f"seeds_{name}.csv")
    assert sorted(row["seed"] for row in rows) == list(range(first, first + 20))
    epochs = [int(row["epochs"]) for row in rows]
    tests = seeds(name)
    cells = [
        f"{label}, {first} to {first + 19}",
        f"{min(epochs)} to {max(epochs)}, {mean(rows, 'epochs'):.0f} on average",
        f"{min(row['train_accuracy'] for row in rows):.1%}",
        *(
            f"{value:.1%}"
            for value in (statistics.fmean(tests), min(tests), max(tests))
        ),
        f"{sum(accuracy >= 0.98 for accuracy in tests)} of 20",
    ]
    page = (RESULTS.parent / "synthetic.md").read_text()
    assert f"| {' | '.join(cells)} |".replace("%", " %") in page


def test_figure_7_mechanism_rises_and_shortcuts_fall():
    rows = read_table(RESULTS / "figure7.csv")

    def at(mask, threshold, name):
        chosen = [r for r in rows if (r["mask"], r["threshold"]) == (mask, threshold)]
        assert len(chosen) == 10
        return mean(chosen, f"{name}_correlation")

    assert 0.3 < at("and", 0.0, "mechanism") < 0.5
    assert at("and", 1.0, "mechanism") > 0.9
    assert at("and", 1.0, "shortcut") < 0.6 < at("and", 0.0, "shortcut")
    for signal in ("mechanism", "shortcut"):
        assert at("xor", 0.125, signal) < at("xor", 1.0, signal)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("figure7", "1, 1.0 (the figure)"),
        ("figure7_three_turns", "3, 1.0 (the training's data)"),
        (
            "figure7_three_turns_narrow",
            "3, 0.316 (the variance of 0.1 that the paper's text may mean)",
        ),
    ],
)
def test_table_of_turns_is_that_of_its_networks(name, label):
    rows = read_table(RESULTS / f"{name}.csv")
    cells = []
    for signal in ("mechanism", "shortcut"):
        chosen = [
            [r for r in rows if r["mask"] == "and" and r["threshold"] == threshold]
            for threshold in (0.0, 0.875)
        ]
        assert [len(some) for some in chosen] == [10, 10]
        means = [mean(some, f"{signal}_correlation") for some in chosen]
        cells.append(", ".join(f"{value:.2f}" for value in means))
    page = (RESULTS.parent / "synthetic.md").read_text()
    assert f"| {label} | {' | '.join(cells)} |" in page


def test_table_of_the_papers_settings_is_that_of_its_seeds():
    page = (RESULTS.parent / "synthetic.md").read_text()
    for row in read_table(RESULTS / "seeds_rescaled.csv"):
        cells = [
            f"{row[f'{part}_accuracy']:.1%}".replace("%", " %")
            for part in ("train", "held_out", "test")
        ]
        assert f"| {row['seed']:.0f} | {' | '.join(cells)} |" in page


def test_figure_15_the_mask_solves_it_where_averaging_is_at_chance():
    rows = [r for r in read_table(RESULTS / "figure15.csv") if r["num_envs"] <= 32]
    masked = [r["test_accuracy"] for r in rows if r["method"] == "and_mask"]
    averaged = [r["test_accuracy"] for r in rows if r["method"] == "erm"]
    assert max(masked) >= 0.95
    assert max(averaged) <= 0.6


@pytest.mark.parametrize("name", DRAWINGS)
def test_committed_tables_draw_their_figures(name, tmp_path):
    assert (RESULTS / f"{name}.png").stat().st_size > 10_000
    DRAWINGS[name](read_table(RESULTS / f"{name}.csv")).savefig(tmp_path / "f.png")


@pytest.mark.parametrize("method", SEARCHED_METHODS)
def test_committed_choices_follow_from_the_committed_trials(method):
    searches = json.loads((RESULTS / "searches.json").read_text())
    summary = searches[method]["summary"]
    trials = (RESULTS / "trials" / f"{method}.csv").read_text()
    rows = [
        {name: _parse(text) for name, text in row.items()}
        for row in csv.DictReader(trials.splitlines())
    ]
    assert len(rows) == summary["trials"] == 16
    for rule in RULES:
        assert select(rows, rule)["number"] == summary["chosen"][rule]["number"]
        config = SelectedConfig(rule=rule, selected=str(RESULTS / "selected"))
        TrainConfig(**selected_settings(config, method, "cpu"))


def _parse(text):
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text or None


def test_committed_results_are_small():
    for path in pathlib.Path(RESULTS).rglob("*"):
        assert path.stat().st_size < 1_000_000, path


@pytest.fixture(scope="module")
def placed():
    """Test accuracies by L2, decoupled decay, threshold and placement, a seed each."""
    runs = {}
    for l2, name in ((1e-7, "placement"), (0.0, "placement_no_l2")):
        made = json.loads((RESULTS / f"{name}.json").read_text())
        assert made["config"]["l2"] == l2
        for row in read_table(RESULTS / f"{name}.csv"):
            key = (l2, row["weight_decay"], row["threshold"], row["placement"])
            runs.setdefault(key, []).append(row["test_accuracy"])
    assert {len(accuracies) for accuracies in runs.values()} == {3}
    return runs


def differences(placed, placement, l2):
    """Mean difference to `gradients` over seeds, and half of its 95 % interval."""
    pairs = zip(
        placed[l2, 0.0, 0.8, placement], placed[l2, 0.0, 0.8, "gradients"], strict=True
    )
    values = [100 * (own - other) for own, other in pairs]
    student = 4.3027  # its 97.5 % quantile at two degrees of freedom
    half = student * statistics.stdev(values) / len(values) ** 0.5
    return [round(statistics.fmean(values), 1), round(half, 1)]


def test_placement_last_fails_and_without_l2_all_do(placed):
    assert differences(placed, "moments", 1e-7) == [0.5, 2.1]
    assert differences(placed, "update", 1e-7) == [-47.7, 3.0]
    assert differences(placed, "moments", 0.0) == [0.3, 3.6]
    assert differences(placed, "update", 0.0) == [-0.1, 3.1]
    for (l2, _, threshold, placement), accuracies in placed.items():
        if threshold == 1 or l2 == 0 or placement == "update":
            assert max(accuracies) < 0.67
    for placement in ("gradients", "moments"):
        assert min(placed[1e-7, 0.0, 0.8, placement]) >= 0.98


def test_placement_on_moments_lets_more_through_and_fits_better():
    runs = {
        (row["placement"], row["seed"]): row
        for row in read_table(RESULTS / "placement.csv")
        if (row["threshold"], row["weight_decay"]) == (0.8, 0)
    }
    for seed in range(3):
        moments, gradients = runs["moments", seed], runs["gradients", seed]
        assert moments["kept_fraction"] > 0.15 > 0.05 > gradients["kept_fraction"]
        assert moments["loss"] < gradients["loss"]


def searched_rules():
    return json.loads((RESULTS / "rules" / "searches.json").read_text())


def row_of_rule(method):
    folder = RESULTS / "rules"
    rows = read_table(folder / f"{method}_seeds.csv")
    assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4]
    tests = [row["test_accuracy"] for row in rows]
    trials = read_table(folder / f"{method}_trials.csv")
    assert len(trials) == 16
    found = searched_rules()[method]
    best = max(r["test_accuracy"] for r in trials if r["test_accuracy"] != "")
    cells = [
        METHOD_LABELS[method],
        f"{found['fitted']}, {found['diverged']}",
        f"{best:.1%}",
        f"{mean(rows, 'train_accuracy'):.1%}",
        f"{mean(rows, 'held_out_accuracy'):.1%}",
        f"**{statistics.fmean(tests):.1%}**",
        f"{min(tests):.1%}",
        f"{max(tests):.1%}",
    ]
    return f"| {' | '.join(cells)} |".replace("%", " %")


def test_table_of_rules_is_that_of_their_searches_and_seeds():
    page = (RESULTS.parent / "synthetic.md").read_text()
    assert len(searched_rules()) == 17
    for method in searched_rules():
        assert row_of_rule(method) in page
