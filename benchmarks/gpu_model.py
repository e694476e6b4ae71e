"""A model of a GPU: which blocks run side by side, and how long a recorded launch takes.

A launch is blocks that the device deals out to slots, so many on each multiprocessor as fit. A
block has three parts. Its *fill* lasts from its start to its first data: what it does in front of
the bulk of its loads, and the first round trip of these. Its *body* moves its bytes. Its *end* is
what comes after the bulk: reductions and barriers.

What a block does lies between barriers in phases. The warp of a phase that loads most needs as many
round trips as it takes with so many loads in flight, each as long as the places that the phase's
data came from are far. The sum over the phases is what a body takes alone; bodies that together ask
for more bytes per second than the memory or the second-level cache gives are all slowed down by
the same factor. Arithmetic costs nothing here, and the host's work, which a graph hides, neither.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECTOR = 32
KIB = 1 << 10


@dataclass(frozen=True)
class Device:
    """What sets one device apart.

    Attributes:
        second_level: bytes of the second-level cache, as the driver reports it.
        memory_rate: bytes per second that copies moved, reads and writes together.
    """

    name: str
    multiprocessors: int
    second_level: int
    memory_rate: float
    #: The clock under load, in Hz.
    clock: float = 1.755e9


DEVICES = {
    "H100": Device("H100", 132, 50 * KIB * KIB, 3.0e12),
    "H200": Device("H200", 132, 60 * KIB * KIB, 4.3e12),
}

# Compute capability 9.0, from the CUDA programming guide's table of technical specifications.
REGISTERS = 64 * KIB
THREADS = 2048
BLOCKS = 32
SHARED = 228 * KIB
#: Of each block's shared memory, what the system takes.
SHARED_OF_SYSTEM = KIB
#: First-level cache and shared memory together, and how much of it can be shared memory.
FIRST_LEVEL = 256 * KIB
CARVEOUTS = [size * KIB for size in (0, 8, 16, 32, 64, 100, 132, 164, 196, 228)]

# Assumptions, each to be calibrated by the first measurement.
#: Seconds of a round trip under load. Alone, "Benchmarking and Dissecting the Nvidia Hopper GPU
#: Architecture via Microbenchmarking" (arXiv 2402.13499) found about 41, 263 and 479 cycles.
FIRST_LEVEL_LATENCY = 0.025e-6
SECOND_LEVEL_LATENCY = 0.25e-6
MEMORY_LATENCY = 0.6e-6
#: Bytes per second that the second-level cache gives to all multiprocessors.
SECOND_LEVEL_RATE = 5.5e12
#: Bytes per cycle from the second level into a multiprocessor.
PORT = 64
#: Seconds between two kernels of a replayed graph.
LAUNCH = 1.4e-6
#: Seconds until a block that takes another one's place has read its parameters.
BLOCK_START = 0.3e-6
#: Seconds of a barrier with what it waits for.
BARRIER = 0.04e-6
#: Registers per thread where no report of the assembler is at hand.
ASSUMED_REGISTERS = 64


@dataclass(frozen=True)
class InFlight:
    """Loads that a thread has in flight at a time: of 8 bytes and more, and of fewer."""

    wide: int
    narrow: int


#: For compute capability 9.0. `scale` and `product` are as the machine code has them, whose branch
#: on alignment keeps loads apart; the others as the sources unroll them. To be changed with the
#: kernels. Of a kernel that is not here, DEFAULT_IN_FLIGHT.
IN_FLIGHT: dict[str, InFlight] = {
    "multiply": InFlight(8, 32),
    "finish": InFlight(4, 4),
    "scale": InFlight(4, 16),
    "product": InFlight(4, 15),
    "gradient": InFlight(4, 8),
}
DEFAULT_IN_FLIGHT = InFlight(4, 4)


@dataclass(frozen=True)
class Resources:
    """What the assembler says that a kernel takes: registers per thread, bytes of static shared
    memory per block."""

    registers: int
    shared: int


def instance(symbol: str) -> str:
    """What names a kernel in the emulator as well as for nvcc: `multiply_kernelIfLi3840EE`."""
    # The parameters come after: the template's end is the last "E" in front of them.
    found = re.search(r"[a-z][a-z_]*_kernel(I\w*?EE?(?=v))?", symbol)
    return found[0] if found else symbol


def resources(folder: Path, architecture: str = "sm_90") -> dict[str, Resources]:
    """Of every kernel by :func:`instance`, from the reports `*.ptxas` of a build."""
    found = {}
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'\n(?:(?!Compiling).*\n)*?"
        r".*?Used (\d+) registers(.*)"
    )
    for path in sorted(folder.glob("*.ptxas")):
        for symbol, target, registers, rest in pattern.findall(path.read_text()):
            shared = re.search(r"(\d+) bytes smem", rest)
            if target == architecture:
                bytes_ = int(shared[1]) if shared else 0
                found[instance(symbol)] = Resources(int(registers), bytes_)
    return found


def resident_blocks(threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor runs at a time.

    Raises:
        ValueError: not even one fits.
    """
    warps = math.ceil(threads / 32)
    # Registers are given to warps, 256 at a time.
    of_warp = math.ceil(registers * 32 / 256) * 256
    blocks = min(
        BLOCKS,
        THREADS // (32 * warps),
        REGISTERS // of_warp // warps,
        SHARED // (shared + SHARED_OF_SYSTEM),
    )
    if blocks == 0:
        raise ValueError(
            f"a block must fit into {THREADS} threads, {REGISTERS} registers and {SHARED} bytes of "
            f"shared memory, got {threads} threads of {registers} registers and {shared} bytes"
        )
    return blocks


def first_level_bytes(resident: int, shared: int) -> int:
    """What shared memory leaves to the first-level cache."""
    taken = resident * (shared + SHARED_OF_SYSTEM) if shared else 0
    return FIRST_LEVEL - next(size for size in CARVEOUTS if size >= taken)


@dataclass(frozen=True)
class Block:
    """Seconds of the parts of a block that is alone, and the bytes that its body moves."""

    fill: float
    body: float
    end: float
    second_level: float
    memory: float


def as_blocks(
    phases: Iterable[Any], written: int, device: Device, resident: int, in_flight: InFlight
) -> list[Block]:
    """The blocks of a launch in their order. ``written`` sectors went to memory meanwhile; they are
    shared out by what the blocks stored."""
    own: dict[int, list[Any]] = {}
    for phase in phases:
        own.setdefault(phase.block, []).append(phase)
    stored = sum(phase.stored for some in own.values() for phase in some)
    per_stored = written / stored if stored else 0.0
    return [_as_block(own[k], per_stored, device, resident, in_flight) for k in sorted(own)]


def _as_block(
    phases: Sequence[Any], per_stored: float, device: Device, resident: int, in_flight: InFlight
) -> Block:
    moved = [p.second_level + p.memory + p.stored for p in phases]
    seconds = [_phase_seconds(p, device, resident, in_flight) for p in phases]
    # The bulk is what lies between a tenth and nine tenths of the bytes.
    first = last = 0
    so_far = 0
    for k, count in enumerate(moved):
        if so_far <= 0.1 * sum(moved):
            first = k
        if so_far < 0.9 * sum(moved):
            last = k
        so_far += count
    trip = min(_latency(phases[first]), seconds[first])
    body = sum(seconds[first : last + 1]) - trip
    through_port = SECTOR * sum(moved) * resident / (PORT * device.clock)
    return Block(
        fill=BLOCK_START + sum(seconds[:first]) + trip,
        body=max(body, through_port),
        end=sum(seconds[last + 1 :]),
        second_level=SECTOR * sum(moved),
        memory=SECTOR * sum(p.memory + per_stored * p.stored for p in phases),
    )


def _latency(phase: Any) -> float:
    """Of a round trip: the mean over all that was loaded."""
    second_level = phase.second_level + phase.atomics
    count = phase.first_level + second_level + phase.memory
    seconds = (
        phase.first_level * FIRST_LEVEL_LATENCY
        + second_level * SECOND_LEVEL_LATENCY
        + phase.memory * MEMORY_LATENCY
    )
    return seconds / count if count else 0.0


def _phase_seconds(phase: Any, device: Device, resident: int, in_flight: InFlight) -> float:
    trips = math.ceil(phase.wide_loads / in_flight.wide)
    trips += math.ceil(phase.narrow_loads / in_flight.narrow) + phase.atomics
    return trips * _latency(phase) + phase.wavefronts * resident / device.clock + BARRIER


@dataclass(frozen=True)
class Duration:
    """Seconds of a launch, and how long of these no block was in its body: nothing was moved."""

    seconds: float
    idle: float


def simulate(blocks: Sequence[Block], slots: int, device: Device) -> Duration:
    """Deal the blocks out to the slots, and let the bodies share the rates."""
    waiting = iter(blocks)
    # A fill or an end is over at a time; a body, when `progress`, which goes by as fast as the
    # rates let all bodies go on, has come to a point.
    timers: list[tuple[float, int, Block, bool]] = []
    bodies: list[tuple[float, int, Block]] = []
    clock = progress = idle = 0.0
    memory = second_level = 0.0  # bytes per second that the bodies ask for together
    count = 0

    def start(block: Block | None) -> None:
        nonlocal count
        if block is not None:
            count += 1
            heapq.heappush(timers, (clock + block.fill, count, block, True))

    for block in islice(waiting, slots):
        start(block)
    while timers or bodies:
        speed = min(
            1.0,
            device.memory_rate / max(memory, 1.0),
            SECOND_LEVEL_RATE / max(second_level, 1.0),
        )
        body_over = clock + (bodies[0][0] - progress) / speed if bodies else math.inf
        until = min(body_over, timers[0][0] if timers else math.inf)
        if bodies:
            progress += (until - clock) * speed
        else:
            idle += until - clock
        clock = until
        if until == body_over:
            _, number, block = heapq.heappop(bodies)
            memory -= block.memory / block.body
            second_level -= block.second_level / block.body
            heapq.heappush(timers, (clock + block.end, number, block, False))
            continue
        _, number, block, is_fill = heapq.heappop(timers)
        if not is_fill:
            start(next(waiting, None))
        elif block.body > 0:
            memory += block.memory / block.body
            second_level += block.second_level / block.body
            heapq.heappush(bodies, (progress + block.body, number, block))
        else:
            heapq.heappush(timers, (clock + block.end, number, block, False))
    return Duration(clock, idle)
