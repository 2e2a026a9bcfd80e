"""The factors that a parameter's gradients are sums of outer products of.

Of one layout, whatever axes a `dot_general` contracts and a convolution slides over:
`[env, batch, row, input]` from the data and `[env, batch, row, output]` from the
cotangents, where batch are entries that both have, and every row is an outer product.
"""

import abc
import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _validate
from hardvary._env_grads.source import inner_products as products_of
from hardvary._loops import divisor, mapped, sum_over, zeros_after
from hardvary.fused.program import Program
from hardvary.fused.rules import convolution, inner_products, layout
from hardvary.fused.rules.inner_products import Sizes
from hardvary.fused.rules.multiply import is_swapped, multiply_rows
from hardvary.fused.uses import Use

_HIGHEST = jax.lax.Precision.HIGHEST
# Elements of an environment's part of a tile of a convolution's gradients.
_NARROWEST = 64 * 128


class Factors(abc.ABC):
    """Of one use of one parameter, whose entries it takes as they are, rearranged.

    Attributes:
      sizes: of the factors.
      input_axes: axes of the parameter, as it is used, that inputs run over.
    """

    sizes: Sizes
    input_axes: tuple[int, ...]

    def __init__(self, use: Use) -> None:
        self._use = use

    def of(self, num_envs: int) -> "Factors":
        """The same of another number of environments."""
        result = copy.copy(self)
        result.sizes = dataclasses.replace(self.sizes, num_envs=num_envs)
        return result

    def gramian_form(self) -> tuple[inner_products.Form, int]:
        """The way that `gramian` takes, and its multiplications."""
        return inner_products.gramian_form(self.sizes)

    @abc.abstractmethod
    def gramian(self, data: Any, cotangent: Any, elements: int) -> jax.Array:
        """`[env, env]` of what a pass left behind.

        Args:
          data: `[env, *steps, ...]`, the other argument of the use.
          cotangent: `[env, *steps, ...]`, of its output.
          elements: number of elements that may be held at once.
        """

    def whitened_gramian(
        self, data: Any, cotangent: Any, root: jax.Array, elements: int
    ) -> jax.Array:
        """`gramian` of gradients times `root^T`, whichever way multiplies less."""
        sizes = self.sizes
        by_rows = self.gramian_form()[0] == "rows" or sizes.rows <= sizes.outputs
        way = self._gramian_of_whitened_rows if by_rows else self._gramian_of_whitened
        return way(data, cotangent, root, elements)

    @abc.abstractmethod
    def _gramian_of_whitened_rows(
        self, data: Any, cotangent: Any, root: jax.Array, elements: int
    ) -> jax.Array:
        """As `whitened_gramian`: the data of every row times the root."""

    @abc.abstractmethod
    def _gramian_of_whitened(
        self, data: Any, cotangent: Any, root: jax.Array, elements: int
    ) -> jax.Array:
        """As `whitened_gramian`: the root times gradients, some outputs at a time."""

    @abc.abstractmethod
    def square_norms(self, data: Any, cotangent: Any, elements: int) -> jax.Array:
        """The diagonal of `gramian`, `[env]`."""

    @property
    def num_inputs(self) -> int | None:
        """Inputs that every output is a sum over, None where outputs differ in them."""
        return None if self.sizes.batch > 1 else self.sizes.pieces * self.sizes.inputs

    @abc.abstractmethod
    def moment(self, data: Any, cotangent: Any, elements: int) -> jax.Array:
        """`[input, input]`, the mean of `x x^T` over rows, the sum over environments.

        Args:
          data: see `gramian`.
          cotangent: see `gramian`; of a value that does not matter.
          elements: see `gramian`.
        """

    def times(self, root: jax.Array, parameter: jax.Array) -> jax.Array:
        """`root: [input, input]` times a parameter as it is used."""
        rest = [i for i in range(parameter.ndim) if i not in self.input_axes]
        order = [*self.input_axes, *rest]
        ordered = jnp.transpose(parameter, order)
        matrix = ordered.reshape(len(root), -1).astype(_wider(root, parameter))
        product = jnp.matmul(root.astype(matrix.dtype), matrix, precision=_HIGHEST)
        product = product.reshape(ordered.shape).astype(parameter.dtype)
        return jnp.transpose(product, [order.index(i) for i in range(len(order))])


def factors_of(program: Program, use: Use, num_envs: int) -> Factors | None:
    """The factors of a use, None where it is no sum of outer products of two."""
    takes = {"dot_general": DotGeneral, "conv_general_dilated": Convolution}
    if use.primitive not in takes or use.side < 0 or not is_real(use):
        return None
    if use.primitive == "conv_general_dilated" and (
        use.steps or not convolution.applies(use)
    ):
        return None
    if len(use.operands) != 1 or not layout.is_rearranged(program, use.operands[0]):
        return None
    factors = takes[use.primitive](use, num_envs)
    return factors if all(dataclasses.astuple(factors.sizes)) else None


def multiplies(use: Use) -> bool:
    """Whether `pull` takes `use`."""
    return (
        use.primitive == "dot_general"
        and use.side >= 0
        and len(use.operands) == 1
        and is_real(use)
        # Sizes do not tell how many outputs have no inputs.
        and all(dataclasses.astuple(DotGeneral(use, 1).sizes))
    )


def pull(
    use: Use, operands: Sequence[Any], bindings: Any, saved: Any, cotangents: Any
) -> Any:
    """As `Use.pull`, a product with a single axis of rows.

    XLA on CPU transposes the cotangents in front of one with several, as of examples
    and places, which takes as long as the product.
    """
    del bindings
    (operand,), (data,), (cotangent,) = operands, saved, cotangents
    precision = use.eqn.params["precision"]
    gradient = DotGeneral(use, 1).gradient(data, cotangent, precision)
    return (gradient.astype(operand.dtype),)


def is_real(use: Use) -> bool:
    """Whether signs are what they seem: the real part of a product has no factors."""
    operand = use.eqn.invars[use.side].aval
    results = [var.aval for var in use.eqn.outvars]
    others = [
        var.aval
        for i, var in enumerate(use.eqn.invars)
        if i != use.side and not jnp.issubdtype(var.aval.dtype, jnp.integer)
    ]
    return all(
        jnp.issubdtype(aval.dtype, jnp.floating)
        for aval in (operand, *results, *others)
    )


def sides(use: Use) -> tuple[Any, ...]:
    """Contracted and batch axes of parameter and data, and the data's other axes."""
    contract, batch = use.eqn.params["dimension_numbers"]
    mine, other = use.side, 1 - use.side
    ndim = use.eqn.invars[other].aval.ndim
    free = [i for i in range(ndim) if i not in (*contract[other], *batch[other])]
    return contract[mine], batch[mine], contract[other], batch[other], free


class DotGeneral(Factors):
    """Of a `dot_general`."""

    def __init__(self, use: Use, num_envs: int) -> None:
        super().__init__(use)
        mine_contract, mine_batch, contract, batch, free = sides(use)
        data = use.eqn.invars[1 - use.side].aval.shape
        mine = use.eqn.invars[use.side].aval.shape
        size = lambda shape, axes: math.prod(shape[axis] for axis in axes)  # noqa: E731
        self.sizes = Sizes(
            num_envs,
            size(data, batch),
            size(data, free) * math.prod(use.steps),
            size(data, contract),
            math.prod(mine) // max(size(mine, (*mine_contract, *mine_batch)), 1),
        )
        self.input_axes = tuple(mine_contract)

    def moment(self, data: Any, cotangent: Any, elements: int) -> jax.Array:
        del elements
        left, _ = self.rearranged(data, cotangent)
        rows = left.reshape(-1, self.sizes.inputs)
        return jnp.matmul(rows.T, rows, precision=_HIGHEST) / self.sizes.rows

    def whitened(self, data: jax.Array, root: jax.Array) -> jax.Array:
        """The data with their inputs times `root`, in their own layout."""
        _, _, contract, *_ = sides(self._use)
        skip = 1 + len(self._use.steps)
        axes = [axis + skip for axis in contract]
        last = jnp.moveaxis(data, axes, range(data.ndim - len(axes), data.ndim))
        rows = last.reshape(-1, len(root)).astype(_wider(root, data))
        product = jnp.matmul(rows, root.astype(rows.dtype), precision=_HIGHEST)
        product = product.reshape(last.shape).astype(data.dtype)
        return jnp.moveaxis(product, range(data.ndim - len(axes), data.ndim), axes)

    def gramian(self, data: Any, cotangent: Any, elements: int) -> jax.Array:
        return self._way_of_gramian()(*self.rearranged(data, cotangent), elements)

    def _way_of_gramian(self) -> Callable[..., jax.Array]:
        by_rows = self.gramian_form()[0] == "rows"
        return (
            inner_products.gramian_by_rows
            if by_rows
            else inner_products.gramian_by_tiles
        )

    def _gramian_of_whitened_rows(
        self, data: Any, cotangent: Any, root: jax.Array, elements: int
    ) -> jax.Array:
        left, right = self.rearranged(data, cotangent)
        left = jnp.matmul(left, root.astype(left.dtype), precision=_HIGHEST)
        return self._way_of_gramian()(left, right, elements)

    def _gramian_of_whitened(
        self, data: Any, cotangent: Any, root: jax.Array, elements: int
    ) -> jax.Array:
        left, right = self.rearranged(data, cotangent)
        return inner_products.gramian_by_tiles(left, right, elements, root)

    def square_norms(self, data: Any, cotangent: Any, elements: int) -> jax.Array:
        by_rows = inner_products.norms_form(self.sizes)[0] == "rows"
        way = (
            inner_products.square_norms_by_rows
            if by_rows
            else inner_products.square_norms_by_tiles
        )
        return way(*self.rearranged(data, cotangent), elements)

    def rearranged(self, data: Any, cotangent: Any) -> tuple[jax.Array, jax.Array]:
        """The factors, in at least float32."""
        left, right = self._rearranged(data, cotangent)
        dtype = _wider(left, right)
        return left.astype(dtype), right.astype(dtype)

    def _rearranged(self, data: Any, cotangent: Any) -> tuple[jax.Array, jax.Array]:
        use, sizes = self._use, self.sizes
        _, _, contract, batch, free = sides(use)
        skip = 1 + len(use.steps)
        front = range(1, skip)
        up = lambda axes: [axis + skip for axis in axes]  # noqa: E731
        num_batch = len(batch)
        # Batch axes come first in the output, then the free ones of the left side.
        rows = range(num_batch, num_batch + len(free))
        if use.side == 0:
            ndim = use.eqn.outvars[0].aval.ndim
            rows = range(ndim - len(free), ndim)
        others = [
            axis
            for axis in range(num_batch, use.eqn.outvars[0].aval.ndim)
            if axis not in rows
        ]
        left = jnp.transpose(data, (0, *up(batch), *front, *up(free), *up(contract)))
        right = jnp.transpose(
            cotangent, (0, *up(range(num_batch)), *front, *up(rows), *up(others))
        )
        leading = (len(left), sizes.batch, sizes.rows)
        return (
            left.reshape(*leading, sizes.inputs),
            right.reshape(*leading, sizes.outputs),
        )

    def gradient(self, data: Any, cotangent: Any, precision: Any) -> jax.Array:
        """The gradient of one environment as the use takes it, at least float32.

        Args:
          data: `[*steps, ...]`, the other argument of the use.
          cotangent: `[*steps, ...]`, of its output.
          precision: of the product.
        """
        left, right = self._rearranged(data[None], cotangent[None])
        dtype = _wider(left, right)
        if left.dtype != right.dtype:
            left, right = left.astype(dtype), right.astype(dtype)
        product = multiply_rows(
            left[0],
            right[0],
            (((1,), (1,)), ((0,), (0,))),
            precision=precision,
            preferred_element_type=dtype,
        )
        return self.as_used(product)

    def stack(
        self, data: Any, cotangent: Any, root: jax.Array | None = None
    ) -> jax.Array:
        """All gradients, times the root's transpose.

        `[env, batch, input, output]` or `[env, batch, output, input]`, see `of_stack`.
        """
        left, right = self.rearranged(data, cotangent)
        by_rows = self.sizes.rows <= self.sizes.outputs
        if root is not None:
            root = root.astype(left.dtype)
            if by_rows:
                left = jnp.matmul(left, root, precision=_HIGHEST)
        swapped = self._stacks_swapped(left.dtype)
        pair, order = ((right, left), "oi") if swapped else ((left, right), "io")
        rows_of_batch = ((2,), (2,)), ((0, 1), (0, 1))
        grads = jax.lax.dot_general(*pair, rows_of_batch, precision=_HIGHEST)
        if root is not None and not by_rows:
            product = f"ij,eb{order}->eb{order.replace('i', 'j')}"
            grads = jnp.einsum(product, root, grads, precision=_HIGHEST)
        return grads

    def of_stack(self, total: jax.Array) -> jax.Array:
        """A sum over the environments of `stack`, in the layout of `as_used`."""
        swapped = self._stacks_swapped(total.dtype)
        return self.as_used(jnp.swapaxes(total, -1, -2) if swapped else total)

    def _stacks_swapped(self, dtype: Any) -> bool:
        sizes = self.sizes
        return is_swapped(sizes.rows, sizes.inputs, sizes.outputs, dtype)

    def sum(self, data: Any, cotangent: Any, dtype: Any, precision: Any) -> jax.Array:
        """The sum of all outer products, in the layout in which the use takes it."""
        left, right = self.rearranged(data, cotangent)
        product = multiply_rows(
            left.astype(dtype),
            right.astype(dtype),
            (((0, 2), (0, 2)), ((1,), (1,))),
            precision=precision,
        )
        return self.as_used(product)

    def as_used(self, total: jax.Array) -> jax.Array:
        """`[batch, input, output]` in the layout in which the use takes it."""
        use = self._use
        mine_contract, mine_batch, *_ = sides(use)
        shape = use.eqn.invars[use.side].aval.shape
        mine_free = [
            i for i in range(len(shape)) if i not in (*mine_contract, *mine_batch)
        ]
        axes = [*mine_batch, *mine_contract, *mine_free]
        total = total.reshape([shape[axis] for axis in axes])
        return jnp.transpose(total, [axes.index(axis) for axis in range(len(axes))])


class Convolution(Factors):
    """Of a convolution: every place of its window is a parameter with its own data."""

    def __init__(self, use: Use, num_envs: int) -> None:
        super().__init__(use)
        kernel = use.eqn.invars[1].aval
        (out,) = (var.aval for var in use.eqn.outvars)
        params = use.eqn.params
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        out_axis, in_axis, *window = numbers.rhs_spec
        rows = out.size // max(out.shape[numbers.out_spec[1]], 1)
        self.sizes = Sizes(
            num_envs,
            groups,
            rows,
            kernel.shape[in_axis],
            kernel.shape[out_axis] // groups,
            math.prod(kernel.shape[axis] for axis in window),
        )
        self.input_axes = (*window, in_axis)

    def moment(self, data: Any, cotangent: Any, elements: int) -> jax.Array:
        patches = self.sizes.rows * self.sizes.pieces * self.sizes.inputs
        size = divisor(len(data), elements // patches)

        def of_part(start: jax.Array) -> jax.Array:
            own, sent = (
                jax.lax.dynamic_slice_in_dim(array, start, size)
                for array in (data, cotangent)
            )
            rows = self._pieces(own, sent).side_by_side()[:, 0]
            return jnp.matmul(rows.T, rows, precision=_HIGHEST)

        starts = np.arange(0, len(data), size, dtype=np.uint32)
        total = sum_over(of_part, starts, (data, cotangent))
        order = self._pieces(data[:1], cotangent[:1]).window_order()
        return total[order][:, order] / self.sizes.rows

    def _gramian_of_whitened_rows(
        self, data: Any, cotangent: Any, root: jax.Array, elements: int
    ) -> jax.Array:
        pieces, num_envs = self._pieces(data, cotangent), len(data)
        right = self._by_env(pieces.right, num_envs)
        # Narrower tiles took a step of a CNN a sixth longer on a CPU.
        elements *= 3
        tile = num_envs * max(self.sizes.rows, self.sizes.outputs)
        size = divisor(len(root), elements // tile)

        def of(start: jax.Array) -> jax.Array:
            columns = jax.lax.dynamic_slice_in_dim(root, start, size, axis=1)
            rows = self._times_patches(data, cotangent, columns)
            left = self._by_env(rows[:, None], num_envs)
            return inner_products.gramian_by_tiles(left, right, elements)

        starts = np.arange(0, len(root), size, dtype=np.uint32)
        return sum_over(of, starts, (data, cotangent, root))

    def _gramian_of_whitened(
        self, data: Any, cotangent: Any, root: jax.Array, elements: int
    ) -> jax.Array:
        params = self._use.eqn.params
        numbers, outputs = params["dimension_numbers"], self.sizes.outputs
        tile = len(data) * len(root)
        size = divisor(outputs, elements // tile)
        shape = list(self._use.eqn.invars[1].aval.shape)
        shape[numbers.rhs_spec[0]] = size

        def of(start: jax.Array) -> jax.Array:
            axis = 1 + numbers.out_spec[1]
            part = jax.lax.dynamic_slice_in_dim(cotangent, start, size, axis)

            def of_env(pair: Any) -> jax.Array:
                own, sent = pair
                return convolution.kernel_gradient(own, sent, params, shape, alone=True)

            # One at a time, as in `Scan`.
            grads = mapped(of_env, (data, part))
            return products_of(jax.vmap(self.times, (None, 0))(root.T, grads))

        starts = np.arange(0, outputs, size, dtype=np.uint32)
        return sum_over(of, starts, (data, cotangent, root))

    def gramian(self, data: Any, cotangent: Any, elements: int) -> jax.Array:
        by_rows = self.gramian_form()[0] == "rows"
        if by_rows:
            left, right = self._lined_up(data, cotangent)
            return inner_products.gramian_by_rows(left, right, elements)
        return self._by_pieces(
            inner_products.gramian_by_tiles, data, cotangent, elements
        )

    def square_norms(self, data: Any, cotangent: Any, elements: int) -> jax.Array:
        by_rows = inner_products.norms_form(self.sizes)[0] == "rows"
        if by_rows:
            left, right = self._lined_up(data, cotangent)
            return inner_products.square_norms_by_rows(left, right, elements)
        return self._by_pieces(
            inner_products.square_norms_by_tiles, data, cotangent, elements
        )

    def _pieces(self, data: Any, cotangent: Any) -> convolution.Pieces:
        shape = self._use.eqn.invars[1].aval.shape
        pair = self._together(data, cotangent)
        # With another zero a padded copy would be there from the forward pass on.
        zero = zeros_after(jax.ShapeDtypeStruct((), pair[0].dtype), [cotangent])
        return convolution.Pieces(*pair, self._use.eqn.params, shape, zero)

    def _times_patches(self, data: Any, cotangent: Any, columns: Any) -> jax.Array:
        """`[(env, row), column]`, the inputs of every row times `[input, column]`."""
        shape = self._use.eqn.invars[1].aval.shape
        pair = self._together(data, cotangent)
        columns = columns.astype(_wider(columns, *pair))
        return convolution.times_patches(*pair, columns, self._use.eqn.params, shape)

    def _together(self, data: Any, cotangent: Any) -> tuple[jax.Array, jax.Array]:
        """Environments as further examples, in at least float32."""
        dtype = _wider(data, cotangent)
        numbers = self._use.eqn.params["dimension_numbers"]

        def together(array: Any, batch: int) -> jax.Array:
            array = jnp.moveaxis(array.astype(dtype), 0, batch)
            before, after = array.shape[:batch], array.shape[batch + 2 :]
            examples = array.shape[batch] * array.shape[batch + 1]
            return array.reshape(*before, examples, *after)

        return (
            together(data, numbers.lhs_spec[0]),
            together(cotangent, numbers.out_spec[0]),
        )

    def _by_env(self, array: jax.Array, num_envs: int) -> jax.Array:
        """[(env, row), group, n] -> [env, group, row, n]."""
        array = array.reshape(num_envs, -1, *array.shape[1:])
        return jnp.swapaxes(array, 1, 2)

    def _lined_up(self, data: Any, cotangent: Any) -> tuple[jax.Array, jax.Array]:
        pieces, num_envs = self._pieces(data, cotangent), len(data)
        left = self._by_env(pieces.side_by_side(), num_envs)
        return left, self._by_env(pieces.right, num_envs)

    def _by_pieces(
        self, way: Any, data: Any, cotangent: Any, elements: int
    ) -> jax.Array:
        pieces, num_envs = self._pieces(data, cotangent), len(data)
        right = self._by_env(pieces.right, num_envs)
        starts = convolution.in_a_loop(pieces.starts)
        count = len(pieces.starts)
        tile = (right.size // self.sizes.rows) * self.sizes.inputs
        # Together no larger than the cotangents, and products of matrices that are not
        # too narrow.
        together = min(self.sizes.outputs // self.sizes.inputs, elements // tile)
        size = divisor(count, together)
        # Everything that the pass left behind may still be there. Where tiles are
        # narrower, copies of what is cut take as long as the products.
        at_once = min(elements, max(elements // 4, num_envs * _NARROWEST))

        def of(part: Any) -> jax.Array:
            left = [
                self._by_env(pieces.at([starts[i] for starts in part]), num_envs)
                for i in range(size)
            ]
            return way(jnp.concatenate(left, axis=3), right, at_once)

        parts = [axis.reshape(count // size, size) for axis in starts]
        if size == count:
            return of([[int(i) for i in axis] for axis in starts])
        return sum_over(of, parts, (data, right))


def _wider(*arrays: jax.Array) -> Any:
    """The widest floating dtype of all, at least float32."""
    real = [x.dtype for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    dtypes = list(map(_validate.wide, real))
    return max(dtypes, key=lambda dtype: dtype.itemsize)
