"""Fixtures of all tests."""

import sys

import pytest
import torch

pytest.register_assert_rewrite("helpers")

from helpers import sweeps  # noqa: E402  (its assertions are rewritten)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """After the selection by names."""
    own = sweeps.share(items)
    kept = set(own)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = own


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors on a busy machine wait longest for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_compiler_remembers():
    """The compiler counts how often it has compiled a function, whoever's tests asked for it."""
    yield
    used = sys.modules.get("torch._dynamo.utils")
    if used is not None and used.counters:
        torch._dynamo.reset()
        used.counters.clear()


@pytest.fixture
def double():
    """float64 as the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def poisoned_memory():
    """Fresh memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
