"""Where parameters meet the batch: a loss as a program whose every use is known.

A loss is traced to a jaxpr and sorted into three kinds of values: what depends on the
batch, what depends on parameters only, and constants. The places where the first two
meet are the *uses* of the parameters. Each use hands out what its weight gradient is
made of, the batch-dependent inputs and the cotangents of its outputs, so that nobody
has to stack the gradients themselves.
"""

import abc
import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

PyTree = Any
Atom = Any  # Value | jex.Literal


class Kind(enum.Enum):
    """What a value depends on."""

    CONST = "constants"
    PARAM = "parameters"
    BATCH = "batch"


@dataclasses.dataclass(eq=False)
class Value:
    """A value of the program; compared by identity, as jaxpr variables are."""

    aval: Any
    kind: Kind

    @property
    def size(self) -> int:
        return math.prod(self.aval.shape)


class Bindings:
    """Values that have been computed, on top of those of an outer one."""

    def __init__(self, outer: "Bindings | None" = None) -> None:
        self._own: dict[Value, Any] = {}
        self._outer = outer

    def __setitem__(self, value: Value, result: Any) -> None:
        self._own[value] = result

    def __getitem__(self, atom: Atom) -> Any:
        if isinstance(atom, jex.Literal):
            return atom.val
        if atom in self._own:
            return self._own[atom]
        assert self._outer is not None
        return self._outer[atom]


@dataclasses.dataclass(eq=False)
class Step:
    """An equation as it stands."""

    eqn: Any
    inputs: Sequence[Atom]
    outputs: Sequence[Value]

    def run(self, env: Bindings) -> None:
        results = bind(self.eqn, [env[atom] for atom in self.inputs])
        for value, result in zip(self.outputs, results, strict=True):
            env[value] = result


@dataclasses.dataclass(eq=False)
class Use:
    """One way in which values that only parameters determine meet the batch.

    Attributes:
      primitive: name of the operation.
      operands: the values that parameters determine.
      local: `(operands, env, saved) -> outputs`, the operation for one environment.
      eqn, side: the equation and the position of the only operand in it, where the
        use is one equation with one operand; -1 elsewhere.
      steps: lengths of the loops around it.
      path: where a program's saved values and cotangents hold this use's.
      reason: why the operands were copied for each environment, if they were.
      constants: what `local` reads from `env`.
    """

    primitive: str
    operands: tuple[Value, ...]
    local: Callable[[Sequence[Any], Bindings, Any], list[Any]]
    eqn: Any = None
    side: int = -1
    steps: tuple[int, ...] = ()
    path: tuple[int, ...] = ()
    reason: str = ""
    constants: tuple[Value, ...] = ()

    def at(self, tree: Any) -> Any:
        for index in self.path:
            tree = tree[index]
        return tree

    def pull(
        self, operands: Sequence[Any], env: Bindings, saved: Any, cotangents: Any
    ) -> Any:
        """Cotangents of the operands, from those of the outputs; one environment."""
        _, vjp = jax.vjp(lambda *values: self.local(values, env, saved), *operands)
        return vjp(list(cotangents))


class Site(abc.ABC):
    """A place in a program where there are uses.

    `zeros()` are added to the outputs: their gradients are the cotangents.
    """

    uses: list[Use]

    @abc.abstractmethod
    def zeros(self) -> Any: ...

    @abc.abstractmethod
    def run(self, env: Bindings, zeros: Any) -> Any:
        """Computes the outputs into `env` and returns what the uses need saved."""


class Copy(Site):
    """A copy of a value for each environment: right for any use whatsoever."""

    def __init__(self, value: Value, reason: str) -> None:
        self.value, self.output = value, Value(value.aval, Kind.BATCH)
        self.uses = [
            Use(
                "copy",
                (value,),
                lambda operands, env, saved: list(operands),
                reason=reason,
            )
        ]

    def zeros(self) -> Any:
        return [_zeros(self.value.aval)]

    def run(self, env: Bindings, zeros: Any) -> Any:
        env[self.output] = _plus(env[self.value], zeros[0])
        return []


class Operation(Site):
    """An equation with parameters among its inputs."""

    def __init__(self, eqn: Any, inputs: Sequence[Atom], outputs: Sequence[Value]):
        self.eqn, self.inputs, self.outputs = eqn, inputs, outputs
        sides = [i for i, atom in enumerate(inputs) if _is(atom, Kind.PARAM)]
        self._saved = [i for i, atom in enumerate(inputs) if _is(atom, Kind.BATCH)]
        operands = tuple(inputs[i] for i in sides)

        def local(values: Sequence[Any], env: Bindings, saved: Any) -> list[Any]:
            arguments = [
                None if i in sides or i in self._saved else env[atom]
                for i, atom in enumerate(inputs)
            ]
            for i, value in zip(sides, values, strict=True):
                arguments[i] = value
            for i, value in zip(self._saved, saved, strict=True):
                arguments[i] = value
            if eqn.primitive.name in REMAT:
                # What is recomputed one environment at a time needs no second
                # recomputation.
                results = run_jaxpr(eqn.params["jaxpr"], arguments)
            else:
                results = bind(eqn, arguments)
            return [results[i] for i in self._tagged]

        self._tagged = [i for i, out in enumerate(outputs) if inexact(out.aval)]
        self.uses = [
            Use(
                eqn.primitive.name,
                operands,
                local,
                eqn,
                side=sides[0] if len(sides) == 1 else -1,
                constants=_constants(inputs),
            )
        ]

    def zeros(self) -> Any:
        return [_zeros(self.outputs[i].aval) for i in self._tagged]

    def run(self, env: Bindings, zeros: Any) -> Any:
        results = bind(self.eqn, [env[atom] for atom in self.inputs])
        for i, zero in zip(self._tagged, zeros, strict=True):
            results[i] = _plus(results[i], zero)
        for value, result in zip(self.outputs, results, strict=True):
            env[value] = result
        return [env[self.inputs[i]] for i in self._saved]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many of a `scan` equation's inputs are constants, and how many carries."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    # Since jax 0.11.
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


class Loop(Site):
    """A `lax.scan` with parameters among its constants or what it runs over."""

    def __init__(
        self,
        eqn: Any,
        inputs: Sequence[Atom],
        outputs: Sequence[Value],
        body: "Program",
        invariant: Sequence[int],
    ) -> None:
        params = eqn.params
        self._eqn, self._outputs, self._body = eqn, outputs, body
        self._length: int = params["length"]
        consts, carries = scan_counts(eqn)
        fixed = [*range(consts), *(consts + i for i in invariant)]
        moving = [i for i in range(carries) if i not in invariant]
        self._fixed = [(body.inputs[i], inputs[i]) for i in fixed]
        self._carry = [(body.inputs[consts + i], inputs[consts + i]) for i in moving]
        self._moving, self._invariant = moving, invariant
        self._xs = list(
            zip(
                body.inputs[consts + carries :], inputs[consts + carries :], strict=True
            )
        )
        self._init = inputs[consts : consts + carries]
        self.uses = []
        for index, site in enumerate(body.sites):
            for use in site.uses:
                self.uses.append(self._outside(index, use))

    def _outside(self, index: int, use: Use) -> Use:
        """A use in the body as one of the whole loop."""
        body, length = self._body, self._length
        roots = body.roots(use.operands)
        fixed = [(inner, outer) for inner, outer in self._fixed if inner in roots]
        over = [(inner, outer) for inner, outer in self._xs if inner in roots]
        consts = [pair for pair in self._fixed if _is(pair[0], Kind.CONST)]
        over_consts = [pair for pair in self._xs if _is(pair[0], Kind.CONST)]
        operands = tuple(dict.fromkeys(outer for _, outer in (*fixed, *over)))

        def local(values: Sequence[Any], env: Bindings, saved: Any) -> list[Any]:
            given = dict(zip(operands, values, strict=True))

            def one(slices: Any, const_slices: Any, saved_slice: Any) -> list[Any]:
                inside = Bindings()
                for inner, outer in consts:
                    inside[inner] = env[outer]
                for (inner, _), value in zip(over_consts, const_slices, strict=True):
                    inside[inner] = value
                for inner, outer in fixed:
                    inside[inner] = given[outer]
                for (inner, _), value in zip(over, slices, strict=True):
                    inside[inner] = value
                body.run_hoisted(inside, (*use.operands, *use.constants))
                return use.local([inside[o] for o in use.operands], inside, saved_slice)

            # All steps at once: the sum over steps becomes part of the product.
            return jax.vmap(one, axis_size=length)(
                [given[outer] for _, outer in over],
                [env[outer] for _, outer in over_consts],
                saved,
            )

        return Use(
            use.primitive,
            operands,
            local,
            steps=(length, *use.steps),
            path=(index, *use.path),
            reason=use.reason,
            constants=_constants([outer for _, outer in (*consts, *over_consts)]),
        )

    def zeros(self) -> Any:
        def over_steps(leaf: jax.Array) -> jax.Array:
            return jnp.broadcast_to(leaf[None], (self._length, *leaf.shape))

        return jax.tree.map(over_steps, [site.zeros() for site in self._body.sites])

    def run(self, env: Bindings, zeros: Any) -> Any:
        body, params = self._body, self._eqn.params

        def step(carry: Any, xs: Any) -> Any:
            slices, zeros = xs
            inside = Bindings()
            for inner, outer in self._fixed:
                inside[inner] = env[outer]
            for (inner, _), value in zip(self._carry, carry, strict=True):
                inside[inner] = value
            for (inner, _), value in zip(self._xs, slices, strict=True):
                inside[inner] = value
            body.run_hoisted(inside)
            saved = body.run(inside, zeros)
            results = [inside[atom] for atom in body.outputs]
            carry = [results[i] for i in self._moving]
            return carry, (results[len(self._init) :], saved)

        carry = [jnp.asarray(env[atom]) for _, atom in self._carry]
        carry, (ys, saved) = jax.lax.scan(
            step,
            carry,
            ([env[atom] for _, atom in self._xs], zeros),
            length=self._length,
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        final = dict(zip(self._moving, carry, strict=True))
        final |= {i: env[self._init[i]] for i in self._invariant}
        results = [final[i] for i in range(len(self._init))] + list(ys)
        for value, result in zip(self._outputs, results, strict=True):
            env[value] = result
        return saved


@dataclasses.dataclass(eq=False)
class Program:
    """A jaxpr, sorted.

    Attributes:
      inputs: as in the jaxpr.
      hoisted: what parameters and constants determine, the same for all environments.
      steps: everything else, in order.
      outputs: as in the jaxpr.
    """

    inputs: list[Value]
    hoisted: list[Step] = dataclasses.field(default_factory=list)
    steps: list[Step | Site] = dataclasses.field(default_factory=list)
    outputs: list[Atom] = dataclasses.field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        return [step for step in self.steps if isinstance(step, Site)]

    @property
    def uses(self) -> list[Use]:
        return [
            dataclasses.replace(use, path=(index, *use.path))
            for index, site in enumerate(self.sites)
            for use in site.uses
        ]

    def needed(self, targets: Sequence[Atom]) -> tuple[list[Step], set[Value]]:
        """The hoisted steps that `targets` depend on, and all values on the way."""
        wanted = {t for t in targets if isinstance(t, Value)}
        steps = []
        for step in reversed(self.hoisted):
            if any(output in wanted for output in step.outputs):
                steps.append(step)
                wanted |= {a for a in step.inputs if isinstance(a, Value)}
        return steps[::-1], wanted

    def roots(self, targets: Sequence[Atom]) -> list[Value]:
        """The inputs of kind PARAM that `targets` depend on."""
        _, wanted = self.needed(targets)
        return [v for v in self.inputs if v in wanted and v.kind is Kind.PARAM]

    def run_hoisted(self, env: Bindings, targets: Sequence[Atom] | None = None) -> None:
        steps = self.hoisted if targets is None else self.needed(targets)[0]
        for step in steps:
            step.run(env)

    def zeros(self) -> Any:
        return [site.zeros() for site in self.sites]

    def run(self, env: Bindings, zeros: Any) -> Any:
        """Computes all that depends on the batch and returns what uses need saved."""
        saved, zeros = [], iter(zeros)
        for step in self.steps:
            if isinstance(step, Site):
                saved.append(step.run(env, next(zeros)))
            else:
                step.run(env)
        return saved


_NO_DEBUG_INFO = jex.DebugInfo("hardvary", "", None, None)
REMAT = ("checkpoint", "remat", "remat2")
INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
# Operations whose gradient one can take by themselves, environment by environment.
OPERATIONS = (
    "dot_general",
    "conv_general_dilated",
    "gather",
    "dynamic_slice",
    "ragged_dot_general",
    *REMAT,
)


def build(
    jaxpr: Any, consts: Sequence[Value], kinds: Sequence[Kind], differentiated: Any
) -> Program:
    """Sorts a jaxpr.

    Args:
      jaxpr: an open jaxpr.
      consts: values for its constvars.
      kinds: of its inputs.
      differentiated: indices of the outputs through which gradients flow.

    Returns:
      The program.
    """
    inputs = [
        Value(var.aval, kind) for var, kind in zip(jaxpr.invars, kinds, strict=True)
    ]
    program = Program(inputs)
    builder = _Builder(program)
    outputs = builder.add(jaxpr, consts, inputs)
    program.outputs = [
        builder.copy(atom, "the output")
        if i in differentiated and _is(atom, Kind.PARAM)
        else atom
        for i, atom in enumerate(outputs)
    ]
    return program


class _Builder:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._copies: dict[Value, Copy] = {}

    def copy(self, atom: Atom, reason: str) -> Atom:
        """`atom`, or its copy for each environment if parameters determine it."""
        if not _is(atom, Kind.PARAM):
            return atom
        if atom not in self._copies:
            self._copies[atom] = Copy(atom, reason)
            self._program.steps.append(self._copies[atom])
        return self._copies[atom].output

    def add(
        self, jaxpr: Any, consts: Sequence[Atom], inputs: Sequence[Atom]
    ) -> list[Atom]:
        """Adds a jaxpr's equations and returns its outputs."""
        known: dict[Any, Atom] = {}
        known.update(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, jex.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[Atom]) -> list[Atom]:
        name = eqn.primitive.name
        has_params = any(_is(atom, Kind.PARAM) for atom in inputs)
        has_batch = any(_is(atom, Kind.BATCH) for atom in inputs)
        if has_params and name in INLINED:
            inner = eqn.params[INLINED[name]]
            consts = [Value(jax.typeof(c), Kind.CONST) for c in _consts(inner)]
            for value, const in zip(consts, _consts(inner), strict=True):
                self._program.hoisted.append(_Constant(value, const))
            return self.add(_open(inner), consts, inputs)
        if not has_batch and not eqn.effects:
            stops = name == "stop_gradient"
            outputs = [
                Value(
                    var.aval,
                    Kind.PARAM
                    if has_params and not stops and inexact(var.aval)
                    else Kind.CONST,
                )
                for var in eqn.outvars
            ]
            self._program.hoisted.append(Step(eqn, inputs, outputs))
            return list(outputs)
        outputs = [Value(var.aval, Kind.BATCH) for var in eqn.outvars]
        if has_params and not eqn.effects:
            if name == "scan" and eqn.params["length"] > 0:
                return self._loop(eqn, inputs, outputs)
            if name in OPERATIONS:
                self._program.steps.append(Operation(eqn, inputs, outputs))
                return list(outputs)
        if has_params and name != "stop_gradient":
            inputs = [self.copy(atom, name) for atom in inputs]
        self._program.steps.append(Step(eqn, inputs, outputs))
        return list(outputs)

    def _loop(self, eqn: Any, inputs: list[Atom], outputs: list[Value]) -> list[Atom]:
        closed = eqn.params["jaxpr"]
        jaxpr = closed.jaxpr
        consts, carries = scan_counts(eqn)
        invariant = [
            i
            for i in range(carries)
            if jaxpr.outvars[i] is jaxpr.invars[consts + i]
            and not _is(inputs[consts + i], Kind.BATCH)
        ]
        for i in range(carries):
            if i not in invariant:
                where = consts + i
                inputs[where] = self.copy(inputs[where], "a loop changes it")
        kinds = [_kind(atom) for atom in inputs]
        for i in range(carries):
            if i not in invariant:
                kinds[consts + i] = Kind.BATCH
        inner_consts = [Value(jax.typeof(c), Kind.CONST) for c in closed.consts]
        checked = [i for i in range(len(jaxpr.outvars)) if i not in invariant]
        body = build(jaxpr, inner_consts, kinds, checked)
        body.hoisted[:0] = [
            _Constant(v, c) for v, c in zip(inner_consts, closed.consts, strict=True)
        ]
        self._program.steps.append(Loop(eqn, inputs, outputs, body, invariant))
        results: list[Atom] = list(outputs)
        for i in invariant:
            results[i] = inputs[consts + i]
        return results


class _Constant(Step):
    """A constant that a nested jaxpr holds."""

    def __init__(self, value: Value, const: Any) -> None:
        super().__init__(None, [], [value])
        self._const = const

    def run(self, env: Bindings) -> None:
        env[self.outputs[0]] = self._const


def bind(eqn: Any, arguments: Sequence[Any]) -> list[Any]:
    """Applies an equation to other arguments."""
    given = {
        var: argument
        for var, argument in zip(eqn.invars, arguments, strict=True)
        if not isinstance(var, jex.Literal)
    }
    jaxpr = jex.Jaxpr(
        constvars=(),
        invars=list(given),
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=_NO_DEBUG_INFO,
    )
    return list(jax.core.eval_jaxpr(jaxpr, (), *given.values()))


def run_jaxpr(jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
    closed = jex.ClosedJaxpr(_open(jaxpr), _consts(jaxpr))
    return list(jex.jaxpr_as_fun(closed)(*arguments))


def on_cpu() -> bool:
    """Whether computations go to a CPU unless told otherwise.

    Results do not depend on it: it picks the faster of two ways, and is asked while
    tracing so that only that one is traced.
    """
    return jax.default_backend() == "cpu"


def inexact(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


def _consts(jaxpr: Any) -> Sequence[Any]:
    return jaxpr.consts if isinstance(jaxpr, jex.ClosedJaxpr) else ()


def _kind(atom: Atom) -> Kind:
    return atom.kind if isinstance(atom, Value) else Kind.CONST


def _is(atom: Atom, kind: Kind) -> bool:
    return _kind(atom) is kind


def _constants(atoms: Sequence[Atom]) -> tuple[Value, ...]:
    return tuple(a for a in atoms if isinstance(a, Value) and a.kind is Kind.CONST)


def _zeros(aval: Any) -> jax.Array:
    zeros = jnp.zeros(aval.shape, aval.dtype)
    varying = tuple(sorted(aval.manual_axis_type.varying))
    # A gradient is summed over the axes that its variable does not vary over.
    return jax.lax.pcast(zeros, varying, to="varying") if varying else zeros


def _plus(value: Any, zero: jax.Array) -> jax.Array:
    return jax.lax.add(jnp.asarray(value, zero.dtype), zero)
