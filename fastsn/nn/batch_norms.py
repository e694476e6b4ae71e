"""What programs that look for batch norms find in layers with a running mean.

They look by type (``_BatchNorm``) or by name, and reset statistics, set momenta, freeze, initialize
or convert them: ``torch.optim.swa_utils.update_bn``, ``convert_sync_batchnorm``, "freeze BN" loops.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_STATE = ("bias", "gain", "running_mean", "num_batches_tracked")


class WithoutVariance(_BatchNorm):
    """A batch norm to other programs, but for the variance.

    ``weight`` is the gain. Where there is none, and for ``running_var``, they get ones, which
    nobody reads. There is no ``eps``, which is what those read that are about to compute with a
    variance: to make a SyncBatchNorm, or to fuse.
    """

    bias: Any
    gain: Any
    # What is there even if the layer has none: its name here, and the value that has no effect.
    _always = {"weight": ("gain", 1.0)}

    # Not by properties: torch.jit reads all that dir() tells.
    def __getattr__(self, name: str) -> Any:
        if name in self._always:
            own, neutral = self._always[name]
            value = self._state(own)
            if value is None:
                warnings.warn(
                    f"{type(self).__name__} has no {own}, and what is done with its {name} has no "
                    f"effect: make the layer with {own}=True for a trainable one",
                    stacklevel=2,
                )
                value = self._constant(neutral)
            return value
        if name in _STATE:
            for table in self._tables():
                if name in table:
                    return table[name]
        if name == "running_var":
            return None if self.running_mean is None else self._constant(1.0)
        if name == "affine":
            return self._state("bias") is not None or self._state("gain") is not None
        if name == "eps":
            raise AttributeError(
                f"expected a batch norm with a variance, got {type(self).__name__}, which has none "
                "and no eps: it can neither be fused nor become a SyncBatchNorm; to synchronize "
                "all norms of a model call fastsn.nn.convert_sync_batchnorm"
            )
        return super().__getattr__(name)

    def _tables(self) -> Sequence[dict[str, Any]]:
        """Where parameters and buffers are."""
        return self._parameters, self._buffers

    def _state(self, name: str) -> Any:
        return next((table[name] for table in self._tables() if name in table), None)

    def _constant(self, value: float) -> Tensor:
        found = (self._state(name) for name in ("bias", "gain", "running_mean"))
        like = next((tensor for tensor in found if tensor is not None), torch.empty(0))
        return like.new_full((self.num_features,), value)

    def reset_parameters(self) -> None:
        """Sets bias and running mean to 0, and the gain to 1."""
        bias, gain = self._state("bias"), self._state("gain")
        if bias is not None:
            nn.init.zeros_(bias)
        if gain is not None:
            nn.init.ones_(gain)
        self.reset_running_stats()

    def extra_repr(self) -> str:
        return ""


class MSNBatchNorm(WithoutVariance):
    """The batch norm within an MSN layer: bias, gain and running mean of the layer, no own tensors.

    It has the momentum, and a mode of its own: in eval mode the layer takes the running mean and
    leaves it as it is, also while the rest trains.
    """

    momentum: float | None
    _always = {**WithoutVariance._always, "bias": ("bias", 0.0)}

    def __init__(self, layer: nn.Module, num_features: int) -> None:
        nn.Module.__init__(self)
        self.num_features = num_features
        # Not the layer: who walks through attributes would go in circles.
        self._layer_tables = layer._parameters, layer._buffers

    def _tables(self) -> Sequence[dict[str, Any]]:
        return self._layer_tables

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("running_mean", "num_batches_tracked"):
            self._layer_tables[1][name] = value
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # that of batch norms adds a count
