import dataclasses
import math

import pytest

from experiments.common.cli import WorkerOptions
from experiments.synthetic.config import (
    METHODS,
    PRESETS,
    CompareConfig,
    CorrelationsConfig,
    RerunConfig,
    SearchConfig,
    SelectedConfig,
    TrainConfig,
)

INVALID = [
    ("num_envs", 0, "at least 1"),
    ("examples_per_env", 0, "at least 1"),
    ("shortcut_dims", -1, "at least 1"),
    ("shortcut_std", -0.1, "non-negative and finite"),
    ("revolutions", 0.0, "positive and finite"),
    ("hidden_units", 0, "at least 1"),
    ("hidden_layers", 0, "at least 1"),
    ("epochs", -5, "at least 1"),
    ("batch_size", 0, "at least 1"),
    ("batch_size", 1025, "at most examples_per_env (1024)"),
    ("optimizer", "lion", "one of adam, sgd"),
    ("learning_rate", 0.0, "positive and finite"),
    ("learning_rate", math.nan, "positive and finite"),
    ("schedule", "linear", "one of step, cosine, constant"),
    ("b1", 1.0, "in [0, 1)"),
    ("b2", -0.1, "in [0, 1)"),
    ("eps", -1e-8, "non-negative and finite"),
    ("threshold", 1.5, "in [0, 1]"),
    ("threshold", -0.1, "in [0, 1]"),
    ("threshold", math.nan, "in [0, 1]"),
    ("max_rescale", 0.5, "at least 1, or None"),
    ("l2", -1e-3, "non-negative and finite"),
    ("l1", math.inf, "non-negative and finite"),
    ("weight_decay", math.nan, "non-negative and finite"),
    ("oracle", "loop", "one of fused, scan, vmap"),
    ("microbatch_size", 0, "at least 1"),
    ("microbatch_size", 3, "a divisor of num_envs (16)"),
    ("checkpoint_every", 0, "at least 1"),
    ("method", "magic", f"one of {', '.join(METHODS)}"),
    ("dropout", 1.0, "in [0, 1)"),
    ("sharpness", 0.0, "positive and finite"),
    ("penalty_weight", -1.0, "non-negative and finite"),
    ("penalty_annealing", -1, "non-negative and finite"),
    ("reversal_scale", math.inf, "non-negative and finite"),
    ("dro_step_size", math.nan, "non-negative and finite"),
    ("cagrad_c", -0.1, "non-negative and finite"),
    ("fairgrad_alpha", 0.0, "positive and finite"),
    ("grad_vac_beta", 1.5, "in [0, 1]"),
    ("max_norm", math.nan, "positive and finite"),
    ("seed", -1, "between 0 and 2**32 - 1"),
    ("seed", 2**32, "between 0 and 2**32 - 1"),
]


@pytest.mark.parametrize(("field", "value", "rule"), INVALID)
def test_train_config_invalid_value_names_field_rule_and_value(field, value, rule):
    with pytest.raises(ValueError, match=field) as error:
        TrainConfig(**{field: value})
    assert str(error.value) == f"{field} must be {rule}, got {value!r}"


def test_train_config_max_rescale_without_rescale_is_refused():
    assert TrainConfig(rescale=True, max_rescale=2.0).max_rescale == 2.0
    with pytest.raises(ValueError, match=r"max_rescale needs rescale=True, got 2\.0"):
        TrainConfig(max_rescale=2.0)


def test_configs_with_a_mask_that_never_opens_are_refused():
    refusal = "threshold must be below 1 for sand_mask.*got 1.0"
    for make in (
        lambda: TrainConfig(method="sand_mask"),
        lambda: RerunConfig(method="sand_mask"),
        lambda: CompareConfig(methods=("erm", "sand_mask")),
    ):
        with pytest.raises(ValueError, match=refusal):
            make()
    assert TrainConfig(method="sand_mask", threshold=0.9).threshold == 0.9


def test_configs_with_a_scan_that_gives_no_inner_products_are_refused():
    refusal = "oracle must be fused or vmap for upgrad, .*inner products.*got 'scan'"
    for make in (
        lambda: TrainConfig(method="upgrad", oracle="scan"),
        lambda: RerunConfig(method="upgrad", oracle="scan"),
        lambda: CompareConfig(methods=("erm", "upgrad"), oracle="scan"),
    ):
        with pytest.raises(ValueError, match=refusal):
            make()
    assert TrainConfig(method="majority_sign", oracle="scan").oracle == "scan"


def test_train_config_batch_norm_needs_all_environments_at_once():
    with pytest.raises(ValueError, match="use oracle=fused or vmap, got scan"):
        TrainConfig(batch_norm=True, oracle="scan")


@pytest.mark.parametrize(
    ("cls", "field", "value", "rule"),
    [
        (SearchConfig, "trials", 0, "at least 1"),
        (SearchConfig, "method", "magic", "one of erm"),
        (SearchConfig, "rule", "test", "one of training, held_out, oracle"),
        (SearchConfig, "space", "huge", "one of paper, wide, small, smoke"),
        (SearchConfig, "sampler", "grid", "one of tpe, univariate_tpe, random"),
        (SearchConfig, "stop", "train", "one of fitted, held_out, test, never"),
        (SearchConfig, "patience", 0, "at least 1"),
        (SearchConfig, "search_seed", -1, "between 0 and 2**32 - 1"),
        (SelectedConfig, "methods", (), "one or more different methods"),
        (SelectedConfig, "many", ("magic",), "one of erm"),
        (SelectedConfig, "rule", "test", "one of training, held_out, oracle"),
        (SelectedConfig, "seeds", (2, 1), "in ascending order"),
        (SelectedConfig, "reruns", ("seeds.csv",), "given as LABEL=FILE"),
        (SelectedConfig, "many_seeds", (2, 1), "in ascending order"),
        (CorrelationsConfig, "logit_scale", 0.0, "positive and finite"),
        (CorrelationsConfig, "seeds", (2, 1), "in ascending order"),
    ],
)
def test_configs_of_searches_and_figures_name_field_and_rule(cls, field, value, rule):
    with pytest.raises(ValueError, match="must be") as error:
        cls(**{field: value})
    assert rule in str(error.value)


@pytest.mark.parametrize(
    ("methods", "rule"),
    [
        ((), "one or more different methods"),
        (("erm", "erm"), "one or more different methods"),
        (("erm", "magic"), f"one of {', '.join(METHODS)}"),
    ],
)
def test_compare_config_invalid_methods_are_refused(methods, rule):
    with pytest.raises(ValueError, match="methods must be") as error:
        CompareConfig(methods=methods)
    assert rule in str(error.value)


@pytest.mark.parametrize("seeds", [(3, 1), (-1, 2), (0, 2**32)])
def test_rerun_config_invalid_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match="seeds must be"):
        RerunConfig(seeds=seeds)


def test_rerun_options_no_workers_is_refused():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        WorkerOptions(workers=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_for_every_subcommand(preset):
    for cls in (TrainConfig, CompareConfig, RerunConfig):
        assert (
            dataclasses.asdict(cls(**PRESETS[preset])).items()
            >= PRESETS[preset].items()
        )


def test_presets_cpu_and_paper_have_the_documented_sizes():
    cpu, paper = TrainConfig(**PRESETS["cpu"]), TrainConfig(**PRESETS["paper"])
    assert (cpu.num_envs, cpu.examples_per_env, cpu.shortcut_dims) == (16, 1024, 16)
    assert (paper.num_envs, paper.examples_per_env, paper.shortcut_dims) == (
        32,
        1280,
        32,
    )


def test_compare_and_rerun_train_exactly_what_train_does():
    settings = {**PRESETS["smoke"], "threshold": 0.75}
    train = TrainConfig(**settings, method="geometric_mean", seed=4)
    assert CompareConfig(**settings, seed=4).train_config("geometric_mean") == train
    rerun = RerunConfig(**settings, method="geometric_mean", seeds=(3, 5))
    assert [c.seed for c in rerun.train_configs()] == [3, 4, 5]
    assert rerun.train_configs()[1] == train
