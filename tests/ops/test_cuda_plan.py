"""How the CUDA back-end cuts its work: csrc/cuda/plan.cpp, and what it means (csrc/cuda/items.h).

`multiply` and `finish` below are the power iteration as the kernels compute it, tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import networks
from fastsn import reference
from helpers import emulated

#: Of a block, and of one with units too long for that.
THREADS, MANY_THREADS = 256, 512
PACK = 4
LARGEST_INT = 2**31 - 1
#: Rows and columns that the host lets through.
LARGEST = LARGEST_INT - 2**16
LEAST_TILE = 12 * 1024
TILES = 128
#: Where units come first, of the part of a weight that a tile reads twice.
SLAB_BYTES, SECTOR_BYTES = 96 * 1024, 32

examples = partial(settings, deadline=None, derandomize=True, database=None)


@dataclass
class Cut:
    """See Cut in items.h; and how many members a group holds at once."""

    unit_first: bool
    vectorized: bool
    threads: int
    lanes: int
    width: int
    classes: int
    class_chunks: int
    span: int
    tiles: int
    held: int

    @property
    def groups(self) -> int:
        return self.threads // self.lanes

    @property
    def packs(self) -> int:
        return self.held // self.width // PACK


def plan(units, members, inner, unit_first, aligned=True, item_bytes=4) -> Cut:
    """The cut of W[units, members, inner]."""
    fields = emulated.backend().plan(units, members, inner, unit_first, aligned, item_bytes)
    return Cut(*map(bool, fields[:2]), *fields[2:])


def matrix(shape: tuple[int, ...], dim: int) -> tuple[int, int, int]:
    """Units, members and inner of a contiguous weight; `matrix_of` in weights.cpp."""
    outer, rows, inner = prod(shape[:dim]), shape[dim], prod(shape[dim + 1 :])
    return (rows, outer * inner, 1) if outer == 1 or rows == 1 else (outer, rows, inner)


booleans = st.booleans()
item_sizes = st.sampled_from([2, 4, 8])
small_sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 128, 513, 700]))
#: Sizes of any magnitude, powers of two and their neighbours among them.
any_size = st.one_of(
    st.integers(1, LARGEST),
    st.integers(0, 31).flatmap(
        lambda k: st.integers(-2, 2).map(lambda d: min(max(2**k + d, 1), LARGEST))
    ),
)


@st.composite
def any_matrix(draw) -> tuple[int, int, int]:
    """With as many rows and columns as the host lets through."""
    units, members = draw(any_size), draw(any_size)
    inner = min(draw(any_size), LARGEST // units)
    return units, members, inner


# Every element belongs to one thread


def cells(cut: Cut, units: int, tile: int | None) -> Tensor:
    """A unit with a chunk of its inner indices each: those that a tile goes over."""
    count = units * cut.class_chunks
    if tile is None:
        return torch.arange(count)
    return torch.arange(tile * cut.span, min((tile + 1) * cut.span, count))


def slots(cut: Cut, packs: int) -> tuple[Tensor, Tensor]:
    """For every lane, pack and place in it: the member that it holds, and its inner index within
    a chunk; -1 where a lane has nothing."""
    lane = torch.arange(cut.lanes)[:, None, None]
    pack, place = torch.arange(packs)[:, None], torch.arange(PACK)
    own = lane // cut.classes
    if cut.vectorized:
        member = (pack * cut.lanes + lane) * PACK + place
    else:
        member = (pack * PACK + place) * cut.width + own
    inner = (lane % cut.classes).expand(member.shape)
    return torch.where(own < cut.width, member, -1), inner


def elements(cut: Cut, units: int, members: int, inner: int) -> Tensor:
    """Where the element lies that each thread of each tile holds at each time."""
    found = [torch.empty(0, dtype=torch.long)]
    for tile in range(cut.tiles):
        if cut.unit_first:
            chunks = [(tile * cut.span, min((tile + 1) * cut.span, members))]
            own = cells(cut, units, None)
        else:
            chunks = [(first, members) for first in range(0, members, cut.held)]
            own = cells(cut, units, tile)
        held, inner_of_lane = slots(cut, 1 if cut.unit_first else cut.packs)
        unit = (own // cut.class_chunks)[:, None, None, None]
        chunk = (own % cut.class_chunks)[:, None, None, None]
        b = chunk * cut.classes + inner_of_lane
        for first, end in chunks:
            r = first + held
            at = (unit * members + r) * inner + b
            found.append(at[(held >= 0) & (r < end) & (b < inner)])
    return torch.cat(found)


@examples(max_examples=100)
@given(small_sizes, small_sizes, small_sizes, booleans, booleans, item_sizes)
def test_every_element_belongs_to_one_thread(
    units, members, inner, unit_first, aligned, item_bytes
):
    while units * members * inner > 20_000:
        units, inner = (units + 1) // 2, (inner + 1) // 2
    cut = plan(units, members, inner, unit_first, aligned, item_bytes)
    found = elements(cut, units, members, inner)
    assert torch.equal(found.sort().values, torch.arange(units * members * inner))


@pytest.mark.parametrize("unit_first", [False, True])
@pytest.mark.parametrize("item_bytes", [2, 4, 8])
@pytest.mark.parametrize("shape", [(3, 17_000, 1), (2, 20_001, 1), (1, 6000, 3), (3, 5, 1030)])
def test_every_element_of_long_units(shape, item_bytes, unit_first):
    cut = plan(*shape, unit_first, item_bytes=item_bytes)
    found = elements(cut, *shape)
    assert torch.equal(found.sort().values, torch.arange(prod(shape)))


@examples(max_examples=100)
@given(any_matrix(), booleans, booleans, item_sizes)
def test_packs_can_be_loaded(shape, unit_first, aligned, item_bytes):
    """A pack starts at a multiple of its length, and all of it or nothing is there."""
    units, members, inner = shape
    cut = plan(*shape, unit_first, aligned, item_bytes)
    assert cut.vectorized == (aligned and inner == 1 and members % PACK == 0)
    if cut.vectorized:
        assert cut.classes == 1 and cut.width == cut.lanes and cut.held % PACK == 0
        assert cut.span % PACK == 0 or not unit_first


# The shape of a cut


@examples(max_examples=1000)
@given(any_matrix(), booleans, booleans, item_sizes)
def test_blocks(shape, unit_first, aligned, item_bytes):
    units, members, inner = shape
    cut = plan(*shape, unit_first, aligned, item_bytes)
    assert cut.unit_first == unit_first
    assert cut.lanes in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert cut.threads == max(cut.lanes, THREADS)
    assert cut.threads == THREADS or (not unit_first and item_bytes < 8)
    assert cut.classes == min(inner, THREADS)
    assert cut.width == cut.lanes // cut.classes >= 1
    # At most a quarter of a group has nothing to do, if there is a choice.
    assert 4 * cut.width * cut.classes >= 3 * cut.lanes or cut.lanes >= THREADS
    assert cut.classes * (cut.class_chunks - 1) < inner <= cut.classes * cut.class_chunks
    assert cut.held == cut.width * (16 if item_bytes == 8 else 32)
    if not unit_first:
        # A group is a warp at least, and holds a unit, if a block can.
        most = THREADS if item_bytes == 8 else MANY_THREADS
        assert cut.lanes >= 32 and (members <= cut.held or cut.lanes == most)


@examples(max_examples=1000)
@given(any_matrix(), booleans, booleans, item_sizes)
def test_tiles(shape, unit_first, aligned, item_bytes):
    units, members, inner = shape
    cut = plan(*shape, unit_first, aligned, item_bytes)
    total = members if unit_first else units * cut.class_chunks
    assert 0 < cut.span and (cut.tiles - 1) * cut.span < total <= cut.tiles * cut.span
    if unit_first:
        assert cut.span == PACK * cut.width
        slab = min(cut.span, members) * units * inner * item_bytes
        if cut.classes == 1:
            # Whole sectors, of as many units as stay in a cache; not twice as many would.
            assert cut.span * item_bytes >= SECTOR_BYTES
            assert slab <= SLAB_BYTES or cut.span * item_bytes == SECTOR_BYTES or cut.lanes > 32
            assert cut.lanes >= 32 or 2 * slab > SLAB_BYTES
            # More than a warp to a unit only where there are too few units for all warps.
            assert cut.lanes <= 32 or units * cut.lanes <= 8 * THREADS
        else:
            few = (2**k for k in range(4, 9) if 4 * (2**k // cut.classes * cut.classes) >= 3 * 2**k)
            assert slab <= SLAB_BYTES or cut.lanes == next(few, THREADS)
        return
    # Twice where inner indices come in chunks, as the last one may be almost empty.
    assert cut.tiles <= (TILES if cut.class_chunks == 1 else 2 * TILES)
    # Of at least so many elements, places without one included; and every group has work.
    assert cut.tiles == 1 or cut.span * members * cut.classes >= LEAST_TILE
    assert cut.tiles == 1 or cut.span % cut.groups == 0


@examples(max_examples=1000)
@given(any_matrix(), booleans, item_sizes)
def test_indices_fit_into_32_bits(shape, unit_first, item_bytes):
    units, members, inner = shape
    cut = plan(*shape, unit_first, True, item_bytes)
    # Loops go on by a step, and groups begin within one.
    step = 2 * cut.groups * cut.packs
    assert cut.span * cut.tiles <= LARGEST_INT
    assert units * cut.class_chunks + step <= LARGEST_INT
    assert members + cut.held <= LARGEST_INT
    assert cut.tiles <= LARGEST_INT


@pytest.mark.parametrize(
    "shape",
    [
        (LARGEST, 1, 1), (1, LARGEST, 1), (1, 1, LARGEST), (LARGEST, LARGEST, 1),
        (2**20, LARGEST, 2**10), (LARGEST // 513, 7, 513), (2**16, 2**16, 2**14),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("unit_first", [False, True])
def test_the_largest_matrices(shape, unit_first):
    for test in (test_blocks, test_tiles):
        for item_bytes in (2, 4, 8):
            test.hypothesis.inner_test(shape, unit_first, True, item_bytes)
            test_indices_fit_into_32_bits.hypothesis.inner_test(shape, unit_first, item_bytes)


@pytest.mark.parametrize("unit_first", [False, True])
@pytest.mark.parametrize("shape", [(0, 0, 1), (0, 5, 1), (5, 0, 1), (5, 3, 0), (0, 200, 7)])
def test_empty_matrices(shape, unit_first):
    """Have a tile too, or nobody writes their products, which are zeros."""
    cut = plan(*shape, unit_first)
    assert cut.width >= 1 and cut.classes >= 1 and cut.span >= 1 and cut.tiles >= 1
    assert elements(cut, *shape).numel() == 0
    units, members, inner = shape
    assert cut.span * cut.tiles >= (members if unit_first else units * cut.class_chunks)


@examples(max_examples=300)
@given(any_matrix(), booleans, item_sizes)
def test_alignment_decides_about_packs_only(shape, unit_first, item_bytes):
    """So that a slice is summed up in the same order, but for the places of members."""
    aligned, not_aligned = (plan(*shape, unit_first, own, item_bytes) for own in (True, False))
    assert not not_aligned.vectorized
    aligned.vectorized = False
    assert aligned == not_aligned


@examples(max_examples=1000)
@given(any_size, any_size.map(lambda n: n - 1))
def test_division_without_a_division(by, number):
    for near in (number, number // by * by, number // by * by - 1, LARGEST_INT):
        if near >= 0:
            assert emulated.backend().divide(near, by) == near // by


@examples(max_examples=100)
@given(any_matrix(), booleans, item_sizes)
def test_same_cut_at_every_call(shape, unit_first, item_bytes):
    assert plan(*shape, unit_first, True, item_bytes) == plan(*shape, unit_first, True, item_bytes)


# The networks of the benchmarks


def shapes_of(name: str) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [tuple(layer.weight.shape) for layer in networks.layers(networks.NETWORKS[name]())]


each_network = pytest.mark.parametrize("name", networks.NETWORKS)


@each_network
@pytest.mark.parametrize("unit_first", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_networks(name, dim, unit_first):
    for shape in map(partial(matrix, dim=dim), shapes_of(name)):
        for item_bytes in (2, 4, 8):
            test_blocks.hypothesis.inner_test(shape, unit_first, True, item_bytes)
            test_tiles.hypothesis.inner_test(shape, unit_first, True, item_bytes)


def summands(shape: tuple[int, int, int], unit_first: bool) -> int:
    """Elements of the second vector's summands."""
    units, members, inner = shape
    return plan(*shape, unit_first).tiles * (units * inner if unit_first else members)


@each_network
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("unit_first", [False, True])
def test_summands_are_few(name, unit_first, dim):
    """Writing and reading them must cost less than reading the weight once saves."""
    shapes = [matrix(shape, dim) for shape in shapes_of(name)]
    fraction = sum(summands(shape, unit_first) for shape in shapes) / sum(map(prod, shapes))
    assert fraction < 1 / 5


# What a cut means


def multiply(weight: Tensor, x: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """Phase A: the first vector, and for each tile a summand of the second."""
    units, members, inner = weight.shape
    first = torch.full((members,) if cut.unit_first else (units, inner), torch.nan)
    of_second = torch.zeros(cut.tiles, *((units, inner) if cut.unit_first else (members,)))
    for tile in range(cut.tiles):
        if cut.unit_first:
            # A range of members, and all units twice.
            own = slice(tile * cut.span, (tile + 1) * cut.span)
            first[own] = torch.einsum("nri,ni->r", weight[:, own], x)
            of_second[tile] = torch.einsum("nri,r->ni", weight[:, own], first[own])
        else:
            # Whole units, or a chunk of their inner indices, each read once.
            for cell in cells(cut, units, tile).tolist():
                unit, chunk = divmod(cell, cut.class_chunks)
                own = slice(chunk * cut.classes, (chunk + 1) * cut.classes)
                first[unit, own] = weight[unit, :, own].mT @ x
                of_second[tile] += weight[unit, :, own] @ first[unit, own]
    return first, of_second


def finish(first: Tensor, of_second: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Phase B: both vectors of length 1, and sigma."""
    first_scale = 1 / first.norm().clamp_min(eps)
    second = of_second.sum(0) * first_scale
    norm = second.norm()
    length = norm.clamp_min(eps)
    return first * first_scale, second / length, norm * (norm / length)


@examples(max_examples=100)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.data())
@pytest.mark.usefixtures("double")
def test_phases_are_a_power_iteration(shape, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    v_first, eps = data.draw(booleans), data.draw(st.sampled_from([1e-12, 5.0]))
    units, members, inner = matrix(tuple(shape), dim)
    weight = torch.randn(shape, dtype=torch.float64)
    rows, cols = reference.to_matrix(weight, dim).shape
    u, v = torch.randn(rows), torch.randn(cols)
    expected = reference.iterate(reference.to_matrix(weight, dim), u, v, eps, v_first)

    members_are_columns = (units, members) == (rows, cols) and inner == 1 and prod(shape[:dim]) == 1
    members_are_columns |= rows == 1
    # v comes out first: u goes in.
    unit_first = v_first == members_are_columns
    cut = plan(units, members, inner, unit_first, data.draw(booleans), item_bytes=8)
    given_vector = u if v_first else v
    x = given_vector.view(units, inner) if unit_first else given_vector
    one, other, sigma = finish(*multiply(weight.reshape(units, members, inner), x, cut), eps)
    actual = (other, one, sigma) if v_first else (one, other, sigma)
    torch.testing.assert_close([x.flatten() for x in actual], [x.flatten() for x in expected])
