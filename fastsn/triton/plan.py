"""What a call does that depends on shapes, strides and types only, as tables on its device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsn.triton import common, configs
from fastsn.triton.cache import Cache, apart, is_capturing

KEPT = 1024  # plans, and as many tables of addresses and checks of weights
MAX_LENGTH = 2**30  # of u and v: kernels count along them in 32 bits

ALIGNED = 4  # elements of the workspace to which each of its parts is rounded up: 16 bytes

VECTOR_TYPES = [getattr(torch, name) for name in common.VECTOR_TYPES]


def vector_type(dtype: torch.dtype, accumulate: torch.dtype) -> torch.dtype:
    """The type in which kernels read and write u or v: its own, or else that of the snapshot."""
    return dtype if dtype in VECTOR_TYPES else accumulate


class View(NamedTuple):
    """A matrix in the order of its memory: (s, f) at ``s * inner + f // inner * S * inner + ...``.

    ``order[k]``: the logical column at memory column k, None where that is k.
    """

    s: int
    f: int
    inner: int
    u_is_along_s: bool
    order: Tensor | None


def view_of(shape: Sequence[int], stride: Sequence[int], dim: int) -> View:
    """The matrix of a dense tensor whose rows are the slices along ``dim``."""
    rows = shape[dim]
    others = [d for d in range(len(shape)) if d != dim and shape[d] != 1]
    cols = 1
    for d in others:
        cols *= shape[d]
    if rows * cols == 0:
        return View(rows, cols, max(cols, 1), True, None)
    # The stride of a dimension of size 1 says nothing.
    is_outer = {d: rows > 1 and stride[d] > stride[dim] for d in others}
    outer = 1
    order = torch.zeros(1, dtype=torch.int64)
    for d in others:
        outer *= shape[d] if is_outer[d] else 1
        step = stride[d] // rows if is_outer[d] else stride[d]
        order = (order[:, None] + torch.arange(shape[d]) * step).flatten()
    has_order = not torch.equal(order, torch.arange(cols))
    inverse = order.argsort() if has_order else None
    if outer == cols and outer > 1:
        return View(outer, rows, rows, False, inverse)
    inner = cols // outer
    return View(rows, cols, inner, True, inverse)


@lru_cache(maxsize=4096)
def is_dense(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether the elements fill their range of memory, each at a place of its own."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True)):
        if size == 0:
            return True
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return True


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Launch(NamedTuple):
    """Programs ``[first, first + programs)`` of a kernel's list."""

    first: int
    programs: int
    constants: dict[str, Any]


@dataclass
class Estimates:
    """The matrices of a call and where their u, v and sigma lie in the snapshot."""

    views: list[View] = field(default_factory=list)
    u: list[int] = field(default_factory=list)
    v: list[int] = field(default_factory=list)
    sigma: list[int] = field(default_factory=list)
    snapshot_numel: int = 0
    orders: list[Tensor] = field(default_factory=list)
    order_at: list[int] = field(default_factory=list)

    def along(self, e: int, s: bool) -> tuple[int, int, bool]:
        """Of the vector along s, or f: where it and its order lie, and whether it is u."""
        is_u = self.views[e].u_is_along_s == s
        return (self.u[e], -1, True) if is_u else (self.v[e], self.order_at[e], False)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"fastsn: {message}")


class Signature(NamedTuple):
    """What calls are told apart by, of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout


def signature_of(tensors: Sequence[Tensor]) -> tuple[Signature, ...]:
    return tuple(Signature(x.shape, x.dtype, x.device, x.layout) for x in tensors)


def check_storage(x: Tensor, name: str) -> None:
    """What shards parameters leaves tensors without storage behind."""
    last = x.storage_offset() + sum(
        (n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)
    )
    needed = (last + 1) * x.itemsize if x.numel() else 0
    found = x.untyped_storage().nbytes()
    check(
        needed <= found,
        f"{name} of shape {list(x.shape)} needs a storage of {needed} bytes, got one of "
        f"{found} bytes",
    )


def check_storages(name: str, tensors: Sequence[Tensor]) -> None:
    for k, x in enumerate(tensors):
        check_storage(x, f"{name}[{k}]")


@lru_cache(maxsize=KEPT)
def check_weights(weights: tuple[Signature, ...]) -> None:
    check(len(weights) > 0, "expected at least one weight, got none")
    first = weights[0]
    for i, w in enumerate(weights):
        check(
            w.dtype in configs.TYPES,
            f"weights[{i}] must be float64, float32, bfloat16 or float16, got {w.dtype}",
        )
        check(
            w.layout == torch.strided,
            f"weights[{i}] must be strided (dense), got {w.layout}",
        )
        check(
            w.device == first.device,
            f"all weights of a call must be on one device, got {first.device} and {w.device}",
        )
        check(
            (w.dtype == torch.float64) == (first.dtype == torch.float64),
            "float64 weights cannot share a call with other types, "
            f"got {first.dtype} and {w.dtype}",
        )


def describe(weights: Sequence[Tensor], layers: Sequence[int], dims: Sequence[int]) -> Estimates:
    check(
        len(layers) == len(dims),
        f"layers and dims differ in length: {len(layers)} and {len(dims)}",
    )
    expected = sorted(layers) == list(layers) and set(layers) == set(range(len(weights)))
    check(
        expected,
        f"layers must name every one of the {len(weights)} weights in ascending order, "
        f"got {list(layers)}",
    )
    found = Estimates()
    orders_numel = 0
    for e, (layer, dim) in enumerate(zip(layers, dims, strict=True)):
        weight = weights[layer]
        check(0 <= dim < weight.dim(), f"dims[{e}] must be in [0, {weight.dim() - 1}], got {dim}")
        view = view_of(weight.shape, weight.stride(), dim)
        check(
            max(view.s, view.f) <= MAX_LENGTH,
            f"the matrix of weights[{layer}] has more than {MAX_LENGTH} rows or columns",
        )
        rows = weight.shape[dim]
        cols = view.s + view.f - rows
        found.views.append(view)
        found.u.append(found.snapshot_numel)
        found.v.append(found.snapshot_numel + rows)
        found.snapshot_numel += rows + cols
        found.order_at.append(-1 if view.order is None else orders_numel)
        if view.order is not None:
            found.orders.append(view.order)
            orders_numel += cols
    found.sigma = [found.snapshot_numel + e for e in range(len(layers))]
    found.snapshot_numel += len(layers)
    return found


def check_vectors(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
) -> None:
    count = len(layers)
    check(
        len(u) == count and len(v) == count,
        f"expected {count} u and v, got {len(u)} and {len(v)}",
    )
    for e, (layer, dim) in enumerate(zip(layers, dims, strict=True)):
        shape = weights[layer].shape
        others = shape[:dim] + shape[dim + 1 :]
        for name, x, length in (("u", u[e], shape[dim]), ("v", v[e], others.numel())):
            check(
                x.shape == (length,),
                f"{name}[{e}] must have shape [{length}], got {list(x.shape)}",
            )
            device = weights[0].device
            check(x.device == device, f"{name}[{e}] must be on {device}, got {x.device}")
            check(x.is_floating_point(), f"{name}[{e}] must be floating point, got {x.dtype}")


def on_device(rows: Sequence[Any], device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=torch.int64).flatten()
    # An empty table has no address of its own.
    return (table if table.numel() else torch.zeros(1, dtype=torch.int64)).to(device)


def orders_on_device(estimates: Estimates, device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), *estimates.orders])[1:].to(device)


@dataclass
class PowerPlan:
    jobs: Tensor
    job_of_tile: Tensor
    job_of_chunk: Tensor
    orders: Tensor
    snapshot_numel: int
    workspace_numel: int
    vector_constants: dict[str, Any]
    chunks: int
    first_at_rest: int  # chunks from here on are of what does not iterate
    rounds: list[tuple[list[Launch], int, int]]  # products, chunks to combine, chunks to finish


def plan_power(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
    n_power_iterations: Sequence[int],
    v_first: bool,
) -> PowerPlan:
    """The plan of ``power_`` for dense weights.

    The numbers packed for it are eps and the addresses of all weights, all u and all v.
    """
    estimates = describe(weights, layers, dims)
    check_vectors(weights, u, v, layers, dims)
    check(
        len(n_power_iterations) == len(weights),
        f"expected {len(weights)} n_power_iterations, got {len(n_power_iterations)}",
    )
    device = weights[0].device
    accumulate = configs.accumulate_type(weights[0].dtype)

    # Those with most iterations first: a round works on the first so many of every list.
    steps = [max(n_power_iterations[layer], 1) for layer in layers]
    groups = defaultdict(list)
    tiles_of: dict[int, configs.Tiles] = {}
    for e in sorted(range(len(layers)), key=lambda e: -steps[e]):
        view, dtype = estimates.views[e], weights[layers[e]].dtype
        first = e == 0 or layers[e - 1] != layers[e]
        only_estimates = n_power_iterations[layers[e]] <= 0
        u_first = v_first != first or only_estimates
        s_first = u_first == view.u_is_along_s or only_estimates
        p, q = (view.s, view.f) if s_first else (view.f, view.s)
        vector = configs.vector_of(view.inner, dtype)
        tiles_of[e] = configs.tiles_of(p, q, s_first, dtype, vector)
        groups[dtype, s_first, tiles_of[e].kind, vector].append(e)

    rows: dict[int, dict[str, int]] = {}
    job_of_tile: list[int] = []
    workspace_numel = 0
    launches: list[tuple[int, list[tuple[int, int]], dict[str, Any]]] = []
    for key, members in groups.items():
        constants = configs.product_constants(*key)
        _, s_first, _, vector = key
        begin, tiles = len(job_of_tile), []
        for e in members:
            view = estimates.views[e]
            p, q = (view.s, view.f) if s_first else (view.f, view.s)
            _, width, step = tiles_of[e]
            if width and not s_first:
                step += -step % vector  # as kernels are told
                if view.inner <= step:
                    step += -step % view.inner  # whole units of memory
            count = cdiv(p, step)
            y, y_order, y_is_u = estimates.along(e, s_first)
            x, x_order, x_is_u = estimates.along(e, not s_first)
            live = {True: (u, 1 + len(weights)), False: (v, 1 + len(weights) + len(layers))}
            (y_live, y_at), (x_live, x_at) = live[y_is_u], live[x_is_u]
            row = {
                "WEIGHT": 1 + layers[e], "P": p, "Q": q, "INNER": view.inner, "STEP": step,
                "WIDTH": width, "FIRST_TILE": len(job_of_tile), "TILES": count, "Y": y, "X": x,
                "SIGMA": estimates.sigma[e], "Y_ORDER": y_order, "X_ORDER": x_order,
                "Y_LIVE": y_at + e, "X_LIVE": x_at + e,
                "Y_TYPE": VECTOR_TYPES.index(vector_type(y_live[e].dtype, accumulate)),
                "X_TYPE": VECTOR_TYPES.index(vector_type(x_live[e].dtype, accumulate)),
                "ESTIMATE": int(n_power_iterations[layers[e]] <= 0),
            }  # fmt: skip
            spaces = {
                "WORK_X": q,
                "WORK_Y": p,
                "WORK_PARTS": 0 if row["ESTIMATE"] else count * q,
                "WORK_T": q,
                "WORK_TILE_SUMS": count,
                "WORK_CHUNK_SUMS": cdiv(max(p, q, 1), configs.CHUNK),
                "WORK_NORM": 1,
                "WORK_LENGTHS": 4 * cdiv(max(p, q, 1), configs.CHUNK) if row["ESTIMATE"] else 0,
            }
            for name, numel in spaces.items():
                row[name] = workspace_numel
                workspace_numel += numel + -numel % ALIGNED
            rows[e] = row
            job_of_tile += [e] * count
            tiles.append((steps[e], count))
        launches.append((begin, tiles, constants))

    job_of_chunk: list[int] = []
    chunks = []
    for e in sorted(rows, key=lambda e: (-steps[e], rows[e]["ESTIMATE"])):
        count = cdiv(max(rows[e]["P"], rows[e]["Q"], 1), configs.CHUNK)
        rows[e]["FIRST_CHUNK"] = len(job_of_chunk)
        job_of_chunk += [e] * count
        chunks.append((0 if rows[e]["ESTIMATE"] else steps[e], steps[e], count))

    rounds = []
    for done in range(max(steps)):
        active = [
            Launch(begin, sum(n for step, n in tiles if step > done), constants)
            for begin, tiles, constants in launches
        ]
        combined = sum(n for _, step, n in chunks if step > done)
        finished = sum(n for step, _, n in chunks if step > done)
        rounds.append(([launch for launch in active if launch.programs], combined, finished))

    names = sorted(rows[0], key=lambda name: getattr(common, name).value)
    return PowerPlan(
        jobs=on_device([[rows[e][name] for name in names] for e in range(len(layers))], device),
        job_of_tile=on_device(job_of_tile, device),
        job_of_chunk=on_device(job_of_chunk, device),
        orders=orders_on_device(estimates, device),
        snapshot_numel=estimates.snapshot_numel,
        workspace_numel=workspace_numel,
        vector_constants=configs.vector_constants(accumulate),
        chunks=len(job_of_chunk),
        first_at_rest=sum(count for moves, _, count in chunks if moves),
        rounds=rounds,
    )


@dataclass
class FlatPlan:
    layers: Tensor
    layer_of_piece: Tensor
    outers: Tensor
    orders: Tensor
    snapshot_numel: int
    launches: list[Launch]
    pieces: int


def plan_flat(
    weights: Sequence[Tensor],
    others: Sequence[torch.dtype],
    role: str,
    layers: Sequence[int],
    dims: Sequence[int],
) -> FlatPlan:
    """The plan of ``scale`` and ``scale_backward`` for dense weights.

    ``others`` are the types of their results or gradients, whose constant is called ``role``. The
    numbers packed for it are all scales and the addresses of all weights, and in another table
    those of all others; for the backward of all results too.
    """
    estimates = describe(weights, layers, dims)
    device = weights[0].device
    outers = []
    for e, view in enumerate(estimates.views):
        (s, s_order, _), (f, f_order, _) = estimates.along(e, True), estimates.along(e, False)
        outers.append([view.s, view.inner, s, f, s_order, f_order])
    groups = defaultdict(list)
    for layer, (weight, other) in enumerate(zip(weights, others, strict=True)):
        groups[weight.dtype, other].append(layer)
    rows: dict[int, list[int]] = {}
    layer_of_piece: list[int] = []
    launches = []
    for (dtype, other), members in groups.items():
        begin = len(layer_of_piece)
        for layer in members:
            numel = weights[layer].numel()
            blocks = cdiv(numel, configs.FLAT)
            length = cdiv(max(blocks, 1), configs.MAX_PIECES) * configs.FLAT
            pieces = cdiv(numel, length)
            first = layers.index(layer)
            rows[layer] = [
                layer, numel, length, len(layer_of_piece), pieces,
                estimates.sigma[first], layers.count(layer), first,
            ]  # fmt: skip
            layer_of_piece += [layer] * pieces
        constants = configs.flat_constants(dtype, other, role)
        if len(layer_of_piece) > begin:
            launches.append(Launch(begin, len(layer_of_piece) - begin, constants))
    return FlatPlan(
        layers=on_device([rows[layer] for layer in range(len(weights))], device),
        layer_of_piece=on_device(layer_of_piece, device),
        outers=on_device(outers, device),
        orders=orders_on_device(estimates, device),
        snapshot_numel=estimates.snapshot_numel,
        launches=launches,
        pieces=len(layer_of_piece),
    )


_plans: Cache[PowerPlan | FlatPlan] = Cache(KEPT)


def cached(key: Hashable, device: torch.device, make: Callable[[], PowerPlan | FlatPlan]) -> Any:
    """The plan of this key.

    Raises:
        RuntimeError: it has to be made, which copies to the device, while a CUDA graph is captured.
    """
    plan = _plans.get(key, device)
    if plan is None:
        check(
            not is_capturing(device),
            "run the call once, with weights of these shapes, strides and types, before it is "
            "captured in a CUDA graph",
        )
        plan = apart(device, make)
        tables = [x for x in vars(plan).values() if isinstance(x, Tensor)]
        # A copy from the host has ended when it returns.
        _plans.add(key, device, plan, tables, is_written=True)
    return plan
