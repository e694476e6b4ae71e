"""patch_mean, patch_mean_backward and mean_bias of a back-end, held to `fastsn.reference`.

The first argument of every check has the operators. Their error against float64 is like that of the
reference in the same types.
"""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from fastsn import reference
from helpers.means_calls import Geometry
from helpers.tolerances import assert_sum_no_worse

each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])


# For every way that the CUDA kernels cut patch_mean.
INPUTS = [
    (64, 3), (9, 512), (5, 33), (700, 68), (3, 2049), (4000, 1),  # linear layers
    (3, 5, 901), (2, 64, 300), (40, 2, 129), (1, 40, 31),
    (6, 130, 4, 4), (2, 5, 7, 7), (16, 6, 32, 32), (1, 2, 60, 57), (2, 40, 9, 20), (1, 1, 3, 640),
    (2, 3, 5, 6, 7), (1, 1, 20, 17, 24), (5, 70, 2, 3, 3),
]  # fmt: skip


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def check_mean(ops, geometry: Geometry, input: Tensor, average: bool = True) -> Tensor:
    actual = ops.patch_mean(*geometry.mean_args(input, average))
    peer = reference.patch_mean(*geometry.mean_args(input, average))
    exact = reference.patch_mean(*geometry.mean_args(input.double(), average))
    terms = input.shape[0] * prod(geometry.output_size)
    assert_sum_no_worse(
        actual, peer, exact, length=terms, computed_in=peer.dtype,
        largest_term=largest(input) / (max(terms, 1) if average else 1),
    )  # fmt: skip
    assert actual.is_contiguous()
    return actual


def check_backward(
    ops, geometry: Geometry, grad: Tensor, dtype: torch.dtype, channels_last=False, average=True
) -> Tensor:
    constants = {"channels_last": channels_last, "average": average}
    actual = ops.patch_mean_backward(*geometry.backward_args(grad, dtype, **constants))
    peer = reference.patch_mean_backward(*geometry.backward_args(grad, dtype, **constants))
    exact = reference.patch_mean_backward(
        *geometry.backward_args(grad.double(), torch.float64, **constants)
    )
    count = geometry.input_size[0] * prod(geometry.output_size) if average else 1
    assert_sum_no_worse(
        actual, peer, exact, length=prod(geometry.kernel_size),
        computed_in=reference.accumulate_type(grad),
        largest_term=largest(grad) / count,
    )  # fmt: skip
    memory = actual.movedim(0, -1) if channels_last else actual
    assert memory.is_contiguous()
    return actual


def check_bias(
    ops, weight: Tensor, patches: Tensor, gain=None, beta=None, groups=1, transposed=False
) -> tuple[Tensor, Tensor]:
    constants = gain, beta, groups, transposed
    actual = ops.mean_bias(weight, patches, *constants)
    peer = reference.mean_bias(weight, patches, *constants)
    exact = reference.mean_bias(weight.double(), patches.double(), *constants)
    factor = 1 if gain is None else max(1, largest(gain))
    for triple in zip(actual, peer, exact, strict=True):
        assert_sum_no_worse(
            *triple, length=patches.numel() // groups, computed_in=peer[1].dtype,
            largest_term=largest(weight) * largest(patches) * factor,
        )  # fmt: skip
    return actual
