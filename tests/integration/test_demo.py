"""The demo: a few steps of it, from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the demo needs fastsn[demo]")
pytest.importorskip("rich", reason="the demo needs fastsn[demo]")
pytest.importorskip("sklearn", reason="the demo needs fastsn[demo]")
pytest.importorskip("tqdm", reason="the demo needs fastsn[demo]")

ROOT = Path(__file__).parents[2]
VARIANTS = ["torch SN", "fastsn SN", "fastsn BSN", "fastsn BSSN"]
PICTURES = ["losses.png", "samples.png", "sigmas.png", "times.png"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.demo", "--quick", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        check=True,
        timeout=300,
    )
    return out


@pytest.fixture(scope="module")
def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_pictures(out: Path) -> None:
    for name in PICTURES:
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG"), name
        assert len(content) > 10_000, name


def test_table(out: Path) -> None:
    table = (out / "table.txt").read_text(encoding="utf-8")
    for word in [*VARIANTS, "digits", "D loss", "ms normalizing", "Frechet", "digit score"]:
        assert word in table


def test_results_of_every_variant(results: dict) -> None:
    assert list(results["variants"]) == VARIANTS
    for row in results["variants"].values():
        assert row["ms normalizing"] > 0
        assert row["ms per step"] > 0
        assert row["Frechet"] > 0
        assert 1 <= row["digit score"] <= 10


def test_same_numbers_as_torch(results: dict) -> None:
    """Losses are about 2 log 2 = 1.4; three steps leave their differences at a few roundings."""
    assert results["largest difference"]["torch SN, fastsn SN"] < 1e-5
    assert results["largest difference"]["the same in fp64"] < 1e-13


def test_other_variants_do_something_else(results: dict) -> None:
    """The check above could see a wrong normalization: this is how far another one is away."""
    losses = [row["D loss"] for row in results["variants"].values()]
    assert abs(losses[1] - losses[2]) > 1e-3
    assert abs(losses[1] - losses[3]) > 1e-3
