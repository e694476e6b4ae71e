"""Mean spectral normalization (MSN): layers that take the batch mean of their output away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsn import means
from fastsn.means import Geometry, Group
from fastsn.nn import checkpoints, modules
from fastsn.nn.batch_norms import MSNBatchNorm
from fastsn.nn.mean_only import MeanOnly, check_momentum
from fastsn.nn.modules import Normalized
from fastsn.weights import autocast

# A folded layer reads and corrects its input, the direct one reads and corrects its output. From
# this many input elements per output element on the direct one is cheaper (benchmarks/NOTES.md).
_DIRECT = 3.0
_OWN = ("gain", "running_mean", "num_batches_tracked", "norm", "process_group", "batch_norm")


class MeanNormalized(MeanOnly, Normalized):
    """What all MSN layers share; a mixin before a layer of ``torch.nn``."""

    def __init__(
        self,
        *args: Any,
        momentum: float | None = 0.1,
        gain: bool = False,
        track_running_stats: bool = True,
        process_group: Group = None,
        norm: str = "matrix",
        **kwargs: Any,
    ) -> None:
        check_momentum(momentum)
        self.norm = norm
        super().__init__(*args, **kwargs)
        original = self.parametrizations.weight.original  # type: ignore[attr-defined]
        self.start(self._channels(), momentum, gain, track_running_stats, process_group, original)

    def start(self, channels: int, *args: Any) -> None:
        module: Any = self
        self.batch_norm = MSNBatchNorm(module, channels)
        super().start(channels, *args)
        self.batch_norm.training = self.training

    # Of the batch norm, where programs that look for one set them.
    @property
    def momentum(self) -> float | None:
        return self.batch_norm.momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self.batch_norm.momentum = value

    @property
    def track_running_stats(self) -> bool:
        return self.batch_norm.track_running_stats

    @track_running_stats.setter
    def track_running_stats(self, value: bool) -> None:
        self.batch_norm.track_running_stats = value

    def trains(self) -> bool:
        return self.training and self.batch_norm.training

    def reset_parameters(self) -> None:
        """Those of the plain layer, but a bias of 0 and a gain of 1; resets the running mean."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if getattr(self, "gain", None) is not None:
            nn.init.ones_(self.gain)  # type: ignore[arg-type]
        if hasattr(self, "running_mean"):
            self.reset_running_stats()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        checkpoints.load_layer(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _channels(self) -> int:
        raise NotImplementedError

    def _run(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The plain layer."""
        raise NotImplementedError

    def _as_batch(self, input: Tensor) -> Tensor:
        """The input as (N, C, *size)."""
        raise NotImplementedError

    def _gained(self, weight: Tensor) -> Tensor:
        """gain * weight, for each output channel its own."""
        if self.gain is None:
            return weight
        groups, transposed = getattr(self, "groups", 1), getattr(self, "transposed", False)
        shape = [groups, *(1,) * weight.ndim]
        shape[2 if transposed else 1] = -1
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        return (grouped * self.gain.to(weight.dtype).view(shape)).flatten(0, 1)

    def _cast(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Input and normalized weight as autocast would hand them on: the mean is of just those."""
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        low = autocast.current(input.device)
        if low is None or torch.float64 in (input.dtype, weight.dtype):
            return input, weight
        return input.to(low), weight.to(low)

    @torch.no_grad()
    def fold_mean(self) -> None:
        """Makes gain and running mean a part of weight and bias, once the weight is a plain one."""
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        assert self.running_mean is not None
        weight.copy_(self._gained(weight))
        bias = means.shift(self.running_mean, self.gain, self.bias).to(weight.dtype)
        trained = weight if self.bias is None else self.bias
        self.bias = nn.Parameter(bias, trained.requires_grad)
        module: Any = self
        for name in _OWN:
            delattr(module, name)

    def _forward(self, input: Tensor, geometry: Geometry, *args: Any) -> Tensor:
        if not self.uses_batch():
            assert self.running_mean is not None
            input, weight = self._cast(input)
            bias = means.shift(self.running_mean, self.gain, self.bias).to(weight.dtype)
            return self._run(input, self._gained(weight), bias, *args)
        batch = self._as_batch(input)
        outputs = math.prod(geometry.output_size)  # positions of a sample
        group = self.group(input, batch.shape[0] * outputs)
        per_sample = math.prod(batch.shape[1:])
        input, weight = self._cast(input)
        # Processes whose inputs differ in size must not differ in what they exchange.
        is_direct = group is None and per_sample > _DIRECT * outputs * self._channels()
        if is_direct and batch.ndim == input.ndim:
            output = self._run(input, weight, None, *args)
            output, mean = means.center(output, self.gain, self.bias, None)
        else:
            patches = means.patch_mean(self._as_batch(input), geometry, group)
            bias, mean = means.mean_bias(
                weight,
                patches,
                self.gain,
                self.bias,
                getattr(self, "groups", 1),
                geometry.transposed,
            )
            output = self._run(input, self._gained(weight), bias, *args)
        self.track(mean)
        return output


_CONVOLUTIONS: dict[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}


class MeanNormalizedConvolution(MeanNormalized):
    """MSN for convolutions and transposed ones of every dimension."""

    casts_weight = True  # see fastsn.weights.autocast
    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]

    def _channels(self) -> int:
        return self.out_channels

    def _as_batch(self, input: Tensor) -> Tensor:
        return input if input.ndim == len(self.kernel_size) + 2 else input[None]

    def _run(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        convolution = _CONVOLUTIONS[len(self.kernel_size), self.transposed]
        if self.transposed:
            (output_padding,) = args
            return convolution(
                input, weight, bias, self.stride, self.padding, output_padding, self.groups,
                self.dilation,
            )  # fmt: skip
        padding = self.padding if self.padding_mode == "zeros" else 0
        return convolution(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        pads = self._reversed_padding_repeated_twice
        self._check(input)
        if self.padding_mode != "zeros":
            input = F.pad(input, pads, mode=self.padding_mode)
            pads = [0] * len(pads)
        front, back = pads[-2::-2], pads[::-2]
        output_size = []
        spans = self._spans()
        for d, size in enumerate(input.shape[-len(spans) :]):
            output_size.append((size + front[d] + back[d] - spans[d]) // self.stride[d] + 1)
        return self._forward(input, self._geometry(front, output_size))

    def _spans(self) -> list[int]:
        """How many inputs in a row the kernel reaches over, along each dimension."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]

    def _geometry(self, padding: Sequence[int], output_size: Sequence[int]) -> Geometry:
        if min(output_size) < 1:
            raise ValueError(
                "expected an input that gives at least one output along each dimension, got "
                f"{list(output_size)} outputs"
            )
        return Geometry(
            self.kernel_size, self.stride, tuple(padding), self.dilation, tuple(output_size),
            self.transposed,
        )  # fmt: skip

    def _check(self, input: Tensor) -> None:
        """Raises ValueError for an input that the convolution cannot take."""
        dims = len(self.kernel_size)
        names = ("L",), ("H", "W"), ("D", "H", "W")
        shape = ", ".join([str(self.in_channels), *names[dims - 1]])
        if input.ndim not in (dims + 1, dims + 2) or input.shape[-dims - 1] != self.in_channels:
            raise ValueError(
                f"expected an input of shape (N, {shape}) or ({shape}), got {tuple(input.shape)}"
            )


class MeanNormalizedTransposed(MeanNormalizedConvolution):
    """MSN for transposed convolutions."""

    casts_weight = True

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        self._check(input)
        padding: Any = self.padding
        dims = len(self.kernel_size)
        extra = self._output_padding(  # type: ignore[attr-defined]
            input, output_size, self.stride, padding, self.kernel_size, dims, self.dilation
        )
        sizes = [
            (size - 1) * self.stride[d] - 2 * padding[d] + span + extra[d]
            for d, (size, span) in enumerate(zip(input.shape[-dims:], self._spans(), strict=True))
        ]
        return self._forward(input, self._geometry(padding, sizes), extra)


_DOC = r"""``nn.{plain}`` with a spectrally normalized weight, minus the mean of its output (MSN).

    .. math::
        y = \gamma \, (f(x, W_{{SN}}) - \mu) + \beta

    with f = ``nn.{plain}`` without a bias. :math:`\mu`, one value per output channel, is the mean
    of f(x) {over}: in training of the batch, in eval mode
    the running mean (0 before any training). It is taken from the input (:mod:`fastsn.means`), so
    that the layer costs little more than the plain one. Gradients flow through :math:`\mu` as well,
    and through sigma.

    Programs that look for batch norms, by type or by name, find one in ``batch_norm``, which is a
    view of the layer's bias, gain and running mean. So ``torch.optim.swa_utils.update_bn`` works
    (within :func:`fastsn.frozen` its means are exactly those of eval mode's weight), and so do
    loops that freeze or initialize batch norms; without ``gain``, a read of its ``weight`` warns.
    Torch's ``convert_sync_batchnorm`` raises: see :func:`fastsn.nn.convert_sync_batchnorm`. The
    layer's own ``weight`` is computed: initialize ``parametrizations.weight.original``.

    Shapes: {shapes}.
    Types: those of ``nn.{plain}``; means, sigma, u and v are computed and kept in fp32 or wider.

    Args:
        *args, **kwargs: those of ``nn.{plain}``. ``bias`` (beta), which starts at 0, is the only
            trainable part besides the weight.
        momentum: of the running mean, ``running += momentum * (mean - running)``; None: the plain
            mean of all batches so far.
        gain: with a trainable ``gain`` (gamma) per output channel, which starts at 1.
        track_running_stats: without, eval mode takes the mean of the batch as well.
        process_group: the group of processes whose batches count as one in training; ``"world"``
            for the default group; None: each process on its own.
        norm, n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Raises:
        ValueError: a momentum outside [0, 1], or a keyword of the spectral norm that is not valid;
            in forward: an input of the wrong shape, or in training one value per channel in all (as
            batch norm).
        RuntimeError: a ``process_group`` where ``torch.distributed`` is not initialized.
        Nothing is changed then. A NaN in the input comes out as NaN; the running mean of a channel
        whose mean is not finite stays as it was.

    Example::

        >>> layer = fastsn.nn.MSN{plain}({example})
        >>> layer({input}).shape
        torch.Size({output})

    Source: Subramanian, Chong, CASE 2019 (arXiv 1907.04003).
    """


def _doc(plain: str) -> str:
    over = "over all dimensions but the last" if plain == "Linear" else "over batch and positions"
    return _DOC.format(plain=plain, over=over, **modules.KINDS[plain])


class MSNLinear(MeanNormalized, nn.Linear):
    __doc__ = _doc("Linear")
    plain = nn.Linear
    casts_weight = True

    def _channels(self) -> int:
        return self.out_features

    def _as_batch(self, input: Tensor) -> Tensor:
        return input.reshape(-1, self.in_features)

    def _run(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        return F.linear(input, weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"expected an input of shape (*, {self.in_features}), got {tuple(input.shape)}"
            )
        return self._forward(input, Geometry())


class MSNConv1d(MeanNormalizedConvolution, nn.Conv1d):
    __doc__ = _doc("Conv1d")
    plain = nn.Conv1d


class MSNConvTranspose1d(MeanNormalizedTransposed, nn.ConvTranspose1d):
    __doc__ = _doc("ConvTranspose1d")
    plain = nn.ConvTranspose1d


class MSNConv2d(MeanNormalizedConvolution, nn.Conv2d):
    __doc__ = _doc("Conv2d")
    plain = nn.Conv2d


class MSNConvTranspose2d(MeanNormalizedTransposed, nn.ConvTranspose2d):
    __doc__ = _doc("ConvTranspose2d")
    plain = nn.ConvTranspose2d


class MSNConv3d(MeanNormalizedConvolution, nn.Conv3d):
    __doc__ = _doc("Conv3d")
    plain = nn.Conv3d


class MSNConvTranspose3d(MeanNormalizedTransposed, nn.ConvTranspose3d):
    __doc__ = _doc("ConvTranspose3d")
    plain = nn.ConvTranspose3d
