"""Copies and pickles of parametrized modules.

torch gives every parametrized module a class made at run time, whose properties compute the
weights. No pickle can name such a class, so torch refuses to try; and a deep copy shares it, so
that removing a parametrization from one of the two breaks the other. Here a copy or a pickle holds
the class from before, and its module gets a parametrized class of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastsn import placements

__all__ = ["allow", "deep_copy", "rebuild"]


def allow(module: nn.Module) -> None:
    """Lets a parametrized module be pickled, and copied with a class of its own.

    What its class from before says about copies and pickles itself stays.
    """
    cls = placements.parametrized_class(module)
    before = cls.__bases__[0]
    cls.__setstate__ = _set_state
    if (before.__reduce_ex__, before.__reduce__) == (object.__reduce_ex__, object.__reduce__):
        cls.__reduce_ex__ = _reduce
    if not hasattr(before, "__deepcopy__"):
        cls.__deepcopy__ = deep_copy


def rebuild(module: Any, plain: type[nn.Module]) -> None:
    """Gives a parametrized module a parametrized class of its own, made from the class ``plain``.

    Nothing is evaluated, so that nothing iterates.
    """
    module.__class__ = plain
    _own_class(module)
    _inject_properties(module)


def deep_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module that is parametrized, or no more."""
    if parametrize.is_parametrized(module):
        state, new = _state(module), _blank(_before(module))
    else:
        state, new = module.__getstate__(), type(module).__new__(type(module))
    memo[id(module)] = new
    new.__setstate__(copy.deepcopy(state, memo))
    return new


def _own_class(module: nn.Module) -> None:
    parametrize._inject_new_class(module)
    allow(module)
    placements.install(module)


def _inject_properties(module: Any) -> None:
    for name in module._modules["parametrizations"]:
        parametrize._inject_property(module, name)


def _before(module: nn.Module) -> Any:
    """The class of a module before it was parametrized."""
    cls = type(module)
    if cls.__dict__.get("__setstate__") is not _set_state:
        raise TypeError(
            f"expected a parametrized module, got a {cls.__name__}, whose class was derived from "
            "that of one: save or copy its state_dict() instead"
        )
    return cls.__bases__[0]


def _blank(before: Any) -> nn.Module:
    """A module without contents, its class a parametrized one that is made for it."""
    module = before.__new__(before)
    _own_class(module)
    return module


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    return _blank, (_before(module),), _state(module)


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    _before(module).__setstate__(module, state)
    _inject_properties(module)


def _state(module: Any) -> dict[str, Any]:
    if not isinstance(module, nn.RNNBase):
        return _before(module).__getstate__(module)
    # Its own reads every weight, which would iterate, and keeps what it has read.
    state = nn.Module.__getstate__(module)
    del state["_flat_weight_refs"]
    state["_flat_weights"] = [
        weight if weight is None or isinstance(weight, nn.Parameter) else torch.empty(0)
        for weight in module._flat_weights
    ]
    return state
