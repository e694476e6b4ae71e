"""Builds fastsn._C against the torch that is installed. Everything declarative is in
pyproject.toml.

FASTSN_CUDA=0 leaves the CUDA kernels out, FASTSN_CUDA=1 insists on them; unset, they are built
where nvcc is found, whatever torch is installed. FASTSN_CUDA_ARCHITECTURES="80 90" compiles for
these compute capabilities only. FASTSN_WERROR=1 makes C++ warnings errors.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import setup

ROOT = Path(__file__).resolve().parent
#: Object files of the CUDA kernels, and what the assembler reported of each.
CUDA_OBJECTS = ROOT / "build" / "cuda"
#: Machine code for these serves their major version from there on: 8.6 and 8.9, 10.3, 12.1. What is
#: between (11.0) and what comes later is served by PTX, see `portable_architecture`. Jetsons before
#: 11.0 run only what is compiled for just them (FASTSN_CUDA_ARCHITECTURES=87).
CUDA_ARCHITECTURES = ("80", "90", "100", "120")


class CudaDecision(NamedTuple):
    """Whether CUDA kernels are built, and the reason in words."""

    build: bool
    reason: str


def find_nvcc() -> str | None:
    """The path of nvcc: under CUDA_HOME, or else on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc")


def decide_cuda(wish: str | None, nvcc: str | None) -> CudaDecision:
    """What to do for FASTSN_CUDA=`wish` and nvcc at `nvcc`.

    Raises:
        ValueError: `wish` is none of None, "", "0", "1", or it is "1" and cannot be fulfilled.
    """
    if wish not in (None, "", "0", "1"):
        raise ValueError(f"FASTSN_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return CudaDecision(False, "FASTSN_CUDA=0")
    if nvcc is not None:
        return CudaDecision(True, f"nvcc found at {nvcc}")
    reason = "nvcc was found neither under CUDA_HOME nor on PATH"
    if wish == "1":
        raise ValueError(f"FASTSN_CUDA=1 asks for CUDA kernels, but {reason}")
    return CudaDecision(False, reason)


def cuda_architectures(wish: str | None, nvcc: str | None) -> tuple[str, ...]:
    """The compute capabilities to compile for, from FASTSN_CUDA_ARCHITECTURES=`wish`.

    Without a wish, the usual ones that `nvcc` knows; without an nvcc, nothing is compiled.

    Raises:
        ValueError: `wish` has something other than numbers such as 80 or 90a in it, or `nvcc` knows
            not all of them, or none of the usual ones.
    """
    wanted = tuple((wish or "").replace(",", " ").split())
    if not all(re.fullmatch(r"[0-9]+[af]?", one) for one in wanted):
        raise ValueError(f"FASTSN_CUDA_ARCHITECTURES must be like '80 90', got {wish!r}")
    if nvcc is None:
        return ()
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    known = re.findall(r"sm_(\d+)", done.stdout)
    usable = tuple(one for one in wanted or CUDA_ARCHITECTURES if one.rstrip("af") in known)
    if not usable or (wanted and usable != wanted):
        asked = f"FASTSN_CUDA_ARCHITECTURES={wish!r}" if wanted else "fastsn"
        raise ValueError(
            f"{asked} needs an nvcc that knows {' '.join(wanted or CUDA_ARCHITECTURES)}, "
            f"got {nvcc}, which knows {' '.join(known) or 'none'}"
        )
    return usable


def portable_architecture(architectures: tuple[str, ...]) -> str | None:
    """That whose PTX is kept, for a driver to compile where there is no machine code.

    PTX serves its own compute capability and all later ones. The newest is the best that leaves out
    nothing, so where a version between two is not compiled for, it is the newest before this gap:
    of 80, 90, 100, 120 it is 100, for 11.0, and as good as 120 for 13.0. That of 90 and later also
    waits for the kernel before it, which programmatic dependent launch relies on.
    """
    # 90a and 100f are for their own kind alone.
    plain = sorted(int(one) for one in architectures if one.isdecimal())
    for one, after in itertools.pairwise(plain):
        if after // 10 != one // 10 and after != (one // 10 + 1) * 10:
            return str(one)
    return str(plain[-1]) if plain else None


def nvcc_command(nvcc: str, architectures: tuple[str, ...]) -> list[str]:
    """How a file of kernels is compiled; what to do with it comes after."""
    command = [nvcc, "-std=c++17", "-O3", "--threads", "0", "-Xptxas", "-v"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    for one in architectures:
        command.append(f"-gencode=arch=compute_{one},code=sm_{one}")
    if portable := portable_architecture(architectures):
        command.append(f"-gencode=arch=compute_{portable},code=compute_{portable}")
    if os.environ.get("FASTSN_WERROR") == "1":
        command += ["-Werror", "all-warnings"]
    return command


def compile_cuda(command: list[str]) -> list[str]:
    """The object files of csrc/cuda/*.cu, compiled where they are not up to date."""

    def compile_one(source: Path) -> str:
        result, report = (CUDA_OBJECTS / f"{source.stem}{end}" for end in (".o", ".ptxas"))
        words = [*command, "-c", str(source.relative_to(ROOT)), "-o", str(result)]
        newest = max(path.stat().st_mtime for path in source.parent.iterdir())
        if result.exists() and report.exists() and result.stat().st_mtime > newest:
            if report.read_text().startswith(" ".join(words)):
                return str(result)
        print(" ".join(words), flush=True)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stdout + done.stderr, file=sys.stderr)
            fail(f"nvcc could not compile {source.name}; FASTSN_CUDA=0 builds without CUDA kernels")
        report.write_text(" ".join(words) + "\n" + done.stdout + done.stderr)
        return str(result)

    CUDA_OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_one, sorted((ROOT / "csrc" / "cuda").glob("*.cu"))))


def cuda_runtime(nvcc: str) -> str:
    """The static runtime library that belongs to this nvcc: nothing of CUDA is needed to import."""
    home = Path(nvcc).resolve().parents[1]
    for found in sorted(home.glob("**/libcudart_static.a")):
        return str(found)
    fail(f"no libcudart_static.a was found under {home}; FASTSN_CUDA=0 builds without CUDA kernels")


def fail(message: str) -> NoReturn:
    """Ends the build with one clear line."""
    sys.exit(f"fastsn: error: {message}")


def require_compiler() -> str:
    """The C++ compiler: CXX if set, or else the first usual name on PATH."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    fail(
        f"the C++ compiler {wanted!r} that CXX names was not found"
        if wanted
        else "no C++ compiler was found (looked for c++, g++ and clang++); install GCC or Clang, "
        "or name one in the environment variable CXX"
    )


def require_torch(version: str) -> None:
    """Ends the build where this version is older than what pyproject.toml asks for."""
    project = (ROOT / "pyproject.toml").read_text()
    (oldest,) = re.findall(r'^dependencies = \["torch>=([\d.]+)"\]$', project, re.MULTILINE)
    if [int(n) for n in re.findall(r"\d+", version)[:2]] < [int(n) for n in oldest.split(".")]:
        fail(f"torch {version} is installed; fastsn needs {oldest} or newer")


def extension_arguments() -> dict:
    """The arguments of setup() that describe the compiled part."""
    compiler = require_compiler()
    try:
        import torch

        require_torch(torch.__version__)
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError as error:
        fail(
            f"torch could not be imported ({error}); install the torch that you use first, then "
            "fastsn with `pip install --no-build-isolation .`"
        )

    nvcc = find_nvcc()
    try:
        cuda = decide_cuda(os.environ.get("FASTSN_CUDA"), nvcc)
        wish = os.environ.get("FASTSN_CUDA_ARCHITECTURES")
        architectures = cuda_architectures(wish, nvcc if cuda.build else None)
    except ValueError as error:
        fail(str(error))
    portable = portable_architecture(architectures)
    built = "not built"
    if cuda.build:
        built = "built for " + ", ".join(f"sm_{one}" for one in architectures)
        built += f", PTX of compute_{portable}" if portable else ", no PTX"
        unknown = [f"sm_{one}" for one in CUDA_ARCHITECTURES if one not in architectures]
        if unknown and not (wish and wish.strip()):
            built += f", without {', '.join(unknown)}, of which this nvcc does not know"
    print(f"fastsn: CPU kernels: built with {compiler} against torch {torch.__version__}")
    print(f"fastsn: CUDA kernels: {built} ({cuda.reason})", flush=True)

    # As system headers, torch's are exempt from our warnings.
    flags = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-Wno-psabi", *(f"-isystem{path}" for path in include_paths())]
    if os.environ.get("FASTSN_WERROR") == "1":
        flags.append("-Werror")
    sources = [
        str(path.relative_to(ROOT))
        for path in sorted(ROOT.glob("csrc/**/*.cpp"))
        if cuda.build or path.parent.name != "cuda"
    ]
    extension = CppExtension(
        "fastsn._C",
        sources,
        depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*") if p.is_file()),
        define_macros=[
            ("FASTSN_TORCH_VERSION", f'"{torch.__version__}"'),
            ("FASTSN_CUDA_REASON", f'"{cuda.reason}"'),
            ("FASTSN_CUDA_ARCHITECTURES", f'"{" ".join(architectures)}"'),
            ("FASTSN_CUDA_PTX", f'"{portable or ""}"'),
            *([("FASTSN_CUDA", None)] if cuda.build else []),
        ],
        extra_compile_args={"cxx": flags},
        extra_link_args=["-fopenmp"],
    )

    class Build(BuildExtension):
        """torch's build; the kernels' objects are linked in, and CUDA's runtime, hidden."""

        def build_extensions(self) -> None:
            if cuda.build and nvcc:
                runtime = cuda_runtime(nvcc)
                extension.extra_objects += compile_cuda(nvcc_command(nvcc, architectures))
                extension.extra_objects.append(runtime)
                extension.extra_link_args += ["-ldl", "-lrt", "-lpthread"]
                extension.extra_link_args.append(f"-Wl,--exclude-libs,{Path(runtime).name}")
            super().build_extensions()

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
    }


if __name__ == "__main__":
    setup(**extension_arguments())
