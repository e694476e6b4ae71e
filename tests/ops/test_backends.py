"""Which implementation serves a call, and that all of them agree."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import fastsn
import fastsn.triton
from fastsn import backends, ops, reference
from fastsn.__main__ import info, main
from fastsn.functional import init_vectors, spectral_norm
from helpers import triton_launches
from helpers.elsewhere import Elsewhere

POSSIBLE = [name for name in backends.NAMES if backends.why_not(name) is None]
IMPOSSIBLE = [name for name in backends.NAMES if backends.why_not(name) is not None]
SERVING = [name for name in POSSIBLE if name not in ("cuda", "reference")]  # the CPU
REAL, COMPLEX = torch.randn(4, 3), torch.randn(4, 3, dtype=torch.complex64)


@pytest.fixture(autouse=True)
def automatic():
    """Whatever a test does, the next one starts from the default."""
    fastsn.use_backend("auto")
    yield
    fastsn.use_backend("auto")


@pytest.fixture(autouse=True, scope="module")
def patched_once():
    """In the process of the interpreter."""
    with triton_launches.patching_once() if fastsn.triton.is_interpreted() else nullcontext():
        yield


# The choice


def test_automatic_choice():
    assert fastsn.current_backend() == "auto"
    assert backends.select([REAL]) is ops
    assert backends.select([REAL.to("meta")]) is ops
    assert backends.select([COMPLEX]) is reference
    inside = []
    torch.func.grad(lambda w: inside.append(backends.select([w])) or w.sum())(REAL)
    assert inside == [reference]


def test_choice_by_function():
    fastsn.use_backend("reference")
    assert fastsn.current_backend() == "reference" and backends.select([REAL]) is reference
    fastsn.use_backend("cpp")
    assert fastsn.current_backend() == "cpp" and backends.select([REAL]) is ops


def test_choice_for_a_while():
    fastsn.use_backend("cpp")
    with fastsn.use_backend("reference"):
        assert fastsn.current_backend() == "reference"
        with fastsn.use_backend("auto"):
            assert fastsn.current_backend() == "auto"
            with fastsn.use_backend("cpp"):
                assert fastsn.current_backend() == "cpp"
            assert fastsn.current_backend() == "auto"
        assert fastsn.current_backend() == "reference"
    assert fastsn.current_backend() == "cpp"


def test_choice_ends_with_an_exception():
    with pytest.raises(KeyError), fastsn.use_backend("reference"):
        with fastsn.use_backend("cpp"):
            raise KeyError
    assert fastsn.current_backend() == "auto"


def test_the_chosen_one_does_the_work(monkeypatch):
    names = ("power_", "estimate", "scale")
    calls = []
    for name in names:
        original = getattr(reference, name)
        monkeypatch.setattr(
            reference, name, lambda *a, f=original, n=name: calls.append(n) or f(*a)
        )
    layer = fastsn.nn.SNLinear(3, 4)
    u, v = init_vectors(REAL)
    for backend in ("cpp", "reference"):
        calls.clear()
        with fastsn.use_backend(backend):
            layer.train()(REAL)
            layer.eval()(REAL)
            spectral_norm(REAL, u, v)
        assert set(calls) == (set(names) if backend == "reference" else set())


@pytest.mark.parametrize(
    "built, hip, triton, expected",
    [
        ("80 90", None, True, "cuda"),
        ("80 90", None, False, "cuda"),
        ("", None, True, "triton"),
        ("", None, False, "reference"),
        ("80 90", "7.0", True, "triton"),
        ("80 90", "7.0", False, "reference"),
    ],
)
def test_automatic_choice_on_a_gpu(monkeypatch, built, hip, triton, expected):
    monkeypatch.setattr(ops._C, "cuda_architectures", built)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fastsn.triton, "_missing", lambda: None if triton else "not installed")
    weight = Elsewhere("cuda:1")
    assert backends.choose(weight) == expected
    assert backends.select([weight]) is (reference if expected == "reference" else ops)
    assert backends.choose(Elsewhere("cuda", torch.complex64)) == "reference"
    assert backends.choose(Elsewhere("xpu")) == "reference"
    assert backends.choose(REAL) == "cpp"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_choice_of_another_device_says_why(monkeypatch, name):
    monkeypatch.setattr(ops._C, "cuda_architectures", "80 90")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fastsn.triton, "_missing", lambda: None)
    monkeypatch.setattr(fastsn.triton, "why_not", lambda: None)
    monkeypatch.setattr(backends, "_default", name)
    assert backends.choose(Elsewhere("cuda")) == name
    with pytest.raises(RuntimeError, match=rf"{name!r} was asked for, but .*cpu.*\['cpp', 'refer"):
        backends.choose(REAL)


def test_reasons_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops._C, "cuda_architectures", "")
    assert backends.why_not("cuda").startswith("CUDA kernels were not built: ")
    monkeypatch.setattr(ops._C, "cuda_architectures", "90")
    monkeypatch.setattr(ops._C, "cuda_versions", lambda: (13000, 13000), raising=False)
    assert "finds no CUDA device" in backends.why_not("cuda")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "is for AMD GPUs" in backends.why_not("cuda")
    assert "no GPU was found" in backends.why_not("triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in backends.why_not("triton")


# What cannot be done


@pytest.mark.parametrize("name", ["", "CPP", "numpy", None])
def test_unknown_name(name):
    with pytest.raises(ValueError) as caught:
        fastsn.use_backend(name)
    for word in ("auto", *backends.NAMES, repr(name)):
        assert word in str(caught.value)
    assert fastsn.current_backend() == "auto"


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_backend_that_cannot_run_here(name):
    fastsn.use_backend("reference")
    with pytest.raises(RuntimeError) as caught, fastsn.use_backend(name):
        pass
    for word in (name, backends.why_not(name), str(POSSIBLE)):
        assert word in str(caught.value)
    assert fastsn.current_backend() == "reference"


def test_backend_that_cannot_serve_a_weight():
    u, v = init_vectors(COMPLEX)
    fastsn.use_backend("cpp")
    with pytest.raises(RuntimeError, match="'cpp'.*no kernels for torch.complex64.*reference"):
        spectral_norm(COMPLEX, u, v)
    assert all(x._version == 0 for x in u + v)
    with pytest.raises(RuntimeError, match="'cpp'.*torch.func.*reference"):
        torch.func.grad(lambda w: spectral_norm(w, *init_vectors(REAL))[0].sum())(REAL)


# All agree


def network(method) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 5, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(320, 2, bias=False),
    ).double()
    for layer in net:
        if hasattr(layer, "weight"):
            method(layer)
    return net


def by_hook(layer):
    fastsn.spectral_norm(layer, n_power_iterations=2)


def by_parametrization(layer):
    fastsn.parametrizations.spectral_norm(layer)


def bssn(layer):
    fastsn.parametrizations.spectral_norm(layer, norm="bidirectional", scale=0.7)


def bounded(layer):
    fastsn.parametrizations.spectral_norm(layer, scale=1.2, bound=True, zero_guard=True)


@pytest.mark.parametrize("accelerated", [False, True], ids=["alone", "accelerated"])
@pytest.mark.parametrize("method", [by_hook, by_parametrization, bssn, bounded])
def test_the_same_training_on_every_backend(method, accelerated):
    def train() -> list[torch.Tensor]:
        net = network(method)
        if accelerated:
            fastsn.accelerate(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for x in data:
            optimizer.zero_grad()
            (net(x).mean() - net(x + 1).mean()).backward()
            optimizer.step()
        return [*net.eval()(data[0]).unbind(), *net.state_dict().values()]

    data = torch.randn(4, 6, 3, 6, 6, dtype=torch.float64)
    with fastsn.use_backend("reference"):
        expected = train()
    for name in SERVING:
        with fastsn.use_backend(name):
            torch.testing.assert_close(train(), expected, rtol=1e-10, atol=1e-12)


def test_compiled_with_every_backend():
    net = fastsn.accelerate(network(by_parametrization)).eval()
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    expected = net(x)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for name in SERVING:
        torch._dynamo.reset()
        with fastsn.use_backend(name):
            torch.testing.assert_close(compiled(x), expected)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_triton_serves_the_cpu_in_its_interpreter():
    """This file again, where the interpreter makes Triton one of the back-ends of the CPU."""
    pytest.importorskip("triton")
    names = "(training and accelerated and bssn) or compiled or environment_variable_chooses"
    done = run("-m", "pytest", "-q", "-k", names, __file__, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run("-m", "fastsn", "info", FASTSN_BACKEND="triton", TRITON_INTERPRET="1")
    assert "back-end in use: triton" in done.stdout, done.stderr


# The report, and the environment variable


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


def test_info_names_versions_and_every_backend():
    lines = info().splitlines()
    text = "\n".join(lines)
    for word in (
        fastsn.__version__,
        platform.python_version(),
        torch.__version__,
        ops._C.torch_version,
        ops._C.compiler,
        ops._C.cpu_capability(),
        "back-end in use: auto",
    ):
        assert word in text
    for name in POSSIBLE:
        assert [line.split() for line in lines if line.split()[0] == name] == [[name, "can", "run"]]
    for name in IMPOSSIBLE:
        (line,) = [line for line in lines if line.split()[0] == name]
        assert line.endswith(f"cannot run: {backends.why_not(name)}")


def test_environment_variable_chooses():
    done = run("-m", "fastsn", "info", FASTSN_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert "back-end in use: reference" in done.stdout


@pytest.mark.parametrize(
    "name, error", [("fastest", "ValueError"), (IMPOSSIBLE[0], "RuntimeError")]
)
def test_environment_variable_that_cannot_be_fulfilled(name, error):
    done = run("-c", "import fastsn", FASTSN_BACKEND=name)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0
    assert last.startswith(error) and name in last and "reference" in last


@pytest.mark.parametrize("arguments", [[], ["build"], ["info", "more"]], ids=str)
def test_unknown_command(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastsn", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "python -m fastsn" in capsys.readouterr().err


def test_kernels_of_triton_leave_when_it_is_no_longer_asked_for():
    pytest.importorskip("triton")
    done = run(
        "-c",
        "import torch, fastsn\n"
        "def python_kernels():\n"
        "    dump = torch._C._dispatch_dump('fastsn::power_')\n"
        "    return sum('backends.py' in line for line in dump.splitlines() if line[:3] == 'CPU')\n"
        "seen = [python_kernels()]\n"
        "with fastsn.use_backend('triton'):\n"
        "    seen.append(python_kernels())\n"
        "    with fastsn.use_backend('triton'):\n"
        "        seen.append(python_kernels())\n"
        "seen.append(python_kernels())\n"
        "assert [n > 0 for n in seen] == [False, True, True, False], seen\n",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr


def test_threads_are_in_blocks_of_their_own():
    """Each sees its own choice, others the default, and none brings back what another has said."""
    barrier = threading.Barrier(3)
    seen = {}

    def within(name):
        with fastsn.use_backend(name):
            barrier.wait(10)
            seen[name] = fastsn.current_backend()
            barrier.wait(10)
        seen[name + " after"] = fastsn.current_backend()

    threads = [threading.Thread(target=within, args=(name,)) for name in ("cpp", "reference")]
    for thread in threads:
        thread.start()
    barrier.wait(10)
    assert fastsn.current_backend() == "auto"
    barrier.wait(10)
    for thread in threads:
        thread.join()
    assert seen == {
        "cpp": "cpp", "reference": "reference", "cpp after": "auto", "reference after": "auto",
    }  # fmt: skip


def test_a_call_is_for_all_threads():
    before = fastsn.current_backend()
    seen = []
    fastsn.use_backend("reference")
    thread = threading.Thread(target=lambda: seen.append(fastsn.current_backend()))
    thread.start()
    thread.join()
    fastsn.use_backend(before)
    assert seen == ["reference"] and fastsn.current_backend() == before
