"""Activation checkpointing: a forward that is repeated uses what the first one used.

``torch.utils.checkpoint`` runs a part of the forward again in the backward. Normalizing a weight
anew there would move u and v a second time, and give a weight that the first forward never saw. So
a forward within a checkpoint leaves what it used with that checkpoint, and its repetition finds it
there. Checkpoints of other libraries are not known: in those, nothing is found.
"""

from __future__ import annotations

import enum
from typing import Any

import torch

from fastsn.torch_internals import checkpointing, modes

_KEY = "_fastsn_record"


class _Missing(enum.Enum):
    NOT_FOUND = 0


# What `replay` returns if asked to, where None would say that nothing is repeated.
NOT_FOUND = _Missing.NOT_FOUND


class _Record:
    """What each owner used in the forward of one checkpoint, in the order of use."""

    def __init__(self) -> None:
        self.task = checkpointing.graph_task()
        self.values: dict[Any, list[Any]] = {}
        self.positions: dict[tuple[int | None, Any], int] = {}

    def next(self, owner: Any, missing: Any) -> Any:
        """The value of the next use within this backward, or ``missing`` if there is none."""
        place = (checkpointing.graph_task(), owner)
        position = self.positions.get(place, 0)
        self.positions[place] = position + 1
        values = self.values.get(owner, ())
        return values[position] if position < len(values) else missing


def is_repeating() -> bool:
    """Whether a backward is running, so that a forward is one that is done again."""
    if modes.is_read_by_dynamo():
        return False
    task = checkpointing.graph_task()
    return checkpointing.surrounding()[1] is not None if task is None else task != -1


def may_be_repeated() -> bool:
    """Whether this can be the forward of a checkpoint at all; costs next to nothing."""
    # One kind of checkpoint sets hooks for what is saved, the other turns gradients off.
    return checkpointing.has_hooks() or not torch.is_grad_enabled()


def record(owner: Any, value: Any, training: bool) -> None:
    """Leaves ``value`` for :func:`replay`, if this is the forward of a checkpoint.

    ``training``: whether it is one in training mode. Of one in eval mode the reentrant kind of
    checkpoint gets no record: it cannot be told from evaluation without a search.
    """
    if modes.is_read_by_dynamo() or not may_be_repeated():
        return
    if checkpointing.has_hooks() or (training and not torch.is_inference_mode_enabled()):
        _leave(checkpointing.surrounding()[0], owner, value)


def replay(owner: Any, missing: Any = None) -> Any:
    """What ``owner`` used in the forward that is being repeated; None if none is.

    ``missing``: returned if one is being repeated and what it used cannot be found. With
    :data:`NOT_FOUND` that differs from the rest: u and v may have moved on since then.
    """
    if not is_repeating():
        return None
    forward, repeated = checkpointing.surrounding()
    found = getattr(repeated, _KEY, None)
    value = missing if found is None else found.next(owner, missing)
    if value is not missing:
        _leave(forward, owner, value)
    return value


def _leave(holders: list[Any], owner: Any, value: Any) -> None:
    for holder in holders:
        record = getattr(holder, _KEY, None)
        if record is None:
            record = _Record()
            try:
                setattr(holder, _KEY, record)
            except AttributeError:  # then its repetition will miss the value, and say so
                continue
        # A backward within the forward repeats forwards that are no part of this one.
        if record.task == checkpointing.graph_task():
            record.values.setdefault(owner, []).append(value)
