"""The sigmas of a model in a log, without waiting for the device that computes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsn.grouping import sigmas

__all__ = ["SigmaLogger"]


class _Arrival:
    """Values on their way to the host."""

    def __init__(self, values: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            # Only into pinned memory does a copy go on by itself.
            self.values = torch.empty_like(values, device="cpu", pin_memory=True)
            with torch.cuda.device(values.device):
                self.values.copy_(values, non_blocking=True)
                self.event = torch.cuda.Event()
                self.event.record()
        else:
            self.values = values.cpu()

    def is_here(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


def _arrivals(found: dict[str, Tensor]) -> list[tuple[list[str], _Arrival]]:
    """One transfer per device, whatever the number of layers."""
    devices: dict[torch.device, dict[str, Tensor]] = {}
    for name, sigma in found.items():
        devices.setdefault(sigma.device, {})[name] = sigma
    return [(list(own), _Arrival(torch.stack([*own.values()]))) for own in devices.values()]


class SigmaLogger:
    """Writes :func:`fastsn.sigmas` of a model to TensorBoard, or elsewhere, by one call per step.

    The call waits for nothing: on a GPU the values of all layers travel in one copy while the
    training goes on, and a later call writes those that have arrived, under the step that they
    belong to. What has not arrived is written by :meth:`flush` or at the end of a ``with`` block.

    Args:
        write: a ``SummaryWriter``, for which each layer is a scalar ``sigma/<weight>``; or a
            function of a dictionary ``{"sigma/<weight>": float}`` and the step, such as W&B's
            ``lambda values, step: run.log(values, step=step)``.
        tag: what stands before the names.

    Raises:
        TypeError: ``write`` is neither.

    Example::

        >>> with fastsn.SigmaLogger(SummaryWriter()) as log:
        ...     for step, batch in enumerate(loader):
        ...         train(model, batch)
        ...         log(model, step)
    """

    def __init__(self, write: Any, tag: str = "sigma") -> None:
        add = getattr(write, "add_scalar", None)
        if add is None and not callable(write):
            raise TypeError(
                "write must be a SummaryWriter or a function of a dictionary and a step, got "
                f"{write!r}"
            )
        self.tag = tag
        self._write: Callable[[dict[str, float], int], object] = write
        if add is not None:
            self._write = lambda values, step: [add(name, values[name], step) for name in values]
        self._waiting: deque[tuple[int, list[tuple[list[str], _Arrival]]]] = deque()

    def __call__(self, model: nn.Module, step: int) -> None:
        """Takes note of the present sigmas, and writes those that have arrived."""
        self._waiting.append((step, _arrivals(sigmas(model))))
        while self._waiting and all(arrival.is_here() for _, arrival in self._waiting[0][1]):
            self._write_first()

    def flush(self) -> None:
        """Waits for what is still on its way, and writes it."""
        while self._waiting:
            self._write_first()

    def _write_first(self) -> None:
        step, arrivals = self._waiting.popleft()
        values: dict[str, float] = {}
        for names, arrival in arrivals:
            named = zip(names, arrival.wait(), strict=True)
            values.update((f"{self.tag}/{name}", value) for name, value in named)
        self._write(values, step)

    def __enter__(self) -> SigmaLogger:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.flush()
