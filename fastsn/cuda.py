"""Whether the compiled CUDA kernels can run: with this driver, and on which GPUs.

The extension has machine code for some compute capabilities, and portable code (PTX) that a driver
compiles for others. Nothing is asked of a GPU before torch starts CUDA, which forbids forks.
"""

from __future__ import annotations

import torch

from fastsn.ops import _C

# Of each GPU, by index: why the kernels cannot run there, or None. Empty until torch starts CUDA.
_refusals: dict[int, str | None] = {}
# Part of a chip for embedded systems: only what was compiled for exactly these runs there.
_INTEGRATED = ((5, 3), (6, 2), (7, 2), (8, 7), (10, 1))


def why_not() -> str | None:
    """Why the kernels can run on no GPU of this process, or None if they can on some."""
    if not _refusals:
        return _missing() or _driver_too_old()
    if None in _refusals.values():
        return None
    return "; ".join(dict.fromkeys(refusals().values()))


def why_not_on(device: torch.device) -> str | None:
    """Why the kernels cannot run on this GPU, or None if they can."""
    if device.index in _refusals:
        return _refusals[device.index]
    # Before torch starts CUDA there are no real tensors, only a compiler's.
    return _missing()


def are_mixed() -> bool:
    """Whether some GPUs of this process can run the kernels and others cannot."""
    return len(set(map(bool, _refusals.values()))) == 2


def refusals() -> dict[int, str]:
    """Why the kernels cannot run, by the index of each GPU where they cannot."""
    return {index: reason for index, reason in _refusals.items() if reason}


def ask() -> None:
    """Asks about every GPU; once torch has started CUDA."""
    for index in range(torch.cuda.device_count()):
        _refusals[index] = _missing() or _unfit(torch.cuda.get_device_capability(index))


def _missing() -> str | None:
    if not _C.cuda_architectures:
        return f"CUDA kernels were not built: {_C.cuda_reason}"
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is for AMD GPUs"
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver_too_old() -> str | None:
    driver, runtime = _C.cuda_versions()
    oldest = runtime - runtime % 1000  # drivers of the same major version suffice
    if driver >= oldest:
        return None
    found = _version(driver) if driver else "none"
    return f"CUDA kernels need a driver for CUDA {_version(oldest)} (found: {found})"


def _unfit(capability: tuple[int, int]) -> str | None:
    if reason := _driver_too_old():
        return reason
    compiled = _C.cuda_architectures.split()
    if any(_has_machine_code(one, capability) for one in compiled):
        return None
    built = f"built for {', '.join(f'sm_{one}' for one in compiled)}"
    own = f"this GPU's sm_{capability[0]}{capability[1]}"
    if not _C.cuda_ptx or divmod(int(_C.cuda_ptx), 10) > capability:
        return f"{built}, not for {own}"
    # Unlike machine code, PTX is read by drivers as new as what wrote it.
    driver, runtime = _C.cuda_versions()
    if driver < runtime:
        return (
            f"{built}; to compile PTX for {own} takes a driver for CUDA {_version(runtime)} "
            f"(found: {_version(driver)})"
        )
    return None


def _has_machine_code(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether that for this architecture, such as "90", "90a" or "100f", runs on this GPU."""
    major, minor = divmod(int(architecture.rstrip("af")), 10)
    if architecture.endswith("a") or capability in _INTEGRATED:
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]
