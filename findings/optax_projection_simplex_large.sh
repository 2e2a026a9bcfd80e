#!/usr/bin/env bash
# optax's projection onto the simplex leaves the simplex where inputs are large.
#
# optax 0.2.8 with jax 0.10.2 on CPU, float32. Weights that sum to 1 do not change when
# all inputs grow by one number, and inputs of ten million differ by whole numbers that
# float32 holds. Yet the result of projection_simplex sums to 2, without a NaN or an
# error: the 1 of the sum is added to the inputs' own sum and lost in its rounding. With
# the largest input taken off first it comes out right.
#
# Seen: inputs 10000000, 10000001, 0: 0.5, 1.5, 0.0, sum 2.0; with the largest taken off:
# 0.0, 1.0, 0.0, sum 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  optax==0.2.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import numpy as np
from optax.projections import projection_simplex

inputs = jnp.array([1e7, 1e7 + 1, 0.0], jnp.float32)
assert inputs[1] - inputs[0] == 1
as_given = np.asarray(projection_simplex(inputs))
shifted = np.asarray(projection_simplex(inputs - inputs.max()))
for found in (as_given, shifted):
    print(", ".join(f"{weight:.1f}" for weight in found), f"sum {found.sum():.1f}")
np.testing.assert_array_equal(shifted, [0, 1, 0])
assert as_given.sum() > 1.5, "the result is in the simplex now"
PYTHON
