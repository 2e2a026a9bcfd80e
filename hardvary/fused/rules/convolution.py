"""Weight gradients of convolutions, one environment at a time.

XLA's convolutions on CPU are made for many examples and small windows. The gradient of
the weights is one with a window as large as the image; as JAX writes it, it is several
times faster to line up pieces of the input, one for each place of the window, and
multiply matrices. On a GPU, those of several environments at once would be a
convolution in as many groups, and slow too.

With features in front and examples behind, where XLA on CPU expects them the other way
round, that convolution is the faster way on images, one environment at a time: twice as
fast with windows of 5 x 5, as fast or a little faster with 3 x 3, and without pieces in
memory. With up to 16 features of the output it is several times slower than pieces.

Along an axis on which windows do not overlap, all pieces are one reshape: a patch
embedding is nothing but a product, and so is a window of the whole image. Pieces of a
small window are lined up at once; those of a large one a few at a time, in a loop.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from hardvary import _compat, sharding
from hardvary.fused.program import Bindings
from hardvary.fused.rewrites import features_last
from hardvary.fused.rules.multiply import multiply_rows
from hardvary.fused.uses import Use

# Pieces that are lined up at once: a window of 3 x 3.
PIECES = 9
# Places of an output above which a convolution is no slower than so few pieces: an
# image of 8 x 8.
PLACES = 64
# Features of an output from which on a convolution is no slower than pieces; than few
# pieces of so many features of the input.
OUTPUTS, OUTPUTS_OF_MANY, _MANY = 17, 32, 8
_HIGHEST = jax.lax.Precision.HIGHEST


def applies(use: Use) -> bool:
    """Whether `pull` is right for `use`, and the faster way.

    Not only faster: mapped over environments, the gradient as JAX writes it is a
    convolution in as many groups. Where it had groups before, XLA on CPU multiplies by
    zeros what is outside of a group, and a NaN reaches all environments.
    """
    return (
        use.primitive == "conv_general_dilated"
        and use.side == 1
        and use.eqn.params["batch_group_count"] == 1
    )


def pull(
    use: Use,
    operands: Sequence[Any],
    bindings: Bindings,
    saved: Any,
    cotangents: Any,
    alone: bool = False,
) -> Any:
    """As `Use.pull`; `alone` as of `kernel_gradient`."""
    del bindings
    (kernel,), (data,), (cotangent,) = operands, saved, cotangents
    params, steps = use.eqn.params, len(use.steps)
    numbers = params["dimension_numbers"]
    data = _as_examples(data, steps, numbers.lhs_spec[0])
    cotangent = _as_examples(cotangent, steps, numbers.out_spec[0])
    result = kernel_gradient(data, cotangent, params, kernel.shape, alone)
    return (result.astype(kernel.dtype),)


def _as_examples(array: jax.Array, steps: int, batch: int) -> jax.Array:
    """`[*steps, ...]` with the steps of loops, which share a kernel, as examples."""
    if not steps:
        return array
    array = jnp.moveaxis(array, range(steps), range(batch, batch + steps))
    before, after = array.shape[:batch], array.shape[batch + steps + 1 :]
    examples = math.prod(array.shape[batch : batch + steps + 1])
    return array.reshape(*before, examples, *after)


def kernel_gradient(
    data: jax.Array,
    cotangent: jax.Array,
    params: dict[str, Any],
    shape: Sequence[int],
    alone: bool = False,
) -> jax.Array:
    """Gradient of `jax.lax.conv_general_dilated` with respect to its kernel.

    Args:
      data: the convolution's left argument.
      cotangent: of its output.
      params: of the primitive; `batch_group_count` must be 1.
      shape: the kernel's.
      alone: whether it is taken of one environment after the other, not mapped over
        them.

    Returns:
      An array of `shape`, complex if `data` or `cotangent` is, at least float32.
    """
    dtype = _wide(data.dtype, cotangent.dtype)
    if 0 in (data.size, cotangent.size, *shape):
        return jnp.zeros(shape, dtype)
    data, cotangent = data.astype(dtype), cotangent.astype(dtype)
    by_convolution = alone and _is_convolved_faster(data, cotangent, params, shape)
    way = _by_convolution if by_convolution else _by_pieces
    gradient = way(data, cotangent, params, shape)
    return _without_padding(gradient, data, cotangent, params)


def _without_padding(
    gradient: jax.Array, data: jax.Array, cotangent: jax.Array, params: dict[str, Any]
) -> jax.Array:
    """`gradient` with zeros where the window sees nothing but padding.

    It has them, unless a cotangent is not finite.
    """
    numbers = params["dimension_numbers"]
    axes = _axes(data, cotangent, params, gradient.shape)
    for axis, position in zip(axes, numbers.rhs_spec[2:], strict=True):
        if not axis.meets_data.all():
            shape = [1] * gradient.ndim
            shape[position] = axis.window
            gradient = jnp.where(axis.meets_data.reshape(shape), gradient, 0)
    return gradient


def _is_convolved_faster(
    data: jax.Array, cotangent: jax.Array, params: dict[str, Any], shape: Sequence[int]
) -> bool:
    """Whether `_by_convolution` is right, and no slower where it was measured."""
    axes = _axes(data, cotangent, params, shape)
    pieces = math.prod(axis.window for axis in axes)
    places = math.prod(axis.out for axis in axes)
    outputs, inputs = (shape[axis] for axis in params["dimension_numbers"].rhs_spec[:2])
    many = pieces <= PIECES and inputs >= _MANY
    return (
        _compat.NEW_CPU_CONVOLUTIONS
        and sharding.on_cpu()
        and jax.sharding.get_abstract_mesh().empty
        and data.dtype == jnp.float32
        and data.ndim == 4
        and params["feature_group_count"] == 1
        and tuple(params["lhs_dilation"]) == (1, 1)
        and (pieces > PIECES or places > PLACES)
        and outputs >= (OUTPUTS_OF_MANY if many else OUTPUTS)
        # Else all pieces are one reshape.
        and not any(axis.reshaped for axis in axes)
    )


def _by_convolution(
    data: jax.Array, cotangent: jax.Array, params: dict[str, Any], shape: Sequence[int]
) -> jax.Array:
    """`kernel_gradient` as a convolution with a window as large as the image."""
    numbers, axes = params["dimension_numbers"], _axes(data, cotangent, params, shape)
    by_pieces = functools.partial(_by_pieces, params=params, shape=shape)

    def convolution(data: jax.Array, cotangent: jax.Array) -> jax.Array:
        batch, feature, *space = numbers.lhs_spec
        left = jnp.transpose(data, (feature, *space, batch))
        batch, feature, *space = numbers.out_spec
        right = jnp.transpose(cotangent, (*space, batch, feature))
        result = jax.lax.conv_general_dilated(
            left,
            right,
            window_strides=[axis.step for axis in axes],
            padding=[axis.padding[:2] for axis in axes],
            rhs_dilation=[axis.stride for axis in axes],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=params["precision"],
        )
        return as_kernel(jnp.moveaxis(result, 0, 2), numbers)

    return _unless_mapped(convolution, by_pieces)(data, cotangent)


def _unless_mapped(
    convolve: Callable[..., jax.Array], multiply: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """`convolve`, or `multiply` where it is differentiated or mapped.

    Under someone's vmap of whole steps it would be a convolution in groups. Neither may
    close over arrays.
    """
    mapped = jax.custom_batching.custom_vmap(convolve)

    @mapped.def_vmap
    def _(size: int, are_mapped: Sequence[bool], *arrays: jax.Array) -> Any:
        in_axes = [0 if is_mapped else None for is_mapped in are_mapped]
        return jax.vmap(multiply, in_axes, axis_size=size)(*arrays), True

    result = jax.custom_jvp(mapped)
    result.defjvp(lambda arrays, tangents: jax.jvp(multiply, arrays, tangents))
    return cast(Callable[..., jax.Array], result)


def times_patches(
    data: jax.Array,
    cotangent: jax.Array,
    columns: jax.Array,
    params: dict[str, Any],
    shape: Sequence[int],
) -> jax.Array:
    """What the window sees at every place, times columns of a matrix.

    Args:
      data: as of `kernel_gradient`; no size may be 0.
      cotangent: of which only the shape matters.
      columns: `[input, column]`, inputs in the order of [*window, in], in the dtype of
        the result.
      params: of the primitive, without groups.
      shape: the kernel's.

    Returns:
      `[row, column]`, a row for each place of the output.
    """
    numbers, dtype = params["dimension_numbers"], columns.dtype
    names = ["window_strides", "padding", "lhs_dilation", "rhs_dilation"]

    def multiply(
        data: jax.Array, cotangent: jax.Array, columns: jax.Array
    ) -> jax.Array:
        pieces = Pieces(data, cotangent, params, shape)
        rows = pieces.side_by_side()[:, 0][:, pieces.window_order()]
        return jnp.matmul(rows, columns, precision=_HIGHEST)

    def convolve(
        data: jax.Array, cotangent: jax.Array, columns: jax.Array
    ) -> jax.Array:
        del cotangent
        window = [shape[axis] for axis in numbers.rhs_spec[2:]]
        kernel = columns.reshape(*window, -1, columns.shape[1])
        result = jax.lax.conv_general_dilated(
            data,
            as_kernel(kernel, numbers),
            **{name: params[name] for name in names},
            dimension_numbers=numbers,
            precision=_HIGHEST,
        )
        return features_last(result, numbers.out_spec).reshape(-1, columns.shape[1])

    arrays = (data.astype(dtype), cotangent.astype(dtype), columns)
    if not jax.sharding.get_abstract_mesh().empty:
        return multiply(*arrays)
    return _unless_mapped(convolve, multiply)(*arrays)


def _by_pieces(
    data: jax.Array, cotangent: jax.Array, params: dict[str, Any], shape: Sequence[int]
) -> jax.Array:
    """`kernel_gradient` as a product of pieces of the data."""
    pieces = Pieces(data, cotangent, params, shape)
    starts, right = pieces.starts, pieces.right
    rows, groups, _ = right.shape

    def product(starts: Sequence[Any]) -> jax.Array:
        """Of the pieces that begin there: [group, piece, (reshaped, in), out]."""
        left = jnp.stack([pieces.at(start) for start in starts], axis=2)
        left = left.reshape(rows, groups, -1)
        result = _multiply(left, right, params["precision"])
        return result.reshape(groups, len(starts), -1, result.shape[-1])

    if len(starts) <= PIECES:
        result = product(starts)
    else:
        parts = -(-len(starts) // PIECES)
        size = -(-len(starts) // parts)
        # The last part may hold places twice, whose products are dropped.
        table = np.resize(np.asarray(starts), (parts, size, len(pieces.axes)))
        columns = [in_a_loop(table[:, i]) for i in range(size)]
        result = jax.lax.map(product, columns)
        result = jnp.moveaxis(result, 0, 1).reshape(groups, -1, *result.shape[3:])
        result = result[:, : len(starts)]
    # -> [*window, in, (group out)] -> the kernel's layout.
    numbers, axes, inputs = params["dimension_numbers"], pieces.axes, pieces.inputs
    shifted = [len(axis.starts) for axis in axes]
    reshaped = [axis.window if axis.reshaped else 1 for axis in axes]
    result = result.reshape(groups, *shifted, *reshaped, inputs, -1)
    rank = len(axes)
    window = [i for axis in range(rank) for i in (1 + axis, 1 + axis + rank)]
    result = jnp.transpose(result, [*window, 2 * rank + 1, 0, 2 * rank + 2])
    result = result.reshape(*(axis.window for axis in axes), inputs, -1)
    return as_kernel(result, numbers)


def as_kernel(result: jax.Array, numbers: Any) -> jax.Array:
    """`[*window, in, out]` in the layout of the kernel."""
    out_axis, in_axis, *window_axes = numbers.rhs_spec
    order = [*window_axes, in_axis, out_axis]
    return jnp.transpose(result, [order.index(axis) for axis in range(len(order))])


class Pieces:
    """What the places of a convolution's window see of its input.

    Args:
      data, cotangent, params, shape: as of `kernel_gradient`; no size may be 0.
      zero: what is around the data.

    Attributes:
      starts: where in the padded input pieces begin, along each axis.
      right: the cotangent, [row, group, out].
      axes: spatial axes.
      inputs: features of the input that a group has.
    """

    def __init__(
        self,
        data: jax.Array,
        cotangent: jax.Array,
        params: dict[str, Any],
        shape: Sequence[int],
        zero: Any = 0,
    ) -> None:
        numbers = params["dimension_numbers"]
        self._groups: int = params["feature_group_count"]
        self.axes = _axes(data, cotangent, params, shape)
        # From here on: data [n, *space, group, in], cotangent [n, *space, group, out].
        data = features_last(data, numbers.lhs_spec)
        cotangent = features_last(cotangent, numbers.out_spec)
        paddings = [(0, 0, 0), *(a.padding for a in self.axes), (0, 0, 0)]
        self._data = jax.lax.pad(data, jnp.asarray(zero, data.dtype), paddings)
        self._rows = math.prod(cotangent.shape[:-1])
        self.inputs = data.shape[-1] // self._groups
        self.right = cotangent.reshape(self._rows, self._groups, -1)
        self.starts = list(itertools.product(*(axis.starts for axis in self.axes)))

    def at(self, start: Sequence[Any]) -> jax.Array:
        """The piece that begins there: [row, group, (reshaped, in)]."""
        piece = _piece(self._data, self.axes, start)
        piece = piece.reshape(self._rows, -1, self._groups, self.inputs)
        return jnp.swapaxes(piece, 1, 2).reshape(self._rows, self._groups, -1)

    def side_by_side(self) -> jax.Array:
        """All pieces: [row, group, (piece, reshaped, in)]."""
        if len(self.starts) <= PIECES:
            return jnp.concatenate(list(map(self.at, self.starts)), axis=2)
        pieces = jax.lax.map(self.at, in_a_loop(self.starts))
        return jnp.moveaxis(pieces, 0, 2).reshape(self._rows, self._groups, -1)

    def window_order(self) -> np.ndarray:
        """`[input]`, where pieces side by side have the inputs of [*window, in]."""
        shifted = [len(axis.starts) for axis in self.axes]
        reshaped = [axis.window if axis.reshaped else 1 for axis in self.axes]
        sizes = [*shifted, *reshaped, self.inputs]
        rank = len(self.axes)
        window = [i for axis in range(rank) for i in (axis, axis + rank)]
        places = np.arange(math.prod(sizes)).reshape(sizes)
        return np.transpose(places, [*window, 2 * rank]).ravel()


def in_a_loop(starts: Any) -> list[np.ndarray]:
    """Starts `[step, axis]` as a loop goes through them, an array for each axis."""
    # Without a sign: other indices might count from the end.
    return [*np.moveaxis(np.asarray(starts, np.uint32), 1, 0)]


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A spatial axis of a convolution.

    Attributes:
      size: of the input.
      out: of the output.
      window: of the kernel.
      stride: from one place of the output to the next.
      pad: in front and behind; negative where the input is cropped.
      dilation: of the input.
      step: from one place of the window to the next, the dilation of the kernel.
    """

    size: int
    out: int
    window: int
    stride: int
    pad: tuple[int, int]
    dilation: int
    step: int

    @property
    def distance(self) -> int:
        """`stride`, which may as well be larger where there is no next place."""
        extent = (self.window - 1) * self.step + 1
        return max(self.stride, extent) if self.out == 1 else self.stride

    @property
    def reshaped(self) -> bool:
        """Whether windows do not overlap, so that a reshape tells them apart."""
        return self.window > 1 and (self.window - 1) * self.step < self.distance

    @property
    def meets_data(self) -> np.ndarray:
        """`[window]`, whether a place sees an entry of the input anywhere."""
        low, _ = self.pad
        begins = np.arange(self.window)[:, None] * self.step - low
        # From the first output that is not in front of the input; the gaps of a
        # dilated one come round after as many.
        outputs = np.maximum(-(begins // self.stride), 0) + np.arange(self.dilation)
        seen = begins + outputs * self.stride
        inside = (outputs < self.out) & (seen <= (self.size - 1) * self.dilation)
        return np.any(inside & (seen % self.dilation == 0), axis=1)

    @property
    def starts(self) -> Sequence[int]:
        """Where in the padded input pieces begin."""
        return range(0, 1 if self.reshaped else self.window * self.step, self.step)

    @property
    def span(self) -> int:
        """Entries of the padded input from the begin to the end of a piece."""
        return self.out * self.distance - (0 if self.reshaped else self.distance - 1)

    @property
    def padding(self) -> tuple[int, int, int]:
        """As `jax.lax.pad` takes it, so that what pieces need is left."""
        low, _ = self.pad
        dilated = self.size + (self.size - 1) * (self.dilation - 1)
        return low, self.starts[-1] + self.span - low - dilated, self.dilation - 1


def _axes(
    data: jax.Array, cotangent: jax.Array, params: dict[str, Any], shape: Sequence[int]
) -> list[_Axis]:
    """Spatial axes; args as of `kernel_gradient`."""
    numbers = params["dimension_numbers"]
    return [
        _Axis(*sizes)
        for sizes in zip(
            [data.shape[axis] for axis in numbers.lhs_spec[2:]],
            [cotangent.shape[axis] for axis in numbers.out_spec[2:]],
            [shape[axis] for axis in numbers.rhs_spec[2:]],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    ]


def _piece(data: jax.Array, axes: Sequence[_Axis], start: Any) -> jax.Array:
    """What a place of the window sees: [n, *places of the output, *reshaped, in].

    Args:
      data: padded.
      axes: its spatial axes.
      start: first entry along each; traced in a loop.
    """
    rank = len(axes)
    spans = [axis.span for axis in axes]
    strides = [1 if axis.reshaped else axis.distance for axis in axes]
    if start and not isinstance(start[0], int):
        zero = np.uint32(0)
        sizes = (data.shape[0], *spans, data.shape[-1])
        data = jax.lax.dynamic_slice(data, (zero, *start, zero), sizes)
        start = [0] * rank
    stop = [first + span for first, span in zip(start, spans, strict=True)]
    data = jax.lax.slice(
        data,
        (0, *start, 0),
        (data.shape[0], *stop, data.shape[-1]),
        (1, *strides, 1),
    )
    if not any(axis.reshaped for axis in axes):
        return data
    split = [i for a in axes for i in (a.out, a.distance if a.reshaped else 1)]
    data = data.reshape(data.shape[0], *split, data.shape[-1])
    outside, inside = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    for axis, i in zip(axes, inside, strict=True):
        if axis.reshaped:
            stop_at = (axis.window - 1) * axis.step + 1
            data = jax.lax.slice_in_dim(data, 0, stop_at, axis.step, axis=i)
    return jnp.transpose(data, (0, *outside, *inside, 2 * rank + 1))


def _multiply(left: jax.Array, right: jax.Array, precision: Any) -> jax.Array:
    """Sums over rows: [row, group, n], [row, group, m] -> [group, n, m]."""
    rows = ((0,), (0,))
    if left.shape[1] == 1:
        left, right = left[:, 0], right[:, 0]
        product = multiply_rows(left, right, (rows, ((), ())), precision=precision)
        return product[None]
    return multiply_rows(left, right, (rows, ((1,), (1,))), precision=precision)


def _wide(*dtypes: Any) -> Any:
    """A dtype for sums of products of what has these: at least 32 bits for a number."""
    double = any(jnp.finfo(dtype).bits == 64 for dtype in dtypes)
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return jnp.dtype(jnp.complex128 if double else jnp.complex64)
    return jnp.dtype(jnp.float64 if double else jnp.float32)
