"""What need not be computed again while u, v and the weights stay.

:class:`Memory` is the one way by which layers and groups of layers normalize their weights. It
keeps the last result for as long as nothing that it was made of has changed: evaluation normalizes
each weight once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fastsn import functional, ops, placements, recompute
from fastsn.functional import Call

# Every result is of one era. Code that averages or loads weights often writes to `weight.data`,
# which no version counter tells, but it hardly does so between two evaluations without a step of an
# optimizer or a call of train() or eval().
_era = object()


# Weights whose changes somebody waits for, by their identity.
_watched: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def begin_era() -> None:
    """Lets no result of before be used again."""
    global _era
    _era = object()


def watch(weight: Tensor) -> None:
    """Makes :func:`version_of` tell the steps of every optimizer."""
    for source in placements.sources_of([weight]) or ():
        _watched[id(source)] = source


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    begin_era()
    if not _watched:
        return
    for group in optimizer.param_groups:
        if group.get("fused"):  # these kernels write to weights and leave their versions
            for weight in group["params"]:
                watched = _watched.get(id(weight))
                if watched is not None and watched is weight and watched.grad is not None:
                    increment_version(watched)


register_optimizer_step_post_hook(_after_step)


def version_of(weight: Tensor) -> bytes | None:
    """Changes when the weight does, as far as torch can tell; None where it cannot."""
    return _versions([weight])


def _versions(tensors: Sequence[Tensor]) -> bytes | None:
    sources = placements.sources_of(tensors)
    if sources is None:
        return None
    versions = ops.versions(sources)
    if versions is None and any(map(placements.is_distributed, sources)):
        # What a DTensor counts, and where its part is.
        counts = [tensor._version for tensor in sources]
        parts = ops.versions([getattr(tensor, "_local_tensor", tensor) for tensor in sources])
        return None if parts is None else parts + repr(counts).encode()
    return versions


def is_eager() -> bool:
    """Whether tensors are what they seem: nothing is traced, transformed or compiled here."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
    )


Stamp = tuple[object, bytes]


def _stamp(weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor]) -> Stamp | None:
    versions = _versions([*weights, *u, *v])
    return None if versions is None else (_era, versions)


class _Result(NamedTuple):
    """What a call gave, and what it was made of."""

    stamp: Stamp | None
    sources: list[Tensor]  # keep their memory from being used for other weights
    snapshot: Tensor
    normalized: list[Tensor]
    context: tuple[Any, ...]


class Memory:
    """What one layer, or one group of layers, remembers. A copy of it remembers nothing.

    Replicas of ``DataParallel`` share it: every result is read and written as one object, so that
    threads may take each other's place but never mix.
    """

    def __init__(self) -> None:
        self.frozen = 0  # the number of `fastsn.frozen` that are open
        self.seen: bytes | None = None  # the weight that u and v have last moved for
        self._looked: tuple[bytes | None, str] = (None, "")  # at u and v, and what was seen
        self._last: _Result | None = None

    def forget(self) -> None:
        """Lets go of the last result."""
        self._last = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()

    def normalize(
        self,
        call: Call,
        weights: Sequence[Tensor],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        n_power_iterations: Sequence[int],
        dtype: torch.dtype | None = None,
        keep: bool = False,
    ) -> tuple[list[Tensor], Tensor]:
        """:func:`fastsn.functional.normalize`, or what it gave before, which is the same.

        ``keep``: calls without iterations will follow, whose gradients may use this snapshot.
        """
        if not is_eager():
            return functional.normalize(call, weights, u, v, n_power_iterations, dtype)
        snapshot = recompute.replay(self)
        if snapshot is not None:
            return functional.scale(call, weights, snapshot, dtype), snapshot
        moves = any(n_power_iterations)
        if moves:
            self.forget()
            normalized, snapshot = functional.normalize(
                call, weights, u, v, n_power_iterations, dtype
            )
            if keep:
                self._keep(weights, _stamp(weights, u, v), snapshot)
        else:
            normalized, snapshot = self._at_rest(call, weights, u, v, dtype, keep)
        recompute.record(self, snapshot, moves)
        return normalized, snapshot

    def snapshot(
        self,
        call: Call,
        weights: Sequence[Tensor],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        n_power_iterations: Sequence[int],
    ) -> Tensor:
        """That of :meth:`normalize` alone, for weights that their layers scale later."""
        snapshot = recompute.replay(self) if is_eager() else None
        if snapshot is not None:
            return snapshot
        moves = any(n_power_iterations)
        stamp = None if moves or not is_eager() else _stamp(weights, u, v)
        last = self._last
        if last is not None and stamp is not None and stamp == last.stamp:
            snapshot = last.snapshot
        if snapshot is None:
            self.forget()
            at_rest = "units" if moves else self._look_at(call, u, v)
            snapshot = functional.iterate(call, weights, u, v, n_power_iterations, at_rest)
            if stamp is not None and not snapshot.is_inference():
                self._keep(weights, stamp, snapshot)
        recompute.record(self, snapshot, moves)
        return snapshot

    def estimate(
        self, call: Call, weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor]
    ) -> Tensor:
        """The snapshot of a forward at rest; waits for no device, and keeps nothing."""
        last = self._last
        if last is not None and last.stamp == _stamp(weights, u, v):
            return last.snapshot
        return functional.iterate(call, weights, u, v, [0] * len(weights))

    def _keep(
        self,
        weights: Sequence[Tensor],
        stamp: Stamp | None,
        snapshot: Tensor,
        normalized: list[Tensor] | None = None,
        context: tuple[Any, ...] = (),
    ) -> None:
        sources = [weight.detach() for weight in weights]
        self._last = _Result(stamp, sources, snapshot, normalized or [], context)

    def _look_at(self, call: Call, u: Sequence[Tensor], v: Sequence[Tensor]) -> str:
        """Looks, which waits for the device, once for each u and v."""
        versions = _versions([*u, *v])
        seen, looks = self._looked
        if versions is None or versions != seen:
            looks = functional.look_at(call, u, v)
            self._looked = versions, looks
        return looks

    def _at_rest(
        self,
        call: Call,
        weights: Sequence[Tensor],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        dtype: torch.dtype | None,
        keep: bool,
    ) -> tuple[list[Tensor], Tensor]:
        needs_graph = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if needs_graph and not keep:
            return self._compute(call, weights, u, v, dtype)
        stamp, last = _stamp(weights, u, v), self._last
        if last is not None and (stamp is None or stamp != last.stamp):
            last = self._last = None
        # What inference mode has made may not be used outside of it.
        is_inference = torch.is_inference_mode_enabled()
        if last is not None and last.normalized and not needs_graph:
            if last.context == (is_inference, *_counts(last.normalized)):
                return last.normalized, last.snapshot
        if keep and last is not None and is_inference >= last.snapshot.is_inference():
            snapshot = last.snapshot
            normalized = functional.scale(call, weights, snapshot, dtype)
        else:
            normalized, snapshot = self._compute(call, weights, u, v, dtype)
        if stamp is not None and needs_graph:
            self._keep(weights, stamp, snapshot)
        elif stamp is not None:
            context = (is_inference, *_counts(normalized))
            self._keep(weights, stamp, snapshot, normalized, context)
        return normalized, snapshot

    def _compute(
        self,
        call: Call,
        weights: Sequence[Tensor],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        dtype: torch.dtype | None,
    ) -> tuple[list[Tensor], Tensor]:
        iterations = [0] * len(weights)
        at_rest = self._look_at(call, u, v)
        return functional.normalize(call, weights, u, v, iterations, dtype, at_rest)


def _counts(tensors: Sequence[Tensor]) -> list[int]:
    """Those of results that users hold, and might write to."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
