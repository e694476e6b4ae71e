"""Fixtures and calls of the tests of the emulated CUDA back-end."""

from __future__ import annotations

import emulated
import pytest
import test_ops
import torch
from calls import Call, make_call, random
from torch import Tensor


@pytest.fixture(scope="session")
def cuda():
    """The emulated operators."""
    return emulated.backend()


@pytest.fixture(autouse=True)
def tested(cuda, monkeypatch):
    """What `test_ops.check` compares with the reference."""
    monkeypatch.setattr(test_ops, "ops", cuda)


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
