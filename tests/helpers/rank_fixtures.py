"""Fixtures for tests that need several processes.

A test file takes them by name, as in ``ranks = rank_fixtures.ranks``.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

import pytest
import torch.distributed as dist

from helpers.rank_processes import start


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Starts that many ranks, once for all tests of a file."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.fail("torch.distributed with gloo is needed")
    with ExitStack() as stack:

        @cache
        def started_once(count):
            folder = tmp_path_factory.mktemp("ranks")
            return stack.enter_context(start(count, folder, timeout=120))

        yield started_once


@pytest.fixture(params=[2, 3])
def ranks(request, started):
    return started(request.param)


@pytest.fixture
def two(started):
    return started(2)
