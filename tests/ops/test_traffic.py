"""What the CUDA kernels ask of a GPU's memory: the recorder in the emulator, the model of the
caches and of time, by cases that can be computed by hand; and the kernels held to their shares.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_model, gpu_traffic
from benchmarks.gpu_model import Block, Device, InFlight
from helpers import emulated, recorded
from helpers.recorded import ATOMIC, GLOBAL, SECTOR, SHARED, Caches, Launch, Phase, Site

KIB = 1024
LINE = 128

# What the kernels are held to, in a forward with u or v first and in a backward.

#: How many of the sectors that a kernel touches would do for what its accesses want.
SHARE = 0.95
#: Kernels that fall short of it: (loads, stores).
SHORT_OF_IT = {
    ("u", "finish"): (SHARE, 0.90),
    ("v", "multiply"): (SHARE, 0.91),
    ("v", "finish"): (SHARE, 0.89),
}
#: Bytes that all launches load past the first level, over those of the weights.
LOADED = {"u": 2.15, "v": 3.10, "backward": 3.05}
#: The same of what they store.
STORED = {"u": 1.10, "v": 1.07, "backward": 1.02}
#: Bytes from and to memory over the floor: read W, write W; read G and W, write dW. On a device
#: that is scaled down with the network, so that most of what is read again comes from memory again.
MEMORY = {"u": 1.57, "v": 1.55, "backward": 1.34}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The functions of selftest.cpp. They return what was recorded of their launch."""
    folder = tmp_path_factory.mktemp("traffic")
    compiler = emulated.compiler().split()
    compiled, path = str(folder / "selftest.o"), str(folder / "selftest.so")
    source = str(recorded.SOURCES / "selftest.cpp")
    warnings = ["-Wall", "-Wextra", "-Werror", "-std=c++17", "-fPIC", f"-I{emulated.INCLUDE}"]
    recorded.recorder()
    for command in (
        [*compiler, *recorded.COMPILE_FLAGS, *warnings, "-c", source, "-o", compiled],
        # Without the flags, which would bring in a sanitizer.
        [*compiler, "-shared", compiled, str(recorded.recorder_path()), "-o", path],
    ):
        subprocess.run(command, check=True)
    library = ctypes.CDLL(path)

    class Functions:
        def __getattr__(self, name: str):
            def call(*arguments) -> Launch:
                pointers = [
                    ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments
                ]
                assert getattr(library, name)(*pointers) == 0
                return recorded.launches()[-1]

            return call

    return Functions()


@pytest.fixture
def kernels(built):
    recorded.clear()
    yield built
    recorded.clear()


def aligned(count: int, first: int = 0) -> Tensor:
    """Numbers of which one, `first`, is at the start of a line."""
    memory = torch.arange(count + LINE // 4, dtype=torch.float32)
    start = (-memory.data_ptr() // 4 - first) % (LINE // 4)
    return memory[start : start + count]


def only(sites: list[Site]) -> Site:
    assert len(sites) == 1, [(s.kind, s.size, s.accesses) for s in sites]
    return sites[0]


def load(launch: Launch) -> Site:
    return only([site for site in launch.sites if site.loads])


def store(launch: Launch) -> Site:
    return only([site for site in launch.sites if site.stores])


def counts(site: Site) -> tuple[int, ...]:
    """Accesses of a warp, bytes per lane, bytes asked for, sectors, sectors that would do."""
    return site.accesses, site.size, site.asked, site.sectors, site.needed


class TestRecorder:
    @pytest.mark.parametrize("kernel, size", [("packs", 16), ("structs", 16), ("halves", 8)])
    def test_packs_are_one_access(self, kernels, kernel, size):
        x, out = aligned(3 * 64 * 4), aligned(3 * 64 * 4)
        launch = getattr(kernels, kernel)(3, x, out)
        expected = (6, size, 6 * 32 * size, 6 * size, 6 * size)
        assert counts(load(launch)) == counts(store(launch)) == expected
        assert (launch.blocks, launch.threads, launch.dynamic_shared) == (3, 64, 0)
        assert launch.kernel == kernel

    def test_the_kernel_still_computes(self, kernels):
        x, out = aligned(64 * 4), aligned(64 * 4)
        kernels.packs(1, x, out)
        assert torch.equal(out, 2 * x)

    def test_strided(self, kernels):
        """A number every 16 bytes: 128 of 512 bytes, a quarter of each sector."""
        launch = kernels.strided(1, aligned(256), 4, 0, 64, aligned(512), 8)
        assert counts(load(launch)) == (2, 4, 2 * 128, 2 * 16, 2 * 4)
        # Every 32 bytes: an eighth.
        assert counts(store(launch)) == (2, 4, 2 * 128, 2 * 32, 2 * 4)

    def test_scalars_instead_of_packs(self, kernels):
        """All bytes of the sectors are wanted, but by four accesses."""
        launch = kernels.scalars(1, aligned(256), aligned(256))
        for sites in ([s for s in launch.sites if s.loads], [s for s in launch.sites if s.stores]):
            assert sum(site.accesses for site in sites) == 8
            assert sum(site.sectors for site in sites) == 8 * 16
            assert sum(site.needed for site in sites) == 8 * 4

    @pytest.mark.parametrize("first, sectors", [(0, 4), (1, 5), (7, 5), (8, 4)])
    def test_unaligned(self, kernels, first, sectors):
        launch = kernels.strided(1, aligned(256), 1, first, 32, aligned(64), 1)
        assert counts(load(launch)) == (1, 4, 128, sectors, 4)

    def test_broadcast(self, kernels):
        launch = kernels.strided(1, aligned(256), 0, 5, 64, aligned(64), 1)
        site = load(launch)
        assert counts(site) == (2, 4, 2 * 128, 2, 2) and site.distinct == 2 * 4

    def test_part_of_a_warp(self, kernels):
        launch = kernels.strided(1, aligned(256), 1, 0, 41, aligned(64), 1)
        assert counts(load(launch)) == (2, 4, 41 * 4, 4 + 2, 4 + 2)

    def test_diverging_lanes_meet_again(self, kernels):
        """Then what comes next is one access again, though some have loaded less often."""
        site = load(kernels.diverging(aligned(4096), aligned(64)))
        assert counts(site)[:4] == (2 * 4, 4, 2 * 2 * (128 + 64), 2 * 4 * 4)

    def test_atomics(self, kernels):
        counter, added = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
        launch = kernels.count(counter, added)
        assert counter[0] == 128 and added[0] == 256
        found = [(site.kind, site.space, site.accesses) for site in launch.sites]
        assert found == [(ATOMIC, GLOBAL, 4)] * 2
        assert Caches(1, 64 * KIB).run(launch, 1, 0).atomics == 8

    def test_private_memory_is_not_seen(self, kernels):
        assert kernels.private_memory(torch.zeros(1, dtype=torch.int32)).sites == []

    def test_phases(self, kernels):
        launch = kernels.phases(aligned(3 * 64 * 4), aligned(128), aligned(64))
        found = [(p.block, p.wide_loads, p.narrow_loads, p.stored) for p in launch.phases]
        assert found == [(0, 3, 1, 0), (0, 0, 2, 8)]

    def test_lines(self, kernels):
        launch = kernels.strided(1, aligned(256), 1, 0, 64, aligned(64), 1)
        (line,) = recorded.lines(launch, [store(launch)])
        text = (recorded.SOURCES / "selftest.cpp").read_text().splitlines()
        name, number = line.split(" < ")[0].split(":")
        assert name == "selftest.cpp" and "out[index() * to] =" in text[int(number.split()[0]) - 1]


class TestSharedMemory:
    @pytest.mark.parametrize(
        "stride, as_packs, passes, least",
        [
            (0, False, 1, 1),  # all the same
            (1, False, 1, 1),
            (2, False, 2, 1),
            (8, False, 8, 1),
            (32, False, 32, 1),
            (33, False, 1, 1),
            (4, True, 4, 4),  # eight lanes at a time
            (8, True, 8, 4),
            (32, True, 32, 4),
        ],
    )
    def test_banks(self, kernels, stride, as_packs, passes, least):
        launch = kernels.shared(stride, int(as_packs), aligned(32))
        site = only([site for site in launch.sites if site.space == SHARED])
        assert (site.size, site.accesses) == (16 if as_packs else 4, 1)
        assert (site.wavefronts, site.least_wavefronts) == (passes, least)
        assert launch.dynamic_shared == 16384
        assert sum(phase.wavefronts for phase in launch.phases) == passes

    def test_static_memory(self, kernels):
        """A column, then a row."""
        launch = kernels.static_shared(aligned(32))
        sites = [site for site in launch.sites if site.space == SHARED]
        assert sorted(site.wavefronts for site in sites) == [1, 32]
        assert len([site for site in launch.sites if site.space == GLOBAL]) == 1


def one(caches: Caches, launch: Launch, resident: int = 1, first_level: int = 0):
    return caches.run(launch, resident, first_level)


class TestCaches:
    def test_two_launches_share_the_second_level(self, kernels):
        x, out, other = aligned(4096), aligned(4096), aligned(4096)
        first, second = kernels.packs(16, x, out), kernels.packs(16, x, other)
        caches = Caches(1, 64 * KIB)
        sectors = 4096 * 4 // SECTOR
        totals = one(caches, first)
        assert (totals.loaded, totals.memory, totals.second_level) == (sectors, sectors, 0)
        totals = one(caches, second)
        assert (totals.loaded, totals.memory, totals.second_level) == (sectors, 0, sectors)
        assert totals.written == 0
        # Whole sectors that are stored need nothing from memory.
        left = caches.write_back()
        assert (left.written, left.filled) == (2 * sectors, 0)
        assert caches.write_back().written == 0

    def test_a_new_cache_is_empty_or_warm(self, kernels):
        x, out = aligned(4096), aligned(4096)
        launch = kernels.packs(16, x, out)
        assert one(Caches(1, 64 * KIB), launch).memory == 512
        caches = Caches(1, 64 * KIB)
        caches.warm(x)
        assert one(caches, launch).memory == 0
        assert caches.write_back().written == 512

    @pytest.mark.parametrize("kibibytes, rounds_from_memory", [(16, 1), (15, 3)])
    def test_the_oldest_lines_make_room(self, kernels, kibibytes, rounds_from_memory):
        """16 KiB, three times in a row: one line too many, and all are gone when needed again."""
        x, out = aligned(4096), aligned(64)
        launch = kernels.stream(1, x, 1024, 3, out)
        caches = Caches(1, kibibytes * KIB)
        assert one(caches, launch).memory == rounds_from_memory * 512

    def test_a_line_that_is_used_again_stays(self, kernels):
        """Of three lines, one is always the result's: a, b, a, then c in b's place."""
        lines, out = aligned(3 * 32), aligned(32)
        a, b, c = (kernels.strided(1, lines, 1, 32 * k, 32, out, 1) for k in range(3))
        caches = Caches(1, 3 * LINE)
        missed = [one(caches, launch).memory for launch in (a, b, a, c, a, b)]
        assert missed == [4, 4, 0, 4, 0, 4]

    def test_evicted_lines_are_written_back(self, kernels):
        x, out = aligned(4096), aligned(4096)
        launch = kernels.packs(16, x, out)
        caches = Caches(1, 8 * KIB)
        totals = one(caches, launch)
        left = caches.write_back()
        assert totals.written + left.written == 512 and totals.written >= 512 - 8 * KIB // SECTOR
        assert totals.memory == 512 and totals.filled == left.filled == 0

    def test_parts_of_sectors_are_filled(self, kernels):
        """Unless the rest is stored before they are written back."""
        x, out = aligned(64), aligned(512)
        caches = Caches(1, 64 * KIB)
        one(caches, kernels.strided(1, x, 1, 0, 64, out, 8))
        left = caches.write_back()
        assert (left.written, left.filled) == (64, 64)
        caches = Caches(1, 64 * KIB)
        for part in range(8):
            one(caches, kernels.strided(1, x, 1, 0, 64, out[part:], 8))
        left = caches.write_back()
        assert (left.written, left.filled) == (64, 0)

    def test_blocks_side_by_side_share_what_they_load(self, kernels):
        """Two blocks go over more than the cache holds: together, or one after the other."""
        launch = kernels.stream(2, aligned(16384), 4096, 1, aligned(128))
        sectors = 16384 * 4 // SECTOR
        assert one(Caches(2, 16 * KIB), launch).memory == sectors
        assert one(Caches(1, 16 * KIB), launch, resident=2).memory == sectors
        assert one(Caches(1, 16 * KIB), launch, resident=1).memory == 2 * sectors

    @pytest.mark.parametrize("past, hits", [(False, 8), (True, 0)])
    def test_first_level(self, kernels, past, hits):
        launch = kernels.twice(aligned(64), int(past), aligned(64))
        totals = one(Caches(1, 64 * KIB), launch, first_level=16 * KIB)
        assert (totals.loaded, totals.first_level) == (16, hits)
        assert (totals.memory, totals.second_level) == (8, 8 - hits)
        # The next launch finds it empty.
        again = one(Caches(1, 64 * KIB), launch, first_level=16 * KIB)
        assert again.first_level == hits and again.memory == 8

    def test_each_phase_knows_where_its_data_came_from(self, kernels):
        packs, numbers = aligned(3 * 64 * 4), aligned(128)
        launch = kernels.phases(packs, numbers, aligned(64))
        caches = Caches(1, 64 * KIB)
        one(caches, launch, first_level=16 * KIB)
        found = [(p.first_level, p.second_level, p.memory) for p in launch.phases]
        # One number by two warps; then 64 numbers, of which 8 are there and 32 are asked for twice.
        assert found == [(1, 0, 96 + 1), (1 + 4, 0, 7)]


# The model of time

DEVICE = Device("one", multiprocessors=1, second_level=KIB, memory_rate=1e9, clock=1e9)


class TestTime:
    def test_a_block_alone(self):
        time = gpu_model.simulate([Block(1, 2, 4, 0, 2e9)], 1, DEVICE)
        assert (time.seconds, time.idle) == (7, 5)

    def test_bodies_share_the_memory(self):
        """Two that want 1e9 bytes per second each get half of it."""
        time = gpu_model.simulate([Block(1, 2, 0, 0, 2e9)] * 2, 2, DEVICE)
        assert (time.seconds, time.idle) == (5, 1)

    def test_a_fill_hides_behind_another_body(self):
        """Body of the first from 1 to 3; the second starts at 0 and is ready at 3."""
        blocks = [Block(1, 2, 0, 0, 2e9), Block(3, 2, 0, 0, 2e9)]
        assert gpu_model.simulate(blocks, 2, DEVICE).seconds == 5
        assert gpu_model.simulate(blocks, 1, DEVICE).seconds == 8

    def test_waves(self):
        time = gpu_model.simulate([Block(1, 1, 1, 0, 0)] * 5, 2, DEVICE)
        assert (time.seconds, time.idle) == (9, 6)

    def test_the_second_level_has_a_rate_too(self):
        blocks = [Block(0, 1, 0, gpu_model.SECOND_LEVEL_RATE, 0)] * 3
        assert gpu_model.simulate(blocks, 3, DEVICE).seconds == pytest.approx(3)

    def test_no_blocks(self):
        assert gpu_model.simulate([], 3, DEVICE).seconds == 0

    def test_round_trips(self):
        """Ten loads, four at a time: three trips, of which the first is the fill."""
        phase = Phase(wide_loads=10, memory=10)
        (block,) = gpu_model.as_blocks([phase], 0, DEVICE, 1, InFlight(4, 1))
        assert block.fill == pytest.approx(gpu_model.BLOCK_START + gpu_model.MEMORY_LATENCY)
        body = 2 * gpu_model.MEMORY_LATENCY + gpu_model.BARRIER
        assert (block.body, block.end) == (pytest.approx(body), 0)
        assert block.memory == block.second_level == 10 * SECTOR

    def test_a_round_trip_is_as_long_as_the_way(self):
        phase = Phase(wide_loads=3, first_level=1, second_level=2, memory=1, atomics=1)
        (block,) = gpu_model.as_blocks([phase], 0, DEVICE, 1, InFlight(1, 1))
        trip = gpu_model.FIRST_LEVEL_LATENCY + 3 * gpu_model.SECOND_LEVEL_LATENCY
        trip = (trip + gpu_model.MEMORY_LATENCY) / 5
        assert block.fill == pytest.approx(gpu_model.BLOCK_START + trip)
        assert block.body == pytest.approx(3 * trip + gpu_model.BARRIER)

    def test_the_port_into_a_multiprocessor(self):
        """Two blocks share it; round trips would take less."""
        phase = Phase(wide_loads=1, memory=10_000)
        (block,) = gpu_model.as_blocks([phase], 0, DEVICE, 2, InFlight(1, 1))
        assert block.body == pytest.approx(10_000 * SECTOR * 2 / (gpu_model.PORT * 1e9))

    def test_what_comes_before_and_after_the_bulk(self):
        before = Phase(narrow_loads=3, second_level=3)
        bulk = Phase(wide_loads=4, memory=1000)
        after = Phase(wavefronts=100, stored=1)
        (block,) = gpu_model.as_blocks([before, bulk, after], 1, DEVICE, 2, InFlight(1, 1))
        before_seconds = 3 * gpu_model.SECOND_LEVEL_LATENCY + gpu_model.BARRIER
        trip = gpu_model.MEMORY_LATENCY
        assert block.fill == pytest.approx(gpu_model.BLOCK_START + before_seconds + trip)
        assert block.body == pytest.approx(3 * trip + gpu_model.BARRIER)
        assert block.end == pytest.approx(200e-9 + gpu_model.BARRIER)
        assert block.memory == pytest.approx(1001 * SECTOR)

    def test_blocks_come_in_their_order(self):
        phases = [Phase(block=1, memory=1), Phase(block=0, memory=2)]
        blocks = gpu_model.as_blocks(phases, 0, DEVICE, 1, InFlight(1, 1))
        assert [block.memory for block in blocks] == [2 * SECTOR, SECTOR]

    @pytest.mark.parametrize(
        "threads, registers, shared, expected",
        [
            (512, 128, 0, 1),
            (512, 64, 0, 2),
            (256, 32, 0, 8),
            (32, 16, 0, 32),
            (256, 33, 0, 6),  # 40 registers: 10240 of 65536 per block
            (256, 32, 100 * KIB, 2),
            (512, 16, 113 * KIB, 2),
            (512, 16, 114 * KIB, 1),
        ],
    )
    def test_resident_blocks(self, threads, registers, shared, expected):
        assert gpu_model.resident_blocks(threads, registers, shared) == expected

    def test_a_block_that_does_not_fit(self):
        with pytest.raises(ValueError, match="got 1024 threads of 128 registers"):
            gpu_model.resident_blocks(1024, 128, 0)

    def test_first_level(self):
        assert gpu_model.first_level_bytes(8, 0) == 256 * KIB
        assert gpu_model.first_level_bytes(2, 33 * KIB) == 156 * KIB

    def test_reports_of_the_assembler(self, tmp_path):
        name = "_ZN6fastsn4cuda9_GLOBAL__N__4110_9_a_cu_7046e83b13finish_kernelIfLi3840EEEvNS0_1AE"
        lines = []
        for target, registers in (("sm_80", 40), ("sm_90", 32)):
            lines += [
                f"ptxas info    : Compiling entry function '{name}' for '{target}'",
                f"ptxas info    : Function properties for {name}",
                "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
                f"ptxas info    : Used {registers} registers, used 1 barriers, 2113 bytes smem",
            ]
        (tmp_path / "a.ptxas").write_text("\n".join(lines) + "\n")
        found = gpu_model.resources(tmp_path)
        emulated_name = "_ZN6fastsn4cuda12_GLOBAL__N_113finish_kernelIfLi3840EEEvNS0_5BatchE"
        assert found == {gpu_model.instance(emulated_name): gpu_model.Resources(32, 2113)}


# The kernels of spectral normalization


#: Layers of every kind that the networks have, 5.7 MB.
SHAPES = [
    (64, 3, 3, 3), (128, 64, 4, 4), (256, 128, 3, 3), (512, 512), (1, 4096), (96, 96, 1, 1),
    (1000, 384), (160, 160, 3, 3),
]  # fmt: skip


@pytest.fixture(scope="module", params=["u", "v", "backward"])
def kind(request) -> str:
    """A forward with u or v first, or a backward."""
    return request.param


@pytest.fixture(scope="module")
def call(kind):
    """What the operators are called with, and the launches."""
    recorded.clear()
    with recorded.device_memory():
        call = gpu_traffic.Call.of_shapes(SHAPES)
        order, direction = ("u", kind) if kind == "backward" else (kind, "forward")
        yield SimpleNamespace(call=call, launches=call.launches(recorded, order, direction))
    recorded.clear()


class TestKernels:
    def test_shares(self, kind, call):
        assert call.launches
        for launch in call.launches:
            least = SHORT_OF_IT.get((kind, launch.kernel), (SHARE, SHARE))
            loads = gpu_traffic.efficiency([site for site in launch.sites if site.loads])
            stores = gpu_traffic.efficiency([site for site in launch.sites if site.stores])
            assert loads >= least[0], f"loads of {launch.kernel}"
            assert stores >= least[1], f"stores of {launch.kernel}"

    def test_memory(self, kind, call):
        """With 1/64 of an H100's multiprocessors and second-level cache."""
        whole = gpu_model.DEVICES["H100"]
        small = replace(whole, multiprocessors=2, second_level=whole.second_level // 64)
        base = gpu_traffic.Row("", "", kind, "", "")
        options = gpu_traffic.Options()
        total = gpu_traffic.of_device(recorded, call.launches, call.call, base, small, options)[-1]
        assert total.loaded - total.first_level < LOADED[kind] * call.call.bytes
        assert total.stored < STORED[kind] * call.call.bytes
        assert total.of_floor < MEMORY[kind]


# The command


def test_a_quick_run_writes_all_rows(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert gpu_traffic.main(["--quick", "--lines", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    calls = [(row["order"], row["direction"], row["kernel"]) for row in rows]
    forward = ["multiply", "finish", "scale", "all"]
    assert calls == [
        *(("u", "forward", kernel) for kernel in forward),
        *(("v", "forward", kernel) for kernel in forward),
        *(("u", "backward", kernel) for kernel in ("product", "gradient", "all")),
    ]
    assert all(row["device"] == "H100" and row["microseconds"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "small SNDCGAN D, u first, forward, H100" in printed
    assert "sectors would do: " in printed


@pytest.mark.parametrize("text", ["scale", "scale=", "scale=4", "scale=0,1", "=4,1", "scale=a,b"])
def test_bad_loads_in_flight(text, capsys):
    with pytest.raises(SystemExit):
        gpu_traffic.main(["--quick", "--in-flight", text])
    assert f"must be like scale=4,1, got {text!r}" in capsys.readouterr().err
