#!/usr/bin/env bash
# The gradient of an average pool behind jax.nn.relu writes an array of zeros as large as the image on a CPU;
# behind jnp.where(x > 0, x, 0) it does not.
#
# Since jax 0.10 XLA makes one operation of the pool and the maximum before it (ynn_fusion in the compiled
# program). The zeros that the maximum is taken with are a broadcast that the derivative of the ReLU needs, too;
# what two need is not made inside of that operation, so all of it is written down (wrapped_broadcast) and read
# at every call. Without the derivative, or with jax 0.9.2, it is not. An optimization_barrier around a scalar
# zero of one's own avoids it as well.
#
# Seen: jax 0.10.2 23.6 MB of temporary memory and 3.4 ms for 13.1 and 2.4 (an image is 10.5 MB; medians in
# turns); jax 0.9.2 13.1 and 4.0 for 13.1 and 3.7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/pool.py" <<'PYTHON'
import statistics
import sys
import time

import jax
import jax.numpy as jnp

ROUNDS = 21


@jax.custom_jvp
def where(x):
    return jnp.where(x > 0, x, 0)


where.defjvp(lambda x, dx: (where(*x), jnp.where(x[0] > 0, dx[0], 0)))


def gradient_of(relu):
    def loss(bias, x):
        windows = (1, 2, 2, 1)
        pooled = jax.lax.reduce_window(
            relu(x + bias), 0.0, jax.lax.add, windows, windows, "VALID"
        )
        return jnp.sum(pooled**2)

    return jax.value_and_grad(loss)


x = jax.random.normal(jax.random.key(0), (80, 32, 32, 32))
arguments = jnp.zeros(32), x
steps = {}
for name, relu in {"relu": jax.nn.relu, "where": where}.items():
    steps[name] = jax.jit(gradient_of(relu)).lower(*arguments).compile()
times = {name: [] for name in steps}
for _ in range(ROUNDS):
    for name, step in steps.items():
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        times[name].append(1e3 * (time.perf_counter() - start))
ms = {name: statistics.median(times[name]) for name in steps}
megabytes = {
    name: step.memory_analysis().temp_size_in_bytes / 1e6
    for name, step in steps.items()
}
for name in steps:
    print(
        f"jax {jax.__version__}, {name}: {ms[name]:.1f} ms, "
        f"{megabytes[name]:.1f} MB of temporary memory",
        file=sys.stderr,
    )
more = megabytes["relu"] - megabytes["where"]
print("written down" if more > 0.9 * x.nbytes / 1e6 else "not written down")
PYTHON
run() {  # VERSION: what the script says with it
  python3.11 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "jax==$1" "jaxlib==$1" numpy==2.3.5 >&2
  JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/pool.py"
}
test "$(run 0.9.2)" = "not written down"
test "$(run 0.10.2)" = "written down"
