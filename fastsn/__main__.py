"""``python -m fastsn info``: versions, what was built, and which back-ends can run here."""

from __future__ import annotations

import argparse
import platform

import torch

import fastsn
from fastsn import backends, cuda
from fastsn.ops import _C


def info() -> str:
    """The report, one fact a line; asks the GPUs, which starts CUDA."""
    if torch.cuda.is_available():
        torch.cuda.init()
    compiled = [f"sm_{one}" for one in _C.cuda_architectures.split()]
    compiled += [f"PTX of compute_{one}" for one in _C.cuda_ptx.split()]
    lines = [
        f"fastsn {fastsn.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__} (extension built against {_C.torch_version})",
        f"compiler: {_C.compiler}; CPU kernels for {_C.cpu_capability()}; "
        f"CUDA kernels for {', '.join(compiled) or 'no GPU'}",
        f"threads: {torch.get_num_threads()}",
        f"back-end in use: {backends.current_backend()}",
    ]
    for name in backends.NAMES:
        reason = backends.why_not(name)
        lines.append(f"  {name:<10} " + ("can run" if reason is None else f"cannot run: {reason}"))
        if name == "cuda" and reason is None:
            lines += [f"    but not on cuda:{i}: {why}" for i, why in cuda.refusals().items()]
    return "\n".join(lines)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastsn", description=__doc__)
    parser.add_argument("command", choices=["info"], help="what to print")
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
