#!/usr/bin/env bash
# Up to nine independent operations of a program run one after the other beside an idle core.
#
# jax 0.10.2 on a CPU with two cores or more. XLA's executor hands work to another thread only when it
# has a number of operations ready at once; fewer it runs in turn, each with as many threads as it takes
# by itself. A sort takes one: nine independent sorts of the same size keep one core busy, ten keep two
# or more. Nor do two independent `lax.scan`s run side by side, however long they are.
#
# Seen: cores kept busy by 9 sorts 1.0, by 10 sorts 1.7 to 2.0, by two scans of 16 sorts each 1.0
set -euo pipefail
test "$(nproc)" -ge 2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/cores.py" <<'PYTHON'
import sys
import time

import jax
import jax.numpy as jnp


def cores(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    best = []
    for _ in range(5):
        wall, busy = time.perf_counter(), time.process_time()
        for _ in range(5):
            jax.block_until_ready(compiled(*arguments))
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        best.append(busy / wall)
    return sorted(best)[2]


def sorts(*arrays):
    return [jnp.sort(array) for array in arrays]


def scans(x, y):
    def largest(rows):
        return jax.lax.scan(lambda top, row: (jnp.sort(row + top[0] * 0), None), rows[0], rows)[0]

    return largest(x), largest(y)


values = jax.random.normal(jax.random.key(0), (32, 50_000))
few, many = cores(sorts, *values[:9]), cores(sorts, *values[:10])
looped = cores(scans, values[:16], values[16:])
print(f"{few:.2f} {many:.2f} {looped:.2f}", file=sys.stderr)
print(*("one" if seen < 1.2 else "more" if seen > 1.4 else seen for seen in (few, many, looped)))
PYTHON
test "$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/cores.py")" = "one more one"
