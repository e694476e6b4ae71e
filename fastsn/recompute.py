"""Activation checkpointing: a forward that is repeated uses what the first one used.

``torch.utils.checkpoint`` runs a part of the forward again in the backward. Normalizing a weight
anew there would move u and v a second time, and give a weight that the first forward never saw. So
a forward within a checkpoint leaves what it used with that checkpoint, and its repetition finds it
there. Checkpoints of other libraries are not known: in those, u and v stay and the present ones are
used.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

_FILE = CheckpointFunction.forward.__code__.co_filename
_KEY = "_fastsn_record"


class _Record:
    """What each owner used in the forward of one checkpoint, in the order of use."""

    def __init__(self) -> None:
        self.values: dict[Any, list[Any]] = {}
        self.positions: dict[tuple[int, Any], int] = {}

    def next(self, owner: Any) -> Any:
        """The value of the next use within this backward, or None if there is none."""
        place = (torch._C._current_graph_task_id(), owner)
        position = self.positions.get(place, 0)
        self.positions[place] = position + 1
        values = self.values.get(owner, ())
        return values[position] if position < len(values) else None


def is_repeating() -> bool:
    """Whether a backward is running, so that a forward is one that is done again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _holders() -> tuple[list[Any], Any]:
    """The checkpoints that the caller is in the forward of, and the one that it repeats, or None.

    Each is the object that lives as long as torch may repeat that checkpoint. torch has no function
    that tells, but they are local variables of the functions of torch that are being run.
    """
    forward: list[Any] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _FILE:
            if code.co_name == "forward" and "ctx" in frame.f_locals:
                forward.append(frame.f_locals["ctx"])
            elif code.co_name == "checkpoint" and frame.f_locals.get("gen") is not None:
                generator = frame.f_locals["gen"].gi_frame
                forward += [generator.f_locals["new_frame"]] if generator is not None else []
            elif code.co_name == "backward" and "ctx" in frame.f_locals:
                return forward, frame.f_locals["ctx"]
            elif code.co_name == "unpack_hook" and "frame" in frame.f_locals:
                return forward, frame.f_locals["frame"]
        frame = frame.f_back
    return forward, None


def _leave(holders: list[Any], owner: Any, value: Any) -> None:
    for holder in holders:
        record = holder.__dict__.setdefault(_KEY, _Record())
        record.values.setdefault(owner, []).append(value)


def may_be_repeated() -> bool:
    """Whether this can be the forward of a checkpoint at all; costs next to nothing."""
    # One kind of checkpoint sets hooks for what is saved, the other turns gradients off.
    return not torch.compiler.is_compiling() and (
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or not torch.is_grad_enabled()
    )


def record(owner: Any, value: Any, moved: bool) -> None:
    """Leaves ``value`` for :func:`replay`, if this is the forward of a checkpoint.

    ``moved``: whether u and v may have moved for it. Of a forward that moved nothing the reentrant
    kind of checkpoint gets no record: it cannot be told from evaluation without a search.
    """
    if not may_be_repeated():
        return
    has_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if has_hooks or (moved and not torch.is_inference_mode_enabled()):
        _leave(_holders()[0], owner, value)


def replay(owner: Any) -> Any:
    """What ``owner`` used in the forward that is being repeated, or None."""
    if not is_repeating():
        return None
    forward, repeated = _holders()
    found = None if repeated is None else repeated.__dict__.get(_KEY)
    value = None if found is None else found.next(owner)
    if value is not None:
        _leave(forward, owner, value)
    return value


def take(value: Any, owner: Any, moved: bool) -> Any:
    """What a grouped call has left for ``owner``, now or in the forward that is repeated."""
    if value is None:
        return replay(owner)
    record(owner, value, moved)
    return value
