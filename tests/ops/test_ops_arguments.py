"""Arguments that no operator can compute with: errors that say so, and `ops.present` before them.

What shards parameters takes their storage away and leaves them behind; deferred initialization
leaves some on the meta device.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastsn import ops
from helpers.calls import Call, make_call, random


def two(iterations=1) -> Call:
    return make_call([random(4, 3), random(2, 5)], iterations=iterations)


def without_storage(x: torch.Tensor, size: int = 0) -> torch.Tensor:
    """A copy whose storage has only this many bytes."""
    copy = torch.empty_strided(x.shape, x.stride()).copy_(x)
    copy.untyped_storage().resize_(size)
    return copy


def message(name: str, shape: list[int], needed: int, found: int) -> str:
    return re.escape(
        f"fastsn: {name} of shape {shape} needs a storage of {needed} bytes, got one of {found} b"
    )


# Storages


@pytest.mark.parametrize("found", [0, 4, 16])
@pytest.mark.parametrize("side, shape", [("weights", [2, 5]), ("u", [2]), ("v", [5])])
@pytest.mark.parametrize("iterations", [0, 1])
def test_storages_of_power(iterations, side, shape, found):
    call = two(iterations)
    needed = 4 * torch.Size(shape).numel()
    tensors = getattr(call, side)
    bad = replace(call, **{side: [tensors[0], without_storage(tensors[1], found)]})
    before = call.copy()
    runs = [bad.power, bad.estimate, lambda: ops.normalize(
        *bad.estimates(), bad.iterations, bad.scales, 1e-12, False, False, False, None
    )]  # fmt: skip
    for run in runs:
        if found >= needed:
            run()
            continue
        with pytest.raises(RuntimeError, match=message(f"{side}[1]", shape, needed, found)):
            run()
        assert torch.equal(call.u[0], before.u[0]) and torch.equal(call.v[0], before.v[0])


@pytest.mark.parametrize("name", ["weights[1]", "grads[1]", "snapshot"])
def test_storages_of_scale_and_its_backward(name):
    call = two()
    snapshot, grads = call.power(), [random(4, 3), random(2, 5)]
    shape, needed = ([2, 5], 40) if name != "snapshot" else ([16], 64)
    expected = message(name, shape, needed, 0)
    if name == "weights[1]":
        call.weights[1] = without_storage(call.weights[1])
    elif name == "grads[1]":
        grads[1] = without_storage(grads[1])
    else:
        snapshot = without_storage(snapshot)
    if name != "grads[1]":
        for dtype in (None, torch.bfloat16):
            with pytest.raises(RuntimeError, match=expected):
                ops.scale(call.weights, snapshot, *call.constraint(), dtype)
    with pytest.raises(RuntimeError, match=expected):
        call.scale_backward(grads, snapshot)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_storage_that_is_gone_before_the_backward(create_graph):
    call = two()
    call.weights[1].requires_grad_()
    (loss,) = (w.sum() for w in call.scale(call.power())[1:])
    call.weights[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=message("weights[0]", [2, 5], 40, 0)):
        loss.backward(create_graph=create_graph)


def test_storages_of_views():
    """What counts is where a view ends, whatever its shape and strides."""
    memory = random(40)
    weight = memory[3:].as_strided((2, 5), (1, 4), 3)  # the last element is 3 + 1 + 16
    call = make_call([weight], iterations=0)
    memory.untyped_storage().resize_(4 * 21)
    call.estimate()
    memory.untyped_storage().resize_(4 * 21 - 1)
    with pytest.raises(RuntimeError, match=message("weights[0]", [2, 5], 84, 83)):
        call.estimate()


def test_empty_weights_need_no_storage():
    weights = [without_storage(torch.empty(0, 3)), without_storage(torch.empty(3, 0))]
    call = make_call(weights)
    snapshot = call.power()
    assert snapshot[-2:].tolist() == [0, 0]
    assert ops.present(*call.estimates()) == [True, True]
    assert [list(w.shape) for w in call.scale(snapshot)] == [[0, 3], [3, 0]]


def test_storages_of_the_mean_only_operators():
    ones = [1, 1]
    gone = without_storage(random(2, 3, 4, 4))
    with pytest.raises(RuntimeError, match=message("input", [2, 3, 4, 4], 384, 0)):
        ops.patch_mean(gone, ones, ones, [0, 0], ones, [4, 4], False, True)
    grad = without_storage(random(3, 1, 1))
    with pytest.raises(RuntimeError, match=message("grad", [3, 1, 1], 12, 0)):
        ops.patch_mean_backward(
            grad, [2, 3, 4, 4], ones, [0, 0], ones, [4, 4], False, True, torch.float32, False
        )
    arguments = {"weight": random(5, 3), "patches": random(3), "gain": random(5), "beta": random(5)}
    for name, x in arguments.items():
        bad = {**arguments, name: without_storage(x)}
        expected = message(name, list(x.shape), 4 * x.numel(), 0)
        with pytest.raises(RuntimeError, match=expected):
            ops.mean_bias(*bad.values(), 1, False)


# Devices


def on(call: Call, device: str, *sides: str) -> Call:
    return replace(call, **{side: [x.to(device) for x in getattr(call, side)] for side in sides})


@pytest.mark.parametrize("iterations", [0, 1])
def test_meta_among_real_tensors(iterations):
    call = two(iterations)
    for bad, name, expected, found in [
        (on(call, "meta", "weights"), "u", "meta", "cpu"),
        (on(call, "meta", "weights", "u"), "v", "meta", "cpu"),
        (on(call, "meta", "u"), "u", "cpu", "meta"),
        (on(call, "meta", "v"), "v", "cpu", "meta"),
    ]:
        for run in (bad.power, bad.estimate):
            with pytest.raises(
                RuntimeError, match=rf"{name}\[0\] must be on {expected}, got {found}"
            ):
                run()
    mixed = replace(call, weights=[call.weights[0], call.weights[1].to("meta")])
    with pytest.raises(RuntimeError, match=r"weights\[1\] must be on cpu, got meta"):
        mixed.power()


def test_meta_among_real_tensors_of_scale():
    call = two()
    snapshot, grads = call.power(), [random(4, 3), random(2, 5)]
    absent = on(call, "meta", "weights")
    with pytest.raises(RuntimeError, match="snapshot must be on meta, got cpu"):
        absent.scale(snapshot)
    with pytest.raises(RuntimeError, match="snapshot must be on cpu, got meta"):
        call.scale(snapshot.to("meta"))
    with pytest.raises(RuntimeError, match=r"grads\[0\] must be on meta, got cpu"):
        absent.scale_backward(grads, snapshot.to("meta"))
    with pytest.raises(RuntimeError, match=r"patches must be on cpu, got meta"):
        ops.mean_bias(random(5, 3), torch.empty(3, device="meta"), None, None, 1, False)


def test_meta_alone():
    call = on(two(), "meta", "weights", "u", "v")
    snapshot = call.power()
    assert snapshot.is_meta and snapshot.shape == (16,)
    assert [w.shape for w in call.scale(snapshot)] == [(4, 3), (2, 5)]
    grads = [torch.empty_like(w) for w in call.weights]
    assert all(g.is_meta for g in call.scale_backward(grads, snapshot))


# What is present


class Wrapped(torch.Tensor):
    """A subclass that sees every operation."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


ODD = {
    "meta": lambda x: x.to("meta"),
    "no storage": without_storage,
    "less storage": lambda x: without_storage(x, 4 * x.numel() - 1),
    "sparse": lambda x: x.to_sparse(),
    "integers": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "subclass": Wrapped,
    "not a tensor": lambda x: x.tolist(),
    "None": lambda x: None,
    "shape": lambda x: x[1:],
    "dimensions": lambda x: x[None],
    "scalar": lambda x: x.flatten()[0],
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("side", ["weights", "u", "v"])
def test_present_with_something_odd(side, odd):
    call = make_call([random(4, 3), random(2, 5), random(6, 6)])
    assert ops.present(*call.estimates()) == [True, True, True]
    tensors = list(getattr(call, side))
    tensors[1] = odd(tensors[1])
    assert ops.present(*replace(call, **{side: tensors}).estimates()) == [True, False, True]


def test_present_of_several_estimates():
    call = make_call([random(4, 3, 2), random(5, 4, 2)], norm="bidirectional")
    assert call.layers == [0, 0, 1, 1]
    assert ops.present(*call.estimates()) == [True, True]
    for e in range(4):
        for side in ("u", "v"):
            tensors = list(getattr(call, side))
            tensors[e] = without_storage(tensors[e])
            bad = replace(call, **{side: tensors})
            assert ops.present(*bad.estimates()) == [e // 2 != 0, e // 2 != 1]


@pytest.mark.parametrize(
    "weight",
    [
        nn.Parameter(random(4, 3)), random(4, 3).double(), random(4, 3).half(),
        random(3, 4).T, random(8, 3)[::2], random(1, 3).expand(4, 3), torch._neg_view(random(4, 3)),
    ],
)  # fmt: skip
def test_present_in_any_layout_and_type(weight):
    call = make_call([weight.detach()])
    assert ops.present([weight], call.u, call.v, [0], [0]) == [True]
    replace(call, weights=[weight]).power()


def test_present_with_lists_that_do_not_fit():
    call = two()
    weights, u, v, layers, dims = call.estimates()
    assert ops.present(weights, u[:1], v, layers, dims) == [False, False]
    assert ops.present(weights, u, v, layers, dims[:1]) == [False, False]
    assert ops.present(weights, u, v, layers, [0, 2]) == [True, False]
    assert ops.present(weights, u, v, layers, [-1, 0]) == [False, True]
    assert ops.present(weights, u, v, [0, 7], dims) == [True, False]
    assert ops.present(weights, u[:1], v[:1], [1], [0]) == [False, False]
    assert ops.present([], [], [], [], []) == []


def test_present_inside_torch_func():
    call = make_call([random(4, 3)])
    found = []

    def look(weight, u):
        found.append(ops.present([weight], [u], call.v, [0], [0]))
        return weight.sum()

    torch.func.grad(look)(call.weights[0], call.u[0])
    torch.func.vmap(look, (0, None))(call.weights[0][None], call.u[0])
    torch.func.vmap(look, (None, 0))(call.weights[0], call.u[0][None])
    torch.func.functionalize(look)(call.weights[0], call.u[0])
    assert found == [[False]] * 4
    look(call.weights[0], call.u[0])
    assert found[-1] == [True]


def test_present_of_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = make_call([random(4, 3)])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(call.weights[0])
    assert ops.present([fake], call.u, call.v, [0], [0]) == [False]


# One call from Python


@pytest.mark.parametrize("iterations", [[0, 0], [0, 2], [1, 0]])
def test_normalize_with_layers_at_rest(iterations):
    call = make_call([random(4, 3), random(2, 5)], iterations=iterations, lengths=2.0)
    other, kept = call.copy(), call.copy()
    weights, snapshot = ops.normalize(
        *call.estimates(), iterations, [0.5, 3.0], 1e-12, False, False, False, None
    )
    assert torch.equal(snapshot, other.power())
    expected = ops.scale(call.weights, snapshot, [0, 1], [0, 0], [0.5, 3.0], False, False)
    assert all(map(torch.equal, weights, expected))
    for e, n in enumerate(iterations):
        assert torch.equal(call.u[e], other.u[e])
        assert torch.equal(call.u[e], kept.u[e]) == (n == 0)
