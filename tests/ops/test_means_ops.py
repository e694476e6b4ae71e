"""patch_mean, patch_mean_backward and mean_bias against `fastsn.reference`.

`TestNumbers` runs once more for every instruction set, in a process of its own. Other back-ends'
tests put theirs in the place of `ops`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from fastsn import ops, reference
from helpers.calls import ALL_TYPES, each_type
from helpers.means_calls import LAYOUTS, conv, linear, make_channels_last, random_geometry
from helpers.means_checks import check_backward, check_bias, check_mean

each_seed = pytest.mark.parametrize("seed", range(4))
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


# Long sums; many tiles, cut along channels, positions and samples; chunks of lines, and of one.
LARGE = {
    "wide": conv([16, 40, 32, 32], 3, padding=1),
    "few-channels": conv([64, 3, 32, 32], 3, padding=1),
    "one-sample": conv([1, 5, 224, 224], 3, padding=1),
    "one-pixel": conv([70, 600, 1, 1], 1),
    "strided": conv([9, 70, 33, 31], 4, stride=2, padding=1),
    "skipped": conv([9, 70, 33, 70], 1, stride=2),
    "long": conv([2, 3, 5000], 2, stride=3, dilation=2),
    "long-lines": conv([4, 9000, 3], 3, padding=1),
    "whole-image": conv([20, 64, 9, 9], 9),
    "volume": conv([2, 6, 20, 21, 22], 3, padding=1),
    "transposed": conv([16, 40, 20, 20], 4, stride=2, padding=1, transposed=True),
    "many-samples": linear(100_000, 6),
    "linear": linear(300, 1000),
}


@pytest.mark.usefixtures("poisoned_memory")
class TestNumbers:
    def test_capability_is_the_one_asked_for(self):
        asked = os.environ.get("FASTSN_CPU_CAPABILITY")
        assert ops._C.cpu_capability() == asked or asked is None

    @each_seed
    def test_any_convolution(self, seed):
        rng = Random(seed)
        for _ in range(60):
            geometry = random_geometry(rng)
            for dtype in rng.sample(ALL_TYPES, 2):
                layout = rng.choice([*LAYOUTS.values()])
                input = layout(torch.randn(geometry.input_size).to(dtype))
                check_mean(ops, geometry, input, rng.random() < 0.8)

    @each_seed
    def test_any_gradient(self, seed):
        rng = Random(seed)
        for _ in range(60):
            geometry = random_geometry(rng)
            grad = torch.randn(geometry.input_size[1], *geometry.kernel_size)
            for dtype in ALL_TYPES:
                grad = grad.to(rng.choice(ALL_TYPES))
                last, average = rng.random() < 0.5, rng.random() < 0.8
                check_backward(ops, geometry, grad, dtype, last, average)

    @each_seed
    def test_any_bias(self, seed):
        rng = Random(seed)
        for _ in range(60):
            geometry = random_geometry(rng)
            layout = LAYOUTS[rng.choice(["contiguous", "channels_last", "reversed", "every-other"])]
            weight = layout(torch.randn(geometry.weight_shape).to(rng.choice(ALL_TYPES)))
            patches = torch.randn(geometry.input_size[1], *geometry.kernel_size)
            patches = layout(patches[None])[0].to(reference.accumulate_type(weight))
            gain, beta = (
                rng.choice([None, torch.randn(geometry.out_channels).to(rng.choice(ALL_TYPES))])
                for _ in range(2)
            )
            check_bias(ops, weight, patches, gain, beta, geometry.groups, geometry.transposed)

    @each_seed
    def test_mean_of_the_convolution(self, seed):
        """What torch's convolution yields, averaged, is what mean_bias says; without, its sum."""
        rng = Random(seed)
        for _ in range(60):
            geometry = random_geometry(rng)
            input, weight = (
                torch.randn(shape, dtype=torch.float64)
                for shape in (geometry.input_size, geometry.weight_shape)
            )
            output = geometry.convolve(input, weight)
            assert list(output.shape[2:]) == geometry.output_size
            shape = geometry.groups, geometry.transposed
            over = [0, *range(2, output.dim())]
            for average, expected in ((True, output.mean(over)), (False, output.sum(over))):
                patches = ops.patch_mean(*geometry.mean_args(input, average))
                bias, mean = ops.mean_bias(weight, patches, None, None, *shape)
                torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-11)
                torch.testing.assert_close(bias, -expected, rtol=1e-12, atol=1e-11)

    @each_type
    @pytest.mark.parametrize("geometry", LARGE.values(), ids=LARGE.keys())
    def test_large(self, geometry, dtype):
        # A mean that is not small beside the values, and one of half of all values' sign.
        input = torch.rand(geometry.input_size).to(dtype)
        check_mean(ops, geometry, input)
        check_mean(ops, geometry, make_channels_last(input - 0.5))
        patches = torch.randn(geometry.input_size[1], *geometry.kernel_size)
        for last in (False, True):
            check_backward(ops, geometry, patches, dtype, last)

    @pytest.mark.parametrize("layout", [lambda x: x, make_channels_last], ids=["plain", "last"])
    def test_equal_values(self, layout):
        """Sums of equal terms: their roundings add up instead of cancelling."""
        for geometry in (linear(100_000, 20), conv([3, 4, 300, 300], 3), conv([1, 2, 300_000], 3)):
            input = layout(torch.full(geometry.input_size, 0.1))
            actual = ops.patch_mean(*geometry.mean_args(input))
            torch.testing.assert_close(actual, torch.full_like(actual, 0.1), rtol=2e-5, atol=0)

    @each_type
    @each_layout
    def test_layouts(self, layout, dtype):
        for size in ([5, 7], [5, 7, 9], [5, 70, 6, 9], [5, 1, 6, 9], [5, 7, 1, 1], [3, 7, 4, 5, 6]):
            geometry = conv(size, 3, padding=1)
            check_mean(ops, geometry, layout(torch.randn(size).to(dtype)))

    def test_results_have_the_shape_of_patches(self):
        geometry = conv([2, 3, 5, 6], 2)
        patches = ops.patch_mean(*geometry.mean_args(torch.randn(2, 3, 5, 6).bfloat16()))
        assert patches.shape == (3, 2, 2) and patches.dtype == torch.float32
        assert patches.is_contiguous()

    @pytest.mark.parametrize(
        "size", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str
    )
    @pytest.mark.parametrize("average", [False, True])
    def test_empty(self, size, average):
        args = conv(list(size), 3, padding=2).mean_args(torch.ones(size), average)
        expected = reference.patch_mean(*args)
        torch.testing.assert_close(ops.patch_mean(*args), expected, equal_nan=True)
        args = conv(list(size), 3, padding=2).backward_args(torch.ones(size[1], 3, 3), torch.half)
        expected = reference.patch_mean_backward(*args)
        torch.testing.assert_close(ops.patch_mean_backward(*args), expected, equal_nan=True)

    def test_taps_that_meet_nothing(self):
        for last in (False, True):
            geometry = conv([2, 3, 2, 2], 3, padding=4, dilation=4)  # only the centre does
            input = torch.randn(2, 3, 2, 2)
            check_mean(ops, geometry, make_channels_last(input) if last else input)
            check_backward(ops, geometry, torch.randn(3, 3, 3), torch.float32, last)
        for input in (torch.ones(2, 3, 1, 1), torch.ones(2, 3, 2, 1), torch.ones(2, 3, 1, 2)):
            geometry = conv([*input.shape], 1, stride=9, padding=3)  # no tap does
            assert not ops.patch_mean(*geometry.mean_args(input)).any()
            grad = torch.ones(3, 1, 1)
            for last in (False, True):
                args = geometry.backward_args(grad, torch.float32, last)
                assert not ops.patch_mean_backward(*args).any()

    def test_bias_without_elements(self):
        for shape, patches in (((0, 3, 2), (3, 2)), ((4, 0, 2), (0, 2)), ((4, 3, 0), (3, 0))):
            weight, gain, beta = torch.ones(shape), torch.ones(shape[0]), torch.rand(shape[0])
            bias, mean = ops.mean_bias(weight, torch.ones(patches), gain, beta, 1, False)
            assert torch.equal(bias, beta) and torch.equal(mean, torch.zeros(shape[0]))

    @pytest.mark.parametrize("layout", [lambda w: w, make_channels_last], ids=["plain", "last"])
    @each_type
    def test_large_weights(self, layout, dtype):
        for shape, groups in (((200, 90, 3, 3), 1), ((200, 90, 3, 3), 4), ((300, 1, 5), 300)):
            weight = layout(torch.randn(shape).to(dtype))
            for transposed in (False, True):
                rows, cols = shape[1] * groups, shape[0]
                channels, out = (cols, rows) if transposed else (rows, cols)
                gain, beta = torch.randn(2, out)
                check_bias(
                    ops, weight, torch.randn(channels, *shape[2:]), gain, beta, groups, transposed
                )


# Results depend on shapes and strides only


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("geometry", LARGE.values(), ids=LARGE.keys())
def test_same_bits_on_any_number_of_threads(geometry, last):
    input = torch.randn(geometry.input_size)
    input = make_channels_last(input) if last else input
    grad = torch.randn(geometry.input_size[1], *geometry.kernel_size)
    weight = torch.randn(geometry.weight_shape)

    def run() -> list[Tensor]:
        patches = ops.patch_mean(*geometry.mean_args(input))
        back = ops.patch_mean_backward(*geometry.backward_args(grad, torch.bfloat16, last))
        return [patches, back, *ops.mean_bias(weight, patches, None, None, 1, geometry.transposed)]

    expected = run()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if isa == ops._C.cpu_capability():
        pytest.skip(f"{isa} is what all other tests run on")
    best = torch.backends.cpu.get_cpu_capability().lower()
    if isa != "baseline" and not (best.startswith("avx") and isa <= best):
        pytest.skip(f"the best of this machine is {best}, less than {isa}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qp", "no:cacheprovider", "-k", "TestNumbers", __file__],
        env={**os.environ, "FASTSN_CPU_CAPABILITY": isa},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


# Errors

X, W, P = torch.ones(2, 4, 5, 5), torch.ones(6, 4, 3, 3), torch.ones(4, 3, 3)
ONE = [1, 1]
BAD_MEAN = {
    "dimensions": ((X, [3], [1], [0], [1], [3], False, True),
                   r"of 3 dimensions \(N, C, \*size\) for .* \[3\], got shape \[2, 4, 5, 5\]"),
    "list": ((X, [3, 3], [1], [0, 0], ONE, [3, 3], False, True), "expected 2 entries, .*, got 1"),
    "kernel": ((X, [3, 0], ONE, [0, 0], ONE, [3, 3], False, True),
               "positive kernel_size, .*, got 0, 1, 1 and 3"),
    "stride": ((X, [3, 3], [0, 1], [0, 0], ONE, [3, 3], False, True), ".*, got 3, 0, 1 and 3"),
    "output": ((X, [3, 3], ONE, [0, 0], ONE, [3, -1], False, True), ".*, got 3, 1, 1 and -1"),
    "type": ((X.int(), [3, 3], ONE, [0, 0], ONE, [3, 3], False, True),
             "input must be float64, .*, got Int"),
    "too many": ((torch.ones([1] * 6), [1] * 4, [1] * 4, [0] * 4, [1] * 4, [1] * 4, False, True),
                 "at most 3 spatial dimensions, got 4"),
}  # fmt: skip
BAD_BACKWARD = {
    "channels": ((P, [2, 5, 5, 5], ONE, [0, 0], ONE, [3, 3], False, True, torch.half, False),
                 r"\(C, \*kernel_size\) for input_size \[2, 5, 5, 5\], got \[4, 3, 3\]"),
    "dimensions": ((P, [2, 4, 5], ONE, [0, 0], ONE, [3, 3], False, True, torch.half, False),
                   r"for input_size \[2, 4, 5\], got \[4, 3, 3\]"),
    "size": ((P, [2], ONE, [0, 0], ONE, [3, 3], False, True, torch.half, False),
             r"an input_size \(N, C, \*size\), got \[2\]"),
    "type": ((P, [2, 4, 5, 5], ONE, [0, 0], ONE, [3, 3], False, True, torch.int, False),
             "dtype must be float64, .*, got Int"),
    "grad": ((P.int(), [2, 4, 5, 5], ONE, [0, 0], ONE, [3, 3], False, True, torch.half, False),
             "grad must be float64, .*, got Int"),
}  # fmt: skip
BAD_BIAS = {
    "patches": ((W, P[:3], None, None, 1, False),
                r"patches of shape \[4, 3, 3\] .* \[6, 4, 3, 3\] in 1 groups, got \[3, 3, 3\]"),
    "transposed": ((W, P, None, None, 1, True),
                   r"patches of shape \[6, 3, 3\] .*, got \[4, 3, 3\]"),
    "groups": ((W, P, None, None, 4, False), "groups must divide .* weight, 6, got 4"),
    "no groups": ((W, P, None, None, 0, False), "groups must divide .* weight, 6, got 0"),
    "gain": ((W, P, torch.ones(4), None, 1, False), r"a gain of shape \[6\] on cpu, got \[4\]"),
    "beta": ((W, P, None, torch.ones(6, 1), 1, False),
             r"a beta of shape \[6\] on cpu, got \[6, 1\]"),
    "beta's type": ((W, P, None, torch.ones(6).int(), 1, False), "beta must be .*, got Int"),
    "weight": ((W[:, 0, 0, 0], P, None, None, 1, False), r"at least 2 dimensions, got shape \[6\]"),
    "type": ((W.int(), P, None, None, 1, False), "weight must be float64, .*, got Int"),
    "patches' type": ((W, P.int(), None, None, 1, False), "patches must be float64, .*, got Int"),
}  # fmt: skip


@pytest.mark.parametrize("args, message", BAD_MEAN.values(), ids=BAD_MEAN.keys())
def test_bad_arguments_of_patch_mean(args, message):
    with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
        ops.patch_mean(*args)


@pytest.mark.parametrize("args, message", BAD_BACKWARD.values(), ids=BAD_BACKWARD.keys())
def test_bad_arguments_of_patch_mean_backward(args, message):
    with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
        ops.patch_mean_backward(*args)


@pytest.mark.parametrize("args, message", BAD_BIAS.values(), ids=BAD_BIAS.keys())
def test_bad_arguments_of_mean_bias(args, message):
    with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
        ops.mean_bias(*args)
