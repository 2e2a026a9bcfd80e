#!/usr/bin/env bash
# Under Opacus an embedding's padding row has a gradient, and is trained.
#
# opacus 1.6.0 with torch 2.13.0. The row that nn.Embedding(padding_idx=...) names gets no
# gradient in PyTorch and stays as it is, zero at first: batches are filled up with it.
# GradSampleModule's gradients per example add up what arrives at that row as at any
# other, so that padding has a meaning after the first step. Nothing is raised or warned
# of, and ModuleValidator finds no fault with the model.
#
# Seen: norm of the padding row's gradient, autograd: 0.000, sum over examples: 32.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 opacus==1.6.0
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

# It registers hooks in a way that PyTorch warns of.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

torch.manual_seed(0)
layer = nn.Embedding(10, 4, padding_idx=0)
assert ModuleValidator.validate(layer, strict=False) == []
tokens = torch.tensor([[3, 5, 0, 0], [1, 0, 0, 0]])
scale = torch.arange(1.0, 5.0)[None, :, None]

layer(tokens).mul(scale).sum().backward()
exact = layer.weight.grad.clone()
layer.zero_grad()
wrapped = GradSampleModule(layer, loss_reduction="sum")
wrapped(tokens).mul(scale).sum().backward()
total = layer.weight.grad_sample.sum(0)

print(
    f"norm of the padding row's gradient, autograd: {float(exact[0].norm()):.3f}, "
    f"sum over examples: {float(total[0].norm()):.3f}"
)
assert torch.equal(total[1:], exact[1:])
assert float(exact[0].norm()) == 0
assert float(total[0].norm()) > 1
PYTHON
