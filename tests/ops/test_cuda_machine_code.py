"""What a GPU will execute: the machine code of the CUDA kernels. Needs no GPU."""

from __future__ import annotations

import re

import pytest

from helpers import nvcc_builds
from helpers.machine_code import (
    Instruction,
    divides,
    functions,
    loads_in_flight,
    loops,
    uses_local_memory,
)
from helpers.nvcc_builds import BYTES, Kernel, cuobjdump, needs_nvcc, output_of

#: Packs that each thread of a hot kernel has on their way before it uses the first one.
IN_FLIGHT = 4
HOT = ("rest", "multiply", "finish", "scale", "product", "gradient")
#: For the GPUs that measurements are for.
ARCHITECTURE = "90"


@pytest.fixture(scope="module")
def code() -> dict[Kernel, list[Instruction]]:
    """The instructions of every kernel."""
    found = {}
    for path in nvcc_builds.objects():
        listing = output_of(cuobjdump(), "-sass", "-arch", f"sm_{ARCHITECTURE}", path)
        found |= {Kernel.parse(symbol): own for symbol, own in functions(listing)}
    return found


def of(code: dict[Kernel, list[Instruction]], name: str):
    own = {kernel: instructions for kernel, instructions in code.items() if kernel.name == name}
    assert own
    return own.items()


def pack_bytes(kernel: Kernel) -> int:
    """Of what the kernel loads in packs, the narrower one of two."""
    if kernel.name == "finish":
        return 16
    sizes = [BYTES[name] for name in kernel.types]
    if kernel.name == "rest":  # its elements are read one by one: a thread has many
        return sizes[0]
    if kernel.name == "multiply":
        return min(4 * sizes[0], 16)
    if kernel.name == "product":
        return 16 // max(sizes) * min(sizes)
    # What `scale` loads is the weight, and `gradient` the gradient.
    return 16 // max(sizes) * sizes[0 if kernel.name == "scale" else 1]


@needs_nvcc
class TestMachineCode:
    @pytest.mark.parametrize("name", HOT)
    def test_packs_are_on_their_way_together(self, code, name):
        """Memory answers after some hundred cycles: one load at a time leaves it idle."""
        for kernel, own in of(code, name):
            assert loads_in_flight(own, pack_bytes(kernel)) >= IN_FLIGHT, kernel

    @pytest.mark.parametrize("name", [*HOT, "rest_long", "normalize"])
    def test_no_division_of_integers_in_loops(self, code, name):
        for kernel, own in of(code, name):
            assert not [x for loop in loops(own) for x in loop if divides(x)], kernel

    @pytest.mark.parametrize("name", [*HOT, "rest_long", "normalize"])
    def test_no_local_memory(self, code, name):
        for kernel, own in of(code, name):
            if "d" not in kernel.types:
                assert not [x for x in own if uses_local_memory(x)], kernel

    @pytest.mark.parametrize("name", ["multiply", "scale", "gradient"])
    def test_packs_are_stored_at_once(self, code, name):
        """Of `multiply`, the summands of the second vector, which are of the type of sums."""
        for kernel, own in of(code, name):
            sizes = [BYTES[name] for name in kernel.types]
            # `scale` writes its second type, `gradient` its first one.
            size = sizes[-1] if name == "scale" else sizes[0]
            wanted = 16 if name == "multiply" else 16 // max(sizes) * size
            assert max(x.bytes for x in own if x.name.startswith("STG")) == wanted, kernel


# The reading of a listing


def listing(*lines: str) -> list[Instruction]:
    body = "\n".join(f"        /*{16 * k:04x}*/    {x} ;  /* 0x0 */" for k, x in enumerate(lines))
    ((_, code),) = functions(f"Function : _Z1fv\n{body}")
    assert len(code) == len(lines)
    return code


class TestReading:
    def test_loads_before_the_first_use(self):
        loads = [f"LDG.E.128.CONSTANT R{4 * k}, desc[UR4][R30.64]" for k in range(1, 5)]
        assert loads_in_flight(listing(*loads, "FFMA R0, R7, R9, R0"), 16) == 4
        # R7 is in the first pack.
        assert loads_in_flight(listing(*loads[:3], "FADD R0, R7, R0", loads[3]), 16) == 3
        assert loads_in_flight(listing(loads[0], "MOV R1, R4", loads[1], "MOV R1, R8"), 16) == 1

    def test_narrow_loads_do_not_count(self):
        code = listing("LDG.E R1, desc[UR4][R30.64]", "@!P0 LDG.E.64 R2, desc[UR4][R30.64]")
        assert [loads_in_flight(code, width) for width in (4, 8, 16)] == [2, 1, 0]
        assert [x.bytes for x in code] == [4, 8]

    def test_a_branch_ends_a_run_of_loads(self):
        load = "LDG.E.128 R4, desc[UR4][R30.64]"
        assert loads_in_flight(listing(load, "@P0 BRA 0x30", load, load), 16) == 1

    def test_divisions_in_loops(self):
        code = listing("I2F.RP R1, R2", "MOV R3, R4", "I2F.U32.RP R1, R2", "@P0 BRA 0x10", "EXIT")
        (loop,) = loops(code)
        assert [x.name for x in loop if divides(x)] == ["I2F.U32.RP"]
        assert not divides(listing("I2FP.F32.S32 R0, UR20")[0])

    def test_local_memory(self):
        code = listing("STL [R1+0x4], R2", "LDL.LU R3, [R1]", "STS [R1], R2", "LDG.E R1, [R2]")
        assert [uses_local_memory(x) for x in code] == [True, True, False, False]

    def test_addresses_and_stores_are_reads(self):
        assert listing("STG.E.128 desc[UR12][R2.64], R8")[0].read == {2, 8}
        assert re.fullmatch("STG.E.128", listing("STG.E.128 [R2], R8")[0].name)
