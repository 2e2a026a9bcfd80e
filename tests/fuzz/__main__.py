"""`python -m tests.fuzz`: random programs, fused against stacked; see `make fuzz`."""

import argparse
import collections
import json
import pathlib
import sys
import time

import jax

from tests.fuzz import choices
from tests.fuzz.programs import Outcome, outcome_of, program, run

# Kept, with the smallest program that fails in the same way.
FAILURES = (Outcome.WRONG, Outcome.CRASH)
KEPT = (*FAILURES, Outcome.REFUSED, Outcome.ROUNDING)
# Compiled programs are never used again and fill the memory.
CLEAR_EVERY = 25
REPORT_EVERY = 100


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--programs", type=int, default=100, help="how many (%(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first program (%(default)s); the next is one more",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("build/fuzz"),
        help="folder for programs that fail (%(default)s)",
    )
    parser.add_argument(
        "--replay", type=pathlib.Path, help="a file of that folder, to run again"
    )
    given = parser.parse_args(arguments)
    if given.replay is not None:
        notes = json.loads(given.replay.read_text())["notes"]
        again = program(choices.noted(notes))
        outcome, said = run(again)
        print(again, outcome.value, said, sep="\n")
        return outcome in FAILURES
    counts = fuzz(given.programs, given.seed, given.out)
    return any(counts[outcome] for outcome in FAILURES)


def fuzz(number, seed, out):
    """How many of the programs had which outcome."""
    counts, start = collections.Counter(), time.monotonic()
    for done, of_program in enumerate(range(seed, seed + number), 1):
        outcome = one(of_program, out)
        counts[outcome] += 1
        if done % CLEAR_EVERY == 0:
            jax.clear_caches()
        if done % REPORT_EVERY == 0 or done == number:
            found = ", ".join(f"{counts[kind]} {kind.value}" for kind in Outcome)
            print(
                f"seeds {seed} to {of_program}: {found}; "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
    return counts


def one(seed, out):
    """The outcome of a program; what fails is kept, as small as it can be made."""
    parts = choices.drawn(seed)
    given = program(parts)
    outcome, said = run(given)
    if outcome not in KEPT:
        return outcome
    notes = given.notes
    if outcome in FAILURES:
        notes = choices.minimised(notes, lambda smaller: outcome_of(smaller) is outcome)
        small = program(choices.noted(notes))
        given, notes = small, small.notes
        said = run(given)[1]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{outcome.value}_{seed}.json"
    lines = {"seed": seed, "notes": notes, "program": str(given).split("\n")}
    path.write_text(json.dumps({**lines, "said": said.split("\n")}, indent=1) + "\n")
    print(f"seed {seed}: {outcome.value}, kept in {path}", flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
