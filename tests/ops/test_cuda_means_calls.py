"""What calls of patch_mean, patch_mean_backward and mean_bias do besides their numbers, in the
emulator: the memory that they touch, their launches, their failures, and the arguments that they
refuse.
"""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from helpers import cuda_fixtures, emulated
from helpers.calls import each_type, random
from helpers.cuda_fixtures import OUT_OF_MEMORY, guarded_memory, launches, misaligned, within
from helpers.means_calls import conv, make_channels_last
from helpers.means_checks import INPUTS, check_mean, each_format

# Of every test here.
cuda = cuda_fixtures.cuda
pytestmark = pytest.mark.usefixtures("poisoned_memory")


# What the operators do to memory


@each_type
@each_format
def test_nothing_else_is_read_or_written(dtype, channels_last, cuda):
    """Outside of what is given is NaN; results and workspaces are in guarded memory."""
    wide = torch.promote_types(dtype, torch.float32)
    for size in [(9, 6, 32, 12), (16, 33, 7, 5), (70, 40), (2, 3, 4100)]:
        input = random(*size, dtype=dtype)
        input = make_channels_last(input) if channels_last else input
        geometry = conv(size, 3, stride=2, padding=1)
        grad = random(size[1], *geometry.kernel_size, dtype=wide)
        weight = random(5, *grad.shape, dtype=dtype)
        vectors = random(5), random(5)
        expected = check_mean(cuda, geometry, input)
        given = [within(x) for x in (input, grad, weight, *vectors)]
        with guarded_memory(cuda):
            patches = cuda.patch_mean(*geometry.mean_args(given[0]))
            assert torch.equal(patches, expected)
            change = cuda.patch_mean_backward(
                *geometry.backward_args(given[1], dtype, channels_last)
            )
            bias, mean = cuda.mean_bias(given[2], given[1], *given[3:], 1, False)
            assert not any(x.isnan().any() for x in (change, bias, mean))
            del patches, change, bias, mean
        for x, before in zip(given, (input, grad, weight, *vectors), strict=True):
            around = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            assert around[:64].isnan().all() and around[-64:].isnan().all()
            assert torch.equal(x, before)


def test_inputs_are_not_copied(cuda):
    """In both memory formats they are read where they lie, which then is an error."""
    for size in [(4, 6), (4, 6, 5), (4, 6, 5, 5), (4, 6, 3, 5, 5)]:
        arguments = conv(size).mean_args(random(*size))[1:]
        for layout in (torch.clone, make_channels_last):
            input = layout(random(*size))
            with pytest.raises(RuntimeError, match="misaligned access"):
                cuda.patch_mean(misaligned_alike(input), *arguments)
        # With the samples innermost: a copy is in order.
        input = random(*size).movedim(0, -1).contiguous().movedim(-1, 0)
        expected = cuda.patch_mean(input, *arguments)
        assert torch.equal(cuda.patch_mean(misaligned_alike(input), *arguments), expected)


# Launches and failures


def misaligned_alike(x: Tensor) -> Tensor:
    """A copy with the same strides, one byte off."""
    dense = torch.empty(x.numel(), dtype=x.dtype).as_strided(x.shape, x.stride()).copy_(x)
    memory = misaligned(dense.as_strided((x.numel(),), (1,)))
    return memory.as_strided(x.shape, x.stride())


@pytest.mark.parametrize("size", INPUTS, ids=str)
def test_launches_of_patch_mean(size, cuda):
    """A second one where a result has several partial sums."""
    rows, columns = prod(size[2:-1]), prod(size[2:][-1:])
    plan = cuda.patch_plan(size[0], size[1], rows, columns, 1, 1)
    arguments = conv(size).mean_args(random(*size))
    assert launches(cuda.patch_mean, *arguments) == (1 if prod(plan[5:8]) == 1 else 2)


@each_type
def test_launches(dtype, cuda):
    geometry = conv((2, 3, 4, 4), (3, 3))
    input, grad = random(2, 3, 4, 4, dtype=dtype), random(3, 3, 3)
    weight, beta = random(5, 3, 3, 3, dtype=dtype), random(5)
    assert launches(cuda.patch_mean, *geometry.mean_args(input)) == 1
    assert launches(cuda.patch_mean_backward, *geometry.backward_args(grad, dtype)) == 1
    assert launches(cuda.mean_bias, weight, grad, None, beta, 1, False) == 1


def phases(cuda, x, grad, weight) -> dict:
    geometry = conv((64, 3, 8, 8), (3, 3))
    return {
        "patch_sums": lambda: cuda.patch_mean(*geometry.mean_args(x)),
        "patch_backward": lambda: cuda.patch_mean_backward(
            *geometry.backward_args(grad, torch.float32)
        ),
        "mean_bias": lambda: cuda.mean_bias(weight, grad, None, None, 1, False)[0],
    }


@pytest.mark.parametrize("phase", ["patch_sums", "patch_backward", "mean_bias"])
def test_failed_launch(phase, cuda):
    run = phases(cuda, random(64, 3, 8, 8), random(3, 3, 3), random(5, 3, 3, 3))[phase]
    expected = run()
    emulated.fail_next_launch(OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match=f"fastsn: CUDA kernel '{phase}' .*: out of memory"):
        run()
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("phase", ["patch_sums", "patch_backward", "mean_bias"])
def test_failure_within_a_kernel(phase, cuda):
    given = random(64, 3, 8, 8), random(3, 3, 3), random(5, 3, 3, 3)
    run = phases(cuda, *(misaligned_alike(x) for x in given))[phase]
    with pytest.raises(
        RuntimeError, match=f"fastsn: CUDA kernel '{phase}' .*: .*misaligned access"
    ):
        run()


# Arguments


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input": random(2, 3)}, r"input of 4 dimensions .*got shape \[2, 3\]"),
        ({"input": random(2, 3, 5, 5).int()}, "input must be float64, .*got Int"),
        ({"stride": [1]}, "expected 2 entries, one per spatial dimension, got 1"),
        ({"stride": [0, 1]}, "expected a positive kernel_size, stride .*got 3, 0, 1"),
        ({"padding": [2**31, 1]}, f"may reach over up to {2**30 - 1} positions.*padding {2**31}"),
        ({"dilation": [1, 2**62]}, f"may reach over up to {2**30 - 1} positions"),
        ({"kernel_size": [2000, 2000]}, r"up to 1048576 positions, got kernel_size \[2000, 2000\]"),
    ],
    ids=["dimensions", "type", "entries", "stride", "padding", "dilation", "taps"],
)
def test_bad_arguments_of_patch_mean(changes, message, cuda):
    arguments = {
        "input": random(2, 3, 5, 5), "kernel_size": [3, 3], "stride": [1, 1], "padding": [0, 0],
        "dilation": [1, 1], "output_size": [3, 3], "transposed": False, "average": True,
    }  # fmt: skip
    cuda.patch_mean(**arguments)
    with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
        cuda.patch_mean(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grad": random(4, 3)}, r"shape \(C, \*kernel_size\) .*got \[4, 3\]"),
        ({"dtype": torch.int32}, "dtype must be float64, .*got Int"),
        ({"input_size": [2, 3, 2**40]}, f"may reach over up to {2**30 - 1} positions"),
        ({"input_size": [2**31, 3, 5]}, f"number of samples may be up to .*got {2**31}"),
    ],
    ids=["shape", "type", "size", "samples"],
)
def test_bad_arguments_of_patch_mean_backward(changes, message, cuda):
    arguments = {
        "grad": random(3, 3), "input_size": [2, 3, 5], "stride": [1], "padding": [0],
        "dilation": [1], "output_size": [3], "transposed": False, "average": True,
        "dtype": torch.float32, "channels_last": False,
    }  # fmt: skip
    cuda.patch_mean_backward(**arguments)
    with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
        cuda.patch_mean_backward(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight": random(6).bool()}, "weight must be float64, .*got Bool"),
        ({"weight": random(6)}, "weight of at least 2 dimensions"),
        ({"patches": random(3, 4)}, r"patches of shape \[4, 3\] .*got \[3, 4\]"),
        ({"groups": 4}, "groups must divide the first dimension of the weight, 6, got 4"),
        ({"gain": random(5)}, r"gain of shape \[6\] .*got \[5\]"),
        ({"beta": random(6, 1)}, r"beta of shape \[6\] .*got \[6, 1\]"),
    ],
    ids=["type", "dimensions", "patches", "groups", "gain", "beta"],
)
def test_bad_arguments_of_mean_bias(changes, message, cuda):
    arguments = {
        "weight": random(6, 2, 3), "patches": random(4, 3), "gain": None, "beta": None,
        "groups": 2, "transposed": False,
    }  # fmt: skip
    cuda.mean_bias(**arguments)
    with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
        cuda.mean_bias(**{**arguments, **changes})
