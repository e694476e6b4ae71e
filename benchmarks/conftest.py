"""Options of the benchmarks, and what their JSON says about the machine."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import fastsn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="small networks, one thread, three rounds: proves that the benchmarks run",
    )


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("quick")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add the versions that matter, and take the name of the machine out: results are published."""
    machine_info.pop("node", None)
    machine_info["cores"] = os.cpu_count()
    machine_info["torch"] = torch.__version__
    machine_info["fastsn"] = fastsn.__version__
