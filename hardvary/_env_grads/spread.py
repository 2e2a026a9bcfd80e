"""Gradients of environments that an explicit mesh has spread over its devices.

A device passes over its own environments, and what that leaves behind stays there.
Every question goes to all devices: each answers for its environments, as one device
would, and sums go over the mesh.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax

from hardvary import _compat, sharding
from hardvary._env_grads import statistics as st
from hardvary._env_grads.microbatches import Microbatches
from hardvary._env_grads.problem import Problem
from hardvary._env_grads.source import Source
from hardvary._typing import AxisName, PyTree
from hardvary.fused.rules import AllRules
from hardvary.fused.traced import Traced

# From parameters, arrays that all devices share, and a tree with leaves `[env, ...]` of
# one, to its gradients.
SourceOf = Callable[[PyTree, Any, Any], Source]


class Spread(Source):
    """Of all parameters. Answers are replicated over the mesh, but for `stack`.

    Args:
      source_of: the gradients of a device.
      params: the parameters.
      shared: what `source_of` needs beside them that is the same on all devices.
      parts: what it needs of all environments.
      num_envs: their number.
      axes: explicit axes over which they are spread.
      inputs: `num_inputs` of every parameter.
    """

    def __init__(
        self,
        source_of: SourceOf,
        params: PyTree,
        shared: Any,
        parts: Any,
        num_envs: int,
        axes: tuple[str, ...],
        inputs: Sequence[int | None],
    ) -> None:
        self._source_of, self._params = source_of, params
        self._shared, self._parts = shared, parts
        self.num_envs, self._axes, self._inputs = num_envs, axes, inputs

    def sums(
        self, statistics: Sequence[st.Statistic], weights: st.EnvWeights | None
    ) -> st.Sums:
        def ask(source: Source, weights: st.EnvWeights | None) -> list[Any]:
            sums = source.sums(statistics, weights)
            total = st.total_weight(source.num_envs, weights)
            sums, _ = st.over_devices(sums, total, self._axes)
            return [sums[statistic] for statistic in statistics]

        return dict(zip(statistics, self._everywhere(ask, weights), strict=True))

    def combine(self, weights: st.EnvWeights) -> list[jax.Array]:
        def ask(source: Source, weights: st.EnvWeights) -> Any:
            return jax.lax.psum(source.combine(weights), self._axes)

        return self._everywhere(ask, weights)

    def stack(self) -> list[jax.Array]:
        return self._everywhere(
            lambda source, _: source.stack(), out_spec=jax.P(self._axes)
        )

    def gramian(self, axis_name: AxisName | None = None) -> list[jax.Array]:
        outer = sharding.names_of(axis_name)
        if outer and not _compat.NESTED_AXIS_INDEX:
            raise ValueError(
                "inner products of environments along the mapped axis "
                f"{outer[0]!r} and the explicit axis {self._axes[0]!r} at once need "
                "jax 0.10 or newer; with this one, spread them over mapped axes alone "
                "or over the mesh alone"
            )
        names = (*outer, *self._axes)
        return self._everywhere(lambda source, _: source.gramian(names))

    def square_norms(self) -> list[jax.Array]:
        def ask(source: Source, _: None) -> list[jax.Array]:
            squares = source.square_norms()
            return [sharding.all_rows(square, self._axes) for square in squares]

        return self._everywhere(ask)

    def alone(self, index: int) -> Source:
        result = copy.copy(self)
        whole = self._source_of

        def source_of(params: PyTree, shared: Any, parts: Any) -> Source:
            return whole(params, shared, parts).alone(index)

        result._source_of, result._inputs = source_of, [self._inputs[index]]
        return result

    @property
    def num_inputs(self) -> int | None:
        return self._inputs[0]

    def input_moment(self, weights: st.EnvWeights | None) -> jax.Array:
        def ask(source: Source, weights: st.EnvWeights | None) -> Any:
            return jax.lax.psum(source.input_moment(weights), self._axes)

        return self._everywhere(ask, weights)

    def whitened(self, root: jax.Array | None) -> Source:
        result = copy.copy(self)
        result.root = root
        return result

    def times(self, root: jax.Array, parameter: jax.Array) -> jax.Array:
        def ask(source: Source, _: None, *given: jax.Array) -> jax.Array:
            return source.times(*given)

        return self._everywhere(ask, given=(root, parameter))

    def _everywhere(
        self,
        ask: Callable[..., Any],
        weights: st.EnvWeights | None = None,
        given: Sequence[jax.Array] = (),
        out_spec: Any = None,
    ) -> Any:
        """`ask(source, weights, *given)` on each device.

        Args:
          ask: a question to a device's source, about its environments.
          weights: of all environments.
          given: arrays that are the same on all devices.
          out_spec: how the answer is spread; not at all unless given.
        """

        def local(params: PyTree, same: Any, parts: Any, weights: Any) -> Any:
            shared, root, given = same
            source = self._source_of(params, shared, parts)
            if root is not None:
                source = source.whitened(root)
            return ask(source, weights, *given)

        return sharding.on_devices(
            local,
            self._axes,
            self._params,
            (self._shared, self.root, given),
            (self._parts, weights),
            jax.P() if out_spec is None else out_spec,
        )


def spread_environments(
    problem: Problem,
    size: int | None,
    axes: tuple[str, ...],
    axis_name: AxisName | None,
) -> tuple[tuple[Any, Any], Source]:
    """`(losses, aux)` and the gradients of environments on an explicit mesh.

    Args:
      problem: the loss and the batch of all devices.
      size: environments of a device in a pass, None for all at once.
      axes: explicit axes over which they are spread.
      axis_name: mapped axis over which further environments are spread.
    """
    names = (*sharding.names_of(axis_name), *axes)
    found: list[tuple[SourceOf, list[int | None]]] = []

    def at_once(params: PyTree, shared: Any, batch: list[jax.Array]) -> Any:
        own = problem.elsewhere(params, shared, batch)
        traced = Traced(own.loss, params, batch, None, names)
        rules, program = AllRules(traced), traced.emptied()

        def source_of(params: PyTree, consts: Any, left: Any) -> Source:
            return AllRules(program.filled(jax.tree.leaves(params), consts, *left))

        inputs = [rules.alone(i).num_inputs for i in range(len(traced.leaves))]
        found.append((source_of, inputs))
        left = traced.saved, traced.cotangents
        return (traced.losses, traced.aux), traced.traced_consts, left

    def some_at_once(params: PyTree, shared: Any, batch: list[jax.Array]) -> Any:
        def source_of(params: PyTree, shared: Any, batch: Any) -> Microbatches:
            assert size is not None
            own = problem.elsewhere(params, shared, batch)
            return Microbatches(own, size, names)

        found.append((source_of, [None] * len(jax.tree.leaves(params))))
        return source_of(params, shared, batch).value(), None, None

    value, consts, left = sharding.on_devices(
        at_once if size is None else some_at_once,
        axes,
        problem.params,
        problem.shared,
        (problem.batch,),
        (jax.P(axes), jax.P(), jax.P(axes)),
    )
    source_of, inputs = found[-1]
    shared, parts = (consts, left) if size is None else (problem.shared, problem.batch)
    source = Spread(
        source_of, problem.params, shared, parts, problem.num_envs, axes, inputs
    )
    return value, source
