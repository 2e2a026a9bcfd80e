#!/usr/bin/env bash
# FairGrad of TorchJD stops early where gradients are small, and its update conflicts.
#
# torchjd 0.18.0 with torch 2.13.0. FairGrad's weights w solve w_i (G w)_i^(1/alpha) = 1,
# G the Gramian. With alpha = 1 multiplying all gradients by s divides the weights by s,
# and every task's gain (G w)_i = 1 / w_i is positive. In double precision and with no
# limit on iterations, two gradients of norms 4.2 and 6.2 times 1e-3 give that. Times
# 1e-4 the residuals that are minimized are of a size at which the tolerances of
# scipy.optimize.least_squares hold near the start: w_i (G w)_i is 0.04 and -0.01 where it
# should be 1, and one task's loss goes up. Nothing warns. Gradients scaled to a norm
# of about 1, and weights divided by that scale again, avoid it.
#
# Seen: w_i (G w)_i at scale 0.001: [1.0, 1.0], at scale 0.0001: [-0.01, 0.04]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 "torchjd[full]==0.18.0"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torchjd.aggregation import FairGradWeighting

gradients = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)


def shares(scale):
    gramian = (scale * gradients) @ (scale * gradients).T
    weights = FairGradWeighting(alpha=1.0)(gramian)
    return [round(value, 2) for value in (weights * (gramian @ weights)).tolist()]


usual, small = shares(1e-3), shares(1e-4)
print(f"w_i (G w)_i at scale 0.001: {usual}, at scale 0.0001: {small}")
assert usual == [1.0, 1.0]
assert min(small) < 0 and max(small) < 0.5
PYTHON
