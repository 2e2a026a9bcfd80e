#!/usr/bin/env bash
# BackPACK's BatchL2Grad is wrong for convolutions in groups, where its BatchGrad is right.
#
# backpack-for-pytorch 1.7.1 with torch 2.13.0. batch_l2 is the squared norm of what
# grad_batch holds, computed without it. For nn.Conv2d(groups=...) it is another number,
# and the more groups the further off; in one group it comes out right. Nothing is
# raised or warned of.
#
# Seen: batch_l2 over the squared norm of grad_batch, groups=1: 1.00 to 1.00,
# groups=2: 1.88 to 2.22, groups=4: 3.70 to 4.49
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 backpack-for-pytorch==1.7.1
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, BatchL2Grad
from torch import nn

# It registers hooks in a way that PyTorch warns of.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


def ratio(groups):
    """Smallest and largest over the examples."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, groups=groups, bias=False)
    model = extend(nn.Sequential(conv, nn.Flatten(), nn.Linear(72, 3)))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    images, labels = torch.randn(5, 4, 5, 5), torch.arange(5) % 3
    with backpack(BatchGrad(), BatchL2Grad()):
        loss(model(images), labels).backward()
    exact = torch.stack(
        [
            torch.autograd.grad(loss(model(x[None]), y[None]), conv.weight)[0]
            for x, y in zip(images, labels)
        ]
    )
    assert torch.allclose(conv.weight.grad_batch, exact, atol=1e-5)
    ratios = conv.weight.batch_l2 / exact.square().sum((1, 2, 3, 4))
    return float(ratios.min()), float(ratios.max())


found = {groups: ratio(groups) for groups in (1, 2, 4)}
print(
    "batch_l2 over the squared norm of grad_batch,",
    ", ".join(f"groups={g}: {low:.2f} to {high:.2f}" for g, (low, high) in found.items()),
)
assert all(abs(value - 1) < 1e-3 for value in found[1])
assert min(found[2]) > 1.1
assert min(found[4]) > 1.1
PYTHON
