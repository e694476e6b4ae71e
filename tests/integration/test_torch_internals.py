"""What fastsn knows of torch's insides, one test for each name: a canary for new versions.

If one fails, the module of `fastsn/torch_internals` that it names has to learn what took its place;
until then that module gives its safe answer, which the last tests show. (Those of activation
checkpoints are in `test_torch_internals_checkpointing.py`.)
"""

from __future__ import annotations

import contextlib
import importlib
import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastsn
from fastsn.torch_internals import calls, devices, foreach, fsdp, modes, parametrized

NAMES = {
    "modes": [
        "_C._are_functorch_transforms_active",
        "_C._get_tracing_state",
        "_C._len_torch_dispatch_stack",
        "autograd.forward_ad._current_level",
    ],
    "parametrized": [
        "nn.utils.parametrize._cache_enabled",
        "nn.utils.parametrize._inject_new_class",
        "nn.utils.parametrize._inject_property",
    ],
    "calls": ["nn.Module._call_impl"],
    "devices": ["cuda._lazy_call"],
    "foreach": ["_foreach_copy_"],
    "fsdp": [
        "distributed._composable_state._module_state_mapping",
        "distributed.fsdp._fully_shard._fsdp_state.FSDPState",
        "distributed.fsdp._fully_shard._fsdp_param.FSDPParam.reset_sharded_param",
    ],
    # What every module has, and both drop-ins are made of.
    "modules": [
        f"nn.Module.{name}"
        for name in ("_apply", "_register_load_state_dict_pre_hook", "_load_from_state_dict")
    ],
}


@pytest.mark.parametrize("name", [name for names in NAMES.values() for name in names])
def test_torch_has_the_name(name):
    found = torch
    path = name.split(".")
    for i, part in enumerate(path):
        if not hasattr(found, part):
            with contextlib.suppress(ImportError):
                importlib.import_module(".".join(["torch", *path[: i + 1]]))
        assert hasattr(found, part), f"torch {torch.__version__} has no torch.{name}"
        found = getattr(found, part)


@pytest.mark.parametrize(
    "name",
    [
        "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks",
        "_forward_hooks_always_called", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    ],
)  # fmt: skip
def test_modules_have_their_tables(name):
    assert isinstance(getattr(nn.Linear(2, 2), name), dict)


def test_parameters_of_fully_shard_say_where_they_belong():
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    fields = ParamModuleInfo.__dataclass_fields__
    assert {"module", "param_name", "shared_modules", "shared_param_names"} <= set(fields)
    source = inspect.getsource(FSDPParam)
    assert all(name in source for name in ("sharded_param", "_unsharded_param", "_module_info"))


# What the answers mean


def test_modes():
    seen = {}

    def look(name):
        def function(x):
            seen[name] = modes.is_eager(), modes.is_transformed()
            return x * 2

        return function

    x = torch.ones(2)
    look("plain")(x)
    torch.func.grad(lambda x: look("grad")(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        look("forward")(x)
    assert seen["plain"] == (True, False)
    assert seen["grad"] == (False, True) and seen["forward"][1]


def test_the_cache_of_parametrizations():
    assert not parametrized.is_cached()
    with parametrize.cached():
        assert parametrized.is_cached()


def test_calls_within_a_call():
    seen = []

    class Recursive(nn.Module):
        def forward(self, depth):
            seen.append(calls.is_called_within_itself(self))
            if depth:
                self(depth - 1)

    nn.Sequential(Recursive())[0](2)
    assert seen == [False, True, True]


def test_cuda_that_has_not_started(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "_lazy_call", lambda function: called.append(function))
    devices.when_cuda_starts(len)
    assert called == [len]


# What is done where a name is missing


def test_the_safe_answers(monkeypatch):
    for owner, name in (
        (parametrize, "_cache_enabled"), (parametrize, "_inject_property"),
        (parametrize, "_inject_new_class"), (torch.cuda, "_lazy_call"),
    ):  # fmt: skip
        monkeypatch.delattr(owner, name)
    assert not parametrized.is_cached()
    devices.when_cuda_starts(lambda: pytest.fail("CUDA has not started"))
    layer = fastsn.spectral_norm(nn.Linear(3, 3))
    assert layer(torch.ones(1, 3)).isfinite().all()
    with pytest.raises(RuntimeError, match="only its state_dict"):
        parametrized.inject_class(layer)


def test_copies_without_the_operator_for_many(monkeypatch):
    monkeypatch.setattr(foreach, "_copy", None)
    targets = [torch.zeros(2), torch.zeros(3)]
    foreach.copy_(targets, [torch.ones(2), torch.ones(3)])
    assert all(target.all() for target in targets)


def test_modes_that_torch_does_not_know_are_not_on():
    assert modes._find(torch._C, "_no_such_function")() is False


def test_frames_of_another_kind_are_no_calls(monkeypatch):
    monkeypatch.setattr(nn.Module, "__call__", nn.Module.forward.__class__(
        (lambda self, *args: self.forward(*args)).__code__, {}))  # fmt: skip

    class Recursive(nn.Module):
        def forward(self, depth):
            return calls.is_called_within_itself(self) if not depth else self(depth - 1)

    assert Recursive()(2) is False


def test_nothing_is_sharded_here():
    assert not fsdp.is_sharding() and fsdp.owner_of(nn.Linear(2, 2).weight) is None
