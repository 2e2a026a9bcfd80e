#!/usr/bin/env bash
# The Gramian of TorchJD's autogram lacks the products between two uses of a tied weight.
#
# torchjd 0.18.0 with torch 2.13.0. Two Linear modules that hold the same parameter, as an
# embedding and an output layer often do: the gradient of a loss is the sum of what both
# uses send, and its inner products have the products between the two uses. autogram's
# Gramian has the products within each use alone. Nothing is raised or warned of, and the
# documentation's list of conditions on modules does not name it; a single module that is
# called twice comes out right. autojac, to which the documentation calls it equivalent,
# is exact.
#
# Seen: relative error of the Gramian, tied in two modules: 0.101, one module twice: 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 "torchjd[full]==0.18.0"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torchjd.autogram import Engine


class Model(nn.Module):
    """Two hidden layers with one weight, in two modules or in one."""

    def __init__(self, two_modules):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = self.first
        if two_modules:
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
        self.readout = nn.Linear(4, 1)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.readout(torch.tanh(self.second(hidden)))


def error(two_modules):
    torch.manual_seed(0)
    model = Model(two_modules)
    engine = Engine(model, batch_dim=0)
    losses = model(torch.randn(5, 4)).squeeze(1) ** 2
    params = list(model.parameters())
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    exact = jacobian @ jacobian.T
    return float((engine.compute_gramian(losses) - exact).norm() / exact.norm())


tied, twice = error(True), error(False)
print(f"relative error, tied in two modules: {tied:.3f}, one module twice: {twice:.3f}")
assert tied > 0.01
assert twice < 1e-5
PYTHON
