"""Sharded weights: what the ranks send each other, on which meshes, and what cannot be done."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from fastsn import engine, reference
from fastsn.sharded import operators as sharded
from fastsn.sharded import shares
from helpers import sharded_cases
from helpers.rank_processes import start
from helpers.sharded_cases import ITERATIONS, SPLITS, Case, recorded, run, sharded_call, whole

count, four = sharded_cases.count, sharded_cases.four


def sent_on_rank(case: Case) -> dict[str, list[int]]:
    call = sharded_call(case)
    weights: Any = call.weights
    sent = {}
    with recorded() as sent["forward"]:
        snapshot = call.power(sharded)
    with recorded() as sent["scale"]:
        normalized: Any = call.scale(snapshot, sharded)
    loss = sum(x.to_local().square().sum() for x in normalized)
    with recorded() as sent["backward"]:
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
    penalty = sum(x.to_local().square().sum() for x in slopes)
    with recorded() as sent["penalty"]:
        torch.autograd.grad(penalty, weights)
    with recorded() as sent["estimate"]:
        call.estimate(sharded)
    return sent


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("norm", engine.NORMS)
@pytest.mark.parametrize("v_first", [False, True], ids=["u-first", "v-first"])
@pytest.mark.parametrize("iterations", ITERATIONS)
def test_what_is_sent(four, count, split, norm, v_first, iterations):
    """m + n numbers per iteration of an m x n matrix, all matrices in one all-reduce.

    Where the split does not suit the order of the iteration, the products are sent one at a time:
    as many numbers, one all-reduce more.
    """
    case = Case(count, split, norm, v_first, iterations)
    call = case.build()
    volume, rounds, matrices = 0, [0], 0
    for e, (layer, dim) in enumerate(zip(call.layers, call.dims, strict=True)):
        along, n = SPLITS[split][layer], call.iterations[layer]
        if along is None:
            continue
        matrices += 1
        u_first = v_first != (e == 0 or call.layers[e - 1] != layer)
        is_natural = u_first == (along == dim)
        volume += n * (len(call.u[e]) + len(call.v[e])) if n else 1
        rounds.append(n + (not is_natural) if n else 1)
    weights = [sum(dim is not None for dim in SPLITS[split])] if matrices else []
    for sent in run(four, sent_on_rank, case):
        assert len(sent["forward"]) == max(rounds)
        assert sum(sent["forward"]) == volume
        assert sent["scale"] == []
        # With create_graph also what sigma depends on, and both on the way back.
        assert sent["backward"] == [2 * x for x in weights]
        assert sent["penalty"][:1] == [2 * x for x in weights]
        assert sent["estimate"] == ([matrices] if matrices else [])


def hybrid_on_rank(case: Case) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Replicas that are sharded among two ranks each."""
    mesh = init_device_mesh("cpu", (2, 2))
    call = case.build()
    split = [1 if dim else 0 for dim in SPLITS[case.split]]
    placed = [
        distribute_tensor(weight.detach(), mesh, [Replicate(), Shard(dim)]).requires_grad_()
        for weight, dim in zip(call.weights, split, strict=True)
    ]
    call = replace(call, weights=placed)
    with recorded() as sent:
        snapshot = call.power(sharded)
        normalized: Any = call.scale(snapshot, sharded)
        sum((x.to_local() ** 3).sum() for x in normalized).backward()
    assert len(sent) == 3  # two of the power iteration, as some splits do not suit its order
    return snapshot, whole(normalized), whole([weight.grad for weight in placed])


def test_replicas_of_shards(four):
    """Sums go over the ranks that share a replica only."""
    case = Case(4)
    call = case.build()
    snapshot = call.power(reference)
    normalized = call.scale(snapshot, reference)
    sum((x**3).sum() for x in normalized).backward()
    expected = snapshot, whole(normalized), whole([weight.grad for weight in call.weights])
    for found in four(hybrid_on_rank, case):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def refused_on_rank() -> dict[str, str]:
    """The errors, by what is wrong; u and v are as they were."""
    square, line = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (4,))
    elsewhere = DeviceMesh("cpu", [0, 1])
    local, part = torch.ones(4, 4), torch.ones(2, 2)

    def on(mesh: DeviceMesh, tensor: Tensor, *placements: Any) -> DTensor:
        return DTensor.from_local(
            tensor, mesh, placements, run_check=False, shape=torch.Size([4, 4]), stride=(4, 1)
        )

    fine = on(square, local, Replicate(), Shard(0))
    wrong = {
        "two splits": [on(square, part, Shard(0), Shard(1))],
        "strided": [on(square, part, _StridedShard(0, split_factor=2), Shard(0))],
        "strided alone": [on(square, part, _StridedShard(0, split_factor=2), Replicate())],
        "partial": [fine, on(square, local, Replicate(), Partial())],
        "meshes": [fine, on(line, local, Shard(0))],
        "mesh dimensions": [fine, on(square, local, Shard(1), Replicate())],
        "plain": [fine, local],
        "complex": [on(line, local.to(torch.complex64), Shard(0))],
    }
    if dist.get_rank() > 1:
        wrong["not in the mesh"] = [on(elsewhere, local, Shard(0))]
    found = {}
    for name, weights in wrong.items():
        u, v = ([torch.ones(4) for _ in weights] for _ in range(2))
        layers, ones = list(range(len(weights))), [1] * len(weights)
        zeros = [0] * len(weights)
        try:
            sharded.power_(weights, u, v, layers, zeros, ones, 1e-12, False, False)
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        assert all(bool((x == 1).all()) for x in u + v), name
        try:
            shares.shares_of(weights, ["conv1.weight", "conv2.weight"])
        except (TypeError, ValueError) as error:
            found[f"{name}, named"] = str(error)
    return found


SUPPORTED = r"supported are Replicate\(\) on all mesh dimensions, or Shard\(dim\) on one of them"
ERRORS = {
    "two splits": r"ValueError: weights\[0\] is placed .*Shard\(dim=0\), Shard\(dim=1\).* on a "
    rf"mesh of shape \(2, 2\): .*{SUPPORTED}",
    "strided": rf"ValueError: weights\[0\] is placed .*_StridedShard.*{SUPPORTED}",
    "strided alone": rf"ValueError: weights\[0\] is placed .*_StridedShard.*{SUPPORTED}",
    "partial": rf"ValueError: weights\[1\] is placed .*Partial.*{SUPPORTED}",
    "meshes": r"ValueError: .*must share their mesh, got .*2.*2.* and .*4.* of weights\[1\]",
    "mesh dimensions": r"ValueError: .*same mesh dimension, got 1 and 0 of weights\[1\]",
    "plain": r"TypeError: weights\[1\] must be a real DTensor, .*got Tensor of torch.float32",
    "complex": r"TypeError: weights\[0\] must be a real DTensor, .*got DTensor of torch.complex64",
}


def test_what_is_refused(four):
    """An error that names the weight, its placements and what is supported; nothing has moved."""
    for rank, found in enumerate(four(refused_on_rank)):
        if rank > 1:
            assert "weights[0]: it is not in" in found["not in the mesh"]
        for name, pattern in ERRORS.items():
            assert re.search(pattern, found[name]), (name, found[name])
            assert re.search(r"conv[12]\.weight", found[f"{name}, named"])


def modified_on_rank(case: Case) -> str:
    call = sharded_call(case)
    normalized: Any = call.scale(call.power(sharded), sharded)
    with torch.no_grad():
        call.weights[3].mul_(2)
    sum(x.to_local().sum() for x in normalized[:3]).backward()  # which it has nothing to do with
    try:
        sum(x.to_local().sum() for x in normalized).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_weight_that_was_modified(four, count):
    for message in run(four, modified_on_rank, Case(count)):
        assert "modified by an inplace operation" in message


def meta_on_rank(case: Case) -> None:
    call = sharded_call(case)
    weights: Any = [weight.to("meta") for weight in call.weights]
    assert all(type(weight) is DTensor for weight in weights)
    u, v = ([x.to("meta") for x in side] for side in (call.u, call.v))
    on_meta = replace(call, weights=weights, u=u, v=v)
    with recorded() as sent:
        snapshot = on_meta.power(sharded)
        normalized = on_meta.scale(snapshot, sharded)
    assert (len(sent), snapshot.shape) == (0, call.power(sharded).shape)
    assert [x.shape for x in normalized] == [x.shape for x in call.weights]


def test_meta_device(four, count):
    """Shapes, and no words."""
    run(four, meta_on_rank, Case(count))


def lost_on_rank(case: Case) -> tuple[str, bool]:
    """With a rank that ends, or with a group that was destroyed."""
    mesh = init_device_mesh("cpu", (2,))
    call = case.build()
    weights = [distribute_tensor(weight.detach(), mesh, [Shard(0)]) for weight in call.weights]
    call = replace(call, weights=weights)
    before = call.copy()
    if case.split == "rank":
        if dist.get_rank() == 1:
            os._exit(0)
    else:
        dist.destroy_process_group()
    try:
        call.power(sharded)
    except RuntimeError as error:
        same = zip(call.u + call.v, before.u + before.v, strict=True)
        return str(error), all(torch.equal(x, y) for x, y in same)
    return "", False


@pytest.mark.parametrize("lost", ["rank", "group"])
def test_nobody_answers(lost, tmp_path):
    """What torch.distributed says, and what it was about; u and v have not moved."""
    with start(2, tmp_path, timeout=20) as two:
        found = two.outcomes(lost_on_rank, Case(2, lost))
    for outcome in found[: 1 if lost == "rank" else 2]:
        message, is_unchanged = outcome
        assert message.startswith("could not sum 361 numbers of a power iteration of sharded")
        assert is_unchanged
