"""Values beside the loss: their slopes, finite or not, are nobody's business."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hardvary
from hardvary.fused.liveness import FLAT
from tests.fused._stacked import assert_equals_stacked, floats

# At zero its slope is infinite, and 0 times infinity is NaN.
ROOT = jnp.sqrt


def fit(w, x):
    return jnp.mean((x @ w - 1) ** 2)


def norm(w):
    return jnp.linalg.norm(w)


def carried(x, w):
    # The metric goes from step to step beside the state, and never into it.
    def step(carry, x):
        state, metric = carry
        return (jnp.tanh(state + x @ w), metric + x @ ROOT(w)), x @ ROOT(w)

    (state, metric), every = lax.scan(step, (jnp.float32(0), jnp.float32(0)), x)
    return state, (metric, every)


def branches(x, w):
    metric = lax.cond(x[0, 0] > 0, lambda: x @ ROOT(w), lambda: x @ w)
    return fit(w, x), metric


def called(x, w):
    both = jax.jit(lambda w, x: (fit(w, x), jnp.mean(x @ ROOT(w))))
    return both(w, x)


def rematerialised(x, w):
    both = jax.checkpoint(lambda w, x: (fit(w, x), jnp.mean(x @ ROOT(w))))
    return both(w, x)


def last_of_two_loops(x, w):
    # Of the inner loop's carries only one is looked at.
    def outer(h, x):
        def inner(carry, _):
            h, metric = carry
            return (jnp.tanh(h + x @ w), metric * (x @ ROOT(w))), None

        (h, metric), _ = lax.scan(inner, (h, h), None, length=2)
        return h, metric

    return lax.scan(outer, jnp.float32(0), x)


def counted(x, w):
    # A loop that nothing differentiates, of a length that the batch decides.
    def step(state):
        i, metric = state
        return i + 1, metric + jnp.sum(x @ ROOT(w))

    stop = lambda state: state[0] < jnp.sum(x[:, 0] > 0)  # noqa: E731
    return fit(w, x), lax.while_loop(stop, step, (0, jnp.float32(0)))[1]


AUX = {
    "ratio": lambda w, x: (fit(w, x), jnp.mean(x @ w) / (norm(w) + 1e-8)),
    "norm_times_the_batch": lambda w, x: (fit(w, x), norm(w) * jnp.mean(x)),
    "norm_alone": lambda w, x: (fit(w, x), norm(w)),
    "root_in_a_product": lambda w, x: (fit(w, x), x @ ROOT(w)),
    "rows_of_a_table": lambda w, x: (
        fit(w, x),
        ROOT(w)[jnp.argmax(x, 1)] * jnp.mean(x),
    ),
    "carried": lambda w, x: carried(x, w),
    "branches": lambda w, x: branches(x, w),
    "called": lambda w, x: called(x, w),
    "rematerialised": lambda w, x: rematerialised(x, w),
    "loop_in_a_loop": lambda w, x: last_of_two_loops(x, w),
    "while": lambda w, x: counted(x, w),
    "several": lambda w, x: (fit(w, x), {"a": [x @ ROOT(w), None], "b": norm(w)}),
}


@pytest.mark.parametrize("loss", AUX.values(), ids=AUX)
def test_metric_with_an_infinite_slope_leaves_the_gradient_alone(loss):
    grads = assert_equals_stacked(
        loss, jnp.zeros(3), floats(4, 2, 3, seed=1), has_aux=True
    )
    assert np.isfinite(grads).all()
    assert np.any(grads)


def flat(function):
    """A loss with a term of which the derivative is zero wherever there is one."""
    return lambda w, x: fit(w, x) + jnp.mean(function(x @ ROOT(w)))


BESIDE = {
    "stopped": flat(lax.stop_gradient),
    "floor": flat(jnp.floor),
    "ceil": flat(jnp.ceil),
    "round": flat(jnp.round),
    "sign": flat(jnp.sign),
    "integer": flat(lambda y: y.astype(jnp.int32).astype(jnp.float32)),
    "comparison": flat(lambda y: (y > 0).astype(jnp.float32)),
    "argmax": flat(lambda y: jnp.float32(jnp.argmax(y))),
    "predicate": flat(lambda y: jnp.where(y > 0, 1.0, 2.0)),
    "stopped_parameter": lambda w, x: (
        fit(w, x) + jnp.mean(x @ lax.stop_gradient(ROOT(w)))
    ),
    "scan_of_no_steps": lambda w, x: (
        fit(w, x)
        + lax.scan(lambda c, _: (c + jnp.sum(x @ ROOT(w)), None), 0.0, None, length=0)[
            0
        ]
    ),
}


@pytest.mark.parametrize("loss", BESIDE.values(), ids=BESIDE)
def test_term_without_a_gradient_leaves_that_of_others_alone(loss):
    grads = assert_equals_stacked(loss, jnp.zeros(3), floats(4, 2, 3, seed=1))
    assert np.isfinite(grads).all()


def test_operations_of_zero_slope_are_those_of_jax():
    # Of floating-point values of a floating-point value: others have no gradient.
    for function in (lax.floor, lax.ceil, lax.round, lax.sign, lax.stop_gradient):
        (eqn,) = jax.make_jaxpr(function)(1.0).eqns
        assert eqn.primitive.name in FLAT


@pytest.mark.parametrize(
    "metric",
    [
        lambda w, x: x @ w,
        lambda w, x: lax.scan(lambda h, x: (h @ w, h), x[0], x)[1],
        lambda w, x: jnp.fft.fft(w),
        lambda w, x: jnp.sum(w**2),
    ],
    ids=["product", "loop", "without_rule", "alone"],
)
def test_parameter_with_metrics_only_is_unused(metric):
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"])), metric(p["v"], x)

    params = {"v": floats(4, 4), "w": floats(4, 5, seed=1)}
    rows = hardvary.explain(loss, params, floats(6, 3, 4), has_aux=True).parameters
    assert [row.rule for row in rows] == ["unused", "stack"]
    assert "no gradient" in rows[0].reason


def test_metrics_do_not_change_the_rule_of_a_parameter():
    def loss(w, x):
        y = x @ w
        return jnp.sum(jnp.tanh(y)), {"norm": norm(w), "again": jnp.mean(x @ w)}

    x = floats(6, 70)
    (row,) = hardvary.explain(loss, floats(70, 80), x, has_aux=True).parameters
    assert row.rule == "product"
    assert_equals_stacked(loss, floats(70, 80), x, has_aux=True)


def test_metrics_cost_no_memory_of_gradients():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w)), jnp.sum(jnp.fft.fft(w).real * x[:, None])

    def temporary_bytes(function):
        args = jax.ShapeDtypeStruct((64, 64), jnp.float32), jnp.ones((32, 64))
        compiled = jax.jit(function).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    both = temporary_bytes(hardvary.grad_stats(loss, has_aux=True))
    gradients = temporary_bytes(hardvary.grad_stats(lambda w, x: loss(w, x)[0]))
    metric = temporary_bytes(jax.vmap(lambda w, x: loss(w, x)[1], (None, 0)))
    # Two copies of the parameter in complex64 more.
    assert both <= gradients + metric + 2 * 64 * 64 * 8
