"""Loops: uses in the body of a `lax.scan`, as uses of the whole of it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hardvary._compat import scan_counts
from hardvary.fused.program import Atom, Bindings, Kind, Program, Value
from hardvary.fused.uses import Site, Use


class Loop(Site):
    """A `lax.scan` with parameters among its constants or what it runs over.

    Args:
      eqn: the equation.
      inputs: its inputs.
      outputs: its outputs.
      body: its body.
      invariant: carries that no step changes.
      copied: values of the body that are copies of one outside, for each environment.
    """

    def __init__(
        self,
        eqn: Any,
        inputs: Sequence[Atom],
        outputs: Sequence[Value],
        body: Program,
        invariant: Sequence[int],
        copied: Sequence[tuple[Value, Value]],
    ) -> None:
        self._eqn, self._outputs, self._body = eqn, outputs, body
        self._length: int = eqn.params["length"]
        consts, carries = scan_counts(eqn)
        moving = [i for i in range(carries) if i not in invariant]
        pairs = list(zip(body.inputs, inputs, strict=True))
        self._fixed = [pairs[i] for i in fixed_inputs(eqn, invariant)]
        self._carry = [pairs[consts + i] for i in moving]
        self._xs = pairs[consts + carries :]
        self._init = inputs[consts : consts + carries]
        self._moving, self._invariant, self._copied = moving, invariant, copied
        self.uses = [
            self._outside(index, use)
            for index, site in enumerate(body.sites)
            for use in site.uses
        ]

    def _outside(self, index: int, use: Use) -> Use:
        """A use in the body as one of the whole loop."""
        # Gradients go back to the loop's inputs by `differentiated`. All else that the
        # use reads is computed from what these inputs are, whether parameters or not.
        differentiated, read = self._body.needed(use.operands)
        roots = self._body.roots(use.operands)
        frozen, sources = self._body.computing(
            [*use.constants, *(value for value in read if value.kind is Kind.CONST)]
        )
        fixed = [pair for pair in self._fixed if pair[0] in roots]
        over = [pair for pair in self._xs if pair[0] in roots]
        read_fixed = [pair for pair in self._fixed if pair[0] in sources]
        read_over = [pair for pair in self._xs if pair[0] in sources]
        operands = tuple(dict.fromkeys(outer for _, outer in (*fixed, *over)))

        def local(values: Sequence[Any], bindings: Bindings, saved: Any) -> list[Any]:
            given = dict(zip(operands, values, strict=True))

            def one(slices: Any, read_slices: Any, saved_slice: Any) -> list[Any]:
                outside = Bindings()
                for inner, outer in read_fixed:
                    outside[inner] = bindings[outer]
                for (inner, _), value in zip(read_over, read_slices, strict=True):
                    outside[inner] = value
                for step in frozen:
                    step.run(outside)
                inside = Bindings(outside)
                for inner, outer in fixed:
                    inside[inner] = given[outer]
                for (inner, _), value in zip(over, slices, strict=True):
                    inside[inner] = value
                for step in differentiated:
                    step.run(inside)
                return use.local(
                    [inside[o] for o in use.operands], outside, saved_slice
                )

            # All steps at once: the sum over steps becomes part of the product.
            return jax.vmap(one, axis_size=self._length)(
                [given[outer] for _, outer in over],
                [bindings[outer] for _, outer in read_over],
                saved,
            )

        # An operand that is the same at every step, and as it is outside.
        as_it_is = not differentiated and not over and len(use.operands) == len(fixed)
        return Use(
            use.primitive,
            operands,
            local,
            eqn=use.eqn if as_it_is else None,
            side=use.side if as_it_is else -1,
            steps=(self._length, *use.steps),
            path=(index, *use.path),
            reason=use.reason,
            constants=tuple(
                outer
                for _, outer in (*read_fixed, *read_over)
                if isinstance(outer, Value)
            ),
        )

    def zeros(self) -> Any:
        def over_steps(leaf: jax.Array) -> jax.Array:
            return jnp.broadcast_to(leaf[None], (self._length, *leaf.shape))

        return jax.tree.map(over_steps, [site.zeros() for site in self._body.sites])

    def run(self, bindings: Bindings, zeros: Any) -> Any:
        body, params = self._body, self._eqn.params

        def step(carry: Any, xs: Any) -> Any:
            slices, zeros = xs
            inside = Bindings()
            for inner, outer in (*self._fixed, *self._copied):
                inside[inner] = bindings[outer]
            inside.update([inner for inner, _ in self._carry], carry)
            inside.update([inner for inner, _ in self._xs], slices)
            body.run_hoisted(inside)
            saved = body.run(inside, zeros)
            results = [inside[atom] for atom in body.outputs]
            carry = [results[i] for i in self._moving]
            return carry, (results[len(self._init) :], saved)

        carry = [jnp.asarray(bindings[atom]) for _, atom in self._carry]
        carry, (ys, saved) = jax.lax.scan(
            step,
            carry,
            ([bindings[atom] for _, atom in self._xs], zeros),
            length=self._length,
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        final = dict(zip(self._moving, carry, strict=True))
        final |= {i: bindings[self._init[i]] for i in self._invariant}
        results = [final[i] for i in range(len(self._init))] + list(ys)
        bindings.update(self._outputs, results)
        return saved


def fixed_inputs(eqn: Any, invariant: Sequence[int]) -> list[int]:
    """Positions of a `scan` equation's inputs that are the same at every step.

    Args:
      eqn: the equation.
      invariant: carries that no step changes.
    """
    consts, _ = scan_counts(eqn)
    return [*range(consts), *(consts + i for i in invariant)]
