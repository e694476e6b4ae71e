"""The emulator of CUDA, which other tests run the kernels with (emulator/include)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import emulated
from helpers.emulated import COMPILE_FLAGS, INCLUDE, TESTS, compiler

SOURCE = TESTS / "emulator" / "selftest.cpp"
ORDERS = ["forward", "reversed", "random:1", "random:2"]

SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION, LAUNCH_FAILURE = 0, 1, 9, 719
KIBI = 1024


class Kernels:
    """The functions of selftest.cpp; tensors are passed as pointers."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.launch_count.restype = ctypes.c_size_t
        for name in ("error_string", "error_name"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def __getattr__(self, name: str):
        function = getattr(self._library, name)

        def convert(argument):
            if isinstance(argument, Tensor):
                assert argument.is_contiguous()
                return ctypes.c_void_p(argument.data_ptr())
            return argument.encode() if isinstance(argument, str) else argument

        def call(*arguments):
            result = function(*map(convert, arguments))
            return result.decode() if isinstance(result, bytes) else result

        return call


def build(folder: Path, *flags: str) -> Kernels:
    """A library of its own, with nothing prepared; compiled once as long as no source changes."""
    command = [*compiler().split(), *COMPILE_FLAGS, "-Werror", "-std=c++17", "-shared", "-fPIC"]
    command += [*flags, f"-I{INCLUDE}", str(SOURCE)]
    sources = [SOURCE, *INCLUDE.rglob("*.*"), *emulated.ROOT.glob("csrc/**/*.*")]
    content = b"".join(path.read_bytes() for path in sorted(sources) if path.is_file())
    digest = hashlib.sha256(content + " ".join(command).encode()).hexdigest()[:16]
    with emulated.built_alone():
        compiled = emulated.BUILDS / f"selftest-{digest}.so"
        if not compiled.exists():
            for old in emulated.BUILDS.glob("selftest-*.so"):
                if time.time() - old.stat().st_mtime > 24 * 60 * 60:
                    old.unlink()
            new = compiled.with_suffix(".new")
            subprocess.run([*command, "-o", str(new)], check=True)
            new.rename(compiled)
    return Kernels(shutil.copy(compiled, folder / "selftest.so"))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Kernels:
    return build(tmp_path_factory.mktemp("selftest"))


@pytest.fixture
def kernels(built):
    assert built.last_error() == SUCCESS
    yield built
    assert built.set_order("forward") == 0
    built.last_error()


each_order = pytest.mark.parametrize(
    "order", [f"{blocks},{threads}" for blocks, threads in product(ORDERS, ORDERS)]
)


def sums(kernels: Kernels) -> None:
    x = torch.randint(0, 9, (7, 224)).float()
    out = torch.full((7,), torch.nan)
    assert kernels.sums(7, 224, x, out) == SUCCESS
    assert torch.equal(out, x.sum(1))


class TestOrders:
    @each_order
    def test_sums_of_blocks(self, kernels, order):
        assert kernels.set_order(order) == 0
        sums(kernels)

    @each_order
    def test_last_block(self, kernels, order):
        assert kernels.set_order(order) == 0
        partial, ticket = torch.empty(9), torch.zeros(1, dtype=torch.int32)
        for _ in range(3):
            out = torch.full((1,), torch.nan)
            assert kernels.ticket(9, partial, ticket, out) == SUCCESS
            assert out.item() == sum(range(9 * 64)) and ticket.item() == 0

    def test_blocks(self, kernels):
        seen = {}
        for order in ORDERS:
            kernels.set_order(f"{order},forward")
            out = torch.empty(50, dtype=torch.int32)
            assert kernels.block_order(50, out) == SUCCESS
            seen[order] = tuple(out.tolist())
        assert seen["forward"] == tuple(range(50))
        assert seen["reversed"] == tuple(reversed(range(50)))
        assert len(set(seen.values())) == 4
        assert all(sorted(own) == list(range(50)) for own in seen.values())

    def neighbours(self, kernels, barrier: int, threads: int, order: str) -> tuple[int, ...]:
        kernels.set_order(f"forward,{order}")
        out = torch.empty(threads, dtype=torch.int32)
        assert kernels.neighbour(barrier, threads, out) == SUCCESS
        return tuple(out.tolist())

    @pytest.mark.parametrize("barrier, threads", [(1, 32), (2, 32), (2, 128)])
    def test_sufficient_barrier(self, kernels, barrier, threads):
        expected = (*range(1, threads), 0)
        for order in ORDERS:
            assert self.neighbours(kernels, barrier, threads, order) == expected

    @pytest.mark.parametrize("barrier, threads", [(0, 32), (0, 128), (1, 128)])
    def test_missing_barrier_shows(self, kernels, barrier, threads):
        seen = {self.neighbours(kernels, barrier, threads, order) for order in ORDERS}
        assert len(seen) > 1

    def test_random_order_follows_from_the_seed(self, kernels):
        first, again, other = (
            self.neighbours(kernels, 0, 128, f"random:{seed}") for seed in (5, 5, 6)
        )
        assert first == again != other

    @pytest.mark.parametrize("order", ["", "backward", "random7", "forward,", "forward,sorted"])
    def test_unknown_order(self, kernels, order):
        assert kernels.set_order(order) == 1

    def test_environment_variable(self, built, tmp_path):
        program = (
            "import ctypes, sys; a = (ctypes.c_int * 5)(); "
            "ctypes.CDLL(sys.argv[1]).block_order(5, a); print(list(a))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, built._library._name],
            env={**os.environ, "FASTSN_EMULATOR_ORDER": "reversed"},
            capture_output=True,
            text=True,
        )
        assert done.stdout == "[4, 3, 2, 1, 0]\n"


def test_shared_memory_starts_as_nan(kernels):
    out = torch.zeros(3, 64, dtype=torch.int32)
    assert kernels.fresh(3, out) == SUCCESS
    assert (out == -1).all()


def test_parameters_are_by_value(kernels):
    out = torch.empty(64, dtype=torch.int32)
    assert kernels.by_value(out) == SUCCESS
    assert out.tolist() == list(range(100, 164))


class TestShuffles:
    def expected(self, operation: int, argument: int, width: int, thread: int) -> int:
        lane = thread % 32
        first = lane - lane % width
        source = {
            0: first + argument % width,
            1: lane - argument if lane - argument >= first else lane,
            2: lane + argument if lane + argument < first + width else lane,
            3: lane ^ argument if (lane ^ argument) < first + width else lane,
        }[operation]
        return thread - lane + source

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
    @pytest.mark.parametrize("operation", [0, 1, 2, 3])
    def test_sources(self, kernels, operation, width, order):
        kernels.set_order(order)
        for argument in (0, 1, 3, 7, 16, 31):
            expected = [self.expected(operation, argument, width, t) for t in range(64)]
            for function, dtype in (
                (kernels.shuffle_float, torch.float32),
                (kernels.shuffle_double, torch.float64),
            ):
                out = torch.empty(64, dtype=dtype)
                assert function(operation, argument, width, out) == SUCCESS
                assert out.tolist() == expected

    @pytest.mark.parametrize("order", ORDERS)
    def test_part_of_a_warp(self, kernels, order):
        kernels.set_order(order)
        out = torch.empty(64)
        assert kernels.shuffle_float(4, 3, 32, out) == SUCCESS
        half = [lane ^ 3 for lane in range(16)] + [19] * 16
        assert out.tolist() == half + [32 + x for x in half]

    def test_ballot(self, kernels):
        out = torch.empty(64, dtype=torch.float64)
        assert kernels.shuffle_double(5, 3, 32, out) == SUCCESS
        votes = [sum(1 << t % 32 for t in range(first, first + 32) if t % 3 == 0)
                 for first in (0, 32)]  # fmt: skip
        assert out.tolist() == [votes[0]] * 32 + [votes[1]] * 32


class TestErrors:
    MISTAKES = {
        "return_before_barrier": "63 of 64 threads reached __syncthreads, thread 5 has returned",
        "skip_barrier": "32 of 64 threads reached __syncthreads, thread 32 has returned",
        "return_before_shuffle": "thread 5 has returned",
        "different_masks": "a 4-byte shuffle with mask 0x",
        "different_operations": "with mask 0xffffffff, but thread ",
        "barrier_against_shuffle": "thread 5 waits in __syncthreads",
        "mask_without_caller": "__syncwarp with a mask that leaves out the caller",
        "bad_width": "a shuffle of width 12",
        "beyond_dynamic_shared": "a write behind the end of the dynamic shared memory",
        "beyond_array": "index out of bounds at ",
        "misaligned": "misaligned access at ",
        "exception": "exception in a kernel: from a kernel",
        "trap": "__trap()",
    }

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("mistake", range(len(MISTAKES)), ids=MISTAKES.keys())
    def test_mistake_fails_the_launch(self, kernels, mistake, order):
        kernels.set_order(order)
        memory = torch.zeros(128)
        assert kernels.make_mistake(mistake, memory) == LAUNCH_FAILURE
        assert list(self.MISTAKES.values())[mistake] in kernels.error_string(LAUNCH_FAILURE)
        assert kernels.peek_last_error() == kernels.last_error() == LAUNCH_FAILURE
        assert kernels.last_error() == SUCCESS
        # Nothing is left behind.
        sums(kernels)

    @pytest.mark.parametrize(
        "grid, block, shared, expected",
        [
            (1, 1, 0, SUCCESS),
            (0, 32, 0, INVALID_CONFIGURATION),
            (1, 0, 0, INVALID_CONFIGURATION),
            (1, 1024, 0, SUCCESS),
            (1, 1025, 0, INVALID_CONFIGURATION),
            (1, 33, 48 * KIBI, SUCCESS),
            (1, 33, 48 * KIBI + 1, INVALID_VALUE),
        ],
    )
    def test_configuration(self, kernels, grid, block, shared, expected):
        before = kernels.launch_count()
        assert kernels.empty(grid, block, shared) == expected
        assert kernels.last_error() == expected
        assert kernels.launch_count() - before == (expected == SUCCESS)

    def test_raised_limit_of_shared_memory(self, tmp_path):
        kernels = build(tmp_path, "-O0")  # a fresh one: limits stay
        assert kernels.empty(1, 32, 100 * KIBI) == INVALID_VALUE
        assert kernels.raise_limit(100 * KIBI) == SUCCESS
        assert kernels.empty(1, 32, 100 * KIBI) == SUCCESS
        assert kernels.empty(1, 32, 100 * KIBI + 1) == INVALID_VALUE
        assert kernels.raise_limit(227 * KIBI + 1) == INVALID_VALUE
        assert kernels.raise_limit(227 * KIBI) == SUCCESS
        assert kernels.empty(1, 32, 227 * KIBI) == SUCCESS
        assert kernels.empty(1, 32, 227 * KIBI + 1) == INVALID_VALUE

    def test_injected_failure(self, kernels):
        before = kernels.launch_count()
        kernels.fail_next_launch(701)
        assert kernels.empty(1, 32, 0) == kernels.last_error() == 701
        assert kernels.error_name(701) == "cudaErrorLaunchOutOfResources"
        assert kernels.launch_count() == before
        assert kernels.empty(1, 32, 0) == kernels.last_error() == SUCCESS


class TestProjectLaunches:
    """csrc/cuda/launch.cuh: what it does before a kernel's first launch on a device."""

    CAPTURE_UNSUPPORTED = 900

    def test_first_launch_within_a_capture(self, tmp_path):
        kernels = build(tmp_path)  # a fresh one: what was prepared stays
        assert kernels.start_unprepared(False) == SUCCESS
        assert kernels.start_unprepared(True) == kernels.last_error() == self.CAPTURE_UNSUPPORTED
        before = kernels.capture_mode()
        assert kernels.start_prepared(1, 90, True, 0) == SUCCESS
        assert kernels.capture_mode() == before
        # On this device it is known, and there it stays.
        assert kernels.start_prepared(1, 90, False, 0) == SUCCESS

    def test_shared_memory(self, tmp_path):
        kernels = build(tmp_path)
        assert kernels.start_prepared(2, 90, True, 100 * KIBI) == SUCCESS
        assert kernels.start_prepared(3, 90, False, 227 * KIBI + 1) == INVALID_VALUE
        assert kernels.last_error() == INVALID_VALUE

    @pytest.mark.parametrize("wanted", ["0", "1"])
    def test_launches_overlap_only_where_kernels_wait(self, wanted, tmp_path, monkeypatch):
        """Instructions before those of compute capability 9.0 know no waiting, and a newer device
        runs them too, as the driver compiles them for it."""
        monkeypatch.setenv("FASTSN_CUDA_PDL", wanted)
        kernels = build(tmp_path)
        for device, instructions in enumerate([80, 90, 89, 120]):
            for _ in range(2):
                assert kernels.start_prepared(device, instructions, False, 0) == SUCCESS
                assert kernels.last_attributes() == (wanted == "1" and instructions >= 90)


def test_portable_fibers(tmp_path):
    kernels = build(tmp_path, "-DFASTSN_EMULATOR_UCONTEXT")
    for order in ORDERS:
        assert kernels.set_order(order) == 0
        sums(kernels)
    assert kernels.make_mistake(0, torch.zeros(128)) == LAUNCH_FAILURE
    sums(kernels)


class TestConversions:
    """Conversions against torch's. The bits of a NaN are CUDA's, which are not torch's."""

    def floats(self) -> Tensor:
        """Every sign and exponent with fractions on and around every tie, and random ones."""
        upper = torch.arange(1 << 16) << 16
        low = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x2FFF, 0x3001]
        some = torch.randint(0, 1 << 32, (1 << 18,))
        bits = torch.cat([(upper[:, None] | torch.tensor(low)).flatten(), some])
        return bits.to(torch.uint32).view(torch.float32)

    def check_bits(self, ours: Tensor, torchs: Tensor, nan: int) -> None:
        is_nan = torchs.isnan()
        assert is_nan.any() and (torchs == torch.inf).any() and (torchs == 0).any()
        ours, torchs = ours.view(torch.int16), torchs.view(torch.int16)
        assert torch.equal(ours[~is_nan], torchs[~is_nan])
        assert (ours[is_nan] == nan).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_narrow(self, kernels, dtype):
        floats = self.floats()
        ours = torch.empty_like(floats, dtype=dtype)
        convert = kernels.to_half if dtype == torch.float16 else kernels.to_bfloat16
        convert(floats, ours, ctypes.c_size_t(floats.numel()))
        self.check_bits(ours, floats.to(dtype), nan=0x7FFF)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_widen(self, kernels, dtype):
        narrow = torch.arange(1 << 16).to(torch.uint16).view(dtype)
        ours = torch.empty(narrow.numel())
        convert = kernels.from_half if dtype == torch.float16 else kernels.from_bfloat16
        convert(narrow, ours, ctypes.c_size_t(narrow.numel()))
        wide = narrow.float()
        assert torch.equal(ours.isnan(), wide.isnan())
        number = ~wide.isnan()
        assert torch.equal(ours[number].view(torch.int32), wide[number].view(torch.int32))
