"""Which activation checkpoints of ``torch.utils.checkpoint`` the caller is in.

torch has no function that tells. Its two kinds leave different traces. The one that is not
reentrant sets hooks for the tensors that are saved, which can reach the object that torch repeats
the forward by. The reentrant one sets none, and only the interpreter's stack shows it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils.checkpoint


def _nothing(*args: Any) -> None:
    """Takes the place of functions that torch does not have."""


_autograd = getattr(torch._C, "_autograd", None)
_top = getattr(_autograd, "_top_saved_tensors_default_hooks", _nothing)
_pop = getattr(_autograd, "_pop_saved_tensors_default_hooks", None)
_push = getattr(_autograd, "_push_saved_tensors_default_hooks", None)
_may_push = getattr(_autograd, "_saved_tensors_hooks_is_enabled", _nothing)
_Frame = getattr(torch.utils.checkpoint, "_CheckpointFrame", ())
_Function = getattr(torch.utils.checkpoint, "CheckpointFunction", None)


def _code(function: Any) -> CodeType | None:
    return getattr(function, "__code__", None)


_FORWARD, _BACKWARD = (_code(getattr(_Function, name, None)) for name in ("forward", "backward"))

# The number of the backward that runs in this thread, -1 outside of any, None if torch cannot tell.
graph_task: Callable[[], int | None] = getattr(torch._C, "_current_graph_task_id", _nothing)


def has_hooks() -> bool:
    """Whether there are hooks for saved tensors; they may be those of a checkpoint."""
    return _top(True) is not None


def surrounding() -> tuple[list[Any], Any]:
    """The checkpoints that the caller is in the forward of, and the one that it repeats, or None.

    Each is an object that lives as long as torch may repeat that checkpoint. Those outside of the
    one that is repeated are left out.
    """
    forward, repeated = _among_hooks()
    repetition = _code(getattr(repeated, "recompute_fn", None))
    if repeated is not None and repetition is None:
        return forward, None  # it could be either kind's that is the inner one
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _FORWARD:
            forward.append(_first_argument(frame))
        elif code is _BACKWARD:
            return forward, _first_argument(frame)
        elif code is repetition:
            break
        frame = frame.f_back
    return forward, repeated


def _first_argument(frame: FrameType) -> Any:
    return frame.f_locals[frame.f_code.co_varnames[0]]


def _among_hooks() -> tuple[list[Any], Any]:
    """As :func:`surrounding`, of the kind of checkpoint that is not reentrant."""
    forward = []
    for pack, unpack in _hooks():
        # What a forward saves is unpacked by repeating it; what a repetition saves is just kept.
        if (frame := _frame_in(unpack)) is not None:
            forward.append(frame)
        elif (frame := _frame_in(pack)) is not None:
            return forward, frame
    return forward, None


def _hooks() -> list[tuple[Any, Any]]:
    """All that are set in this thread, innermost first: a user's may lie above a checkpoint's."""
    found: list[tuple[Any, Any]] = []
    if _pop is None or _push is None or not _may_push():
        return found
    try:
        while (top := _top(True)) is not None:
            _pop()
            found.append(top)
    finally:
        for pair in reversed(found):
            _push(*pair)
    return found


def _frame_in(hook: Any) -> Any:
    """The ``_CheckpointFrame`` that a hook has in its closure, or None."""
    hook = getattr(hook, "__wrapped__", hook)  # by which torch keeps its compiler away
    for cell in getattr(hook, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            continue
        if isinstance(value, weakref.ref):
            value = value()
        if isinstance(value, _Frame):
            return value
    return None
