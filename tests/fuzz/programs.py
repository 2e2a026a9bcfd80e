"""One random program, by the fused oracle and by the definition."""

import contextlib
import copy
import dataclasses
import enum
import traceback
from unittest import mock

import jax
import numpy as np

import hardvary
from hardvary.fused import rules
from tests._inputs import STATISTICS
from tests.fused._answers import ask, check_answers, signed_weights
from tests.fused._precision import PRECISIONS, allowed, at
from tests.fuzz import choices
from tests.fuzz.networks import Network, network
from tests.zoo import (
    Stacked,
    assert_stats_match,
    compile_quickly,
    fields_by_path,
    poison,
)
from tests.zoo.compare import (
    assert_combinations_match,
    assert_gramians_match,
    assert_norms_match,
    by_path,
    present_of,
)

FLOAT32 = 1e-5


class Outcome(enum.Enum):
    RIGHT = "right"
    # Refused by an error that names a method that takes the loss.
    REFUSED = "refused"
    # Beyond what rounding may do, but not in float64, where XLA convolves NaN with
    # padding another way, too; or in float64, where gradients are nothing but rounding.
    ROUNDING = "rounding"
    WRONG = "wrong"
    CRASH = "crash"
    # JAX itself does not take the loss.
    NO_PROGRAM = "no program"


@dataclasses.dataclass
class Program:
    """A network, and what is asked of its gradients under which circumstances.

    Attributes:
      network: the network.
      notes: what was picked.
      weights: of the environments, or None. One of weight 0 holds NaN.
      broken: an environment that counts and holds NaN, or None.
      microbatch_size: None for all answers of an `EnvGrad`.
      precision: of `PRECISIONS`, or None for float32.
      small: size below which gradients are stacked.
      elements: that inner products may hold at once, or None for what is usual.
    """

    network: Network
    notes: list
    weights: np.ndarray | None
    broken: int | None
    microbatch_size: int | None
    precision: str | None
    small: int
    elements: int | None

    def __str__(self):
        fields = dataclasses.asdict(dataclasses.replace(self, network=None, notes=None))
        settings = ", ".join(
            f"{name} {value}" for name, value in fields.items() if value is not None
        )
        return "\n".join([settings, *self.network.names])


def program(parts):
    """Of `choices.drawn` or `choices.noted`."""
    head, *layers = parts
    with _promoting():
        drawn = network(head, layers)
    num_envs = drawn.num_envs
    weights = None
    if head([False, True]):
        weights = [head([1.0, 0.0, 0.5, 2.0, 3.0]) for _ in range(num_envs)]
        weights = np.array(weights if any(weights) else [1.0] * num_envs, np.float32)
    present = range(num_envs) if weights is None else np.flatnonzero(weights).tolist()
    divisors = [size for size in range(1, num_envs + 1) if num_envs % size == 0]
    result = Program(
        drawn,
        [],
        weights,
        broken=head([None] * 7 + [*present[:1]]),
        microbatch_size=head([None] * 8 + divisors[:3]),
        precision=head([None] * 6 + list(PRECISIONS)),
        small=head([0, rules.SMALL]),
        elements=head([None, None, 8]),
    )
    result.notes = [part.notes for part in parts]
    return result


def run(given):
    """`(outcome, what happened)` of a `Program`."""
    try:
        expected, batch = _definition(given)
    except Exception:
        return Outcome.NO_PROGRAM, traceback.format_exc()
    try:
        found = _fused(given, batch)
    except Exception as error:
        if isinstance(error, ValueError) and "method=" in str(error):
            return Outcome.REFUSED, str(error)
        return Outcome.CRASH, traceback.format_exc()
    try:
        _compare(given, found, expected)
    except Exception:
        # A leaf of another shape, too, is a wrong answer.
        said = traceback.format_exc()
        if given.precision == "float64":
            rounding = _is_rounding(given, found, expected)
        else:
            exact = dataclasses.replace(given, precision="float64")
            rounding = run(exact)[0] in (Outcome.RIGHT, Outcome.ROUNDING)
        if rounding:
            return Outcome.ROUNDING, said
        return Outcome.WRONG, said
    return Outcome.RIGHT, ""


def outcome_of(notes):
    """Of the program of these notes; what cannot be built is none."""
    try:
        given = program(choices.noted(notes))
    except Exception:
        return Outcome.NO_PROGRAM
    return run(given)[0]


@contextlib.contextmanager
def _promoting():
    """Dtypes and ranks are promoted, which tests/conftest.py forbids."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@contextlib.contextmanager
def _precision(given):
    with contextlib.ExitStack() as stack:
        stack.enter_context(_promoting())
        if given.precision is not None:
            stack.enter_context(allowed(given.precision))
        yield


def _model(given):
    model = given.network.params, given.network.loss_fn, given.network.batch
    return model if given.precision is None else at(given.precision, *model)


def _definition(given):
    with _precision(given):
        params, loss_fn, batch = _model(given)
        if given.broken is not None:
            batch = poison(batch, given.broken)
        # Compiled quickly, XLA adds rows at narrow indices to the wrong ones.
        wide = {
            name: leaf.astype(np.int32) if name == "ids" else leaf
            for name, leaf in batch.items()
        }
        expected = Stacked(loss_fn, params, wide)
        if given.broken is not None:
            # Mapped over environments, XLA's convolutions multiply NaN by zeros that
            # are none of the environment's: of other environments, where there are
            # groups, and of padding.
            expected.grads = expected.one_by_one
            if given.network.is_cut:
                # JAX pulls zeros from an array without entries, and an input of NaN
                # makes NaN of them; the fused oracle pulls nothing.
                whole = {**wide, "x": _model(given)[2]["x"]}
                expected.grads = Stacked(loss_fn, params, whole).grads
        if given.weights is not None and 0 in given.weights:
            batch = poison(batch, int(np.argmin(given.weights)))
    return expected, batch


def _fused(given, batch):
    with contextlib.ExitStack() as stack:
        stack.enter_context(_precision(given))
        stack.enter_context(mock.patch.object(rules, "SMALL", given.small))
        if given.elements is not None:
            few = mock.patch.object(rules.Rule, "elements", return_value=given.elements)
            stack.enter_context(few)
        params, loss_fn, _ = _model(given)

        @compile_quickly
        def answers(params, batch, signed, weights):
            if given.microbatch_size is None:
                oracle = hardvary.value_and_env_grads(loss_fn)
                losses, grads = oracle(params, batch, env_weights=weights)
                return losses, ask(grads, signed)
            oracle = hardvary.value_and_grad_stats(
                loss_fn, stats=STATISTICS, microbatch_size=given.microbatch_size
            )
            return oracle(params, batch, env_weights=weights)

        signed = signed_weights(given.network.num_envs)
        return jax.block_until_ready(answers(params, batch, signed, given.weights))


def _is_rounding(given, found, expected):
    """Whether all gradients, and the means that were found, cancel to nothing."""
    losses, answers = found
    with _precision(given):
        params, *_ = _model(given)
    stats = answers["stats"] if given.microbatch_size is None else answers
    means = [of["mean"] for of in fields_by_path(stats, params).values()]
    largest = max(
        np.max(np.abs(x), initial=0) for x in (*expected.grads.values(), *means)
    )
    # What cancels is of the size of the activations: one.
    scale = np.max(np.abs(losses), initial=1)
    return largest < 4 * np.finfo(np.float64).eps * scale


def _compare(given, found, expected):
    losses, answers = found
    weights = given.weights
    rounding = PRECISIONS.get(given.precision, FLOAT32)
    present = slice(None) if weights is None else weights > 0
    np.testing.assert_allclose(
        np.asarray(losses, np.float64)[present],
        expected.losses[present],
        rtol=2 * rounding,
        atol=2 * rounding * np.nanmax(np.abs(expected.losses), initial=0),
    )
    with _precision(given):
        params, *_ = _model(given)
        signed = signed_weights(given.network.num_envs)
        whole = given.microbatch_size is None
        fields = None if whole else fields_by_path(answers, params)
        if given.broken is not None:
            _compare_broken(given, answers, fields, params, expected, signed, rounding)
        elif fields is not None:
            assert_stats_match(fields, params, expected, weights, rounding)
        else:
            check_answers(answers, params, expected, signed, weights, rounding)


def _compare_broken(given, answers, fields, params, expected, signed, rounding):
    """As `check_answers`, where an environment that counts has no finite gradient.

    What it reaches must be no number, and all else what it is without it.
    """
    weights = given.weights
    rest = (weights, rounding)
    present = present_of(weights, given.network.num_envs)
    broken = {
        path: ~np.isfinite(grad) & present.reshape(-1, *[1] * (grad.ndim - 1))
        for path, grad in expected.grads.items()
    }
    components = {path: bad.any(0) for path, bad in broken.items()}
    if fields is None:
        fields = fields_by_path(answers["stats"], params)
    healed = {
        path: {
            name: leaf
            if name == "num_envs"
            else _healed(
                leaf, components[path], np.log(1e-10) if "log" in name else 0, name
            )
            for name, leaf in of_path.items()
        }
        for path, of_path in fields.items()
    }
    assert_stats_match(healed, params, _with_zeros(expected, components), *rest)
    if given.microbatch_size is not None:
        return
    counted = {
        path: (bad & (signed != 0).reshape(-1, *[1] * (bad.ndim - 1))).any(0)
        for path, bad in broken.items()
    }
    combined = {
        path: _healed(leaf, counted[path], 0, f"combination of {path}")
        for path, leaf in by_path(answers["combine"]).items()
    }
    assert_combinations_match(combined, _with_zeros(expected, counted), signed, *rest)
    envs = {path: bad.reshape(len(bad), -1).any(1) for path, bad in broken.items()}
    rows = {
        path: bad.reshape(-1, *[1] * (broken[path].ndim - 1))
        for path, bad in envs.items()
    }
    without = _with_zeros(expected, rows)
    both = np.logical_and.outer(present, present)
    gramians = {
        path: _healed(
            leaf,
            np.logical_or.outer(envs[path], envs[path]) & both,
            0,
            f"gramian of {path}",
        )
        for path, leaf in by_path(answers["gramian"]).items()
    }
    assert_gramians_match(gramians, without, *rest)
    norms = {
        path: _healed(leaf, envs[path], 0, f"norms of {path}")
        for path, leaf in by_path(answers["norms"]).items()
    }
    assert_norms_match(norms, without, *rest)


def _healed(leaf, broken, value, what):
    """`leaf` with a value where it is no number, which must be where it is broken."""
    leaf = np.array(leaf)
    np.testing.assert_array_equal(~np.isfinite(leaf), broken, what)
    leaf[broken] = value
    return leaf


def _with_zeros(expected, where):
    """`Stacked` with gradients of zero there, and where there are none at all."""
    result = copy.copy(expected)
    result.grads = {
        path: np.where(where[path] | ~np.isfinite(grad), 0, grad)
        for path, grad in expected.grads.items()
    }
    return result
