"""Where the gradients of an `EnvGrad` come from."""

import abc
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hardvary import _validate, sharding
from hardvary._env_grads.statistics import MEAN, EnvWeights, Statistic, Sums, present
from hardvary._typing import AxisName


class Source(abc.ABC):
    """Gradients of parameters that are computed together, in all environments.

    Whoever has the gradients knows how to sum over environments and how to stack; the
    rest has a form here that is always right, to be overridden by a faster one. All
    results are lists, a parameter each.

    Attributes:
      num_envs: number of environments, on this device.
      root: `[input, input]`, whose transpose all gradients are multiplied by; None for
        nothing.
    """

    num_envs: int
    root: jax.Array | None = None

    @abc.abstractmethod
    def sums(self, statistics: Sequence[Statistic], weights: EnvWeights | None) -> Sums:
        """Sums of statistics over environments, as `sum_over_envs` returns them."""

    @abc.abstractmethod
    def stack(self) -> list[jax.Array]:
        """`[env, *param.shape]`, in the dtype of the parameter."""

    def combine(self, weights: EnvWeights) -> list[jax.Array]:
        """`sum_e w_e g_e`, at least float32; weights of any sign."""
        return self.sums([MEAN], weights)[MEAN]

    def gramian(self, axis_name: AxisName | None = None) -> list[jax.Array]:
        """`[env, env]`, inner products of gradients, at least float32.

        Args:
          axis_name: mapped axis over which further environments are spread; the result
            is of all of them, and the same on every device.
        """
        return [
            inner_products(sharding.all_rows(grad, axis_name)) for grad in self.stack()
        ]

    def square_norms(self) -> list[jax.Array]:
        """`[env]`, the diagonal of `gramian`, of the environments of this device."""
        return [square_norms(grad) for grad in self.stack()]

    def alone(self, index: int) -> "Source":
        """The gradients of one parameter, for what is asked of its layer."""
        del index
        return self

    @property
    def num_inputs(self) -> int | None:
        """Inputs of the layer that the only parameter is the weights of, if it is.

        This and what follows are asked of what `alone` returns.
        """
        return None

    def input_moment(self, weights: EnvWeights | None) -> jax.Array:
        """`[input, input]`, second moment of these inputs, summed over environments.

        The mean over the rows of an environment, times its weight, at least float32.
        This and the next two are asked only where `num_inputs` is known.
        """
        raise NotImplementedError

    def whitened(self, root: jax.Array | None) -> "Source":
        """The transpose of `root: [input, input]` times these gradients."""
        raise NotImplementedError

    def times(self, root: jax.Array, parameter: jax.Array) -> jax.Array:
        """`root: [input, input]` times what is shaped like the only parameter."""
        raise NotImplementedError


def square_norms(grad: jax.Array) -> jax.Array:
    """`[env]` of a stacked gradient, in at least float32."""
    rows = flat(grad)
    return jnp.sum(rows * rows, axis=1)


def inner_products(grad: jax.Array) -> jax.Array:
    """`[env, env]` of a stacked gradient, in at least float32."""
    rows = flat(grad)
    # The default of accelerators rounds the factors.
    return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)


def weighted_sum(grad: jax.Array, weights: EnvWeights) -> jax.Array:
    """The weighted sum over environments of a stacked gradient, in at least float32."""
    rows = flat(grad)
    highest = jax.lax.Precision.HIGHEST
    values = weights.values.astype(rows.dtype)
    total = jnp.matmul(values, rows, precision=highest)
    # An absent environment may hold anything, but seldom does.
    spoilt = jnp.any(values == 0) & ~jnp.all(jnp.isfinite(total))
    total = jax.lax.cond(
        spoilt,
        lambda: jnp.matmul(values, present(rows, weights), precision=highest),
        lambda: total,
    )
    return total.reshape(grad.shape[1:])


def flat(grad: jax.Array) -> jax.Array:
    """A stacked gradient as `[env, component]`, in at least float32."""
    return grad.reshape(len(grad), math.prod(grad.shape[1:])).astype(
        _validate.wide(grad.dtype)
    )
