"""``python -m fastsn info``: versions, what was built, and which back-ends can run here."""

from __future__ import annotations

import argparse
import platform

import torch

import fastsn
from fastsn import backends
from fastsn.ops import _C


def info() -> str:
    """The report, one fact a line."""
    architectures = ", ".join(f"sm_{one}" for one in _C.cuda_architectures.split()) or "no GPU"
    lines = [
        f"fastsn {fastsn.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__} (extension built against {_C.torch_version})",
        f"compiler: {_C.compiler}; CPU kernels for {_C.cpu_capability()}; "
        f"CUDA kernels for {architectures}",
        f"threads: {torch.get_num_threads()}",
        f"back-end in use: {backends.current_backend()}",
    ]
    for name in backends.NAMES:
        reason = backends.why_not(name)
        lines.append(f"  {name:<10} " + ("can run" if reason is None else f"cannot run: {reason}"))
    return "\n".join(lines)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastsn", description=__doc__)
    parser.add_argument("command", choices=["info"], help="what to print")
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
