"""Hyperparameter searches of exactly as many trials as asked for, whatever is killed.

A study has planned trials, with an index from 0, and each of them has attempts, which
are Optuna's trials. An attempt that was killed, interrupted or failed is marked FAIL,
and the next one has the same parameters. A planned trial is finished when one of its
attempts is COMPLETE.

    study.journal   all trials, unless another journal keeps them
    study.locks/    what tells a worker that is alive from one that was killed

Several machines share a study through a journal on a file system that all of them see
and whose locks reach all of them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import socket
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from experiments.common.choices import Sampler
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


@dataclasses.dataclass(frozen=True)
class Search:
    """A study, and how many finished trials it is to have.

    `trials` may grow later, and the journal may move. The other settings make up the
    plan, which a study keeps: the same plan and one worker give the same trials, also
    if they were killed and resumed in between.

    Raises:
      ValueError: a setting is invalid.
    """

    name: str
    directory: Path
    """Where the locks lie, and the journal unless `storage` is another."""
    trials: int
    """Finished trials wanted."""
    seed: int = 0
    sampler: Sampler = "tpe"
    first: Sequence[Mapping[str, Any]] = ()
    """Parameters of the first trials; the sampler chooses what they leave open."""
    space: Any = None
    """All else that decides the trials, such as ranges and settings; JSON values."""
    storage: Path | None = None
    """Another journal, which several directories may share."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "trials")
        require("seed", self.seed, 0 <= self.seed < 2**32, "between 0 and 2**32 - 1")
        require_kinds(self, sampler=Sampler)
        holds = len(self.first) <= self.trials
        require("trials", self.trials, holds, f"at least {len(self.first)}, as `first`")

    @property
    def plan(self) -> dict[str, Any]:
        """The settings that a study keeps, as JSON gives them back."""
        plan = {name: getattr(self, name) for name in ("seed", "sampler", "space")}
        plan["first"] = [dict(params) for params in self.first]
        restored: dict[str, Any] = json.loads(json.dumps(plan))
        return restored

    @property
    def journal(self) -> Path:
        """The journal's path."""
        return self.directory / JOURNAL if self.storage is None else self.storage


def open_study(search: Search) -> optuna.Study:
    """The study, begun if it is not there.

    Raises:
      RunDirError: the study has another plan or more trials than asked for, or its
        journal cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = _PlannedSampler(search.sampler, search.seed)
    with _locked(search):
        study = optuna.create_study(
            storage=open_journal(search.journal),
            study_name=search.name,
            sampler=sampler,
            direction="maximize",
            load_if_exists=True,
        )
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
    missing = search.trials - len(_attempts(study, TrialState.COMPLETE))
    for row in run_jobs(run_trial, [(search, objective)] * missing, workers):
        if row is not None:
            yield row


def run_trial(search: Search, objective: Objective) -> Row | None:
    """Runs the first planned trial that nobody is at, from its beginning to its end.

    While others are at all that are left it waits, ready to take over from one that
    is killed. The death of one on another machine goes unnoticed: it can be given up
    with `open_study(search).tell(number, state=TrialState.FAIL)`.

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
                finished = _finish_attempt(study, trial, objective)
                if finished is not None:
                    return _row(finished)
            elif len(_attempts(study, TrialState.COMPLETE)) >= search.trials:
                return None
            else:
                if not told:
                    _tell_of_waiting(study)
                told = True
                time.sleep(_POLL_SECONDS)


def table(study: optuna.Study) -> list[Row]:
    """One row for each finished planned trial, by index, all with the same columns.

    The columns are number (the index), value, the parameters, the objective's user
    attributes and seconds; these names have to differ. Attempts that did not
    finish leave no trace; what a trial does not have is None.
    """
    attempts = sorted(_attempts(study, TrialState.COMPLETE), key=_index)
    params = sorted({name for attempt in attempts for name in attempt.params})
    attrs = sorted({name for attempt in attempts for name in _attributes(attempt)})
    columns = ("number", "value", *params, *attrs, "seconds")
    rows = map(_row, attempts)
    return [{name: row.get(name) for name in columns} for row in rows]


def _row(attempt: FrozenTrial) -> Row:
    duration = attempt.duration
    return {
        "number": _index(attempt),
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
    _fail_stale(study)
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
        value = float(objective(trial))
        if math.isnan(value):
            raise ValueError("the objective is not a number")
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
    return told if told.state == TrialState.COMPLETE else None


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
                "name or journal"
            )
        study.set_user_attr(_PLAN, search.plan)
    elif held != search.plan:
        raise RunDirError(
            f"study {search.name!r} has another plan: choose another directory or name"
            f"\n{describe_differences(held, search.plan)}"
        )
    finished = len(_attempts(study, TrialState.COMPLETE))
    if finished > search.trials:
        raise RunDirError(
            f"study {search.name!r} has {finished} finished trials already: ask for as "
            f"many or more, not for {search.trials}"
        )


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


def _fail_stale(study: optuna.Study) -> None:
    """Marks the attempts whose workers are gone, as far as this machine can tell."""
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


# What Optuna's defaults are changes: those of 5.0 make "tpe", those of the releases
# before it "univariate_tpe", which is what searches of the paper's time ran with.
_SAMPLERS: dict[Sampler, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(
        seed=seed, multivariate=True, constant_liar=True
    ),
    "univariate_tpe": lambda seed: optuna.samplers.TPESampler(
        seed=seed, multivariate=False, constant_liar=False
    ),
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
