"""What the build decides and how it fails: `setup.py`, without compiling anything."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def build():
    """`setup.py` as a module; importing it runs nothing."""
    spec = importlib.util.spec_from_file_location("fastsn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(tmp_path):
    """Makes a program of a given name, and what it prints, in a folder; returns the folder."""

    def make(name: str, folder: str = "tools", prints: str = "") -> Path:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"#!/bin/sh\nprintf '{prints}'\n")
        path.chmod(0o755)
        return path.parent

    return make


# CUDA


@pytest.mark.parametrize("wish", [None, "", "1"])
def test_cuda_kernels_are_built_where_nvcc_is(build, wish):
    decision = build.decide_cuda(wish, "/cuda/bin/nvcc")
    assert decision.build and "/cuda/bin/nvcc" in decision.reason


@pytest.mark.parametrize("wish", [None, ""])
def test_build_works_without_cuda(build, wish):
    decision = build.decide_cuda(wish, None)
    assert not decision.build
    assert "nvcc was found neither under CUDA_HOME nor on PATH" in decision.reason


@pytest.mark.parametrize("nvcc", [None, "/cuda/bin/nvcc"])
def test_cuda_can_be_refused(build, nvcc):
    assert build.decide_cuda("0", nvcc) == (False, "FASTSN_CUDA=0")


def test_cuda_that_is_insisted_on_but_impossible(build):
    with pytest.raises(ValueError, match="FASTSN_CUDA=1 asks for CUDA kernels, but nvcc was found"):
        build.decide_cuda("1", None)


@pytest.mark.parametrize("wish", ["yes", "2", " "])
def test_cuda_wish_of_another_value(build, wish):
    with pytest.raises(ValueError, match=f"FASTSN_CUDA must be 0, 1 or unset, got {wish!r}"):
        build.decide_cuda(wish, "/cuda/bin/nvcc")


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


@pytest.fixture
def knowing(tool):
    """The path of an nvcc that knows the given architectures."""

    def make(*architectures: str) -> str:
        codes = "".join(f"sm_{one}\\n" for one in architectures)
        return str(tool("nvcc", "cuda/bin", prints=codes) / "nvcc")

    return make


RECENT = ("75", "80", "86", "90", "100", "103", "120")


@pytest.mark.parametrize(
    "wish, expected",
    [("90", ("90",)), ("80 90a", ("80", "90a")), ("80,100f", ("80", "100f")), (" 80 ", ("80",))],
)
def test_architectures_that_are_asked_for(build, knowing, wish, expected):
    assert build.cuda_architectures(wish, knowing(*RECENT)) == expected
    assert build.cuda_architectures(wish, None) == ()


@pytest.mark.parametrize("wish", [None, "", " "])
@pytest.mark.parametrize(
    "known, expected",
    [
        (RECENT, ("80", "90", "100", "120")),
        (("75", "80", "86", "90"), ("80", "90")),
        (("100", "110", "120", "130"), ("100", "120")),
    ],
)
def test_usual_architectures_as_far_as_nvcc_knows_them(build, knowing, wish, known, expected):
    assert build.CUDA_ARCHITECTURES == ("80", "90", "100", "120")
    assert build.cuda_architectures(wish, knowing(*known)) == expected


@pytest.mark.parametrize("wish", ["sm_80", "8.0", "80;90", "all", "80 native", "90b"])
def test_architectures_of_another_kind(build, wish):
    with pytest.raises(ValueError, match="FASTSN_CUDA_ARCHITECTURES must be like '80 90', got "):
        build.cuda_architectures(wish, None)


@pytest.mark.parametrize(
    "wish, known, message",
    [
        ("80 130", ("80", "90"), r"ARCHITECTURES='80 130' .* knows 80 130, got .*, .* knows 80 90"),
        ("80a", ("90",), r"ARCHITECTURES='80a' needs an nvcc that knows 80a, got .*knows 90"),
        (None, ("50", "75"), r"fastsn needs an nvcc that knows 80 90 100 120, got .*knows 50 75"),
        (None, (), r"fastsn needs an nvcc that knows 80 90 100 120, got .*knows none"),
    ],
)
def test_architectures_that_nvcc_does_not_know(build, knowing, wish, known, message):
    with pytest.raises(ValueError, match=message):
        build.cuda_architectures(wish, knowing(*known))


@pytest.mark.parametrize(
    "architectures, expected",
    [
        ("80 90 100 120", "100"),  # 11.0 is between
        ("80 90", "90"),
        ("90", "90"),
        ("80 86 89 90 100 103", "103"),
        ("100 90 80", "100"),
        ("80 120", "80"),
        ("75 86 90", "75"),  # 8.0 is between
        ("90 103", "90"),
        ("80 90a", "80"),
        ("90a 100f", None),
    ],
)
def test_portable_code_leaves_out_no_later_gpu(build, architectures, expected):
    assert build.portable_architecture(tuple(architectures.split())) == expected


def test_nvcc_makes_machine_code_for_each_and_portable_code_of_one(build, monkeypatch):
    monkeypatch.delenv("FASTSN_WERROR", raising=False)
    command = build.nvcc_command("/cuda/bin/nvcc", ("80", "90", "90a"))
    assert command[0] == "/cuda/bin/nvcc"
    assert [word for word in command if word.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert "-O3" in command and not any("fast" in word for word in command)
    assert "-Werror" not in command
    monkeypatch.setenv("FASTSN_WERROR", "1")
    assert build.nvcc_command("/cuda/bin/nvcc", ("80", "90", "90a")) == [
        *command, "-Werror", "all-warnings",
    ]  # fmt: skip
    assert not any("code=compute" in word for word in build.nvcc_command("nvcc", ("90a",)))


class Nvcc:
    """A project with two files of kernels, and an nvcc that notes how it is called."""

    def __init__(self, build, folder: Path, monkeypatch) -> None:
        self.build = build
        self.root = folder / "project"
        self.sources = self.root / "csrc" / "cuda"
        self.objects = self.root / "build" / "cuda"
        self.program = folder / "nvcc"
        self.calls_file = folder / "calls"
        self.sources.mkdir(parents=True)
        for name in ("one.cu", "two.cu", "shared.cuh", "host.cpp"):
            (self.sources / name).write_text("")
            os.utime(self.sources / name, (1000, 1000))
        self.write('while [ "$1" != -o ]; do shift; done; echo code > "$2"; echo used 32 registers')
        monkeypatch.setattr(build, "ROOT", self.root)
        monkeypatch.setattr(build, "CUDA_OBJECTS", self.objects)

    def write(self, body: str) -> None:
        self.program.write_text(f'#!/bin/sh\necho "$@" >> {self.calls_file}\n{body}\n')
        self.program.chmod(0o755)

    def compile(self, *flags: str) -> list[str]:
        """Compiles, and says which files that took."""
        self.calls_file.write_text("")
        found = self.build.compile_cuda([str(self.program), *flags])
        assert found == [str(self.objects / name) for name in ("one.o", "two.o")]
        assert all(Path(path).read_text() == "code\n" for path in found)
        calls = self.calls_file.read_text().splitlines()
        return sorted(call.split("-c ")[1].split()[0] for call in calls)


BOTH = ["csrc/cuda/one.cu", "csrc/cuda/two.cu"]


@pytest.fixture
def nvcc(build, tmp_path, monkeypatch):
    return Nvcc(build, tmp_path, monkeypatch)


def test_kernels_are_compiled_once(nvcc):
    assert nvcc.compile("-O3") == BOTH
    assert nvcc.compile("-O3") == []
    report = (nvcc.objects / "one.ptxas").read_text()
    assert report.startswith(f"{nvcc.program} -O3 -c csrc/cuda/one.cu -o ")
    assert report.endswith("\nused 32 registers\n")


@pytest.mark.parametrize("name", ["one.cu", "shared.cuh", "host.cpp"])
def test_kernels_are_compiled_again_when_a_source_is_newer(nvcc, name):
    nvcc.compile()
    (nvcc.sources / name).touch()
    newer = (nvcc.objects / "two.o").stat().st_mtime + 1
    os.utime(nvcc.sources / name, (newer, newer))
    assert nvcc.compile() == BOTH


def test_kernels_are_compiled_again_with_other_flags(nvcc):
    nvcc.compile("-O3")
    assert nvcc.compile("-O3", "-g") == BOTH
    assert nvcc.compile("-O3", "-g") == []
    assert nvcc.compile("-O3") == BOTH


@pytest.mark.parametrize("lost", ["one.o", "one.ptxas"])
def test_what_is_lost_is_compiled_again(nvcc, lost):
    nvcc.compile()
    (nvcc.objects / lost).unlink()
    assert nvcc.compile() == BOTH[:1]


def test_nvcc_that_fails_is_one_clear_line(nvcc, capsys):
    nvcc.write('echo "one.cu(3): error: no such type" >&2; exit 1')
    with pytest.raises(SystemExit) as caught:
        nvcc.compile()
    line = str(caught.value)
    assert re.fullmatch(
        r"fastsn: error: nvcc could not compile (one|two)\.cu; FASTSN_CUDA=0 builds without CUDA "
        r"kernels",
        line,
    )
    assert "one.cu(3): error: no such type" in capsys.readouterr().err
    assert not list(nvcc.objects.glob("*.ptxas"))


def test_kernels_that_failed_are_compiled_again(nvcc):
    works = nvcc.program.read_text()
    # What nvcc leaves behind when it fails late.
    nvcc.write('while [ "$1" != -o ]; do shift; done; echo half > "$2"; exit 1')
    with pytest.raises(SystemExit):
        nvcc.compile()
    nvcc.program.write_text(works)
    assert nvcc.compile() == BOTH


def test_runtime_that_belongs_to_nvcc(build, tool, tmp_path):
    program = tool("nvcc", "cuda/bin") / "nvcc"
    with pytest.raises(SystemExit) as caught:
        build.cuda_runtime(str(program))
    assert str(caught.value) == (
        f"fastsn: error: no libcudart_static.a was found under {tmp_path / 'cuda'}; "
        "FASTSN_CUDA=0 builds without CUDA kernels"
    )
    library = tool("libcudart_static.a", "cuda/targets/x86_64-linux/lib") / "libcudart_static.a"
    assert build.cuda_runtime(str(program)) == str(library)
    # nvcc may be a link to where it is installed.
    link = tmp_path / "bin" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(program)
    assert build.cuda_runtime(str(link)) == str(library)


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


# The project


def test_old_setuptools_can_read_the_project():
    """Before 77 they know of the license as a classifier only, and refuse the expression."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    assert not [line for line in lines if line.startswith("license")]
    assert '    "License :: OSI Approved :: MIT License",' in lines
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def oldest_torch() -> str:
    """That which pyproject.toml asks for, to build and to run."""
    (one, other) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert one == other
    return one


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu128", "2.10.0a0+git1234", "1.13.1"])
def test_older_torch_is_one_clear_line(build, version):
    with pytest.raises(SystemExit) as caught:
        build.require_torch(version)
    assert str(caught.value) == (
        f"fastsn: error: torch {version} is installed; fastsn needs {oldest_torch()} or newer"
    )


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cpu", "2.14.1+cu130", "2.100.0", "3.0.0a0"])
def test_torch_that_is_new_enough(build, version):
    build.require_torch(version)


# The extension


@pytest.fixture
def arguments(build, tool, monkeypatch):
    """The arguments of setup() here, with FASTSN_WERROR and FASTSN_CUDA as wanted."""

    def make(**environment: str) -> dict:
        names = ("FASTSN_CUDA", "FASTSN_CUDA_ARCHITECTURES", "FASTSN_WERROR")
        for name in ("CXX", "CUDA_HOME", *names):
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


@pytest.mark.parametrize("with_cuda", [False, True])
def test_every_source_is_compiled(arguments, knowing, with_cuda):
    if with_cuda:
        home = str(Path(knowing(*RECENT)).parents[1])
        (extension,) = arguments(CUDA_HOME=home)["ext_modules"]
    else:
        (extension,) = arguments(FASTSN_CUDA="0")["ext_modules"]
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
    of_cuda = {source for source in sources if source.startswith("csrc/cuda/")}
    assert of_cuda and set(extension.sources) == (sources if with_cuda else sources - of_cuda)
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


@pytest.mark.parametrize(
    "wish, known, said, machine, portable",
    [
        ("", RECENT, "sm_80, sm_90, sm_100, sm_120, PTX of compute_100", "80 90 100 120", "100"),
        ("90", RECENT, "sm_90, PTX of compute_90", "90", "90"),
        ("90a", RECENT, "sm_90a, no PTX", "90a", ""),
        (
            "",
            ("80", "90"),
            "sm_80, sm_90, PTX of compute_90, without sm_100, sm_120, of which this nvcc does not "
            "know",
            "80 90",
            "90",
        ),
    ],
)
def test_build_says_for_what_it_compiles(
    arguments, knowing, capsys, wish, known, said, machine, portable
):
    home = str(Path(knowing(*known)).parents[1])
    (extension,) = arguments(CUDA_HOME=home, FASTSN_CUDA_ARCHITECTURES=wish)["ext_modules"]
    assert f"CUDA kernels: built for {said} (nvcc found" in capsys.readouterr().out
    macros = dict(extension.define_macros)
    assert macros["FASTSN_CUDA_ARCHITECTURES"] == f'"{machine}"'
    assert macros["FASTSN_CUDA_PTX"] == f'"{portable}"'
    assert "FASTSN_CUDA" in macros


def test_extension_without_cuda_knows_it(arguments):
    (extension,) = arguments(FASTSN_CUDA="0", FASTSN_CUDA_ARCHITECTURES="90")["ext_modules"]
    macros = dict(extension.define_macros)
    assert macros["FASTSN_CUDA_ARCHITECTURES"] == macros["FASTSN_CUDA_PTX"] == '""'
    assert "FASTSN_CUDA" not in macros


def test_bad_cuda_wish_ends_the_build(arguments):
    with pytest.raises(SystemExit, match="^fastsn: error: FASTSN_CUDA must be 0, 1 or unset"):
        arguments(FASTSN_CUDA="maybe")
    with pytest.raises(SystemExit, match="^fastsn: error: FASTSN_CUDA_ARCHITECTURES must be like"):
        arguments(FASTSN_CUDA="0", FASTSN_CUDA_ARCHITECTURES="sm_80")


def test_nvcc_that_knows_too_little_ends_the_build(arguments, knowing):
    home = str(Path(knowing("50")).parents[1])
    with pytest.raises(SystemExit, match="^fastsn: error: fastsn needs an nvcc that knows 80 90"):
        arguments(CUDA_HOME=home)


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


def test_old_torch_is_one_clear_line(tool, tmp_path):
    """Whatever else of it cannot be imported."""
    (tmp_path / "torch.py").write_text("__version__ = '2.6.0+cu124'\n")
    environment = {k: v for k, v in os.environ.items() if k != "CXX"}
    environment |= {"PATH": str(tool("c++")), "PYTHONPATH": str(tmp_path)}
    assert fails_with(environment) == (
        f"fastsn: error: torch 2.6.0+cu124 is installed; fastsn needs {oldest_torch()} or newer"
    )
