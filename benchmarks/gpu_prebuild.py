"""The extension, built on one machine and carried to another.

``python -m benchmarks.gpu_prebuild make --python PYTHON`` compiles it for the Python and the torch
of that interpreter, which need not have a GPU: those of the other machine. For Python 3.12 and
torch 2.11, say:

    python3.12 -m venv build/target
    build/target/bin/pip install torch==2.11.0 setuptools ninja pybind11
    python -m benchmarks.gpu_prebuild make --python build/target/bin/python

``build/prebuilt/`` then holds the stripped extension and a manifest, and is all that has to be
carried besides the tree. There ``python -m benchmarks.gpu_session --prebuilt`` takes it from there,
unless the manifest says that it does not fit: sources have changed, or Python, torch or the GPU are
others. ``check`` goes through all that with the extension that is installed here, compiling
nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from benchmarks.gpu_runner import ROOT, digest
from benchmarks.gpu_tools import output_of

PREBUILT = ROOT / "build" / "prebuilt"
#: The sources are compiled from a copy, so that objects of other builds stay as they are.
COPY = ROOT / "build" / "prebuild"
#: What the extension is made of.
SOURCES = ("csrc", "setup.py")
MANIFEST = "manifest.json"
ASK = (
    "import json, sysconfig, platform, torch; print(json.dumps("
    "[sysconfig.get_config_var('EXT_SUFFIX'), platform.python_version(), torch.__version__]))"
)


class DoesNotFit(Exception):
    """Why the carried extension cannot be used here, in one line."""


@dataclass(frozen=True)
class Manifest:
    """What was built: ``file`` is named for the Python that it is for."""

    file: str
    sources: str
    python: str
    torch: str
    architectures: str
    platform: str

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / MANIFEST
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DoesNotFit(f"{path} cannot be read: {error}") from error

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def require_fit(self, torch_version: str, capability: str | None) -> None:
        """Raise DoesNotFit unless it is for the sources, the Python, the torch and the GPU here;
        ``capability`` is that of the GPU, such as "90", None if there is none."""
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        sources = digest(*SOURCES)
        if self.sources != sources:
            raise DoesNotFit(
                f"built from other sources: {self.sources}, those here are {sources}; "
                "run `python -m benchmarks.gpu_prebuild make` again"
            )
        if not self.file.endswith(suffix) or self.platform != platform.machine():
            raise DoesNotFit(
                f"built for {self.file}, {self.platform}; here is {suffix}, {platform.machine()}"
            )
        if release(self.torch) != release(torch_version):
            raise DoesNotFit(f"built against torch {self.torch}, here is torch {torch_version}")
        if capability is not None and capability not in self.architectures.split():
            raise DoesNotFit(f"built for sm_{self.architectures}, the GPU here is sm_{capability}")


def release(version: str) -> str:
    """``2.11`` of ``2.11.0+cu130``: what an extension depends on."""
    return ".".join(version.split(".")[:2])


def capability_here() -> str | None:
    text = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = re.match(r"(\d+)\.(\d)", text)
    return found[1] + found[2] if found else None


def pack(extension: Path, folder: Path, python: str, torch: str, architectures: str) -> Manifest:
    """Put a stripped copy of the extension and its manifest into the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target = folder / extension.name
    subprocess.run(["strip", "--strip-unneeded", "-o", str(target), str(extension)], check=True)
    manifest = Manifest(
        extension.name, digest(*SOURCES), python, torch, architectures, platform.machine()
    )
    manifest.write(folder)
    return manifest


def load(path: Path) -> ModuleType:
    """Import the extension from there: what it needs of torch must be in this torch."""
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise DoesNotFit(f"{path.name} cannot be loaded: {error}") from error
    return module


def install(folder: Path, package: Path, capability: str | None) -> str:
    """Check the carried extension, load it, and put it into the package.

    Returns:
        In words, what it is.

    Raises:
        DoesNotFit: it cannot be used here, and the package is as it was.
    """
    import torch

    manifest = Manifest.read(folder)
    manifest.require_fit(torch.__version__, capability)
    module = load(folder / manifest.file)
    # Whole at any moment, and another file than one that a process may have open.
    new = package / f".{manifest.file}.new"
    shutil.copyfile(folder / manifest.file, new)
    os.replace(new, package / manifest.file)
    return (
        f"{manifest.file} for sm_{manifest.architectures or 'none'}, built against torch "
        f"{module.torch_version}, loads with torch {torch.__version__}"
    )


def make(python: str, architectures: str, folder: Path) -> str:
    """Compile for the interpreter ``python``, and pack; return, in words, what was made."""
    # Not resolved: the link is what makes it the interpreter of its environment.
    python = os.path.abspath(shutil.which(python) or python)
    asked = subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=True)
    suffix, version, torch = json.loads(asked.stdout)
    for name in ("csrc", "fastsn"):
        # Gone are those that are gone here; copies keep their times, by which objects are kept.
        shutil.rmtree(COPY / name, ignore_errors=True)
        shutil.copytree(ROOT / name, COPY / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, COPY / name)
    environment = {"FASTSN_CUDA": "1", "FASTSN_CUDA_ARCHITECTURES": architectures}
    subprocess.run(
        [python, "setup.py", "build_ext", "--inplace", "--force"],
        cwd=COPY,
        env={**os.environ, **environment},
        check=True,
    )
    manifest = pack(COPY / "fastsn" / f"_C{suffix}", folder, version, torch, architectures)
    size = (folder / manifest.file).stat().st_size / 2**20
    return (
        f"{folder / manifest.file}: {size:.1f} MiB, for Python {version}, torch {torch}, "
        f"sm_{architectures.replace(' ', ', sm_')}"
    )


def check() -> str:
    """Pack, refuse, install and load the extension that is installed here, all in other folders."""
    import torch

    (extension,) = (ROOT / "fastsn").glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    with tempfile.TemporaryDirectory() as name:
        folder, package = Path(name, "prebuilt"), Path(name, "package")
        package.mkdir()
        manifest = pack(extension, folder, platform.python_version(), torch.__version__, "")
        Manifest(**{**asdict(manifest), "sources": "others"}).write(folder)
        try:
            install(folder, package, None)
        except DoesNotFit as error:
            print(f"refused, as it should be: {error}")
        else:
            raise SystemExit("a stale extension was not refused")
        manifest.write(folder)
        return install(folder, package, None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_prebuild",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["make", "install", "check"])
    parser.add_argument("--python", default=sys.executable, help="the interpreter to build for")
    parser.add_argument("--architectures", default="90", help="such as '90 100'")
    parser.add_argument("--folder", type=Path, default=PREBUILT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.command == "make":
            print(make(options.python, options.architectures, options.folder))
        elif options.command == "install":
            print(install(options.folder, ROOT / "fastsn", capability_here()))
        else:
            print(check())
    except (DoesNotFit, subprocess.CalledProcessError) as error:
        print(f"the carried extension is not used: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
