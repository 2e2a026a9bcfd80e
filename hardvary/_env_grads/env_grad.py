"""The gradients of one parameter in all environments, not multiplied out yet.

One forward and one backward pass of all environments leave behind what every gradient
is made of. An `EnvGrad` answers questions about one parameter's gradients from there:
statistics, inner products, weighted sums. Under `jit` a question that nobody asks costs
nothing, and parameters that are computed together share the work.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, overload

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate, sharding
from hardvary._env_grads import statistics as st
from hardvary._env_grads.grad_stats import GradStats, StatName
from hardvary._env_grads.kept import Kept
from hardvary._env_grads.microbatches import Microbatches
from hardvary._env_grads.no_array import NoArray
from hardvary._env_grads.problem import InAxes, Problem, check_arguments
from hardvary._env_grads.source import Source
from hardvary._env_grads.spread import spread_environments
from hardvary._env_grads.summed import Summed
from hardvary._typing import AxisName, PyTree
from hardvary.fused.rules import bound_rules, summing
from hardvary.fused.rules.base import Rule
from hardvary.fused.traced import Traced


class EnvGradError(TypeError, AttributeError):
    """Raised where an `EnvGrad` is asked for what an array has."""


class Answers:
    """A group's answers, each computed once, over the environments of all devices."""

    def __init__(
        self,
        source: Source,
        weights: st.EnvWeights | None,
        total: Any,
        axis_name: AxisName | None,
    ) -> None:
        self._source, self._weights = source, weights
        self._local_total, self.axis_name = total, axis_name
        self._kept = Kept()
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        self.num_envs: int = source.num_envs * devices

    def stats(
        self, statistics: Sequence[st.Statistic]
    ) -> tuple[list[dict[str, Any]], jax.Array]:
        """Fields of `GradStats` for every parameter, and the total weight."""
        missing = [s for s in statistics if s not in self._kept]
        if missing:
            keys = st.summed(missing, self._weights is not None)
            sums = self._source.sums(keys, self._weights)
            sums, total = st.over_devices(sums, self._local_total, self.axis_name)
            total = st.as_total(total)
            fields = st.finish(sums, missing, total)
            for statistic in missing:
                self._kept.keep(statistic, [f[statistic.field] for f in fields])
            self._kept.keep("total", total)
            found = {s: [f[s.field] for f in fields] for s in missing}
        else:
            total, found = self._kept["total"], {}
        found |= {s: self._kept[s] for s in statistics if s not in found}
        count = len(found[statistics[0]])
        return [{s.field: found[s][i] for s in statistics} for i in range(count)], total

    def combine(self, weights: Any, values: jax.Array) -> list[jax.Array]:
        """`sum_e w_e g_e`, with weights as given, the key, and as an array."""

        def compute() -> Any:
            local = sharding.own_rows(values, self.axis_name, self._source.num_envs)
            if self._weights is not None:
                local = jnp.where(self._weights.values > 0, local, 0)
            sums = self._source.combine(st.signed(local))
            if self.axis_name is not None:
                sums = jax.lax.psum(sums, self.axis_name)
            # The weights keep their identity as long as they are a key.
            return weights, sums

        if not isinstance(weights, jax.Array):
            # What NumPy holds may be something else by the next time.
            return compute()[1]
        result: list[jax.Array] = self._kept.once(("combine", id(weights)), compute)[1]
        return result

    def stack(self) -> list[jax.Array]:
        def compute() -> Any:
            grads = [st.present(grad, self._weights) for grad in self._source.stack()]
            return [sharding.all_rows(grad, self.axis_name) for grad in grads]

        return self._kept.once("stack", compute)

    def gramian(self) -> list[jax.Array]:
        return self._kept.once("gramian", self._gramian)

    def _gramian(self) -> list[jax.Array]:
        gramians = self._source.gramian(self.axis_name)
        weights = self.env_weights()
        if weights is None:
            return gramians
        here = weights > 0
        both = here[:, None] & here[None, :]
        return [jnp.where(both, gramian, 0) for gramian in gramians]

    def square_norms(self) -> list[jax.Array]:
        def compute() -> list[jax.Array]:
            squares = self._source.square_norms()
            if self._weights is not None:
                here = self._weights.values > 0
                squares = [jnp.where(here, square, 0) for square in squares]
            return [sharding.all_rows(square, self.axis_name) for square in squares]

        return self._kept.once("square_norms", compute)

    def alone(self, index: int) -> "Answers":
        """Of one parameter, for what is asked of its layer."""

        def compute() -> Answers:
            source = self._source.alone(index)
            if source is self._source:
                return self
            return Answers(source, self._weights, self._local_total, self.axis_name)

        result: Answers = self._kept.once(("alone", index), compute)
        return result

    @property
    def num_inputs(self) -> int | None:
        return self._source.num_inputs

    def input_moment(self) -> jax.Array:
        def compute() -> jax.Array:
            moment = self._source.input_moment(self._weights)
            total = self._local_total
            if self.axis_name is not None:
                moment, total = jax.lax.psum((moment, total), self.axis_name)
            return moment / st.as_total(total).astype(moment.dtype)

        return self._kept.once("input_moment", compute)

    def whitened(self, root: jax.Array) -> "Answers":
        """Of the transpose of `root: [input, input]` times the same gradients."""
        source = self._source.whitened(root)
        return Answers(source, self._weights, self._local_total, self.axis_name)

    @property
    def is_whitened(self) -> bool:
        return self._source.root is not None

    def times(self, root: jax.Array, parameter: jax.Array) -> jax.Array:
        return self._source.times(root, parameter)

    def env_weights(self) -> jax.Array | None:
        """Weights of the environments of all devices, None if they are 1."""
        if self._weights is None:
            return None
        return sharding.all_rows(self._weights.values, self.axis_name)


class EnvGrad(NoArray):
    """The gradients of one parameter in all environments.

    `value_and_env_grads` returns a tree of them, one at every leaf of the parameters.
    Aggregators take it as it is; it answers questions by itself, too. All answers are
    exact and in at least float32. But for `stack`, and parameters of a few numbers,
    a parameter's gradients of all environments are together in memory only where they
    take no more of it than the data and the cotangents that they are made of
    (`explain`: `"held"`). An absent environment (`env_weights` 0) has the gradient 0,
    whatever its batch holds.

    It is no array and no pytree: inside one `jit` it goes through `optax.chain`,
    `optax.partition`, `TrainState.apply_gradients` and `nnx.Optimizer.update`;
    arithmetic on it and leaving the `jit` with it raise a TypeError.

    Attributes:
      shape: of the parameter.
      dtype: of the parameter.
      num_envs: number of environments, on all devices; absent ones included.
      num_inputs: inputs of a dense layer or values in a convolution's patch, where the
        parameter is the weights of one that is used once; None elsewhere.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> loss = lambda w, x: jnp.sum(w * x)
      >>> x = jnp.array([[1.0, 2.0], [3.0, -2.0]])  # [env, feature]
      >>> grad = hardvary.env_grads(loss)(jnp.ones(2), x)
      >>> grad.mean().tolist(), grad.stats(("sign",)).sign_sum.tolist()
      ([2.0, 0.0], [2.0, 0.0])
      >>> grad.gramian().tolist()
      [[5.0, -1.0], [-1.0, 13.0]]
      >>> grad.combine(jnp.array([1.0, -1.0])).tolist()
      [-2.0, 4.0]
    """

    shape: tuple[int, ...]
    dtype: Any
    num_envs: int

    _mend = (
        "it lives inside one trace and takes no arithmetic. Put hardvary's aggregator "
        "first in the chain, inside the same jit; to leave a jit, or to cross a scan "
        "or a cond, take .stats(...), .mean() or .stack() first; optax.MultiSteps goes "
        "behind the aggregator"
    )

    def __init__(self, answers: Answers, index: int, like: Any) -> None:
        self._answers, self._index = answers, index
        self.shape = np.shape(like)
        self.dtype = jnp.result_type(like)
        self.num_envs = answers.num_envs

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def stats(self, names: Sequence[StatName] = ("mean", "sign")) -> GradStats:
        """Statistics of this parameter's gradients.

        Args:
          names: see `grad_stats`.

        Returns:
          A `GradStats` whose arrays are all in at least float32.

        Raises:
          TypeError: names that are no sequence of names.
          ValueError: an unknown name.
        """
        checked = _validate.names("names", names, tuple(st.STATISTICS))
        stats = self._stats(st.named(checked))
        return dataclasses.replace(stats, num_envs=jnp.asarray(stats.num_envs))

    def _stats(self, statistics: Sequence[st.Statistic]) -> GradStats:
        fields, total = self._answers.stats(statistics)
        return GradStats(
            **fields[self._index],
            num_envs=total,
            axis_names=sharding.names_of(self._answers.axis_name),
        )

    def mean(self, *axes: Any, **options: Any) -> jax.Array:
        """`sum_e w_e g_e / sum_e w_e`, the shape of the parameter.

        Raises:
          TypeError: any argument, as an array's mean takes them.
        """
        if axes or options:
            self._refuse()
        mean: jax.Array = self._stats([st.MEAN]).mean
        return mean

    def gramian(self) -> jax.Array:
        """`[env, env]`, inner products of the environments' gradients.

        Of the gradients as they are, not times `env_weights`.
        """
        return self._answers.gramian()[self._index]

    def norms(self) -> jax.Array:
        """`[env]`, Euclidean norms of the environments' gradients."""
        return jnp.sqrt(self._square_norms())

    def _square_norms(self) -> jax.Array:
        return self._answers.square_norms()[self._index]

    def combine(self, weights: jax.typing.ArrayLike) -> jax.Array:
        """`sum_e w_e g_e`, the shape of the parameter.

        Args:
          weights: `[env]`, of any sign. An environment of weight 0 might as well not
            be there, even where its gradient is NaN.

        Raises:
          TypeError: weights that are not real.
          ValueError: weights of another shape.
        """
        values = sharding.gather(_validate.combination(weights, self.num_envs))
        return self._answers.combine(weights, values)[self._index]

    @property
    def _layer(self) -> Answers:
        return self._answers.alone(self._index)

    @property
    def num_inputs(self) -> int | None:
        return self._layer.num_inputs

    def input_moment(self) -> jax.Array:
        """`[input, input]`, second moment of the inputs that the weights meet.

        The mean of :math:`x x^T` over examples (and places, of a convolution: x is a
        patch, [*window, feature]) and over environments, absent ones left out and the
        others weighted; at least float32.

        Raises:
          ValueError: `num_inputs` is None.
        """
        if self.num_inputs is None:
            raise ValueError(
                "this parameter meets no inputs of a single dense layer or "
                "convolution: see num_inputs, and what explain says of it"
            )
        return self._layer.input_moment()

    def _whitened(self, root: jax.Array) -> "EnvGrad":
        """The transpose of `root: [input, input]` times the gradients."""
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return EnvGrad(self._layer.whitened(root), 0, like)

    @property
    def _is_whitened(self) -> bool:
        return self._layer.is_whitened

    def _times(self, root: jax.Array, parameter: jax.Array) -> jax.Array:
        """`root: [input, input]` times what is shaped like the parameter."""
        return self._layer.times(root, parameter)

    def stack(self) -> jax.Array:
        """`[env, *param.shape]`, the gradients themselves, in the parameter's dtype."""
        return self._answers.stack()[self._index]

    def __repr__(self) -> str:
        return (
            f"EnvGrad(shape={self.shape}, dtype={self.dtype}, "
            f"num_envs={self.num_envs}): {self._mend}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise EnvGradError(
            f"an EnvGrad is not an array and has no .{name}: {self._mend}"
        )

    __bool__ = NoArray._refuse


def env_grads(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: InAxes = 0,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
    microbatch_size: int | None = None,
) -> Callable[..., Any]:
    """Gradients of all environments, not multiplied out.

    Args:
      loss_fn: see `value_and_env_grads`.
      argnums: see `value_and_env_grads`.
      has_aux: see `value_and_env_grads`.
      in_axes: see `value_and_env_grads`.
      axis_name: see `value_and_env_grads`.
      env_axis_name: see `value_and_env_grads`.
      microbatch_size: see `value_and_env_grads`.

    Returns:
      A function like that of `value_and_env_grads` which returns the gradients, or
      `(gradients, aux)`.

    Raises:
      TypeError: as `value_and_env_grads`.
      ValueError: as `value_and_env_grads`.

    Example:
      >>> import jax.numpy as jnp, hardvary
      >>> loss = lambda w, x: 0.5 * jnp.sum((w * x) ** 2)
      >>> grads = hardvary.env_grads(loss)(jnp.ones(2), jnp.array([[1.0, 0.0]]))
      >>> grads.mean().tolist()
      [1.0, 0.0]
    """
    with_value = value_and_env_grads(
        loss_fn, argnums, has_aux, in_axes, axis_name, env_axis_name, microbatch_size
    )

    def grad_fn(*args: Any, env_weights: Any = None, **kwargs: Any) -> Any:
        value, grads = with_value(*args, env_weights=env_weights, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fn


@overload
def value_and_env_grads(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    in_axes: InAxes = 0,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
    microbatch_size: int | None = None,
) -> Callable[..., tuple[jax.Array, PyTree]]: ...


@overload
def value_and_env_grads(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: Literal[True],
    in_axes: InAxes = 0,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
    microbatch_size: int | None = None,
) -> Callable[..., tuple[tuple[jax.Array, Any], PyTree]]: ...


@overload
def value_and_env_grads(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: InAxes = 0,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
    microbatch_size: int | None = None,
) -> Callable[..., Any]: ...


def value_and_env_grads(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: InAxes = 0,
    axis_name: AxisName | None = None,
    env_axis_name: str | None = None,
    microbatch_size: int | None = None,
) -> Callable[..., Any]:
    """Losses of all environments, and their gradients, not multiplied out.

    One forward and one backward pass for all environments, as plain training takes.
    The gradients are a tree like the parameters with an `EnvGrad` at every leaf, which
    every aggregator accepts and asks for what it needs. Use both inside one `jit`. Each
    environment has a forward pass of its own, so batch statistics are its own too.

    Args:
      loss_fn: `loss_fn(params, env_batch) -> loss`, a real scalar, of ONE environment.
      argnums: see `per_env_grad`.
      has_aux: see `per_env_grad`.
      in_axes: see `per_env_grad`.
      axis_name: see `grad_stats`; sums, Gramians and stacks are over the environments
        of all devices.
      env_axis_name: see `grad_stats`.
      microbatch_size: environments in a pass, a divisor of their number (on one device,
        where a mesh has spread them). Unless given, there is one pass, which on a CPU
        and under `jit` takes large activations a few environments at a time and adds
        up `"mean"` and `"sign"` on the way: it is faster, and `explain` tells how many.
        The number of all environments turns that off. A smaller one
        bounds the memory of activations, whatever is asked: every question then
        takes passes of its own: losses a forward pass, statistics and weighted
        sums one pass over everything, inner products one for every microbatch, with
        the stacked gradients of two microbatches in memory. For masks
        `value_and_grad_stats` takes a single pass.

    Returns:
      A function `(*args, env_weights=None, **kwargs)` that returns
      `(losses, gradients)`, or `((losses, aux), gradients)`; arguments as for
      `per_env_grad`, losses `[env]`, unweighted, in the loss's dtype.
      `env_weights: [env]`, non-negative, weights the environments in every statistic;
      0 marks an absent one, whose batch may hold anything.

    Raises:
      TypeError: as `per_env_grad`.
      ValueError: as `per_env_grad`; a microbatch_size < 1 or beside an env_axis_name;
        (tracing) one that does not divide the number of environments, env_weights of
        the wrong length or (concrete) negative, side effects in `loss_fn`, parameters
        that an explicit mesh has spread, an env_axis_name beside environments that it
        has.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hardvary
      >>> loss = lambda w, x: 0.5 * jnp.sum((w * x - 1.0) ** 2)
      >>> value_and_grads = hardvary.value_and_env_grads(loss)
      >>> tx = optax.chain(hardvary.and_mask(threshold=1.0), optax.sgd(0.1))
      >>> @jax.jit
      ... def step(w, state, batch):
      ...     losses, grads = value_and_grads(w, batch)
      ...     updates, state = tx.update(grads, state, w)
      ...     return optax.apply_updates(w, updates), state, losses.mean()
      >>> w = jnp.zeros(2)
      >>> batch = jnp.array([[1.0, 1.0], [2.0, -1.0]])  # [env, feature]
      >>> w, state, loss_value = step(w, tx.init(w), batch)
      >>> [round(x, 3) for x in w.tolist()], float(loss_value)
      ([0.15, 0.0], 1.0)
    """
    argnums = check_arguments(loss_fn, argnums)
    size = microbatch_size
    if size is not None:
        size = _validate.whole_number("microbatch_size", size, 1)
        if env_axis_name is not None:
            raise ValueError(
                "env_axis_name names the axis of all environments, which do not meet "
                f"in microbatches: leave microbatch_size out, got {env_axis_name!r}"
            )

    def value_and_grads_fn(*args: Any, env_weights: Any = None, **kwargs: Any) -> Any:
        problem = Problem(loss_fn, argnums, has_aux, in_axes, args, kwargs, axis_name)
        sharding.refuse_sharded_parameters(problem.params, "value_and_env_grads")
        axes = sharding.explicit_axes(problem.batch)
        if axes and env_axis_name is not None:
            raise ValueError(
                f"env_axis_name={env_axis_name!r} is the axis of environments that are "
                f"on one device, and an explicit mesh has spread these over {axes}; "
                "value_and_grad_stats takes them, or call value_and_env_grads inside "
                f"jax.shard_map with axis_name={axes!r} and name these axes in the "
                "loss's collectives, too"
            )
        weights = checked_weights(
            env_weights, problem.num_envs, axis_name, "value_and_env_grads"
        )
        local = problem.num_envs // sharding.size_of(axes)
        if size is not None and local % size:
            of_device = " of a device" if axes else ""
            raise ValueError(
                f"microbatch_size must divide the number of environments{of_device}, "
                f"got {size} for {local}"
            )
        parts = size if size is not None and size < local else None
        if axes or parts is not None:
            if axes:
                value, source = spread_environments(problem, parts, axes, axis_name)
            else:
                assert parts is not None
                source = Microbatches(problem, parts, axis_name)
                value = source.value()
            everything = range(len(jax.tree.leaves(problem.params)))
            grads = answered([(everything, source)], problem.params, weights, axis_name)
            return (value if has_aux else value[0]), grads
        # What masks ask for; in parts, all else is made of what the parts left behind.
        wished = summing(st.summed((st.MEAN, st.SIGN), weights is not None), weights)
        traced = Traced(
            problem.loss,
            problem.params,
            problem.batch,
            env_axis_name,
            sharding.names_of(axis_name),
            wished if size is None else None,
        )
        sources = [
            (rule.group.leaves, with_sums(rule, traced, weights))
            for rule in bound_rules(traced)
        ]
        grads = answered(sources, problem.params, weights, axis_name)
        value = (traced.losses, traced.aux) if has_aux else traced.losses
        return value, grads

    return value_and_grads_fn


def with_sums(rule: Rule, traced: Traced, weights: st.EnvWeights | None) -> Source:
    """A rule's gradients with the sums that a pass has made on the way, if any."""
    if traced.sums is None:
        return rule
    leaves = rule.group.leaves
    own = {s: [values[i] for i in leaves] for s, values in traced.sums.items()}
    return Summed(rule, own, weights)


def checked_weights(
    env_weights: Any, num_envs: int, axis_name: AxisName | None, name: str
) -> st.EnvWeights | None:
    if env_weights is None:
        return None
    values = sharding.gather(_validate.env_weights(env_weights, num_envs, name))
    return st.make_weights(values, axis_name)


def answered(
    sources: Sequence[tuple[Sequence[int], Source]],
    params: PyTree,
    weights: st.EnvWeights | None,
    axis_name: AxisName | None,
) -> PyTree:
    """A tree of `EnvGrad` like params, from sources and the leaves that they are of."""
    leaves, treedef = jax.tree.flatten(params)
    result: list[Any] = [None] * len(leaves)
    for positions, source in sources:
        total = st.total_weight(source.num_envs, weights)
        answers = Answers(source, weights, total, axis_name)
        for index, i in enumerate(positions):
            result[i] = EnvGrad(answers, index, leaves[i])
    return jax.tree.unflatten(treedef, result)
