"""Block sizes and compiled variants of the kernels, all in one place.

A variant is what Triton compiles once: a kernel, the types of its arguments and its constants.
Sizes are for four warps where :func:`options` says no other number. The rules
look at shapes, strides and types only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
import triton.language as tl

from fastsn.triton import common, mean_kernels, power_kernels, scale_kernels

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Blocks(NamedTuple):
    """The blocks of W that a variant of `products` holds: each of ``size`` elements, in fp32.

    Each reaches along all of x. So there are ``widths`` kinds of them: along x they have
    ``widest`` elements, or that divided by ``ratio`` once, or twice.
    """

    size: int
    widest: int
    ratio: int
    widths: int


# A thread holds 32 elements of W and as many sums, which is what 128 registers leave room for.
# "small" has 4 warps, and more than one program at a time on a multiprocessor; "large" has 16.
# What no block of "large" is wide enough for, "small" reads twice.
BLOCKS = {
    ("small", True): Blocks(4096, 4096, 4, 3),
    ("small", False): Blocks(4096, 512, 4, 3),
    ("large", True): Blocks(16384, 16384, 2, 2),
    ("large", False): Blocks(16384, 4096, 2, 3),
}

# Matrices of at most so many elements are read twice rather than by a launch of their own.
CACHED = 2**16

# A matrix of n_y by n_x elements has up to TILES * sqrt(n_y) tiles. Each leaves behind n_x sums
# that are written and read again, so tiles add 2 * (bytes of a sum) / (bytes of an element) *
# TILES / sqrt(n_y) to the bytes of W. Fewer tiles leave multiprocessors idle at the end. Of
# 2, 3, 4, 6 and 8, a model of 132 multiprocessors finds 4 the best for SNDCGAN and 4096 x 4096, and
# 3 slightly better for BigGAN.
TILES = 4

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
    "others", "outers", "table",
}  # fmt: skip


@cache
def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def blocks_of(kind: str, s_first: bool, dtype: torch.dtype, vector: int) -> Blocks:
    """Those of :data:`BLOCKS` that take no more registers for weights of this type."""
    size, widest, ratio, widths = BLOCKS[kind, s_first]
    # Elements that do not lie side by side have an address each.
    share = accumulate_type(dtype).itemsize // 4 * (2 if vector == 1 else 1)
    return Blocks(size // share, widest // share, ratio, widths)


class Tiles(NamedTuple):
    """How `products` goes through a matrix of ``n_y`` by ``n_x`` elements."""

    kind: str  # of blocks
    width: int  # of a block along x, or 0: W is read twice
    step: int  # elements of y per tile


def tiles_of(n_y: int, n_x: int, s_first: bool, dtype: torch.dtype, vector: int) -> Tiles:
    small, large = (blocks_of(kind, s_first, dtype, vector) for kind in ("small", "large"))
    kind, blocks = ("small", small) if n_x <= small.widest else ("large", large)
    if n_x > large.widest or (kind == "large" and n_y * n_x <= CACHED):
        return Tiles("small", 0, small.size * small.ratio // small.widest)
    width = blocks.widest
    for _ in range(blocks.widths - 1):
        width = width // blocks.ratio if n_x <= width // blocks.ratio else width
    block_y = blocks.size // width
    blocks_per_tile = math.ceil(math.sqrt(n_y) / (TILES * block_y))
    return Tiles(kind, width, max(blocks_per_tile, 1) * block_y)


def vector_of(inner: int, dtype: torch.dtype) -> int:
    """Elements that lie side by side, in each run of ``inner``, at multiples of 16 bytes."""
    vector = 16 // dtype.itemsize
    return vector if inner % vector == 0 else 1


def vector_constants(dtype: torch.dtype) -> dict[str, Any]:
    return {"ACC": TYPES[accumulate_type(dtype)], "CHUNK": CHUNK}


def product_constants(dtype: torch.dtype, s_first: bool, kind: str, vector: int) -> dict[str, Any]:
    blocks = blocks_of(kind, s_first, dtype, vector)
    return {
        "TYPE": TYPES[dtype],
        "ACC": TYPES[accumulate_type(dtype)],
        "S_FIRST": s_first,
        "VECTOR": vector,
        "SIZE": blocks.size,
        "WIDEST": blocks.widest,
        "RATIO": blocks.ratio,
        "WIDTHS": blocks.widths,
        "HOLDS_ALL": kind == "large",
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


def options(constants: dict[str, Any]) -> dict[str, Any]:
    """How Triton compiles a kernel with these constants."""
    # Fusion is named as its default is about to change, with a warning from Triton 3.9 on.
    return {"num_warps": 16 if constants.get("HOLDS_ALL") else 4, "enable_fp_fusion": True}


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
    yield variant(common.pack, {})
    for accumulate in (torch.float32, torch.float64):
        constants = vector_constants(accumulate)
        yield variant(power_kernels.measure, constants)
        yield variant(power_kernels.read_vectors, constants)
        yield variant(power_kernels.combine, {**constants, "DEPTH": DEPTH})
        yield variant(power_kernels.finish, constants)
    for dtype in TYPES:
        for kind, s_first in BLOCKS:
            for vector in (1, 16 // dtype.itemsize):
                constants = product_constants(dtype, s_first, kind, vector)
                yield variant(power_kernels.products, constants)
    for dtype, other in product(TYPES, TYPES):
        if accumulate_type(dtype) == accumulate_type(other):
            yield variant(scale_kernels.scale, flat_constants(dtype, other, "RESULT"))
            yield variant(scale_kernels.dot, flat_constants(dtype, other, "GRAD"))
            yield variant(scale_kernels.gradient, flat_constants(dtype, other, "GRAD"))


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
