"""What the CUDA kernels ask of a GPU's memory, and how long that should take, without a GPU.

The kernels run in the tests' emulator, compiled so that every access is recorded. Accesses of a
warp are counted in sectors of 32 bytes; a model of the caches says which of them come from memory,
and :mod:`benchmarks.gpu_model` what that takes. For each launch and each network the table has

- what all threads asked for, and the sectors that were loaded and stored (MB),
- ``eff``: sectors that would do for the bytes of each access, over those that it touches, in %,
- how much of what was loaded came from the first-level cache and from the second,
- what went from and to memory (MB), and that as a share of the floor: the forward reads W once and
  writes it once, the backward reads the gradient and W once and writes one gradient,
- ``bank``: passes over shared memory over those without bank conflicts,
- microseconds, and those of them in which no block moves the bulk of its data.

Everything is recorded; nothing is sampled. Caches are empty before a call, unless ``--warm``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu_model, networks
from benchmarks.gpu_model import DEVICES, LAUNCH, SECTOR, Device, InFlight

ROOT = Path(__file__).parents[1]
NETWORKS = ["SNDCGAN D", "BigGAN-128 D", "48 x 64x64", "4096x4096"]
QUICK_NETWORKS = ["small SNDCGAN D"]
ORDERS = {"u": False, "v": True}
PASSES = ("forward", "backward")


@dataclass
class Row:
    """A launch, or with the kernel "all" a call."""

    network: str
    order: str
    direction: str
    device: str
    kernel: str
    blocks: int = 0
    threads: int = 0
    resident: int = 0
    #: Whether `resident` rests on the assembler's report; else on an assumption.
    registers_known: bool = True
    asked_load: int = 0
    asked_store: int = 0
    loaded: int = 0
    stored: int = 0
    load_efficiency: float = 1.0
    store_efficiency: float = 1.0
    first_level: int = 0
    second_level: int = 0
    read: int = 0
    written: int = 0
    of_floor: float = 0.0
    bank_conflicts: float = 1.0
    microseconds: float = 0.0
    idle_microseconds: float = 0.0
    #: The worst instructions, if asked for.
    instructions: list[str] = field(default_factory=list)


def recorded() -> Any:
    """The recorder, which the tests have."""
    path = str(ROOT / "tests")
    if path not in sys.path:
        sys.path.append(path)
    return importlib.import_module("helpers.recorded")


@dataclass
class Call:
    """The arguments of the operators for all layers of a network."""

    weights: list[Tensor]
    grads: list[Tensor]
    u: list[Tensor]
    v: list[Tensor]
    dims: list[int]

    @staticmethod
    def of(name: str) -> Call:
        """Of a network of :mod:`benchmarks.networks`."""
        with torch.device("meta"):
            model = {**networks.NETWORKS, **networks.QUICK_NETWORKS}[name]()
        layers = networks.layers(model)
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        dims = [int(isinstance(layer, transposed)) for layer in layers]
        return Call.of_shapes([tuple(layer.weight.shape) for layer in layers], dims)

    @staticmethod
    def of_shapes(shapes: Sequence[tuple[int, ...]], dims: Sequence[int] | None = None) -> Call:
        """Random weights of these shapes, matricized along these dimensions, or the first."""
        dims = list(dims or [0] * len(shapes))
        rows = [shape[dim] for shape, dim in zip(shapes, dims, strict=True)]
        columns = [math.prod(shape) // n for shape, n in zip(shapes, rows, strict=True)]
        return Call(
            [torch.randn(shape) for shape in shapes],
            [torch.randn(shape) for shape in shapes],
            [torch.randn(n) for n in rows],
            [torch.randn(n) for n in columns],
            dims,
        )

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def launches(self, recorder: Any, order: str, direction: str) -> list[Any]:
        """Record a forward (an iteration, the normalized weights) or a backward."""
        ops = recorder.backend()
        layers, ones = list(range(len(self.weights))), [1] * len(self.weights)
        constraint = (layers, self.dims, [1.0] * len(self.weights), False, False)
        recorder.clear()
        snapshot = ops.power_(
            self.weights, self.u, self.v, layers, self.dims, ones, 1e-12, ORDERS[order], False
        )
        if direction == "forward":
            ops.scale(self.weights, snapshot, *constraint)
        else:
            recorder.clear()
            ops.scale_backward(self.grads, self.weights, snapshot, *constraint)
        return recorder.launches()


@dataclass(frozen=True)
class Options:
    """How a call is looked at."""

    warm: bool = False
    lines: int = 0
    in_flight: dict[str, InFlight] = field(default_factory=dict)
    reports: Path = ROOT / "build" / "cuda"


def of_call(
    name: str, order: str, direction: str, devices: Sequence[Device], options: Options
) -> list[Row]:
    """The rows of one call on each device."""
    recorder = recorded()
    rows = []
    with recorder.device_memory():
        call = Call.of(name)
        launches = call.launches(recorder, order, direction)
    for device in devices:
        base = Row(name, order, direction, device.name, "all")
        rows += of_device(recorder, launches, call, base, device, options)
    recorder.clear()
    return rows


def of_device(
    recorder: Any,
    launches: Sequence[Any],
    call: Call,
    base: Row,
    device: Device,
    options: Options,
) -> list[Row]:
    """A row for each launch, and one for all, of the call that ``base`` names."""
    inputs = call.weights + (call.grads if base.direction == "backward" else [])
    # What is read once, and results of the size of the weights.
    floor = sum(tensor.nbytes for tensor in inputs) + call.bytes
    caches = recorder.Caches(device.multiprocessors, device.second_level)
    for tensor in inputs if options.warm else []:
        caches.warm(tensor)
    known = gpu_model.resources(options.reports)
    rows = []
    for launch in launches:
        own = known.get(gpu_model.instance(launch.symbol))
        registers = own.registers if own else gpu_model.ASSUMED_REGISTERS
        shared = launch.dynamic_shared + (own.shared if own else 0)
        resident = gpu_model.resident_blocks(launch.threads, registers, shared)
        totals = caches.run(launch, resident, gpu_model.first_level_bytes(resident, shared))
        in_flight = {**gpu_model.IN_FLIGHT, **options.in_flight}
        blocks = gpu_model.as_blocks(
            launch.phases,
            totals.written,
            device,
            resident,
            in_flight.get(launch.kernel, gpu_model.DEFAULT_IN_FLIGHT),
        )
        time = gpu_model.simulate(blocks, resident * device.multiprocessors, device)
        loads = [site for site in launch.sites if site.loads]
        stores = [site for site in launch.sites if site.stores]
        row = Row(
            *(base.network, base.order, base.direction, base.device, launch.kernel),
            blocks=launch.blocks,
            threads=launch.threads,
            resident=resident,
            registers_known=own is not None,
            asked_load=sum(site.asked for site in loads),
            asked_store=sum(site.asked for site in stores),
            loaded=SECTOR * totals.loaded,
            stored=SECTOR * totals.stored,
            load_efficiency=efficiency(loads),
            store_efficiency=efficiency(stores),
            first_level=SECTOR * totals.first_level,
            second_level=SECTOR * totals.second_level,
            read=SECTOR * (totals.memory + totals.filled),
            written=SECTOR * totals.written,
            of_floor=totals.memory_bytes / floor,
            bank_conflicts=conflicts(launch.sites),
            microseconds=1e6 * time.seconds,
            idle_microseconds=1e6 * time.idle,
            instructions=worst(recorder, launch, options.lines),
        )
        rows.append(row)
    left = caches.write_back()
    sites = [site for launch in launches for site in launch.sites]
    total = Row(
        *(base.network, base.order, base.direction, base.device, "all"),
        blocks=sum(row.blocks for row in rows),
        load_efficiency=efficiency([site for site in sites if site.loads]),
        store_efficiency=efficiency([site for site in sites if site.stores]),
        bank_conflicts=conflicts(sites),
        registers_known=all(row.registers_known for row in rows),
    )
    summed = ("asked_load", "asked_store", "loaded", "stored", "first_level", "second_level")
    for name in (*summed, "read", "written", "microseconds", "idle_microseconds"):
        setattr(total, name, sum(getattr(row, name) for row in rows))
    total.read += SECTOR * left.filled
    total.written += SECTOR * left.written
    total.of_floor = (total.read + total.written) / floor
    total.microseconds += 1e6 * LAUNCH * len(rows)
    total.idle_microseconds += 1e6 * LAUNCH * len(rows)
    return [*rows, total]


def efficiency(sites: Sequence[Any]) -> float:
    """Sectors that would do for what each access of a warp wants, over those that it touches."""
    touched = sum(site.sectors for site in sites)
    return sum(site.needed for site in sites) / touched if touched else 1.0


def conflicts(sites: Sequence[Any]) -> float:
    """Passes over shared memory, over those that there would be without bank conflicts."""
    least = sum(site.least_wavefronts for site in sites)
    return sum(site.wavefronts for site in sites) / least if least else 1.0


def worst(recorder: Any, launch: Any, count: int) -> list[str]:
    """The instructions that waste most: sectors of global memory, passes over shared memory."""

    def waste(site: Any) -> int:
        return site.sectors - site.needed + site.wavefronts - site.least_wavefronts

    sites = sorted((site for site in launch.sites if waste(site)), key=waste, reverse=True)[:count]
    return [
        f"{('load', 'load past L1', 'store', 'atomic')[site.kind]} of {site.size} bytes, "
        + (
            f"{site.needed} of {site.sectors} sectors would do"
            if site.sectors
            else f"{site.least_wavefronts} of {site.wavefronts} passes would do"
        )
        + f": {line}"
        for site, line in zip(sites, recorder.lines(launch, sites), strict=True)
    ]


HEADER = (
    f"{'':<14}{'blocks':>14} {'per SM':>6}  {'asked, MB':>13}  {'sectors, MB':>13}  "
    f"{'eff, %':>9}  {'L1':>4} {'L2':>4}  {'memory, MB':>13} {'of floor':>8}  "
    f"{'bank':>5} {'us':>8} {'idle':>7}"
)


def pair(one: float, other: float) -> str:
    return f"{one / 1e6:>6.2f}/{other / 1e6:<6.2f}"


def shown(row: Row) -> str:
    blocks = f"{row.blocks} x {row.threads}" if row.threads else f"{row.blocks}"
    resident = f"{row.resident}{'' if row.registers_known else '?'}" if row.resident else ""
    loaded = max(row.loaded, 1)
    eff = f"{100 * row.load_efficiency:>4.0f}/{100 * row.store_efficiency:<4.0f}"
    line = (
        f"  {row.kernel:<12}{blocks:>14} {resident:>6}  {pair(row.asked_load, row.asked_store)}  "
        f"{pair(row.loaded, row.stored)}  {eff}  "
        f"{row.first_level / loaded:>4.0%} {row.second_level / loaded:>4.0%}  "
        f"{pair(row.read, row.written)} {row.of_floor:>8.3f}  {row.bank_conflicts:>5.2f} "
        f"{row.microseconds:>8.1f} {row.idle_microseconds:>7.1f}"
    )
    return "\n".join([line, *(f"      {text}" for text in row.instructions)])


def report(rows: Sequence[Row]) -> str:
    """The table of calls, one line per launch."""
    lines = [HEADER]
    before: tuple[str, ...] = ()
    for row in rows:
        call = (row.network, f"{row.order} first", row.direction, row.device)
        if call != before:
            lines.append(", ".join(call))
            before = call
        lines.append(shown(row))
    if any(not row.registers_known for row in rows):
        lines.append(
            f"? no report of the assembler in build/cuda: {gpu_model.ASSUMED_REGISTERS} registers "
            "per thread and no static shared memory assumed"
        )
    return "\n".join(lines)


def in_flight(text: str) -> tuple[str, InFlight]:
    """`KERNEL=WIDE,NARROW`."""
    kernel, _, numbers = text.partition("=")
    try:
        wide, narrow = (int(number) for number in numbers.split(","))
    except ValueError:
        wide = narrow = 0
    if not kernel or wide < 1 or narrow < 1:
        raise argparse.ArgumentTypeError(f"must be like scale=4,1, got {text!r}")
    return kernel, InFlight(wide, narrow)


def main(arguments: Sequence[str] | None = None, write: Callable[[str], object] = print) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choices = [*networks.NETWORKS, *networks.QUICK_NETWORKS]
    parser.add_argument("--network", nargs="+", choices=choices, default=NETWORKS)
    parser.add_argument("--order", nargs="+", choices=list(ORDERS), default=list(ORDERS))
    parser.add_argument("--pass", nargs="+", choices=PASSES, default=list(PASSES), dest="passes")
    parser.add_argument("--device", nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--warm", action="store_true", help="inputs are in the second-level cache")
    parser.add_argument("--lines", type=int, default=0, help="worst instructions of each launch")
    parser.add_argument(
        "--in-flight", nargs="+", type=in_flight, default=[], metavar="KERNEL=WIDE,NARROW",
        help="loads of 8 bytes and more, and of fewer, that a thread has in flight at a time",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--quick", action="store_true", help="a small network, one device")
    options = parser.parse_args(arguments)
    names = QUICK_NETWORKS if options.quick else options.network
    devices = [DEVICES[name] for name in options.device[: 1 if options.quick else None]]
    how = Options(options.warm, options.lines, dict(options.in_flight))
    rows: list[Row] = []
    for name in names:
        for direction in options.passes:
            # The backward does not know which vector came first.
            orders = options.order if direction == "forward" else options.order[:1]
            for order in orders:
                rows += of_call(name, order, direction, devices, how)
    write(report(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
