#!/usr/bin/env bash
# jnp.sum(x, axis=0) over a few long rows takes forty times as long on a CPU with jax 0.10.2 as with jax 0.9.2.
#
# The gradients of 16 environments, [16, 1000000] in float32, are averaged: 64 MB to read. Since jax 0.10 XLA
# hands such sums of floating-point numbers to a library (ynn_fusion in the compiled program) that goes through
# a large array component by component, across the rows, which lie megabytes apart. The same sum written as a
# product with ones, and the same sum of as many int32, read the rows one after the other. Rows of some
# thousand numbers are nearly as fast either way.
#
# Seen: jax 0.9.2 1.8 and 3.2 ms; jax 0.10.2 88.9 and 92.5 ms (1.7 as a product, 1.5 to 2.9 of int32)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/sums.py" <<'PYTHON'
import statistics
import sys
import time

import jax
import jax.numpy as jnp

ROUNDS = 9


def summed(x):
    return jnp.sum(x, axis=0)


def multiplied(x):
    return jnp.ones(len(x), x.dtype) @ x


def milliseconds(way, x):
    compiled = jax.jit(way).lower(x).compile()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        compiled(x).block_until_ready()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


long, short = jnp.ones((16, 1_000_000)), jnp.ones((16, 4_000))
ms = milliseconds(summed, long)
product = milliseconds(multiplied, long)
integers = milliseconds(summed, long.astype("int32"))
ratio = milliseconds(summed, short) / milliseconds(multiplied, short)
print(
    f"jax {jax.__version__}: {ms:.1f} ms, {product:.1f} as a product, "
    f"{integers:.1f} of int32; short rows {ratio:.1f} times the product",
    file=sys.stderr,
)
print("slow" if ms > 8 * max(product, integers) and ratio < 8 else "as fast")
PYTHON
run() {  # VERSION: what the script says with it
  python3.11 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "jax==$1" "jaxlib==$1" numpy==2.3.5 >&2
  JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/sums.py"
}
test "$(run 0.9.2)" = "as fast"
test "$(run 0.10.2)" = "slow"
