"""Hyperparameter searches of exactly as many trials as asked for, whatever is killed.

A study has planned trials, with an index from 0, and each of them has attempts, which
are Optuna's trials. An attempt that was killed, interrupted or failed is marked FAIL,
and the next one has the same parameters. A planned trial is finished when one of its
attempts is COMPLETE or PRUNED.

    study.journal   all trials, unless they are kept elsewhere
    study.locks/    what tells a worker that is alive from one that was killed
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from experiments.common.choices import Pruner, Sampler
from experiments.common.journal import open_journal
from experiments.common.pool import run_jobs
from experiments.common.run_dir import RunDirError, describe_differences
from experiments.common.validation import require, require_at_least, require_kinds

JOURNAL = "study.journal"
_LOCKS = "study.locks"

Objective = Callable[[optuna.Trial], float]
Row = dict[str, Any]

INDEX = "index"
"""User attribute of an attempt: the index of the planned trial."""
RETRY_OF = "retry_of"
"""User attribute of an attempt: the number of the attempt before it, if any."""
_HOST = "host"
_WORKER = "worker"
_PLAN = "plan"
_POLL_SECONDS = 0.5
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclasses.dataclass(frozen=True)
class Search:
    """A study, and how many finished trials it is to have.

    `trials` may grow later, and storage and heartbeat may change. The other settings
    make up the plan, which a study keeps: the same plan and one worker give the same
    trials, also if they were killed and resumed in between.

    Raises:
      ValueError: a setting is invalid.
    """

    name: str
    directory: Path
    """Where the locks lie, and the journal."""
    trials: int
    """Finished trials wanted."""
    seed: int = 0
    sampler: Sampler = "tpe"
    pruner: Pruner = "none"
    warmup_steps: int = 0
    """Steps before which nothing is pruned; hyperband's smallest budget."""
    max_steps: int | None = None
    """Steps that a trial reports when it is not pruned; for hyperband."""
    first: Sequence[Mapping[str, Any]] = ()
    """Parameters of the first trials; the sampler chooses what they leave open."""
    space: Any = None
    """All else that decides the trials, such as ranges and settings; JSON values."""
    storage: str | None = None
    """URL of a database, or another journal's path."""
    heartbeat: int | None = None
    """Seconds between signs of life in the database, so that workers on other machines
    notice when this one is gone (after five of them)."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "trials")
        require("seed", self.seed, 0 <= self.seed < 2**32, "between 0 and 2**32 - 1")
        require_kinds(self, sampler=Sampler, pruner=Pruner)
        require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        known = self.max_steps is not None and self.max_steps > self.warmup_steps
        holds = known or self.pruner != "hyperband"
        require("max_steps", self.max_steps, holds, "above warmup_steps for hyperband")
        holds = len(self.first) <= self.trials
        require("trials", self.trials, holds, f"at least {len(self.first)}, as `first`")
        holds = self.heartbeat is None or (self.heartbeat >= 1 and self._is_url)
        require("heartbeat", self.heartbeat, holds, "at least 1, and for a database")

    @property
    def plan(self) -> dict[str, Any]:
        """The settings that a study keeps, as JSON gives them back."""
        names = ("seed", "sampler", "pruner", "warmup_steps", "max_steps", "space")
        plan = {name: getattr(self, name) for name in names}
        plan["first"] = [dict(params) for params in self.first]
        restored: dict[str, Any] = json.loads(json.dumps(plan))
        return restored

    @property
    def journal(self) -> Path | None:
        """The journal's path, None with a database."""
        if self._is_url:
            return None
        return self.directory / JOURNAL if self.storage is None else Path(self.storage)

    @property
    def _is_url(self) -> bool:
        return self.storage is not None and "://" in self.storage


def open_study(search: Search) -> optuna.Study:
    """The study, begun if it is not there.

    Raises:
      RunDirError: the study has another plan or more trials than asked for, or its
        storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = _PlannedSampler(search.sampler, search.seed)
    with _locked(search):
        try:
            study = optuna.create_study(
                storage=_open_storage(search),
                study_name=search.name,
                sampler=sampler,
                pruner=_PRUNERS[search.pruner](search),
                direction="maximize",
                load_if_exists=True,
            )
        except RunDirError:
            raise
        except Exception as error:  # which one depends on the database and its driver
            raise RunDirError(
                f"the storage of study {search.name!r} cannot be used: {error}"
            ) from error
        _enter_plan(study, search)
    return study


def run(
    search: Search, objective: Objective, workers: int = 1, *, alone: bool = False
) -> Iterator[Row]:
    """Runs the trials that are missing; yields each one's row of `table` as it ends.

    The study has `search.trials` finished trials at the end. An exception in the
    objective, a refused study and Ctrl-C end the search as `run_trial` says; the same
    call goes on.

    Args:
      search: the study.
      objective: what is maximised; importable by its name, or a picklable object.
      workers: trials that run at the same time, each in a process of its own.
      alone: no other process works on the study, as when the caller holds the lock of
        its run directory. All trials under way are then taken for killed, which also
        finds those of a machine that has since changed its name.
    """
    study = open_study(search)
    if alone:
        for attempt in _attempts(study, TrialState.RUNNING):
            _fail(study, attempt.number)
    missing = search.trials - len(_attempts(study, *_FINISHED))
    for row in run_jobs(run_trial, [(search, objective)] * missing, workers):
        if row is not None:
            yield row


def run_trial(search: Search, objective: Objective) -> Row | None:
    """Runs the first planned trial that nobody is at, from its beginning to its end.

    While others are at all that are left it waits, ready to take over from one that
    is killed. One on another machine whose death goes unnoticed, for want of a
    heartbeat, can be given up with `study.tell(number, state=TrialState.FAIL)`.

    Returns:
      The trial's row of `table`; None when all planned trials are finished.

    Raises:
      Exception: from the objective, with a note that says in which trial. The trial is
        put back, as it is after Ctrl-C: the next call tries it again.
      RunDirError: the study is refused; see `open_study`.
    """
    study = open_study(search)
    with _worker_lock(search) as worker:
        told = False
        while True:
            with _locked(search):
                trial = _begin_attempt(study, search, worker)
            if trial is not None:
                with _heartbeat(search, trial):
                    finished = _finish_attempt(study, trial, objective)
                if finished is not None:
                    return _row(finished)
            elif len(_attempts(study, *_FINISHED)) >= search.trials:
                return None
            else:
                if not told:
                    _tell_of_waiting(study)
                told = True
                time.sleep(_POLL_SECONDS)


def table(study: optuna.Study) -> list[Row]:
    """One row for each finished planned trial, by index, all with the same columns.

    The columns are number (the index), state, value, the parameters, the objective's
    user attributes and seconds; these names have to differ. Attempts that did not
    finish leave no trace; what a trial does not have is None.
    """
    attempts = sorted(_attempts(study, *_FINISHED), key=_index)
    params = sorted({name for attempt in attempts for name in attempt.params})
    attrs = sorted({name for attempt in attempts for name in _attributes(attempt)})
    columns = ("number", "state", "value", *params, *attrs, "seconds")
    rows = map(_row, attempts)
    return [{name: row.get(name) for name in columns} for row in rows]


def _row(attempt: FrozenTrial) -> Row:
    duration = attempt.duration
    return {
        "number": _index(attempt),
        "state": attempt.state.name,
        "value": attempt.value,
        **attempt.params,
        **_attributes(attempt),
        "seconds": None if duration is None else duration.total_seconds(),
    }


def _attributes(attempt: FrozenTrial) -> dict[str, Any]:
    ours = (INDEX, RETRY_OF, _HOST, _WORKER)
    return {name: v for name, v in attempt.user_attrs.items() if name not in ours}


def _index(attempt: FrozenTrial) -> int:
    index: int = attempt.user_attrs[INDEX]
    return index


def _attempts(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """The attempts, or those in one of `states`, in the order in which they began."""
    trials = study.get_trials(deepcopy=False, states=states or None)
    return [trial for trial in trials if INDEX in trial.user_attrs]


def _begin_attempt(
    study: optuna.Study, search: Search, worker: Path
) -> optuna.Trial | None:
    """Begins the first planned trial that is neither under way nor finished, if any."""
    _fail_stale(study, search)
    attempts = collections.defaultdict(list)
    for attempt in _attempts(study):
        attempts[_index(attempt)].append(attempt)
    failed = TrialState.FAIL
    left = (
        i for i in range(search.trials) if all(a.state == failed for a in attempts[i])
    )
    index = next(left, None)
    if index is None:
        return None
    params = dict(search.first[index]) if index < len(search.first) else {}
    for attempt in attempts[index]:
        params |= attempt.params
    attrs = {INDEX: index, _HOST: socket.gethostname(), _WORKER: str(worker)}
    if attempts[index]:
        attrs[RETRY_OF] = attempts[index][-1].number
    # One write makes it, runs it and names its worker, where `enqueue_trial` and `ask`
    # would have moments in between to be killed in.
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.RUNNING,
            user_attrs=attrs,
            system_attrs={"fixed_params": params},
        )
    )
    # Machines that do not share the lock may have begun the same one: the first counts.
    alive = [a for a in _attempts(study) if _index(a) == index and a.state != failed]
    mine = next(a for a in alive if a.user_attrs[_WORKER] == str(worker))
    if mine is not alive[0]:
        _fail(study, mine.number)
        return None
    return optuna.Trial(study, mine._trial_id)


def _finish_attempt(
    study: optuna.Study, trial: optuna.Trial, objective: Objective
) -> FrozenTrial | None:
    """Runs the objective; None if another machine has taken this worker for dead."""
    try:
        try:
            value = float(objective(trial))
            if math.isnan(value):
                raise ValueError("the objective is not a number")
        except optuna.TrialPruned:
            told = study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            told = study.tell(trial, value, skip_if_finished=True)
    except UpdateFinishedTrialError:
        return None
    except BaseException as error:
        _fail(study, trial.number)
        error.add_note(
            f"This was trial {trial.user_attrs[INDEX]} of {study.study_name!r}, with "
            f"{trial.params}; it is put back."
        )
        raise
    return told if told.state in _FINISHED else None


def _fail(study: optuna.Study, number: int) -> None:
    with contextlib.suppress(UpdateFinishedTrialError):
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _tell_of_waiting(study: optuna.Study) -> None:
    for attempt in _attempts(study, TrialState.RUNNING):
        print(
            f"waiting for trial {_index(attempt)} of {study.study_name!r}, which runs "
            f"on {attempt.user_attrs[_HOST]} (attempt {attempt.number})",
            file=sys.stderr,
        )


def _enter_plan(study: optuna.Study, search: Search) -> None:
    held = study.user_attrs.get(_PLAN)
    if held is None:
        if study.get_trials() or study.direction != StudyDirection.MAXIMIZE:
            raise RunDirError(
                f"study {search.name!r} was not made by this program: choose another "
                "name or storage"
            )
        study.set_user_attr(_PLAN, search.plan)
    elif held != search.plan:
        raise RunDirError(
            f"study {search.name!r} has another plan: choose another directory or name"
            f"\n{describe_differences(held, search.plan)}"
        )
    finished = len(_attempts(study, *_FINISHED))
    if finished > search.trials:
        raise RunDirError(
            f"study {search.name!r} has {finished} finished trials already: ask for as "
            f"many or more, not for {search.trials}"
        )


def _open_storage(search: Search) -> BaseStorage:
    if search.journal is not None:
        return open_journal(search.journal)
    assert search.storage is not None
    arguments: dict[str, Any] = {}
    if search.storage.startswith("sqlite"):
        arguments["engine_kwargs"] = {"connect_args": {"timeout": 60}}
    if search.heartbeat is not None:
        arguments["heartbeat_interval"] = search.heartbeat
        arguments["grace_period"] = 5 * search.heartbeat
    with _experimental_allowed():
        return RDBStorage(search.storage, **arguments)


@contextlib.contextmanager
def _locked(search: Search) -> Iterator[None]:
    """Only one process at a time decides on the study's trials."""
    with open(_locks(search) / "plan", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _locks(search: Search) -> Path:
    directory = search.directory.absolute() / _LOCKS
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def _worker_lock(search: Search) -> Iterator[Path]:
    """A file that is locked as long as this worker lives."""
    path = _locks(search) / f"worker-{os.getpid()}-{uuid.uuid4().hex}"
    try:
        with open(path, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield path
    finally:
        path.unlink(missing_ok=True)


def _fail_stale(study: optuna.Study, search: Search) -> None:
    """Marks the attempts whose workers are gone, as far as this machine can tell."""
    if search.heartbeat is not None:
        with _experimental_allowed():
            fail_stale_trials(study)
    for attempt in _attempts(study, TrialState.RUNNING):
        # Locks are not to be trusted across machines, nor can all of them see the file.
        if attempt.user_attrs[_HOST] != socket.gethostname():
            continue
        path = Path(attempt.user_attrs[_WORKER])
        if _is_unlocked(path):
            _fail(study, attempt.number)
            path.unlink(missing_ok=True)


def _is_unlocked(path: Path) -> bool:
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # its worker has ended, or all was moved
        return True
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _heartbeat(search: Search, trial: optuna.Trial) -> Iterator[None]:
    """Signs of life in the database: Optuna gives them only in `Study.optimize`."""
    if search.heartbeat is None:
        yield
        return
    storage = _open_storage(search)
    assert isinstance(storage, RDBStorage)
    ended = threading.Event()

    def beat() -> None:
        while True:
            storage.record_heartbeat(trial._trial_id)
            if ended.wait(search.heartbeat):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _experimental_allowed() -> Iterator[None]:
    """Silences the warnings that Optuna's heartbeat is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


_SAMPLERS: dict[Sampler, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


class _PlannedSampler(optuna.samplers.BaseSampler):
    """Draws with a generator that the seed, the index and the parameter decide.

    So neither an earlier attempt nor a parameter that it fixed changes what is drawn,
    and there is no state that a kill could lose.
    """

    def __init__(self, kind: Sampler, seed: int):
        self._kind = kind
        self._seed = seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        sampler = self._sampler(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _sampler(
        self, trial: FrozenTrial, name: str = ""
    ) -> optuna.samplers.BaseSampler:
        entropy = [self._seed, _index(trial), zlib.crc32(name.encode())]
        seed = np.random.SeedSequence(entropy).generate_state(1)
        return _SAMPLERS[self._kind](int(seed[0]))


class _PlannedHyperband(optuna.pruners.HyperbandPruner):
    """Hyperband that chooses brackets by index, and leaves failed attempts out of them.

    Optuna's goes by the number of the attempt, and compares a trial with what the
    attempt before it had reported.
    """

    def _get_bracket_id(self, study: optuna.Study, trial: FrozenTrial) -> int:
        if trial.state == TrialState.FAIL:
            return -1
        planned = copy.copy(trial)
        planned.number = _index(trial)
        return super()._get_bracket_id(study, planned)


_PRUNERS: dict[Pruner, Callable[[Search], optuna.pruners.BasePruner]] = {
    "none": lambda search: optuna.pruners.NopPruner(),
    "median": lambda search: optuna.pruners.MedianPruner(
        n_warmup_steps=search.warmup_steps
    ),
    "hyperband": lambda search: _PlannedHyperband(
        min_resource=max(1, search.warmup_steps), max_resource=search.max_steps or 1
    ),
}
