"""What calls of the CUDA back-end do besides their numbers, in the emulator: the memory that they
touch, their launches, their failures, and the arguments that they refuse.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import pytest
import torch

from fastsn import reference
from helpers import cuda_fixtures, emulated
from helpers.calls import (
    ALL_TYPES,
    BAD,
    Call,
    assert_same,
    each_order,
    each_type,
    gradients_for,
    make_call,
    random,
)
from helpers.cuda_fixtures import (
    OUT_OF_MEMORY,
    every_kind,
    guarded_memory,
    launches,
    misaligned,
    permuted,
    within,
)
from helpers.operator_numbers import check

# Of every test here.
cuda, tested = cuda_fixtures.cuda, cuda_fixtures.tested
pytestmark = pytest.mark.usefixtures("poisoned_memory")


# What the operators do to memory


def test_guard_sees_a_write_outside(cuda):
    def write(place: int, count: int) -> None:
        with guarded_memory(cuda):
            x = torch.empty(3)
            ctypes.memset(x.data_ptr() + place, 0, count)
            del x

    write(0, 12)
    for place in (-1, 12):
        with pytest.raises(AssertionError, match="1 tensors have a write outside"):
            write(place, 1)


@each_order
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["narrow", "double"])
def test_nothing_else_is_read_or_written(v_first, dtype, cuda):
    """Outside of weights, u, v and gradients is NaN; results and workspaces are in guarded
    memory."""
    call = every_kind(v_first)
    call = call.copy(dtype) if dtype else call
    grads = gradients_for(call)
    expected = call.run(grads, cuda)
    inputs = {
        name: [within(x) for x in given]
        for name, given in {"weights": call.weights, "u": call.u, "v": call.v}.items()
    }
    inside = replace(call, **inputs)
    inner_grads = [within(g) for g in grads]
    with guarded_memory(cuda):
        snapshot = inside.power(cuda)
        normalized = inside.scale(snapshot, cuda)
        gradients = inside.scale_backward(inner_grads, snapshot, cuda)
        results = [x.clone() for x in (*normalized, *gradients)]
        del snapshot, normalized, gradients
        assert all(map(torch.equal, results, [*expected.normalized, *expected.gradients]))
        del results
    for x in [*inside.weights, *inside.u, *inside.v, *inner_grads]:
        around = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        assert around[:64].isnan().all() and around[-64:].isnan().all()
    constant = [
        *zip(inside.weights, call.weights, strict=True),
        *zip(inner_grads, grads, strict=True),
    ]
    assert all(torch.equal(now, before) for now, before in constant)


def test_vectors_stay_without_iterations(cuda):
    call = make_call([random(9, 70), random(7, 3)], iterations=[0, 1], lengths=2.0)
    live = call.copy()
    snapshot = live.power(cuda)
    assert torch.equal(live.u[0], call.u[0]) and torch.equal(live.v[0], call.v[0])
    assert not torch.equal(live.u[1], call.u[1])
    torch.testing.assert_close(snapshot[:79], torch.cat([call.u[0], call.v[0]]) / 2)
    before = live.copy()
    live.estimate(cuda)
    assert all(map(torch.equal, live.u + live.v, before.u + before.v))


# Vectors


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("size, eps", [(0.0, 1e-20), (1e-21, 1e-30), (1e-21, 1e-12), (0.0, 1e-39)])
def test_norms_below_the_least_inverse(size, eps, v_first, cuda):
    """What vectors are divided by can be so small that its inverse is no number."""
    weights = [size * random(6, 5), size * random(20_000, 3)]
    call = make_call(weights, eps=eps, v_first=v_first)
    for vector in (*call.u, *call.v):
        torch.nn.init.normal_(vector, std=len(vector) ** -0.5)
    expected = call.copy(torch.float64)
    call.power(cuda)
    expected.power(reference)
    # Squares of the least numbers have few digits.
    for actual, exact in zip(call.u + call.v, expected.u + expected.v, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=0.01 * exact.abs().max())


def test_memory_that_vectors_share_until_they_are_written(cuda):
    call = make_call([random(4, 3)])
    before = call.copy()
    call = replace(call, u=[torch._lazy_clone(x) for x in before.u])
    expected = before.copy()
    expected.power(reference)
    given = before.u[0].clone()
    call.power(cuda)
    assert torch.equal(before.u[0], given)
    torch.testing.assert_close(call.u, expected.u)


def test_fewer_than_no_iterations(cuda):
    """Are none, as elsewhere."""
    call = make_call([random(4, 3)], iterations=[-1])
    before = call.copy()
    snapshot = call.power(cuda)
    assert all(map(torch.equal, call.u + call.v, before.u + before.v))
    torch.testing.assert_close(snapshot, before.power(reference))


# Copies


def copies(function, *arguments) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function(*arguments)
    return sum(event.count for event in profiler.key_averages() if event.key == "aten::copy_")


@pytest.mark.parametrize("backend", ["cuda", "cpp"])
@pytest.mark.parametrize("shape, count", [((8, 6, 1, 1), 0), ((8, 6, 3, 3), 1), ((8, 1, 3, 3), 0)])
def test_gradients_that_lie_alike_are_not_copied(shape, count, backend, cuda):
    """Whatever their strides say about dimensions of size 1."""
    own = cuda if backend == "cuda" else torch.ops.fastsn
    weight = random(*shape)
    call = make_call([weight])
    grad = torch.empty(shape, memory_format=torch.channels_last).normal_()
    assert grad.stride() != weight.stride()
    snapshot = call.estimate(own)
    assert copies(call.scale_backward, [grad], snapshot, own) == count
    check(call)


# Launches


@pytest.mark.parametrize("layers", [1, 2, 7, 23, 100])
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
def test_launches_of_a_call(layers, norm, cuda):
    if norm == "bidirectional":
        layers = -(-layers // 2)
    call = make_call([random(3 + k % 4, 5 + k % 3) for k in range(layers)], norm=norm)
    snapshot = call.estimate(cuda)
    assert launches(call.power, cuda) == 2
    assert launches(call.scale, snapshot, cuda) == 1
    assert launches(call.scale_backward, call.weights, snapshot, cuda) == 2


@each_type
def test_launches_do_not_depend_on_sizes_and_strides(dtype, cuda):
    weights = [random(300, 512), random(9, 6, 3, 3), random(3, 4000), random(3, 9, 600)]
    weights.append(permuted((5, 6, 3, 4), (2, 0, 3, 1)))
    call = make_call([w.to(dtype) for w in weights], [0, 1, 0, 1, 2])
    snapshot = call.estimate(cuda)
    assert launches(call.power, cuda) == 2
    assert launches(call.scale, snapshot, cuda) == 1
    assert launches(call.scale_backward, call.weights, snapshot, cuda) == 2


@pytest.mark.parametrize(
    "shape, more",
    [
        ((2, 8192), 0),
        ((2, 8196), 1),  # units for which a block needs more threads
        ((16_000, 3), 0),
        ((17_000, 3), 1),  # vectors that many blocks normalize
        ((3, 17_000), 2),
    ],
)
def test_launches_that_large_layers_need(shape, more, cuda):
    call = make_call([random(64, 64), random(*shape)])
    assert launches(call.power, cuda) == 2 + more
    check(call)


@pytest.mark.parametrize("shape, more", [((8192, 3), 0), ((8193, 3), 1), ((3, 8193), 2)])
def test_launches_at_rest(shape, more, cuda):
    """One for all vectors, and one for what many blocks make unit vectors of."""
    call = make_call([random(64, 64), random(*shape), random(4, 3)], iterations=[0, 0, 1])
    assert launches(call.power, cuda) == 3 + more
    assert launches(replace(call, iterations=[1, 1, 1]).power, cuda) == 2 + (more == 2)
    assert launches(call.estimate, cuda) == 3 + more


def test_long_vectors_at_rest(cuda):
    """Of which some parts are zeros, or far smaller than others."""
    lengths = [0.3, 2.0, 1e30, 1e-30, 1.0, 1.0]
    shapes = [(20_000, 3), (3, 17_000), (40_000, 1), (8193, 2), (20_000, 2), (20_000, 2)]
    call = make_call([random(*shape) for shape in shapes], iterations=0, lengths=lengths)
    call.u[4][:9000] = 0
    call.u[4][9000:18_000] *= 1e-25
    check(call)
    call.u[5][10_000] = torch.nan
    snapshot = call.estimate(cuda)
    assert snapshot[-1].isnan() and snapshot[:-1].isnan().sum() == 20_000
    call.u[5].zero_()
    snapshot = call.estimate(cuda)
    assert snapshot[-1] == 0 and snapshot.isfinite().all()


def test_long_vectors_of_all_kinds(cuda):
    """Normalized by many blocks: several rounds, none at all, and a zero weight that is guarded."""
    weights = [random(20_000, 3), random(3, 17_000), random(17_000, 2), torch.zeros(18_000, 2)]
    for v_first in (False, True):
        check(make_call(weights, iterations=[3, 2, 0, 2], v_first=v_first, zero_guard=True))


def test_launches_of_rounds_and_types(cuda):
    call = make_call([random(4, 3, dtype=dtype) for dtype in ALL_TYPES[1:]], iterations=[1, 3, 0])
    # What rests; all three types, then twice one of them; and what they have in common.
    assert launches(call.power, cuda) == 1 + (3 + 1) + 2 * (1 + 1)
    snapshot = call.estimate(cuda)
    assert launches(call.scale, snapshot, cuda) == 3
    assert launches(call.scale_backward, call.weights, snapshot, cuda) == 6


def test_many_layers_take_several_launches(cuda):
    call = make_call([random(3, 5) for _ in range(700)])
    snapshot = call.estimate(cuda)
    assert 2 < launches(call.power, cuda) < 20
    assert 1 < launches(call.scale, snapshot, cuda) < 20
    assert 2 < launches(call.scale_backward, call.weights, snapshot, cuda) < 20
    check(call)


# Failures


@pytest.mark.parametrize("phase", ["rest", "multiply", "scale", "product"])
def test_failed_launch(phase, cuda):
    call = make_call([random(4, 3), random(2, 5)], iterations=[1, 2])
    grads = gradients_for(call)
    expected = call.run(grads, cuda)
    snapshot = call.estimate(cuda)
    before = call.copy()
    run = {
        "rest": lambda: call.estimate(cuda),
        "multiply": lambda: call.power(cuda),
        "scale": lambda: call.scale(snapshot, cuda),
        "product": lambda: call.scale_backward(grads, snapshot, cuda),
    }[phase]
    emulated.fail_next_launch(OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match=f"fastsn: CUDA kernel '{phase}' .*: out of memory"):
        run()
    assert all(map(torch.equal, call.u + call.v, before.u + before.v))
    assert_same(call.run(grads, cuda), expected)


@pytest.mark.parametrize("phase", ["finish", "scale", "product"])
def test_failure_within_a_kernel(phase, cuda):
    """`finish` writes a vector that `multiply` does not read."""
    call = make_call([random(4, 3), random(2, 5)])
    grads = gradients_for(call)
    expected = call.run(grads, cuda)
    snapshot = call.estimate(cuda)
    run = {
        "finish": lambda: replace(call, u=[misaligned(x) for x in call.u]).power(cuda),
        "scale": lambda: call.scale(misaligned(snapshot), cuda),
        "product": lambda: call.scale_backward(grads, misaligned(snapshot), cuda),
    }[phase]
    with pytest.raises(
        RuntimeError, match=f"fastsn: CUDA kernel '{phase}' .*: .*misaligned access"
    ):
        run()
    assert_same(call.run(grads, cuda), expected)


def test_failure_of_a_part_of_a_call_leaves_the_vectors(cuda):
    """Weights of several types have kernels of their own, and none is finished before all are."""
    call = make_call([random(4, 3, dtype=dtype) for dtype in ALL_TYPES[1:]])
    call.weights[2] = misaligned(call.weights[2].flatten()).view(4, 3)
    before = call.copy()
    with pytest.raises(RuntimeError, match="fastsn: CUDA kernel 'multiply' .*misaligned access"):
        call.power(cuda)
    assert all(map(torch.equal, call.u + call.v, before.u + before.v))


# Arguments


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_of_power(changes, message, cuda):
    call = make_call([random(4, 3), random(2, 5)])
    before = call.copy()
    for function in (Call.power, Call.estimate):
        if function is Call.estimate and "iterations" in changes:
            continue
        with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
            function(replace(call, **changes), cuda)
    for a, b in zip(before.u + before.v, call.u + call.v, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("found", [0, 4])
@pytest.mark.parametrize("name", ["weights", "u", "v", "grads", "snapshot"])
def test_storages(name, found, cuda):
    call = make_call([random(4, 3), random(2, 5)], iterations=[0, 1])
    snapshot, grads = call.estimate(cuda), gradients_for(call)
    lists = {"weights": call.weights, "u": call.u, "v": call.v, "grads": grads}
    bad = snapshot if name == "snapshot" else lists[name][1].clone()
    if name != "snapshot":
        lists[name][1] = bad
    bad.untyped_storage().resize_(found)
    runs = {
        "power": lambda: call.power(cuda),
        "estimate": lambda: call.estimate(cuda),
        "scale": lambda: call.scale(snapshot, cuda),
        "backward": lambda: call.scale_backward(grads, snapshot, cuda),
    }
    reached = {"weights": list(runs), "grads": ["backward"], "snapshot": ["scale", "backward"]}
    sizes = rf"needs a storage of {4 * bad.numel()} bytes, got one of {found} bytes"
    message = rf"{name}(\[1\])? of shape .* {sizes}"
    for run in reached.get(name, ["power", "estimate"]):
        with pytest.raises(RuntimeError, match=message):
            runs[run]()


def test_bad_arguments_of_scale(cuda):
    call = make_call([random(4, 3), random(2, 5)])
    snapshot = call.power(cuda)
    for bad in (snapshot[:-1], snapshot.double(), torch.stack([snapshot, snapshot], 1)[:, 0]):
        for run in (
            Call.scale,
            lambda *args: Call.scale_backward(args[0], call.weights, *args[1:]),
        ):
            with pytest.raises(RuntimeError, match="contiguous Float snapshot of 16 elements on "):
                run(call, bad, cuda)
    with pytest.raises(RuntimeError, match="expected 2 scales, got 1"):
        replace(call, scales=[1.0]).scale(snapshot, cuda)
    for bad in ([random(4, 3)], [random(4, 3), random(5, 2)], [random(4, 3), random(2, 5).int()]):
        with pytest.raises(RuntimeError, match="expected (2 gradients|a floating .* of shape)"):
            call.scale_backward(bad, snapshot, cuda)


def test_too_many_permuted_dimensions(cuda):
    weight = permuted((2, 3, 2, 3, 2, 3), (5, 4, 3, 2, 1, 0))
    call = make_call([random(4, 3), weight])
    before = call.copy()
    message = "at most 4 permuted runs, got 5; call .contiguous() on it"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call.power(cuda)
    assert all(map(torch.equal, call.u + call.v, before.u + before.v))
    check(replace(call, weights=[call.weights[0], weight.contiguous()]))


def test_more_than_two_estimates(cuda):
    weight = random(3, 4, 5)
    call = make_call([weight] * 3, dims=[0, 1, 2])
    call = replace(call, weights=[weight], layers=[0, 0, 0], iterations=[1], scales=[1.0])
    peer = call.copy()
    snapshot, expected = call.power(cuda), peer.power(reference)
    torch.testing.assert_close(snapshot, expected)
    torch.testing.assert_close(call.scale(snapshot, cuda), peer.scale(expected, reference))
    with pytest.raises(RuntimeError, match="may have up to 2 estimates, got 3"):
        call.scale_backward([weight], snapshot, cuda)
