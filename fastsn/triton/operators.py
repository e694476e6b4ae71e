"""The host side: what is launched, for arguments that :mod:`fastsn.reference` explains."""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fastsn.triton import common, configs, power_kernels, scale_kernels
from fastsn.triton.cache import Cache, apart, is_capturing
from fastsn.triton.plan import (
    KEPT,
    FlatPlan,
    PowerPlan,
    cached,
    check_storage,
    check_storages,
    check_weights,
    is_dense,
    plan_flat,
    plan_power,
    signature_of,
    vector_type,
)


def _launch(kernel: Any, count: int, *args: Any, **constants: Any) -> None:
    if count:
        kernel[(count,)](*args, **constants, **configs.options(constants))


@lru_cache(maxsize=4096)
def _bits(number: float) -> int:
    """The bits of a fp64 number, to be packed among addresses."""
    return struct.unpack("q", struct.pack("d", number))[0]


def _empty_table(length: int, device: torch.device) -> Tensor:
    length += -length % common.PACKED
    return torch.empty(length, dtype=torch.int64, device=device)


def _pack(values: list[int], table: Tensor) -> Tensor:
    """The table, with these numbers in it, of which nothing is copied from the host."""
    values = values + [0] * (len(table) - len(values))
    for first in range(0, len(values), common.PACKED):
        _launch(common.pack, 1, table, first, *values[first : first + common.PACKED])
    return table


_tables: Cache[Tensor] = Cache(KEPT)


def _kept_table(values: list[int], device: torch.device) -> Tensor:
    """Addresses and the like on the device, from an earlier call that packed the same ones.

    Those of weights, u and v are the same at every step of a training, unlike those of results.
    Whose they are is nothing to the table.
    """
    key = (device, *values)
    table = _tables.get(key, device)
    if table is None:
        if is_capturing(device):
            return _pack(values, _empty_table(len(values), device))
        table = _pack(values, apart(device, lambda: _empty_table(len(values), device)))
        _tables.add(key, device, table, [table], is_written=False)
    return table


def _new_table(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The addresses of tensors that have just been made."""
    return _pack([x.data_ptr() for x in tensors], _empty_table(len(tensors), device))


def _as_dense(x: Tensor) -> Tensor:
    """Itself where it is dense and starts at a multiple of 16 bytes, else a copy.

    Sums depend on how a thread's elements lie, and so they do not depend on where a weight lies.
    """
    if x.is_neg():
        x = x.resolve_neg()
    if x.data_ptr() % 16 == 0 and (x.is_contiguous() or is_dense(x.shape, x.stride())):
        return x
    return torch.empty_like(x).copy_(x)


def _as_dense_weights(weights: Sequence[Tensor]) -> tuple[list[Tensor], Hashable]:
    """Dense weights, and all that kernels are chosen by."""
    signature = signature_of(weights)
    check_weights(signature)
    check_storages("weights", weights)
    dense = [_as_dense(w) for w in weights]
    return dense, (signature, *(w.stride() for w in dense))


def _as_vector(x: Tensor, accumulate: torch.dtype) -> Tensor:
    """Itself, or a copy that kernels can read and write."""
    if x.dtype == accumulate and x.is_contiguous() and not x.is_neg():
        return x
    return x.to(vector_type(x.dtype, accumulate)).resolve_neg().contiguous()


def power_(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
    n_power_iterations: Sequence[int],
    eps: float,
    v_first: bool,
    zero_guard: bool,
) -> Tensor:
    """Iterates, writes u and v back in place, and returns the snapshot.

    See :func:`fastsn.reference.power_`. Nothing is written where arguments are wrong.
    """
    dense, signature = _as_dense_weights(weights)
    device = dense[0].device
    accumulate = configs.accumulate_type(dense[0].dtype)
    key = (
        "power", signature, signature_of(u), signature_of(v), tuple(layers), tuple(dims),
        tuple(n_power_iterations), v_first,
    )  # fmt: skip
    with torch.cuda.device_of(dense[0]):
        plan: PowerPlan = cached(
            key,
            device,
            lambda: plan_power(dense, u, v, layers, dims, n_power_iterations, v_first),
        )
        check_storages("u", u)
        check_storages("v", v)
        held_u, held_v = ([_as_vector(x, accumulate) for x in side] for side in (u, v))
        addresses = _kept_table(
            [_bits(eps), *(x.data_ptr() for own in (dense, held_u, held_v) for x in own)], device
        )
        snapshot = torch.empty(plan.snapshot_numel, dtype=accumulate, device=device)
        workspace = torch.empty(plan.workspace_numel, dtype=accumulate, device=device)
        jobs, chunks, constants = plan.jobs, plan.job_of_chunk, plan.vector_constants
        _launch(
            power_kernels.measure, plan.chunks - plan.first_at_rest, addresses, jobs, chunks,
            workspace, plan.first_at_rest, **constants,
        )  # fmt: skip
        _launch(
            power_kernels.read_vectors, plan.chunks, addresses, jobs, chunks, plan.orders, snapshot,
            workspace, **constants,
        )  # fmt: skip
        for products, combined, finished in plan.rounds:
            for first, count, own in products:
                _launch(
                    power_kernels.products, count, addresses, jobs, plan.job_of_tile, plan.orders,
                    snapshot, workspace, first, **own,
                )  # fmt: skip
            _launch(
                power_kernels.combine, combined, addresses, jobs, chunks, snapshot, workspace,
                **constants, DEPTH=configs.DEPTH,
            )  # fmt: skip
            _launch(
                power_kernels.finish, finished, addresses, jobs, chunks, plan.orders, snapshot,
                workspace, int(zero_guard), **constants,
            )  # fmt: skip
        for e, layer in enumerate(layers):
            for live, held in ((u[e], held_u[e]), (v[e], held_v[e])):
                if held is not live and n_power_iterations[layer] > 0:
                    live.copy_(held)
    return snapshot


def estimate(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
) -> Tensor:
    """The snapshot for u and v as they are: :func:`power_` with no iteration."""
    none = [0] * len(weights)
    return power_(weights, u, v, layers, dims, none, 0.0, False, False)


def _flat_plan(
    role: str,
    dense: Sequence[Tensor],
    signature: Hashable,
    others: Sequence[torch.dtype],
    snapshot: Tensor,
    layers: Sequence[int],
    dims: Sequence[int],
    scales: Sequence[float],
) -> FlatPlan:
    key = (role, signature, tuple(others), tuple(layers), tuple(dims))
    device = dense[0].device
    plan: FlatPlan = cached(key, device, lambda: plan_flat(dense, others, role, layers, dims))
    if len(scales) != len(dense):
        raise RuntimeError(f"fastsn: expected {len(dense)} scales, got {len(scales)}")
    accumulate = configs.accumulate_type(dense[0].dtype)
    if not (
        snapshot.shape == (plan.snapshot_numel,)
        and snapshot.is_contiguous()
        and snapshot.dtype == accumulate
        and snapshot.device == device
    ):
        name = "Double" if accumulate == torch.float64 else "Float"
        raise RuntimeError(
            f"fastsn: expected a contiguous {name} snapshot of {plan.snapshot_numel} elements on "
            f"{device}, got {snapshot.dtype} of shape {list(snapshot.shape)} on {snapshot.device}"
        )
    check_storage(snapshot, "snapshot")
    return plan


@cache
def _kernel_type(dtype: torch.dtype, accumulate: torch.dtype) -> torch.dtype:
    """The type that kernels read or write for ``dtype``: itself if they have a variant for it."""
    is_own = dtype in configs.TYPES and configs.accumulate_type(dtype) == accumulate
    return dtype if is_own else accumulate


def _as_gradient(grad: Tensor, weight: Tensor, accumulate: torch.dtype) -> Tensor:
    """Itself, or a copy that lies like the (dense) weight."""
    if grad.shape != weight.shape or grad.device != weight.device or not grad.is_floating_point():
        raise RuntimeError(
            f"fastsn: expected a floating point gradient of shape {list(weight.shape)} on "
            f"{weight.device}, got {grad.dtype} of shape {list(grad.shape)} on {grad.device}"
        )
    grad = _as_dense(grad.to(_kernel_type(grad.dtype, accumulate)))
    if grad.stride() == weight.stride():
        return grad
    return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def scale(
    weights: Sequence[Tensor],
    snapshot: Tensor,
    layers: Sequence[int],
    dims: Sequence[int],
    scales: Sequence[float],
    bound: bool,
    zero_guard: bool,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The normalized weights, in ``dtype`` (None: each weight's own).

    See :func:`fastsn.reference.scale`. sigma is that of the snapshot.
    """
    dense, signature = _as_dense_weights(weights)
    device = dense[0].device
    accumulate = configs.accumulate_type(dense[0].dtype)
    types = [_kernel_type(dtype or w.dtype, accumulate) for w in dense]
    with torch.cuda.device_of(dense[0]):
        plan = _flat_plan("RESULT", dense, signature, types, snapshot, layers, dims, scales)
        results = [torch.empty_like(w, dtype=t) for w, t in zip(dense, types, strict=True)]
        addresses = _kept_table([*map(_bits, scales), *(w.data_ptr() for w in dense)], device)
        others = _new_table(results, device)
        for first, count, constants in plan.launches:
            _launch(
                scale_kernels.scale, count, addresses, others, plan.layers, plan.layer_of_piece,
                snapshot, first, len(dense), int(bound), int(zero_guard), **constants,
            )  # fmt: skip
        return results if dtype is None else [x.to(dtype) for x in results]


def scale_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    snapshot: Tensor,
    layers: Sequence[int],
    dims: Sequence[int],
    scales: Sequence[float],
    bound: bool,
    zero_guard: bool,
) -> list[Tensor]:
    """The gradients of :func:`scale` with respect to the weights, each in its weight's type.

    ``dW = (s G - <s G, W> / sigma * S) / sigma``, with S the mean over estimates of ``u v^T``. See
    :func:`fastsn.reference.scale_backward`.
    """
    dense, signature = _as_dense_weights(weights)
    device = dense[0].device
    accumulate = configs.accumulate_type(dense[0].dtype)
    if len(grads) != len(dense):
        raise RuntimeError(f"fastsn: expected {len(dense)} gradients, got {len(grads)}")
    check_storages("grads", grads)
    held = [_as_gradient(g, w, accumulate) for g, w in zip(grads, dense, strict=True)]
    with torch.cuda.device_of(dense[0]):
        types = [g.dtype for g in held]
        plan = _flat_plan("GRAD", dense, signature, types, snapshot, layers, dims, scales)
        results = [torch.empty_like(w) for w in dense]
        addresses = _kept_table([*map(_bits, scales), *(w.data_ptr() for w in dense)], device)
        others = _new_table([*held, *results], device)
        workspace = torch.empty(plan.pieces, dtype=accumulate, device=device)
        for first, count, constants in plan.launches:
            _launch(
                scale_kernels.dot, count, addresses, others, plan.layers, plan.layer_of_piece,
                workspace, first, len(dense), **constants,
            )  # fmt: skip
        for first, count, constants in plan.launches:
            _launch(
                scale_kernels.gradient, count, addresses, others, plan.layers, plan.layer_of_piece,
                plan.outers, plan.orders, snapshot, workspace, first, len(dense), int(bound),
                int(zero_guard), **constants,
            )  # fmt: skip
    return results
