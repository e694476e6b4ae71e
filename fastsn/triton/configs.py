"""Block sizes and compiled variants of the kernels, all in one place.

A variant is what Triton compiles once: a kernel, the types of its arguments and its constants.
Sizes are for four warps, Triton's default. The rules look at shapes, strides and types only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
import triton.language as tl

from fastsn.triton import kernels, mean_kernels

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# (s, f) of the block of W that `products` holds. A tile of "wide" is 4 rows, so that a matrix of
# a hundred rows makes tiles for many multiprocessors. "square" suits short rows and columns, and
# with its 32 rows per tile tall matrices, whose 4 rows would leave behind one z per 4 rows of W.
BLOCKS = {"square": (32, 64), "wide": (4, 1024)}
SHORT_ROW = 256
TALL = 4096

OPTIONS = {"enable_fp_fusion": True}

CHUNK = 256  # elements of a vector per program
DEPTH = 8  # tiles whose z is summed up side by side
FLAT = 1024  # elements of a weight per step of `scale`, `dot` and `gradient`
MAX_PIECES = 1024  # programs per weight of those

MEAN_TILE = {"ROWS": 16, "COLS": 64}  # of channels and positions, or the other way around
MEAN_PROGRAMS = 512  # into which the samples of an input are split, where it has so many
PARTS_TILE = {"ROWS": 8, "COLS": 128}  # of channels and taps, and of partial sums
BIAS_BLOCK = 1024  # elements of a weight per step of `mean_bias`

# What kernels call their tables, which are int64.
TABLES = {
    "addresses", "jobs", "job_of_tile", "job_of_chunk", "layers", "layer_of_piece", "orders",
    "outers", "table",
}  # fmt: skip


@cache
def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def block_of(s: int, f: int, s_first: bool) -> str:
    """Which of :data:`BLOCKS` serves a matrix of this size."""
    return "wide" if s_first and f > SHORT_ROW and s < TALL else "square"


def vector_of(inner: int, dtype: torch.dtype) -> int:
    """Elements that lie side by side, in each run of ``inner``, at multiples of 16 bytes."""
    vector = 16 // dtype.itemsize
    return vector if inner % vector == 0 else 1


def vector_constants(dtype: torch.dtype) -> dict[str, Any]:
    return {"ACC": TYPES[accumulate_type(dtype)], "CHUNK": CHUNK}


def product_constants(dtype: torch.dtype, s_first: bool, block: str, vector: int) -> dict[str, Any]:
    block_s, block_f = BLOCKS[block]
    return {
        "TYPE": TYPES[dtype],
        "ACC": TYPES[accumulate_type(dtype)],
        "S_FIRST": s_first,
        "BLOCK_S": block_s,
        "BLOCK_F": block_f,
        "VECTOR": vector,
    }


def flat_constants(dtype: torch.dtype, result: torch.dtype, role: str) -> dict[str, Any]:
    """``role``: what has the second type, RESULT or GRAD."""
    return {
        "TYPE": TYPES[dtype],
        role: TYPES[result],
        "ACC": TYPES[accumulate_type(dtype)],
        "BLOCK": FLAT,
    }


def tile_constants(dtype: torch.dtype, positions_inner: bool) -> dict[str, Any]:
    return {
        "TYPE": TYPES[dtype],
        "ACC": TYPES[accumulate_type(dtype)],
        "POSITIONS_INNER": positions_inner,
        **MEAN_TILE,
    }


def sum_constants(dtype: torch.dtype, positions_inner: bool, vector: int) -> dict[str, Any]:
    return {**tile_constants(dtype, positions_inner), "VECTOR": vector}


def part_constants(dtype: torch.dtype) -> dict[str, Any]:
    return {"ACC": TYPES[dtype], **PARTS_TILE}


def bias_constants(dtype: torch.dtype) -> dict[str, Any]:
    return {"TYPE": TYPES[dtype], "ACC": TYPES[accumulate_type(dtype)], "BLOCK": BIAS_BLOCK}


class Variant(NamedTuple):
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]


def variant(kernel: Any, constants: dict[str, Any], **pointers: str) -> Variant:
    """``pointers``: which constant is the type that a pointer points to; others point to tables."""
    pointers = {"snapshot": "ACC", "workspace": "ACC", **pointers}
    annotations = kernel.fn.__annotations__
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{constants[pointers[name]]}"
        elif name in TABLES:
            signature[name] = "*i64"
        else:
            signature[name] = "i64" if annotations.get(name) == tl.int64 else "i32"
    return Variant(kernel, signature, constants)


def variants() -> Iterator[Variant]:
    """All that `power_`, `estimate`, `scale` and `scale_backward` can ask Triton to compile."""
    yield variant(kernels.pack, {})
    for accumulate in (torch.float32, torch.float64):
        constants = vector_constants(accumulate)
        yield variant(kernels.read_vectors, constants)
        yield variant(kernels.combine, {**constants, "DEPTH": DEPTH})
        yield variant(kernels.finish, constants)
    for dtype in TYPES:
        for s_first, block in ((True, "square"), (True, "wide"), (False, "square")):
            for vector in (1, 16 // dtype.itemsize):
                constants = product_constants(dtype, s_first, block, vector)
                yield variant(kernels.products, constants)
    for dtype, other in product(TYPES, TYPES):
        if accumulate_type(dtype) == accumulate_type(other):
            yield variant(kernels.scale, flat_constants(dtype, other, "RESULT"))
            yield variant(kernels.dot, flat_constants(dtype, other, "GRAD"))
            yield variant(kernels.gradient, flat_constants(dtype, other, "GRAD"))


def mean_variants() -> Iterator[Variant]:
    """All that `patch_mean`, `patch_mean_backward` and `mean_bias` can ask Triton to compile."""
    for accumulate in (torch.float32, torch.float64):
        constants = part_constants(accumulate)
        yield variant(mean_kernels.patch_means, constants, parts="ACC", result="ACC")
    for dtype in TYPES:
        for inner in (False, True):
            for vector in (1, 16 // dtype.itemsize):
                constants = sum_constants(dtype, inner, vector)
                yield variant(mean_kernels.patch_sums, constants, parts="ACC")
            constants = tile_constants(dtype, inner)
            yield variant(mean_kernels.patch_gradient, constants, grad="ACC", result="TYPE")
        pointers = {"weight": "TYPE", "patches": "ACC", "bias": "TYPE", "mean": "ACC"}
        yield variant(mean_kernels.mean_bias, bias_constants(dtype), **pointers)
