"""The operators for sharded weights: the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastsn import engine, ops, reference
from fastsn.sharded import operators as sharded
from helpers import sharded_cases
from helpers.calls import Call
from helpers.rank_processes import Ranks
from helpers.sharded_cases import (
    ITERATIONS,
    SCALES,
    SPLITS,
    Case,
    Found,
    mesh_of,
    placed,
    recorded,
    run,
    sharded_call,
    step,
    whole,
)
from helpers.tolerances import assert_sum_no_worse

count, four = sharded_cases.count, sharded_cases.four

EXACT = {"rtol": 1e-12, "atol": 1e-13}

each_split = pytest.mark.parametrize("split", SPLITS)
each_norm = pytest.mark.parametrize("norm", engine.NORMS)
each_order = pytest.mark.parametrize("v_first", [False, True], ids=["u-first", "v-first"])


def on_rank(case: Case) -> Found:
    call = sharded_call(case)
    assert engine.serving(call.weights) is sharded
    before = list(call.weights)
    grads = placed(case.grads(), case)
    found = step(call, grads, sharded)
    assert all(x.placements == y.placements for x, y in zip(before, call.weights, strict=True))
    return found


def assert_one_process(four: Ranks, case: Case, exact: bool = True) -> list[Found]:
    """Every rank has found what one process does, and exactly what the others have."""
    found = run(four, on_rank, case)
    expected = step(case.build(), case.grads(), reference)
    for own in found:
        if exact:
            torch.testing.assert_close(own, expected, equal_nan=True, **EXACT)
        for key in ("snapshot", "u", "v"):
            for x, y in zip(own[key], found[0][key], strict=True):
                assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), key  # NaN too
    return found


@each_split
@each_norm
@each_order
@pytest.mark.parametrize("iterations", ITERATIONS)
def test_ranks_together_are_one_process(four, count, split, norm, v_first, iterations):
    assert_one_process(four, Case(count, split, norm, v_first, iterations))


@each_split
@each_norm
@pytest.mark.parametrize(
    "iterations, length",
    [("some", 0.3), ("some", 2.0), ("none", 0.3), ("none", 1e200), ("none", 1e-200)],
)
def test_vectors_of_any_length_at_rest(four, count, split, norm, iterations, length):
    """Which are whole on every rank: nothing more is sent."""
    assert_one_process(four, Case(count, split, norm, False, iterations, length=length))


@pytest.mark.parametrize("length", [0.3, 1e30, 1e-30])
def test_vectors_of_any_length_at_rest_in_fp32(four, count, length):
    case = Case(count, iterations="none", length=length, dtype=torch.float32)
    found = assert_one_process(four, case, exact=False)[0]
    snapshot = case.build().copy(torch.float64).power(reference)
    torch.testing.assert_close(found["snapshot"][0].double(), snapshot, rtol=1e-5, atol=1e-6)


@each_split
@pytest.mark.parametrize("bound", [False, True])
@each_order
def test_constraints(four, count, split, bound, v_first):
    """Some weights are within the bound, some sigma is far below eps."""
    case = Case(count, split, "bidirectional", v_first, "some", 10.0, bound, True)
    call = case.build()
    sigmas = reference.sigmas_of(call.copy().power(reference), call.layers)
    assert {bool(sigma <= s) for sigma, s in zip(sigmas, SCALES, strict=True)} == {False, True}
    assert_one_process(four, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_order
def test_types(four, count, dtype, v_first):
    """About as exact as plain PyTorch in the same type."""
    case = Case(count, "mixed", "bidirectional", v_first, "some", dtype=dtype)
    found = assert_one_process(four, case, exact=False)[0]
    peer = step(case.build(), case.grads(), reference)
    exact = case.build().copy(torch.float64)
    exact.weights = [weight.detach().requires_grad_() for weight in exact.weights]
    grads = [grad.double() for grad in case.grads()]
    truth = step(exact, grads, reference)
    for results in (found, peer, truth):
        vectors, sigmas = results.pop("snapshot")[0].tensor_split([-len(exact.layers)])
        results.update(vectors=[vectors], sigmas=[sigmas])
    for key in ("vectors", "sigmas", "normalized", "gradients"):
        for i, actual in enumerate(found[key]):
            # <G, W> is a sum of terms that cancel.
            terms = (grads[i] * exact.weights[i].detach()).abs().max().item()
            assert_sum_no_worse(
                actual,
                peer[key][i],
                truth[key][i],
                length=max(weight.numel() for weight in exact.weights),
                computed_in=torch.float32,
                largest_term=terms if key == "gradients" else 0,
            )


def no_first_half(weights: list[Tensor]) -> None:
    """One rank has zeros, and some weights are nothing but zeros."""
    for weight in weights:
        weight[: -(-len(weight) // 2)] = 0
    weights[0].zero_()
    weights[6].zero_()


@pytest.mark.parametrize("zero_guard", [False, True])
@pytest.mark.parametrize("split", ["first", "second", "mixed"])
@each_order
def test_zeros(four, count, zero_guard, split, v_first):
    """NaN as with torch, or with zero_guard zeros, and u and v stay."""
    case = Case(count, split, "matrix", v_first, "some", zero_guard=zero_guard, edit=no_first_half)
    found = assert_one_process(four, case)[0]
    assert found["normalized"][0].isnan().all() != zero_guard
    assert all(x.isfinite().all() for key in ("normalized", "gradients") for x in found[key][1:2])
    if zero_guard:
        assert torch.equal(found["u"][0], case.build().u[0])


def of_all_sizes(weights: list[Tensor]) -> None:
    """From rank to rank and from weight to weight numbers whose squares under- or overflow."""
    for i, weight in enumerate(weights):
        weight[: -(-len(weight) // 2)] *= 1e-30
        weight *= 10.0 ** (3 * i - 9)
    weights[7] *= 1e-24


@pytest.mark.parametrize("split", ["first", "second", "mixed"])
@each_order
def test_large_and_small_numbers_in_fp32(four, count, split, v_first):
    case = Case(count, split, "bidirectional", v_first, dtype=torch.float32, edit=of_all_sizes)
    found = assert_one_process(four, case, exact=False)[0]
    exact = case.build().copy(torch.float64)
    snapshot = exact.power(reference)
    torch.testing.assert_close(found["snapshot"][0].double(), snapshot, rtol=2e-5, atol=1e-5)
    sigmas = slice(-len(exact.layers), None)
    torch.testing.assert_close(
        found["snapshot"][0][sigmas].double(), snapshot[sigmas], rtol=1e-5, atol=1e-20
    )


def higher(call: Call, grads: list[Tensor], backend: Any) -> list[list[Tensor]]:
    """Gradients of a loss, of a penalty on them, and of one on those."""
    out = call.scale(call.power(backend), backend)
    loss = sum((x * g).square().sum() + (x * g).sum() for x, g in zip(out, grads, strict=True))
    found = []
    for _ in range(3):
        first = torch.autograd.grad(loss, call.weights, create_graph=True)
        found.append(whole(first))
        loss = sum(x.pow(3).sum() for x in first)
    return found


def higher_on_rank(case: Case) -> list[list[Tensor]]:
    return higher(sharded_call(case), placed(case.grads(), case), sharded)  # type: ignore


@pytest.mark.parametrize("bound", [False, True])
@each_split
def test_gradients_of_gradients(four, count, bound, split):
    case = Case(count, split, bound=bound, zero_guard=bound)
    expected = higher(case.build(), case.grads(), reference)
    for found in run(four, higher_on_rank, case):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def several(call: Call, grads: list[Tensor], backend: Any) -> list[Tensor]:
    """Two forwards before the backwards, of which there is one for each half of the layers."""
    first, second = (call.scale(call.power(backend), backend) for _ in range(2))
    terms = [((x + y * y) * g).sum() for x, y, g in zip(first, second, grads, strict=True)]
    for part in (slice(0, 3), slice(3, 7)):  # and none of the last
        sum(terms[part]).backward()
    assert call.weights[7].grad is None
    return whole([weight.grad for weight in call.weights[:7]])


def several_on_rank(case: Case) -> tuple[list[Tensor], list[int]]:
    grads = placed(case.grads(), case)
    call = sharded_call(case)
    with recorded() as sent:
        first, second = (call.scale(call.power(sharded), sharded) for _ in range(2))
        terms = [
            ((x.to_local() + y.to_local() ** 2) * g.to_local()).sum()
            for x, y, g in zip(first, second, grads, strict=True)
        ]
        forward = len(sent)
        for part in (slice(0, 3), slice(3, 7)):
            sum(terms[part]).backward()
    assert call.weights[7].grad is None
    return whole([weight.grad for weight in call.weights[:7]]), sent[forward:]


@each_split
def test_several_forwards_and_backwards(four, count, split):
    """Each backward of each forward is one all-reduce of one number per split weight."""
    case = Case(count, split)
    expected = several(case.build(), case.grads(), reference)
    split_weights = sum(dim is not None for dim in SPLITS[split])
    for found, sent in run(four, several_on_rank, case):
        torch.testing.assert_close(found, expected, **EXACT)
        assert sent == [split_weights] * (4 if split_weights else 0)


def other_gradients_on_rank(case: Case) -> list[list[Tensor]]:
    """With gradients that are placed in other ways than the weights."""
    call = sharded_call(case)
    snapshot = call.power(sharded)
    mesh = mesh_of(case.ranks)
    found = []
    for placement in (Replicate(), Shard(1), Partial()):
        grads = [distribute_tensor(grad, mesh, [Replicate()]) for grad in case.grads()]
        if placement.is_partial():
            own = [grad.to_local() / mesh.size() for grad in grads]
            grads = [DTensor.from_local(grad, mesh, [placement]) for grad in own]
        else:
            grads = [grad.redistribute(mesh, [placement]) for grad in grads]
        normalized = call.scale(snapshot, sharded)
        gradients = torch.autograd.grad(normalized, call.weights, grads)
        assert [g.placements for g in gradients] == [w.placements for w in call.weights]
        found.append(whole(gradients))
    return found


def test_gradients_placed_in_other_ways(four, count):
    case = Case(count)
    expected = step(case.build(), case.grads(), reference)["gradients"]
    for found in run(four, other_gradients_on_rank, case):
        for own in found:
            torch.testing.assert_close(own, expected, **EXACT)


def results_on_rank(case: Case) -> tuple[list[Tensor], list[torch.dtype]]:
    call = sharded_call(case)
    snapshot = call.power(sharded)
    normalized = sharded.scale(call.weights, snapshot, *call.constraint(), torch.bfloat16)
    assert [x.placements for x in normalized] == [x.placements for x in call.weights]
    assert [x.stride() for x in normalized] == [x.stride() for x in call.weights]
    sum(x.to_local().float().sum() for x in normalized).backward()
    plain = case.build().scale(snapshot, ops)
    return whole(plain), whole(normalized), [weight.grad.dtype for weight in call.weights]


def test_the_snapshot_is_that_of_whole_weights(four, count):
    """What the ranks have found together serves each for weights that it has all of."""
    case = Case(count, dtype=torch.float32)
    for plain, normalized, types in run(four, results_on_rank, case):
        for x, y in zip(plain, normalized, strict=True):
            assert torch.equal(x.bfloat16(), y)
        assert set(types) == {torch.float32}


def compiled_on_rank(case: Case) -> Found:
    call = sharded_call(case)

    def product(*weights: Tensor) -> list[Tensor]:
        normalized = call.scale(call.power(sharded), sharded)
        return [x.to_local() * w.to_local() for x, w in zip(normalized, weights, strict=True)]

    expected = [x.detach() for x in product(*call.weights)]
    call.u, call.v = case.build().u, case.build().v
    found = torch.compile(product, backend="aot_eager")(*call.weights)
    sum(x.sum() for x in found).backward()
    gradients = whole([weight.grad for weight in call.weights])
    return {"found": whole(found), "expected": expected, "gradients": gradients}


def test_compiled(four):
    """A break of the graph, and the numbers of eager."""
    for found in run(four, compiled_on_rank, Case(2)):
        assert found["gradients"][0].any()
        torch.testing.assert_close(found["found"], found["expected"], **EXACT)
