#!/usr/bin/env bash
# x.T @ d with ten columns in d, the gradient of a classifier's last layer, takes five times as long on a CPU as d.T @ x.
#
# Both are the same 21 million multiplications (x [2048, 512], d [2048, 10]), contracted over the first axes, and
# none is a product of a transposed copy. jax.grad of `x @ kernel` is the slow one. (d.T @ x).T is slow again: XLA
# makes the first product of it. What helps is an optimization_barrier between the product and the transpose.
#
# Seen: jax 0.10.2 1.84 ms for .32 (medians in turns), the first again for (d.T @ x).T, .34 with the barrier;
# jax 0.9.2 1.88 for .40
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/products.py" <<'PYTHON'
import statistics
import sys
import time

import jax
import jax.numpy as jnp

ROUNDS = 41


def gradient(x, d):
    return jax.grad(lambda kernel: jnp.vdot(x @ kernel, d))(jnp.zeros((512, 10)))


def turned(x, d):
    return d.T @ x


def turned_back(x, d):
    return (d.T @ x).T


def kept_apart(x, d):
    return jax.lax.optimization_barrier(d.T @ x).T


x = jax.random.normal(jax.random.key(0), (2048, 512))
d = jax.random.normal(jax.random.key(1), (2048, 10))
ways = [gradient, turned, turned_back, kept_apart]
products = [jax.jit(way).lower(x, d).compile() for way in ways]
times = [[] for _ in ways]
for _ in range(ROUNDS):
    for product, row in zip(products, times, strict=True):
        start = time.perf_counter()
        product(x, d).block_until_ready()
        row.append(1e3 * (time.perf_counter() - start))
ms = dict(zip([way.__name__ for way in ways], map(statistics.median, times)))
print(f"jax {jax.__version__}: {ms}", file=sys.stderr)
slow = min(ms["gradient"], ms["turned_back"])
print("slow" if slow > 2.5 * max(ms["turned"], ms["kept_apart"]) else "as fast")
PYTHON
run() {  # VERSION: what the script says with it
  python3.11 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "jax==$1" "jaxlib==$1" numpy==2.3.5 >&2
  JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/products.py"
}
test "$(run 0.9.2)" = "slow"
test "$(run 0.10.2)" = "slow"
