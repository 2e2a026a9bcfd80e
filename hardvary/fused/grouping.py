"""The fused oracle: statistics of gradients that are never stacked.

One forward and one backward pass for all environments, as in plain training. What the
uses of the parameters leave behind, inputs and cotangents, is then reduced layer by
layer:

- `product`: an environment's gradient is one outer product, whose sign is the product
  of signs; one more matrix product sums them over environments.
- `lookup`: rows of a table; only the rows that were looked up are touched.
- `stack`: small gradients, and those of which nothing better is known.
- `scan`: one environment at a time, added up.

(Paper, section 3, asks for it: the time and memory of gradient descent.)
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from hardvary import _validate
from hardvary._env_grads.statistics import (
    along_envs,
    contribution,
    sign_or_nan,
    sum_over_envs,
    vary_like,
    zero_sum,
)
from hardvary.fused.rules import convolution
from hardvary.fused.traced import Traced
from hardvary.fused.tracing import Bindings, Program, Use, Value, on_cpu

PyTree = Any

# Functions f of which f(a b) = f(a) f(b): what a product's sum over environments needs.
MULTIPLICATIVE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "mean": lambda factor: factor,
    "sign": sign_or_nan,
    "square": jnp.square,
}
# Equations that rearrange a parameter, entry by entry.
LAYOUT = ("reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p")
CASTS = ("convert_element_type",)
# Gradients this small are cheaper to stack than to go through one by one.
SMALL = 4096
# Environments whose convolutions' gradients are added up at once, on CPU.
UNROLL = 2
# Environments whose signs are counted at once, on CPU: a few words.
PART = 128


@dataclasses.dataclass(eq=False)
class Group:
    """Parameters whose gradients have to be computed together, and how.

    Attributes:
      leaves: positions among the parameters.
      uses: all uses of these.
      rule: `"product"`, `"lookup"`, `"stack"`, `"scan"`, or `"unused"`.
      reason: why not a faster rule.
    """

    leaves: tuple[int, ...]
    uses: list[Use]
    rule: str = ""
    reason: str = ""


def groups_of(program: Program, num_leaves: int) -> list[Group]:
    """Sorts the parameters into groups and decides on a rule for each."""
    inputs = program.inputs[:num_leaves]
    position = {value: i for i, value in enumerate(inputs)}
    parent = list(range(num_leaves))

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    uses = program.uses
    roots = [[position[v] for v in program.roots(use.operands)] for use in uses]
    for together in roots:
        for other in together[1:]:
            parent[find(other)] = find(together[0])
    groups: dict[int, Group] = {}
    for i in range(num_leaves):
        group = groups.setdefault(find(i), Group((), []))
        group.leaves += (i,)
    for use, together in zip(uses, roots, strict=True):
        if together:
            groups[find(together[0])].uses.append(use)
    for group in groups.values():
        _decide(program, group)
    return list(groups.values())


def _decide(program: Program, group: Group) -> None:
    leaves = [program.inputs[i] for i in group.leaves]
    size = sum(leaf.size for leaf in leaves)
    if not group.uses:
        group.rule = "unused"
        group.reason = "no gradient reaches it"
        return
    only = group.uses[0] if len(group.uses) == 1 else None
    if only is not None and len(leaves) == 1:
        layout = not only.steps and _is_layout(program, only.operands[0])
        if layout and only.primitive == "dot_general" and _is_real(only):
            if _rows(only) == 1:
                group.rule = "product"
                group.reason = "one outer product per environment"
                return
            group.reason = f"a sum of {_rows(only)} outer products"
        elif layout and only.primitive == "gather":
            lookups = _lookups(only)
            if lookups is not None and lookups**2 <= size:
                group.rule = "lookup"
                group.reason = f"{lookups} rows per environment"
                return
    copies = all(use.primitive == "copy" for use in group.uses)
    small = size <= SMALL and not any(convolution.applies(use) for use in group.uses)
    if copies or small:
        group.rule = "stack"
    else:
        group.rule = "scan"
    if not group.reason or copies:
        names = sorted({f"in {use.reason or use.primitive}" for use in group.uses})
        group.reason = ", ".join(names)
        if len(group.uses) > 1:
            group.reason = f"{len(group.uses)} uses: {group.reason}"


def _is_layout(program: Program, value: Value) -> bool:
    """Whether `value` is a parameter with its entries rearranged or cast, no more."""
    steps, _ = program.needed([value])
    for step in steps:
        name = step.eqn.primitive.name if step.eqn is not None else "constant"
        if name in LAYOUT or name in CASTS:
            continue
        if name == "broadcast_in_dim" and step.outputs[0].size == _size(step.inputs[0]):
            continue
        return False
    return True


def _is_real(use: Use) -> bool:
    """Whether signs are what they seem: the real part of a product has no factors."""
    variables = (*use.eqn.invars, *use.eqn.outvars)
    return all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in variables)


def _size(atom: Any) -> int:
    return math.prod(
        np.shape(atom.val) if isinstance(atom, jex.Literal) else atom.aval.shape
    )


def sums(
    traced: Traced, statistics: Sequence[str], weights: jax.Array | None
) -> dict[str, PyTree]:
    """Sums of statistics over the environments, as `sum_over_envs` returns them."""
    leaves: dict[str, list[Any]] = {
        name: [None] * len(traced.leaves) for name in statistics
    }
    for group in groups_of(traced.program, len(traced.leaves)):
        results = _RULES[group.rule](traced, group, statistics, weights)
        for name in statistics:
            for i, leaf in zip(group.leaves, results[name], strict=True):
                leaves[name][i] = leaf
    return {name: jax.tree.unflatten(traced.tree, leaves[name]) for name in statistics}


Sums = dict[str, list[jax.Array]]


def _unused(
    traced: Traced,
    group: Group,
    statistics: Sequence[str],
    weights: jax.Array | None,
) -> Sums:
    def total(leaf: Any, name: str) -> jax.Array:
        zero = zero_sum(leaf)
        count = traced.num_envs if weights is None else jnp.sum(weights)
        return contribution(name)(zero) * jnp.asarray(count, zero.dtype)

    return {
        name: [total(traced.leaves[i], name) for i in group.leaves]
        for name in statistics
    }


def _pull(traced: Traced, group: Group) -> Callable[[Any, Any], list[jax.Array]]:
    """Gradients of a group's parameters from what one environment left behind."""
    program = traced.program
    operands = list(dict.fromkeys(o for use in group.uses for o in use.operands))
    inputs = [program.inputs[i] for i in group.leaves]

    def determine(*leaves: Any) -> list[Any]:
        inside = Bindings(traced.env)
        for value, leaf in zip(inputs, leaves, strict=True):
            inside[value] = leaf
        program.run_hoisted(inside, operands)
        return [inside[operand] for operand in operands]

    leaves = [jnp.asarray(traced.leaves[i]) for i in group.leaves]
    values, back = jax.vjp(determine, *leaves)
    given = dict(zip(operands, values, strict=True))

    def pull(saved: Any, cotangents: Any) -> list[jax.Array]:
        totals: dict[Value, Any] = {}
        for use, use_saved, use_cotangents in zip(
            group.uses, saved, cotangents, strict=True
        ):
            arguments = [given[o] for o in use.operands]
            pull_use = convolution.pull if convolution.applies(use) else Use.pull
            results = pull_use(use, arguments, traced.env, use_saved, use_cotangents)
            for operand, result in zip(use.operands, results, strict=True):
                if operand in totals:
                    result = jax.lax.add(totals[operand], result)
                totals[operand] = result
        return list(back([totals[operand] for operand in operands]))

    return pull


def _left_behind(traced: Traced, group: Group) -> tuple[list[Any], list[Any]]:
    return (
        [use.at(traced.saved) for use in group.uses],
        [use.at(traced.cotangents) for use in group.uses],
    )


def _stack(
    traced: Traced,
    group: Group,
    statistics: Sequence[str],
    weights: jax.Array | None,
) -> Sums:
    saved, cotangents = _left_behind(traced, group)
    grads = jax.vmap(_pull(traced, group))(saved, cotangents)
    return sum_over_envs(grads, statistics, weights)


def _scan(
    traced: Traced,
    group: Group,
    statistics: Sequence[str],
    weights: jax.Array | None,
) -> Sums:
    pull = _pull(traced, group)
    inputs = (*_left_behind(traced, group), weights)

    leaves = [traced.leaves[i] for i in group.leaves]
    zeros = {name: [zero_sum(leaf) for leaf in leaves] for name in statistics}
    zeros = vary_like(zeros, (inputs, traced.leaves))

    def one(total: Sums, inputs: Any) -> tuple[Sums, None]:
        saved, cotangents, weight = inputs
        grads = [g[None] for g in pull(saved, cotangents)]
        weight = None if weight is None else weight[None]
        return _add(total, sum_over_envs(grads, statistics, weight)), None

    def several(total: Sums, inputs: Any) -> tuple[Sums, None]:
        saved, cotangents, weights = inputs
        grads = jax.vmap(pull)(saved, cotangents)
        return _add(total, sum_over_envs(grads, statistics, weights)), None

    # One environment at a time stays in a CPU's cache and leaves an accelerator idle:
    # there, as many as need no more memory than what was left behind and two copies of
    # all parameters.
    elements = sum(leaf.size for leaf in jax.tree.leaves(inputs))
    elements += 2 * sum(np.size(leaf) for leaf in traced.leaves)
    gradient = sum(leaf.size for leaf in jax.tree.leaves(zeros)) // len(statistics)
    size = 1 if on_cpu() else _divisor(traced.num_envs, elements // gradient)
    if size == 1:
        # Several in a row are added to the sums in one pass over these.
        unroll = UNROLL if any(convolution.applies(use) for use in group.uses) else 1
        return jax.lax.scan(one, zeros, inputs, unroll=unroll)[0]
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), inputs)
    return jax.lax.scan(several, zeros, parts)[0]


def _add(total: Sums, added: Sums) -> Sums:
    return jax.tree.map(jnp.add, total, added)


def _divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` up to a bound, at least 1."""
    return max(
        d for d in range(1, number + 1) if number % d == 0 and d <= max(at_most, 1)
    )


# The rule for one outer product per environment.


def _sides(use: Use) -> tuple[Any, ...]:
    """Contracted and batch axes of parameter and data, and the data's other axes."""
    contract, batch = use.eqn.params["dimension_numbers"]
    mine, other = use.side, 1 - use.side
    ndim = use.eqn.invars[other].aval.ndim
    free = [i for i in range(ndim) if i not in (*contract[other], *batch[other])]
    return contract[mine], batch[mine], contract[other], batch[other], free


def _rows(use: Use) -> int:
    """Products that an environment's gradient is the sum of."""
    *_, free = _sides(use)
    shape = use.eqn.invars[1 - use.side].aval.shape
    return math.prod(shape[i] for i in free)


def _outer(
    use: Use,
    data: jax.Array,
    cotangent: jax.Array,
    dtype: Any,
    precision: Any,
) -> jax.Array:
    """Sums the products of all environments, in the layout of the parameter."""
    mine_contract, mine_batch, contract, batch, free = _sides(use)
    ndim = use.eqn.invars[use.side].aval.ndim
    mine_free = [i for i in range(ndim) if i not in (*mine_contract, *mine_batch)]
    # The output has batch axes, free axes of the left side, those of the right side.
    before = len(batch) + (len(mine_free) if use.side == 0 else 0)
    rows = range(before, before + len(free))
    up = lambda axes: tuple(axis + 1 for axis in axes)  # noqa: E731
    product = jax.lax.dot_general(
        data,
        cotangent,
        (
            ((0, *up(free)), (0, *up(rows))),
            (up(batch), up(range(len(batch)))),
        ),
        precision=precision,
        preferred_element_type=dtype,
    )
    # Now: batch axes, contracted axes in the data's order, the parameter's free axes.
    in_order = sorted(range(len(contract)), key=lambda i: contract[i])
    axes = [*mine_batch, *(mine_contract[i] for i in in_order), *mine_free]
    return jnp.transpose(product, [axes.index(axis) for axis in range(len(axes))])


def _product(
    traced: Traced,
    group: Group,
    statistics: Sequence[str],
    weights: jax.Array | None,
) -> Sums:
    rest = [name for name in statistics if name not in MULTIPLICATIVE]
    # log(|a b| + eps) is no product of anything.
    result = _scan(traced, group, rest, weights) if rest else {}
    (use,), (leaf,) = group.uses, group.leaves
    (data,), (cotangent,) = use.at(traced.saved), use.at(traced.cotangents)
    dtype = _validate.wide(jnp.result_type(traced.leaves[leaf]))
    if weights is not None:
        # 0 * NaN is NaN: an absent environment may hold anything.
        present = lambda x: jnp.where(along_envs(weights, x) > 0, x, 0)  # noqa: E731
        data, cotangent = present(data), present(cotangent)
    for name in statistics:
        if name in rest:
            continue
        if name == "sign" and weights is None:
            total = _sum_of_signs(use, data, cotangent, dtype)
        else:
            function = MULTIPLICATIVE[name]
            left, right = function(data), function(cotangent)
            if name != "mean" or weights is not None:
                left, right = left.astype(dtype), right.astype(dtype)
            if weights is not None:
                right = right * along_envs(weights, right)
            # What is precise enough for gradients would round the weights of signs.
            highest = jax.lax.Precision.HIGHEST
            precision = highest if name == "sign" else use.eqn.params["precision"]
            total = _outer(use, left, right, dtype, precision)
        result[name] = [_in_layout(traced, use.operands[0], leaf, total)]
    if "mean" in statistics and "sign" in statistics:
        # Finite factors may have a product that is not.
        finite = jnp.isfinite(result["mean"][0])
        result["sign"] = [jnp.where(finite, result["sign"][0], jnp.nan)]
    return result


def _sum_of_signs(
    use: Use, data: jax.Array, cotangent: jax.Array, dtype: Any
) -> jax.Array:
    """Sums the signs of the products of all environments, as `_outer` does."""
    if not on_cpu():
        # bfloat16 holds signs exactly, NaN too, and the sums are in a wide type.
        left, right = (
            sign_or_nan(factor).astype(jnp.bfloat16) for factor in (data, cotangent)
        )
        return _outer(use, left, right, jnp.dtype(jnp.float32), None).astype(dtype)
    whole = len(data) // PART
    if whole == 0 or len(data) == PART:
        return _count_bits(use, data, cotangent).astype(dtype)

    def body(total: jax.Array, factors: Any) -> tuple[jax.Array, None]:
        return total + _count_bits(use, *factors), None

    def parts(factor: jax.Array) -> jax.Array:
        return factor[: whole * PART].reshape(whole, PART, *factor.shape[1:])

    zeros = jnp.zeros(use.operands[0].aval.shape, jnp.float32)
    total, _ = jax.lax.scan(
        body, vary_like(zeros, (data, cotangent)), (parts(data), parts(cotangent))
    )
    if len(data) % PART:
        total += _count_bits(use, data[whole * PART :], cotangent[whole * PART :])
    return total.astype(dtype)


def _count_bits(use: Use, left: jax.Array, right: jax.Array) -> jax.Array:
    """`_sum_of_signs` in float32, 32 environments in a word.

    A CPU multiplies 8 or 16 numbers at once, and so many times 32 signs.
    """
    mine_contract, mine_batch, contract, batch, free = _sides(use)
    num_batch, ndim = len(batch), use.eqn.invars[use.side].aval.ndim
    mine_free = [i for i in range(ndim) if i not in (*mine_contract, *mine_batch)]
    left = jnp.transpose(
        left, (0, *(i + 1 for i in (*batch, *contract, *free)))
    ).reshape(*(left.shape[0], *(left.shape[i + 1] for i in (*batch, *contract))))
    # One row: what is not a batch axis of the output belongs to the parameter.
    sizes = [use.eqn.invars[use.side].aval.shape[i] for i in (*mine_batch, *mine_free)]
    right = right.reshape(len(right), *sizes)

    def spread(words: jax.Array, is_left: bool) -> jax.Array:
        """Axes [word, batch, contracted, free], of size 1 where there is none."""
        shape = words.shape
        ones = (1,) * len(mine_free if is_left else mine_contract)
        at = len(shape) if is_left else 1 + num_batch
        return words.reshape(*shape[:at], *ones, *shape[at:])

    nonzero, negative, broken = zip(_pack(left), _pack(right), strict=True)
    nonzero, negative, broken = (
        (spread(of_left, True), spread(of_right, False))
        for of_left, of_right in (nonzero, negative, broken)
    )
    total = jnp.zeros((), jnp.int32)
    for word in range(len(nonzero[0])):
        both = nonzero[0][word] & nonzero[1][word]
        differ = (negative[0][word] ^ negative[1][word]) & both
        total += jax.lax.population_count(both).astype(jnp.int32)
        total -= 2 * jax.lax.population_count(differ).astype(jnp.int32)
    product = jnp.where(broken[0][0] | broken[1][0], jnp.nan, total.astype(jnp.float32))
    axes = [*mine_batch, *mine_contract, *mine_free]
    return jnp.transpose(product, [axes.index(axis) for axis in range(ndim)])


def _pack(factor: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Signs, 32 environments in a word: not zero; negative; and `[1, ...]`, any NaN."""
    # Sums of powers of two, half a word at a time, are exact in float32, and a matrix
    # product is the fastest way to them.
    num_halves = 2 * -(-len(factor) // 32)
    powers = np.zeros((num_halves, len(factor)), np.float32)
    for env in range(len(factor)):
        powers[env // 16, env] = 2.0 ** (env % 16)

    def halves(bits: jax.Array) -> jax.Array:
        highest = jax.lax.Precision.HIGHEST
        return jnp.tensordot(powers, bits, axes=1, precision=highest)

    def words(halves: jax.Array) -> jax.Array:
        low, high = halves[0::2], halves[1::2]
        return low.astype(jnp.uint32) | (high.astype(jnp.uint32) << 16)

    sign = sign_or_nan(factor).astype(jnp.float32)
    # NaN * NaN is NaN and reaches every word.
    nonzero, negative = halves(sign * sign), halves((sign < 0).astype(jnp.float32))
    return words(nonzero), words(negative), jnp.isnan(nonzero[:1])


def _in_layout(traced: Traced, value: Value, leaf: int, total: jax.Array) -> jax.Array:
    """Rearranges what has the layout of `value` to that of the parameter."""
    program = traced.program
    source = program.inputs[leaf]
    steps, _ = program.needed([value])

    def rearrange(entries: jax.Array) -> jax.Array:
        env = Bindings()
        env[source] = entries
        for step in steps:
            if step.eqn.primitive.name in CASTS:
                env[step.outputs[0]] = env[step.inputs[0]]
            else:
                step.run(env)
        return env[value]

    like = jax.ShapeDtypeStruct(source.aval.shape, total.dtype)
    if not steps:
        return total
    (result,) = jax.linear_transpose(rearrange, like)(total)
    return result


# The rule for looking up rows of a table.


def _lookups(use: Use) -> int | None:
    """Rows that an environment looks up, None if it is not rows that it gathers."""
    params, (table, indices) = use.eqn.params, use.eqn.invars
    numbers = params["dimension_numbers"]
    rows = indices.aval.ndim - 1
    out_ndim = rows + table.aval.ndim - 1
    whole_rows = (
        use.side == 0
        and table.aval.ndim > 0
        and numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and not numbers.start_indices_batching_dims
        and numbers.offset_dims == tuple(range(rows, out_ndim))
        and params["slice_sizes"] == (1, *table.aval.shape[1:])
        and indices.aval.shape[-1] == 1
    )
    return math.prod(indices.aval.shape[:-1]) if whole_rows else None


def _lookup(
    traced: Traced,
    group: Group,
    statistics: Sequence[str],
    weights: jax.Array | None,
) -> Sums:
    (use,), (leaf,) = group.uses, group.leaves
    (cotangent,) = use.at(traced.cotangents)
    saved = use.at(traced.saved)
    shape = use.eqn.invars[0].aval.shape
    dtype = _validate.wide(jnp.result_type(traced.leaves[leaf]))
    num_envs = traced.num_envs
    indices = saved[0].reshape(num_envs, -1)
    rows = cotangent.reshape(num_envs, indices.shape[1], -1).astype(dtype)
    if use.eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP:
        indices = jnp.clip(indices, 0, shape[0] - 1)
    # An index out of range gathers nothing: a negative one would count from the end.
    indices = jnp.where(indices < 0, shape[0], indices)
    if indices.shape[1] > 1:
        # What an environment looks up more than once counts once, with its sum. The
        # sum goes to the first place, zeros stay at the others.
        first = jnp.argmax(indices[:, :, None] == indices[:, None, :], axis=2)
        rows = jax.vmap(lambda i, r: jnp.zeros_like(r).at[i].add(r))(first, rows)
    result: Sums = {}
    for name in statistics:
        function = contribution(name)
        base = function(jnp.zeros((), dtype))
        values = function(rows) - base
        count = jnp.asarray(num_envs, dtype)
        if weights is not None:
            weight = weights.astype(dtype)[:, None, None]
            values = jnp.where(weight > 0, weight * values, 0)
            count = jnp.sum(weights).astype(dtype)
        total = jnp.full((shape[0], rows.shape[-1]), base * count)
        total = total.at[indices].add(values, mode="drop")
        total = total.reshape(shape)
        result[name] = [_in_layout(traced, use.operands[0], leaf, total)]
    return result


_RULES = {
    "product": _product,
    "lookup": _lookup,
    "stack": _stack,
    "scan": _scan,
    "unused": _unused,
}
