#!/usr/bin/env bash
# A convolution of images that is padded one column too far, and then cut off, takes two thirds of the time on two cores.
#
# With jax 0.10 XLA on CPU hands convolutions of images [batch, height, width, feature] with more than 16 features
# to a library (ynn_fusion in the compiled program) that works on one core, whatever the machine has, unless the
# kernel has more than a hundred thousand numbers or so. What is wider behind than in front it hands to another,
# as jax 0.9.2 did with all of them, which works on all cores. On one core the first is the faster one.
#
# Seen on two cores (32 to 64 features, 80 images of 16 x 16, 3 x 3; medians in turns): jax 0.10.2 8.2 ms on 1.0
# cores, 5.3 ms on 1.9 cores with the column; jax 0.9.2 4.2 and 5.1 ms, both on 1.9 cores, and jax 0.11.2 and
# 0.12.0 (with Python 3.12) 4.5 and 5.1 ms, likewise
set -euo pipefail
test "$(nproc)" -ge 2 || { echo "one core: nothing to see" >&2; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/convolutions.py" <<'PYTHON'
import statistics
import sys
import time

import jax

ROUNDS, STEPS = 9, 20


def convolution(padding):
    def convolve(images, kernel):
        result = jax.lax.conv_general_dilated(
            images,
            kernel,
            (1, 1),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return result[:, :, : images.shape[2]]

    return convolve


images = jax.random.normal(jax.random.key(0), (80, 16, 16, 32))
kernel = jax.random.normal(jax.random.key(1), (3, 3, 32, 64))
ways = {"same": "SAME", "column": [(1, 1), (1, 2)]}
compiled = {
    name: jax.jit(convolution(padding)).lower(images, kernel).compile()
    for name, padding in ways.items()
}
ms, cores = ({name: [] for name in ways} for _ in range(2))
for _ in range(ROUNDS):
    for name, step in compiled.items():
        step(images, kernel).block_until_ready()
        start, used = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            step(images, kernel).block_until_ready()
        seconds = time.perf_counter() - start
        ms[name].append(1e3 * seconds / STEPS)
        cores[name].append((time.process_time() - used) / seconds)
ms = {name: statistics.median(ms[name]) for name in ways}
cores = {name: statistics.median(cores[name]) for name in ways}
print(f"jax {jax.__version__}: {ms} ms, on {cores} cores", file=sys.stderr)
one_core = cores["same"] < 1.2 and cores["column"] > 1.4
print("on one core" if one_core and ms["same"] > ms["column"] else "on all")
PYTHON
run() {  # VERSION: what the script says with it
  python3.11 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "jax==$1" "jaxlib==$1" numpy==2.3.5 >&2
  JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/convolutions.py"
}
test "$(run 0.9.2)" = "on all"
test "$(run 0.10.2)" = "on one core"
