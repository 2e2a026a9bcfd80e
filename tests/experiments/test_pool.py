"""Jobs in other processes; Ctrl-C and kills are in test_synthetic_commands.py."""

import os
import signal

import pytest

from experiments.common.pool import run_jobs
from experiments.common.run_dir import StoppedError


def power(base, exponent):
    return base**exponent, os.getpid()


def refuse_zero(number):
    if number == 0:
        raise ValueError("zero")
    return number


def test_run_jobs_gives_the_result_of_every_job_from_other_processes():
    jobs = [(2, 1), (2, 2), (2, 3)]
    results, processes = zip(*run_jobs(power, jobs, 2), strict=True)
    assert sorted(results) == [2, 4, 8]
    assert os.getpid() not in processes
    assert len(set(processes)) <= 2


def test_run_jobs_one_worker_keeps_the_order():
    assert list(run_jobs(refuse_zero, [(3,), (1,), (2,)], 1)) == [3, 1, 2]


def test_run_jobs_without_jobs_gives_nothing():
    assert list(run_jobs(refuse_zero, [], 2)) == []


def test_run_jobs_exception_in_a_job_is_raised_and_ends_the_rest():
    results = run_jobs(refuse_zero, [(1,), (0,), (2,)], 1)
    assert next(results) == 1
    with pytest.raises(ValueError, match="zero"):
        next(results)
    assert list(results) == []


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_run_jobs_worker_killed_by_the_system_says_so():
    with pytest.raises(
        StoppedError, match="A worker process was killed, as the system"
    ):
        list(run_jobs(die, [(1,), (2,)], 1))
