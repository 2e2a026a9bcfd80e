"""Searches that are killed, interrupted, resumed and shared."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
from optuna.trial import TrialState

from experiments.common import search as searches
from experiments.common.run_dir import RunDirError, format_csv
from experiments.common.search import Search, open_study, run, run_trial, table
from tests.experiments.conftest import ROOT
from tests.experiments.toy_search import Toy, finish

COMPLETE, FAIL, RUNNING = TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING
FIRST = ({"x": 0.5}, {"x": -0.25, "kind": "deep", "depth": 2})


@pytest.fixture
def search(tmp_path):
    """A study that is not there yet."""
    return Search("toy", tmp_path / "study", trials=4)


@pytest.fixture
def start(tmp_path):
    """Starts the toy program as the leader of a process group, as a shell does."""
    started = []

    def start(action, search, toy, **arguments):
        settings = {**vars(search), "directory": str(search.directory)}
        values = {"search": settings, "toy": vars(toy), **arguments}
        command = ["-W", "error", "-m", "tests.experiments.toy_search", action]
        process = subprocess.Popen(
            [sys.executable, *command, json.dumps(values)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def timeless(rows):
    """Rows of a table without what differs from one run to the next."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def states(search):
    return [trial.state for trial in open_study(search).trials]


def check_attempts(search):
    """Every planned trial finished once, and all its attempts had its parameters."""
    trials = open_study(search).trials
    assert {t.state for t in trials} <= {COMPLETE, FAIL}
    finished = {t.user_attrs["index"]: t for t in trials if t.state != FAIL}
    done = [t.user_attrs["index"] for t in trials if t.state != FAIL]
    assert sorted(done) == list(range(search.trials))
    before = {}
    for attempt in trials:
        index = attempt.user_attrs["index"]
        assert attempt.params.items() <= finished[index].params.items()
        assert attempt.user_attrs.get("retry_of") == before.get(index)
        before[index] = attempt.number
    assert [row["number"] for row in table(open_study(search))] == sorted(done)


PLANS = [
    {"sampler": "random", "first": FIRST},
    {"sampler": "tpe", "seed": 3},
    {"sampler": "univariate_tpe", "first": FIRST},
]


@pytest.mark.parametrize("plan", PLANS)
def test_run_trial_killed_at_random_moments_repeats_the_undisturbed_search(
    plan, start, tmp_path
):
    toy = Toy()
    undisturbed = Search("toy", tmp_path / "undisturbed", trials=16, **plan)
    rows = finish(undisturbed, toy)
    assert states(undisturbed) == [COMPLETE] * 16

    killed = dataclasses.replace(undisturbed, directory=tmp_path / "killed")
    slow = dataclasses.replace(toy, seconds=0.04)
    end(start("kill", killed, slow, workers=1, kills=12, pause=0.1))
    assert FAIL in states(killed)
    check_attempts(killed)
    assert timeless(table(open_study(killed))) == timeless(rows)


def test_run_trial_two_workers_killed_at_random_moments_finish_every_trial_once(
    start, search
):
    search = dataclasses.replace(search, trials=12, first=FIRST)
    end(start("kill", search, Toy(seconds=0.1), workers=2, kills=10, pause=0.1))
    assert FAIL in states(search)
    check_attempts(search)
    rows = table(open_study(search))
    for params, row in zip(FIRST, rows, strict=False):
        assert params.items() <= row.items()


def test_run_killed_with_its_workers_goes_on_in_two_processes_at_once(start, search):
    toy = Toy(seconds=0.05)
    search = dataclasses.replace(search, trials=16)
    first = start("run", search, toy, workers=2)
    for _ in range(3):
        first.stdout.readline()
    first.kill()
    first.communicate()
    both = [start("run", search, toy, workers=2) for _ in range(2)]
    numbers = [int(n) for process in both for n in end(process)[0].split()]
    assert len(numbers) == len(set(numbers)) >= 10
    check_attempts(search)


def test_run_finishes_as_many_as_asked_and_says_nothing(start, search):
    out, err = end(start("run", search, Toy(), workers=2))
    assert sorted(out.split()) == ["0", "1", "2", "3"]
    assert err == ""
    check_attempts(search)
    assert [p.name for p in search.directory.glob("study.locks/*")] == ["plan"]
    assert list(run(search, Toy())) == []


def test_run_interrupted_puts_its_trials_back(start, search):
    process = start("run", search, Toy(seconds=1.0), workers=2)
    deadline = time.monotonic() + 60
    while states(search).count(RUNNING) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = end(process, code=130)
    assert "Traceback" not in err
    assert states(search) == [FAIL, FAIL]
    finish(search, Toy())
    check_attempts(search)


def test_run_trial_another_seed_gives_other_trials(search, tmp_path):
    rows = finish(search, Toy())
    other = dataclasses.replace(search, directory=tmp_path / "other", seed=1)
    assert timeless(finish(other, Toy())) != timeless(rows)


def test_open_study_larger_extends_and_smaller_is_refused(search, tmp_path):
    finish(dataclasses.replace(search, trials=2), Toy())
    rows = finish(search, Toy())
    at_once = dataclasses.replace(search, directory=tmp_path / "other")
    assert timeless(finish(at_once, Toy())) == timeless(rows)
    with pytest.raises(RunDirError, match="has 4 finished trials already"):
        open_study(dataclasses.replace(search, trials=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 asked for"),
        ({"sampler": "random"}, "sampler: 'tpe' there, 'random' asked for"),
        ({"sampler": "univariate_tpe"}, "sampler: 'tpe' there, 'univariate_tpe' asked"),
        ({"space": {"x": [0, 1]}}, "space: None there, {'x': \\[0, 1\\]} asked for"),
        ({"first": FIRST[:1]}, "first: \\[\\] there, \\[{'x': 0.5}\\] asked for"),
    ],
)
def test_open_study_another_plan_is_refused_naming_the_difference(
    changes, message, search
):
    open_study(search)
    journal = search.journal.read_bytes()
    with pytest.raises(RunDirError, match=message):
        run_trial(dataclasses.replace(search, **changes), Toy())
    kept = search.journal.read_bytes()
    assert b"plan" not in kept.removeprefix(journal)
    open_study(search)


def test_open_study_of_another_program_is_refused(search):
    study = open_study(dataclasses.replace(search, name="mine"))
    foreign = optuna.create_study(storage=study._storage, study_name="toy")
    with pytest.raises(RunDirError, match="'toy' was not made by this program"):
        open_study(search)
    assert foreign.user_attrs == {}


def test_run_trial_torn_last_line_costs_nothing_but_that_line(search, tmp_path):
    rows = finish(search, Toy())
    lines = search.journal.read_bytes().splitlines(keepends=True)
    for last in range(1, len(lines)):
        torn = dataclasses.replace(search, directory=tmp_path / f"torn{last}")
        torn.directory.mkdir()
        half = lines[last][: len(lines[last]) - 1 if last % 2 else 9]
        torn.journal.write_bytes(b"".join(lines[:last]) + half)
        assert timeless(finish(torn, Toy())) == timeless(rows)
        check_attempts(torn)


def test_run_trial_line_torn_by_another_worker_is_cut_off(search):
    def tear(trial):
        with open(search.journal, "ab") as journal:
            journal.write(b'{"op_code":8,"worker')
        return Toy()(trial)

    run_trial(search, tear)
    assert b'"worker{' not in search.journal.read_bytes()
    finish(search, Toy())
    check_attempts(search)


def stop_after(suggestions, error):
    """An objective that ends in the midst of a trial."""

    def objective(trial):
        trial.suggest_float("x", -1.0, 1.0)
        if suggestions > 1:
            trial.suggest_categorical("kind", ["flat", "deep"])
        raise error

    return objective


@pytest.mark.parametrize("suggestions", [1, 2])
def test_run_trial_killed_runs_again_with_the_same_parameters(
    suggestions, search, tmp_path, monkeypatch
):
    undisturbed = dataclasses.replace(search, directory=tmp_path / "other")
    rows = finish(undisturbed, Toy())
    finish(dataclasses.replace(search, trials=1), Toy())
    with monkeypatch.context() as patch:
        # Nothing is put back, as after kill -9.
        patch.setattr(searches, "_fail", lambda study, number: None)
        with pytest.raises(SystemExit):
            run_trial(search, stop_after(suggestions, SystemExit()))
    killed = open_study(search).trials[1]
    assert killed.state == RUNNING
    assert len(killed.params) == suggestions

    run_trial(search, Toy())
    retry = open_study(search).trials[2]
    assert states(search) == [COMPLETE, FAIL, COMPLETE]
    assert retry.user_attrs["retry_of"] == 1
    assert retry.user_attrs["index"] == 1
    assert killed.params.items() <= retry.params.items()
    assert timeless(finish(search, Toy())) == timeless(rows)


def test_run_trial_tpe_looks_at_parameters_together_or_one_after_the_other(
    search, tmp_path, monkeypatch
):
    asked = []
    sample = optuna.samplers.TPESampler.sample_relative

    def noted(self, study, trial, space):
        asked.append(sorted(space))
        return sample(self, study, trial, space)

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", noted)
    together = dataclasses.replace(search, trials=11)
    alone = dataclasses.replace(
        together, directory=tmp_path / "alone", sampler="univariate_tpe"
    )
    rows = finish(together, Toy())
    assert asked[-1] == ["kind", "x"]
    asked.clear()
    others = finish(alone, Toy())
    assert not any(asked)
    # Nothing is known to either yet.
    assert timeless(rows[:10]) == timeless(others[:10])
    assert timeless(rows[10:]) != timeless(others[10:])


def test_run_trial_draws_every_parameter_anew(search):
    def objective(trial):
        return sum(trial.suggest_float(name, 0.0, 1.0) for name in "abc")

    search = dataclasses.replace(search, trials=12)
    rows = finish(search, objective)
    assert len({row[name] for row in rows for name in "abc"}) == 36


def test_run_trial_exception_is_raised_with_the_trial_and_put_back(search):
    with pytest.raises(OSError, match="no space left") as caught:
        run_trial(search, stop_after(2, OSError("no space left")))
    failed = open_study(search).trials[0]
    assert caught.value.__notes__ == [
        f"This was trial 0 of 'toy', with {failed.params}; it is put back."
    ]
    assert states(search) == [FAIL]
    finish(search, Toy())
    check_attempts(search)


def test_run_exception_in_a_worker_is_raised_with_the_trial(search):
    with pytest.raises(TypeError, match="not iterable") as caught:
        list(run(search, dict))
    assert "This was trial 0 of 'toy', with {}; it is put back." in (
        caught.value.__notes__
    )


def test_run_trial_nan_is_an_exception(search):
    with pytest.raises(ValueError, match="the objective is not a number"):
        run_trial(search, lambda trial: float("nan"))
    assert states(search) == [FAIL]


@pytest.fixture
def elsewhere(search, monkeypatch):
    """Leaves trial 0 under way on another machine, from where no lock can be seen."""

    def elsewhere(search):
        with monkeypatch.context() as patch:
            patch.setattr(searches, "_fail", lambda study, number: None)
            patch.setattr(searches.socket, "gethostname", lambda: "elsewhere")
            with pytest.raises(SystemExit):
                run_trial(search, stop_after(2, SystemExit()))
        return open_study(search)

    return elsewhere


def test_run_trial_on_another_machine_is_not_judged_by_its_lock(search, elsewhere):
    study = elsewhere(search)
    run_trial(search, Toy())
    assert states(search) == [RUNNING, COMPLETE]
    assert open_study(search).trials[1].user_attrs["index"] == 1
    study.tell(0, state=FAIL)
    finish(search, Toy())
    check_attempts(search)


def test_run_trial_keeps_parameters_that_it_would_choose_otherwise_by_now(
    search, elsewhere
):
    finish(dataclasses.replace(search, trials=11), Toy())
    search = dataclasses.replace(search, trials=13)
    study = elsewhere(search)
    run_trial(search, Toy())
    study.tell(11, state=FAIL)
    run_trial(search, Toy())
    retry, killed = study.trials[13], study.trials[11]
    assert retry.user_attrs["retry_of"] == 11
    assert killed.params.items() <= retry.params.items()
    check_attempts(search)


def test_run_alone_takes_all_trials_under_way_for_killed(search, elsewhere):
    elsewhere(search)
    assert len(list(run(search, Toy(), alone=True))) == 4
    check_attempts(search)


def test_run_trial_waits_for_one_on_another_machine(
    search, elsewhere, monkeypatch, capsys
):
    search = dataclasses.replace(search, trials=1)
    study = elsewhere(search)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            study.tell(0, 0.5)

    monkeypatch.setattr(searches.time, "sleep", nap)
    assert run_trial(search, Toy()) is None
    assert len(naps) == 3
    assert capsys.readouterr().err == (
        "waiting for trial 0 of 'toy', which runs on elsewhere (attempt 0)\n"
    )


def test_run_trial_taken_for_dead_elsewhere_is_run_again(search):
    lost = []

    def objective(trial):
        if not lost:
            lost.append(trial.number)
            open_study(search).tell(trial.number, state=FAIL)
        return Toy()(trial)

    assert run_trial(search, objective)["number"] == 0
    assert states(search) == [FAIL, COMPLETE]

    def objective(trial):
        value = Toy()(trial)
        if len(lost) == 1:
            lost.append(trial.number)
            open_study(search).tell(trial.number, state=FAIL)
        return value

    assert run_trial(search, objective)["number"] == 1
    finish(search, Toy())
    check_attempts(search)


def test_run_trial_begun_on_two_machines_at_once_runs_on_one(search, monkeypatch):
    add_trial, rivals = optuna.Study.add_trial, []

    def add_after_a_rival(study, trial):
        if not rivals:
            rivals.append(optuna.trial.create_trial(state=RUNNING, user_attrs={}))
            rivals[0].user_attrs = {**trial.user_attrs, "host": "a", "worker": "b"}
            add_trial(study, rivals[0])
        add_trial(study, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", add_after_a_rival)
    monkeypatch.setattr(searches, "_POLL_SECONDS", 0)
    assert run_trial(search, Toy())["number"] == 1
    assert states(search) == [RUNNING, FAIL, COMPLETE]


def test_table_has_the_same_columns_for_every_finished_trial(search):
    search = dataclasses.replace(search, trials=20, first=FIRST)
    with pytest.raises(OSError, match="full"):
        run_trial(search, stop_after(1, OSError("full")))
    rows = finish(search, Toy())
    columns = ["number", "value", "depth", "kind", "x", "twice", "seconds"]
    assert all(list(row) == columns for row in rows)
    for row in rows:
        assert row["twice"] == 2 * row["x"]
        assert (row["depth"] is None) == (row["kind"] == "flat")
        assert row["seconds"] >= 0
    assert format_csv(rows).splitlines()[0] == ",".join(columns)
    assert len(format_csv(rows).splitlines()) == 21


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"trials": 1, "first": FIRST}, "trials must be at least 2, as `first`, got 1"),
        ({"seed": -1}, "seed must be between"),
        (
            {"sampler": "grid"},
            "sampler must be one of tpe, univariate_tpe, random, got",
        ),
    ],
)
def test_search_invalid_setting_raises_value_error(changes, message, search):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(search, **changes)
