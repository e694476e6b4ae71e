"""What the assembler made of the CUDA kernels, as cuobjdump lists it."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Instruction:
    """One of a kernel: where it lies, its name with what belongs to it, and its operands."""

    address: int
    name: str
    operands: str

    @cached_property
    def written(self) -> set[int]:
        """The registers that a load writes."""
        first = re.match(r"R(\d+)", self.operands)
        return set(range(int(first[1]), int(first[1]) + self.bytes // 4)) if first else set()

    @cached_property
    def read(self) -> set[int]:
        """The registers that it reads, those of pairs and vectors too as far as names tell.

        The first operand of everything but stores and branches is written.
        """
        stores = self.name.startswith(("ST", "RED", "BRA", "EXIT", "BAR"))
        operands = self.operands if stores else self.operands.partition(",")[2]
        return {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}

    @cached_property
    def bytes(self) -> int:
        """What a load or a store moves."""
        width = re.search(r"\.(?:U|S)?(8|16|64|128)\b", self.name)
        return int(width[1]) // 8 if width else 4

    @cached_property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if self.name.startswith("BRA") and found else None


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Symbol and instructions of every kernel that `cuobjdump -sass` lists."""
    for part in listing.split("Function : ")[1:]:
        found = re.findall(r"/\*([0-9a-f]{4,6})\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*) *([^;]*);", part)
        yield (
            part.split()[0],
            [Instruction(int(at, 16), name, rest.strip()) for at, name, rest in found],
        )


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The instructions of every loop: from where a branch goes back to, to the branch."""
    addresses = [x.address for x in code]
    assert addresses == sorted(addresses)
    for branch in code:
        if branch.target is not None and branch.target < branch.address:
            first, last = bisect_left(addresses, branch.target), branch.address
            yield code[first : bisect_right(addresses, last)]


def loads_in_flight(code: list[Instruction], width: int) -> int:
    """The most loads from global memory of at least `width` bytes each that are under way at once:
    issued one after the other before the first use of what the earliest of them brings.

    Where a branch goes or comes from, counting begins anew: the number is a lower bound.
    """
    labels = {x.target for x in code if x.target is not None}
    most = 0
    flying: list[set[int]] = []
    for x in code:
        if x.address in labels:
            flying = []
        if any(x.read & registers for registers in flying):
            flying = []
        if x.name.startswith("LDG") and x.bytes >= width:
            flying.append(x.written)
            most = max(most, len(flying))
        if x.name.startswith(("BRA", "BAR", "EXIT", "CALL", "RET")):
            flying = []
    return most


def divides(x: Instruction) -> bool:
    """Whether this belongs to the division of integers, for which GPUs have no instruction: it
    starts from a number made a float that is rounded up."""
    return x.name.startswith("I2F") and x.name.endswith(".RP")


def uses_local_memory(x: Instruction) -> bool:
    return x.name.startswith(("LDL", "STL"))
