"""Models with batch norms, and what tests of their conversion share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1),
        nn.BatchNorm2d(4, momentum=None),
        nn.Flatten(),
        nn.Linear(4 * 64, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Linear(5, 2),
    )


class Block(nn.Module):
    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Attributes, skip connections, and a scale of its own in the root."""

    def __init__(self):
        super().__init__()
        # The names are in another order than the calls.
        self.norm = nn.BatchNorm2d(4)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(4, 4), Block(4, 8, 2)])
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3))) * self.scale


RESNET_PAIRS = {
    "stem": "norm",
    "blocks.0.conv1": "blocks.0.bn1",
    "blocks.0.conv2": "blocks.0.bn2",
    "blocks.1.conv1": "blocks.1.bn1",
    "blocks.1.conv2": "blocks.1.bn2",
    "blocks.1.shortcut.0": "blocks.1.shortcut.1",
}


class Dense(nn.Module):
    """Pre-activation as in DenseNet: norms before convolutions, of what was joined."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        return self.conv2(F.relu(self.norm2(x)))


class Deciding(nn.Module):
    """A forward that depends on numbers, blocks whose forward does not, and one whose does."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return y if y.sum() > 0 else -y

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.block = Block(4, 4)
        self.part = Deciding.Part()
        self.rest = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Deciding.Part())

    def forward(self, x):
        x = self.bn(self.conv(x))
        if x.sum() > 0:
            x = self.block(x)
        return self.rest(self.part(x))


def images(*shape):
    return torch.randn(4, 3, *(shape or (4, 4)))


def trained(model, x=images, steps=3):
    """With running statistics, scales and shifts that are not those of the start."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(parameter, 0.5, 2.0)
            elif name == "bias":
                nn.init.normal_(parameter)
    with torch.no_grad():
        for _ in range(steps):
            model(2 * x() + 1)
    return model


MODELS = {"chain": chain, "resnet": ResNet, "dense": Dense, "deciding": Deciding}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def classes(model):
    return {
        name: type(module).__name__.removeprefix("Parametrized")
        for name, module in model.named_modules()
        if "parametrizations" not in name and not name.endswith("batch_norm")
    }


def no_batch_norm(model):
    """None with a variance."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    return not any(hasattr(norm, "eps") for norm in norms)


def assert_pairs(model, report, pairs):
    kinds = classes(model)
    joined = [line.split(" -> ")[0] for line in report.touched if " + " in line]
    assert sorted(joined) == sorted(f"{layer} + {norm}" for layer, norm in pairs.items())
    for layer, norm in pairs.items():
        assert kinds[layer].startswith("MSN") and kinds[norm] == "Identity"
    assert sum(kind.startswith("MSN") for kind in kinds.values()) == len(pairs)


class Uses(nn.Module):
    """Two convolutions and two norms, used as `how` says."""

    def __init__(self, how, **layers):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.how = how

    def forward(self, x):
        return self.how(self, x)
