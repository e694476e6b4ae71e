"""Fixtures and calls of the tests of the emulated CUDA back-end."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from helpers import emulated, operator_numbers
from helpers.calls import Call, make_call, random

#: A cudaError_t.
OUT_OF_MEMORY = 2


@pytest.fixture(scope="session")
def cuda():
    """The emulated operators."""
    return emulated.backend()


@pytest.fixture(autouse=True)
def tested(cuda, monkeypatch):
    """What `operator_numbers.check` compares with the reference."""
    monkeypatch.setattr(operator_numbers, "ops", cuda)


def permuted(shape: tuple[int, ...], order: tuple[int, ...], dtype=torch.float32) -> Tensor:
    """Of this shape, its dimensions in memory in this order."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return random(*(shape[d] for d in order), dtype=dtype).permute(inverse)


def every_kind(v_first: bool) -> Call:
    """Every way through the kernels: see Cut."""
    weights = [
        random(300, 512),  # packs
        random(130, 67),  # single elements
        random(12, 40, 3, 3),  # a few inner indices side by side
        random(3, 9, 600),  # more inner indices than threads
        random(3, 17_000),  # longer than what a block holds
        random(40_000, 3),
        permuted((5, 6, 3, 4), (2, 0, 3, 1)),
        random(64, 64, dtype=torch.bfloat16),
    ]
    iterations = [1, 2, 1, 0, 1, 1, 3, 1]
    return make_call(
        weights, [0, 0, 1, 1, 0, 0, 2, 0], "bidirectional", iterations, v_first=v_first
    )


@contextmanager
def guarded_memory(cuda):
    """New memory lies between zones that nobody may write."""
    assert cuda.guard(True) == 0
    broken = 0
    try:
        yield
    finally:
        broken = cuda.guard(False)
    assert broken == 0, f"{broken} tensors have a write outside of their memory"


def within(x: Tensor) -> Tensor:
    """A copy in the middle of larger memory, with the same strides and alignment."""
    memory = torch.full((x.numel() + 2 * 64,), torch.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, x.stride(), 64).copy_(x)


def launches(function, *arguments) -> int:
    before = emulated.launch_count()
    function(*arguments)
    return emulated.launch_count() - before


def misaligned(x: Tensor) -> Tensor:
    """A copy one byte off, which no kernel can access."""
    memory = bytearray(x.nbytes + 1)
    copy = torch.frombuffer(memory, dtype=x.dtype, offset=1)
    assert copy.data_ptr() % 2 == 1 and copy.numel() == x.numel()
    return copy.copy_(x)
