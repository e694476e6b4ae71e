"""Calls of the operators: of every size, type and layout; and all that a step computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastsn import ops, reference
from fastsn.functional import estimate_dims

ALL_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

each_type = pytest.mark.parametrize("dtype", ALL_TYPES, ids=str)
each_order = pytest.mark.parametrize("v_first", [False, True], ids=["u-first", "v-first"])


class Results(NamedTuple):
    """All that a step computes."""

    vectors: list[Tensor]
    normalized: list[Tensor]
    gradients: list[Tensor]
    sigmas: list[Tensor]


@dataclass
class Call:
    """The arguments of the operators, for any number of weights."""

    weights: list[Tensor]
    u: list[Tensor]
    v: list[Tensor]
    layers: list[int]
    dims: list[int]
    iterations: list[int]
    scales: list[float]
    eps: float = 1e-12
    v_first: bool = False
    bound: bool = False
    zero_guard: bool = False

    def copy(self, dtype: torch.dtype | None = None) -> Call:
        """With u and v, or everything if there is a `dtype`, in memory of its own."""
        weights = [w.to(dtype) for w in self.weights] if dtype else self.weights
        u, v = ([x.to(dtype or x.dtype, copy=True) for x in side] for side in (self.u, self.v))
        return replace(self, weights=weights, u=u, v=v)

    def estimates(self) -> tuple:
        return self.weights, self.u, self.v, self.layers, self.dims

    def options(self) -> tuple:
        return self.iterations, self.eps, self.v_first, self.zero_guard

    def constraint(self) -> tuple:
        return self.layers, self.dims, self.scales, self.bound, self.zero_guard

    def power(self, backend=ops) -> Tensor:
        return backend.power_(*self.estimates(), *self.options())

    def estimate(self, backend=ops) -> Tensor:
        return backend.estimate(*self.estimates())

    def scale(self, snapshot: Tensor, backend=ops) -> list[Tensor]:
        return backend.scale(self.weights, snapshot, *self.constraint())

    def scale_backward(self, grads: list[Tensor], snapshot: Tensor, backend=ops) -> list[Tensor]:
        return backend.scale_backward(grads, self.weights, snapshot, *self.constraint())

    def run(self, grads: list[Tensor], backend=ops) -> Results:
        """One step; u and v of this call stay as they are."""
        live = self.copy()
        # What is not written shows: results take the place of these in memory.
        poison = [torch.full_like(w, torch.nan) for w in live.weights]
        del poison
        snapshot = live.power(backend)
        normalized = live.scale(snapshot, backend)
        gradients = live.scale_backward(grads, snapshot, backend)
        parts = reference.vectors_of(live.weights, snapshot, live.layers, live.dims)
        vectors = [*live.u, *live.v, *(x for pair in parts for x in pair)]
        return Results(vectors, normalized, gradients, list(snapshot[-len(live.layers) :].unbind()))


def make_call(weights, dims=0, norm="matrix", iterations=1, lengths=1.0, **kwargs) -> Call:
    """A call for these weights; `dims`, `iterations` and `lengths` are one for all, or one each.

    u and v, of these lengths, have seen some iterations, as in training: with random ones sigma is
    a sum whose terms cancel, and the roundings of every implementation are blown up.
    """
    count = len(weights)
    dims = [dims] * count if isinstance(dims, int) else dims
    iterations = [iterations] * count if isinstance(iterations, int) else iterations
    lengths = [lengths] * count if isinstance(lengths, float) else lengths
    own = [estimate_dims(w.shape, dim, norm) for w, dim in zip(weights, dims, strict=True)]
    layers = [layer for layer, dims in enumerate(own) for _ in dims]
    flat = [dim for dims in own for dim in dims]
    u, v = [], []
    for layer, dim in zip(layers, flat, strict=True):
        weight = weights[layer]
        matrix = reference.to_matrix(weight.double(), dim)
        x, y = (torch.randn(length, dtype=torch.float64) for length in matrix.shape)
        for _ in range(5):
            x, y, _ = reference.iterate(matrix, x, y, 1e-12, v_first=True)
        u.append((lengths[layer] * x).to(weight.dtype))
        v.append((lengths[layer] * y).to(weight.dtype))
    call = Call(weights, u, v, layers, flat, iterations, [1.0] * count)
    return replace(call, **kwargs)


def gradients_for(call: Call) -> list[Tensor]:
    return [torch.randn(w.shape).to(w.dtype) for w in call.weights]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


LAYOUTS = {
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "first-two-exchanged": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "slice-of-larger": lambda w: torch.cat([w, w]).flatten()[3 : 3 + w.numel()].view(w.shape),
    "every-other": lambda w: w.repeat_interleave(2, dim=3)[..., ::2],
    "every-other-exchanged": lambda w: w.mT.repeat_interleave(2, dim=1)[:, ::2].mT,
    "expanded": lambda w: w[:, :, :1].expand(w.shape),
    "negative-bit": lambda w: torch._neg_view(w),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())

SHAPES = [
    (1,), (129,), (1, 1), (1, 63), (63, 1), (63, 129), (7, 4608), (4608, 3), (5, 4, 3),
    (16, 9, 40), (64, 3, 3, 3), (3, 64, 1, 1), (9, 8, 3, 3, 3), (0, 3), (3, 0), (2, 0, 3),
]  # fmt: skip

BAD = {
    "no weights": ({"weights": []}, "at least one weight"),
    "a weight left out": ({"layers": [0, 0]}, "every one of the 2 weights in ascending order"),
    "descending": ({"layers": [1, 0]}, "in ascending order"),
    "unknown layer": ({"layers": [0, 2]}, "(in ascending order|for layer 2)"),
    "negative layer": ({"layers": [-1, 0]}, "(in ascending order|for layer -1)"),
    "dims": ({"dims": [0]}, "layers and dims differ in length: 2 and 1"),
    "dim": ({"dims": [0, 2]}, r"dims\[1\] must be in \[0, 1\], got 2"),
    "u missing": ({"u": [torch.ones(4)]}, "expected 2 u and v, got 1 and 2"),
    "u length": ({"u": [torch.ones(4), torch.ones(3)]}, r"u\[1\].* shape \[2\], got \[3\]"),
    "v type": ({"v": [torch.ones(3), torch.ones(5).int()]}, r"v\[1\] must be floating point"),
    "iterations": ({"iterations": [1]}, "expected .*n_power_iterations.*, got 1"),
    "mixed": ({"weights": [random(4, 3), random(2, 5).double()]}, "float64 weights cannot share"),
    "integers": ({"weights": [random(4, 3), random(2, 5).int()]}, r"weights\[1\] must be float64"),
}


def assert_same(a: Results, b: Results) -> None:
    for own, other in zip(a, b, strict=True):
        assert len(own) == len(other) and all(map(torch.equal, own, other))


def large_call(v_first: bool) -> Call:
    weights = [random(700, 300), random(64, 3, 3, 3), random(20, 300, 40), random(3, 5)]
    call = make_call(weights, [0, 0, 1, 0], "bidirectional", [1, 2, 1, 0], lengths=2.0)
    return replace(call, v_first=v_first)
