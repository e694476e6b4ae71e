"""The networks that the benchmarks and the demo measure, built from plain ``torch.nn`` layers.

No layer here is normalized: :func:`normalize_with` applies any spectral norm (torch's or fastsn's)
to every layer that has a weight matrix, so all variants of a benchmark start from the same network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def layers(model: nn.Module) -> list[Any]:
    """The layers of ``model`` that can be normalized, in the order of ``model.modules()``.

    Their type is Any because a spectral norm adds attributes that their classes do not declare.
    """
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def normalize_with(model: nn.Module, spectral_norm: Callable[[nn.Module], object]) -> nn.Module:
    """Apply ``spectral_norm`` to every layer of ``model`` in place, and return the model."""
    for layer in layers(model):
        spectral_norm(layer)
    return model


def channels(counts: Iterable[int], width: float) -> list[int]:
    """``counts`` scaled by ``width``, at least one channel each."""
    return [max(1, round(count * width)) for count in counts]


class SNDCGANDiscriminator(nn.Module):
    """Images (batch, in_channels, size, size) -> logits (batch, 1).

    Table 3 of Miyato et al., 2018 (arXiv 1802.05957): seven convolutions, leaky ReLU 0.1, one dense
    layer. ``size`` is a multiple of 8; ``width`` scales the channel counts of the paper.
    """

    def __init__(self, in_channels: int = 3, size: int = 32, width: float = 1.0) -> None:
        super().__init__()
        c64, c128, c256, c512 = channels((64, 128, 256, 512), width)
        self.conv1 = nn.Conv2d(in_channels, c64, 3, padding=1)
        self.conv2 = nn.Conv2d(c64, c64, 4, stride=2, padding=1)
        self.conv3 = nn.Conv2d(c64, c128, 3, padding=1)
        self.conv4 = nn.Conv2d(c128, c128, 4, stride=2, padding=1)
        self.conv5 = nn.Conv2d(c128, c256, 3, padding=1)
        self.conv6 = nn.Conv2d(c256, c256, 4, stride=2, padding=1)
        self.conv7 = nn.Conv2d(c256, c512, 3, padding=1)
        self.dense = nn.Linear(c512 * (size // 8) ** 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        convolutions = (
            self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6, self.conv7,
        )  # fmt: skip
        for convolution in convolutions:
            x = F.leaky_relu(convolution(x), 0.1)
        return self.dense(x.flatten(1))


class SNDCGANGenerator(nn.Module):
    """Latents (batch, latent) -> images (batch, out_channels, size, size) in [-1, 1].

    Table 3 of Miyato et al., 2018: dense, three transposed convolutions with batch norm and ReLU,
    one convolution and tanh. ``size`` is a multiple of 8; ``width`` scales the channel counts of
    the paper.
    """

    def __init__(
        self, latent: int = 128, out_channels: int = 3, size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        self.start = size // 8
        c64, c128, c256, c512 = channels((64, 128, 256, 512), width)
        self.dense = nn.Linear(latent, c512 * self.start**2)
        self.conv1 = nn.ConvTranspose2d(c512, c256, 4, stride=2, padding=1)
        self.conv2 = nn.ConvTranspose2d(c256, c128, 4, stride=2, padding=1)
        self.conv3 = nn.ConvTranspose2d(c128, c64, 4, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(c256)
        self.norm2 = nn.BatchNorm2d(c128)
        self.norm3 = nn.BatchNorm2d(c64)
        self.image = nn.Conv2d(c64, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.dense(z).unflatten(1, (-1, self.start, self.start))
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.norm3(self.conv3(x)))
        return torch.tanh(self.image(x))


class Block(nn.Module):
    """Residual block: twice activation and convolution, then average pooling to halve.

    The first block of a network sees the image and has no leading activation; its shortcut pools
    before its 1x1 convolution, which costs less there and is the same function.
    """

    def __init__(
        self, in_channels: int, out_channels: int, downsample: bool, first: bool = False
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.first = first
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        learned = downsample or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else F.relu(x))
        h = self.conv2(F.relu(h))
        if not self.downsample:
            return h + self.shortcut(x)
        if self.first:
            return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))
        return F.avg_pool2d(h + self.shortcut(x), 2)


class ResNetDiscriminator(nn.Module):
    """Images (batch, in_channels, n, n) -> logits (batch, 1).

    Table 4 of Miyato et al., 2018, for CIFAR-10. ``width`` scales its 128 channels.
    """

    def __init__(self, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        (c128,) = channels((128,), width)
        self.blocks = nn.Sequential(
            Block(in_channels, c128, downsample=True, first=True),
            Block(c128, c128, downsample=True),
            Block(c128, c128, downsample=False),
            Block(c128, c128, downsample=False),
        )
        self.dense = nn.Linear(c128, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(F.relu(self.blocks(x)).sum((2, 3)))


class SelfAttention(nn.Module):
    """Self-attention of BigGAN: keys and values at half the resolution, a learned gain."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        inner = max(1, in_channels // 8)
        self.query = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.key = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.value = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)
        self.out = nn.Conv2d(in_channels // 2, in_channels, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).flatten(2)
        key = F.max_pool2d(self.key(x), 2).flatten(2)
        value = F.max_pool2d(self.value(x), 2).flatten(2)
        attention = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
        attended = (value @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gain * self.out(attended)


class BigGANDiscriminator(nn.Module):
    """Images (batch, 3, 128, 128), labels (batch,) -> logits (batch, 1): BigGAN at 128x128.

    Brock et al., 2019 (arXiv 1809.11096), ch = 96: 88 M parameters, an embedding and self-attention
    at 64x64 included. ``width`` scales ch.
    """

    def __init__(self, classes: int = 1000, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c4, c8, c16 = channels((96, 192, 384, 768, 1536), width)
        self.blocks = nn.Sequential(
            Block(3, c1, downsample=True, first=True),
            SelfAttention(c1),
            Block(c1, c2, downsample=True),
            Block(c2, c4, downsample=True),
            Block(c4, c8, downsample=True),
            Block(c8, c16, downsample=True),
            Block(c16, c16, downsample=False),
        )
        self.dense = nn.Linear(c16, 1)
        self.embedding = nn.Embedding(classes, c16)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = F.relu(self.blocks(x)).sum((2, 3))
        return self.dense(h) + (self.embedding(label) * h).sum(1, keepdim=True)


class ManyLinear(nn.Sequential):
    """``count`` square linear layers in a row, ``features`` wide: (batch, features) -> the same."""

    def __init__(self, count: int, features: int) -> None:
        super().__init__(*(nn.Linear(features, features) for _ in range(count)))


#: The networks of the benchmark by name, and small ones of the same kinds that prove that it runs.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "SNDCGAN D": SNDCGANDiscriminator,
    "SN-ResNet D": ResNetDiscriminator,
    "BigGAN-128 D": BigGANDiscriminator,
    "48 x 64x64": partial(ManyLinear, 48, 64),
    "4096x4096": partial(ManyLinear, 1, 4096),
}
QUICK_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small SNDCGAN D": partial(SNDCGANDiscriminator, width=1 / 16),
    "small BigGAN D": partial(BigGANDiscriminator, classes=10, width=1 / 16),
}
