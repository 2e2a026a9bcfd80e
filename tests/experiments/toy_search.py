"""A search that trains nothing, and a program that runs it and kills it.

`python -m tests.experiments.toy_search ACTION JSON`, where JSON has the arguments of
`Search` and `Toy`, and of the action:

    run    runs the search with the given number of `workers`
    kill   forks that many workers, kills `kills` of them at random moments, at most
           `pause` seconds apart, and puts others in their places, which finish
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import sys
import time

from experiments.common import search as searches
from experiments.common.search import Search


@dataclasses.dataclass(frozen=True)
class Toy:
    """An objective that takes a while."""

    seconds: float = 0.0

    def __call__(self, trial):
        x = trial.suggest_float("x", -1.0, 1.0)
        time.sleep(self.seconds / 2)
        kind = trial.suggest_categorical("kind", ["flat", "deep"])
        depth = trial.suggest_int("depth", 1, 9) if kind == "deep" else 0
        trial.set_user_attr("twice", 2 * x)
        time.sleep(self.seconds / 2)
        return -((x - 0.3) ** 2) - 0.1 * abs(depth - 4)


def finish(search, objective):
    """Runs all that is left in this process; returns the table."""
    while searches.run_trial(search, objective) is not None:
        pass
    return searches.table(searches.open_study(search))


def kill_and_finish(search, objective, workers, kills, pause):
    moment = random.Random(0)
    begun, begin = os.pipe()

    def announced(trial):
        os.write(begin, b".")
        return objective(trial)

    def fork():
        child = os.fork()
        if child == 0:
            finish(search, announced)
            os._exit(0)
        return child

    children = [fork() for _ in range(workers)]
    for kill in range(kills):
        if kill % 2:
            os.read(begun, 1)  # on a slow machine all would die while they start
        time.sleep(moment.uniform(0, pause))
        victim = moment.randrange(workers)
        os.kill(children[victim], signal.SIGKILL)
        os.waitpid(children[victim], 0)
        children[victim] = fork()
    return [os.waitpid(child, 0)[1] for child in children]


def main(action, arguments):
    values = json.loads(arguments)
    directory = pathlib.Path(values["search"].pop("directory"))
    search = Search(directory=directory, **values["search"])
    toy = Toy(**values["toy"])
    if action == "kill":
        how = {name: values[name] for name in ("workers", "kills", "pause")}
        return max(kill_and_finish(search, toy, **how))
    try:
        for row in searches.run(search, toy, values["workers"]):
            print(row["number"], flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
