"""Gradients as they are for inputs without a scale or a correlation of their own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from hardvary import _validate, sharding
from hardvary._env_grads import forms
from hardvary._env_grads.env_grad import EnvGrad
from hardvary._typing import PyTree
from hardvary.fused.explain import Explanation

# From a parameter to the number of inputs of the layer that it is the weights of, or
# what `explain` found for all of them.
InputsOf = Callable[[Any], int | None] | Explanation


class Whitening(NamedTuple):
    """What is known of one layer's inputs; None at parameters without.

    Attributes:
      moment: `[input, input]`, average of the second moment, without its correction for
        the start at 0.
      share: scalar, what that average is to be divided by.
      root: `[input, input]`, R with `R R^T` the inverse of the damped moment.
    """

    moment: jax.Array
    share: jax.Array
    root: jax.Array


class WhitenInputsState(NamedTuple):
    """State of `whiten_inputs`.

    Attributes:
      whiten_count: int32 scalar, number of updates so far.
      layers: a list like the leaves of the parameters, of `Whitening` or None.
      inner: state of the aggregator inside.
    """

    whiten_count: jax.Array
    layers: list[Whitening | None]
    inner: Any


def all_axes_but_the_last(param: Any) -> int | None:
    """The number of inputs of a kernel [..., in, out], as Flax and Haiku have them."""
    shape = np.shape(param)
    return int(np.prod(shape[:-1])) if len(shape) > 1 else None


def whiten_inputs(
    aggregator: optax.GradientTransformationExtraArgs,
    *,
    damping: ArrayLike = 1e-3,
    decay: ArrayLike = 0.9,
    every: int = 20,
    max_inputs: int = 1024,
    inputs_of: InputsOf = all_axes_but_the_last,
) -> optax.GradientTransformationExtraArgs:
    r"""An aggregator that works on gradients for whitened inputs, layer by layer.

    .. math::
      u = R \, a(R^\top g_1, \dots, R^\top g_E), \qquad
      R R^\top = \Big(A + \delta \, \frac{\operatorname{tr} A}{d} I\Big)^{-1}, \qquad
      A = \mathbb{E}[x x^\top]

    for the weights :math:`[d, out]` of a layer with inputs x (patches, of a
    convolution) and the aggregator a. With a rule by inner products the function that
    is trained is then the same, whatever invertible matrix the layer's inputs were
    multiplied by (damping apart). A mean turns into a step of natural gradient on the
    inputs' side. Parameters of which no such inputs are known go through as they are:
    biases, tables, weights that are used twice, in grouped convolutions, or inside of
    `jax.checkpoint`, `scan` over layers and branches. `explain` shows which.

    What follows in the chain must not look at single weights, or at the size of an
    update, which depends on the matrix: momentum does not. Adam divides every weight by
    its own size, which brings the basis back. A step size per layer belongs inside,
    where it sees no matrix, and without a memory, whose coordinates would turn at every
    refresh: `whiten_inputs(optax.chain(upgrad(), optax.clip_by_block_rms(1.0)))`.

    Args:
      aggregator: any transformation of this library that takes `EnvGrad`.
      damping: :math:`\delta` >= 0, relative to the mean eigenvalue of A. With 0, for
        full batches, steps are as large along inputs that hardly vary as elsewhere.
      decay: in [0, 1), of the average of A over time, each time that it is refreshed;
        corrected for its start at 0.
      every: updates from one refresh of A and R to the next; the first is one. Costs a
        product rows x input x input and a Cholesky factor of A.
      max_inputs: layers with more inputs go without; the state of a layer is two
        matrices `[input, input]`.
      inputs_of: what `explain(loss_fn, params, batch)` returned, or a function from a
        parameter to the number of inputs that its layer has, None for none. Unless
        given, kernels are [..., in, out]; those of attention in Flax are not.

    Returns:
      A transformation with state `WhitenInputsState` that takes a tree of `EnvGrad`;
      extra arguments go to the aggregator.

    Raises:
      TypeError: an aggregator that is no transformation, a damping or decay that is no
        real scalar, an `every` or `max_inputs` that is no integer, an `inputs_of` that
        is neither an Explanation nor callable; (tracing) gradients in another form, as
        the aggregator.
      ValueError: a negative, infinite or NaN damping, a decay outside [0, 1), an
        `every` or `max_inputs` below 1; (tracing) a layer with another number of
        inputs than `inputs_of` says, no layer with known inputs at all, gradients that
        are whitened already, as the aggregator.

    Edge cases:
      ==========================  ==================================================
      NaN or infinity             in inputs: the refresh is skipped
      an environment of weight 0  its inputs do not count
      and_mask and others by      see gradients for inputs of which each is taken less
      component inside            the ones before it: their order matters
      low precision               moments and roots are in at least float32, what they
                                  are multiplied with stays in the layer's dtype
      ==========================  ==================================================

    Example:
      >>> import jax, jax.numpy as jnp, optax, hardvary
      >>> loss = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
      >>> x = jnp.array([[[10.0, 0.0]], [[0.0, 0.5]]])  # [env, example, feature]
      >>> y = jnp.array([[[1.0]], [[1.0]]])
      >>> rule = hardvary.whiten_inputs(hardvary.upgrad(), damping=0.0)
      >>> tx = optax.chain(rule, optax.sgd(0.5))
      >>> @jax.jit
      ... def step(w, state):
      ...     losses, grads = hardvary.value_and_env_grads(loss)(w, (x, y))
      ...     updates, state = tx.update(grads, state, w)
      ...     return optax.apply_updates(w, updates), losses
      >>> w = jnp.zeros((2, 1))
      >>> w, losses = step(w, tx.init(w))
      >>> [round(v, 3) for v in w[:, 0].tolist()]
      [0.1, 2.0]

    References:
      Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored
      Approximate Curvature <https://arxiv.org/abs/1503.05671>`_, ICML 2015: the inputs'
      factor.

    Warning:
      Must come first in an `optax.chain`.
    """
    if not isinstance(aggregator, optax.GradientTransformation):
        raise TypeError(
            "aggregator must be a transformation such as hardvary.upgrad(), got "
            f"{aggregator!r}"
        )
    _validate.scalar("damping", damping, rule=">= 0")
    _validate.finite_at_least("damping", damping, 0.0)
    _validate.decay_rate("decay", decay)
    _validate.whole_number("every", every, 1)
    _validate.whole_number("max_inputs", max_inputs, 1)
    if not isinstance(inputs_of, Explanation) and not callable(inputs_of):
        raise TypeError(
            "inputs_of must be what explain(loss_fn, params, batch) returned, or a "
            f"function of a parameter, got {inputs_of!r}"
        )
    inside = optax.with_extra_args_support(aggregator)

    def start(path: Any, param: Any) -> Whitening | None:
        if isinstance(inputs_of, Explanation):
            size = _explained(inputs_of, path)
        else:
            size = inputs_of(param)
        if size is None or size > max_inputs:
            return None
        dtype = _validate.wide(jnp.result_type(param))
        zeros, identity = jnp.zeros((size, size), dtype), jnp.eye(size, dtype=dtype)
        return Whitening(zeros, jnp.zeros((), dtype), identity)

    def init_fn(params: PyTree) -> WhitenInputsState:
        layers = [start(*pair) for pair in jax.tree.leaves_with_path(params)]
        return WhitenInputsState(
            jnp.zeros((), jnp.int32), layers, aggregator.init(params)
        )

    def refreshed(layer: Whitening, moment: jax.Array) -> Whitening:
        rate = jnp.asarray(decay).astype(moment.dtype)
        average = rate * layer.moment + (1 - rate) * moment
        share = rate * layer.share + (1 - rate)
        root = inverse_root(average / share, damping)
        known = jnp.all(jnp.isfinite(average)) & jnp.all(jnp.isfinite(root))
        new = Whitening(average, share, root)
        return jax.tree.map(lambda new, old: jnp.where(known, new, old), new, layer)

    def update_fn(
        updates: PyTree,
        state: WhitenInputsState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, WhitenInputsState]:
        paths = jax.tree.leaves_with_path(updates, is_leaf=forms.is_leaf)
        treedef = jax.tree.structure(updates, is_leaf=forms.is_leaf)
        leaves = [leaf for _, leaf in paths]
        for (path, leaf), layer in zip(paths, state.layers, strict=True):
            _check(path, leaf, layer)
        used = [
            layer is not None and leaf.num_inputs is not None
            for leaf, layer in zip(leaves, state.layers, strict=True)
        ]
        if not any(used):
            raise ValueError(
                "whiten_inputs: of no parameter here is it known what inputs it meets, "
                f"in a layer with at most max_inputs={max_inputs} known to inputs_of: "
                "pass inputs_of=hardvary.explain(loss_fn, params, batch) and print it; "
                "value_and_env_grads with a microbatch_size and "
                "value_and_env_grads_of_losses know no inputs"
            )

        def refresh(layers: list[Any]) -> list[Any]:
            return [
                refreshed(layer, leaf.input_moment().astype(layer.moment.dtype))
                if met
                else layer
                for layer, leaf, met in zip(layers, leaves, used, strict=True)
            ]

        count = state.whiten_count
        # Made inside of a shard_map, a state varies over fewer of its axes than inputs.
        known = [leaf for leaf, met in zip(leaves, used, strict=True) if met]
        moments = jax.eval_shape(lambda: [leaf.input_moment() for leaf in known])
        layers = sharding.vary_like(state.layers, moments)
        layers = jax.lax.cond(count % every == 0, refresh, lambda same: same, layers)
        whitened = [
            leaf._whitened(layer.root) if met else leaf
            for leaf, layer, met in zip(leaves, layers, used, strict=True)
        ]
        updates, inner = inside.update(
            jax.tree.unflatten(treedef, whitened), state.inner, params, **extra_args
        )
        results = [
            leaf._times(layer.root, update) if met else update
            for leaf, layer, update, met in zip(
                leaves, layers, jax.tree.leaves(updates), used, strict=True
            )
        ]
        state = WhitenInputsState(optax.safe_increment(count), layers, inner)
        return jax.tree.unflatten(treedef, results), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def inverse_root(moment: jax.Array, damping: Any) -> jax.Array:
    """R with `R R^T = (A + damping tr(A)/d I)^-1`, `[input, input]`.

    From a Cholesky factor: in float32 eigenvectors leave a thousandth, and take ten
    times as long. Correlations are always damped by a few roundings, for directions
    without any input.
    """
    size = len(moment)
    scale = jnp.trace(moment) / size
    scale = jnp.where(scale > 0, scale, 1)
    identity = jnp.eye(size, dtype=moment.dtype)
    damped = moment / scale + jnp.asarray(damping).astype(moment.dtype) * identity
    # What is left to factor are correlations, whatever the scales of the inputs.
    diagonal = jnp.diagonal(damped)
    lengths = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    correlations = damped / lengths[:, None] / lengths[None, :]
    least = 8 * size * jnp.finfo(moment.dtype).eps
    inverse = jax.lax.platform_dependent(
        correlations + least * identity,
        cpu=inverse_factor_by_products,
        default=inverse_factor_by_library,
    )
    return inverse.T / lengths[:, None] / jnp.sqrt(scale)


def inverse_factor_by_library(matrix: jax.Array) -> jax.Array:
    """The inverse of the lower Cholesky factor of `[n, n]`; NaN where there is none."""
    factor = jnp.linalg.cholesky(matrix)
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.scipy.linalg.solve_triangular(factor, identity, lower=True)


def inverse_factor_by_products(matrix: jax.Array) -> jax.Array:
    """As `inverse_factor_by_library`, without LAPACK.

    LAPACK's threads keep processors busy for tens of milliseconds after a call, with
    which a step took a third longer on two cores, one call in twenty steps.
    """
    # Eight blocks at most: a program of them for each layer.
    at_most = max(128, -(-len(matrix) // 8))
    multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def invert(matrix: jax.Array) -> jax.Array:
        size = len(matrix)
        if size <= at_most:
            return _inverse_factor_by_rows(matrix)
        half = size // 2
        first = invert(matrix[:half, :half])
        below = multiply(matrix[half:, :half], first.T)
        second = invert(matrix[half:, half:] - multiply(below, below.T))
        corner = -multiply(multiply(second, below), first)
        return jnp.block([[first, jnp.zeros_like(below.T)], [corner, second]])

    return invert(matrix)


def _inverse_factor_by_rows(matrix: jax.Array) -> jax.Array:
    """Elimination of the matrix beside the identity, which ends as the inverse."""
    size = len(matrix)
    start = jnp.concatenate([matrix, jnp.eye(size, dtype=matrix.dtype)], axis=1)

    def step(i: jax.Array, done: jax.Array) -> jax.Array:
        column = jax.lax.dynamic_slice_in_dim(done, i, 1, axis=1)
        above = jnp.matmul(column.T, done, precision=jax.lax.Precision.HIGHEST)
        row = jax.lax.dynamic_slice_in_dim(start, i, 1) - above
        row *= jax.lax.rsqrt(jax.lax.dynamic_slice_in_dim(row, i, 1, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(done, row, i, axis=0)

    return jax.lax.fori_loop(0, size, step, jnp.zeros_like(start))[:, size:]


def _explained(explanation: Explanation, path: Any) -> int | None:
    where = _validate.leaf_path(path)
    for row in explanation.parameters:
        if row.path == where:
            return row.num_inputs
    paths = [row.path for row in explanation.parameters]
    raise ValueError(
        f"whiten_inputs: inputs_of explains {paths}, and no parameter at {where}; call "
        "explain with the parameters that the transformation is for"
    )


def _check(path: Any, leaf: Any, layer: Whitening | None) -> None:
    where = _validate.leaf_path(path)
    if not isinstance(leaf, EnvGrad):
        raise TypeError(
            "whiten_inputs needs gradients that know the inputs of their layers: use "
            f"value_and_env_grads, inside the same jit; the leaf at {where} is "
            f"{_validate.a_or_an(type(leaf).__name__)}"
        )
    if leaf._is_whitened:
        raise ValueError(
            f"whiten_inputs: the gradient of the parameter at {where} is whitened "
            "already; one whiten_inputs around the aggregator is enough"
        )
    if layer is None or leaf.num_inputs in (None, len(layer.root)):
        return
    raise ValueError(
        f"whiten_inputs: the layer of the parameter at {where}, of shape {leaf.shape}, "
        f"has {leaf.num_inputs} inputs, and inputs_of says {len(layer.root)}; pass "
        "inputs_of=hardvary.explain(loss_fn, params, batch), which knows all layouts"
    )
