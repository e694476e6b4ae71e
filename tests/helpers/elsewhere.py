"""A stand-in for a weight on a device which need not be there."""

from __future__ import annotations

import torch


class Elsewhere:
    """What the choice asks of a weight that lives on a device which need not be there."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype
        kind = self.device.type
        self.is_cuda, self.is_cpu, self.is_meta = (kind == x for x in ("cuda", "cpu", "meta"))

    def is_complex(self) -> bool:
        return self.dtype.is_complex
