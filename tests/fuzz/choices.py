"""What is picked at random, noted so that it can be picked again."""

import random


class Choices:
    """Picks one of several options, of which the first is the simplest.

    Attributes:
      notes: which option was picked each time.

    Args:
      rng: for what `noted` does not say; None for the first option.
      noted: of another one, to be picked again.
    """

    def __init__(self, rng=None, noted=()):
        self.notes = []
        self._rng, self._noted = rng, tuple(noted)

    def __call__(self, options):
        at = len(self.notes)
        if at < len(self._noted):
            index = self._noted[at] % len(options)
        else:
            index = 0 if self._rng is None else self._rng.randrange(len(options))
        self.notes.append(index)
        return options[index]


def drawn(seed):
    """`Choices` for a whole program and for each of its layers."""
    rng = random.Random(seed)
    return [Choices(rng) for _ in range(1 + rng.randint(1, 5))]


def noted(notes):
    """As `drawn`, of a program that is known."""
    return [Choices(noted=of_part) for of_part in notes]


def minimised(notes, fails, attempts=80):
    """Notes of a smaller program that fails as well.

    Args:
      notes: of a program that fails.
      fails: whether the program of other notes does.
      attempts: at most so many programs are tried.
    """
    notes = [list(of_part) for of_part in notes]
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(notes):
            if attempts == 0:
                return notes
            attempts -= 1
            if fails(candidate):
                notes, smaller = candidate, True
                break
    return notes


def _smaller(notes):
    """Notes with a layer less, then with a simpler option."""
    for i in range(len(notes) - 1, 0, -1):
        yield notes[:i] + notes[i + 1 :]
    for i, of_part in enumerate(notes):
        for j, index in enumerate(of_part):
            for simpler in sorted({0, index // 2, index - 1}):
                if 0 <= simpler < index:
                    changed = [*of_part[:j], simpler, *of_part[j + 1 :]]
                    yield [*notes[:i], changed, *notes[i + 1 :]]
