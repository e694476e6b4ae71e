"""The Triton kernels of patch_mean, patch_mean_backward and mean_bias, in Triton's interpreter.

As in `test_triton`, which runs in a process of its own where TRITON_INTERPRET is 1.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

import fastsn
import fastsn.triton as backend
from fastsn import ops, reference
from helpers import triton_launches
from helpers.calls import ALL_TYPES, each_type, random
from helpers.means_calls import LAYOUTS, Geometry, make_channels_last, random_geometry
from helpers.means_checks import check_backward, check_bias, check_mean
from helpers.triton_launches import interpreted, name_of

pytest.importorskip("triton")

patched_once, variants = triton_launches.patched_once, triton_launches.variants
variants_only = triton_launches.variants_only

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())

IMAGE = Geometry([3, 20, 9, 8], [3, 2], [2, 1], [1, 0], [1, 2], [0, 0], 6, 2, False)
GROWN = replace(IMAGE, transposed=True, output_padding=[1, 0])
LINEAR = Geometry([37, 20], [], [], [], [], [], 7, 1, False)
PLAIN = Geometry([3, 8, 6, 6], [1, 1], [1, 1], [0, 0], [1, 1], [0, 0], 4, 1, False)


def check_map(geometry: Geometry, dtype: torch.dtype, channels_last=False, average=True) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    grad = random(geometry.input_size[1], *geometry.kernel_size, dtype=wide)
    check_backward(backend, geometry, grad, dtype, channels_last, average)


def check_own_bias(geometry: Geometry, weight: torch.Tensor, gain=None, beta=None) -> None:
    patches = random(geometry.input_size[1], *geometry.kernel_size)
    check_bias(backend, weight, patches, gain, beta, geometry.groups, geometry.transposed)


class TestProcess:
    __test__ = not backend.is_interpreted()

    @pytest.mark.parametrize("share", ["1/2", "2/2"])
    def test_interpreter(self, share):
        assert not interpreted(__file__, share)


# Triton 3.6 counts loops by a conversion that NumPy 2.4 no longer has.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.usefixtures("patched_once", "poisoned_memory")
class TestInterpreter:
    __test__ = backend.is_interpreted()

    @pytest.fixture(autouse=True)
    def few_programs(self, monkeypatch):
        """The interpreter runs them one by one; and so that they go through several samples."""
        from fastsn.triton import configs

        monkeypatch.setattr(configs, "MEAN_PROGRAMS", 4)

    @pytest.mark.parametrize("seed", range(4))
    def test_any_geometry(self, seed):
        rng = Random(seed)
        for _ in range(25):
            geometry = random_geometry(rng)
            dtype, average = rng.choice(ALL_TYPES), rng.random() < 0.8
            x = rng.choice(list(LAYOUTS.values()))(random(*geometry.input_size, dtype=dtype))
            check_mean(backend, geometry, x, average)
            check_map(geometry, dtype, rng.random() < 0.5, average)
            weight = random(*geometry.weight_shape, dtype=dtype)
            gain, beta = (
                rng.choice([None, random(geometry.out_channels, dtype=rng.choice(ALL_TYPES))])
                for _ in range(2)
            )
            check_own_bias(geometry, rng.choice(list(LAYOUTS.values()))(weight), gain, beta)

    def test_bias_takes_the_mean_away(self):
        rng = Random(10)
        for geometry in (IMAGE, GROWN, LINEAR, PLAIN, *(random_geometry(rng) for _ in range(6))):
            x = random(*geometry.input_size, dtype=torch.float64)
            weight = random(*geometry.weight_shape, dtype=torch.float64)
            beta = random(geometry.out_channels, dtype=torch.float64)
            patches = backend.patch_mean(*geometry.mean_args(x))
            bias, mean = backend.mean_bias(
                weight, patches, None, beta, geometry.groups, geometry.transposed
            )
            y = geometry.convolve(x, weight).transpose(0, 1).flatten(1).mean(1)
            torch.testing.assert_close(mean, y)
            torch.testing.assert_close(bias + y, beta)

    @each_type
    @each_layout
    def test_types_and_layouts(self, layout, dtype):
        for geometry in (IMAGE, LINEAR, PLAIN):
            check_mean(backend, geometry, layout(random(*geometry.input_size, dtype=dtype)))
            weight = layout(random(*geometry.weight_shape, dtype=dtype))
            check_own_bias(geometry, weight, beta=random(geometry.out_channels))

    @each_type
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_types_of_maps(self, channels_last, dtype):
        for geometry in (IMAGE, GROWN, LINEAR, PLAIN):
            check_map(geometry, dtype, channels_last)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize(
        "size", [(2, 70, 5, 31), (1, 3, 67, 2), (9, 1, 16, 9), (50, 40, 1, 1), (1, 1, 1, 1)]
    )
    def test_many_tiles(self, size, channels_last, monkeypatch):
        from fastsn.triton import configs

        geometry = replace(IMAGE, input_size=list(size), padding=[2, 2], groups=1)
        layout = LAYOUTS["channels_last" if channels_last else "contiguous"]
        for programs in (1, 60):
            monkeypatch.setattr(configs, "MEAN_PROGRAMS", programs)
            check_mean(backend, geometry, layout(random(*size)))
        check_map(geometry, torch.float32, channels_last)

    @each_type
    def test_rows_that_do_not_begin_at_multiples_of_16_bytes(self, dtype):
        geometry = Geometry([3, 16, 24], [3], [1], [1], [1], [0], 4, 1, False)
        check_mean(backend, geometry, random(3, 16, 25, dtype=dtype)[..., :24])
        check_mean(backend, geometry, random(3, 24, 17, dtype=dtype)[..., :16].mT)

    def test_many_parts(self, monkeypatch):
        from fastsn.triton import configs

        monkeypatch.setattr(configs, "MEAN_PROGRAMS", 1000)
        geometry = replace(PLAIN, input_size=[configs.PARTS_TILE["COLS"] + 9, 2, 2, 2])
        check_mean(backend, geometry, random(*geometry.input_size))

    @pytest.mark.parametrize("shape", [(900, 5), (1, 1), (1, 130), (17, 64), (300, 1)])
    @each_type
    def test_linear(self, shape, dtype, monkeypatch):
        from fastsn.triton import configs

        geometry = replace(LINEAR, input_size=list(shape))
        check_mean(backend, geometry, random(*shape, dtype=dtype))
        monkeypatch.setattr(configs, "MEAN_PROGRAMS", 30)
        check_mean(backend, geometry, random(*shape, dtype=dtype))

    @pytest.mark.parametrize("transposed", [False, True])
    def test_long_weights(self, transposed):
        geometry = Geometry([1, 180, 9], [7], [1], [0], [1], [0], 4, 2, transposed)
        for dtype in ALL_TYPES:
            weight = random(*geometry.weight_shape, dtype=dtype)
            for own in (weight, make_channels_last(weight), weight.mT.contiguous().mT):
                check_own_bias(geometry, own, random(4), random(4))

    @pytest.mark.parametrize("kind", ALL_TYPES, ids=str)
    def test_gain_and_beta_of_any_type(self, kind):
        own = random(6, dtype=kind)
        for dtype in ALL_TYPES:
            weight = random(*IMAGE.weight_shape, dtype=dtype)
            check_own_bias(IMAGE, weight, gain=own)
            check_own_bias(IMAGE, weight, beta=own)
            check_own_bias(IMAGE, weight, own, torch.stack([own, own], 1)[:, 0])
            check_own_bias(IMAGE, weight, torch._neg_view(own), own[:1].expand(6))

    def test_gradient_that_is_not_contiguous(self):
        grad = random(2, 3, 20)
        args = IMAGE.backward_args(grad.permute(2, 1, 0), torch.float32)
        copy = IMAGE.backward_args(grad.permute(2, 1, 0).contiguous(), torch.float32)
        assert torch.equal(backend.patch_mean_backward(*args), backend.patch_mean_backward(*copy))
        expanded = grad[:1, :1, :1].expand(20, 3, 2)
        args = IMAGE.backward_args(expanded, torch.float32)
        exact = reference.patch_mean_backward(*args)
        torch.testing.assert_close(backend.patch_mean_backward(*args), exact)

    def test_sees_nan_where_it_is_met(self):
        x = random(*IMAGE.input_size)
        x[1, 4, 0, 0] = torch.nan
        expected = reference.patch_mean(*IMAGE.mean_args(x.nan_to_num(1e6))).abs() > 1e3
        assert expected.any() and not expected.all()
        for layout in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
            assert torch.equal(backend.patch_mean(*IMAGE.mean_args(layout(x))).isnan(), expected)
        patches = random(20, 3, 2)
        patches[4] = torch.nan  # in the first group of inputs
        _, mean = backend.mean_bias(random(*IMAGE.weight_shape), patches, None, None, 2, False)
        assert mean.isnan().tolist() == [True] * 3 + [False] * 3

    @pytest.mark.filterwarnings("ignore:.* encountered in divide:RuntimeWarning")
    @pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 3), (3, 0)])
    def test_empty(self, size):
        ones = [1] * (len(size) - 2)
        for outputs in (0, 2):
            args = ones, [0] * len(ones), ones, [outputs] * len(ones), False, True
            mean = backend.patch_mean(random(*size), ones, *args)
            expected = reference.patch_mean(random(*size), ones, *args)
            torch.testing.assert_close(mean, expected, equal_nan=True)
            for channels_last in (False, True):
                rest = (*args, torch.float32, channels_last)
                result = backend.patch_mean_backward(torch.ones_like(mean), size, *rest)
                expected = reference.patch_mean_backward(torch.ones_like(mean), size, *rest)
                torch.testing.assert_close(result, expected, equal_nan=True, check_stride=False)

    def test_bias_of_empty_weights(self):
        for shape in ((0, 3, 2), (4, 0, 2)):
            bias, mean = backend.mean_bias(
                random(*shape), random(*shape[1:]), None, torch.ones(shape[0]), 1, False
            )
            assert torch.equal(mean, torch.zeros(shape[0]))
            assert torch.equal(bias, torch.ones(shape[0]))

    @each_type
    def test_same_bits_at_every_run_and_at_any_address(self, dtype):
        from fastsn.triton.means import _as_rows

        for geometry in (IMAGE, LINEAR, PLAIN, replace(PLAIN, input_size=[5, 8, 2, 2])):
            for layout in ("contiguous", "channels_last"):
                x = LAYOUTS[layout](random(*geometry.input_size, dtype=dtype))
                mean = backend.patch_mean(*geometry.mean_args(x))
                moved = torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride())
                moved.copy_(x)
                rows = _as_rows(moved)
                assert moved.data_ptr() % 16
                assert rows.vector == 1 or rows.data.data_ptr() % 16 == 0
                for same in (x, x.clone(), moved):
                    assert torch.equal(backend.patch_mean(*geometry.mean_args(same)), mean)

    def test_reads_common_layouts_where_they_are(self):
        from fastsn.triton.means import _as_rows

        copied = set()
        for name, layout in LAYOUTS.items():
            for shape in ((3, 8, 6, 4), (3, 8, 6), (3, 8, 2, 4, 3), (3, 8)):
                x = layout(random(*shape))
                if _as_rows(x).data.data_ptr() != x.data_ptr():
                    copied.add(name)
        assert copied == {"every-other", "reversed", "negative-bit"}

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"input": random(3, 20, 9)}, r"4 dimensions \(N, C, \*size\) .*, got shape \[3, 20"),
            ({"input": random(3, 20, 9, 8).int()}, "input must be float64, .*, got torch.int32"),
            ({"input": random(3, 20, 9, 8).to_sparse()}, "input must be strided"),
            ({"stride": [1]}, "expected 2 entries, one per spatial dimension, got 1"),
            ({"output_size": [4, 6, 1]}, "expected 2 entries, .*, got 3"),
            ({"kernel_size": [3, 0]}, "positive kernel_size, .*, got 0, 1, 2 and 6"),
            ({"stride": [0, 1]}, "positive kernel_size, stride .*, got 3, 0, 1 and"),
            ({"dilation": [-1, 1]}, "positive kernel_size, stride and dilation"),
            ({"output_size": [-1, 6]}, "output_size of at least 0, got 3, 2, 1 and -1"),
            ({"padding": [2**30, 1]}, "a dimension spans .* positions, more than 1073741824"),
        ],
    )
    def test_bad_arguments_of_patch_mean(self, changes, message):
        names = "input", "kernel_size", "stride", "padding", "dilation", "output_size"
        args = dict(zip(names, IMAGE.mean_args(random(3, 20, 9, 8)), strict=False))
        with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
            backend.patch_mean(*{**args, **changes}.values(), False, True)

    def test_too_many_dimensions(self):
        ones = [1] * 4
        with pytest.raises(RuntimeError, match="fastsn: expected at most 3 spatial dimensions"):
            backend.patch_mean(random(1, 1, *ones), ones, ones, [0] * 4, ones, ones, False, True)

    @pytest.mark.parametrize(
        "grad, size, dtype, message",
        [
            (random(20, 3), None, torch.float32, r"gradient of shape \(C, .*, got \[20, 3\]"),
            (random(19, 3, 2), None, torch.float32, r"gradient of shape .*, got \[19, 3, 2\]"),
            (random(20, 3, 2), [3], torch.float32, r"input_size \(N, C, \*size\), got \[3\]"),
            (random(20, 3, 2), None, torch.int8, "dtype must be float64, .*, got torch.int8"),
            (random(20, 3, 2).int(), None, torch.float32, "grad must be float64, .*, got"),
        ],
    )
    def test_bad_arguments_of_patch_mean_backward(self, grad, size, dtype, message):
        _, own_size, *rest = IMAGE.backward_args(grad, dtype)
        with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
            backend.patch_mean_backward(grad, size or own_size, *rest)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"weight": random(6)}, r"weight of at least 2 dimensions, got shape \[6\]"),
            ({"weight": random(6, 10, 3, 2).int()}, "weight must be float64, .*, got torch.int32"),
            ({"groups": 4}, "groups must divide the first dimension of the weight, 6, got 4"),
            ({"groups": 0}, "groups must divide .*, 6, got 0"),
            ({"patches": random(10, 3, 2)}, r"patches of shape \[20, 3, 2\] .*, got \[10, 3, 2\]"),
            ({"patches": random(20, 3, 2).int()}, "patches must be float64, .*, got"),
            ({"gain": random(20)}, r"gain of shape \[6\] on cpu .*, got \[20\]"),
            ({"beta": random(6, 1)}, r"beta of shape \[6\] on cpu .*, got \[6, 1\]"),
            ({"beta": torch.ones(6, device="meta")}, r"beta of shape \[6\] on cpu .* on meta"),
            ({"transposed": True}, r"patches of shape \[6, 3, 2\] .*, got \[20, 3, 2\]"),
        ],
    )
    def test_bad_arguments_of_mean_bias(self, changes, message):
        args = {"weight": random(6, 10, 3, 2), "patches": random(20, 3, 2), "gain": None}
        args |= {"beta": None, "groups": 2, "transposed": False}
        with pytest.raises(RuntimeError, match=f"fastsn: .*{message}"):
            backend.mean_bias(**{**args, **changes})

    def test_kernels_launched_are_those_that_are_compiled(self, variants_only):
        """`test_triton_compile` compiles `configs.mean_variants()`: all that calls can ask for."""
        from fastsn.triton import configs

        odd = replace(IMAGE, input_size=[3, 5, 9, 7])
        for dtype in ALL_TYPES:
            for geometry in (odd, replace(IMAGE, input_size=[3, 16, 8, 8])):
                for layout in ("contiguous", "channels_last"):
                    x = LAYOUTS[layout](random(*geometry.input_size, dtype=dtype))
                    mean = backend.patch_mean(*geometry.mean_args(x))
                    args = geometry.backward_args(mean, dtype, layout == "channels_last")
                    backend.patch_mean_backward(*args)
            backend.mean_bias(
                random(6, 5, 3, 2, dtype=dtype), random(5, 3, 2), None, None, 1, False
            )
        assert variants_only == {name_of(v.kernel, v.constants) for v in configs.mean_variants()}

    def test_launches(self, monkeypatch):
        from fastsn.triton import operators

        launched = []
        monkeypatch.setattr(operators, "_launch", lambda kernel, *_, **__: launched.append(kernel))
        backend.patch_mean(*IMAGE.mean_args(random(*IMAGE.input_size)))
        assert len(launched) == 2
        backend.patch_mean_backward(*IMAGE.backward_args(random(20, 3, 2), torch.float32))
        assert len(launched) == 3
        backend.mean_bias(random(6, 10, 3, 2), random(20, 3, 2), random(6), random(6), 2, False)
        assert len(launched) == 4

    @pytest.mark.parametrize("geometry", [IMAGE, GROWN, LINEAR], ids=["image", "grown", "linear"])
    def test_gradients_of_gradients(self, geometry, variants):
        def run(backend):
            patches = backend.patch_mean(*geometry.mean_args(inputs[0]))
            rest = geometry.groups, geometry.transposed
            bias, mean = backend.mean_bias(inputs[1], patches, *inputs[2:], *rest)
            grads = torch.autograd.grad(bias.square().sum(), inputs, create_graph=True)
            return (
                bias,
                mean,
                *grads,
                *torch.autograd.grad(sum(g.square().sum() for g in grads), inputs),
            )

        vectors = [geometry.out_channels], [geometry.out_channels]
        shapes = geometry.input_size, geometry.weight_shape, *vectors
        inputs = [random(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
        with fastsn.use_backend("triton"):
            ours = run(ops)
        torch.testing.assert_close(ours, run(reference))
        launched = {name.split()[0] for name in variants}
        assert launched == {"patch_sums", "patch_means", "patch_gradient", "mean_bias"}

    def test_gradients_of_channels_last_in_half_precision(self):
        with fastsn.use_backend("triton"):
            x = make_channels_last(random(*IMAGE.input_size, dtype=torch.bfloat16)).requires_grad_()
            (grad,) = torch.autograd.grad(ops.patch_mean(*IMAGE.mean_args(x)).sum(), x)
        y = x.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(reference.patch_mean(*IMAGE.mean_args(y)).sum(), y)
        assert grad.dtype == torch.bfloat16 and grad.stride(1) == 1
        torch.testing.assert_close(grad.double(), exact, rtol=2**-8, atol=0)
