"""The compiled operators against `fastsn.reference`, which is the specification.

`TestNumbers` runs once more for every instruction set, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsn import ops, reference
from helpers.calls import (
    ALL_TYPES,
    BAD,
    Call,
    assert_same,
    each_order,
    each_type,
    gradients_for,
    large_call,
    make_call,
    random,
)
from helpers.operator_numbers import OperatorNumbers


class TestNumbers(OperatorNumbers):
    def test_capability_is_the_one_asked_for(self):
        asked = os.environ.get("FASTSN_CPU_CAPABILITY")
        assert ops._C.cpu_capability() == asked or asked is None


# Results depend on shapes only


@each_order
def test_same_bits_on_any_number_of_threads_at_every_run(v_first):
    call = large_call(v_first)
    grads = gradients_for(call)
    expected = call.run(grads)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for _ in range(5):
            assert_same(call.run(grads), expected)


@each_order
def test_same_bits_alone_or_among_others(v_first):
    together = large_call(v_first)
    alone = []
    for layer, weight in enumerate(together.weights):
        e = [e for e, other in enumerate(together.layers) if other == layer]
        u, v, dims = ([side[i] for i in e] for side in (together.u, together.v, together.dims))
        iterations = [together.iterations[layer]]
        call = Call([weight], u, v, [0] * len(e), dims, iterations, [1.0], v_first=v_first)
        alone.append(call.run([weight]))
    result = together.run(together.weights)
    for name in ("normalized", "gradients", "sigmas"):
        expected = [x for own in alone for x in getattr(own, name)]
        assert all(map(torch.equal, getattr(result, name), expected))


def test_same_bits_when_several_threads_call_at_once():
    calls = [large_call(v_first) for v_first in (False, True, False)]
    grads = [gradients_for(call) for call in calls]
    expected = [call.run(g) for call, g in zip(calls, grads, strict=True)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            for result, wanted in zip(pool.map(Call.run, calls, grads), expected, strict=True):
                assert_same(result, wanted)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if isa == ops._C.cpu_capability():
        pytest.skip(f"{isa} is what all other tests run on")
    best = torch.backends.cpu.get_cpu_capability().lower()
    if isa != "baseline" and not (best.startswith("avx") and isa <= best):
        pytest.skip(f"the best of this machine is {best}, less than {isa}")
    environment = {**os.environ, "FASTSN_CPU_CAPABILITY": isa, "FASTSN_CPU_CACHE_MB": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qp", "no:cacheprovider", "-k", "TestNumbers", __file__],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


# What the operators do to tensors


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_versions_count_iterations(iterations):
    call = make_call([random(4, 3), random(4, 3, 2)], 0, "bidirectional", [iterations, 1])
    tensors = [*call.weights, call.u[0], call.v[0], call.u[1], call.v[2]]
    before = [x._version for x in tensors]
    call.power()
    call.estimate()
    steps = [x._version - version for x, version in zip(tensors, before, strict=True)]
    assert steps == [0, 0, iterations, iterations, 1, 1]


def test_inference_mode():
    call = make_call([random(4, 3)])
    grads = gradients_for(call)
    expected = call.run(grads)
    call.weights[0].requires_grad_()
    with torch.inference_mode():
        assert_same(call.run(grads), expected)
        inside = replace(call, u=[call.u[0].clone()], v=[call.v[0].clone()])
        assert inside.u[0].is_inference() and inside.power().is_inference()
        assert not call.scale(call.estimate())[0].requires_grad


@pytest.mark.parametrize("shape", [(6, 5), (300, 300)], ids=["small", "large"])
def test_results_keep_their_memory_to_themselves(shape):
    call = make_call([random(*shape), random(*shape)])
    snapshot = call.power()
    results = [x for _ in range(3) for x in call.scale(snapshot)]
    assert len({x.data_ptr() for x in [*results, *call.weights]}) == 8
    kept, array = results[0].clone(), results[0].numpy()
    del results
    # What follows may take over the memory of the others, but not that of a result in use.
    for _ in range(3):
        for other in call.scale(snapshot):
            other.fill_(torch.nan)
    assert torch.equal(torch.from_numpy(array), kept)
    grown = call.scale(snapshot)[0].resize_(2 * shape[0], shape[1])
    assert torch.equal(grown[: shape[0]], kept)


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_of_power(changes, message):
    call = make_call([random(4, 3), random(2, 5)])
    before = call.copy()
    with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
        replace(call, **changes).power()
    for a, b in zip(before.u + before.v, call.u + call.v, strict=True):
        assert torch.equal(a, b)


def test_bad_arguments_of_scale():
    call = make_call([random(4, 3), random(2, 5)])
    snapshot = call.power()
    for bad in (snapshot[:-1], snapshot.double(), torch.stack([snapshot, snapshot], 1)[:, 0]):
        with pytest.raises(RuntimeError, match="contiguous Float snapshot of 16 .*, got"):
            call.scale(bad)
    with pytest.raises(RuntimeError, match="expected 2 scales, got 1"):
        replace(call, scales=[1.0]).scale(snapshot)
    for bad in ([random(4, 3)], [random(4, 3), random(5, 2)], [random(4, 3), random(2, 5).int()]):
        with pytest.raises(RuntimeError, match="expected (2 gradients|a floating .* of shape)"):
            call.scale_backward(bad, snapshot)


# Results of another type


@pytest.mark.parametrize("out", ALL_TYPES, ids=str)
@each_type
def test_results_of_another_type(dtype, out):
    """As autocast wants them: one rounding forward; gradients in the weights' types again."""
    weights = [random(6, 5).to(dtype), random(4, 3, 3, 3).to(dtype).requires_grad_()]
    call = make_call([w.detach() for w in weights], norm="bidirectional", scales=[1.0, 0.5])
    snapshot = call.estimate()
    ours = ops.scale(weights, snapshot, *call.constraint(), out)
    expected = reference.scale(weights, snapshot, *call.constraint(), out)
    assert [x.dtype for x in ours] == [out, out]
    close = {"rtol": 4 * torch.finfo(out).eps, "atol": 1e-6}
    torch.testing.assert_close(ours, expected, **close)
    (theirs,) = torch.autograd.grad(expected[1].float().square().sum(), weights[1])
    (gradient,) = torch.autograd.grad(ours[1].float().square().sum(), weights[1])
    assert gradient.dtype == dtype
    rounding = max(torch.finfo(dtype).eps, torch.finfo(out).eps)
    torch.testing.assert_close(gradient, theirs, rtol=16 * rounding, atol=4 * rounding)


def test_results_of_another_type_compile():
    call = make_call([random(6, 5)])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(snapshot):
        return ops.scale(call.weights, snapshot, *call.constraint(), torch.bfloat16)

    snapshot = call.estimate()
    (expected,) = reference.scale(call.weights, snapshot, *call.constraint(), torch.bfloat16)
    assert torch.equal(run(snapshot)[0], expected)
