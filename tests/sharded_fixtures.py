"""Fixtures for tests that need several processes.

A test file takes them by name, as in ``ranks = sharded_fixtures.ranks``.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

import pytest
import torch.distributed as dist
from sharded_ranks import start


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Starts that many ranks, once for all tests of a file."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.fail("torch.distributed with gloo is needed")
    with ExitStack() as stack:
        yield cache(
            lambda count: stack.enter_context(start(count, tmp_path_factory.mktemp("ranks")))
        )


@pytest.fixture(params=[2, 3])
def ranks(request, started):
    return started(request.param)


@pytest.fixture
def two(started):
    return started(2)
