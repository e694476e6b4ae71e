"""What calls of the Triton kernels keep on a device, with stand-ins for streams and events."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

from fastsn.triton.cache import Cache, apart

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Event:
    def __init__(self):
        self.has_happened = False

    def query(self):
        return self.has_happened


class Stream:
    """Which events work on it waits for, and which ones were recorded on it."""

    def __init__(self):
        self.waited, self.recorded = [], []

    def record_event(self):
        self.recorded.append(Event())
        return self.recorded[-1]

    def wait_event(self, event):
        self.waited.append(event)


class Table:
    """In place of a tensor: the streams that its memory must outlive."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


class Device:
    stream = Stream()
    is_capturing = False


@pytest.fixture
def gpu(monkeypatch):
    state = Device()
    state.stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.is_capturing)
    return state


def add(cache: Cache, key, device=GPU, is_written=True) -> Table:
    table = Table()
    cache.add(key, device, table, [table], is_written=is_written)
    return table


def test_keeps_those_used_last():
    cache: Cache = Cache(3)
    tables = [add(cache, key, CPU) for key in range(3)]
    assert cache.get(0, CPU) is tables[0]
    for key in range(3, 5):
        add(cache, key, CPU)
    assert cache.get(0, CPU) is tables[0]
    assert cache.get(1, CPU) is None and cache.get(2, CPU) is None
    for key in range(5, 100):
        add(cache, key, CPU)
        assert len(cache) == 3
    assert cache.get(0, CPU) is None


def test_keeps_what_a_graph_has_captured(gpu):
    cache: Cache = Cache(3)
    captured, other = add(cache, "captured"), add(cache, "other")
    gpu.is_capturing = True
    assert cache.get("captured", GPU) is captured
    gpu.is_capturing = False
    for key in range(100):
        add(cache, key)
    assert len(cache) == 4
    assert cache.get("other", GPU) is None and other is not None
    assert cache.get("captured", GPU) is captured
    gpu.is_capturing = True
    assert cache.get("captured", GPU) is captured


def test_a_graph_captures_nothing_that_may_not_be_written_yet(gpu):
    cache: Cache = Cache(3)
    table = add(cache, "table", is_written=False)
    gpu.is_capturing = True
    assert cache.get("table", GPU) is None
    gpu.is_capturing = False
    assert cache.get("table", GPU) is table  # in the order of the stream
    gpu.is_capturing = True
    assert cache.get("table", GPU) is None
    gpu.stream.recorded[0].has_happened = True
    assert cache.get("table", GPU) is None  # asking an event would end the capture
    gpu.is_capturing = False
    cache.get("table", GPU)
    gpu.is_capturing = True
    assert cache.get("table", GPU) is table


@pytest.mark.parametrize("is_written", [False, True])
def test_another_stream_waits_and_is_waited_for(gpu, is_written):
    cache: Cache = Cache(3)
    table = add(cache, "table", is_written=is_written)
    home, gpu.stream = gpu.stream, Stream()
    assert cache.get("table", GPU) is table
    assert gpu.stream.waited == home.recorded and len(home.recorded) == (not is_written)
    assert table.streams == [gpu.stream]
    for event in home.recorded:
        event.has_happened = True
    third = gpu.stream = Stream()
    assert cache.get("table", GPU) is table
    assert third.waited == [] and table.streams[1:] == [third]
    gpu.stream = home
    assert cache.get("table", GPU) is table
    assert home.waited == [] and len(table.streams) == 2


def test_a_captured_stream_waits_for_nothing(gpu):
    """Waiting for what is outside of a capture would end it, and memory is kept for good."""
    cache: Cache = Cache(3)
    table = add(cache, "table")
    gpu.stream, gpu.is_capturing = Stream(), True
    assert cache.get("table", GPU) is table
    assert gpu.stream.waited == [] and table.streams == []


def test_what_is_kept_is_made_by_a_thread_of_its_own(gpu, monkeypatch):
    """On the stream of this one, but not in the pool into which this one may be allocating."""
    entered = []

    @contextmanager
    def use(stream):
        entered.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "stream", use)
    assert apart(GPU, threading.current_thread) is not threading.current_thread()
    assert entered == [gpu.stream]
    assert apart(CPU, threading.current_thread) is threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        apart(GPU, lambda: 1 // 0)


def test_an_earlier_capture_keeps_its_table(gpu):
    """Another entry for the same key does not take its place."""
    cache: Cache = Cache(3)
    first = add(cache, "key")
    gpu.is_capturing = True
    assert cache.get("key", GPU) is first
    gpu.is_capturing = False
    second = add(cache, "key")
    gpu.is_capturing = True
    assert cache.get("key", GPU) is first is not second
