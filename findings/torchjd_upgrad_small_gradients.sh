#!/usr/bin/env bash
# UPGrad of TorchJD averages gradients of norm 0.005, say, conflict or not.
#
# torchjd 0.18.0 with torch 2.13.0. UPGrad's update conflicts with none of the gradients
# that it is made of: its inner product with each is at least 0, and multiplying all
# gradients by one number multiplies the update by it. So one would expect. Its projector's
# norm_eps, 1e-4 unless given and there to avoid a division by zero, is compared with the
# Gramian, the square of the gradients' size: two gradients of norms 0.0042 and 0.0062
# fall below it, and the update is their plain mean, which goes against one of them.
# Nothing warns. A projector with norm_eps=0.0 gives the update that was asked for.
#
# Seen: the inner products of both gradients with the update, divided by the scale's square
#   scale 1: [2.629, 5.558]  scale 0.001: [-2.0, 8.0]  and with norm_eps 0: [2.629, 5.558]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 "torchjd[full]==0.18.0"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torchjd.aggregation import UPGrad
from torchjd.linalg import QuadprogProjector

gradients = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)


def products(scale, **settings):
    projector = QuadprogProjector(**settings)
    update = UPGrad(projector=projector)(gradients * scale) / scale
    return [round(value, 3) for value in (gradients @ update).tolist()]


usual, small, mended = products(1.0), products(1e-3), products(1e-3, norm_eps=0.0)
print(f"scale 1: {usual}  scale 0.001: {small}  and with norm_eps 0: {mended}")
mean = [round(value, 3) for value in (gradients @ gradients.mean(0)).tolist()]
assert min(usual) > 0 and usual == mended
assert small == mean and min(small) < 0
PYTHON
