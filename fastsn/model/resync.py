"""u and v that all processes of a group share."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsn.sharded import placements
from fastsn.weights import find

__all__ = ["resync"]


def _vectors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for weight in find.weights(model):
        if weight.is_ours and weight.buffers():
            weight.vectors()  # widens those of a narrow layer, as its first forward does
        found |= {name: placements.plain(vector) for name, vector in weight.buffers().items()}
    return found


def _joined(vectors: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """One flat copy of all vectors of a device and a type, and these vectors."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for vector in vectors:
        kinds.setdefault((vector.device, vector.dtype), []).append(vector)
    for own in kinds.values():
        yield torch.cat([vector.flatten() for vector in own]), own


def _members(group: dist.ProcessGroup | None) -> list[int]:
    """The ranks of a group, of which this process has to be one."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "expected an initialized process group: call torch.distributed.init_process_group "
            "before fastsn.resync"
        )
    if group is None:
        return list(range(dist.get_world_size()))
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be None or a process group that this process is a member of, got {group!r}"
        )
    return dist.get_process_group_ranks(group)


def _check_alike(vectors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Raises in every process of the group unless all have vectors of the same kinds."""
    kinds = [(name, tuple(v.shape), v.dtype, v.device.type) for name, v in vectors.items()]
    code = zlib.crc32(repr(kinds).encode())
    device = next((v.device for v in vectors.values() if not v.is_meta), torch.device("cpu"))
    extremes = torch.tensor([code, -code], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    largest, smallest = extremes.tolist()
    if largest != -smallest:
        raise RuntimeError(
            "expected the same spectrally normalized weights in all processes of the group, with "
            "the same names, shapes, types and kind of device; this process has "
            f"{len(vectors)} vectors of {sum(v.numel() for v in vectors.values())} elements"
        )


@torch.no_grad()
def resync(model: nn.Module, group: dist.ProcessGroup | None = None, src: int = 0) -> None:
    """Gives u and v of every layer, in every process, the values that one process has.

    Replicas that start alike stay alike, bit for bit, without any communication: u and v come from
    the weights alone. Where they have started apart or drifted apart (different seeds, a checkpoint
    read by one process, forwards of one process alone), and nothing like the ``broadcast_buffers``
    of ``DistributedDataParallel`` evens that out, this does. Every process of the group calls it.

    Sent are one small check and one flat buffer for all layers (one per device and type); then u
    and v are written in place. A backward of a forward of before is not disturbed. It serves all
    forms of layers, torch's own too; weights with one dimension have no vectors.

    Args:
        model: the model, or a wrapper of it.
        group: the processes that shall agree; default: all.
        src: the process that has the right values, by its global rank, as in
            ``torch.distributed.broadcast``.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized; or, in all processes, their models
            have different layers.
        ValueError: ``src`` is not in the group, this process is not, or the model has no vectors
            or is on the meta device.
        Nothing is changed then.

    Example::

        >>> discriminator = DistributedDataParallel(discriminator, broadcast_buffers=False)
        >>> fastsn.resync(discriminator)
    """
    members = _members(group)
    if src not in members:
        raise ValueError(f"src must be one of the group's ranks {members}, got {src!r}")
    vectors = _vectors(model)
    _check_alike(vectors, group)
    if not vectors or any(vector.is_meta for vector in vectors.values()):
        where = "on the meta device" if vectors else "without any"
        raise ValueError(f"expected a model with u and v, got {type(model).__name__} {where}")
    received = list(_joined(vectors.values()))
    for joined, _ in received:
        dist.broadcast(joined, src, group)
    for joined, own in received:
        parts = joined.split([vector.numel() for vector in own])
        for vector, part in zip(own, parts, strict=True):
            vector.copy_(part.view(vector.shape))
