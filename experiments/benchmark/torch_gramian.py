"""Steps that take inner products or norms in PyTorch, as a process that times them.

Started by `python -m experiments.benchmark gramian` with another interpreter, in which
PyTorch, TorchJD and Opacus are installed; of this repository it imports the scripts
beside it alone. The protocol is theirs, with one request more, which comes first:

    {"load": PATH, "way": WAY, "threads": N}  -> {"torch": VERSION, "threads": N}
    {"check": RATE}   -> {"loss": L, "loss_after": L, "update_norm": U}
                      or {"refused": REASON}
    {"steps": N}      -> {"seconds": S, "loss": L}

A check takes one step with another learning rate, and takes it back.
"""

import logging
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch_peer import binary_cross_entropy, serve
from torch_steps import Step, Transformer


class CalledPositions(Transformer):
    """The transformer, with positions looked up as tokens are.

    TorchJD and Opacus see a parameter where its module is called, and want examples
    in front there.
    """

    def __init__(self, model):
        nn.Module.__init__(self)
        for name, child in model.named_children():
            self.add_module(name, child)

    def forward(self, tokens):
        """Logits [..., position, vocabulary]."""
        positions = torch.arange(tokens.shape[-1]).expand(tokens.shape)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def projector():
    """TorchJD's solver, which adds a hundredth of its usual to the diagonal.

    With its own 1e-4 the updates of ill-conditioned Gramians are up to 2 % shorter.
    """
    from torchjd.linalg import QuadprogProjector

    return QuadprogProjector(reg_eps=1e-6)


class Autogram:
    """TorchJD's engine for the Gramian, then a backward pass of weighted losses."""

    def __init__(self, step):
        # Here and below: the other ways do without these packages.
        from torchjd.aggregation import UPGradWeighting
        from torchjd.autogram import Engine

        self.engine = Engine(step.model, batch_dim=0)
        self.weighting = UPGradWeighting(projector=projector())

    def __call__(self, losses):
        """Sets the gradients of the parameters."""
        losses.backward(self.weighting(self.engine.compute_gramian(losses)))


class Autojac:
    """TorchJD's Jacobian of all losses, aggregated."""

    def __init__(self, step):
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import backward, jac_to_grad

        self.params = step.params
        self.aggregator = UPGrad(projector=projector())
        self.backward, self.jac_to_grad = backward, jac_to_grad

    def __call__(self, losses):
        """Sets the gradients of the parameters."""
        self.backward(losses)
        self.jac_to_grad(self.params, self.aggregator)


class Ghost:
    """Opacus' ghost clipping: norms in a first backward pass, then a weighted one."""

    def __init__(self, step):
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import (
            DPTensorFastGradientClipping,
        )

        logging.getLogger("opacus").setLevel(logging.ERROR)
        # Of the hooks, which PyTorch warns of where inputs need no gradient.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        self.params, self.optimizer = step.params, step.optimizer
        self.tensor = DPTensorFastGradientClipping
        step.model = GradSampleModuleFastGradientClipping(
            step.model, max_grad_norm=step.max_norm
        )
        self.module = step.model

    def __call__(self, losses):
        """Sets the gradients of the parameters."""
        self.tensor(self.module, self.optimizer, losses).backward()
        # Its optimizer would divide what it has summed, after adding noise.
        for param in self.params:
            param.grad /= len(losses)


SYSTEMS = {"autogram": Autogram, "autojac": Autojac, "ghost": Ghost}


class GramianStep(Step):
    """A step that weights the losses of the environments, or a plain one."""

    def __init__(self, path, way):
        super().__init__(path, "plain")
        self.max_norm = float(np.load(path)["max_norm"])
        self.system = None
        self.way = way

    def prepare(self):
        """Sets up what another library may refuse."""
        if self.way == "plain" or self.system is not None:
            return
        if isinstance(self.model, Transformer):
            self.model = CalledPositions(self.model)
        self.system = SYSTEMS[self.way](self)

    def losses(self):
        """Of each environment [env]; the environments stay in front in the model."""
        x, y = self.x, self.y
        if x.shape[1] == 1:  # a convolution has one axis for the batch
            x, y = x.flatten(0, 1), y.flatten(0, 1)
        outputs = self.model(x)
        if self.loss_fn is binary_cross_entropy:
            losses = functional.binary_cross_entropy_with_logits(
                outputs[..., 0], y, reduction="none"
            )
        else:
            losses = functional.cross_entropy(
                outputs.flatten(0, -2), y.flatten(), reduction="none"
            )
        return losses.view(len(x), -1).mean(1)

    def step(self):
        """From the batch to updated parameters; returns the mean loss before."""
        if self.way == "plain":
            return super().step()
        self.optimizer.zero_grad()
        losses = self.losses()
        self.system(losses)
        self.optimizer.step()
        return losses.detach().mean()

    def check(self, rate):
        """What a step with this learning rate does; the parameters stay."""
        (group,) = self.optimizer.param_groups
        before = group["lr"], [param.detach().clone() for param in self.params]
        group["lr"] = rate
        loss = self.step()
        squares = sum(param.grad.square().sum() for param in self.params)
        with torch.no_grad():
            after = self.losses().mean()
            group["lr"] = before[0]
            for param, value in zip(self.params, before[1], strict=True):
                param.copy_(value)
        return {
            "loss": float(loss),
            "loss_after": float(after),
            "update_norm": float(squares.sqrt()),
        }


def load(request):
    """A step, with the threads that the request grants."""
    torch.set_num_threads(request["threads"])
    return GramianStep(request["load"], request["way"])


def work(step, request):
    """Checks, or takes the steps that the request asks for."""
    if "check" in request:
        try:
            step.prepare()
            return step.check(request["check"])
        except Exception as error:  # whatever a library says that it cannot do
            first, *_ = str(error).splitlines() or [""]
            return {"refused": f"{type(error).__name__}: {first}"}
    losses = [step.step() for _ in range(request["steps"])]
    return {"loss": float(losses[0])}


if __name__ == "__main__":
    serve(load, work)
