"""Single training steps in PyTorch, as a process that times them on request.

Started by `python -m experiments.benchmark steps` with another interpreter, in which
PyTorch is installed; of this repository it imports torch_peer.py alone. The protocol is
the same, one JSON object per line:

    {"load": PATH, "way": WAY, "threads": N}  -> {"torch": VERSION, "threads": N}
    {"steps": N}                              -> {"seconds": S, "loss": L}

S is the time of all N, L the loss of the first.
"""

import itertools
import re
import warnings
from collections import OrderedDict

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch_peer import WAYS, agreeing, binary_cross_entropy, make_model, serve

LAYER = re.compile(r"(?P<layer>(?:.*\.)?layers\.(?P<index>\d+))\.kernel\.value$")


def make_cnn(channels, inputs):
    """3x3 convolutions, each with ReLU and 2x2 average pooling, then a dense layer."""
    blocks = []
    for fan_in, fan_out in itertools.pairwise(channels):
        conv = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        blocks.append(nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(2)))
    # Of PyTorch's own modules alone, as BackPACK wants it.
    parts = {
        "layers": nn.Sequential(*blocks),
        "flatten": nn.Flatten(),
        "head": nn.Linear(inputs, 10),
    }
    return nn.Sequential(OrderedDict(parts))


class ConvNorm(nn.Module):
    """3x3 convolution without bias, batch norm over one example, ReLU."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
        # The environments' examples share a batch here, their statistics they must not:
        # with one example each, batch norm is instance norm.
        self.norm = nn.InstanceNorm2d(fan_out, affine=True)

    def forward(self, x):
        """[batch, fan_out, height, width]."""
        return functional.relu(self.norm(self.conv(x)))


class GroupedCNN(nn.Module):
    """A 3x3 convolution, one in pairs, one by channel, then two dense layers."""

    def __init__(self, width, features):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(3, width, 3),
                nn.Conv2d(width, 2 * width, 3, groups=width),
                nn.Conv2d(2 * width, 2 * width, 3, groups=2 * width),
            ]
        )
        self.hidden = nn.Linear(features, 4 * width)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x):
        """Logits for images [batch, channel, side, side]."""
        first, pairs, channels = self.convs
        x = pairs(functional.relu(first(x)))
        x = functional.relu(functional.max_pool2d(x, 2))
        x = functional.relu(functional.max_pool2d(channels(x), 3))
        return self.head(functional.relu(self.hidden(x.flatten(1))))


# Of ImageNet's red, green and blue, as in experiments/vision/model.py.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class FastResNet(nn.Module):
    """The network of experiments/vision/model.py."""

    def __init__(self, width):
        super().__init__()

        def pair(size):
            return nn.ModuleList(ConvNorm(size, size) for _ in range(2))

        self.prep = ConvNorm(3, width)
        self.layer1 = ConvNorm(width, 2 * width)
        self.residual1 = pair(2 * width)
        self.layer2 = ConvNorm(2 * width, 4 * width)
        self.layer3 = ConvNorm(4 * width, 8 * width)
        self.residual3 = pair(8 * width)
        self.head = nn.Linear(8 * width, 10, bias=False)

    def forward(self, images):
        """Logits for images of bytes [batch, channel, side, side]."""
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (MEAN, STD))
        x = self.prep((images.float() / 255 - mean) / std)
        x = functional.max_pool2d(self.layer1(x), 2)
        x = x + self.residual1[1](self.residual1[0](x))
        x = functional.max_pool2d(self.layer2(x), 2)
        x = functional.max_pool2d(self.layer3(x), 2)
        x = x + self.residual3[1](self.residual3[0](x))
        return 0.125 * self.head(x.amax((2, 3)))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x):
        """[batch, position, width]."""
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for part in (self.query, self.key, self.value)
        )
        # Written out, because vmap has no rule for PyTorch's own attention on CPU and
        # would go through the environments one by one.
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        length = scores.shape[-1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
        return self.out(mixed.transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a layer norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        """[batch, position, width]."""
        x = x + self.attention(self.norm_attention(x))
        hidden = functional.gelu(self.up(self.norm_mlp(x)), approximate="tanh")
        return x + self.down(hidden)


class Transformer(nn.Module):
    """The network of workloads.py."""

    def __init__(self, vocabulary, length, width, heads, layers):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        """Logits [batch, position, vocabulary]."""
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cross_entropy(outputs, y):
    """Mean loss of logits [..., classes] for labels [...]."""
    return functional.cross_entropy(outputs.flatten(0, -2), y.flatten())


def to_torch(path, leaf):
    """Name and value of a parameter of Flax in the modules above."""
    *modules, kind = path.removesuffix(".value").split(".")
    if kind == "kernel":
        if leaf.ndim == 4:
            leaf = leaf.transpose(3, 2, 0, 1)
        elif leaf.ndim == 3:  # attention: [in, head, dim], or [head, dim, out]
            if modules[-1] == "out":
                leaf = leaf.reshape(-1, leaf.shape[-1])
            leaf = leaf.reshape(len(leaf), -1).T
        else:
            leaf = leaf.T
    elif kind == "bias":
        leaf = leaf.reshape(-1)
    name = ".".join([*modules, "bias" if kind == "bias" else "weight"])
    return name, torch.from_numpy(np.ascontiguousarray(leaf))


def channels_first(weight, side):
    """Of a dense layer whose input Flax flattened from [side, side, channel]."""
    return weight.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2).flatten(1)


def dense(params, activation):
    """An MLP that has its weights already."""
    layers = {
        int(match["index"]): match["layer"]
        for match in map(LAYER.match, params)
        if match is not None
    }
    weights = [
        params[f"{layers[index]}.{kind}.value"]
        for index in sorted(layers)
        for kind in ("kernel", "bias")
    ]
    return make_model(weights, activation)


def load_model(name, params, x):
    """The model of a workload, its weights loaded; `x` is one environment's."""
    if name == "mlp_80x1":
        return dense(params, nn.ReLU())
    if name == "mlp_16x128":
        return dense(params, nn.LeakyReLU(0.01))
    weights = dict(to_torch(path, leaf) for path, leaf in params.items())
    if name == "cnn_80x1":
        count = sum(leaf.ndim == 4 for leaf in weights.values())
        kernels = [weights[f"layers.{index}.weight"] for index in range(count)]
        channels = [kernels[0].shape[1], *(len(kernel) for kernel in kernels)]
        side = x.shape[-1] // 2**count
        head = channels_first(weights["head.weight"], side)
        weights = {"head.weight": head, "head.bias": weights["head.bias"]} | {
            f"layers.{index}.0.{kind}": weights[f"layers.{index}.{kind}"]
            for index in range(count)
            for kind in ("weight", "bias")
        }
        model = make_cnn(channels, head.shape[1])
    elif name == "fastresnet_80x1":
        if len(x) != 1:
            raise ValueError("instance norm is batch norm for one example alone")
        model = FastResNet(len(weights["prep.conv.weight"]))
    elif name == "grouped_cnn_64x1":
        width = len(weights["convs.0.weight"])
        features = weights["hidden.weight"].shape[1]
        side = round((features / (2 * width)) ** 0.5)
        weights["hidden.weight"] = channels_first(weights["hidden.weight"], side)
        model = GroupedCNN(width, features)
    else:
        vocabulary, width = weights["tokens.weight"].shape
        heads = params["blocks.0.attention.query.kernel.value"].shape[1]
        layers = sum(name.endswith("up.weight") for name in weights)
        length = len(weights["positions.weight"])
        model = Transformer(vocabulary, length, width, heads, layers)
    model.load_state_dict(weights)
    return model


class BackPack:
    """BackPACK's BatchGrad; every environment is one example."""

    def __init__(self, model):
        # Imported here, because the other ways do without it.
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

        # It registers hooks in a way that PyTorch warns of; the gradients are right.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        self.context = lambda: backpack(BatchGrad())
        self.params = list(model.parameters())
        self.loss_layer = extend(nn.CrossEntropyLoss(reduction="sum"))
        self.model = extend(model)

    def __call__(self, model, loss_fn, x, y):
        """See the functions of torch_peer.py."""
        for param in self.params:
            param.grad = None
        with self.context():
            loss = self.loss_layer(self.model(x.flatten(0, 1)), y.flatten())
            loss.backward()
        mean = (loss.detach() / len(x)).expand(len(x))
        return mean, [param.grad_batch for param in self.params]


class Step:
    """Model, data and one way to take a step."""

    def __init__(self, path, way):
        data = np.load(path)
        name = str(data["workload"])
        x, y = data["x"], data["y"]
        if x.ndim == 5:
            x = x.transpose(0, 1, 4, 2, 3)
        self.x = torch.from_numpy(np.ascontiguousarray(x))
        self.y = torch.from_numpy(y)
        if not self.x.is_floating_point() and x.ndim < 5:  # tokens, not images
            self.x = self.x.long()
        if self.y.is_floating_point():
            self.loss_fn = binary_cross_entropy
        else:
            self.loss_fn, self.y = cross_entropy, self.y.long()
        params = {
            key.removeprefix("param:"): data[key]
            for key in data.files
            if key.startswith("param:")
        }
        self.model = load_model(name, params, self.x[0])
        self.params = list(self.model.parameters())
        self.threshold = float(data["threshold"])
        learning_rate = float(data["learning_rate"])
        self.optimizer = torch.optim.SGD(self.params, lr=learning_rate)
        self.gradients = None
        if way == "backpack":
            self.gradients = BackPack(self.model)
        elif way != "plain":
            self.gradients = WAYS[way]

    def step(self):
        """From the batch to updated parameters; returns the mean loss before."""
        if self.gradients is None:
            self.optimizer.zero_grad()
            # Environments of equal size: the mean over all is the mean of their means.
            loss = self.loss_fn(self.model(self.x.flatten(0, 1)), self.y.flatten(0, 1))
            loss.backward()
            loss = loss.detach()
        else:
            losses, stacked = self.gradients(self.model, self.loss_fn, self.x, self.y)
            for param, grads in zip(self.params, stacked, strict=True):
                param.grad = grads.mean(0) * agreeing(grads, self.threshold)
            loss = losses.mean()
        self.optimizer.step()
        return loss


def load(request):
    """A step, with the threads that the request grants."""
    torch.set_num_threads(request["threads"])
    return Step(request["load"], request["way"])


def work(step, request):
    """Takes the steps that the request asks for."""
    losses = [step.step() for _ in range(request["steps"])]
    return {"loss": float(losses[0])}


if __name__ == "__main__":
    serve(load, work)
