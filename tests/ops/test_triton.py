"""The Triton kernels against `fastsn.reference`, in Triton's interpreter.

Whether Triton interprets is settled when it is imported, so `TestInterpreter` runs in a process of
its own, where TRITON_INTERPRET is 1.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsn.triton as backend
from fastsn import reference
from helpers import operator_numbers, triton_launches
from helpers.calls import (
    ALL_TYPES,
    BAD,
    LAYOUTS,
    SHAPES,
    Call,
    assert_same,
    each_layout,
    each_order,
    each_type,
    gradients_for,
    make_call,
    random,
)
from helpers.operator_numbers import BEYOND_SQUARES, OperatorNumbers, check
from helpers.sweeps import each_value, long, sweep
from helpers.tolerances import assert_sum_no_worse
from helpers.triton_launches import interpreted, name_of, run

pytest.importorskip("triton")

patched_once, variants_only = triton_launches.patched_once, triton_launches.variants_only


class TestProcess:
    __test__ = not backend.is_interpreted()

    @pytest.mark.parametrize("share", ["1/4", "2/4", "3/4", "4/4"])
    def test_interpreter(self, share):
        assert not interpreted(__file__, share)

    def test_triton_is_imported_by_the_first_call(self):
        code = "import sys, fastsn, fastsn.triton; sys.exit('triton' in sys.modules)"
        assert run("-c", code).returncode == 0

    def test_no_triton(self):
        code = (
            "import sys; sys.modules['triton'] = None\n"
            "from fastsn.triton import why_not; print(why_not())"
        )
        done = run("-c", code, TRITON_INTERPRET="1")
        assert done.stdout.startswith("Triton is not installed (pip install triton)")

    @pytest.mark.parametrize("has_gpu", [False, True])
    def test_no_gpu(self, has_gpu, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        expected = None if has_gpu else "no GPU was found, and TRITON_INTERPRET is not 1"
        assert backend.why_not() == expected
        assert backend.serves(torch.device("cuda"))  # who has a tensor there has a GPU
        assert not backend.serves(torch.device("cpu"))


# Triton 3.6 counts loops by a conversion that NumPy 2.4 no longer has.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.usefixtures("patched_once", "poisoned_memory")
@sweep
class TestInterpreter:
    __test__ = backend.is_interpreted()

    @pytest.fixture(autouse=True)
    def tested(self, monkeypatch):
        """What `operator_numbers.check` compares with the reference."""
        monkeypatch.setattr(operator_numbers, "ops", backend)

    # What is small enough for the interpreter is the same as for all other kernels.
    test_eps_larger_than_the_norms = OperatorNumbers.test_eps_larger_than_the_norms
    test_bound = OperatorNumbers.test_bound
    test_zero_guard = OperatorNumbers.test_zero_guard
    test_vectors_of_any_length_at_rest = OperatorNumbers.test_vectors_of_any_length_at_rest
    test_vectors_of_length_zero_at_rest = OperatorNumbers.test_vectors_of_length_zero_at_rest
    # Of long ones two, as they take the interpreter long.
    test_vectors_whose_squares_are_no_numbers_at_rest = pytest.mark.parametrize(
        "shape, dtype, length",
        [
            *((shape, *case) for shape in [(3, 5), (70, 90)] for case in BEYOND_SQUARES),
            *(
                pytest.param((2, 9000), *case, marks=long if case in BEYOND_SQUARES[1:-1] else ())
                for case in BEYOND_SQUARES
            ),
        ],
    )(OperatorNumbers.check_vectors_whose_squares_are_no_numbers_at_rest)
    test_results_have_the_strides_of_a_quotient = (
        OperatorNumbers.test_results_have_the_strides_of_a_quotient
    )

    def test_serves_the_cpu(self):
        assert backend.why_not() is None
        assert backend.serves(torch.device("cpu"))
        assert not backend.serves(torch.device("cuda"))  # would be read as addresses of the CPU

    @each_value
    @each_order
    @each_type
    @pytest.mark.parametrize("shape", [s for s in SHAPES if max(s) < 200 and len(s) < 5], ids=str)
    def test_sizes(self, shape, dtype, v_first):
        cases = [(0, 1), (len(shape) - 1, 3), (min(1, len(shape) - 1), 0)]
        weights = [random(*shape, dtype=dtype) for _ in cases]
        dims, iterations = (list(column) for column in zip(*cases, strict=True))
        check(make_call(weights, dims, iterations=iterations, v_first=v_first))

    @each_order
    @pytest.mark.parametrize(
        "shape, dim",
        [((2, 5000), 0), ((3000, 2), 0), ((70, 300), 0), ((40, 100, 3), 1), ((3, 5, 700), 1)],
    )
    def test_weights_of_many_blocks(self, shape, dim, v_first, early):
        check(make_call([random(*shape)], dim, v_first=v_first))

    @pytest.fixture
    def early(self, monkeypatch, caches):
        """The interpreter is slow: what is large elsewhere begins earlier."""
        from fastsn.triton import configs

        monkeypatch.setattr(configs, "CACHED", 100)
        monkeypatch.setattr(configs, "TILES", 1)
        monkeypatch.setattr(configs, "MAX_PIECES", 3)

    # Some of each width of a block along x, and more.
    @pytest.mark.parametrize(
        "v_first, length",
        [
            *((v_first, x) for v_first in (False, True) for x in (31, 1000)),
            *((True, x) for x in (4096, 4100)),
            *((False, x) for x in (16384, 16388)),
            *(
                pytest.param(v_first, x, marks=long)
                for v_first in (False, True)
                for x in (500, 2000, 8000)
            ),
            pytest.param(False, 4096, marks=long),
            # Far more than a block holds along this side.
            *(pytest.param(True, x, marks=long) for x in (16384, 16388)),
        ],
    )
    def test_weights_are_read_once(self, length, v_first, early, monkeypatch):
        from triton.runtime import interpreter

        load = interpreter.InterpreterBuilder.create_masked_load
        held = 4096 if v_first else 16384
        # Odd lengths of what lies side by side in memory have blocks of half the size.
        for other in (3, 8):
            weight = random(length, other) if v_first else random(other, length)
            held_at_odd = held // 2 if weight.shape[1] % 4 else held
            call = make_call([weight], v_first=v_first)
            begin, read = weight.data_ptr(), 0

            def count(builder, at, mask, *args, begin=begin, end=begin + weight.nbytes, **kwargs):
                nonlocal read
                read += (mask.data & (at.data >= begin) & (at.data < end)).sum()
                return load(builder, at, mask, *args, **kwargs)

            with mock.patch.object(interpreter.InterpreterBuilder, "create_masked_load", count):
                call.power(backend)
            assert read == weight.numel() * (1 if length <= held_at_odd else 2)
            check(make_call([weight], v_first=v_first))

    @each_order
    @each_type
    def test_tiles(self, dtype, v_first):
        """A block fits the registers, and a tile has few partial sums and many neighbours."""
        from fastsn.triton import configs

        for vector in (1, 16 // dtype.itemsize):
            for n_y in (1, 5, 64, 512, 4096, 50000):
                for n_x in (1, 27, 300, 576, 4096, 4608, 13824, 16384, 70000):
                    kind, width, step = configs.tiles_of(n_y, n_x, not v_first, dtype, vector)
                    blocks = configs.blocks_of(kind, not v_first, dtype, vector)
                    itemsize = configs.accumulate_type(dtype).itemsize
                    threads = 32 * configs.options({"HOLDS_ALL": kind == "large"})["num_warps"]
                    assert blocks.size * itemsize // threads <= 128
                    if width == 0:
                        assert n_x > blocks.widest and kind == "small"
                        continue
                    narrowest = blocks.widest // blocks.ratio ** (blocks.widths - 1)
                    assert n_x <= width and (width == narrowest or width // blocks.ratio < n_x)
                    assert step % (blocks.size // width) == 0
                    assert step == blocks.size // width or n_y / step <= 4 * n_y**0.5

    @each_value
    @each_order
    @each_type
    def test_bidirectional(self, dtype, v_first):
        shapes = [(6, 5), (6, 5, 1, 1), (6, 5, 3), (64, 3, 3, 3), (3, 64, 4, 4), (5, 40, 2, 2, 2)]
        weights = [random(*shape, dtype=dtype) for shape in shapes]
        scales = [0.7 + 0.1 * i for i in range(len(weights))]
        call = make_call(weights, [0, 1] * 3, "bidirectional", [1, 0, 3] * 2, scales=scales)
        check(replace(call, v_first=v_first))

    @each_value
    @each_order
    @each_layout
    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    def test_layouts(self, layout, norm, v_first):
        dims = [0, 1, 3] if norm == "matrix" else [0, 1]
        for dtype, shape in [(torch.float32, (6, 5, 3, 4)), (torch.bfloat16, (5, 6, 1, 40))]:
            weights = [layout(random(*shape, dtype=dtype)) for _ in dims]
            check(make_call(weights, dims, norm, v_first=v_first))

    @each_order
    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    def test_channels_last_3d(self, norm, v_first):
        weight = random(8, 12, 3, 3, 2).to(memory_format=torch.channels_last_3d)
        check(make_call([weight, weight.clone()], [0, 1], norm, v_first=v_first))

    @each_layout
    def test_gradients_of_any_layout(self, layout):
        direction = layout(random(6, 5, 3, 4))
        for weight_layout in (lambda w: w, LAYOUTS["channels_last"], LAYOUTS["every-other"]):
            call = make_call([weight_layout(random(6, 5, 3, 4))])
            snapshot = call.power(backend)
            actual, expected = (
                call.scale_backward([g], snapshot, backend)[0]
                for g in (direction, direction.resolve_neg().contiguous())
            )
            assert torch.equal(actual, expected)

    @each_order
    def test_more_layers_than_travel_at_once(self, v_first):
        weights = [random(1 + i % 5, 1 + i % 7, dtype=ALL_TYPES[1 + i % 3]) for i in range(50)]
        iterations = [i % 3 for i in range(50)]
        scales = [0.5 + i / 30 for i in range(50)]
        check(make_call(weights, iterations=iterations, scales=scales, v_first=v_first))

    @pytest.mark.parametrize("vector_dtype", [*ALL_TYPES, torch.float8_e5m2], ids=str)
    def test_vectors_of_any_type(self, vector_dtype):
        call = make_call([random(9, 70, dtype=dtype) for dtype in ALL_TYPES[1:]], iterations=2)
        call.u, call.v = ([x.to(vector_dtype) for x in side] for side in (call.u, call.v))
        if vector_dtype.itemsize > 1:
            check(call)
            return
        # PyTorch computes so little with 8 bits that numbers cannot be judged in them.
        live, same = call.copy(), call.copy()
        same.u, same.v = ([x.float() for x in side] for side in (call.u, call.v))
        assert torch.equal(live.power(backend), same.power(backend))
        for a, b in zip(live.u + live.v, same.u + same.v, strict=True):
            assert torch.equal(a.float(), b.to(vector_dtype).float())

    def test_vectors_that_are_not_contiguous(self):
        call = make_call([random(9, 70), random(7, 3)], iterations=[1, 0])
        strided = call.copy()
        strided.u, strided.v = (
            [torch.stack([x, x], dim=1)[:, 0] for x in side] for side in (call.u, call.v)
        )
        assert torch.equal(strided.power(backend), call.power(backend))
        for a, b in zip(strided.u + strided.v, call.u + call.v, strict=True):
            assert a.stride() == (2,) and torch.equal(a, b)

    def test_eps_in_float64(self):
        weight = random(5, 4, dtype=torch.float64)
        call = make_call([weight], eps=0.1 * 5e-13)
        call.weights[0] *= 1e-14
        check(call)

    def test_zero_without_guard(self):
        call = make_call([torch.zeros(6, 5), random(6, 5)])
        call.u, call.v = ([torch.ones_like(x) for x in side] for side in (call.u, call.v))
        copy = call.copy()
        call.power(backend)
        copy.power(reference)
        assert not call.u[0].any() and not call.v[0].any()
        torch.testing.assert_close(call.u + call.v, copy.u + copy.v)

    def test_nan_is_not_hidden(self):
        weight = random(6, 5)
        weight[2, 3] = torch.nan
        call = make_call([random(6, 5)], zero_guard=True)
        call.weights[0].copy_(weight)
        assert call.power(backend).isnan().all()
        assert call.u[0].isnan().all() and call.v[0].isnan().all()

    @pytest.mark.parametrize("sigma", [-2.0, -0.5])
    @pytest.mark.parametrize("bound", [False, True])
    def test_negative_sigma(self, sigma, bound):
        call = make_call([random(6, 5)], iterations=0, bound=bound, scales=[-0.7])
        call.weights[0] *= -sigma / call.estimate(backend)[-1]
        call.u[0].neg_()
        check(call)

    @each_type
    @pytest.mark.parametrize("result", [*ALL_TYPES, None], ids=str)
    def test_results_of_another_type(self, result, dtype):
        call = make_call([random(6, 5, 3, dtype=dtype), random(30, 70, dtype=dtype)], [1, 0])
        call.weights[0] = call.weights[0].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        snapshot = call.power(backend)
        own = call.scale(snapshot, backend)
        wide = replace(call, weights=[w.double() for w in call.weights])
        exact = wide.scale(snapshot.double(), reference)
        grads = [random(*w.shape).to(result or dtype) for w in own]
        exact_gradients = wide.scale_backward(
            [g.double() for g in grads], snapshot.double(), reference
        )
        results = backend.scale(call.weights, snapshot, *call.constraint(), result)
        gradients = backend.scale_backward(grads, call.weights, snapshot, *call.constraint())
        for x, like, y in zip(results, own, exact, strict=True):
            assert x.dtype == (result or dtype) and x.stride() == like.stride()
            rounded = y.to(snapshot.dtype).to(x.dtype)
            assert_sum_no_worse(x, rounded, y, length=1, computed_in=snapshot.dtype)
        for x, w, y in zip(gradients, call.weights, exact_gradients, strict=True):
            assert x.stride() == w.stride()
            rounded = y.to(snapshot.dtype).to(w.dtype)
            assert_sum_no_worse(x, rounded, y, length=70, computed_in=snapshot.dtype)

    def test_same_bits_at_every_run_alone_or_among_others_and_at_any_address(self):
        weights = [random(9, 300), random(40, 3, 3, 3), random(6, 30, 11), random(3, 5)]
        together = make_call(weights, [0, 0, 1, 0], "bidirectional", [1, 2, 1, 0])
        result = together.run(weights, backend)
        assert_same(together.run(weights, backend), result)
        moved = [torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape) for w in weights]
        assert all(w.data_ptr() % 16 for w in moved)
        assert_same(replace(together, weights=moved).run(moved, backend), result)
        alone = []
        for layer, weight in enumerate(weights):
            e = [e for e, other in enumerate(together.layers) if other == layer]
            u, v, dims = ([side[i] for i in e] for side in (together.u, together.v, together.dims))
            iterations = [together.iterations[layer]]
            call = Call([weight], u, v, [0] * len(e), dims, iterations, [1.0])
            alone.append(call.run([weight], backend))
        for name in ("normalized", "gradients", "sigmas"):
            expected = [x for own in alone for x in getattr(own, name)]
            assert all(map(torch.equal, getattr(result, name), expected))

    @each_order
    def test_two_iterations_are_one_twice(self, v_first):
        weights = [random(40, 30), random(6, 5, 3, 3), random(7, 6, 5)]
        call = make_call(weights, [0, 0, 1], "bidirectional", 2, v_first=v_first)
        once = call.copy()
        once.iterations = [1] * 3
        once.power(backend)
        assert torch.equal(once.power(backend), call.power(backend))
        assert all(map(torch.equal, once.u + once.v, call.u + call.v))

    def test_no_iteration_writes_nothing(self):
        call = make_call([random(4, 3), random(5, 4, 3)], 0, "bidirectional", 0)
        before, versions = call.copy(), [x._version for x in call.u + call.v]
        assert torch.equal(call.power(backend), call.estimate(backend))
        assert all(map(torch.equal, call.u + call.v, before.u + before.v))
        assert [x._version for x in call.u + call.v] == versions

    @pytest.mark.parametrize("side", ["u", "v"])
    @pytest.mark.parametrize("shape", [(6, 5), (300, 5), (5, 300)])
    def test_nan_reaches_everything_at_rest(self, side, shape):
        call = make_call([random(*shape)], iterations=0)
        getattr(call, side)[0][3] = torch.nan
        start = 0 if side == "u" else shape[0]
        snapshot = call.estimate(backend)
        assert snapshot[start:][: shape[side == "v"]].isnan().all() and snapshot[-1].isnan()

    @pytest.mark.parametrize("length", [pytest.param(0.3, marks=long), 1e30, 1e-30])
    def test_vectors_of_more_chunks_than_a_block_at_rest(self, length):
        """Of which the last chunk has other numbers than the first ones."""
        call = make_call([random(1, 66_000)], iterations=0, lengths=length)
        call.v[0][:65_000] *= 1e-3
        exact = call.copy(torch.float64).estimate(reference)
        snapshot = call.estimate(backend).double()
        torch.testing.assert_close(snapshot, exact, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("side", ["weights", "u", "v"])
    @pytest.mark.parametrize("iterations", [0, 1])
    def test_storages_of_power(self, side, iterations):
        call = make_call([random(4, 3), random(2, 5)], iterations=iterations)
        before = call.copy()
        call.power(backend)
        tensors = getattr(before, side)
        tensors[1] = tensors[1].clone()
        tensors[1].untyped_storage().resize_(4)
        numel = tensors[1].numel()
        message = rf"{side}\[1\] of shape .* needs a storage of {4 * numel} bytes, got one of 4 b"
        kept = before.u[0].clone()
        with pytest.raises(RuntimeError, match=message):
            before.power(backend)
        assert torch.equal(before.u[0], kept)

    @pytest.mark.parametrize("name", ["weights", "grads", "snapshot"])
    def test_storages_of_scale(self, name):
        call = make_call([random(4, 3), random(2, 5)])
        snapshot, grads = call.power(backend), gradients_for(call)
        bad = {"weights": call.weights[1], "grads": grads[1], "snapshot": snapshot}[name]
        bad.untyped_storage().resize_(0)
        message = rf"{name}(\[1\])? of shape .* needs a storage of \d+ bytes, got one of 0 bytes"
        with pytest.raises(RuntimeError, match=message):
            call.scale_backward(grads, snapshot, backend)
        if name != "grads":
            with pytest.raises(RuntimeError, match=message):
                call.scale(snapshot, backend)

    @pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
    def test_bad_arguments_of_power(self, changes, message):
        call = make_call([random(4, 3), random(2, 5)])
        before = call.copy()
        with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
            replace(call, **changes).power(backend)
        for a, b in zip(before.u + before.v, call.u + call.v, strict=True):
            assert torch.equal(a, b)

    def test_bad_arguments_of_scale(self):
        call = make_call([random(4, 3), random(2, 5)])
        snapshot = call.power(backend)
        for bad in (snapshot[:-1], snapshot.double(), torch.stack([snapshot, snapshot], 1)[:, 0]):
            with pytest.raises(RuntimeError, match="contiguous Float snapshot of 16 .*, got"):
                call.scale(bad, backend)
        with pytest.raises(RuntimeError, match="expected 2 scales, got 1"):
            replace(call, scales=[1.0]).scale(snapshot, backend)
        for bad in (
            [random(4, 3)],
            [random(4, 3), random(5, 2)],
            [random(4, 3), random(2, 5).int()],
        ):
            with pytest.raises(RuntimeError, match="expected (2 gradients|a floating .* of shape)"):
                call.scale_backward(bad, snapshot, backend)

    def test_a_first_call_cannot_be_captured(self, monkeypatch):
        from fastsn.triton import plan

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        key, device, made = object(), torch.device("cuda", 0), SimpleNamespace(table=torch.ones(1))
        with pytest.raises(RuntimeError, match="fastsn: run the call once, .* captured"):
            plan.cached(key, device, lambda: made)
        assert plan.cached(key, torch.device("cpu"), lambda: made) is made
        assert plan.cached(key, device, lambda: None) is made

    @pytest.fixture
    def launched(self, caches):
        """The names of the kernels launched so far."""
        from fastsn.triton import operators

        names = []

        def record(kernel, count, *args, **constants):
            if count:
                names.append(kernel.__name__)
            launch(kernel, count, *args, **constants)

        launch = operators._launch
        with mock.patch.object(operators, "_launch", record):
            yield names

    @pytest.fixture
    def caches(self, monkeypatch):
        """Those of plans and of tables, as they are in a new process, for few entries."""
        from fastsn.triton import operators, plan
        from fastsn.triton.cache import Cache

        monkeypatch.setattr(plan, "_plans", Cache(5))
        monkeypatch.setattr(operators, "_tables", Cache(5))
        return plan._plans, operators._tables

    def test_launches(self, launched):
        call = make_call([random(4, 8), random(6, 300)], iterations=[1, 1])
        grads, kept = gradients_for(call), []

        def forward():
            # Kept, so that those of the next step lie elsewhere.
            kept.append(call.power(backend))
            kept.append(call.scale(kept[-1], backend))

        def backward():
            kept.append(call.scale_backward(grads, kept[-2], backend))

        def launches_of(function):
            launched.clear()
            function()
            return list(launched)

        power, scaled = ["read_vectors", "products", "combine", "finish"], ["scale"]
        assert launches_of(forward) == ["pack", *power, "pack", "pack", *scaled]
        assert launches_of(forward) == [*power, "pack", *scaled]
        assert launches_of(backward) == ["pack", "dot", "gradient"]
        resting = launches_of(lambda: call.estimate(backend))
        assert [name for name in resting if name != "pack"] == ["measure", *power[:3]]

    def test_other_weights_at_the_same_addresses(self, caches):
        memory = random(2000)
        call = make_call([memory[:600].view(20, 30)])
        check(call)
        memory.copy_(random(2000))
        check(call)
        for other in (memory.view(torch.bfloat16)[:600].view(20, 30), memory[:600].view(30, 20).mT):
            other.copy_(random(20, 30))
            check(replace(call, weights=[other]))

    def test_varying_shapes_and_addresses_leave_little_behind(self, caches):
        calls = [make_call([random(3 + i, 5)]) for i in range(9)]
        for call in calls + calls[:2]:
            check(call)
            assert all(len(cache) <= 5 for cache in caches)

    def test_what_was_captured_stays(self, caches, launched, monkeypatch):
        """A graph reads the tables again that its capture has used."""
        from fastsn.triton import cache

        call = make_call([random(4, 8)])
        call.power(backend)
        monkeypatch.setattr(cache, "is_capturing", lambda device: True)
        call.power(backend)
        monkeypatch.setattr(cache, "is_capturing", lambda device: False)
        for i in range(9):
            make_call([random(3 + i, 5)]).power(backend)
        assert all(len(cache) == 6 for cache in caches)
        launched.clear()
        call.power(backend)
        assert "pack" not in launched

    def test_a_capture_packs_what_is_new_to_it(self, caches, launched, monkeypatch):
        from fastsn.triton import operators

        call = make_call([random(4, 8)])
        call.power(backend)
        monkeypatch.setattr(operators, "is_capturing", lambda device: True)
        moved = replace(call, weights=[call.weights[0].clone()])
        for _ in range(2):
            launched.clear()
            moved.power(backend)
            assert "pack" in launched
        assert len(caches[1]) == 1

    def test_too_long_a_vector(self, monkeypatch):
        from fastsn.triton import plan

        monkeypatch.setattr(plan, "MAX_LENGTH", 6)
        check(make_call([random(3, 6)]))
        with pytest.raises(RuntimeError, match=r"weights\[0\] has more than 6 rows or columns"):
            make_call([random(3, 7)]).power(backend)

    def test_kernels_launched_are_those_that_are_compiled(self, variants_only, early):
        """`test_triton_compile` compiles `configs.variants()`, which are what calls can ask for."""
        from fastsn.triton import configs

        sizes = [(3, 256), (3, 257), (1, 4104), (1, 4095), (520, 8), (520, 7)]
        for dtype in ALL_TYPES:
            for v_first in (False, True):
                call = make_call([random(*size, dtype=dtype) for size in sizes], v_first=v_first)
                call.run(gradients_for(call), backend)
            snapshot = call.estimate(backend)
            for result in ALL_TYPES:
                backend.scale(call.weights, snapshot, *call.constraint(), result)
                grads = [random(*size).to(result) for size in sizes]
                backend.scale_backward(grads, call.weights, snapshot, *call.constraint())
        assert variants_only == {name_of(v.kernel, v.constants) for v in configs.variants()}

    # Deterministic: the same examples at every run.
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def test_any_shapes(self, data):
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        dtypes = st.sampled_from(ALL_TYPES[1:] if data.draw(st.booleans()) else ALL_TYPES[:1])
        weights, dims, iterations = [], [], []
        for _ in range(data.draw(st.integers(1, 4))):
            sizes = st.integers(0, data.draw(st.sampled_from([4, 40])))
            shape = data.draw(st.lists(sizes, min_size=1, max_size=3))
            order = data.draw(st.permutations(range(len(shape))))
            inverse = sorted(range(len(shape)), key=order.__getitem__)
            weight = random(*(shape[d] for d in order), dtype=data.draw(dtypes)).permute(inverse)
            weights.append(weight)
            dims.append(data.draw(st.integers(0, len(shape) - 1)))
            iterations.append(data.draw(st.integers(0, 3)))
        call = make_call(weights, dims, iterations=iterations, v_first=data.draw(st.booleans()))
        check(replace(call, zero_guard=True, bound=data.draw(st.booleans())))
