"""The classes of parametrized modules: quick reads, copies, pickles, sharding.

torch gives every parametrized module a class made at run time, whose properties compute the
weights. No pickle can name such a class, so torch refuses to try; and a deep copy shares it, so
that removing a parametrization from one of the two breaks the other. Here a copy or a pickle holds
the class from before, and its module gets a parametrized class of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsn.sharded import placements
from fastsn.torch_internals import fsdp, parametrized

__all__ = ["deep_copy", "rebuild", "teach"]


def teach(module: nn.Module) -> None:
    """Teaches the class that torch has made for a parametrized module all of the above.

    What its class from before says about copies and pickles itself stays.
    """
    cls = parametrized.parametrized_class(module)
    before = cls.__bases__[0]
    cls.__setstate__ = _set_state
    if (before.__reduce_ex__, before.__reduce__) == (object.__reduce_ex__, object.__reduce__):
        cls.__reduce_ex__ = _reduce
    if not hasattr(before, "__deepcopy__"):
        cls.__deepcopy__ = deep_copy
    cls.register_parameter = _register_parameter
    for name in module.parametrizations:  # type: ignore[union-attr]
        _shorten(cls, name)


def _shorten(cls: Any, name: str) -> None:
    """Lets a read of ``module.<name>`` reach its normalizer without the way through torch.

    Torch's property calls two modules and catches an exception, which costs more than normalizing a
    small weight.
    """
    read = getattr(cls, name)
    if not isinstance(read, property) or getattr(read.fget, "__name__", "") == "get_normalized":
        return

    def get_normalized(self: nn.Module) -> Tensor:
        norms = self.__dict__["_modules"]["parametrizations"]._modules[name]
        norm = norms._modules["0"]
        # Without what torch's way would meet besides: other parametrizations, hooks, its cache.
        if len(norms._modules) == 1 and "reads_directly" in type(norm).__dict__:
            if norm.transient.pending and not parametrized.is_cached():
                # Left by a group, which has looked for all of these.
                original = norms._parameters.get("original")
                return norm.read(norm, norms.original if original is None else original)
            weight = None if parametrized.is_cached() else norm.source(self, name)
            if weight is not None:
                return norm.forward(weight)
        return read.fget(self)  # type: ignore[misc]

    setattr(cls, name, property(get_normalized, read.fset))


def _register_parameter(self: Any, name: str, param: nn.Parameter | None) -> None:
    """What ``distribute_module`` and ``remove_parametrizations`` do to a parametrized module.

    Raises:
        RuntimeError: the module is distributed while its weight is parametrized.
    """
    lists = self._modules.get("parametrizations")
    if lists is not None and placements.is_distributed(param):
        for own, norms in lists.items():
            if not placements.is_distributed(norms._parameters.get("original")):
                raise RuntimeError(
                    f"expected a plain layer to distribute, got {type(self).__name__}, whose "
                    f"{own} is normalized already: call parallelize_module or distribute_module "
                    "before spectral_norm, or within fastsn.unnormalized(model)"
                )
    super(parametrized.parametrized_class(self), self).register_parameter(name, param)
    fsdp.moved_back(self, name, param)


def rebuild(module: Any, plain: type[nn.Module]) -> None:
    """Gives a parametrized module a parametrized class of its own, made from the class ``plain``.

    Nothing is evaluated, so that nothing iterates.
    """
    module.__class__ = plain
    parametrized.inject_class(module)
    parametrized.inject_properties(module)
    teach(module)


def deep_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module that is parametrized, or no more."""
    if parametrize.is_parametrized(module):
        state, new = _state(module), _blank(_before(module))
    else:
        state, new = module.__getstate__(), type(module).__new__(type(module))
    memo[id(module)] = new
    new.__setstate__(copy.deepcopy(state, memo))
    return new


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
    parametrized.inject_class(module)
    type(module).__setstate__ = _set_state
    return module


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    return _blank, (_before(module),), _state(module)


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    _before(module).__setstate__(module, state)
    parametrized.inject_properties(module)
    teach(module)


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
