"""The synthetic training in PyTorch, as a process that times epochs on request.

Started by `python -m experiments.benchmark` with another interpreter, in which PyTorch
is installed. It imports nothing of this repository. It reads one JSON object per line
from standard input and answers each with one on standard output:

    {"load": PATH, "way": WAY}  -> {"torch": VERSION, "threads": N}
    {"epoch": true}             -> {"seconds": S, "loss": L, ...}

The first epoch takes the batches given in the file, so that its outcome can be compared
with that of the JAX training; later ones draw their own.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn


def make_model(weights, activation):
    """The MLP, with initial weights given as [in, out] matrices and biases."""
    layers = []
    for index in range(0, len(weights), 2):
        kernel, bias = weights[index], weights[index + 1]
        layer = nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias))
        layers += [layer, activation]
    return nn.Sequential(*layers[:-1])


def shared_forward(model, loss_fn, x, y):
    """The authors' way: one forward for all, one autograd.grad per environment."""
    params = list(model.parameters())
    outputs = model(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    losses, stacked = [], []
    for env in range(len(x)):
        loss = loss_fn(outputs[env], y[env])
        losses.append(loss.detach())
        stacked.append(torch.autograd.grad(loss, params, retain_graph=True))
    return torch.stack(losses), [
        torch.stack(grads) for grads in zip(*stacked, strict=True)
    ]


def own_forward(model, loss_fn, x, y):
    """One forward and one autograd.grad per environment."""
    params = list(model.parameters())
    losses, stacked = [], []
    for env in range(len(x)):
        loss = loss_fn(model(x[env]), y[env])
        losses.append(loss.detach())
        stacked.append(torch.autograd.grad(loss, params))
    return torch.stack(losses), [
        torch.stack(grads) for grads in zip(*stacked, strict=True)
    ]


def functional(model, loss_fn, x, y):
    """torch.func: vmap over the gradient function."""
    names = [name for name, _ in model.named_parameters()]
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, x, y):
        return loss_fn(torch.func.functional_call(model, params, (x,)), y)

    grads, losses = torch.func.vmap(
        torch.func.grad_and_value(loss), in_dims=(None, 0, 0)
    )(params, x, y)
    return losses, [grads[name] for name in names]


WAYS = {
    "shared_forward": shared_forward,
    "own_forward": own_forward,
    "functional": functional,
}


def binary_cross_entropy(outputs, y):
    """Mean loss of logits [batch, 1] for labels [batch]."""
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], y)


def agreeing(grads, threshold):
    """Where the signs of gradients [env, ...] agree well enough."""
    return grads.sign().sum(0).abs() >= threshold * len(grads) - 1e-3


class Training:
    """Model, data and optimizer of one way to get per-environment gradients."""

    def __init__(self, path, way):
        data = np.load(path)
        self.settings = json.loads(str(data["settings"]))
        self.model = make_model(
            [data[f"param_{i}"] for i in range(data["num_params"])],
            nn.LeakyReLU(0.01),
        )
        names = ("train", "validation", "held_out", "test")
        self.splits = {
            name: [torch.from_numpy(data[f"{name}_{part}"]) for part in ("x", "y")]
            for name in names
        }
        self.evaluated = int(data["evaluated"])
        self.first_rows = torch.from_numpy(data["rows"]).long()
        self.gradients = WAYS[way]
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=self.settings["learning_rate"],
            betas=(self.settings["b1"], self.settings["b2"]),
            eps=self.settings["eps"],
            weight_decay=self.settings["l2"],
        )
        self.epochs = 0

    def mask(self, stacked):
        """The AND-mask: sets the gradients, returns the fraction that passed."""
        kept_count, size = 0, 0
        rescale, cap = self.settings["rescale"], self.settings["max_rescale"]
        for param, grads in zip(self.model.parameters(), stacked, strict=True):
            kept = agreeing(grads, self.settings["threshold"])
            param.grad = grads.mean(0) * kept
            if rescale:
                # Where nothing passed there is nothing to scale.
                factor = kept.numel() / kept.sum().clamp(min=1)
                param.grad *= factor if cap is None else factor.clamp(max=cap)
            kept_count, size = kept_count + int(kept.sum()), size + kept.numel()
        return kept_count / size

    def epoch(self):
        """One pass over the data and the evaluation that belongs to it."""
        x, y = self.splits["train"]
        if self.epochs == 0:
            rows = self.first_rows
        else:
            steps, envs, batch = self.first_rows.shape
            order = torch.stack([torch.randperm(x.shape[1]) for _ in range(envs)])
            rows = order[:, : steps * batch].view(envs, steps, batch).swapaxes(0, 1)
        env_index = torch.arange(len(x))[:, None]
        losses, kept = [], []
        for step_rows in rows:
            step_losses, stacked = self.gradients(
                self.model,
                binary_cross_entropy,
                x[env_index, step_rows],
                y[env_index, step_rows],
            )
            kept.append(self.mask(stacked))
            self.optimizer.step()
            losses.append(float(step_losses.mean()))
        self.epochs += 1
        result = {"loss": float(np.mean(losses)), "kept_fraction": float(np.mean(kept))}
        with torch.no_grad():
            for name, (x, y) in self.splits.items():
                if name == "train":
                    x, y = x[:, : self.evaluated], y[:, : self.evaluated]
                right = (self.model(x)[..., 0] > 0) == (y > 0.5)
                result[f"{name}_accuracy"] = float(right.float().mean())
        return result


def serve(load, work):
    """Answers requests until standard input closes.

    Args:
      load: makes what `work` needs of a request with "load".
      work: answers any other request, given what `load` made and the request; the
        seconds it takes are added to its answer.
    """
    loaded = None
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            torch.manual_seed(0)
            loaded = load(request)
            answer = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        else:
            start = time.perf_counter()
            answer = work(loaded, request)
            answer["seconds"] = time.perf_counter() - start
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(
        lambda request: Training(request["load"], request["way"]),
        lambda training, _: training.epoch(),
    )
