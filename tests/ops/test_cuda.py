"""The CUDA back-end without a GPU: its kernels in the emulator, against `fastsn.reference`.

What a GPU rarely shows is an error here: memory that is read before it is written, misaligned
access, missing barriers, results that depend on which thread comes first.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsn import reference
from helpers import cuda_fixtures, emulated, operator_numbers
from helpers.calls import (
    ALL_TYPES,
    Call,
    assert_same,
    each_order,
    each_type,
    gradients_for,
    large_call,
    make_call,
    random,
)
from helpers.cuda_fixtures import every_kind, permuted
from helpers.operator_numbers import check
from helpers.sweeps import each_value, sweep
from helpers.tolerances import assert_sum_no_worse

# Of every test here.
cuda, tested = cuda_fixtures.cuda, cuda_fixtures.tested
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@sweep
class TestNumbers(operator_numbers.OperatorNumbers):
    """All that the CPU's kernels are held to, and what is special to these."""

    @each_order
    @each_type
    def test_every_dimension_and_number_of_iterations(self, dtype, v_first):
        cases = list(itertools.product(range(4), (0, 1, 2, 5)))
        weights = [random(5, 4, 3, 6, dtype=dtype) for _ in cases]
        dims, iterations = (list(column) for column in zip(*cases, strict=True))
        check(make_call(weights, dims, iterations=iterations, v_first=v_first))

    @each_order
    @each_type
    def test_odd_sizes(self, dtype, v_first):
        sizes = (1, 3, 27, 63, 129, 1000)
        weights = [random(a, b, dtype=dtype) for a in sizes for b in sizes if a * b <= 129_000]
        dims = [k % 2 for k in range(len(weights))]
        for own in (dims, [1 - dim for dim in dims]):
            check(make_call(weights, own, v_first=v_first))

    @each_order
    @pytest.mark.parametrize("iterations", [0, 1, 3])
    def test_empty_weights(self, iterations, v_first):
        shapes = [(0, 200), (200, 0), (1, 0), (0, 1), (0, 3), (3, 0), (0, 0), (0,), (2, 0, 300)]
        cases = [(shape, dim) for shape in [*shapes, (300, 0, 2)] for dim in range(len(shape))]
        for shape, dim in cases:
            call = make_call([random(*shape), random(5, 4)], [dim, 0], v_first=v_first)
            check(replace(call, iterations=[iterations, 1]))

    @each_value
    @each_order
    @pytest.mark.parametrize("inner", [*range(1, 66), 127, 255, 511, 512, 513, 1030])
    def test_inner_indices(self, inner, v_first):
        """Of every short length and beyond what lies side by side in a block."""
        shapes = [(3, 7), (5, 150), (40, 33), (1, 9), (9, 1)]
        check(make_call([random(*shape, inner) for shape in shapes], dims=1, v_first=v_first))

    @each_order
    @each_type
    @pytest.mark.parametrize(
        "shape, dim", [((3, 40_000), 0), ((20, 16_385), 0), ((2, 20_000, 3), 1)]
    )
    def test_units_longer_than_what_a_block_holds(self, shape, dim, dtype, v_first):
        for iterations in (0, 2):
            check(make_call([random(*shape, dtype=dtype)], dim, iterations=iterations,
                            v_first=v_first))  # fmt: skip

    @each_order
    def test_long_rows_that_are_not_aligned(self, v_first):
        flat = random(20 * 16_388 + 3)
        check(make_call([flat[3:].view(20, 16_388)], v_first=v_first))

    @each_order
    @each_type
    @pytest.mark.parametrize("shape, dim", [((12, 64), 0), ((64, 12), 1), ((8, 16, 3, 3), 1)])
    def test_every_alignment(self, shape, dim, dtype, v_first):
        weights = []
        for offset in range(8):
            flat = random(torch.Size(shape).numel() + offset, dtype=dtype)
            weights.append(flat[offset:].view(shape))
        call = make_call(weights, dim, v_first=v_first)
        bytes_off = {w.data_ptr() % 16 for w in call.weights}
        assert len(bytes_off) == min(8, 16 // dtype.itemsize)
        check(call)

    @each_order
    @pytest.mark.parametrize("dim", range(4))
    def test_every_order_of_dimensions(self, dim, v_first):
        orders = list(itertools.permutations(range(4)))
        for shape in [(5, 6, 3, 4), (6, 1, 3, 5)]:
            check(make_call([permuted(shape, order) for order in orders], dim, v_first=v_first))

    @each_order
    @each_type
    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    def test_channels_last(self, norm, dtype, v_first):
        four, five = (random(9, 6, *[3] * n, dtype=dtype) for n in (2, 3))
        weights = [
            four.to(memory_format=torch.channels_last),
            five.to(memory_format=torch.channels_last_3d),
        ]
        check(make_call(weights, [0, 1], norm, v_first=v_first))

    @each_order
    def test_most_permuted_columns(self, v_first):
        shape = (2, 3, 4, 3, 2)
        orders = [(4, 3, 2, 1, 0), (2, 0, 4, 1, 3), (1, 3, 0, 4, 2)]
        for dim in range(5):
            check(make_call([permuted(shape, order) for order in orders], dim, v_first=v_first))

    @each_order
    def test_hundreds_of_layers(self, v_first):
        shapes = [(3, 5), (8, 8), (1, 17), (33, 2), (4, 3, 3), (16, 4, 1, 1)]
        weights = [random(*shapes[i % 6], dtype=ALL_TYPES[1 + i % 3]) for i in range(700)]
        iterations = [i % 3 for i in range(700)]
        call = make_call(weights, 0, "bidirectional", iterations)
        check(replace(call, v_first=v_first))

    @each_order
    def test_zero_guard_at_any_round(self, v_first):
        """u and v are those of the last round whose sigma was not zero."""
        weights = [random(6, 5) for _ in range(3)]
        call = make_call(weights, iterations=[1, 2, 3], v_first=v_first, zero_guard=True)
        # Of the second direction remains nothing after one round.
        call.weights = [torch.diag(torch.tensor([1.0, 0.0, 0.0])) for _ in weights]
        first, second = torch.eye(3)[0], torch.eye(3)[1]
        call.u, call.v = [first, second, first + second], [first, second, first - second]
        check(call.copy())
        live = call.copy()
        snapshot = live.power(operator_numbers.ops)
        assert snapshot[-3:].tolist() == [1, 0, 1]
        assert torch.equal(live.u[1], second) and torch.equal(live.v[1], second)

    @each_order
    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_no_number_comes_out_of_one_that_is_none(self, value, norm, v_first, cuda):
        weight = random(6, 70, 2)
        call = make_call([weight.clone(), random(5, 4)], 0, norm, v_first=v_first)
        call.weights[0][2, 3, 1] = value
        results, expected = (call.run(gradients_for(call), own) for own in (cuda, reference))
        for ours, theirs in zip(results, expected, strict=True):
            assert [x.isnan().any() for x in ours] == [x.isnan().any() for x in theirs]
        assert results.normalized[0].isnan().all() and not results.normalized[1].isnan().any()

    @each_order
    def test_nan_reaches_everything(self, v_first, cuda):
        call = make_call([random(6, 5)], v_first=v_first)
        call.weights[0][2, 3] = torch.nan
        assert all(x.isnan().all() for x in call.run([random(6, 5)], cuda).vectors)

    @pytest.mark.parametrize("vector_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
    def test_vectors_of_very_narrow_types(self, vector_dtype):
        call = make_call([random(9, 70, dtype=dtype) for dtype in ALL_TYPES[1:]], iterations=2)
        call.u, call.v = ([x.to(vector_dtype) for x in side] for side in (call.u, call.v))
        check(call)

    # Deterministic: the same examples at every run.
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def test_any_call(self, data):
        """Shapes, strides, offsets, types, methods; short and long runs of all three sizes."""
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        dtypes = st.sampled_from(ALL_TYPES[1:] if data.draw(st.booleans()) else ALL_TYPES[:1])
        norm = data.draw(st.sampled_from(["matrix", "bidirectional"]))
        weights, dims, iterations, scales = [], [], [], []
        for _ in range(data.draw(st.integers(1, 4))):
            sizes = st.one_of(st.integers(1, 9), st.sampled_from([0, 16, 33, 64, 130, 700]))
            shape = data.draw(st.lists(sizes, min_size=1, max_size=5))
            # An empty matrix has rows or columns too.
            while prod(size or 1 for size in shape) > 50_000:
                shape[shape.index(max(shape))] = 2
            dtype = data.draw(dtypes)
            order = data.draw(st.permutations(range(len(shape))))
            dense = permuted(shape, order, dtype)
            offset = data.draw(st.integers(0, 7))
            memory = torch.empty(dense.numel() + offset, dtype=dtype)[offset:]
            weights.append(memory.as_strided(shape, dense.stride(), offset).copy_(dense))
            dims.append(data.draw(st.integers(0, len(shape) - 1)))
            iterations.append(data.draw(st.integers(0, 3)))
            scales.append(data.draw(st.sampled_from([0.1, 1.0, 3.0, 100.0])))
        call = make_call(weights, dims, norm, iterations, scales=scales)
        eps = data.draw(st.sampled_from([1e-12, 1e-4, 10.0]))
        v_first, bound = data.draw(st.booleans()), data.draw(st.booleans())
        check(replace(call, eps=eps, v_first=v_first, bound=bound, zero_guard=True))


# Results of another type


@pytest.mark.parametrize("grads", ALL_TYPES, ids=str)
@each_type
@pytest.mark.parametrize("layout", ["contiguous", "offset", "transposed"])
def test_results_of_another_type(dtype, grads, layout, cuda):
    """As autocast wants them: one rounding forward; gradients in the weights' types again."""
    shapes = [(6, 5), (4, 3, 3, 3), (1, 9001), (130, 64)]
    weights = [random(*shape, dtype=dtype) for shape in shapes]
    if layout == "offset":
        weights = [torch.cat([w.flatten()[:1], w.flatten()])[1:].view(w.shape) for w in weights]
    if layout == "transposed":
        weights = [w.transpose(0, 1).contiguous().transpose(0, 1) for w in weights]
    call = make_call(weights, norm="bidirectional", scales=[1.0, 0.5, 0.1, 2.0])
    wide = call.copy(torch.float64)
    snapshot, exact_snapshot = call.estimate(cuda), wide.estimate(reference)
    results, peers = (
        own.scale(weights, snapshot, *call.constraint(), grads) for own in (cuda, reference)
    )
    exact = reference.scale(wide.weights, exact_snapshot, *call.constraint())
    sums = {"length": 9001, "computed_in": reference.accumulate_type(weights[0])}
    for weight, ours, peer, truth in zip(weights, results, peers, exact, strict=True):
        assert ours.dtype == grads and ours.stride() == torch.empty_like(weight).stride()
        assert_sum_no_worse(ours, peer, truth, **sums)

    given_grads = [torch.randn(shape).to(grads) for shape in shapes]
    results, peers = (
        own.scale_backward(given_grads, weights, snapshot, *call.constraint())
        for own in (cuda, reference)
    )
    exact = reference.scale_backward(
        [g.double() for g in given_grads], wide.weights, exact_snapshot, *call.constraint()
    )
    for weight, grad, *triple in zip(weights, given_grads, results, peers, exact, strict=True):
        assert triple[0].dtype == dtype and triple[0].stride() == torch.empty_like(weight).stride()
        largest_term = grad.double().abs().max().item()
        assert_sum_no_worse(*triple, **sums, largest_term=largest_term)


@each_type
def test_results_of_types_mixed_in_one_call(dtype, cuda):
    """Weights, results and gradients each have their own type."""
    weights = [random(6, 5, dtype=own) for own in ALL_TYPES[1:] for _ in range(3)]
    call = make_call(weights)
    snapshot = call.estimate(cuda)
    grads = [random(6, 5, dtype=ALL_TYPES[k % 4]) for k in range(9)]
    results, peers = (
        own.scale(weights, snapshot, *call.constraint(), dtype) for own in (cuda, reference)
    )
    assert all(x.dtype == dtype for x in results)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(results, peers, **close)
    results, peers = (call.scale_backward(grads, snapshot, own) for own in (cuda, reference))
    for own, peer, weight in zip(results, peers, weights, strict=True):
        assert own.dtype == weight.dtype
        rounding = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(own, peer, rtol=2 * rounding, atol=rounding)


# Results depend on shapes only


@each_order
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["narrow", "double"])
def test_same_bits_in_every_order(v_first, dtype, cuda):
    call = every_kind(v_first)
    call = call.copy(dtype) if dtype else call
    grads = gradients_for(call)
    expected = call.run(grads, cuda)
    check(call)
    for order in ("reversed", "random:1", "random:2", "random:3", "reversed,random:4"):
        with emulated.order(order):
            assert_same(call.run(grads, cuda), expected)


@each_order
def test_same_bits_alone_or_among_others(v_first, cuda):
    together = replace(large_call(v_first), zero_guard=True)
    grads = gradients_for(together)
    result = together.run(grads, cuda)
    for layer, weight in enumerate(together.weights):
        e = [e for e, other in enumerate(together.layers) if other == layer]
        u, v, dims = ([side[i] for i in e] for side in (together.u, together.v, together.dims))
        iterations = [together.iterations[layer]]
        alone = Call([weight], u, v, [0] * len(e), dims, iterations, [1.0], v_first=v_first)
        own = replace(alone, zero_guard=True).run([grads[layer]], cuda)
        assert torch.equal(own.normalized[0], result.normalized[layer])
        assert torch.equal(own.gradients[0], result.gradients[layer])
        assert all(map(torch.equal, own.sigmas, [result.sigmas[i] for i in e]))


@each_order
def test_two_iterations_are_one_twice(v_first, cuda):
    once, twice = every_kind(v_first), every_kind(v_first)
    twice = replace(once.copy(), iterations=[2] * 8)
    once = replace(once.copy(), iterations=[1] * 8)
    for call in (once, twice):
        call.u, call.v = ([x.float() for x in side] for side in (call.u, call.v))
    once.power(cuda)
    assert torch.equal(once.power(cuda), twice.power(cuda))
    assert all(map(torch.equal, once.u + once.v, twice.u + twice.v))
