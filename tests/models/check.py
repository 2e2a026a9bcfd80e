"""One architecture: built, asked for everything, and compared; `examine` is it all.

`python -m tests.models.check FAMILY NAME...` prints a line of JSON for each. It is a
process of its own, so that whatever a package does ends nobody else's check.
"""

import collections
import json
import math
import sys
import time
import traceback

import jax
import numpy as np

import hardvary
from hardvary.fused import rules
from tests.fused._answers import ask, check_answers, signed_weights
from tests.fused._precision import PRECISIONS, allowed, at
from tests.models.table import FAMILIES, build
from tests.zoo import Stacked, compile_quickly

SEED = 0
# What may be seen, best first. Only the first two are right; where most signs are
# rounding, as the third says, equality would say little.
OUTCOMES = ("equal", "refused", "undecided", "wrong", "crashed", "not run")


def examine(family, name):
    """What the fused oracle makes of an architecture.

    Returns:
      A dict that JSON can hold: `outcome` of `OUTCOMES`; `detail`, the message where it
      isn't `"equal"`; `components`, `leaves` of the parameters; `rules`, components by
      rule; `fallbacks`, reasons why parameters are stacked whatever their size, with
      the number of parameters; `decided`, the share of signs that are beyond rounding;
      `seconds`.
    """
    start = time.perf_counter()
    found = {"family": family, "name": name, "outcome": "not run", "detail": ""}
    try:
        found["versions"] = {"jax": jax.__version__} | FAMILIES[family].versions()
        _examine(FAMILIES[family].architectures[name], build(family, name), found)
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [""]
        found["detail"] = f"{type(error).__name__}: {first}"
        traceback.print_exc()
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def _examine(architecture, model, found):
    """Fills `found`; its outcome is what an error from the next step would mean."""
    params, loss_fn, batch = model(np.random.default_rng(SEED))
    rounding = model.rounding
    precision = "float64" if architecture.double else "float32"
    with allowed(precision), model.promotion():
        if architecture.double:
            rounding = PRECISIONS["float64"]
            params, loss_fn, batch = at("float64", params, loss_fn, batch)
        expected = Stacked(loss_fn, params, batch)

        found["outcome"] = "crashed"
        try:
            explanation = hardvary.explain(loss_fn, params, batch)
            signed = signed_weights(len(expected.losses))
            losses, answers = _answers(loss_fn, params, batch, signed)
        except ValueError as error:
            if "method=" in str(error):
                found["outcome"] = "refused"
            raise
        found |= _described(explanation)

        found["outcome"] = "wrong"
        scale = np.abs(expected.losses).max()
        np.testing.assert_allclose(
            losses, expected.losses, rtol=0, atol=2 * rounding * scale
        )
        found["decided"] = float(
            check_answers(answers, params, expected, signed, rounding=rounding)
        )
        found["outcome"] = "equal"
        if found["decided"] < model.decided:
            found["outcome"] = "undecided"
            found["detail"] = f"{found['decided']:.0%} of the signs are beyond rounding"


def _answers(loss_fn, params, batch, signed):
    @compile_quickly
    def run(params, batch, signed):
        losses, grads = hardvary.value_and_env_grads(loss_fn)(params, batch)
        return losses, ask(grads, signed)

    return run(params, batch, signed)


def _described(explanation):
    by_rule, fallbacks = collections.Counter(), collections.Counter()
    for row in explanation.parameters:
        by_rule[row.rule] += math.prod(row.shape)
        if row.rule == "stack":
            fallbacks[row.reason] += 1
    return {
        "components": sum(by_rule.values()),
        "leaves": len(explanation.parameters),
        "rules": dict(by_rule),
        "fallbacks": dict(fallbacks),
    }


if __name__ == "__main__":
    # Sizes are small here. At their real ones nothing but biases and scales would be
    # small enough to be stacked for that alone.
    rules.SMALL = 0
    _, its_family, *its_names = sys.argv
    # What packages print would be in the way.
    answers, sys.stdout = sys.stdout, sys.stderr
    for its_name in its_names:
        print(json.dumps(examine(its_family, its_name)), file=answers, flush=True)
