"""What the build decides and how it fails: `setup.py`, without compiling anything."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build():
    """`setup.py` as a module; importing it runs nothing."""
    spec = importlib.util.spec_from_file_location("fastsn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(tmp_path):
    """Makes a program of a given name in a folder of its own; returns the folder."""

    def make(name: str, folder: str = "tools") -> Path:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path.parent

    return make


# CUDA


@pytest.mark.parametrize("wish", [None, "", "1"])
def test_cuda_kernels_are_built_where_nvcc_is(build, wish):
    decision = build.decide_cuda(wish, "/cuda/bin/nvcc", has_kernels=True)
    assert decision.build and "/cuda/bin/nvcc" in decision.reason


@pytest.mark.parametrize("wish", [None, ""])
@pytest.mark.parametrize(
    "nvcc, has_kernels, reason",
    [
        (None, True, "nvcc was found neither under CUDA_HOME nor on PATH"),
        ("/cuda/bin/nvcc", False, "no CUDA kernels"),
        (None, False, "no CUDA kernels"),
    ],
)
def test_build_works_without_cuda(build, wish, nvcc, has_kernels, reason):
    decision = build.decide_cuda(wish, nvcc, has_kernels)
    assert not decision.build and reason in decision.reason


@pytest.mark.parametrize("nvcc", [None, "/cuda/bin/nvcc"])
@pytest.mark.parametrize("has_kernels", [False, True])
def test_cuda_can_be_refused(build, nvcc, has_kernels):
    assert build.decide_cuda("0", nvcc, has_kernels) == (False, "FASTSN_CUDA=0")


@pytest.mark.parametrize(
    "nvcc, has_kernels, reason",
    [(None, True, "nvcc was found neither"), ("/cuda/bin/nvcc", False, "no CUDA kernels")],
)
def test_cuda_that_is_insisted_on_but_impossible(build, nvcc, has_kernels, reason):
    with pytest.raises(ValueError, match=f"FASTSN_CUDA=1 asks for CUDA kernels, but.*{reason}"):
        build.decide_cuda("1", nvcc, has_kernels)


@pytest.mark.parametrize("wish", ["yes", "2", " "])
def test_cuda_wish_of_another_value(build, wish):
    with pytest.raises(ValueError, match=f"FASTSN_CUDA must be 0, 1 or unset, got {wish!r}"):
        build.decide_cuda(wish, "/cuda/bin/nvcc", True)


def test_nvcc_is_looked_for_under_cuda_home_alone_if_that_is_set(build, tool, monkeypatch):
    on_path = tool("nvcc")
    monkeypatch.setenv("PATH", str(on_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build.find_nvcc() == str(on_path / "nvcc")
    home = tool("nvcc", "cuda/bin").parent
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build.find_nvcc() == str(home / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(home / "bin"))
    assert build.find_nvcc() is None
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setenv("PATH", str(home))
    assert build.find_nvcc() is None


# The compiler


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_usual_compilers_are_found(build, tool, monkeypatch, name):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tool(name)))
    assert build.require_compiler() == name


def test_compiler_named_by_cxx_is_taken(build, tool, monkeypatch):
    tool("g++")
    monkeypatch.setenv("PATH", str(tool("ccache")))
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert build.require_compiler() == "ccache g++ -m64"


def test_cxx_that_does_not_exist_is_not_passed_over(build, tool, monkeypatch):
    monkeypatch.setenv("PATH", str(tool("g++")))
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(SystemExit, match="fastsn: error: the C.. compiler 'icpx' that CXX names"):
        build.require_compiler()


# The extension


@pytest.fixture
def arguments(build, tool, monkeypatch):
    """The arguments of setup() here, with FASTSN_WERROR and FASTSN_CUDA as wanted."""

    def make(**environment: str) -> dict:
        for name in ("CXX", "FASTSN_CUDA", "FASTSN_WERROR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(tool("c++")))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return build.extension_arguments()

    return make


def flags_of(extension) -> list[str]:
    flags = extension.extra_compile_args
    return [*flags["cxx"], *extension.extra_link_args]


def test_binary_is_portable(arguments):
    (extension,) = arguments()["ext_modules"]
    flags = flags_of(extension)
    assert "-O3" in flags
    assert not [f for f in flags if f.startswith(("-march", "-mtune", "-mcpu", "-mavx", "-ffast"))]


def test_every_source_is_compiled(arguments):
    (extension,) = arguments()["ext_modules"]
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
    assert sources and set(extension.sources) >= sources
    assert not any(os.path.isabs(source) for source in extension.sources)


def test_warnings_are_errors_on_demand(arguments):
    (strict,), (lenient,) = (arguments(FASTSN_WERROR=wish)["ext_modules"] for wish in ("1", "0"))
    assert "-Werror" in flags_of(strict) and "-Werror" not in flags_of(lenient)
    assert "-Wall" in flags_of(strict)


def test_build_says_what_it_decided(arguments, capsys):
    import torch

    arguments(FASTSN_CUDA="0")
    output = capsys.readouterr().out
    assert f"CPU kernels: built with c++ against torch {torch.__version__}" in output
    assert "CUDA kernels: not built (FASTSN_CUDA=0)" in output


def test_bad_cuda_wish_ends_the_build(arguments):
    with pytest.raises(SystemExit, match="^fastsn: error: FASTSN_CUDA must be 0, 1 or unset"):
        arguments(FASTSN_CUDA="maybe")


# As a user sees it


def fails_with(environment: dict[str, str]) -> str:
    """The one line that `setup.py` prints when it ends with an error."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_no_compiler_is_one_clear_line(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "CXX"}
    line = fails_with({**environment, "PATH": str(tmp_path)})
    assert line.startswith("fastsn: error: no C++ compiler was found")
    for word in ("c++", "g++", "clang++", "CXX"):
        assert word in line


def test_no_torch_is_one_clear_line(tool, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    environment = {k: v for k, v in os.environ.items() if k != "CXX"}
    environment |= {"PATH": str(tool("c++")), "PYTHONPATH": str(tmp_path)}
    line = fails_with(environment)
    assert line.startswith("fastsn: error: torch could not be imported")
    assert "pip install --no-build-isolation" in line
