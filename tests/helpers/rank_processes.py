"""Processes of one gloo group, which run the functions that a test sends them."""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_START = 120.0  # seconds that a process may take to import torch, on a busy machine
#: Imported once, by the process that all ranks are copies of. Not fastsn: which one that is, is
#: settled by the paths that each rank is given.
_PRELOADED = [
    "hypothesis",
    "pytest",
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]


class RankFailed(Exception):
    """What a rank raised, as text: with its traceback, or that the process has ended."""


class Ranks:
    """Some ranks, each waiting for a function; started by :func:`start`.

    A function is one of a module, so that it can be pickled. It may use ``torch.distributed`` at
    will; what it returns comes back pickled too (plain tensors, not DTensors).
    """

    def __init__(self, count: int, folder: Path, timeout: float) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.count = count
        self._timeout = timeout
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(count):
            own, other = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, count, folder, timeout, other), daemon=True
            )
            process.start()
            other.close()
            self._pipes.append(own)
            self._processes.append(process)
        for rank in range(count):
            assert self._receive(rank, timeout=_START) == "ready"

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns on every rank, or the RankFailed that says why not."""
        for pipe in self._pipes:
            try:
                pipe.send_bytes(pickle.dumps((function, args)))
            except OSError:
                pass  # the rank has ended, which receiving tells too
        return [self._receive(rank) for rank in range(self.count)]

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns on every rank; raises if any failed."""
        found = self.outcomes(function, *args)
        for outcome in found:
            if isinstance(outcome, RankFailed):
                raise outcome
        return found

    def _receive(self, rank: int, timeout: float | None = None) -> Any:
        # Ranks that wait for each other give up after the timeout of the group.
        timeout = timeout or 2 * self._timeout
        try:
            if self._pipes[rank].poll(timeout):
                return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            return RankFailed(f"rank {rank} has ended")
        self.stop()
        return RankFailed(f"rank {rank} has not answered for {timeout} s")

    def stop(self) -> None:
        """Ends the ranks; those that do not, on purpose or by accident, are killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank: int, count: int, folder: Path, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=count,
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip
    pipe.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        torch.manual_seed(0)
        try:
            answer = pickle.dumps(function(*args))
        except BaseException:  # what pytest raises is no Exception
            answer = pickle.dumps(RankFailed(f"on rank {rank}:\n{traceback.format_exc()}"))
        pipe.send_bytes(answer)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def start(count: int, folder: Path, timeout: float = 60) -> Iterator[Ranks]:
    """``count`` ranks that live as long as the ``with`` block; ``folder`` is theirs alone.

    A collective that waits longer than ``timeout`` seconds for another rank fails.
    """
    ranks = Ranks(count, folder, timeout)
    try:
        yield ranks
    finally:
        ranks.stop()
