#!/usr/bin/env bash
# A compiled function gets its temporary memory from the system anew at every call, once it is large.
#
# jax 0.10.2 on a CPU, Linux with glibc. XLA plans the memory of a whole program ahead, in one piece,
# and allocates this piece at every call. glibc keeps what is freed for the next call only up to 32 MB;
# above, every call maps new memory, of which the kernel clears one page of 4 kB after the other when it
# is first touched. With 25 MB of temporary memory a call takes no page fault, with 50 MB one for every
# page. With huge pages (GLIBC_TUNABLES=glibc.malloc.hugetlb=1, where the kernel gives them to those who
# ask) there are hardly any.
#
# Seen: page faults of a call: 25 MB 0 to 2, 50 MB 12290, 50 MB with huge pages 25 to 536
set -euo pipefail
if grep -q '\[always\]' /sys/kernel/mm/transparent_hugepage/enabled; then
  echo "the kernel gives huge pages to everybody here: nothing to see"
  exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/faults.py" <<'PYTHON'
import resource
import statistics
import sys

import jax
import jax.numpy as jnp

CALLS, PAGE = 15, 4096


def faults_of_a_call(rows):
    def smallest(x):
        return jnp.sort(x)[:, 0]

    x = jnp.ones((rows, 1024))
    compiled = jax.jit(smallest).lower(x).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    faults = []
    for _ in range(CALLS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        compiled(x).block_until_ready()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return temporary / PAGE, statistics.median(faults)


(_, small), (pages, large) = faults_of_a_call(6144), faults_of_a_call(12288)
print(f"25 MB {small:.0f}, 50 MB {large:.0f} of {pages:.0f} pages", file=sys.stderr)
print("none" if small < 10 else "some", end=" ")
print("all" if large > 0.9 * pages else "few" if large < 0.05 * pages else "some")
PYTHON
export JAX_PLATFORMS=cpu
unset GLIBC_TUNABLES
test "$("$folder/venv/bin/python" "$folder/faults.py")" = "none all"
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
test "$("$folder/venv/bin/python" "$folder/faults.py")" = "none few"
