"""Many small tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_copy = getattr(torch, "_foreach_copy_", None)


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target."""
    if _copy is not None:
        _copy(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
