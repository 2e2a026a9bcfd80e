"""The commands of the vision experiment, on tiny generated images."""

import json
import math

import jax.numpy as jnp
import pytest
from matplotlib.image import imread

from experiments.common.cli import main
from experiments.vision.__main__ import COMMANDS
from experiments.vision.batch_norm import compare_masks
from experiments.vision.config import (
    BATCH_NORM_PRESETS,
    COST_PRESETS,
    LABEL_NOISE_PRESETS,
    MEMORIZE_PRESETS,
    BatchNormConfig,
    CostConfig,
    LabelNoiseConfig,
    MemorizeConfig,
    Settings,
    TrainConfig,
)
from experiments.vision.cost import LABELS
from experiments.vision.cost import summarize as summarize_cost
from experiments.vision.training import METRICS
from hardvary import GradStats
from tests.experiments.conftest import read_csv


def vision(*arguments):
    """Runs a command in this process; returns its exit code."""
    return main("python -m experiments.vision", COMMANDS, list(map(str, arguments)))


@pytest.fixture(scope="module")
def memorized(tmp_path_factory):
    path = tmp_path_factory.mktemp("memorize") / "run"
    assert vision("memorize", "--preset", "smoke", "--out", path) == 0
    return path


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    path = tmp_path_factory.mktemp("label-noise") / "run"
    assert vision("label-noise", "--preset", "smoke", "--out", path) == 0
    return path


def test_memorize_smoke_writes_runs_tables_and_figures(memorized):
    config = MEMORIZE_PRESETS["smoke"]
    runs = config.train_configs()
    assert len(runs) == 4
    for run in runs:
        rows = read_csv(memorized / run.name / "metrics.csv")
        assert len(rows) == run.epochs
        assert list(rows[0]) == ["epoch", *METRICS]
    final = read_csv(memorized / "figure8.csv")
    assert [(r["labels"], float(r["threshold"])) for r in final] == [
        ("random", 0.0),
        ("random", 0.2),
        ("true", 0.0),
        ("true", 0.2),
    ]
    curves = read_csv(memorized / "figure16.csv")
    assert len(curves) == 4 * config.epochs
    for name in ("figure8.png", "figure16.png"):
        assert imread(memorized / name).std() > 0.01
    summary = json.loads((memorized / "summary.json").read_text())
    assert [run["kept_fraction"] for run in summary["runs"]][::2] == [1.0, 1.0]


def test_label_noise_smoke_writes_runs_table_and_figure(noisy):
    rows = read_csv(noisy / "figure9.csv")
    assert len(rows) == 2 * 2 * LABEL_NOISE_PRESETS["smoke"].epochs
    assert {row["method"] for row in rows} == {"baseline", "and_mask"}
    assert all(0 <= float(row["mislabelled_given_accuracy"]) <= 1 for row in rows)
    assert {float(row["learning_rate"]) for row in rows} == {1e-3}
    assert imread(noisy / "figure9.png").std() > 0.01


def test_batch_norm_smoke_writes_table_and_figure(tmp_path, capsys):
    assert vision("batch-norm", "--preset", "smoke", "--out", tmp_path / "run") == 0
    config = BATCH_NORM_PRESETS["smoke"]
    rows = read_csv(tmp_path / "run" / "batch_norm.csv")
    places = [(int(row["epoch"]), float(row["threshold"])) for row in rows]
    assert places == [(e, t) for e in config.looks for t in config.thresholds]
    for row in rows:
        assert float(row["mean_difference"]) < 1e-4
        assert 0 < float(row["overlap"]) < 1
        assert -1 <= float(row["cosine"]) < 0.999
    # A mask at a higher threshold is part of that at a lower one.
    for kept in ("kept_path", "kept_coupled", "kept_group"):
        assert float(rows[0][kept]) >= float(rows[1][kept])
    assert imread(tmp_path / "run" / "batch_norm.png").std() > 0.01
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    ways = ["plain", "path", "coupled", "group"]
    assert sorted(summary["median_seconds"]) == sorted(ways)
    again = ("batch-norm", "--from", tmp_path / "run", "--out", tmp_path)
    assert vision(*again) == 0
    first, second = (path / "batch_norm.png" for path in (tmp_path / "run", tmp_path))
    assert first.read_bytes() == second.read_bytes()


def test_compare_masks_counts_what_passes():
    def stats(votes):
        mean = jnp.array([3.0, 4.0, 1.0, 2.0])
        return {"w": GradStats(mean, jnp.array(votes), num_envs=jnp.float32(10))}

    path, coupled = stats([10.0, -6.0, 0.0, 2.0]), stats([8.0, 0.0, 2.0, 6.0])
    result = compare_masks(path, coupled, 0.5)
    # path keeps components 0 and 1, coupled 0 and 3.
    assert (result["kept_path"], result["kept_coupled"]) == (0.5, 0.5)
    assert result["overlap"] == pytest.approx(1 / 3)
    assert result["cosine"] == pytest.approx(9 / (5 * math.sqrt(13)))
    nothing = compare_masks(stats([0.0] * 4), stats([0.0] * 4), 0.5)
    assert math.isnan(nothing["overlap"])
    assert math.isnan(nothing["cosine"])


def test_cost_smoke_times_every_round(tmp_path, capsys):
    assert vision("cost", "--preset", "smoke", "--out", tmp_path) == 0
    rows = read_csv(tmp_path / "cost.csv")
    assert len(rows) == COST_PRESETS["smoke"].rounds
    assert all(float(row[name]) > 0 for row in rows for name in LABELS)
    printed = capsys.readouterr().out
    assert all(label in printed for label in LABELS.values())


def test_summarize_cost_compares_medians_with_and_without_evaluation():
    row = dict.fromkeys(LABELS, 2.0) | {"masked": 3.0, "evaluation": 1.0}
    outlier = dict.fromkeys(LABELS, 50.0)
    summary = summarize_cost([row, outlier, row])
    assert summary["epoch_over_plain"] == {"masked": 1.5, "group_masked": 1.0}
    assert summary["steps_over_plain"] == {"masked": 2.0, "group_masked": 1.0}


def test_finished_command_trains_nothing_again(memorized, capsys):
    modified = (memorized / "figure8.csv").stat().st_mtime_ns
    assert vision("memorize", "--preset", "smoke", "--out", memorized) == 0
    assert "finished; --overwrite runs it again" in capsys.readouterr().out
    assert (memorized / "figure8.csv").stat().st_mtime_ns == modified


@pytest.mark.parametrize("number", [8, 9, 16])
def test_figure_of_the_same_runs_is_the_commands(memorized, noisy, number, capsys):
    run = noisy if number == 9 else memorized
    assert vision("figure", number, "--preset", "smoke", "--out", run) == 0
    assert f"Figure: {run / f'figure{number}.png'}" in capsys.readouterr().out


def test_memorize_coupled_gradients_and_decoupled_decay_train(tmp_path):
    chosen = ("--batch-norm", "coupled", "--decay-order", "decoupled")
    fewer = ("--thresholds", 0.2, "--labels", "random", "--epochs", 1)
    sizes = ("--train-examples", 20, "--batch-size", 10, "--microbatch-size", 5)
    arguments = ("--preset", "smoke", "--out", tmp_path, *chosen, *fewer, *sizes)
    assert vision("memorize", *arguments) == 0
    [row] = read_csv(tmp_path / "figure8.csv")
    assert 0 < float(row["kept_fraction"]) < 1


@pytest.mark.parametrize("number", [8, 9, 16])
def test_figure_from_tables_draws_the_same_again(memorized, noisy, tmp_path, number):
    source = noisy if number == 9 else memorized
    assert vision("figure", number, "--from", source, "--out", tmp_path) == 0
    name = f"figure{number}.png"
    assert (tmp_path / name).read_bytes() == (source / name).read_bytes()


def test_figure_from_a_directory_without_it_is_refused(tmp_path, capsys):
    assert vision("figure", "9", "--from", tmp_path) == 2
    assert "figure9.csv is not there" in capsys.readouterr().err


def test_memorize_without_data_says_how_to_get_them(tmp_path, capsys):
    arguments = (
        "--dataset",
        "cifar10",
        "--data-dir",
        tmp_path,
        "--out",
        tmp_path / "r",
    )
    assert vision("memorize", "--preset", "smoke", *arguments) == 2
    assert "holds neither cifar-10-python.tar.gz nor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["memorize"], "--data-dir is not read: the dataset 'generated' is made anew"),
        (["batch-norm"], "--data-dir is not read: the dataset 'generated'"),
        (["cost"], "--data-dir is not read: the dataset 'generated'"),
        (["figure", "8"], "--data-dir is not read: the dataset 'generated'"),
        (["memorize", "--from", "there"], "data_dir is not read with --from"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_data_dir_that_is_not_read_is_refused(command, message, tmp_path, capsys):
    arguments = ("--data-dir", tmp_path, "--out", tmp_path / "run")
    assert vision(*command, "--preset", "smoke", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_paper_presets_are_the_papers_settings():
    memorize, noise = MEMORIZE_PRESETS["paper"], LABEL_NOISE_PRESETS["paper"]
    for config in (memorize, noise):
        assert (config.dataset, config.width, config.batch_size) == ("cifar10", 64, 80)
        assert (config.epochs, config.weight_decay, config.rescale) == (80, 1e-6, True)
        assert (config.norm, config.decay_order) == ("batch", "coupled")
    assert memorize.drops == (40, 60)
    assert noise.drops == (60,)
    assert noise.learning_rates == (5e-4, 1e-3, 5e-3)
    assert len(memorize.train_configs()) == 7 * 2 * 2
    assert len(noise.train_configs()) == 2 * 3 * 3


@pytest.mark.parametrize("presets", [MEMORIZE_PRESETS, LABEL_NOISE_PRESETS])
@pytest.mark.parametrize("preset", ["smoke", "cpu", "paper"])
def test_train_configs_have_directories_of_their_own(presets, preset):
    names = [config.name for config in presets[preset].train_configs()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (Settings, {"dataset": "svhn"}, "dataset must be one of cifar10, .* 'svhn'"),
        (Settings, {"train_examples": 15}, "train_examples must be a multiple of 10"),
        (Settings, {"train_examples": 50}, "batch_size must be at most train_exam"),
        (Settings, {"drops": (40, 40)}, "drops must be positive and in ascending"),
        (Settings, {"width": 0}, "width must be at least 1, got 0"),
        (Settings, {"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        (Settings, {"weight_decay": -1.0}, "weight_decay must be non-negative"),
        (Settings, {"microbatch_size": 3}, "microbatch_size must be a divisor of bat"),
        (Settings, {"rescale": False, "max_rescale": 2.0}, "max_rescale needs resca"),
        (TrainConfig, {"redrawn": 1.5}, r"redrawn must be in \[0, 1\], got 1.5"),
        (TrainConfig, {"learning_rate": 0.0}, "learning_rate must be positive"),
        (TrainConfig, {"seed": -1}, "seed must be between 0"),
        (MemorizeConfig, {"thresholds": ()}, "thresholds must be one or more"),
        (MemorizeConfig, {"thresholds": (2.0,)}, r"thresholds must be in \[0, 1\]"),
        (MemorizeConfig, {"labels": ("wrong",)}, "labels must be one of true, random"),
        (MemorizeConfig, {"seeds": (2, 1)}, "seeds must be in ascending order"),
        (LabelNoiseConfig, {"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0"),
        (LabelNoiseConfig, {"threshold": 0.0}, r"threshold must be in \(0, 1\]"),
        (LabelNoiseConfig, {"learning_rates": (1.0, 1.0)}, "learning_rates must be"),
        (BatchNormConfig, {"looks": (0, 81)}, r"looks must be in ascending .* \(80\)"),
        (BatchNormConfig, {"looks": (5, 0)}, "looks must be in ascending order"),
        (BatchNormConfig, {"looks": (0, 1, 2, 3, 4)}, "looks must be at most 4, got"),
        (BatchNormConfig, {"thresholds": (0.0,)}, r"thresholds must be in \(0, 1\]"),
        (BatchNormConfig, {"rounds": 0}, "rounds must be at least 1, got 0"),
        (BatchNormConfig, {"redrawn": 2.0}, r"redrawn must be in \[0, 1\], got 2"),
        (CostConfig, {"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0"),
        (CostConfig, {"rounds": 0}, "rounds must be at least 1, got 0"),
    ],
)
def test_config_invalid_value_is_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
