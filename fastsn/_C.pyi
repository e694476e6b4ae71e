"""How the extension was built; importing it registers ``torch.ops.fastsn``."""

from collections.abc import Sequence

import torch
from torch import Tensor

torch_version: str
compiler: str
cuda_reason: str
cuda_architectures: str
cuda_ptx: str

def cpu_capability() -> str: ...
def cuda_versions() -> tuple[int, int]:
    """The newest CUDA that the driver knows, 0 without one, and that of the runtime linked in."""

def normalize(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
    n_power_iterations: Sequence[int],
    scales: Sequence[float],
    eps: float,
    v_first: bool,
    bound: bool,
    zero_guard: bool,
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor]:
    """``power_`` (``estimate``, where nothing iterates), then ``scale``: lists are passed once."""

def present(
    weights: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
) -> list[bool]:
    """For every weight whether a call of the operators could serve it, u and v as they are.

    They are plain floating tensors on one device, of shapes that fit, with storages large enough.
    """
