"""patch_mean, patch_mean_backward and mean_bias on a GPU: every back-end that runs there, against
fp64 on the CPU.

`gpu_fixtures` says which back-ends these are.
"""

from __future__ import annotations

from random import Random

import pytest
import torch

from fastsn import ops
from helpers import gpu_fixtures, means_calls
from helpers.calls import ALL_TYPES, each_type, random
from helpers.gpu_fixtures import DEVICE, IS_GPU, OnDevice, needs_gpu
from helpers.gpu_tensors import on_device
from helpers.means_calls import conv, make_channels_last, random_geometry
from helpers.means_checks import (
    INPUTS,
    check_backward,
    check_bias,
    check_mean,
    each_format,
)

gpu_fixtures.skip_without_gpu()
pytestmark = gpu_fixtures.pytestmark
backend, exact_products = gpu_fixtures.backend, gpu_fixtures.exact_products
many_threads = gpu_fixtures.many_threads


class OperatorsOnDevice(OnDevice):
    """Takes tensors on the CPU, and gives some back."""

    def __getattr__(self, name):
        def call(*arguments):
            results = self._call(name, *arguments)
            many = isinstance(results, tuple)
            for x in results if many else [results]:
                assert x.device.type == DEVICE.type
            return tuple(x.cpu() for x in results) if many else results.cpu()

        return call


@pytest.fixture
def there(backend, many_threads):
    """The operators, computing on the device."""
    return OperatorsOnDevice(backend)


@pytest.mark.parametrize("seed", range(8))
def test_random_geometries(seed, there):
    rng = Random(seed)
    for _ in range(30):
        geometry = random_geometry(rng)
        dtype, layout = rng.choice(ALL_TYPES), rng.choice(list(means_calls.LAYOUTS.values()))
        average, channels_last = rng.random() < 0.7, rng.random() < 0.5
        input = layout(random(*geometry.input_size, dtype=dtype))
        patches = check_mean(there, geometry, input, average)
        grad = torch.randn_like(patches)
        check_backward(there, geometry, grad, dtype, channels_last, average)
        gain, beta = (
            rng.choice([None, random(geometry.out_channels, dtype=rng.choice(ALL_TYPES))])
            for _ in range(2)
        )
        weight = random(*geometry.weight_shape, dtype=dtype)
        check_bias(there, weight, grad, gain, beta, geometry.groups, geometry.transposed)


LARGE = [(64, 32, 32, 32), (64, 512, 4, 4), (2, 64, 112, 112), (1024, 512), (4, 8, 20_000)]


@each_format
@each_type
@pytest.mark.parametrize("size", INPUTS + LARGE * IS_GPU, ids=str)
def test_sizes(size, dtype, channels_last, there):
    input = random(*size, dtype=dtype)
    input = make_channels_last(input) if channels_last else input
    # The reference compares every position with every other one.
    kernel_size = (1 if max(size[2:], default=1) > 1000 else 3,) * (len(size) - 2)
    geometry = conv(size, kernel_size, padding=kernel_size[-1] // 2 if kernel_size else 0)
    patches = check_mean(there, geometry, input)
    check_backward(there, geometry, patches.clone(), dtype, channels_last)
    weight = random(10, *patches.shape, dtype=dtype)
    check_bias(there, weight, patches, random(10), random(10))


@each_format
def test_same_bits_at_every_run_wherever_memory_lies(channels_last):
    noise = []
    for size in INPUTS:
        input = make_channels_last(random(*size)) if channels_last else random(*size)
        geometry = conv(size, 3, padding=1)
        arguments = geometry.mean_args(on_device(input, DEVICE))
        expected = ops.patch_mean(*arguments)
        weight = torch.randn(5, *expected.shape, device=DEVICE)
        bias, _ = ops.mean_bias(weight, expected, None, None, 1, False)
        for i in range(5):
            # What is free, and where, differs from run to run, and holds other numbers.
            noise.append(torch.randn(1 + 4099 * i, device=DEVICE))
            assert torch.equal(ops.patch_mean(*arguments), expected)
            assert torch.equal(ops.mean_bias(weight, expected, None, None, 1, False)[0], bias)
        del noise[::2]


@needs_gpu
def test_a_graph_captures_a_call(backend):
    if backend == "reference":
        pytest.skip("the reference copies from the host")
    geometry = conv((64, 16, 8, 8), (3, 3), padding=1)
    input = torch.randn(64, 16, 8, 8, device=DEVICE)
    weight, beta = torch.randn(10, 16, 3, 3, device=DEVICE), torch.randn(10, device=DEVICE)

    def run():
        patches = ops.patch_mean(*geometry.mean_args(input))
        bias, mean = ops.mean_bias(weight, patches, None, beta, 1, False)
        return bias, mean, ops.patch_mean_backward(*geometry.backward_args(patches, torch.float32))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    input.normal_()
    graph.replay()
    expected = run()
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


@needs_gpu
@each_format
def test_more_elements_than_32_bits_count(channels_last, backend):
    samples, channels, length = 9, 4096, 65_536
    assert samples * channels * length > 2**31
    if backend == "reference":
        pytest.skip("the reference makes copies in fp32, which is too much")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 32e9:
        pytest.skip(f"needs 32 GB of GPU memory, {free / 1e9:.0f} GB are free")
    shape = (samples, length, channels) if channels_last else (samples, channels, length)
    memory = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
    input = memory.movedim(-1, 1) if channels_last else memory
    patches = ops.patch_mean(*conv(input.shape, (1,)).mean_args(input))
    expected = torch.zeros(channels, dtype=torch.float64, device=DEVICE)
    for sample in input:
        for part in sample.chunk(64, dim=1):
            expected += part.double().sum(1)
    expected /= samples * length
    torch.testing.assert_close(patches[:, 0].double(), expected, rtol=1e-4, atol=1e-7)
