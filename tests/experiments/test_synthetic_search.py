"""The search over settings: spaces, trials, selection, and the command."""

import csv
import dataclasses
import json
import random

import optuna
import pytest

from experiments.common.cli import main
from experiments.synthetic.__main__ import COMMANDS
from experiments.synthetic.config import (
    MASKS,
    METHODS,
    PRESETS,
    RULES,
    SEARCH_PRESETS,
    TrainConfig,
)
from experiments.synthetic.search import (
    OUT_OF_DISTRIBUTION,
    RECORDED,
    SCORES,
    Objective,
    chosen_settings,
    select,
    study_of,
)
from experiments.synthetic.spaces import SPACES, recipe_draws, suggest
from experiments.synthetic.training import METRICS
from tests.experiments.conftest import kill_at_random

SMOKE = SEARCH_PRESETS["smoke"]
# Trials of few epochs: they are here to be killed, resumed and counted.
SHORT = ("--preset", "smoke", "--method", "erm", "--epochs", "2")


def synthetic(*arguments):
    return main("python -m experiments.synthetic", COMMANDS, list(map(str, arguments)))


def read_trials(path):
    return list(csv.DictReader((path / "trials.csv").read_text().splitlines()))


class RandomTrial:
    """Draws uniformly, and remembers the choices."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.choices = {}

    def suggest_categorical(self, name, choices):
        self.choices[name] = choices
        return self.random.choice(choices)


def row(**changes):
    """A finished trial as `table` gives it."""
    metrics = dict.fromkeys(RECORDED, 0.5) | {"validation_loss": 1.0}
    return {"number": 0, "stopped": "", **metrics, **changes}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_suggest_every_draw_is_a_valid_config(method, space):
    config = dataclasses.replace(
        SEARCH_PRESETS["smoke" if space == "smoke" else "paper"],
        method=method,
        space=space,
    )
    for seed in range(30):
        built = Objective(config).train_config(RandomTrial(seed))
        assert built.method == method
        assert built.seed == config.seed
        assert built.weight_decay == 0
        assert not (built.l1 and built.l2)
        assert built.num_envs == config.num_envs


def ranges(method):
    """All choices that any draw from the space of the paper offers."""
    found = {}
    for seed in range(20):
        trial = RandomTrial(seed)
        suggest(trial, method, SPACES["paper"])
        found |= trial.choices
    return found


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("soft_and_mask", {"threshold", "rescale"}),
        ("sand_mask", {"threshold", "rescale", "sharpness"}),
        ("cagrad", {"cagrad_c"}),
        ("fairgrad", {"fairgrad_alpha"}),
        ("grad_vac", {"grad_vac_beta"}),
        ("clip_env_norms", {"max_norm"}),
        ("majority_sign", set()),
        ("mgda", set()),
    ],
)
def test_suggest_draws_for_a_rule_what_erm_has_and_its_own_settings(method, own):
    shared, drawn = ranges("erm"), ranges(method)
    assert drawn.keys() - shared.keys() == own
    assert {name: drawn[name] for name in shared} == shared


def test_suggest_paper_space_has_the_ranges_of_tables_1_and_2():
    table_1 = {
        "hidden_units": (256, 512),
        "hidden_layers": (3, 5),
        "batch_size": (64, 128, 256),
        "optimizer": ("adam", "sgd"),
        "learning_rate": (1e-3, 1e-2, 1e-1),
        "batch_norm": (False, True),
        "dropout": (0.0, 0.5),
        "decay": ("none", "l1", "l2"),
        "l2": (1e-5, 1e-4, 1e-3),
        "l1": (1e-6, 1e-5, 1e-4),
    }
    assert ranges("erm") == table_1
    masks = ranges("and_mask")
    assert masks.pop("rescale") == (False, True)
    assert 1.0 in masks.pop("threshold")
    assert masks == table_1
    without = {"dropout", "decay", "l2", "l1"}
    assert ranges("irm") == {
        **{name: v for name, v in table_1.items() if name not in without},
        "learning_rate": (1e-3, 1e-2, 1e-1, 1.0),
        "penalty_weight": (10.0, 100.0, 1000.0),
        "penalty_annealing": (0, 1, 2, 4, 8),
    }
    assert "hidden_layers" not in ranges("dann")


@pytest.mark.parametrize("method", METHODS)
def test_recipe_draws_are_the_first_trial_where_the_space_has_them(method, tmp_path):
    assert recipe_draws(method, SPACES["paper"]) is None
    draws = recipe_draws(method, SPACES["wide"])
    trial = optuna.trial.FixedTrial(draws)
    settings = suggest(trial, method, SPACES["wide"])
    expected = {"learning_rate": 1e-2, "b2": 0.9, "eps": 1e-15, "batch_size": 128}
    assert settings.items() >= expected.items()
    if method in MASKS:
        assert settings["threshold"] == (0.8 if method == "sand_mask" else 1.0)
    config = dataclasses.replace(SEARCH_PRESETS["cpu"], method=method)
    study = study_of(config, tmp_path, None)
    assert study.first == (recipe_draws(method, SPACES["small"]),)
    assert study.trials == config.trials


@pytest.mark.parametrize("rule", RULES)
def test_select_takes_the_most_accurate_by_the_rule_alone(rule):
    rows = [row(number=i) for i in range(3)]
    rows[1][SCORES[rule]] = 0.9
    for other in RULES:
        if other != rule:
            rows[2][SCORES[other]] = 0.99
    assert select(rows, rule)["number"] == 1


def test_select_of_equals_takes_the_lowest_validation_loss_then_the_first():
    rows = [row(number=i, held_out_accuracy=1.0) for i in range(4)]
    rows[2]["validation_loss"] = 0.5
    rows[3]["validation_loss"] = float("nan")
    assert select(rows, "held_out")["number"] == 2
    rows[2]["validation_loss"] = 1.0
    assert select(rows, "held_out")["number"] == 0
    assert select([rows[3]], "held_out")["number"] == 3


@pytest.mark.parametrize("stop", OUT_OF_DISTRIBUTION)
def test_objective_is_done_once_it_fits_and_looks_only_where_it_is_told(stop):
    objective = Objective(dataclasses.replace(SMOKE, stop=stop))
    values = {"train_accuracy": 0.98, "held_out_accuracy": 1.0, "test_accuracy": 1.0}
    low = values | {OUT_OF_DISTRIBUTION[stop]: 0.59}
    assert not objective.is_done(values)
    assert objective.is_done(low)
    assert not objective.is_done(low | {"train_accuracy": 0.97})
    assert not Objective(dataclasses.replace(SMOKE, stop="never")).is_done(low)
    blind = Objective(dataclasses.replace(SMOKE, stop="fitted"))
    assert blind.is_done({"train_accuracy": 0.98})
    assert not blind.is_done({"train_accuracy": 0.97})


@pytest.mark.parametrize(
    ("changes", "clean"),
    [
        ({"stop": "fitted"}, RULES),
        ({"stop": "never", "sampler": "tpe", "rule": "training"}, RULES),
        ({"stop": "held_out"}, ("held_out", "oracle")),
        ({"sampler": "tpe"}, ("held_out", "oracle")),
        ({"sampler": "univariate_tpe"}, ("held_out", "oracle")),
        ({"stop": "test"}, ("oracle",)),
        ({"stop": "held_out", "sampler": "tpe", "rule": "oracle"}, ("oracle",)),
    ],
    ids=str,
)
def test_clean_rules_have_seen_no_more_than_they_name(changes, clean):
    config = dataclasses.replace(SMOKE, **{"stop": "fitted", **changes})
    assert config.clean_rules == clean


class Recorder(RandomTrial):
    """A trial without a study: what the objective keeps."""

    def __init__(self, seed):
        super().__init__(seed)
        self.user_attrs = {}

    def set_user_attr(self, name, value):
        self.user_attrs[name] = value


@pytest.mark.parametrize(
    ("method", "annealing", "expected"), [("erm", 8, 3), ("irm", 0, 3), ("irm", 4, 7)]
)
def test_objective_trial_that_fits_ends_after_annealing_and_patience(
    method, annealing, expected, monkeypatch
):
    config = dataclasses.replace(SMOKE, method=method, patience=3, epochs=20)
    objective = Objective(config)
    train_config = dataclasses.replace(
        objective.train_config(RandomTrial(0)),
        penalty_annealing=annealing,
        learning_rate=1e-3,  # so that none diverges first
    )
    monkeypatch.setattr(Objective, "train_config", lambda self, trial: train_config)
    monkeypatch.setattr(Objective, "is_done", lambda self, values: True)
    trial = Recorder(0)
    objective(trial)
    assert trial.user_attrs["epochs"] == expected
    assert trial.user_attrs["stopped"] == "fitted"


def test_objective_keeps_its_last_metrics():
    config = dataclasses.replace(SMOKE, stop="never", epochs=50)
    trial = Recorder(0)
    value = Objective(config)(trial)
    assert trial.user_attrs["epochs"] == 50
    assert trial.user_attrs["stopped"] == ""
    assert value == trial.user_attrs["held_out_accuracy"]


def test_chosen_settings_are_those_of_the_chosen_trials():
    config = dataclasses.replace(SMOKE, method="and_mask")
    trial = RandomTrial(0)
    suggest(trial, "and_mask", SPACES["smoke"])
    draws = {name: choices[0] for name, choices in trial.choices.items()}
    draws |= {"decay": "l1", "l1": 1e-6}
    other = draws | {"decay": "l2", "l2": 1e-3, "threshold": 0.6}
    rows = [
        row(number=0, validation_accuracy=0.9, test_accuracy=0.4, **draws),
        row(number=1, held_out_accuracy=0.9, **other),
    ]
    chosen = chosen_settings(config, rows)
    assert chosen["training"]["l1"] == 1e-6
    assert chosen["training"]["l2"] == 0
    assert chosen["held_out"]["l2"] == chosen["oracle"]["l2"] == 1e-3
    assert chosen["held_out"]["threshold"] == 0.6
    for settings in chosen.values():
        TrainConfig(**{**PRESETS["smoke"], **settings})


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Directory of a finished smoke search of four trials."""
    path = tmp_path_factory.mktemp("searched") / "run"
    assert synthetic("search", *SHORT, "--trials", 4, "--out", path) == 0
    return path


def test_search_writes_every_trial_and_what_each_rule_chooses(searched, capsys):
    trials = read_trials(searched)
    assert [int(trial["number"]) for trial in trials] == [0, 1, 2, 3]
    assert set(RECORDED) <= set(trials[0])
    assert set(METRICS) - set(RECORDED) == {"learning_rate"}
    summary = json.loads((searched / "summary.json").read_text())
    selected = json.loads((searched / "selected.json").read_text())
    assert summary["trials"] == 4
    for rule in RULES:
        number = summary["chosen"][rule]["number"]
        best = max(float(trial[SCORES[rule]]) for trial in trials)
        assert float(trials[number][SCORES[rule]]) == best
        rate = float(trials[number]["learning_rate"])
        assert selected[rule]["learning_rate"] == pytest.approx(rate)
    assert synthetic("search", *SHORT, "--trials", 4, "--out", searched) == 0
    assert "held_out" in capsys.readouterr().out


def test_search_same_seed_repeats_its_trials_and_more_continue_them(searched, tmp_path):
    path = tmp_path / "again"
    assert synthetic("search", *SHORT, "--trials", 2, "--out", path) == 0
    assert len(read_trials(path)) == 2
    assert synthetic("search", *SHORT, "--trials", 4, "--out", path) == 0

    def without_times(path):
        return [
            {name: value for name, value in trial.items() if name != "seconds"}
            for trial in read_trials(path)
        ]

    assert without_times(path) == without_times(searched)
    other = tmp_path / "other"
    arguments = ("--trials", 2, "--search-seed", 1, "--out", other)
    assert synthetic("search", *SHORT, *arguments) == 0
    assert without_times(other) != without_times(searched)[:2]


def test_search_finished_refuses_fewer_trials_and_counts_its_sessions(searched, capsys):
    assert synthetic("search", *SHORT, "--trials", 3, "--out", searched) == 2
    assert "has 4 finished trials already" in capsys.readouterr().err
    assert json.loads((searched / "manifest.json").read_text())["sessions"] == 1
    assert "trials" not in json.loads((searched / "config.json").read_text())["config"]


def test_search_settings_reach_train_through_the_settings_flag(searched, tmp_path):
    source = f"{searched / 'selected.json'}:held_out"
    arguments = ("--preset", "smoke", "--settings", source, "--epochs", 2)
    assert synthetic("train", *arguments, "--out", tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    selected = json.loads((searched / "selected.json").read_text())["held_out"]
    assert config.items() >= selected.items()
    assert config["epochs"] == 2
    assert selected["schedule"] == "step"


def test_search_killed_at_random_and_resumed_by_two_workers_has_every_trial_once(
    start, searched, tmp_path
):
    path = tmp_path / "run"
    arguments = ("search", *SHORT, "--trials", 4, "--out", path)
    journal = path / "study.journal"
    assert kill_at_random(lambda: start(*arguments), journal, 3) >= 2
    process = start(*arguments, "--workers", "2")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    trials, expected = read_trials(path), read_trials(searched)
    assert [int(trial["number"]) for trial in trials] == [0, 1, 2, 3]
    # Drawn at random, so the same ones whoever ran them in which order.
    for trial, other in zip(trials, expected, strict=True):
        assert trial["learning_rate"] == other["learning_rate"]
        assert trial["test_accuracy"] == other["test_accuracy"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.json", "cannot be read"),
        ("{path}:magic", "has no 'magic'"),
        ("{path}.text", "hidden_units must be int, got '256'"),
        ("{path}.flag", "batch_norm must be bool, got 'no'"),
        ("{path}.float", "epochs must be int, got 2.5"),
        ("{path}", "training, which this command does not know"),
    ],
)
def test_settings_that_are_not_there_exit_2(source, message, searched, capsys):
    source = source.format(path=searched / "selected.json")
    wrong = {".text": "hidden_units", ".flag": "batch_norm", ".float": "epochs"}
    values = {".text": "256", ".flag": "no", ".float": 2.5}
    for end, field in wrong.items():
        path = searched / f"selected.json{end}"
        path.write_text(json.dumps({field: values[end]}))
    assert synthetic("train", "--settings", source) == 2
    assert message in capsys.readouterr().err


def test_search_overwrite_of_a_shared_storage_is_refused(tmp_path, capsys):
    arguments = ("--out", tmp_path / "run", "--overwrite", "--storage", tmp_path / "j")
    assert synthetic("search", *SHORT, *arguments) == 2
    assert "--overwrite leaves the trials in --storage" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://someone:se-cret@host/study",
        "mysql+pymysql://host:3306/study?user=someone&password=se-cret",
        "sqlite:////shared/se-cret.db",
        "REDIS://:se-cret@host",
    ],
)
def test_search_url_as_storage_is_refused_and_its_password_not_repeated(
    url, tmp_path, capsys
):
    arguments = (*SHORT, "--out", tmp_path / "run", "--storage", url)
    assert synthetic("search", *arguments) == 2
    printed = "".join(capsys.readouterr())
    assert "storage must be the path of a journal file, got a URL" in printed
    assert "se-cret" not in printed
    assert not any(tmp_path.iterdir())


def test_search_two_directories_share_a_storage(tmp_path):
    storage = tmp_path / "shared.journal"
    for name in ("first", "second"):
        arguments = ("--trials", 2, "--storage", storage, "--out", tmp_path / name)
        assert synthetic("search", *SHORT, *arguments) == 0
    # The second found both trials there.
    tables = [(tmp_path / n / "trials.csv").read_bytes() for n in ("first", "second")]
    assert tables[0] == tables[1]


def test_search_space_with_batches_beyond_an_environment_exits_2(tmp_path, capsys):
    arguments = ("--examples-per-env", 32, "--out", tmp_path / "run")
    assert synthetic("search", *SHORT, *arguments) == 2
    assert "must be at least 64, the largest batch" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--learning-rate", "--oracle", "--max-rescale"])
def test_search_what_trials_draw_is_no_flag(flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        synthetic("search", flag, "1")
    assert exit_.value.code == 2
    assert flag in capsys.readouterr().err
