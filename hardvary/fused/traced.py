"""A forward and a backward pass over all environments, and what they leave behind."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from hardvary._env_grads.statistics import (
    EnvWeights,
    Statistic,
    Sums,
    sums_by_parts,
)
from hardvary._typing import PyTree
from hardvary.fused.collectives import refuse_mixed_parameters
from hardvary.fused.equations import as_array
from hardvary.fused.parts import part_size
from hardvary.fused.program import Bindings, Kind, Value
from hardvary.fused.refusals import (
    naming_the_way_out,
    refuse_side_effects,
    shape_of,
)
from hardvary.fused.tracing import build

LossFn = Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]


@dataclasses.dataclass(frozen=True)
class Summing:
    """Sums of statistics of the gradients over environments.

    Attributes:
      statistics: which, as `statistics.summed` returns them.
      weights: of all environments, None for 1 each.
      sums_of: `(traced, weights) -> sums` of the environments of a pass.
    """

    statistics: Sequence[Statistic]
    weights: EnvWeights | None
    sums_of: Callable[["Traced", EnvWeights | None], Sums]


class Traced:
    """What one forward and backward pass over all environments leaves behind.

    Args:
      loss_fn: `loss_fn(params, env_batch) -> (loss, aux)`.
      params: its parameters.
      batch: leaves `[env, ...]`.
      axis_name: a name for the axis of environments.
      device_axes: mapped axes over which further environments are spread.
      summing: sums that are made on the way where environments are taken a few at a
        time; without it, all are taken at once.

    Attributes:
      leaves, tree: the parameters.
      program: the loss as a program.
      env: results of all that is hoisted in it, the same for all environments.
      saved, cotangents: what its uses need, for all environments.
      losses, aux: of all environments.
      num_envs: number of environments.
      sums: those of `summing`, None where all were taken at once.

    Raises:
      ValueError: side effects, parameters collected from several devices, and
        programs that the surgery cannot handle.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        params: PyTree,
        batch: PyTree,
        axis_name: str | None,
        device_axes: Sequence[str] = (),
        summing: Summing | None = None,
    ) -> None:
        self.leaves, self.tree = jax.tree.flatten(params)
        self.num_envs = len(jax.tree.leaves(batch)[0])
        self._problem = loss_fn, params, batch, axis_name
        closed, output_tree, kinds = _stage(loss_fn, params, batch, axis_name)
        live = [i == 0 for i in range(output_tree.num_leaves)]
        refuse_mixed_parameters(closed, kinds, live, device_axes)
        with self.guard():
            values = [Value(jax.typeof(const), Kind.CONST) for const in closed.consts]
            self._consts = values, closed.consts
            self.program = build(closed.jaxpr, values, kinds, live)
            # Not inside of the vmap: what a user's rule computes there stays there.
            self.env = self._hoisted()
            self.sums: Sums | None = None
            # Outside of a trace a loop would be compiled at every call.
            traced = any(map(_is_traced, jax.tree.leaves((params, batch))))
            if summing is None or not traced or self.part_size == self.num_envs:
                outputs = self._take(batch)
            else:
                outputs = self._take_in_parts(batch, summing)
        self.losses, self.aux = jax.tree.unflatten(output_tree, outputs)

    @functools.cached_property
    def part_size(self) -> int:
        """How many environments a pass with `summing` takes at a time."""
        *_, axis_name = self._problem
        # Under a name they meet.
        return (
            part_size(self.program, self.num_envs)
            if axis_name is None
            else self.num_envs
        )

    def _take(self, batch: PyTree) -> list[Any]:
        """The pass over some environments, which returns their outputs."""
        *_, axis_name = self._problem
        self.num_envs = len(jax.tree.leaves(batch)[0])
        run = jax.vmap(self._one, axis_name=axis_name)
        outputs: list[Any]
        outputs, self.saved, self.cotangents = run(batch)
        return outputs

    def _take_in_parts(self, batch: PyTree, summing: Summing) -> list[Any]:
        """As `_take`, `part_size` environments at a time, with sums on the way.

        Under `jit` what nobody asks for costs nothing here, either: XLA leaves out what
        of a loop's results is not read.
        """

        def of_part(batch: PyTree, weights: EnvWeights | None) -> Any:
            part = copy.copy(self)
            outputs = part._take(batch)
            left = outputs, part.saved, part.cotangents
            return summing.sums_of(part, weights), left

        inputs, count = (batch, summing.weights), self.num_envs // self.part_size
        self.sums, left = sums_by_parts(
            of_part, inputs, count, self.leaves, summing.statistics
        )
        outputs: list[Any]
        outputs, self.saved, self.cotangents = left
        return outputs

    def _hoisted(self) -> Bindings:
        env = Bindings()
        values, consts = self._consts
        env.update(values, list(map(as_array, consts)))
        env.update(self.program.inputs[: len(self.leaves)], self.leaves)
        self.program.run_hoisted(env)
        return env

    def emptied(self) -> "Traced":
        """The pass without its arrays, which `filled` puts back."""
        result = copy.copy(self)
        loss_fn, params, batch, axis_name = self._problem
        params, batch = jax.tree.map(shape_of, (params, batch))
        result._problem = loss_fn, params, batch, axis_name
        values, consts = self._consts
        result._consts = values, [None if _is_traced(c) else c for c in consts]
        result.leaves, result.env = [], Bindings()
        result.saved = result.cotangents = result.losses = result.aux = None
        return result

    @property
    def traced_consts(self) -> list[Any]:
        """Constants of the loss that are known only where the pass runs."""
        return [const for const in self._consts[1] if _is_traced(const)]

    def filled(
        self, leaves: Sequence[Any], consts: Sequence[Any], saved: Any, cotangents: Any
    ) -> "Traced":
        """The pass with parameters, `traced_consts` and what it left behind."""
        result, rest = copy.copy(self), iter(consts)
        values, known = self._consts
        result._consts = values, [next(rest) if c is None else c for c in known]
        result.leaves = list(leaves)
        result.saved, result.cotangents = saved, cotangents
        with self.guard():
            # Again: parameters alone determine it, and XLA finds what is there twice.
            result.env = result._hoisted()
        return result

    def _one(self, env_batch: PyTree) -> Any:
        """Outputs, and what the uses need, of one environment."""
        program = self.program

        def loss(zeros: Any) -> Any:
            inside = Bindings(self.env)
            inputs = program.inputs[len(self.leaves) :]
            inside.update(inputs, jax.tree.leaves(env_batch))
            saved = program.run(inside, zeros)
            outputs = [inside[atom] for atom in program.outputs]
            return jnp.asarray(outputs[0]), (outputs[1:], saved)

        # Not jax.grad, which refuses the complex values that real parameters may
        # turn into on the way.
        output, vjp, (aux, saved) = jax.vjp(loss, program.zeros(), has_aux=True)
        (cotangents,) = vjp(jnp.ones_like(output))
        return [output, *aux], saved, cotangents

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """Where errors say which method takes this loss."""
        return naming_the_way_out(*self._problem)


def check_collectives(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    axis_name: str | None,
    device_axes: Sequence[str],
) -> None:
    """Raises ValueError for parameters that a loss collects from several devices.

    Args: as of `Traced`.
    """
    closed, output_tree, kinds = _stage(loss_fn, params, batch, axis_name)
    live = [i == 0 for i in range(output_tree.num_leaves)]
    refuse_mixed_parameters(closed, kinds, live, device_axes)


def _stage(
    loss_fn: LossFn, params: PyTree, batch: PyTree, axis_name: str | None
) -> tuple[Any, Any, list[Kind]]:
    """The loss of one environment as a jaxpr, its outputs' tree, its inputs' kinds."""
    leaves, tree = jax.tree.flatten(params)
    found: list[Any] = []

    # Inside of a vmap for the shapes of one environment and for the name of its axis;
    # nothing is computed.
    def one(env_batch: PyTree) -> None:
        batch_leaves, batch_tree = jax.tree.flatten(env_batch)
        trees: list[Any] = []

        def flat(leaves: list[Any], batch_leaves: list[Any]) -> Any:
            output = loss_fn(
                jax.tree.unflatten(tree, leaves),
                jax.tree.unflatten(batch_tree, batch_leaves),
            )
            outputs, output_tree = jax.tree.flatten(output)
            trees.append(output_tree)
            return outputs

        closed = jax.make_jaxpr(flat)(leaves, batch_leaves)
        refuse_side_effects(closed.effects)
        if any(_is_reference(var) for eqn in closed.jaxpr.eqns for var in eqn.outvars):
            # Taken apart, a reference would be read at the wrong time.
            whole = jax.jit(jex.jaxpr_as_fun(closed))
            closed = jax.make_jaxpr(whole)(*leaves, *batch_leaves)
        kinds = [Kind.PARAM] * len(leaves) + [Kind.BATCH] * len(batch_leaves)
        found.append((closed, trees[-1], kinds))

    jax.vmap(one, axis_name=axis_name)(batch)
    return found[-1]


def _is_traced(const: Any) -> bool:
    return isinstance(const, jax.core.Tracer)


def _is_reference(var: Any) -> bool:
    return type(var.aval).__name__ == "AbstractRef"
