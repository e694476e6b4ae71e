"""The networks that MSN is measured on, each with any normalization.

Three are those of the paper of MSN (Subramanian, Chong, 2019, arXiv 1907.04003), the fourth is the
discriminator of SNDCGAN. The trainable parameters that its authors give, as far as they say what
the networks look like:

==============  ==========  =======  =========================================================
network         batch norm  MSN      what follows
==============  ==========  =======  =========================================================
3-layer CNN     103562      103482   every convolution has a bias, also where a normalization
VGG7            438314      437738   follows and takes it away again
DenseNet-BC     1009730     994251   24 channels to begin with, no convolution has a bias, a
                                     normalization before every activation, the last included
==============  ==========  =======  =========================================================

Batch norm has a gain and a bias per channel, MSN a bias. Biases that a normalization takes away
again cost time and do nothing, so the variants ``bn``, ``msn two-step`` and ``msn`` have none: one
parameter per channel fewer than published in the first two networks. ``bn + conv bias`` is batch
norm as published. The activation of VGG7 is ReLU; the authors' dropout is left out.

**DenseNet is pre-activation**: normalization, ReLU, convolution. The input of a normalization is
the concatenation of what many convolutions gave, and a convolution's output is read by many
normalizations, each with a bias of its own. So ``msn`` takes the mean away where the convolution
is (``MSNConv2d`` without a bias); a mean of zero outlives concatenation and the average pooling
between blocks, and all that is left to do before an activation is to add the bias
(:class:`ChannelBias`). The convolution between the two activations of a layer has one reader alone
and is an ``MSNConv2d`` with a bias. Outputs, gradients and the number of parameters are those of
``msn two-step``, where ``MeanOnlyBatchNorm2d`` stands in front of every activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastsn
import fastsn.nn
from benchmarks.networks import SNDCGANDiscriminator, channels, layers

#: As many as a layer of fastsn or torch takes when it is made.
FIRST_ITERATIONS = 15


class ChannelBias(nn.Module):
    """One trainable number per channel, added: (batch, channels, height, width) -> the same."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


class SubtractMean(nn.Module):
    """Mean-only batch norm by its definition, as the benchmarks' reference."""

    running_mean: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.running_mean
        if self.training:
            mean = x.mean((0, 2, 3))
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), 0.1)
        return x - mean[:, None, None] + self.bias[:, None, None]


def torch_sn_conv(*args: Any, **kwargs: Any) -> nn.Module:
    return parametrizations.spectral_norm(nn.Conv2d(*args, **kwargs))


def torch_sn_dense(*args: Any, **kwargs: Any) -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(*args, **kwargs))


@dataclass(frozen=True)
class Variant:
    """What the layers of a network are made by.

    Attributes:
        conv: a convolution whose output stays as it is.
        dense: a linear layer, where the authors normalize it.
        normalized: a convolution whose output is normalized, by itself or by ``norm``.
        norm: the layer that normalizes; None: no such layer.
        shared: the layer in front of an activation whose input has further readers; None: no such
            layer.
        conv_bias: whether convolutions have a bias although ``norm`` has one.
    """

    conv: Callable[..., nn.Module] = nn.Conv2d
    dense: Callable[[int, int], nn.Module] = nn.Linear
    normalized: Callable[..., nn.Module] = nn.Conv2d
    norm: Callable[[int], nn.Module] | None = None
    shared: Callable[[int], nn.Module] | None = None
    conv_bias: bool = False

    def plain(self, *args: Any, **geometry: Any) -> list[nn.Module]:
        return [self.conv(*args, **geometry)]

    def block(self, in_channels: int, out_channels: int, *args: Any, **geometry: Any) -> list[Any]:
        """A convolution and what normalizes it."""
        bias = self.norm is None or self.conv_bias
        conv = self.normalized(in_channels, out_channels, *args, **geometry, bias=bias)
        return [conv] if self.norm is None else [conv, self.norm(out_channels)]

    def shared_conv(self, *args: Any, **geometry: Any) -> nn.Module:
        """A convolution whose readers each have a ``shared`` layer of their own."""
        bias = self.shared is None or self.conv_bias
        return self.normalized(*args, **geometry, bias=bias)

    def activation(self, features: int) -> list[nn.Module]:
        """What such a reader begins with."""
        return [nn.ReLU()] if self.shared is None else [self.shared(features), nn.ReLU()]


SN = Variant(fastsn.nn.SNConv2d, fastsn.nn.SNLinear, fastsn.nn.SNConv2d)
MEAN_ONLY = fastsn.nn.MeanOnlyBatchNorm2d
VARIANTS = {
    "none": Variant(),
    "bn": Variant(norm=nn.BatchNorm2d, shared=nn.BatchNorm2d),
    "bn + conv bias": Variant(norm=nn.BatchNorm2d, shared=nn.BatchNorm2d, conv_bias=True),
    "sn": SN,
    "msn two-step": Variant(SN.conv, SN.dense, SN.conv, norm=MEAN_ONLY, shared=MEAN_ONLY),
    "msn": Variant(SN.conv, SN.dense, fastsn.nn.MSNConv2d, shared=ChannelBias),
}
TORCH_MSN = Variant(
    torch_sn_conv, torch_sn_dense, torch_sn_conv, norm=SubtractMean, shared=SubtractMean
)
#: By torch alone, what computes the same as a variant of fastsn.
REFERENCES = {
    "sn": Variant(torch_sn_conv, torch_sn_dense, torch_sn_conv),
    "msn two-step": TORCH_MSN,
    "msn": TORCH_MSN,
}


def cnn(
    variant: Variant, in_channels: int = 1, size: int = 28, width: float = 1.0
) -> nn.Sequential:
    """Images (batch, in_channels, size, size) -> logits (batch, 10): the 3-layer CNN."""
    c16, c32 = channels((16, 32), width)
    size = (size + 2) // 2 + 1
    return nn.Sequential(
        *variant.block(in_channels, c16, 5, padding=2),
        nn.LeakyReLU(0.1),
        *variant.block(c16, c32, 3, padding=2),
        nn.LeakyReLU(0.1),
        *variant.block(c32, c32, 4, stride=2, padding=2),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        variant.dense(c32 * size**2, 10),
    )


def vgg7(variant: Variant, in_channels: int = 3, width: float = 1.0) -> nn.Sequential:
    """Images (batch, in_channels, 32, 32) -> logits (batch, 10)."""
    c32, c64, c128, c256 = channels((32, 64, 128, 256), width)
    modules: list[nn.Module] = []
    for stage in ((c32, c32), (c64, c64), (c128,), (c256,)):
        for out_channels in stage:
            padding = 0 if len(stage) == 1 and out_channels == c256 else 1
            modules += [*variant.block(in_channels, out_channels, 3, padding=padding), nn.ReLU()]
            in_channels = out_channels
        modules.append(nn.MaxPool2d(2))
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(c256, 10))


class DenseLayer(nn.Sequential):
    """Bottleneck of 1x1 and 3x3: ``growth`` channels, concatenated to the input."""

    def __init__(self, variant: Variant, in_channels: int, growth: int, bottleneck: int) -> None:
        super().__init__(
            *variant.activation(in_channels),
            *variant.block(in_channels, bottleneck * growth, 1),
            nn.ReLU(),
            variant.shared_conv(bottleneck * growth, growth, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


def densenet(
    variant: Variant,
    blocks: tuple[int, ...] = (16, 16, 16),
    growth: int = 12,
    bottleneck: int = 4,
    compression: float = 0.8,
) -> nn.Sequential:
    """Images (batch, 3, n, n) -> logits (batch, 10): DenseNet-BC."""
    count = 2 * growth
    modules: list[nn.Module] = [variant.shared_conv(3, count, 3, padding=1)]
    for i, length in enumerate(blocks):
        if i > 0:
            compressed = int(compression * count)
            modules += [*variant.activation(count), variant.shared_conv(count, compressed, 1)]
            modules.append(nn.AvgPool2d(2))
            count = compressed
        for _ in range(length):
            modules.append(DenseLayer(variant, count, growth, bottleneck))
            count += growth
    modules += [*variant.activation(count), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*modules, nn.Linear(count, 10))


def sndcgan(
    variant: Variant, width: float = 1.0, where: tuple[int, ...] = (4, 6, 7)
) -> nn.Sequential:
    """Images (batch, 3, 32, 32) -> logits (batch, 1): the discriminator of SNDCGAN.

    ``where``: the convolutions, counted from 1, whose output is normalized; these are MSN-GAN's.
    """
    *convolutions, dense = layers(SNDCGANDiscriminator(width=width))
    modules: list[nn.Module] = []
    for place, conv in enumerate(convolutions, 1):
        make = variant.block if place in where else variant.plain
        geometry = {"stride": conv.stride, "padding": conv.padding}
        modules += make(conv.in_channels, conv.out_channels, conv.kernel_size, **geometry)
        modules.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*modules, nn.Flatten(), variant.dense(dense.in_features, 1))


Network = Callable[[Variant], nn.Module]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights, in the order of the layers: the same list for every variant of a network."""
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    """Biases and gains, in the order of the layers."""
    return [parameter for parameter in model.parameters() if parameter.ndim == 1]


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def build(network: Network, variant: str, seed: int = 0) -> nn.Module:
    """The network with a variant of :data:`VARIANTS`; ``seed`` decides its weights for all alike.

    Spectral norms are computed in one call for the whole model (``fastsn.accelerate``).
    """
    torch.manual_seed(seed)
    plain = network(VARIANTS["none"])
    model = network(VARIANTS[variant])
    for weight, same in zip(matrices(model), matrices(plain), strict=True):
        weight.copy_(same)
    if variant not in REFERENCES:
        return model
    fastsn.accelerate(model)
    for _ in range(FIRST_ITERATIONS):
        fastsn.refresh(model)
    return model


def parallel_state(model: nn.Module) -> list[list[Tensor]]:
    """Parameters, u and v, in lists that correspond between the variants of one method."""
    buffers = dict(model.named_buffers())
    u, v = ([buffers[name] for name in buffers if name.endswith(end)] for end in ("._u", "._v"))
    return [[*matrices(model)], [*vectors(model)], u, v]


@torch.no_grad()
def reference_of(network: Network, variant: str, model: nn.Module) -> nn.Module:
    """``model``, which has this variant and has not been trained, made by torch alone."""
    if variant not in REFERENCES:
        same = network(VARIANTS[variant])
        same.load_state_dict(model.state_dict())
        return same
    reference = network(REFERENCES[variant])
    for mine, others in zip(parallel_state(reference), parallel_state(model), strict=True):
        for tensor, other in zip(mine, others, strict=True):
            tensor.copy_(other)
    return reference
