"""The extension that is carried to another machine: what fits, what is refused, how it is made."""

from __future__ import annotations

import json
import platform
import sysconfig
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import fastsn
from benchmarks import gpu_prebuild
from benchmarks.gpu_prebuild import DoesNotFit, Manifest, install
from benchmarks.gpu_runner import digest

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
(EXTENSION,) = Path(fastsn.__file__).parent.glob(f"_C{SUFFIX}")


@pytest.fixture
def fitting() -> Manifest:
    return Manifest(
        f"_C{SUFFIX}", digest("csrc", "setup.py"), "3.12.1", torch.__version__, "90",
        platform.machine(),
    )  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Holds an extension of before."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / f"_C{SUFFIX}").write_text("before")
    return folder


def test_what_fits_is_taken(fitting: Manifest) -> None:
    fitting.require_fit(torch.__version__, "90")
    fitting.require_fit(torch.__version__, None)
    replace(fitting, architectures="80 90", torch="2.11.0+cu130").require_fit("2.11.1", "90")


@pytest.mark.parametrize(
    "other, line",
    [
        ({"sources": "0123"}, "built from other sources: 0123, those here are .*gpu_prebuild make"),
        ({"file": "_C.cpython-27-x86_64.so"}, "built for _C.cpython-27-x86_64.so, .*; here is "),
        ({"platform": "sparc"}, "built for .*, sparc; here is "),
        ({"torch": "1.13.1"}, "built against torch 1.13.1, here is torch "),
        ({"architectures": "80 100"}, "built for sm_80 100, the GPU here is sm_90"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_in_one_line(
    fitting: Manifest, other: dict[str, str], line: str, package: Path, tmp_path: Path
) -> None:
    manifest = replace(fitting, **other)
    with pytest.raises(DoesNotFit, match=line) as caught:
        manifest.require_fit(torch.__version__, "90")
    assert "\n" not in str(caught.value)
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    manifest.write(folder)
    with pytest.raises(DoesNotFit, match=line):
        install(folder, package, "90")
    assert (package / f"_C{SUFFIX}").read_text() == "before"


def test_a_changed_source_makes_it_stale(
    fitting: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "csrc"
    changed.mkdir()
    (changed / "ops.cpp").write_text("changed")
    monkeypatch.setattr("benchmarks.gpu_runner.ROOT", tmp_path)
    with pytest.raises(DoesNotFit, match="built from other sources"):
        fitting.require_fit(torch.__version__, None)


@pytest.mark.parametrize("text", [None, "{", '{"file": "x"}'], ids=["none", "torn", "incomplete"])
def test_a_manifest_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    assert gpu_prebuild.main(["install", "--folder", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the carried extension is not used: ") and "cannot be read" in line


def test_what_cannot_be_loaded_is_not_installed(
    fitting: Manifest, package: Path, tmp_path: Path
) -> None:
    fitting.write(tmp_path)
    (tmp_path / fitting.file).write_text("no library")
    with pytest.raises(DoesNotFit, match=f"{fitting.file} cannot be loaded: "):
        install(tmp_path, package, None)
    assert (package / f"_C{SUFFIX}").read_text() == "before"


#: In the place of a Python of another machine: it answers, and "builds".
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then
    echo '[".cpython-399-other.so", "3.99.1", "2.11.0+cu130"]'
else
    echo "$PWD $FASTSN_CUDA $FASTSN_CUDA_ARCHITECTURES $*" > {asked}
    cp {extension} fastsn/_C.cpython-399-other.so
fi
"""


def test_what_is_made_is_small_and_says_what_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, asked, copy = tmp_path / "python3.99", tmp_path / "asked", tmp_path / "copy"
    python.write_text(PYTHON.format(asked=asked, extension=EXTENSION))
    python.chmod(0o755)
    copy.mkdir()
    (copy / "csrc").mkdir()
    (copy / "csrc" / "gone.cpp").touch()
    monkeypatch.setattr(gpu_prebuild, "COPY", copy)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "prebuilt"
    said = gpu_prebuild.make("./python3.99", "90 100", folder)
    assert "for Python 3.99.1, torch 2.11.0+cu130, sm_90, sm_100" in said
    assert asked.read_text() == f"{copy} 1 90 100 setup.py build_ext --inplace --force\n"
    assert not (copy / "csrc" / "gone.cpp").exists()
    manifest = Manifest.read(folder)
    assert asdict(manifest) == json.loads((folder / "manifest.json").read_text())
    assert manifest.file == "_C.cpython-399-other.so" and manifest.sources == digest(
        "csrc", "setup.py"
    )
    size = (folder / manifest.file).stat().st_size
    assert 1e5 < size < 32 * 2**20 and size <= EXTENSION.stat().st_size
