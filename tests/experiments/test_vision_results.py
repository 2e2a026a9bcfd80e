"""The claims of docs/results/vision.md, from the committed CSV."""

import math
import re
import statistics

import pytest

from experiments.common.figures import read_table
from experiments.vision import batch_norm, commands
from experiments.vision.config import LABEL_NOISE_PRESETS, MEMORIZE_PRESETS
from experiments.vision.cost import format_table, summarize
from tests.experiments.conftest import ROOT

RESULTS = ROOT / "docs" / "results" / "vision"
PAGE = (RESULTS.parent / "vision.md").read_text()
DRAWINGS = {
    **{(name, ""): draw for name, draw in commands.DRAWINGS.items()},
    (batch_norm.NAME, ""): batch_norm.draw,
    ("figure8", "gpu"): commands.DRAWINGS["figure8"],
}
EXAMPLES, EACH, BATCH = 2000, 200, 80


def table(name):
    return read_table(RESULTS / f"{name}.csv")


def last(rows):
    final = max(row["epoch"] for row in rows)
    return [row for row in rows if row["epoch"] == final]


def chosen(rows, **values):
    return [row for row in rows if all(row[k] == v for k, v in values.items())]


def mean(rows, name):
    return statistics.fmean(row[name] for row in rows)


def assert_shows(cell, value):
    """As a percentage with one decimal; a 5 after it may go either way."""
    number, unit = cell.split(" ")
    assert unit == "%"
    assert abs(float(number) - 100 * value) < 0.05001, cell


def page_rows(title):
    """Cells of the Markdown tables of a section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", section, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


@pytest.mark.parametrize(
    ("name", "title"),
    [("figure8", "Random labels"), ("gpu/figure8", "Wider, on a GPU")],
)
def test_table_of_thresholds_is_of_the_committed_runs(name, title):
    rows = table(name)
    cells = {c[0].split(" ")[0]: c[1:] for c in page_rows(title) if len(c) == 4}
    for threshold in {row["threshold"] for row in rows}:
        random, true = (
            chosen(rows, labels=labels, threshold=threshold)
            for labels in ("random", "true")
        )
        shown = cells[f"{threshold:g}"]
        assert_shows(shown[0], mean(random, "train_accuracy"))
        assert_shows(shown[1], mean(true, "train_accuracy"))
        assert_shows(shown[2], mean(true, "test_accuracy"))


def test_table_of_wrong_labels_is_of_the_committed_runs():
    rows, cells = table("figure9"), page_rows("Wrong labels")
    parts = ("mislabelled_given", "mislabelled_true", "correct", "test")
    for method, title in (("baseline", "averaging"), ("and_mask", "AND-mask, 0.2")):
        for rate in (5e-4, 1e-3, 5e-3):
            runs = chosen(rows, method=method, learning_rate=rate)
            [shown] = [c for c in cells if c[:2] == [title, f"{rate:g}"]]
            for cell, part in zip(shown[2:6], parts, strict=True):
                assert_shows(cell, mean(last(runs), f"{part}_accuracy"))
            best = [
                max(row["test_accuracy"] for row in chosen(runs, seed=seed))
                for seed in range(3)
            ]
            assert_shows(shown[6], statistics.fmean(best))


def test_table_of_costs_is_of_the_committed_rounds():
    assert format_table(summarize(table("cost"))) in PAGE


def test_table_of_batch_norm_is_of_the_committed_comparison():
    rows = [{**row, "epoch": int(row["epoch"])} for row in table("batch_norm")]
    shown = [r for r in rows if r["epoch"] != 2 and r["threshold"] in (0.1, 0.2, 0.4)]
    assert batch_norm.format_table(shown) in PAGE
    assert max(row["mean_difference"] for row in rows) < 6e-5


def test_runs_are_all_that_the_commands_make():
    names = {
        "figure16": [
            ("true" if c.redrawn == 0 else "random", c.threshold, c.seed)
            for c in MEMORIZE_PRESETS["cpu"].train_configs()
        ],
        "figure9": [
            (c.threshold, c.learning_rate, c.seed)
            for c in LABEL_NOISE_PRESETS["cpu"].train_configs()
        ],
    }
    columns = {
        "figure16": ("labels", "threshold", "seed"),
        "figure9": ("threshold", "learning_rate", "seed"),
    }
    for name, runs in names.items():
        found = [tuple(row[c] for c in columns[name]) for row in table(name)]
        assert found == [run for run in runs for _ in range(40)]
    for folder in (RESULTS, RESULTS / "gpu"):
        final, curves = (
            (folder / f"figure{number}.csv").read_text().splitlines()
            for number in (8, 16)
        )
        # After a header and at every 40th epoch.
        assert final == [curves[0], *curves[40::40]]


def test_averaging_memorises_random_labels_and_the_mask_does_not():
    rows = chosen(table("figure8"), labels="random")
    assert all(r["train_accuracy"] >= 0.95 for r in chosen(rows, threshold=0.0))
    assert all(r["train_accuracy"] < 0.25 for r in rows if r["threshold"] >= 0.2)
    true = chosen(table("figure8"), labels="true")
    small = [mean(chosen(true, threshold=t), "test_accuracy") for t in (0, 0.05, 0.2)]
    assert max(small) - min(small) < 0.03


def test_the_mask_mostly_ends_below_chance_on_wrong_labels_and_above_on_the_test_set():
    rows = last(table("figure9"))
    learnt = sorted(
        r["mislabelled_given_accuracy"] for r in chosen(rows, method="and_mask")
    )
    assert len(learnt) == 9
    assert learnt[7] < 0.1 < learnt[8] < 0.132
    for rate in (5e-4, 1e-3, 5e-3):
        averaged, masked = (
            chosen(rows, method=method, learning_rate=rate)
            for method in ("baseline", "and_mask")
        )
        assert all(row["mislabelled_given_accuracy"] == 1 for row in averaged)
        assert mean(masked, "mislabelled_given_accuracy") < 0.1
        gain = mean(masked, "test_accuracy") - mean(averaged, "test_accuracy")
        assert 0.033 < gain < 0.0481


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_head_is_masked_by_the_number_of_examples_of_a_class(threshold):
    """As many of a batch's examples are of the class as agreement leaves room for."""
    most = round(BATCH * (1 - threshold) / 2)
    ways = sum(
        math.comb(EACH, n) * math.comb(EXAMPLES - EACH, BATCH - n)
        for n in range(most + 1)
    )
    share = ways / math.comb(EXAMPLES, BATCH)
    for labels in ("random", "true"):
        rows = chosen(table("figure16"), labels=labels, threshold=threshold)
        assert mean(rows, "kept_head") == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("name", "folder"), DRAWINGS)
def test_committed_tables_draw_their_figures(name, folder, tmp_path):
    source = RESULTS / folder
    assert (source / f"{name}.png").stat().st_size > 10_000
    figure = DRAWINGS[name, folder](read_table(source / f"{name}.csv"))
    figure.savefig(tmp_path / "f.png")


def test_committed_results_are_small():
    for path in RESULTS.rglob("*"):
        assert path.stat().st_size < 1_000_000, path
