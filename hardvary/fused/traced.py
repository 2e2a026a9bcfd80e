"""A forward and a backward pass over all environments, and what they leave behind."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hardvary.fused.tracing import Bindings, Kind, Value, build

PyTree = Any


class Traced:
    """What one forward and backward pass over all environments leaves behind."""

    def __init__(
        self,
        loss_fn: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
        params: PyTree,
        batch: PyTree,
        axis_name: str | None,
    ) -> None:
        self.leaves, self.tree = jax.tree.flatten(params)
        shapes: list[Any] = []

        def one(env_batch: PyTree) -> Any:
            batch_leaves, batch_tree = jax.tree.flatten(env_batch)

            def flat(leaves: list[Any], batch_leaves: list[Any]) -> Any:
                output = loss_fn(
                    jax.tree.unflatten(self.tree, leaves),
                    jax.tree.unflatten(batch_tree, batch_leaves),
                )
                leaves, tree = jax.tree.flatten(output)
                shapes.append(tree)
                return leaves

            closed = jax.make_jaxpr(flat)(self.leaves, batch_leaves)
            _refuse_side_effects(closed.effects)
            consts = [Value(jax.typeof(c), Kind.CONST) for c in closed.consts]
            kinds = [Kind.PARAM] * len(self.leaves) + [Kind.BATCH] * len(batch_leaves)
            self.program = program = build(closed.jaxpr, consts, kinds, (0,))
            self.env = Bindings()
            for value, result in zip(
                [*consts, *program.inputs],
                [*closed.consts, *self.leaves],
                strict=False,
            ):
                self.env[value] = result
            program.run_hoisted(self.env)

            def loss(zeros: Any) -> Any:
                inside = Bindings(self.env)
                inputs = program.inputs[len(self.leaves) :]
                for value, result in zip(inputs, batch_leaves, strict=True):
                    inside[value] = result
                saved = program.run(inside, zeros)
                outputs = [inside[atom] for atom in program.outputs]
                return jnp.asarray(outputs[0]), (outputs[1:], saved)

            # Not jax.grad, which refuses the complex values that real parameters may
            # turn into on the way.
            output, vjp, (aux, saved) = jax.vjp(loss, program.zeros(), has_aux=True)
            (cotangents,) = vjp(jnp.ones_like(output))
            return [output, *aux], saved, cotangents

        run = jax.vmap(one, axis_name=axis_name)
        outputs, self.saved, self.cotangents = run(batch)
        self.losses, self.aux = jax.tree.unflatten(shapes[-1], outputs)
        self.num_envs = len(jax.tree.leaves(batch)[0])


def _refuse_side_effects(effects: Any) -> None:
    """Raises ValueError for what a loss must not do while it is differentiated.

    Printing for debugging may stay, and a use of a mapped axis counts as an effect.
    """
    harmless = ("DebugEffect", "OrderedDebugEffect", "NamedAxisEffect")
    harmful = sorted(
        {str(effect) for effect in effects if type(effect).__name__ not in harmless}
    )
    if harmful:
        raise ValueError(
            f"loss_fn must not have side effects, got {', '.join(harmful)}: return the "
            "value as aux (has_aux=True) and act on it outside"
        )
