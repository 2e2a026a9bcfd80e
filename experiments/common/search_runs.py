"""Run directories of searches, whose studies `experiments.common.search` runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from experiments.common.cli import Invocation, SearchOptions, announced
from experiments.common.run_dir import RunDir, RunDirError
from experiments.common.search import JOURNAL, Objective, Row, Search, open_study, table
from experiments.common.search import run as run_study

TRIALS_TABLE = "trials.csv"
SELECTED = "selected.json"
Options = TypeVar("Options", bound=SearchOptions)


@contextlib.contextmanager
def search_dir(
    call: Invocation[Any, Options],
    path: Path,
    experiment: str,
    identity: Mapping[str, Any] | None = None,
    changing: Sequence[str] = ("trials",),
    outputs: Sequence[str] = (),
) -> Iterator[RunDir]:
    """The run directory of a search, which a higher number of trials opens again.

    Args:
      call: what was asked for; its config has the number of `trials`.
      path: the directory.
      experiment: name of the experiment and its subcommand.
      identity: what defines the result besides the config.
      changing: fields of the config that are no part of it, but of the summary.
      outputs: names of further files that the search writes.

    Raises:
      RunDirError: as `RunDir` says; or there are more trials than asked for already, or
        trials that `--overwrite` does not reach.
    """
    config, options = call.config, call.options
    if options.overwrite and options.storage is not None:
        raise RunDirError(
            "--overwrite leaves the trials in --storage as they are: choose another "
            "journal, or delete this one and start without --overwrite"
        )
    fields = {**dataclasses.asdict(config), **(identity or {})}
    wanted = {name: fields.pop(name) for name in changing}
    with RunDir(
        path,
        experiment,
        fields,
        seed=config.seed,
        command=call.command,
        overwrite=options.overwrite,
        outputs=(TRIALS_TABLE, SELECTED, JOURNAL, *outputs),
    ) as run:
        if run.finished:
            held = run.summary()
            if held["trials"] > config.trials:
                raise RunDirError(
                    f"{path} has {held['trials']} finished trials already: ask for as "
                    f"many or more, not for {config.trials}"
                )
            if any(held[name] != value for name, value in wanted.items()):
                run.reopen()
        with announced(run):
            yield run


def run_missing(
    run: RunDir,
    study: Search,
    objective: Objective,
    workers: int,
    show: Callable[[Sequence[Row]], Mapping[str, str]],
    title: str = "",
) -> list[Row]:
    """The rows of all trials of a study, after running those that are missing.

    Args:
      run: of the search.
      study: its study, or one of several.
      objective: see `experiments.common.search.run`.
      workers: trials at a time, each in a process of its own.
      show: what the progress bar shows of the trials so far.
      title: what it is called.
    """
    rows = table(open_study(study))
    # The run directory is locked, and the journal in it.
    results = run_study(study, objective, workers, alone=study.storage is None)
    with tqdm(
        total=study.trials, initial=len(rows), unit="trial", desc=title, smoothing=0
    ) as bar:
        for row in results:
            rows.append(row)
            bar.set_postfix(show(rows), refresh=False)
            bar.update()
            run.save_manifest()
    return table(open_study(study))
