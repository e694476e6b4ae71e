"""Builds fastsn._C against the torch that is installed. Everything declarative is in
pyproject.toml.

FASTSN_CUDA=0 leaves the CUDA kernels out, FASTSN_CUDA=1 insists on them; unset, they are built
where there are any and nvcc is found, whatever torch is installed. FASTSN_WERROR=1 makes C++
warnings errors.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import setup

ROOT = Path(__file__).resolve().parent


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


def decide_cuda(wish: str | None, nvcc: str | None, has_kernels: bool) -> CudaDecision:
    """What to do for FASTSN_CUDA=`wish`, nvcc at `nvcc`, and CUDA sources present or not.

    Raises:
        ValueError: `wish` is none of None, "", "0", "1", or it is "1" and cannot be fulfilled.
    """
    if wish not in (None, "", "0", "1"):
        raise ValueError(f"FASTSN_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return CudaDecision(False, "FASTSN_CUDA=0")
    if not has_kernels:
        decision = CudaDecision(False, "this version of fastsn has no CUDA kernels")
    elif nvcc is None:
        decision = CudaDecision(False, "nvcc was found neither under CUDA_HOME nor on PATH")
    else:
        return CudaDecision(True, f"nvcc found at {nvcc}")
    if wish == "1":
        raise ValueError(f"FASTSN_CUDA=1 asks for CUDA kernels, but {decision.reason}")
    return decision


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

    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
    try:
        cuda = decide_cuda(os.environ.get("FASTSN_CUDA"), find_nvcc(), bool(cuda_sources))
    except ValueError as error:
        fail(str(error))
    built = "built" if cuda.build else "not built"
    print(f"fastsn: CPU kernels: built with {compiler} against torch {torch.__version__}")
    print(f"fastsn: CUDA kernels: {built} ({cuda.reason})", flush=True)

    # As system headers, torch's are exempt from our warnings.
    flags = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-Wno-psabi", *(f"-isystem{path}" for path in include_paths())]
    if os.environ.get("FASTSN_WERROR") == "1":
        flags.append("-Werror")
    extension = CppExtension(
        "fastsn._C",
        sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp")),
        depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")),
        define_macros=[
            ("FASTSN_TORCH_VERSION", f'"{torch.__version__}"'),
            ("FASTSN_CUDA_REASON", f'"{cuda.reason}"'),
        ],
        extra_compile_args={"cxx": flags},
        extra_link_args=["-fopenmp"],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
    }


if __name__ == "__main__":
    setup(**extension_arguments())
