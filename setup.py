"""Builds fastsn._C against the torch that is installed. Everything declarative is in
pyproject.toml.

FASTSN_CUDA=0 leaves the CUDA kernels out, FASTSN_CUDA=1 insists on them; unset, they are built
where nvcc is found, whatever torch is installed. FASTSN_CUDA_ARCHITECTURES="80 90" compiles for
these compute capabilities only. FASTSN_WERROR=1 makes C++ warnings errors.
"""

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
#: Machine code for these; PTX of the first serves every later one.
CUDA_ARCHITECTURES = ("80", "90", "100")


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


def cuda_architectures(wish: str | None) -> tuple[str, ...]:
    """The compute capabilities to compile for, from FASTSN_CUDA_ARCHITECTURES=`wish`.

    Raises:
        ValueError: `wish` has something other than numbers such as 80 or 90a in it.
    """
    wanted = tuple((wish or "").replace(",", " ").split())
    if not all(re.fullmatch(r"[0-9]+[af]?", one) for one in wanted):
        raise ValueError(f"FASTSN_CUDA_ARCHITECTURES must be like '80 90', got {wish!r}")
    return wanted or CUDA_ARCHITECTURES


def nvcc_command(nvcc: str, architectures: tuple[str, ...]) -> list[str]:
    """How a file of kernels is compiled; what to do with it comes after."""
    command = [nvcc, "-std=c++17", "-O3", "--threads", "0", "-Xptxas", "-v"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    for one in architectures:
        command.append(f"-gencode=arch=compute_{one},code=sm_{one}")
    first = architectures[0]
    command.append(f"-gencode=arch=compute_{first},code=compute_{first}")
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


def extension_arguments() -> dict:
    """The arguments of setup() that describe the compiled part."""
    compiler = require_compiler()
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError as error:
        fail(
            f"torch could not be imported ({error}); install the torch that you use first, then "
            "fastsn with `pip install --no-build-isolation .`"
        )

    nvcc = find_nvcc()
    try:
        cuda = decide_cuda(os.environ.get("FASTSN_CUDA"), nvcc)
        architectures = cuda_architectures(os.environ.get("FASTSN_CUDA_ARCHITECTURES"))
    except ValueError as error:
        fail(str(error))
    built = f"built for sm_{', sm_'.join(architectures)}" if cuda.build else "not built"
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
            ("FASTSN_CUDA_ARCHITECTURES", f'"{" ".join(architectures) if cuda.build else ""}"'),
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
