"""The operators on a GPU: every back-end that runs there, against fp64 on the CPU.

`gpu_fixtures` says which back-ends these are.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from benchmarks import networks
from fastsn import reference
from fastsn.functional import init_vectors, spectral_norm
from helpers import gpu_fixtures, operator_numbers
from helpers.calls import (
    ALL_TYPES,
    LAYOUTS,
    Call,
    Results,
    assert_same,
    each_order,
    make_call,
    random,
)
from helpers.gpu_fixtures import (
    DEVICE,
    OnDevice,
    device_gradients,
    double,
    mixed_call,
    moved,
    needs_gpu,
    operators,
)
from helpers.gpu_tensors import on_device

gpu_fixtures.skip_without_gpu()
pytestmark = gpu_fixtures.pytestmark
backend, exact_products = gpu_fixtures.backend, gpu_fixtures.exact_products
many_threads = gpu_fixtures.many_threads

# The numbers


class TestNumbers(operator_numbers.OperatorNumbers):
    """All that the CPU's kernels are held to: sizes, types, orders, strides, methods, NaN in
    fresh memory."""

    @pytest.fixture(autouse=True)
    def backend_on_device(self, monkeypatch, backend, many_threads):
        monkeypatch.setattr(operator_numbers, "ops", OnDevice(backend))

    def test_vectors_that_are_not_contiguous(self, backend):
        call = moved(make_call([random(9, 70), random(7, 3)]))
        strided = call.copy()
        strided.u, strided.v = (
            [torch.stack([x, x], dim=1)[:, 0] for x in side] for side in (call.u, call.v)
        )
        own = operators(backend)
        torch.testing.assert_close(strided.power(own), call.power(own))
        for a, b in zip(strided.u + strided.v, call.u + call.v, strict=True):
            assert a.stride() == (2,)
            torch.testing.assert_close(a, b)

    @each_order
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    @pytest.mark.parametrize("name", ["SNDCGAN D", "SN-ResNet D", "48 x 64x64"])
    def test_networks(self, name, norm, dtype, v_first):
        weights = [layer.weight.detach() for layer in networks.layers(networks.NETWORKS[name]())]
        call = make_call([w.to(dtype) for w in weights], norm=norm)
        operator_numbers.check(replace(call, v_first=v_first))

    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    def test_a_quarter_of_biggan(self, norm):
        with torch.device("meta"):
            plain = networks.BigGANDiscriminator(width=1 / 2)
        weights = [random(*layer.weight.shape) for layer in networks.layers(plain)]
        operator_numbers.check(make_call(weights, norm=norm, scales=[1.5] * len(weights)))

    @each_order
    def test_hundreds_of_layers(self, v_first):
        shapes = [(3, 5), (8, 8), (1, 17), (33, 2), (4, 3, 3), (16, 4, 1, 1)]
        weights = [random(*shapes[i % 6], dtype=ALL_TYPES[1 + i % 3]) for i in range(700)]
        iterations = [i % 3 for i in range(700)]
        call = make_call(weights, 0, "bidirectional", iterations)
        operator_numbers.check(replace(call, v_first=v_first))

    @each_order
    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("shape", [(4096, 4096), (2, 3_000_001), (3_000_001, 2)], ids=str)
    def test_large_matrices(self, shape, dim, v_first):
        operator_numbers.check(make_call([random(*shape)], dim, v_first=v_first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_in_the_type_asked_for(backend, dtype):
    """As under autocast: rounded once, gradients in the weight's own type."""
    shapes = [(64, 3, 3, 3), (9, 70), (3, 5)]
    weights = [random(*shape, dtype=t) for shape, t in zip(shapes, ALL_TYPES[1:], strict=True)]
    call, own = moved(make_call(weights)), operators(backend)
    snapshot = call.power(own)
    arguments = (call.weights, snapshot, *call.constraint())
    results = own.scale(*arguments, dtype)
    wide = own.scale(*arguments, torch.float32)
    assert [r.dtype for r in results] == [dtype] * 3
    for result, other in zip(results, wide, strict=True):
        assert torch.equal(result, other.to(dtype))
    grads = [torch.randn_like(r) for r in results]
    actual = call.scale_backward(grads, snapshot, own)
    expected = call.scale_backward([g.float() for g in grads], snapshot, reference)
    for a, e, weight in zip(actual, expected, call.weights, strict=True):
        assert a.dtype == weight.dtype and a.shape == weight.shape
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_results_have_the_strides_of_a_quotient(backend, layout):
    weight = on_device(layout(random(6, 5, 3, 4)), DEVICE)
    call, own = moved(make_call([layout(random(6, 5, 3, 4))])), operators(backend)
    snapshot = call.power(own)
    results = call.scale(snapshot, own), call.scale_backward([weight.clone()], snapshot, own)
    for (result,) in results:
        assert result.stride() == (weight / 2.0).stride()


@needs_gpu
def test_more_elements_than_32_bits_count(backend):
    """Against fp64, a block of rows at a time: u, v, sigma, the weight and its gradient."""
    rows, cols, block = 65_537, 32_768, 4096
    assert rows * cols > 2**31
    if backend == "reference":
        pytest.skip("the reference makes several copies in fp32, which is too much")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 32e9:
        pytest.skip(f"needs 32 GB of GPU memory, {free / 1e9:.0f} GB are free")
    weight = torch.empty(rows, cols, dtype=torch.bfloat16, device=DEVICE).normal_()
    gradient = torch.empty_like(weight).normal_()
    blocks = [slice(i, min(i + block, rows)) for i in range(0, rows, block)]
    v0 = F.normalize(torch.randn(cols, dtype=torch.float64, device=DEVICE), dim=0)

    s = torch.cat([weight[b].double() @ v0 for b in blocks])
    u = s / s.norm()
    t = sum(weight[b].double().T @ u[b] for b in blocks)
    v, sigma = t / t.norm(), t.norm()
    along = sum((gradient[b].double() * weight[b]).sum() for b in blocks)

    live_u = torch.zeros(rows, device=DEVICE)
    live_v = v0.float()
    call = Call([weight], [live_u], [live_v], [0], [0], [1], [1.0])
    snapshot = call.power()
    (result,) = call.scale(snapshot)
    (change,) = call.scale_backward([gradient], snapshot)
    torch.testing.assert_close(live_u.double(), u, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(live_v.double(), v, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(snapshot[-1].double(), sigma, rtol=1e-5, atol=0)
    for b in blocks:
        wanted = weight[b].double() / sigma
        torch.testing.assert_close(result[b].double(), wanted, rtol=1e-2, atol=0)
        exact = (gradient[b] - along / sigma * torch.outer(u[b], v)) / sigma
        torch.testing.assert_close(change[b].double(), exact, rtol=1e-2, atol=1e-6)


# The same bits


@each_order
def test_same_bits_at_every_run_wherever_memory_lies(backend, v_first):
    call, own = mixed_call(v_first), operators(backend)
    grads = device_gradients(call)
    expected = call.run(grads, own)
    noise = []
    for i in range(20):
        # What is free, and where, differs from run to run, and holds other numbers.
        noise.append(torch.randn(1 + 4099 * i, device=DEVICE))
        if i % 5 == 4:
            del noise[::2]
        assert_same(call.run(grads, own), expected)


@each_order
def test_same_bits_alone_or_among_others(backend, v_first):
    together, own = mixed_call(v_first), operators(backend)
    result = together.run(together.weights, own)
    alone: list[Results] = []
    for layer, weight in enumerate(together.weights):
        e = [e for e, other in enumerate(together.layers) if other == layer]
        u, v, dims = ([side[i] for i in e] for side in (together.u, together.v, together.dims))
        iterations = [together.iterations[layer]]
        call = Call([weight], u, v, [0] * len(e), dims, iterations, [1.0], v_first=v_first)
        alone.append(call.run([weight], own))
    for name in ("normalized", "gradients", "sigmas"):
        expected = [x for own in alone for x in getattr(own, name)]
        assert all(map(torch.equal, getattr(result, name), expected))


# Gradients


@double
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
@pytest.mark.parametrize("bound", [False, True])
def test_gradients_and_their_gradients(norm, bound):
    weights = [torch.randn(s, device=DEVICE, requires_grad=True) for s in ((3, 2, 2), (2, 3))]
    u, v = [], []
    for weight in weights:
        for side, drawn in zip((u, v), init_vectors(weight, norm=norm), strict=True):
            side += drawn

    def normalize(*weights):
        # Without iterations u and v are constants, as the gradient takes them to be.
        arguments = (list(weights), u, v)
        options = {"norm": norm, "scale": 0.7, "bound": bound, "n_power_iterations": 0}
        return tuple(spectral_norm(*arguments, **options)[0])

    assert gradcheck(normalize, weights)
    assert gradgradcheck(normalize, weights)
