"""Where the parts of a weight are, without importing torch.distributed for those that are whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_distributed(weight: Any) -> bool:
    """Whether the weight is a DTensor, whose parts are on several ranks."""
    if type(weight) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


def ranks_of(weight: Any) -> Any:
    """What the weights of one call share: None where they are whole, else their mesh and the
    dimension of it along which ranks have different parts.
    """
    if not is_distributed(weight):
        return None
    from fastsn.sharded import shares

    return shares.shares_of([weight])[:2]


def of(weight: Any) -> Any:
    """The mesh and the placements of a weight, or None where it is whole."""
    return (weight.device_mesh, weight.placements) if is_distributed(weight) else None


def check(weight: Any, name: str) -> None:
    """Whether a weight lies where it can be normalized.

    Raises:
        ValueError: it is distributed in a way that is not supported; the message has the name.
    """
    if is_distributed(weight):
        from fastsn.sharded import shares

        shares.shares_of([weight], [name])


def is_supported(weight: Any) -> bool:
    """Whether :func:`check` finds nothing."""
    try:
        check(weight, "")
    except ValueError:
        return False
    return True


def plain(tensor: Tensor) -> Tensor:
    """A buffer that is whole on this rank, in its own storage.

    ``distribute_module`` makes replicated DTensors of all buffers.
    """
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def stand_in(weight: Tensor) -> Tensor:
    """A plain tensor of the weight's shape, type and device, to draw vectors like; no numbers."""
    if not is_distributed(weight):
        return weight
    local: Tensor = weight.detach().to_local()  # type: ignore[attr-defined]
    return local.new_empty(()).expand(weight.shape)


@contextmanager
def drawable(module: nn.Module, name: str) -> Iterator[None]:
    """Within the block a parameter that is distributed is a plain one without numbers."""
    weight = module._parameters.get(name)
    if weight is None or not is_distributed(weight):
        yield
        return
    plain_one = module._parameters[name] = nn.Parameter(stand_in(weight), weight.requires_grad)
    try:
        yield
    finally:
        for key, parameter in module._parameters.items():
            if parameter is plain_one:
                module._parameters[key] = weight
        if name in module.__dict__:
            module.__dict__[name] = weight.data


@torch.no_grad()
def agree(weight: Tensor, vectors: list[Tensor]) -> None:
    """Makes plain vectors, drawn by every rank for itself, those of the mesh's first rank."""
    if not is_distributed(weight):
        return
    import torch.distributed as dist

    mesh = weight.device_mesh  # type: ignore[attr-defined]
    joined = torch.cat(vectors)
    for group in mesh.get_all_groups():
        dist.broadcast(joined, dist.get_global_rank(group, 0), group)
    for vector, part in zip(vectors, joined.split([len(v) for v in vectors]), strict=True):
        vector.copy_(part)
