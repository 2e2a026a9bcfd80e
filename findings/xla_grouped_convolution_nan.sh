#!/usr/bin/env bash
# On a CPU, jax.vmap lets a NaN of one example into the gradients of all others, where a
# convolution has groups.
#
# jax 0.10.2. The gradient with respect to the kernel of a convolution with
# feature_group_count=2, mapped over examples: where one example holds a NaN, every
# example's gradient is NaN, compiled or not. Example by example only its own is, as it is
# with feature_group_count=1. Mapped, the kernels' gradients become one convolution with a
# group for each example; where there are groups already, XLA on CPU multiplies what is
# outside of a group by zeros in place of leaving it out, and zero times NaN is NaN. Whoever
# masks bad examples behind the gradient has none left.
#
# Seen: finite gradients of 3 good examples and a bad one, groups=1: 3, groups=2: 0, one by
# one: 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
"$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp


def finite(groups, one_by_one=False):
    """How many of four examples have a finite gradient; the second holds a NaN."""

    def loss(kernel, x):
        y = jax.lax.conv_general_dilated(
            x[None],
            kernel,
            (1,),
            "SAME",
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=groups,
        )
        return jnp.sum(jnp.sin(y))

    kernel = jax.random.normal(jax.random.key(0), (3, 4 // groups, 6))
    x = jax.random.normal(jax.random.key(1), (4, 5, 4)).at[1].set(jnp.nan)
    gradient = jax.jit(jax.grad(loss))
    if one_by_one:
        grads = jnp.stack([gradient(kernel, example) for example in x])
    else:
        grads = jax.jit(jax.vmap(gradient, (None, 0)))(kernel, x)
    return int(jnp.isfinite(grads).all((1, 2, 3)).sum())


plain, grouped, apart = finite(1), finite(2), finite(2, one_by_one=True)
print(
    "finite gradients of 3 good examples and a bad one, "
    f"groups=1: {plain}, groups=2: {grouped}, one by one: {apart}"
)
assert (plain, grouped, apart) == (3, 0, 3)
PYTHON
