"""Weights that are sharded when a grouped call is made, and perhaps whole when they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsn import engine
from fastsn.engine import Call
from fastsn.weights import autocast


class Gathering:
    """The snapshot of a grouped call for weights that were sharded when it was made.

    FSDP2 gathers a weight just before its layer's forward: then it is scaled as a whole, which
    needs no communication in the backward. Those that remain sharded, as in tensor parallel, are
    scaled together, so that their backward communicates once.
    """

    def __init__(
        self, call: Call, weights: Sequence[Tensor], snapshot: Tensor, dtype: torch.dtype | None
    ) -> None:
        self.call, self.weights, self.snapshot, self.dtype = call, weights, snapshot, dtype
        self._needs_graph = torch.is_grad_enabled()
        self._scaled: list[Tensor] | None = None
        self._estimates: list[list[int]] = [[] for _ in weights]  # of every layer
        self._starts = [0]  # of u and v of every estimate, and their end
        for e, (layer, dim) in enumerate(zip(call.layers, call.dims, strict=True)):
            self._estimates[layer].append(e)
            rows = weights[layer].shape[dim]
            columns = math.prod(weights[layer].shape[:dim] + weights[layer].shape[dim + 1 :])
            self._starts.append(self._starts[-1] + rows + columns)

    def parts(self) -> list[Unscaled]:
        """What each layer gets."""
        return [Unscaled(self, layer) for layer in range(len(self.weights))]

    def sharded(self, layer: int) -> Tensor:
        """The normalized weight of a layer that is still sharded."""
        if self._scaled is None:
            with torch.set_grad_enabled(self._needs_graph):
                self._scaled = engine.scale(self.call, self.weights, self.snapshot, self.dtype)
        return self._scaled[layer]

    def whole(self, layer: int, weight: Tensor) -> Tensor:
        """The normalized weight of a layer that has been gathered since."""
        own, sigmas = self._estimates[layer], self._starts[-1]
        call = self.call._replace(
            layers=[0] * len(own),
            dims=[self.call.dims[e] for e in own],
            scales=[self.call.scales[layer]],
        )
        first, end = own[0], own[-1] + 1
        snapshot = torch.cat(
            [
                self.snapshot[self._starts[first] : self._starts[end]],
                self.snapshot[sigmas + first : sigmas + end],
            ]
        )
        dtype = self.dtype if self.dtype == autocast.current(weight.device) else None
        return engine.scale(call, [weight], snapshot, dtype)[0]


class Unscaled:
    """Stands for the normalized weight of one layer of a :class:`Gathering`."""

    dtype = None  # that of a weight which is not there yet

    def __init__(self, gathering: Gathering, layer: int) -> None:
        self._gathering, self._layer = gathering, layer

    def normalized(self, weight: Tensor) -> Tensor:
        """Made from the weight as the layer has it now."""
        if weight is self._gathering.weights[self._layer]:
            return self._gathering.sharded(self._layer)
        return self._gathering.whole(self._layer, weight)
