"""What the GPU session needs to know without torch, which takes seconds to import: programs of the
CUDA toolkit, names of kernels, the commit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path


def find_tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit, which is not always on PATH."""
    places = [os.environ.get("PATH", "")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        places += [str(Path(home) / "bin"), str(Path(home) / "compute-sanitizer")]
    places += map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True))
    return shutil.which(name, path=os.pathsep.join(places))


def output_of(name: str, *arguments: str) -> str:
    """What a program prints; nothing if there is no such program or it fails."""
    path = find_tool(name)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def short(name: str) -> str:
    """``multiply`` of ``void fastsn::cuda::multiply_kernel<float, 3840>(...)``."""
    found = re.search(r"(\w+?)(?:_kernel)?(?:<|\(|$)", name)
    return found[1] if found else name


def commit() -> tuple[str, str]:
    """The commit (FASTSN_COMMIT, else git's, else "unknown") and whether the tree differs from it.

    FASTSN_COMMIT speaks for a copy of the tree that has no repository; "-dirty" at its end says
    that the copy differs from the commit.
    """
    named = os.environ.get("FASTSN_COMMIT", "")
    if named:
        return named.removesuffix("-dirty"), str(named.endswith("-dirty")).lower()
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        # Results are made from the tree, and are no part of what is measured.
        what = ["status", "--porcelain", "--", ".", ":!benchmarks/results"]
        status = subprocess.run([*git, *what], capture_output=True, text=True)
    except OSError:
        return "unknown", "unknown"
    if head.returncode or status.returncode:
        return "unknown", "unknown"
    return head.stdout.strip()[:12], str(bool(status.stdout.strip())).lower()
