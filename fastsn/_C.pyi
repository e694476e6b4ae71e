"""How the extension was built; importing it registers ``torch.ops.fastsn``."""

from collections.abc import Sequence
from typing import Any

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

def states_of(weights: list[Tensor]) -> list[tuple[int | None, int]]:
    """What tells most changes of weights.

    Of each its version (None if it was made in inference mode), and where it lies (0 if it has no
    memory of its own).
    """

def take(pending: dict[int, Any], weight: Tensor, training: bool) -> Tensor | None:
    """What a grouped call has left for this thread's read of a weight, which is no more left then.

    None where nothing is, or where it takes a longer look: the weight is not the one that it was
    made of, or is in another state (``states_of``), the normalized weight is of another type or
    not of the present modes, or this may be the forward of a checkpoint.
    ``pending`` holds a ``fastsn.weights.normalizer.Left`` per thread.
    """
