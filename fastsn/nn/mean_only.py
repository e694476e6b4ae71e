"""The mean part of MSN: what layers with a running mean share, and that as layers of their own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsn import layout, means, recompute
from fastsn.means import Group
from fastsn.nn import checkpoints
from fastsn.nn.batch_norms import WithoutVariance


def check_momentum(momentum: float | None) -> None:
    """Raises ValueError unless the momentum of a running mean is None or in [0, 1]."""
    if momentum is None:
        return
    if not (isinstance(momentum, int | float) and 0 <= momentum <= 1):
        raise ValueError(f"momentum must be None or in [0, 1], got {momentum!r}")


class MeanOnly:
    """What layers with a running mean share; a mixin before a class of ``torch.nn``.

    Parameters: ``bias`` and, if asked for, ``gain``. Buffers: ``running_mean``, in fp32 or wider
    whatever the layer is converted to, and ``num_batches_tracked``.
    """

    bias: Any
    gain: Tensor | None
    running_mean: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool

    def start(
        self,
        channels: int,
        momentum: float | None,
        gain: bool,
        track_running_stats: bool,
        process_group: Group,
        like: Tensor,
    ) -> None:
        """Adds gain and buffers; ``like`` has their device and the gain's type."""
        module: Any = self
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.process_group = process_group
        ones = torch.ones(channels, device=like.device, dtype=like.dtype)
        module.register_parameter("gain", nn.Parameter(ones) if gain else None)
        mean = count = None
        if track_running_stats:
            mean = ones.new_zeros(channels, dtype=layout.accumulate_type(like))
            count = ones.new_zeros((), dtype=torch.long)
        module.register_buffer("running_mean", mean)
        module.register_buffer("num_batches_tracked", count)

    def reset_running_stats(self) -> None:
        """Sets the running mean and the number of batches to 0."""
        if self.running_mean is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.num_batches_tracked.zero_()

    def uses_batch(self) -> bool:
        """Whether the mean is that of the batch, and not the running one."""
        return self.trains() or self.running_mean is None

    def trains(self) -> bool:
        """Whether the running mean moves."""
        return self.training

    def group(self, input: Tensor, count: int) -> Any:
        """The process group to synchronize with, after a check that there is a mean to take."""
        group = means.resolve(self.process_group) if self.trains() else None
        if self.trains() and group is None and count < 2:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{input.size()}"
            )
        return group

    def track(self, mean: Tensor) -> None:
        """Moves the running mean; where the mean of a batch is not finite, it stays."""
        if not self.trains() or self.running_mean is None or self.num_batches_tracked is None:
            return
        if recompute.is_repeating():
            return  # it moved in the forward that is repeated now
        running = self.running_mean
        self.num_batches_tracked.add_(1)
        step: Any = self.momentum
        if step is None:
            step = self.num_batches_tracked.to(running.dtype).reciprocal()
        mean = mean.to(running.dtype)
        is_finite = mean - mean == 0  # two kernels for the four of isfinite
        running.lerp_(torch.where(is_finite, mean, running), step)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy belongs to the same processes; groups cannot be copied.
        memo[id(self.process_group)] = self.process_group
        copier = getattr(super(), "__deepcopy__", None)
        if copier is not None:
            return copier(memo)
        module: Any = self
        new = memo[id(self)] = module.__class__.__new__(module.__class__)
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.running_mean
        super()._apply(fn, recurse)  # type: ignore[misc]
        after = self.running_mean
        if before is not None and after is not None:
            wide = layout.accumulate_type(after)
            if after.dtype != wide:  # half() and its like round weights, but not statistics
                self.running_mean = before.to(after.device, wide)
        return self

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"momentum": self.momentum}
        if self.gain is not None:
            shown["gain"] = True
        if not self.track_running_stats:
            shown["track_running_stats"] = False
        if self.process_group is not None:
            shown["process_group"] = self.process_group
        own = super().extra_repr()  # type: ignore[misc]
        return ", ".join([*filter(None, [own]), *(f"{k}={v!r}" for k, v in shown.items())])


_DOC = r"""Batch normalization that takes the mean away and leaves the variance as it is.

    .. math::
        y = \gamma \, (x - \mu) + \beta

    :math:`\mu` is the mean per channel over batch and positions: in training of the batch, in eval
    mode the running mean (0 before any training). After a spectrally normalized layer this is MSN
    in two steps; ``fastsn.nn.MSN...`` layers do the same at less cost.

    It is a batch norm (``_BatchNorm``) to programs that look for one, by type or by name: so
    ``torch.optim.swa_utils.update_bn`` works, and loops that freeze or initialize batch norms do,
    where ``weight`` is the gain; without one, ``weight`` is ones that nobody reads, and a read of
    it warns. There is no ``eps``, and what is about to use a variance raises: fusion, and torch's
    ``convert_sync_batchnorm``, for which see :func:`fastsn.nn.convert_sync_batchnorm`.

    Shapes: {shape}, and the same back. Types: floating-point, the output's is
    that of the input; means are computed and kept in fp32 or wider.

    Args:
        num_features: C.
        momentum: of the running mean, ``running += momentum * (mean - running)``; None: the plain
            mean of all batches so far.
        affine: with a trainable ``bias`` (beta), which starts at 0.
        track_running_stats: without, eval mode takes the mean of the batch as well.
        gain: with a trainable ``gain`` (gamma), which starts at 1, if ``affine``.
        process_group: the group of processes whose batches count as one in training; ``"world"``
            for the default group; None: each process on its own.

    Raises:
        ValueError: a momentum outside [0, 1]; in forward: an input of the wrong shape, or in
            training one value per channel in all (as batch norm).
        RuntimeError: a ``process_group`` where ``torch.distributed`` is not initialized.
        Nothing is changed then. A NaN in the input comes out as NaN; the running mean of a channel
        whose mean is not finite stays as it was.

    Example::

        >>> norm = fastsn.nn.MeanOnlyBatchNorm{dims}d(64)
        >>> norm({input}).shape
        torch.Size({output})

    Source: Subramanian, Chong, CASE 2019 (arXiv 1907.04003).
    """


def _doc(dims: int, shape: str) -> str:
    size = f"2, 64{', 4' * dims}"
    return _DOC.format(dims=dims, shape=shape, input=f"torch.randn({size})", output=f"[{size}]")


class _MeanOnlyBatchNorm(MeanOnly, WithoutVariance):
    _dims: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        gain: bool = False,
        process_group: Group = None,
    ) -> None:
        check_momentum(momentum)
        nn.Module.__init__(self)
        self.num_features = num_features
        zeros = torch.zeros(num_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(zeros) if affine else None)
        self.start(
            num_features, momentum, gain and affine, track_running_stats, process_group, zeros
        )

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim not in self._dims:
            expected = " or ".join(f"{d}D" for d in self._dims)
            raise ValueError(f"expected {expected} input (got {input.ndim}D input)")
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"expected an input with {self.num_features} channels, got {input.shape[1]} of them"
            )
        group = self.group(input, input.shape[0] * math.prod(input.shape[2:]))
        mean = None if self.uses_batch() else self.running_mean
        output, mean = means.center(input, self.gain, self.bias, mean, group)
        self.track(mean)
        return output

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        checkpoints.load_batch_norm(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        affine = "" if self.bias is not None else ", affine=False"
        return f"{self.num_features}{affine}, {super().extra_repr()}"


class MeanOnlyBatchNorm1d(_MeanOnlyBatchNorm):
    __doc__ = _doc(1, "(N, C) or (N, C, L)")
    _dims = (2, 3)


class MeanOnlyBatchNorm2d(_MeanOnlyBatchNorm):
    __doc__ = _doc(2, "(N, C, H, W)")
    _dims = (4,)


class MeanOnlyBatchNorm3d(_MeanOnlyBatchNorm):
    __doc__ = _doc(3, "(N, C, D, H, W)")
    _dims = (5,)
