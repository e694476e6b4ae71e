"""On which GPUs the compiled kernels run, and what serves the others; no GPU is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastsn.triton
from fastsn import backends, cuda, ops, reference
from fastsn.__main__ import info
from helpers.elsewhere import Elsewhere

NOT_BUILT = {"architectures": "", "ptx": ""}


@pytest.fixture
def machine(monkeypatch):
    """Makes torch and the extension speak of a driver and GPUs that are not there."""

    def make(
        *capabilities: tuple[int, int],
        architectures: str = "80 90 100 120",
        ptx: str = "100",
        driver: int = 13000,
        runtime: int = 13000,
        triton: bool = True,
        started: bool = True,
    ) -> None:
        monkeypatch.setattr(ops._C, "cuda_architectures", architectures)
        monkeypatch.setattr(ops._C, "cuda_ptx", ptx)
        monkeypatch.setattr(ops._C, "cuda_versions", lambda: (driver, runtime), raising=False)
        monkeypatch.setattr(cuda, "_refusals", {})
        monkeypatch.setattr(backends, "_standing_in", None)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(fastsn.triton, "_missing", lambda: None if triton else "no Triton")
        if started:
            backends._cuda_starts()

    with fastsn.use_backend("auto"):
        yield make


def chosen(*devices: str) -> list[str]:
    return [backends.choose(Elsewhere(device)) for device in devices]


def kernel_of_gpus() -> str:
    """Where the kernel was registered that serves an operator on GPUs, if one is."""
    dump = torch._C._dispatch_dump("fastsn::power_").splitlines()
    return next((line for line in dump if line.startswith("CUDA")), "")


# One GPU


@pytest.mark.parametrize(
    "architectures, capability",
    [
        ("80", (8, 0)),
        ("80", (8, 9)),
        ("80 90 100 120", (9, 0)),
        ("80 90 100 120", (10, 3)),
        ("80 90 100 120", (12, 1)),
        ("87", (8, 7)),
        ("90a", (9, 0)),
        ("100f", (10, 3)),
        ("103a 100a", (10, 0)),
    ],
)
def test_machine_code_that_runs(machine, architectures, capability):
    machine(capability, architectures=architectures, ptx="")
    assert cuda.why_not() is None and chosen("cuda:0") == ["cuda"]


@pytest.mark.parametrize(
    "architectures, capability",
    [
        ("80 90", (7, 5)),
        ("80 90", (10, 0)),
        ("86", (8, 0)),
        ("80 86", (8, 7)),
        ("90a", (8, 9)),
        ("100a", (10, 3)),
        ("103f", (10, 0)),
        ("100f", (11, 0)),
        ("100", (12, 0)),
    ],
)
def test_machine_code_that_does_not_run(machine, architectures, capability):
    machine(capability, architectures=architectures, ptx="")
    built = ", ".join(f"sm_{one}" for one in architectures.split())
    reason = f"built for {built}, not for this GPU's sm_{capability[0]}{capability[1]}"
    assert cuda.why_not() == reason and chosen("cuda:0") == ["triton"]


@pytest.mark.parametrize(
    "capability, runs", [((9, 0), True), ((11, 0), True), ((13, 1), True), ((8, 9), False)]
)
def test_portable_code(machine, capability, runs):
    machine(capability, architectures="120", ptx="90")
    assert chosen("cuda:0") == ["cuda" if runs else "triton"]


def test_portable_code_is_read_by_drivers_as_new_as_the_compiler(machine):
    machine((11, 0), (10, 0), driver=13010, runtime=13020)
    assert cuda.refusals() == {
        0: "built for sm_80, sm_90, sm_100, sm_120; to compile PTX for this GPU's sm_110 takes a "
        "driver for CUDA 13.2 (found: 13.1)"
    }
    machine((11, 0), driver=13020, runtime=13020)
    assert cuda.refusals() == {}


@pytest.mark.parametrize(
    "driver, runtime, oldest, found",
    [
        (12080, 13000, "13.0", "12.8"),
        (12090, 13020, "13.0", "12.9"),
        (11040, 12060, "12.0", "11.4"),
        (0, 13000, "13.0", "none"),
    ],
)
@pytest.mark.parametrize("started", [False, True])
def test_driver_that_is_too_old(machine, driver, runtime, oldest, found, started):
    machine((9, 0), driver=driver, runtime=runtime, started=started)
    reason = f"CUDA kernels need a driver for CUDA {oldest} (found: {found})"
    assert cuda.why_not() == backends.why_not("cuda") == reason
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run here: CUDA kernels need a driver"):
        fastsn.use_backend("cuda")


@pytest.mark.parametrize(
    "driver, runtime", [(13000, 13000), (13000, 13020), (14000, 13000), (12000, 12090)]
)
@pytest.mark.parametrize("started", [False, True])
def test_driver_that_is_new_enough(machine, driver, runtime, started):
    machine((9, 0), driver=driver, runtime=runtime, started=started)
    assert cuda.why_not() is None and chosen("cuda:0") == ["cuda"]


# What serves instead


@pytest.mark.parametrize(
    "why", [{"driver": 12080}, {"architectures": "100"}, {"architectures": ""}]
)
@pytest.mark.parametrize("triton", [True, False])
def test_triton_serves_where_no_gpu_can_run_them(machine, why, triton):
    machine((9, 0), (9, 0), **why, triton=triton)
    name = "triton" if triton else "reference"
    assert chosen("cuda:0", "cuda:1") == [name] * 2
    assert backends.select([Elsewhere("cuda:1")]) is (ops if triton else reference)
    # However the operator is called.
    assert "backends.py" in kernel_of_gpus()


@pytest.mark.parametrize("triton", [True, False])
def test_the_reference_serves_a_gpu_beside_those_that_can_run_them(machine, triton, monkeypatch):
    machine((8, 0), (7, 5), (9, 0), triton=triton)
    assert chosen("cuda:0", "cuda:1", "cuda:2") == ["cuda", "reference", "cuda"]
    assert backends.why_not("cuda") is None
    assert "backends.py" not in kernel_of_gpus()
    monkeypatch.setattr(backends, "current_backend", lambda: "cuda")
    with pytest.raises(RuntimeError, match="but built for .*, not for this GPU's sm_75; these can"):
        chosen("cuda:1")
    assert chosen("cuda:2") == ["cuda"]
    if triton:
        monkeypatch.setattr(backends, "current_backend", lambda: "triton")
        assert chosen("cuda:0", "cuda:1") == ["triton", "triton"]


def test_nothing_is_asked_before_cuda_starts(machine):
    """A compiler's tensors may be on GPUs that are not there."""
    machine((7, 5), started=False)
    assert chosen("cuda:0", "cuda:3") == ["cuda", "cuda"]
    assert cuda._refusals == {}
    backends._cuda_starts()
    assert chosen("cuda:0") == ["triton"]


# The report


def test_info_says_why_not(machine):
    machine((9, 0), driver=12080)
    lines = info().splitlines()
    assert lines[2].endswith("CUDA kernels for sm_80, sm_90, sm_100, sm_120, PTX of compute_100")
    assert (
        "  cuda       cannot run: CUDA kernels need a driver for CUDA 13.0 (found: 12.8)" in lines
    )
    machine((7, 0), (7, 5), (7, 5))
    reason = "built for sm_80, sm_90, sm_100, sm_120, not for this GPU's sm_7"
    assert f"  cuda       cannot run: {reason}0; {reason}5" in info().splitlines()


def test_info_names_the_gpus_that_are_left_out(machine):
    machine((8, 0), (7, 5), architectures="80", ptx="")
    lines = info().splitlines()
    (line,) = [i for i, line in enumerate(lines) if line == "  cuda       can run"]
    assert lines[line + 1] == "    but not on cuda:1: built for sm_80, not for this GPU's sm_75"
    machine((8, 0), (8, 6))
    assert "but not on" not in info()


# The start of CUDA

STAND_INS = """
import sys
import torch

def unasked(*args):
    raise AssertionError("asked too early")

capabilities, started = eval(sys.argv[1]), sys.argv[2] == "started"
torch.cuda._lazy_init = torch.cuda.device_count = torch.cuda.get_device_capability = unasked
def start():
    torch.cuda.device_count = lambda: len(capabilities)
    torch.cuda.get_device_capability = capabilities.__getitem__
    torch.cuda.is_initialized = lambda: True
    for call, _ in torch.cuda._queued_calls:
        if call.__module__.startswith("fastsn"):
            call()
if started:
    start()
from fastsn import _C
_C.cuda_architectures, _C.cuda_ptx, _C.cuda_versions = "80", "80", lambda: (13000, 13000)
import fastsn
if not started:
    start()
"""


def run(code: str, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STAND_INS + code, *arguments],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("when", ["started", "later"])
def test_gpus_are_asked_when_cuda_starts(when):
    """Not at import, but then if that comes later."""
    run("assert fastsn.cuda._refusals.keys() == {0, 1}\n", "[(8, 0), (9, 0)]", when)


def test_triton_serves_the_operators_of_gpus():
    """Those themselves, as compiled graphs call them; tensors of the CPU stand in for a GPU's."""
    pytest.importorskip("triton")
    run(
        "power_ = torch.ops.fastsn.power_.default\n"
        "def call(run, *first):\n"
        "    torch.manual_seed(0)\n"
        "    weight, u, v = torch.randn(4, 3), torch.randn(4), torch.randn(3)\n"
        "    args = [weight], [u], [v], [0], [0], [1], 1e-12, False, False\n"
        "    return [run(*first, *args), u, v]\n"
        "keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)\n"
        "torch.testing.assert_close(call(power_.redispatch, keys), call(power_))\n"
        "assert 'fastsn.triton.operators' in sys.modules\n",
        "[(7, 5)]",
        "later",
        TRITON_INTERPRET="1",
    )
