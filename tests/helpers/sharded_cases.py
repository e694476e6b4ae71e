"""A call for weights that are split among the ranks, and what a step computes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from helpers.calls import Call, gradients_for, make_call, random
from helpers.rank_processes import Ranks, start

# Shapes and the dimension of the outputs. Of 2 and 3 ranks some have more than others, and of the
# dimensions of 1 and 2 some have nothing.
WEIGHTS = (
    ((7, 5, 3, 3), 0), ((2, 9), 0), ((6, 4), 1), ((5, 7, 2), 1), ((4, 6, 2, 1, 3), 0),
    ((1, 3, 2), 0), ((5, 5, 4), 1), ((65, 33), 0),
)  # fmt: skip
# Along which dimension each is split; None: it is whole on every rank.
SPLITS: dict[str, list[int | None]] = {
    "first": [0] * 8,
    "second": [1] * 8,
    "mixed": [2, 0, 1, 2, 3, 2, None, 0],
    "whole": [None] * 8,
}
ITERATIONS: dict[str, list[int]] = {
    "one": [1] * 8, "some": [1, 2, 0, 1, 0, 3, 2, 1], "none": [0] * 8,
}  # fmt: skip
# Some weights within the bound and some beyond it.
SCALES = [1.0, 0.5, 30.0, 1.0, 1.5, 50.0, 20.0, 1.0]


@dataclass(frozen=True)
class Case:
    """A call for all of WEIGHTS, which every process builds for itself."""

    ranks: int
    split: str = "mixed"
    norm: str = "bidirectional"
    v_first: bool = False
    iterations: str = "one"
    eps: float = 1e-12
    bound: bool = False
    zero_guard: bool = False
    dtype: torch.dtype = torch.float64
    edit: Callable[[list[Tensor]], None] | None = None
    length: float = 1.0  # of u and v

    def build(self) -> Call:
        torch.manual_seed(1)
        weights = [random(*shape).to(self.dtype) for shape, _ in WEIGHTS]
        if self.edit:
            self.edit(weights)
        call = make_call(weights, [dim for _, dim in WEIGHTS], self.norm, lengths=self.length)
        if self.edit:  # iterations of the edited weights may have left nothing
            call = replace(call, u=list(map(torch.ones_like, call.u)))
            call = replace(call, v=list(map(torch.ones_like, call.v)))
        call = replace(
            call, scales=SCALES, eps=self.eps, bound=self.bound, zero_guard=self.zero_guard,
            v_first=self.v_first, iterations=ITERATIONS[self.iterations],
        )  # fmt: skip
        for weight in call.weights:
            weight.requires_grad_()
        return call

    def grads(self) -> list[Tensor]:
        torch.manual_seed(2)
        return gradients_for(self.build())


#: Of a pool of 4 ranks: those that a mesh of so many has.
MEMBERS = {2: [0, 2], 3: [0, 1, 3]}


@cache
def mesh_of(count: int) -> DeviceMesh:
    """All 4 ranks must ask for it, in the same order."""
    return DeviceMesh("cpu", MEMBERS[count])


def placed(whole: list[Tensor], case: Case) -> list[Any]:
    """These, split as the case says."""
    places = [Replicate() if dim is None else Shard(dim) for dim in SPLITS[case.split]]
    return [
        distribute_tensor(x.detach(), mesh_of(case.ranks), [own])
        for x, own in zip(whole, places, strict=True)
    ]


def sharded_call(case: Case) -> Call:
    call = case.build()
    weights = placed(call.weights, case)
    return replace(call, weights=[weight.requires_grad_() for weight in weights])


def whole(tensors: Any) -> list[Tensor]:
    return [x.full_tensor().detach() if isinstance(x, DTensor) else x.detach() for x in tensors]


@contextmanager
def recorded() -> Iterator[list[int]]:
    """The numbers of elements of all all-reduces; nothing else is sent."""
    from torch.distributed.tensor.debug import CommDebugMode  # which imports the compiler

    found: list[int] = []
    send = dist.all_reduce

    def record(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert tensor.is_contiguous()
        found.append(tensor.numel())
        return send(tensor, *args, **kwargs)

    dist.all_reduce = record
    try:
        with CommDebugMode() as mode:
            yield found
    finally:
        dist.all_reduce = send
    assert mode.get_total_counts() == len(found)


Found = dict[str, list[Tensor]]


def step(call: Call, grads: list[Tensor], backend: Any) -> Found:
    """Everything that a step computes."""
    snapshot = call.power(backend)
    normalized = call.scale(snapshot, backend)
    gradients = torch.autograd.grad(normalized, call.weights, grads)
    return {
        "snapshot": [snapshot], "u": call.u, "v": call.v,
        "normalized": whole(normalized), "gradients": whole(gradients),
    }  # fmt: skip


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The pool of ranks."""
    with start(4, tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture(params=list(MEMBERS))
def count(request):
    """How many of them take part."""
    return request.param


def _on_member(function: Callable[[Case], Any], case: Case) -> Any:
    return None if mesh_of(case.ranks).get_coordinate() is None else function(case)


def run(ranks: Ranks, function: Callable[[Case], Any], case: Case) -> list[Any]:
    """What ``function(case)`` returns on every rank that takes part."""
    found = ranks(_on_member, function, case)
    return [found[rank] for rank in MEMBERS[case.ranks]]
