"""`python -m experiments.theory`: every subcommand, from flags to CSV and PNG."""

import csv
import json
import math
import pathlib
import subprocess
import sys

import pytest
from matplotlib.image import imread

from experiments.common.cli import main
from experiments.common.run_dir import RunDir
from experiments.theory import commands
from experiments.theory.__main__ import COMMANDS, FIGURES
from experiments.theory.noise import ESTIMATES

TINY = ("--preset", "smoke")
RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results"


def theory(*arguments):
    return main("python -m experiments.theory", COMMANDS, list(map(str, arguments)))


def read(path, name):
    """Rows of NAME.csv and the summary; NAME.png is a picture."""
    assert imread(path / f"{name}.png").shape[0] > 500
    summary = json.loads((path / "summary.json").read_text())
    return read_table(path / f"{name}.csv"), summary


def read_table(file):
    """Rows of a CSV; what reads as a number is one."""
    return [
        {k: float(v) if _is_number(v) else v for k, v in row.items()}
        for row in csv.DictReader(file.read_text().splitlines())
    ]


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def landscapes(tmp_path_factory):
    """Directory of `figure 1`."""
    path = tmp_path_factory.mktemp("landscapes") / "run"
    assert theory("figure", 1, *TINY, "--out", path) == 0
    return path


def test_figure_1_has_both_descents_and_both_minima(landscapes):
    rows, summary = read(landscapes, "figure1")
    starts = {(row["method"], row["start"]) for row in rows}
    assert len(starts) == 2 * 4
    for method in ("erm", "and_mask"):
        places = ("consistent", "patchwork", "neither")
        assert sum(summary[f"{method}_to_{place}"] for place in places) == 4
    for kind in ("quadratic", "searched"):
        consistent = summary[f"consistent_inconsistency_{kind}"]
        patchwork = summary[f"patchwork_inconsistency_{kind}"]
        assert patchwork > 3 * consistent


@pytest.mark.parametrize("number", [3, 12])
def test_figure_3_and_12_have_the_geometric_mean_between(number, tmp_path):
    assert theory("figure", number, *TINY, "--out", tmp_path / "run") == 0
    rows, summary = read(tmp_path / "run", "figure3")
    matrices = {(row["case"], row["matrix"]): row for row in rows}
    assert len(matrices) == 8
    for case in ("Same axes", "B turned by 50°"):
        a, b, arithmetic, geometric = (
            matrices[case, name]["determinant"]
            for name in ("A", "B", "arithmetic mean", "geometric mean")
        )
        assert geometric == pytest.approx(math.sqrt(a * b), rel=1e-4)
        assert arithmetic > geometric
    same = matrices["Same axes", "geometric mean"]
    assert same["h11"] == pytest.approx(math.sqrt(0.5 * 4), rel=1e-4)
    assert same["h12"] == pytest.approx(0, abs=1e-5)
    assert summary["Same axes, inconsistency"] == pytest.approx(8, rel=1e-4)


def test_figure_4_is_within_three_standard_errors_and_below_the_bound(tmp_path):
    assert theory("figure", 4, *TINY, "--out", tmp_path / "run") == 0
    rows, summary = read(tmp_path / "run", "figure4")
    assert [row["num_envs"] for row in rows] == [10, 20]
    for row in rows:
        for name, exact in (("average", "average"), ("conditional", "masked")):
            gap = abs(row[name] - row[f"{exact}_exact"])
            assert gap <= 3 * row[f"{name}_std_error"]
        assert row["bound"] > row["masked_exact"]
    assert summary["largest_masked_error"] <= 3
    assert summary["bound_above_exact"]
    assert summary["bound_above_simulated"]


def test_figure_10_ruins_b_alone(tmp_path):
    assert theory("figure", 10, *TINY, "--out", tmp_path / "run") == 0
    rows, summary = read(tmp_path / "run", "figure10")
    losses_a = [row["loss_a"] for row in rows]
    assert max(losses_a) - min(losses_a) < 1e-8
    assert summary["loss_at_ruined"][1] > 1
    # The line ends at -1, where B's loss is larger than at -0.5.
    assert summary["inconsistency_on_line"] > 1
    assert summary["inconsistency_searched"] > 0.1


def test_figure_11_shows_where_the_papers_bound_fails(tmp_path):
    path = tmp_path / "run"
    assert theory("figure", 11, *TINY, "--ratios", 1, 5, "--out", path) == 0
    rows, _ = read(path, "figure11")
    found = {(row["axes"], row["ratio"]): row for row in rows}
    for (axes, ratio), row in found.items():
        assert row["inconsistency"] == pytest.approx(ratio, rel=1e-4)
        per_axis = (ratio + 2 + 1 / ratio) / 4
        assert row["paper_bound"] == pytest.approx(2 * per_axis**axes, rel=1e-4)
        assert row["bound"] >= row["inconsistency"]
    assert found[2, 5]["paper_bound"] > 5 > found[1, 5]["paper_bound"]


def test_regression_has_every_method_and_seed(tmp_path):
    path = tmp_path / "run"
    assert theory("regression", *TINY, "--train-envs", 2, "--out", path) == 0
    rows, summary = read(path, "regression")
    assert {row["seed"] for row in rows} == {0, 1}
    assert rows[-1]["step"] == 50
    last = [r for r in rows if r["method"] == "erm" and r["step"] == 50]
    mean = sum(row["weight5"] for row in last) / 2
    assert summary["erm_mean_weights"][4] == pytest.approx(mean, rel=1e-5)
    assert summary["erm_test_loss"] > 0.1


def test_descent_stays_below_the_bound(tmp_path):
    path = tmp_path / "run"
    assert theory("descent", *TINY, "--out", path) == 0
    rows, _ = read(path, "descent")
    assert {row["threshold"] for row in rows} == {0, 1}
    assert all(row["least_squared_norm"] <= row["bound"] for row in rows)


def test_committed_results_hold_what_their_page_says():
    results = RESULTS / "theory"
    rows = read_table(results / "figure4.csv")
    assert [row["num_envs"] for row in rows] == list(range(10, 301, 10))
    for row in rows:
        for name, exact in ESTIMATES.items():
            assert abs(row[name] - row[exact]) <= 3 * row[f"{name}_std_error"]
        assert row["bound"] > max(row["masked_exact"], row["masked"])
    for row in read_table(results / "descent.csv"):
        assert 9 * row["least_squared_norm"] < row["bound"]
    for name, examples in (("regression", 4), ("regression2", 2)):
        for row in read_table(results / f"{name}.csv"):
            if row["step"] == 1000 and row["method"] == "erm":
                seen = [row[f"weight{i + 1}"] for i in range(examples)]
                assert seen == pytest.approx([1 / 3] * examples, abs=0.05)
            elif row["step"] == 1000:
                own = [row[f"weight{i + 1}"] for i in range(4)]
                assert own == pytest.approx([0] * 4, abs=0.05)
                assert row["weight5"] == pytest.approx(3, abs=0.05)
    pictures = list(results.glob("*.png"))
    assert {p.with_suffix(".csv") for p in pictures} == set(results.glob("*.csv"))
    assert all(p.stat().st_size < 300_000 for p in pictures)


REGRESSION_LABELS = {
    "erm": "averaging",
    "and_mask": "AND-mask",
    "geometric_mean": "geometric mean",
}


def last_weight(summary, method):
    """Mean, lowest and highest over the seeds."""
    return [
        summary[f"{method}_{of}_weights"][4] for of in ("mean", "lowest", "highest")
    ]


def test_committed_summaries_hold_the_tables_of_the_regression():
    page = (RESULTS / "theory.md").read_text().replace("\N{MINUS SIGN}", "-")
    summaries = {
        path.stem: json.loads(path.read_text())
        for path in (RESULTS / "theory" / "regression").glob("*.json")
    }
    rows = []
    for method, label in REGRESSION_LABELS.items():
        summary = summaries["seeds"]
        own = (
            min(summary[f"{method}_lowest_weights"][:4]),
            max(summary[f"{method}_highest_weights"][:4]),
        )
        mean, *ends = [f"{value:.3f}" for value in last_weight(summary, method)]
        rows.append([label, f"{own[0]:.3f} to {own[1]:.3f}", mean, *ends])
    for name, label in (
        ("seeds", "none"),
        ("noise_0.001", "± 0.001, one draw"),
        ("noise_0.01", "± 0.01, one draw"),
        ("fresh_noise_0.001", "± 0.001, drawn at every step"),
        ("fresh_noise_0.01", "± 0.01, drawn at every step"),
    ):
        cells = [
            "{:.2f} ({:.2f})".format(*last_weight(summaries[name], method)[:2])
            for method in ("and_mask", "geometric_mean")
        ]
        rows.append([label, *cells])
    for method in ("and_mask", "geometric_mean"):
        losses = [
            f"{summaries['train_envs_2'][f'{method}_{part}_loss']:.4f}"
            for part in ("train", "test")
        ]
        rows.append([REGRESSION_LABELS[method], *losses])
    for cells in rows:
        assert f"| {' | '.join(cells)} |" in page


def test_figure_finished_is_not_made_again(landscapes, monkeypatch, capsys):
    monkeypatch.setattr(commands.surfaces, "descend", None)
    before = {p: p.stat().st_mtime_ns for p in landscapes.iterdir()}
    assert theory("figure", 1, *TINY, "--out", landscapes) == 0
    assert "finished; --overwrite runs it again" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in landscapes.iterdir()} == before


def test_figure_of_another_config_is_refused(landscapes, capsys):
    assert theory("figure", 1, *TINY, "--angle", 30, "--out", landscapes) == 2
    assert "angle: 20.0 there, 30.0 asked for" in capsys.readouterr().err


def test_figure_of_another_number_is_refused(landscapes, capsys):
    assert theory("figure", 4, *TINY, "--out", landscapes) == 2
    assert "holds a run of theory figure1" in capsys.readouterr().err


def test_wrong_value_exits_2_before_anything(tmp_path, capsys):
    path = tmp_path / "run"
    assert theory("figure", 4, *TINY, "--threshold", 2, "--out", path) == 2
    assert "threshold must be in [0, 1], got 2.0" in capsys.readouterr().err
    assert not path.exists()


def test_overwrite_discards_the_table_and_the_figure(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with RunDir(path, "theory descent", {}) as run:
        run.write_metrics([{"from": "an older version"}], "descent.csv")
        (path / "descent.png").write_bytes(b"old")
        run.finish({})

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.smooth, "make_problem", stop)
    assert theory("descent", *TINY, "--out", path, "--overwrite") == 130
    assert not list(path.glob("descent.*"))


def test_help_does_not_wait_for_jax_or_matplotlib():
    code = (
        "import sys; import experiments.theory.__main__; "
        "print([m for m in ('jax', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
    assert set(FIGURES) == {"1", "3", "4", "10", "11", "12"}
