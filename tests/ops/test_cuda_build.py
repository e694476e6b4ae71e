"""What nvcc makes of the CUDA kernels, and what of it is in the extension. Needs no GPU."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastsn
from helpers import nvcc_builds
from helpers.nvcc_builds import (
    ARCHITECTURES,
    BYTES,
    SOURCES,
    TYPES,
    Kernel,
    build,
    command,
    cuobjdump,
    needs_nvcc,
    output_of,
)

#: Those that take any number of items, as many as a parameter holds; and those that take one.
MANY = ("rest", "rest_long", "multiply", "finish", "normalize", "scale", "product", "gradient")
ONE = ("patch_sums", "partial_sums", "patch_backward", "mean_bias")
KERNELS = (*MANY, *ONE)
#: Threads of a block, where the name of a kernel does not tell.
THREADS = {
    **{name: 256 for name in KERNELS},
    **{name: 512 for name in ("rest", "rest_long", "finish", "normalize")},
    "mean_bias": 128,
}
#: Blocks that a multiprocessor has at once, where that matters; of `multiply`, for 512 threads.
BLOCKS = {"patch_sums": 3, "gradient": 2}
#: What a multiprocessor has.
REGISTERS, STATIC_SHARED = 64 * 1024, 48 * 1024
#: That which the kernels are tuned for, and bytes of a thread that may be left in memory: none
#: there, of fp64 and on other architectures the few of a compiler's choice.
MEASURED = "90"
SPILLED = {False: 0, True: 32}


def expected_kernels() -> set[tuple[str, tuple[str, ...], int]]:
    """All types; and for results and gradients also what autocast makes of fp32."""
    pairs = [*((t, t) for t in TYPES), *(("f", t) for t in TYPES[2:])]
    return {
        *(("multiply", (t,), 256) for t in TYPES),
        *(("multiply", (t,), 512) for t in TYPES if t != "d"),
        *itertools.product(
            ("rest", "rest_long", "finish", "normalize", "partial_sums"),
            ((t,) for t in TYPES[:2]),
            [0],
        ),
        *itertools.product(
            ("patch_sums", "patch_backward", "mean_bias"), ((t,) for t in TYPES), [0]
        ),
        *itertools.product(("scale", "product", "gradient"), pairs, [0]),
    }


@dataclass
class Report:
    """What the assembler says of a kernel."""

    kernel: Kernel
    architecture: str
    stack: int
    spills: int
    registers: int
    shared: int


def reports(text: str) -> Iterator[Report]:
    for part in text.split("Compiling entry function ")[1:]:
        head = re.match(r"'(\w+)' for 'sm_(\w+)'", part)
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        used = re.search(r"Used (\d+) registers", part)
        assert head and frame and used, part
        stack, stores, loads = map(int, frame.groups())
        shared = re.search(r"(\d+) bytes smem", part)
        yield Report(
            Kernel.parse(head[1]), head[2], stack, max(stores, loads), int(used[1]),
            int(shared[1]) if shared else 0,
        )  # fmt: skip


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    return nvcc_builds.objects()


@pytest.fixture(scope="module")
def compiled(objects) -> list[Report]:
    return [
        report for path in objects for report in reports(path.with_suffix(".ptxas").read_text())
    ]


@needs_nvcc
class TestKernels:
    def test_objects_are_used_again(self, objects, capfd):
        before = [path.stat().st_mtime_ns for path in objects]
        assert {path.stem for path in objects} == {path.stem for path in SOURCES.glob("*.cu")}
        assert build.compile_cuda(command()) == [str(path) for path in objects]
        assert [path.stat().st_mtime_ns for path in objects] == before
        assert capfd.readouterr().out == ""

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_every_kernel_is_there(self, compiled, architecture):
        own = [report.kernel for report in compiled if report.architecture == architecture]
        wanted = expected_kernels()
        assert {(kernel.name, kernel.types, kernel.threads) for kernel in own} == wanted
        # For few items, and for many.
        many = [kernel for kernel in own if kernel.name in MANY]
        assert len(many) == 2 * sum(name in MANY for name, *_ in wanted)
        assert len({kernel.item_bytes for kernel in many}) == 2
        ones = [kernel for kernel in own if kernel.name in ONE]
        assert len(ones) == len(wanted) - len(many) // 2
        assert not any(kernel.item_bytes for kernel in ones)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("name", KERNELS)
    def test_registers_suffice(self, compiled, name, architecture):
        own = [r for r in compiled if (r.kernel.name, r.architecture) == (name, architecture)]
        assert own
        for report in own:
            threads = report.kernel.threads or THREADS[name]
            blocks = 512 // threads if name == "multiply" else BLOCKS.get(name, 1)
            assert report.registers * threads * blocks <= REGISTERS, report
            few = SPILLED["d" in report.kernel.types or architecture != MEASURED]
            assert report.spills <= few and report.stack <= few, report

    def test_shared_memory_that_needs_no_leave(self, compiled):
        assert all(report.shared <= STATIC_SHARED for report in compiled)
        # finish and what sums over a block use some.
        assert all(report.shared > 0 for report in compiled if report.kernel.name == "finish")


@pytest.fixture(scope="module")
def instructions() -> dict[str, str]:
    """The intermediate code of every kernel, by its symbol."""
    parts = [
        part for text in nvcc_builds.intermediate_code() for part in re.split(r"\.entry ", text)[1:]
    ]
    return {part[: part.index("(")]: part for part in parts}


def widest(code: str, instruction: str) -> int:
    """The most bytes that one of these instructions moves."""
    found = re.findall(rf"\b{instruction}(?:\.v(\d))?\.[a-z](\d+)\b", code)
    return max(int(count or 1) * int(bits) // 8 for count, bits in found)


@needs_nvcc
class TestInstructions:
    def test_every_kernel_is_there(self, instructions):
        found = {(k.name, k.types, k.threads) for k in map(Kernel.parse, instructions)}
        assert found == expected_kernels()

    def test_packs_are_loaded_at_once(self, instructions):
        """Of the others, their machine code tells more."""
        for symbol, code in instructions.items():
            kernel = Kernel.parse(symbol)
            if kernel.name == "patch_sums":
                own = min(4 * BYTES[kernel.types[0]], 16)
                assert widest(code, r"ld\.global\.nc") == own, symbol

    @pytest.mark.parametrize(
        "precise",
        ["rest", "rest_long", "multiply", "finish", "normalize", "scale", "gradient", *ONE],
    )
    def test_narrow_kernels_do_no_double_arithmetic(self, instructions, precise):
        """Of constants, which are doubles, a few conversions remain."""
        for symbol, code in instructions.items():
            kernel = Kernel.parse(symbol)
            if kernel.name == precise and "d" not in kernel.types:
                assert not re.search(r"\b(fma|mul|add|div|sqrt)\.(rn\.)?f64", code), symbol


# The sources


def included(path: Path) -> Iterator[tuple[Path, str]]:
    """(file, header in brackets) of this file and of all that it includes itself."""
    for kind, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.M):
        if kind == "<":
            yield path, name
        else:
            yield from included((path.parent / name).resolve(strict=True))


@pytest.mark.parametrize(
    "source", [*(p.name for p in SOURCES.glob("*.cu")), "patches.cpp", "plan.cpp"]
)
def test_kernels_know_nothing_of_torch(source):
    """They compile wherever nvcc is, whatever torch is installed."""
    headers = set(included(SOURCES / source))
    assert headers
    for path, header in headers:
        assert path.parent == SOURCES
        assert re.fullmatch(r"cuda_(runtime|bf16|fp16)\.h|[a-z_]+", header), (path, header)


# The extension

BUILT = fastsn.ops._C.cuda_architectures.split()
needs_kernels = pytest.mark.skipif(
    not BUILT, reason=f"built without CUDA kernels: {fastsn.ops._C.cuda_reason}"
)


class TestExtension:
    library = Path(fastsn.ops._C.__file__)

    @needs_kernels
    def test_machine_code(self):
        tool = cuobjdump()
        code = re.findall(r"\.sm_(\w+)\.cubin", output_of(tool, "--list-elf", self.library))
        portable = re.findall(r"\.sm_(\w+)\.ptx", output_of(tool, "--list-ptx", self.library))
        files = len(list(SOURCES.glob("*.cu")))
        assert sorted(code) == sorted(BUILT * files)
        # For a driver to compile where there is no machine code.
        assert portable == fastsn.ops._C.cuda_ptx.split() * files

    def test_needs_no_cuda_to_be_imported(self):
        needed = re.findall(
            r"NEEDED.*\[(.*)\]", output_of("readelf", "--dynamic", "--wide", self.library)
        )
        assert any(name.startswith("libtorch_cpu") for name in needed)
        assert not [name for name in needed if "cuda" in name or name.startswith("libnv")]

    def test_exports_nothing_of_cuda(self):
        """Another library's runtime must not be mistaken for this one."""
        text = output_of("nm", "--dynamic", "--defined-only", self.library)
        symbols = [line.split()[-1] for line in text.splitlines()]
        assert "PyInit__C" in symbols
        assert not [name for name in symbols if re.match(r"_*cu|_*fatbin|.*fastsn4cuda", name)]

    def test_asks_nothing_of_cuda(self):
        text = output_of("nm", "--dynamic", "--undefined-only", self.library)
        symbols = [line.split()[-1] for line in text.splitlines()]
        assert symbols and not [name for name in symbols if re.match(r"_*cu[a-zA-Z]", name)]
