"""A hundred of the programs of `make fuzz`, and how it makes a program smaller."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.fuzz import __main__ as command
from tests.fuzz import choices, programs
from tests.fuzz.programs import Outcome, Program, program, run

FINE = (Outcome.RIGHT, Outcome.REFUSED)


@pytest.mark.parametrize("seed", range(0, 100, 5))
def test_gradients_of_random_programs_equal_stacked_gradients(seed):
    for of_program in range(seed, seed + 5):
        given = program(choices.drawn(of_program))
        outcome, said = run(given)
        assert outcome in FINE, f"seed {of_program}\n{given}\n{said}"


# Text of a program, and its notes: stacked gradients, as XLA makes them, are not those
# of the environments alone.
NOT_BY_VMAP = {
    "'feature_group_count': 4}": [
        [3, 4, 3, 7, 26182, 0, 1, 0, 1, 0, 7, 5, 3, 0, 1],
        [18, 2, 1, 2, 1, 1, 0, 0, 0, 0, 0, 1, 1],
    ],
    "patches of (2, 4), VALID plain -> (1, 2, 0, 2)": [
        [0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0],
        [0, 0, 0, 0],
        [33, 1, 3, 1, 1, 0],
    ],
}


@pytest.mark.parametrize("text", NOT_BY_VMAP, ids=["groups", "nothing_behind"])
def test_broken_environment_is_held_to_its_own_gradient(text):
    given = program(choices.noted(NOT_BY_VMAP[text]))
    assert text in str(given)
    assert given.broken == 0
    outcome, said = run(given)
    assert outcome is Outcome.RIGHT, f"{given}\n{said}"


# Text of a program, and its notes.
FOUND = {
    "branch_in_float64": (
        "patches of (5,), VALID in_cond",
        [
            [3, 0, 4, 0, 0, 3, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 2, 4, 6, 0, 2],
            [33, 4, 0, 1, 7],
        ],
    ),
    "group_in_a_branch": (
        "'feature_group_count': 2",
        [
            [1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0],
            [31, 0],
            [18, 2, 1, 0, 0, 1, 1, 0, 1, 7],
        ],
    ),
    "weight_without_inputs": (
        "without_inputs -> (1, 2)",
        [[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [31, 0]],
    ),
    "nothing_but_rounding": (
        "bias in_scan",
        [[0, 1, 2, 9, 0, 0, 0, 1, 3, 0, 5, 6, 8, 0, 2], [31, 0], [11, 6], [15]],
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_program_that_was_found_wrong(case):
    text, notes = FOUND[case]
    given = program(choices.noted(notes))
    assert text in str(given)
    outcome, said = run(given)
    # The last is either, as XLA pleases.
    fine = (Outcome.RIGHT, Outcome.ROUNDING) if "rounding" in case else FINE
    assert outcome in fine, f"{given}\n{said}"


def test_rounding_is_no_excuse_for_a_gradient_where_there_is_none(monkeypatch):
    _, notes = FOUND["nothing_but_rounding"]
    right = programs._fused

    def moved(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf) + leaf.dtype.type(1) if floating else leaf

    def shifted(given, batch):
        losses, answers = right(given, batch)
        return losses, jax.tree.map(moved, answers)

    monkeypatch.setattr(programs, "_fused", shifted)
    assert run(program(choices.noted(notes)))[0] is Outcome.WRONG


def test_noted_choices_give_the_same_program():
    parts = choices.drawn(7)
    first = program(parts)
    again = program(choices.noted(first.notes))
    assert str(again) == str(first)
    assert again.notes == first.notes
    assert str(program(choices.drawn(8))) != str(first)


def test_minimised_program_keeps_what_makes_it_fail():
    tried = []

    def fails(notes):
        tried.append(notes)
        return any(5 in of_part for of_part in notes[1:])

    notes = [[3, 1], [2, 2], [4, 5, 9], [7]]
    assert choices.minimised(notes, fails) == [[0, 0], [0, 5, 0]]
    assert len(tried) < 80
    assert choices.minimised(notes, fails, attempts=0) == notes


def test_command_keeps_the_smallest_program_that_fails(tmp_path, monkeypatch, capsys):
    def fails_with_a_layer(given: Program):
        layers = len(given.network.names) - 2
        return (Outcome.CRASH, "no way") if layers else (Outcome.RIGHT, "")

    for module in ("tests.fuzz.__main__", "tests.fuzz.programs"):
        monkeypatch.setattr(f"{module}.run", fails_with_a_layer)
    arguments = ["--programs", "1", "--seed", "3", "--out", str(tmp_path)]
    assert command.main(arguments)
    (kept,) = tmp_path.iterdir()
    found = json.loads(kept.read_text())
    assert found["seed"] == 3
    assert found["said"] == ["no way"]
    # Without parameters a network is given a layer.
    assert len(found["program"]) == 4
    printed = capsys.readouterr().out
    assert f"seed 3: crash, kept in {kept}" in printed
    assert "1 crash" in printed
    assert command.main(["--replay", str(kept)])
