"""The operators' numbers against `fastsn.reference`, which is the specification.

Tests of a back-end put it in the place of `ops`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsn import ops, reference
from helpers.calls import (
    ALL_TYPES,
    SHAPES,
    Call,
    each_layout,
    each_order,
    each_type,
    gradients_for,
    make_call,
    random,
)
from helpers.tolerances import assert_sum_no_worse

#: Lengths of vectors whose squares the type does not hold.
BEYOND_SQUARES = [
    (torch.float32, 1e30), (torch.float32, 3e38), (torch.float32, 1e-30), (torch.float32, 1e-40),
    (torch.bfloat16, 1e30), (torch.bfloat16, 1e-30),
    (torch.float64, 1e200), (torch.float64, 1e-200), (torch.float64, 1e-310),
]  # fmt: skip


def check(call: Call) -> None:
    """The operators' error against float64 is like that of the reference in the same types."""
    grads = gradients_for(call)
    wide = call.copy(torch.float64)
    ours, peer = call.run(grads, ops), call.run(grads, reference)
    exact = wide.run([g.double() for g in grads], reference)
    sums = {
        "length": max(x.numel() for x in [*call.u, *call.v]),
        "computed_in": reference.accumulate_type(call.weights[0]),
    }
    for name in ("vectors", "normalized", "sigmas"):
        for triple in zip(*(getattr(x, name) for x in (ours, peer, exact)), strict=True):
            assert_sum_no_worse(*triple, **sums)
    results = zip(ours.gradients, peer.gradients, exact.gradients, strict=True)
    for triple, grad, before, after in zip(
        results, grads, wide.weights, exact.normalized, strict=True
    ):
        # A part of scale / sigma * G cancels. Of a zero weight nothing does.
        factor = (after.norm() / before.norm()).nan_to_num()
        largest_term = (factor * grad.double().norm(torch.inf)).item() if grad.numel() else 0.0
        assert_sum_no_worse(*triple, **sums, largest_term=largest_term)


@pytest.mark.usefixtures("poisoned_memory")
class OperatorNumbers:
    """What the numbers of every back-end are held to; a test file derives its tests from it."""

    @each_order
    @each_type
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_sizes(self, shape, dtype, v_first):
        each = {0, min(1, len(shape) - 1), len(shape) - 1}
        moments = [(0, 0.3), (0, 1.0), (0, 2.0), (1, 2.0), (3, 1.0)]
        cases = [(dim, *moment) for dim in each for moment in moments]
        weights = [random(*shape, dtype=dtype) for _ in cases]
        dims, iterations, lengths = (list(column) for column in zip(*cases, strict=True))
        check(make_call(weights, dims, iterations=iterations, lengths=lengths, v_first=v_first))

    @each_order
    @each_type
    def test_rows_of_every_short_length(self, dtype, v_first):
        weights = [random(5, 7, inner, dtype=dtype) for inner in range(1, 68)]
        check(make_call(weights, dims=1, v_first=v_first))

    @each_order
    @pytest.mark.parametrize(
        "shape, dim",
        [
            ((1100, 1000), 0), ((3, 400_000), 0), ((400_000, 3), 0), ((512, 240, 3, 3), 0),
            ((240, 512, 3, 3), 1), ((300, 5, 800), 1), ((40_000, 3, 9), 1),
        ],
    )  # fmt: skip
    def test_weights_of_many_tiles(self, shape, dim, v_first):
        check(make_call([random(*shape)], dim, v_first=v_first))

    @each_order
    @each_type
    def test_bidirectional(self, dtype, v_first):
        shapes = [(6, 5), (6, 5, 1, 1), (6, 5, 3), (64, 3, 3, 3), (3, 64, 4, 4), (5, 40, 2, 2, 2)]
        weights = [random(*shape, dtype=dtype) for shape in shapes for _ in range(2)]
        iterations = [1, 0, 3] * 4
        scales = [0.7 + 0.1 * i for i in range(len(weights))]
        call = make_call(weights, [0, 1] * len(shapes), "bidirectional", iterations, scales=scales)
        check(replace(call, v_first=v_first))

    @each_order
    @each_layout
    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    def test_layouts(self, layout, norm, v_first):
        dims = [0, 1, 3] if norm == "matrix" else [0, 1]
        for dtype in (torch.float32, torch.bfloat16):
            for shape in [(6, 5, 3, 4), (5, 6, 1, 40), (1, 6, 3, 3), (6, 1, 3, 3)]:
                weights = [layout(random(*shape, dtype=dtype)) for _ in dims]
                check(make_call(weights, dims, norm, v_first=v_first))

    @each_order
    def test_types_of_one_call(self, v_first):
        weights = [random(9, 70, dtype=dtype) for dtype in ALL_TYPES[1:]]
        check(make_call(weights, v_first=v_first))

    @pytest.mark.parametrize("vector_dtype", ALL_TYPES, ids=str)
    def test_vectors_of_any_type(self, vector_dtype):
        call = make_call([random(9, 70, dtype=dtype) for dtype in ALL_TYPES[1:]], iterations=2)
        call.u, call.v = ([x.to(vector_dtype) for x in side] for side in (call.u, call.v))
        check(call)

    def test_vectors_that_are_not_contiguous(self):
        call = make_call([random(9, 70), random(7, 3)])
        strided = call.copy()
        strided.u, strided.v = (
            [torch.stack([x, x], dim=1)[:, 0] for x in side] for side in (call.u, call.v)
        )
        assert torch.equal(strided.power(ops), call.power(ops))
        for a, b in zip(strided.u + strided.v, call.u + call.v, strict=True):
            assert a.stride() == (2,) and torch.equal(a, b)

    @each_type
    @pytest.mark.parametrize("vector_dtype", ALL_TYPES, ids=str)
    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    def test_vectors_of_any_length_at_rest(self, norm, vector_dtype, dtype):
        """Averages of unit vectors are shorter than these. Beside some that iterate."""
        iterations, lengths = [0, 1, 0, 2, 0], [0.3, 0.3, 2.0, 2.0, 1.0]
        weights = [random(9, 7, 10, dtype=dtype).transpose(1, 2) for _ in iterations]
        call = make_call(weights, [0, 1, 1, 0, 2], norm, iterations, lengths)
        call.u, call.v = (
            [torch.stack([x, x], 1)[:, 0].to(vector_dtype) for x in side]
            for side in (call.u, call.v)
        )
        check(call)
        before = call.copy()
        call.power(reference)
        for e, layer in enumerate(call.layers):
            is_kept = torch.equal(call.u[e], before.u[e]) and torch.equal(call.v[e], before.v[e])
            assert is_kept == (iterations[layer] == 0)

    @pytest.mark.parametrize("dtype, length", BEYOND_SQUARES)
    @pytest.mark.parametrize("shape", [(3, 5), (70, 90), (2, 9000)], ids=str)
    def test_vectors_whose_squares_are_no_numbers_at_rest(self, shape, dtype, length):
        self.check_vectors_whose_squares_are_no_numbers_at_rest(shape, dtype, length)

    def check_vectors_whose_squares_are_no_numbers_at_rest(self, shape, dtype, length):
        weights = [random(*shape, dtype=dtype) for _ in range(3)]
        call = make_call(weights, iterations=[0, 1, 0], lengths=[length, 1.0, length])
        for x in (call.u[0], call.v[2]):
            assert x.isfinite().all() and x.any()
            assert x.float().square().sum() in (0, torch.inf)
        check(call)

    @each_type
    def test_vectors_of_length_zero_at_rest(self, dtype):
        call = make_call([random(9, 70, dtype=dtype) for _ in range(4)], iterations=[0, 0, 0, 1])
        call.u[0].zero_()
        call.v[1].zero_()
        call.u[2].zero_()
        call.v[2].zero_()
        snapshot = call.power(reference)
        assert snapshot[-4:-1].tolist() == [0, 0, 0] and snapshot.isfinite().all()
        check(replace(call, zero_guard=True))

    @each_order
    def test_eps_larger_than_the_norms(self, v_first):
        check(make_call([random(9, 70), random(4, 3, 3, 3)], eps=50.0, v_first=v_first))

    @each_type
    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    @pytest.mark.parametrize("zero_guard", [False, True])
    def test_bound(self, norm, dtype, zero_guard):
        weights = [random(6, 5, 3, 3, dtype=dtype), random(6, 5, 3, 3, dtype=dtype)]
        check(make_call(weights, 0, norm, scales=[0.5, 50.0], bound=True, zero_guard=zero_guard))

    @each_order
    @each_type
    @pytest.mark.parametrize("bound", [False, True])
    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    def test_zero_guard(self, norm, bound, dtype, v_first):
        zero = torch.zeros(6, 5, 3, 3, dtype=dtype)
        weights = [zero, random(6, 5, 3, 3, dtype=dtype), zero.clone()]
        call = make_call(weights, 0, norm, [1, 1, 0], scales=[0.5, 1.0, 2.0], bound=bound)
        # Any u and v will do for a zero weight, and zeros would show less.
        call.u, call.v = ([torch.ones_like(x) for x in side] for side in (call.u, call.v))
        check(replace(call, v_first=v_first, zero_guard=True))

    @pytest.mark.parametrize("sigma", [-2.0, -0.5])
    @pytest.mark.parametrize("bound", [False, True])
    def test_negative_sigma(self, sigma, bound):
        call = make_call([random(6, 5)], iterations=0, bound=bound)
        call.weights[0] *= -sigma / call.estimate()[-1]
        call.u[0].neg_()
        check(call)

    # Deterministic: the same examples at every run. Other back-ends' tests inherit this class.
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(st.data())
    def test_any_shapes(self, data):
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        dtypes = st.sampled_from(ALL_TYPES[1:] if data.draw(st.booleans()) else ALL_TYPES[:1])
        weights, dims, iterations, lengths = [], [], [], []
        for _ in range(data.draw(st.integers(1, 4))):
            sizes = st.integers(0, data.draw(st.sampled_from([4, 40])))
            shape = data.draw(st.lists(sizes, min_size=1, max_size=4))
            order = data.draw(st.permutations(range(len(shape))))
            inverse = sorted(range(len(shape)), key=order.__getitem__)
            weight = random(*(shape[d] for d in order), dtype=data.draw(dtypes)).permute(inverse)
            weights.append(weight)
            dims.append(data.draw(st.integers(0, len(shape) - 1)))
            iterations.append(data.draw(st.integers(0, 3)))
            lengths.append(data.draw(st.sampled_from([0.3, 1.0, 2.0])))
        call = make_call(weights, dims, iterations=iterations, lengths=lengths, zero_guard=True)
        check(replace(call, v_first=data.draw(st.booleans()), bound=data.draw(st.booleans())))

    @each_layout
    def test_results_have_the_strides_of_a_quotient(self, layout):
        weight = layout(random(6, 5, 3, 4))
        call = make_call([weight])
        snapshot = call.power(ops)
        for (result,) in (
            call.scale(snapshot, ops),
            call.scale_backward([weight.clone()], snapshot, ops),
        ):
            assert result.stride() == (weight / 2.0).stride()
