"""Every variant of the Triton kernels that a call can ask for compiles, without a GPU."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import fastsn.triton

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastsn.triton import configs, operators, plan  # noqa: E402
from fastsn.triton.cache import Cache  # noqa: E402
from helpers.sweeps import LONG  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VARIANTS = [*configs.variants(), *configs.mean_variants()]
KERNELS = sorted({variant.kernel.__name__ for variant in VARIANTS})


def variants_for(kernel: str, name: str) -> list[configs.Variant]:
    """A long run compiles every variant for every target, any other each for one of them."""
    own = [variant for variant in VARIANTS if variant.kernel.__name__ == kernel]
    if LONG:
        return own
    place = list(TARGETS).index(name)
    return own[place % len(own) :: len(TARGETS)]


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(variant: configs.Variant, target: GPUTarget):
    names = variant.kernel.arg_names
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(variant.kernel, variant.signature, constants)
    return triton.compile(source, target=target, options=configs.options(variant.constants))


def spilled(binary, tmp_path: Path) -> int:
    """Bytes of memory that a thread uses as it runs out of registers."""
    if "amdgcn" in binary.asm:
        (size,) = re.findall(r"\.private_segment_fixed_size: (\d+)", binary.asm["amdgcn"])
        return int(size)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    )
    (stack,) = re.findall(r"STACK:(\d+)", usage.stdout)
    return int(stack)


def vector_accesses(binary, access: str) -> int:
    """Loads ("ld") or stores ("st") of 16 bytes, or by the 256 threads of AMD's 4 warps of 8."""
    if "amdgcn" in binary.asm:
        name = {"ld": "load", "st": "store"}[access]
        return len(re.findall(rf"(?:global|buffer|flat)_{name}_dwordx[24]", binary.asm["amdgcn"]))
    return len(re.findall(rf"{access}\.global\S*\.v(?:4\.\w32|2\.\w64)", binary.asm["ptx"]))


class TestCompile:
    __test__ = not fastsn.triton.is_interpreted()

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("name", TARGETS)
    def test_every_variant(self, name, kernel, tmp_path):
        target = TARGETS[name]
        for variant in variants_for(kernel, name):
            binary = compiled(variant, target)
            assert binary.asm["hsaco" if target.backend == "hip" else "cubin"]
            # ptxas may put away a number or two so that more programs fit; never a part of a block.
            assert spilled(binary, tmp_path) <= 16, variant.constants
            if kernel in ("scale", "dot", "gradient") or variant.constants.get("VECTOR", 1) > 1:
                assert vector_accesses(binary, "ld"), variant.constants
            if kernel in ("scale", "gradient"):
                assert vector_accesses(binary, "st"), variant.constants

    def test_calls_compile_nothing_else(self, monkeypatch):
        """No value of an argument, and no alignment of a pointer, asks for a variant of its own."""

        class Driver:
            def get_current_target(self):
                return TARGETS["sm_90"]

            def get_current_device(self):
                return "a device of this test"

            def get_current_stream(self, device):
                return 0

        def compile_only(kernel, count, *args, **constants):
            if count:
                used[kernel].add(str(constants))
                kernel.warmup(*args, grid=(count,), **constants, **configs.options(constants))

        used = defaultdict(set)
        monkeypatch.setattr(operators, "_launch", compile_only)
        monkeypatch.setattr(plan, "_plans", Cache(plan.KEPT))
        monkeypatch.setattr(operators, "_tables", Cache(plan.KEPT))
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
        for count in (1, 16, 60):
            weights = [torch.randn(i % 3, 1 + i) for i in range(count)]
            u, v = [torch.ones(len(w)) for w in weights], [torch.ones(w.shape[1]) for w in weights]
            layers, dims = list(range(count)), [0] * count
            iterations = [i % 3 for i in range(count)]
            for flag in (False, True):
                args = (layers, dims, iterations, 1e-12, flag, flag)
                snapshot = fastsn.triton.power_(weights, u, v, *args)
                for value in (0.0, 1.0, -2.0):
                    constraint = (layers, dims, [value] * count, flag, flag)
                    fastsn.triton.scale(weights, snapshot, *constraint)
                    fastsn.triton.scale_backward(weights, weights, snapshot, *constraint)
        for shape, groups in (((1, 1, 1), 1), ((3, 16, 4, 16), 2), ((2, 6, 3, 5, 4), 3)):
            self.call_means(torch.randn(shape), groups)
        assert {kernel.__name__ for kernel in used} == set(KERNELS)
        for kernel, constants in used.items():
            compiled_kernels = kernel.device_caches.pop("a device of this test")[0]
            assert len(compiled_kernels) == len(constants), kernel.__name__

    def call_means(self, input, groups):
        """Each of the three operators on the input and what lies elsewhere, for several kernels."""
        _, channels, *size = input.shape
        moved = torch.cat([input.new_zeros(1), input.flatten()])[1:].view(input.shape)
        for value, transposed in ((1, False), (2, False), (16, True)):
            same = [value] * len(size)
            for x in (input, moved):
                geometry = (same, same, [value - 1] * len(size), same, size, transposed, True)
                mean = fastsn.triton.patch_mean(x, *geometry)
                fastsn.triton.patch_mean_backward(
                    mean, input.shape, *geometry[1:], input.dtype, False
                )
            weight = torch.randn(channels, value if transposed else channels // groups, *same)
            outputs = groups * value if transposed else channels
            for gain, beta in ((None, None), (torch.ones(outputs), torch.ones(outputs).half())):
                fastsn.triton.mean_bias(weight, mean, gain, beta, groups, transposed)
