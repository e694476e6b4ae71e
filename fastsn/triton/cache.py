"""What calls leave on a device for those that follow: plans, and tables of addresses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def apart(device: torch.device, make: Callable[[], T]) -> T:
    """What ``make`` allocates on the current stream, for those who keep it.

    A thread of its own makes it: this one may just be allocating into the pool of CUDA graphs of
    somebody else (``torch.compile`` does, before it captures one), who takes what is kept there for
    free.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)

    def run() -> T:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


@dataclass
class Entry(Generic[T]):
    value: T
    tensors: Sequence[Tensor]
    stream: torch.cuda.Stream | None  # on which they were allocated and written
    written: torch.cuda.Event | None  # None once it is known to have happened

    def join(self, device: torch.device) -> None:
        """Makes it safe to use on the current stream, which is not being captured."""
        written = self.written  # another thread may find out meanwhile
        if written is not None and written.query():
            self.written = written = None
        current = torch.cuda.current_stream(device)
        if current != self.stream:
            if written is not None:
                current.wait_event(written)
            for x in self.tensors:
                x.record_stream(current)


class Cache(Generic[T]):
    """The ``size`` values that were used last, and all that a CUDA graph has captured.

    A graph reads their tensors at every replay, on any stream and for as long as it lives, which
    nothing tells; so they are kept for good, and must have been written before.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[Hashable, Entry[T]] = OrderedDict()
        self._captured: dict[Hashable, Entry[T]] = {}
        # Gradients are computed in threads of their own.
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries.keys() | self._captured.keys())

    def get(self, key: Hashable, device: torch.device) -> T | None:
        """The value of this key, for use on the current stream, or None where it cannot be had."""
        capturing = is_capturing(device)
        with self._lock:
            entry = self._captured.get(key) or self._entries.get(key)
            if entry is None or (capturing and entry.written is not None):
                return None
            if key in self._entries:
                self._entries.move_to_end(key)
            if capturing:
                self._captured[key] = entry
        if device.type == "cuda" and not capturing:
            entry.join(device)
        return entry.value

    def add(
        self,
        key: Hashable,
        device: torch.device,
        value: T,
        tensors: Sequence[Tensor],
        *,
        is_written: bool,
    ) -> None:
        """Keeps a value that was made on the current stream, which is not being captured.

        ``is_written``: its tensors hold their numbers already, for any stream.
        """
        stream = written = None
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            written = None if is_written else stream.record_event()
        with self._lock:
            self._entries[key] = Entry(value, tensors, stream, written)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
