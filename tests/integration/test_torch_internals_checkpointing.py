"""What fastsn knows of the insides of torch's activation checkpoints.

Each of the first tests asks torch for one name. If one fails with a new torch, then
`fastsn/torch_internals/checkpointing.py` has to learn what took the name's place.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastsn import recompute
from fastsn.torch_internals import checkpointing

NAMES = [
    "_C._current_graph_task_id",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._autograd._pop_saved_tensors_default_hooks",
    "_C._autograd._push_saved_tensors_default_hooks",
    "_C._autograd._saved_tensors_hooks_is_enabled",
    "utils.checkpoint._CheckpointFrame",
    "utils.checkpoint.CheckpointFunction",
]
each_name = pytest.mark.parametrize("name", NAMES)
each_kind = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def parent_of(name):
    parent = torch
    *path, last = name.split(".")
    for part in path:
        parent = getattr(parent, part)
    return parent, last


@each_name
def test_torch_has_the_name(name):
    parent, last = parent_of(name)
    assert hasattr(parent, last), f"torch {torch.__version__} has no torch.{name}"


def looks(reentrant, look):
    """What ``look`` gives in the forward of a checkpoint, and in its repetition."""
    found = []

    def function(x):
        found.append(look())
        return x.sin()

    checkpoint(
        function, torch.ones(2, requires_grad=True), use_reentrant=reentrant
    ).sum().backward()
    forward, repetition = found
    return forward, repetition


@each_kind
def test_the_number_of_a_backward(reentrant):
    assert checkpointing.graph_task() == -1
    forward, repetition = looks(reentrant, checkpointing.graph_task)
    assert forward == -1 and repetition >= 0


@each_kind
def test_a_forward_and_its_repetition_have_the_same_checkpoint(reentrant):
    assert checkpointing.surrounding() == ([], None)
    ((own,), none), (within, repeated) = looks(reentrant, checkpointing.surrounding)
    assert none is None and within == [] and repeated is own is not None


def test_a_checkpoint_tells_the_function_that_repeats_it():
    """By which the innermost of two repetitions of different kinds is known."""
    _, (_, repeated) = looks(False, checkpointing.surrounding)
    assert repeated.recompute_fn.__code__.co_filename == torch.utils.checkpoint.__file__


def test_a_checkpoint_that_does_not_tell_it_is_not_known(monkeypatch):
    monkeypatch.setattr(checkpointing, "_code", lambda function: None)
    _, (_, repeated) = looks(False, checkpointing.surrounding)
    assert repeated is None


def test_hooks_are_read_and_left_as_they_are():
    pairs = [(lambda x, i=i: x, lambda x, i=i: x) for i in range(2)]
    assert not checkpointing.has_hooks()
    with saved_tensors_hooks(*pairs[0]), saved_tensors_hooks(*pairs[1]):
        assert checkpointing.has_hooks()
        for _ in range(2):
            assert checkpointing._hooks() == pairs[::-1]
    assert not checkpointing.has_hooks()


def test_hooks_that_are_turned_off_are_not_touched():
    """They could be taken off, but not be put back."""
    hooks = (lambda x: x, lambda x: x)
    with saved_tensors_hooks(*hooks):
        torch._C._autograd._saved_tensors_hooks_disable("off", fail_if_non_empty=False)
        try:
            assert checkpointing.surrounding() == ([], None)
        finally:
            torch._C._autograd._saved_tensors_hooks_enable()
        assert checkpointing._hooks() == [hooks]


def test_hooks_of_any_callable():
    """Neither functions, nor with a closure that is filled."""

    class Pack:
        def __call__(self, x):
            return x

    def unpack(x):
        return later

    with saved_tensors_hooks(Pack(), unpack):
        assert checkpointing.surrounding() == ([], None)
    later = None


def without(monkeypatch, names):
    """The module as it is where torch does not have these names."""
    for name in names:
        monkeypatch.delattr(*parent_of(name))
    spec = importlib.util.spec_from_file_location("without", checkpointing.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    monkeypatch.setattr(recompute, "checkpointing", module)


def replays():
    """What is replayed: without a checkpoint, and in those of both kinds."""
    owner, found = object(), [recompute.replay("owner", recompute.NOT_FOUND)]

    def look():
        replayed = recompute.replay(owner, recompute.NOT_FOUND)
        recompute.record(owner, "value", True)
        return replayed

    for reentrant in (True, False):
        forward, repetition = looks(reentrant, look)
        assert forward is None
        found.append(repetition)
    return found


def test_the_three_answers():
    nothing, *found = replays()
    assert nothing is None and found == ["value", "value"]
    unknown = looks(True, lambda: recompute.replay("unknown", recompute.NOT_FOUND))
    assert unknown == (None, recompute.NOT_FOUND)
    assert looks(True, lambda: recompute.replay("unknown")) == (None, None)


@each_name
def test_a_missing_name_is_no_error_and_no_wrong_answer(name, monkeypatch):
    without(monkeypatch, [name])
    nothing, *found = replays()
    # Either kind of checkpoint does without the other's names.
    lost = {"_C._current_graph_task_id": [], "utils.checkpoint.CheckpointFunction": [0]}
    expected = ["value", "value"]
    for i in lost.get(name, [1]):
        expected[i] = recompute.NOT_FOUND
    assert nothing is None and found == expected


def test_nothing_is_found_without_any_name(monkeypatch):
    without(monkeypatch, NAMES[1:])
    assert replays() == [None, recompute.NOT_FOUND, recompute.NOT_FOUND]


def test_checkpoints_that_take_no_attribute(monkeypatch):
    monkeypatch.setattr(recompute.checkpointing, "surrounding", lambda: ([object()], object()))
    assert replays() == [None, recompute.NOT_FOUND, recompute.NOT_FOUND]
