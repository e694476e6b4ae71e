"""The CUDA kernels of patch_mean, patch_mean_backward and mean_bias in the emulator, against
`fastsn.reference`; how patch_mean is cut into blocks.
"""

from __future__ import annotations

from math import prod
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsn import reference
from helpers import cuda_fixtures, emulated, means_calls
from helpers.calls import ALL_TYPES, each_layout, each_type, random
from helpers.means_calls import conv, make_channels_last, random_geometry
from helpers.means_checks import (
    INPUTS,
    check_backward,
    check_bias,
    check_mean,
    each_format,
)

# Of every test here.
cuda = cuda_fixtures.cuda
pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Numbers


@pytest.mark.parametrize("seed", range(8))
def test_random_geometries(seed, cuda):
    rng = Random(seed)
    for _ in range(60):
        geometry = random_geometry(rng)
        dtype, layout = rng.choice(ALL_TYPES), rng.choice(list(means_calls.LAYOUTS.values()))
        average, channels_last = rng.random() < 0.7, rng.random() < 0.5
        input = layout(random(*geometry.input_size, dtype=dtype))
        patches = check_mean(cuda, geometry, input, average)
        grad = torch.randn_like(patches)
        check_backward(cuda, geometry, grad, dtype, channels_last, average)
        gain, beta = (
            rng.choice([None, random(geometry.out_channels, dtype=rng.choice(ALL_TYPES))])
            for _ in range(2)
        )
        weight = random(*geometry.weight_shape, dtype=dtype)
        check_bias(cuda, weight, grad, gain, beta, geometry.groups, geometry.transposed)


@each_format
@each_type
@pytest.mark.parametrize("size", INPUTS, ids=str)
def test_sizes(size, dtype, channels_last, cuda):
    input = random(*size, dtype=dtype)
    if channels_last:
        input = make_channels_last(input)
    kernel_size = (3, 2, 3)[: len(size) - 2]
    for stride, transposed in [(1, False), (2, False), (2, True)]:
        geometry = conv(size, kernel_size, stride, padding=1, transposed=transposed)
        patches = check_mean(cuda, geometry, input)
        if input.numel() < 20_000:
            check_backward(cuda, geometry, patches.clone(), dtype, channels_last)


@each_format
@each_type
def test_every_alignment(dtype, channels_last, cuda):
    shape = (3, 16, 6, 6)
    geometry = conv(shape, (3, 3), padding=1)
    for offset in range(8):
        flat = random(prod(shape) + offset, dtype=dtype)[offset:]
        input = flat.view(3, 6, 6, 16).movedim(-1, 1) if channels_last else flat.view(shape)
        check_mean(cuda, geometry, input)


@each_format
@pytest.mark.parametrize(
    "size, kernel_size",
    [((2, 3, 100), (300,)), ((1, 33, 40, 35), (31, 31)), ((1, 2, 12, 12, 64), (9, 9, 1))],
    ids=str,
)
def test_large_kernels(size, kernel_size, channels_last, cuda):
    """More taps than are contracted at once, some of which meet few positions."""
    input = make_channels_last(random(*size)) if channels_last else random(*size)
    geometry = conv(size, kernel_size)
    geometry.padding = [length // 2 for length in kernel_size]
    grad = check_mean(cuda, geometry, input).clone()
    check_backward(cuda, geometry, grad, torch.float32, channels_last)


@each_type
def test_many_samples(dtype, cuda):
    """The sum does not lose more than the reference's."""
    for channels in (1, 3, 64):
        geometry = conv((100_000 // channels, channels))
        check_mean(cuda, geometry, random(*geometry.input_size, dtype=dtype) + 10)


def test_taps_that_meet_nothing(cuda):
    geometry = conv((2, 3, 4), (3,), padding=4, dilation=4)
    patches = check_mean(cuda, geometry, random(2, 3, 4))
    assert not patches[:, ::2].any() and patches[:, 1].all()
    far = conv((2, 3, 1), (3,), padding=1)
    assert not check_mean(cuda, far, random(2, 3, 1))[:, ::2].any()
    assert check_backward(cuda, far, random(3, 3), torch.float32).all()


@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 3), (2, 0)], ids=str)
def test_empty_inputs(size, cuda):
    geometry = conv(size, 3, padding=2)
    for average in (False, True):
        arguments = geometry.mean_args(random(*size), average)
        actual, expected = (own.patch_mean(*arguments) for own in (cuda, reference))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if prod(size[1:]) == 0:
        grad = torch.randn_like(actual)
        assert check_backward(cuda, geometry, grad, torch.half).shape == size[1:]


def test_nan_reaches_the_taps_that_meet_it(cuda):
    for size in [(2, 3, 4, 4), (40, 3, 64, 64)]:
        for layout in (torch.clone, make_channels_last):
            input = layout(random(*size))
            input[1, 2, 0, 0] = torch.nan
            patches = cuda.patch_mean(*conv(size, (3, 3), padding=1).mean_args(input))
            expected = torch.zeros(3, 3, 3, dtype=torch.bool)
            expected[2, :2, :2] = True
            assert torch.equal(patches.isnan(), expected)


@each_type
@each_layout
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_of_weights(layout, dtype, transposed, cuda):
    for groups in (1, 2):
        weight = layout(random(6, 4, 3, 6, dtype=dtype))
        shape = (6, 3, 6) if transposed else (4 * groups, 3, 6)
        channels = 4 * groups if transposed else 6
        patches = random(*shape, dtype=torch.promote_types(dtype, torch.float32))
        vectors = random(channels), random(2 * channels)[::2]
        check_bias(cuda, weight, patches, *vectors, groups, transposed)
        check_bias(cuda, weight, patches, groups=groups, transposed=transposed)


@each_type
@pytest.mark.parametrize("shape", [(1, 1), (10, 512), (512, 3), (40, 64, 3, 3), (3, 2, 2, 5, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_sizes_of_weights(shape, dtype, transposed, cuda):
    channels, kernel_size = (reversed(shape[:2]) if transposed else shape[:2]), shape[2:]
    out, inside = channels
    patches = random(inside, *kernel_size, dtype=torch.promote_types(dtype, torch.float32))
    for other in ALL_TYPES:
        gain, beta = random(out, dtype=other), random(out, dtype=dtype)
        check_bias(cuda, random(*shape, dtype=dtype), patches, gain, beta, 1, transposed)


@pytest.mark.parametrize("weight, inside", [((0, 3, 2), 3), ((4, 0, 2), 0), ((2, 3, 0), 3)])
def test_empty_weights(weight, inside, cuda):
    beta = random(weight[0])
    patches = random(inside, weight[2])
    bias, mean = cuda.mean_bias(random(*weight), patches, None, beta, 1, False)
    assert torch.equal(bias, beta) and torch.equal(mean, torch.zeros_like(beta))


# How it is cut

SIZES = st.tuples(*(st.integers(1, most) for most in (3000, 700, 5000, 5000, 10_000)))


# Deterministic: the same examples at every run.
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(sizes=SIZES, channels_last=st.booleans())
def test_every_element_is_in_one_tile_that_fits(sizes, channels_last):
    samples, channels, rows, columns, taps = sizes
    whole = [1, rows, columns, channels] if channels_last else [channels, rows, columns, 1]
    *tile, channel_tiles, row_tiles, column_tiles, slices, packs, width = (
        emulated.backend().patch_plan(samples, *whole, taps)
    )
    counts = [-(-all // own) for all, own in zip(whole, tile, strict=True)]
    assert [counts[0] * counts[3], counts[1], counts[2]] == [channel_tiles, row_tiles, column_tiles]
    assert all(1 <= own <= all for own, all in zip(tile, whole, strict=True))
    # What a block has in shared memory, with the sums of all its threads side by side.
    step = 4 if packs else 1
    assert width & (width - 1) == 0 and width <= 256
    assert prod(tile) <= 2048 and 256 // width * prod(tile) <= 2048
    assert width == 256 or width * step >= prod(tile)
    # A part of a dimension has one index of all slower ones.
    if tile[1:3] != whole[1:3]:
        assert tile[0] == 1 and (tile[2] == columns or tile[1] == 1)
    assert 1 <= slices <= max(1, samples // 4)
    if packs:
        assert prod(whole) % 4 == 0
        for first in (0, 1, 2, 3):
            if tile[first] < whole[first]:
                assert tile[first] * prod(whole[first + 1 :]) % 4 == 0
        assert tile[3] == whole[3] or (tile[3] % 4 == 0 and whole[3] % 4 == 0)


@pytest.mark.parametrize(
    "size, taps",
    [((64, 32, 32, 32), 9), ((128, 64, 16, 16), 9), ((64, 128, 8, 8), 9), ((64, 512, 4, 4), 9),
     ((64, 3, 32, 32), 9), ((1, 64, 224, 224), 49), ((128, 512, 1, 1), 1), ((1024, 3, 1, 1), 1)],
)  # fmt: skip
@each_format
def test_usual_sizes_occupy_a_gpu(size, taps, channels_last, cuda):
    samples, channels, *image = size
    inner, outer = (channels, 1) if channels_last else (1, channels)
    plan = cuda.patch_plan(samples, outer, *image, inner, taps)
    assert prod(plan[4:8]) >= 132
    # What is read comes in packs.
    assert plan[8] or channels == 3


# Results depend on shapes and strides only


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_in_every_order(dtype, cuda):
    runs = []
    for size in [(16, 6, 32, 32), (9, 130), (2, 64, 300), (1, 1, 20, 17, 24)]:
        geometry = conv(size, 3, padding=1)
        for layout in (torch.clone, make_channels_last):
            input = layout(random(*size, dtype=dtype))
            grad = random(size[1], *geometry.kernel_size, dtype=dtype)
            weight = layout(random(5, *grad.shape, dtype=dtype))

            def run(geometry=geometry, input=input, grad=grad, weight=weight):
                return [
                    cuda.patch_mean(*geometry.mean_args(input)),
                    cuda.patch_mean_backward(*geometry.backward_args(grad, dtype)),
                    *cuda.mean_bias(weight, grad, None, None, 1, False),
                ]

            runs.append((run, run()))
    for order in ("reversed", "random:1", "random:2", "random:3", "reversed,random:4"):
        with emulated.order(order):
            for run, expected in runs:
                assert all(map(torch.equal, run(), expected))
