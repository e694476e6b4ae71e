"""Which part of a weight each rank has, and the sum of what the ranks have found with theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

_SUPPORTED = (
    "supported are Replicate() on all mesh dimensions, or Shard(dim) on one of them and "
    "Replicate() on the others"
)


class Cut(NamedTuple):
    """A part of a vector: ``vector.view(shape)[:, start : start + length]``."""

    shape: tuple[int, int, int]
    start: int
    length: int

    def of(self, vector: Tensor) -> Tensor:
        """The part, a view of three dimensions."""
        return vector.view(self.shape).narrow(1, self.start, self.length)

    def whole(self) -> int:
        """The length of the vector."""
        return math.prod(self.shape)

    def sizes(self) -> tuple[int, int, int]:
        """The shape of the part."""
        return self.shape[0], self.length, self.shape[2]


class Shares(NamedTuple):
    """How the weights of a call are spread over the ranks of one mesh."""

    mesh: DeviceMesh
    mesh_dim: int | None  # along which ranks have different parts; None: all weights are whole
    dims: list[int | None]  # of every weight: the one that is split, or None

    def rank(self) -> int:
        """The position of this process among those that have different parts."""
        coordinate = self.mesh.get_coordinate()
        return 0 if self.mesh_dim is None else coordinate[self.mesh_dim]  # type: ignore[index]

    def ranks(self) -> int:
        """How many ranks have different parts."""
        return 1 if self.mesh_dim is None else self.mesh.size(self.mesh_dim)

    def all_reduce(self, x: Tensor, what: str) -> None:
        """Replaces ``x`` on every rank by its sum over those that have different parts.

        Raises:
            RuntimeError: torch.distributed could not; it says what was to be summed.
        """
        try:
            dist.all_reduce(x, group=self.mesh.get_group(self.mesh_dim))
        except Exception as error:
            raise RuntimeError(
                f"could not sum {what} of sharded weights over the {self.ranks()} ranks of "
                f"dimension {self.mesh_dim} of {self.mesh}: {error}"
            ) from error


def shares_of(weights: Sequence[Tensor], names: Sequence[str] | None = None) -> Shares:
    """How the weights of one call are spread.

    ``names`` are those of the layers, for errors.

    Raises:
        TypeError: a weight is not a DTensor, or complex.
        ValueError: weights on different meshes or split along different dimensions of one, or
            placed in a way that is not supported; this rank is not in the mesh.
    """
    mesh: DeviceMesh | None = None
    mesh_dim: int | None = None
    dims: list[int | None] = []
    for i, weight in enumerate(weights):
        name = names[i] if names else f"weights[{i}]"
        if not isinstance(weight, DTensor) or weight.is_complex():
            raise TypeError(
                f"{name} must be a real DTensor, as the first weight of the call is a DTensor, got "
                f"{type(weight).__name__} of {weight.dtype}"
            )
        if mesh is None:
            mesh = weight.device_mesh
            if mesh.get_coordinate() is None:
                raise ValueError(f"this rank has no part of {name}: it is not in {mesh}")
        elif weight.device_mesh != mesh:
            raise ValueError(
                f"weights of one call must share their mesh, got {mesh} and {weight.device_mesh} "
                f"of {name}"
            )
        own, dim = _split(weight, name)
        if own is not None:
            if mesh_dim not in (None, own):
                raise ValueError(
                    "weights of one call must be split along the same mesh dimension, got "
                    f"{mesh_dim} and {own} of {name}, which is placed {weight.placements} on {mesh}"
                )
            mesh_dim = own
        dims.append(dim)
    assert mesh is not None, "a call has at least one weight"
    return Shares(mesh, mesh_dim, dims)


def _split(weight: DTensor, name: str) -> tuple[int | None, int | None]:
    """(mesh dimension, tensor dimension) of the one split of a weight, or (None, None)."""
    mesh, found = weight.device_mesh, (None, None)
    for mesh_dim, placement in enumerate(weight.placements):
        # Subclasses of these two place differently.
        if type(placement) is Replicate or type(placement) is Shard and mesh.size(mesh_dim) == 1:
            continue
        if type(placement) is not Shard or found != (None, None):
            raise ValueError(
                f"{name} is placed {weight.placements} on a mesh of shape {tuple(mesh.shape)}: "
                f"spectral norm cannot work with that; {_SUPPORTED}"
            )
        found = mesh_dim, placement.dim % weight.ndim  # type: ignore[assignment]
    return found


def share(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """(start, length) of the part of a dimension that a rank has, as ``torch.chunk`` cuts it."""
    most = -(-size // ranks)
    start = min(rank * most, size)
    return start, min(most, size - start)


@lru_cache(maxsize=4096)
def cuts(shape: torch.Size, dim: int, split: int | None, rank: int, ranks: int) -> tuple[Cut, Cut]:
    """The parts of u and v that a rank's part of the matrix along ``dim`` meets.

    Split along ``dim``, a weight is a matrix split into rows; along another one, into columns,
    which may lie apart in v.
    """
    others = [*shape[:dim], *shape[dim + 1 :]]
    if split is None:
        return _all_of(shape[dim]), _all_of(math.prod(others))
    if split == dim:
        rows = Cut((1, shape[dim], 1), *share(shape[dim], rank, ranks))
        return rows, _all_of(math.prod(others))
    at = split - (split > dim)
    before, size, after = math.prod(others[:at]), others[at], math.prod(others[at + 1 :])
    return _all_of(shape[dim]), Cut((before, size, after), *share(size, rank, ranks))


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These values in a tensor, which is copied to the device once for all calls."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _all_of(length: int) -> Cut:
    return Cut((1, length, 1), 0, length)
