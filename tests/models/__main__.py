"""`python -m tests.models`: all architectures, or those named, fused and stacked."""

import argparse
import concurrent.futures
import csv
import functools
import io
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from experiments.common.files import atomic_write, write_json
from tests.models.check import OUTCOMES
from tests.models.report import COLUMNS, row_of, text_table
from tests.models.table import FAMILIES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
# What says that a value is right, or that the library will not give one.
GOOD = ("equal", "refused")
CHECK = (sys.executable, "-W", "ignore", "-m", "tests.models.check")
FAILED = {"outcome": "crashed", "versions": {}, "rules": {}, "fallbacks": {}}


def check_family(pairs, timeout, report):
    """What `tests.models.check` finds, in a process of its own for a family.

    Where that ends before its time, or takes too long over one model, another process
    goes on behind that model.
    """
    left = list(pairs)
    while left:
        (family, *_), names = left[0], [name for _, name in left]
        with subprocess.Popen(
            [*CHECK, family, *names],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            while left:
                late = threading.Timer(timeout, process.kill)
                late.start()
                line = process.stdout.readline()
                late.cancel()
                family, name = left.pop(0)
                if not line:
                    why = f"its process ended, or was ended after {timeout} s"
                    report(FAILED | {"family": family, "name": name, "detail": why})
                    break
                report(json.loads(line))
            process.kill()


def chosen(names):
    """`(family, name)` of those that are named `FAMILY` or `FAMILY.NAME`; of all."""
    every = [(f, n) for f, family in FAMILIES.items() for n in family.architectures]
    unknown = set(names) - {f for f, _ in every} - {f"{f}.{n}" for f, n in every}
    if unknown:
        sys.exit(
            f"unknown: {', '.join(sorted(unknown))}; families: {', '.join(FAMILIES)}"
        )
    return [(f, n) for f, n in every if not names or f in names or f"{f}.{n}" in names]


def run(pairs, workers, timeout, keep):
    """Results in the order of `pairs`; says and keeps each as it is found."""
    lock = threading.Lock()
    results = {}

    def report(found):
        with lock:
            results[found["family"], found["name"]] = found
            keep(results.values())
            count = f"{len(results)}/{len(pairs)}"
            name = f"{found['family']}.{found['name']}"
            print(count, found["outcome"], name, found["detail"], flush=True)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        families = itertools.groupby(pairs, key=lambda pair: pair[0])
        futures = [
            pool.submit(check_family, list(group), timeout, report)
            for _, group in families
        ]
        for future in futures:
            future.result()
    return [results[pair] for pair in pairs]


def kept(out):
    """`(family, name)` -> what an earlier command found."""
    path = out / "models.json"
    if not path.exists():
        return {}
    results = json.loads(path.read_text())["results"]
    return {(found["family"], found["name"]): found for found in results}


def write(results, out):
    """`models.csv`, a line for each; `models.json`, all that was found.

    Those that were not looked at this time stay as they were.
    """
    now = {(found["family"], found["name"]): found for found in results}
    both = kept(out) | now
    results = [both[pair] for pair in chosen(()) if pair in both]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row_of(found) for found in results)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "models.csv", text.getvalue())
    write_json(out / "models.json", {"results": results})


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__)
    parser.add_argument("names", nargs="*", help="FAMILY or FAMILY.NAME; without, all")
    parser.add_argument(
        "--workers", type=int, default=1, help="families at a time (%(default)s)"
    )
    parser.add_argument(
        "--timeout", type=int, default=900, help="seconds for each (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of results (%(default)s)"
    )
    options = parser.parse_args(arguments)
    keep = functools.partial(write, out=options.out)
    results = run(chosen(options.names), options.workers, options.timeout, keep)
    print(text_table(results))
    print(f"wrote {options.out / 'models.csv'} and {options.out / 'models.json'}")
    counts = {o: sum(found["outcome"] == o for found in results) for o in OUTCOMES}
    print(", ".join(f"{number} {o}" for o, number in counts.items() if number))
    return int(any(found["outcome"] not in GOOD for found in results))


if __name__ == "__main__":
    sys.exit(main())
