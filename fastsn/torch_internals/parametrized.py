"""The classes that torch makes for parametrized modules, and the cache of their weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def is_cached() -> bool:
    """Whether the code runs within ``parametrize.cached()``."""
    return bool(getattr(parametrize, "_cache_enabled", 0))


def parametrized_class(module: nn.Module) -> Any:
    """The class that torch has made for a parametrized module.

    ``fully_shard`` derives another one from that, of which ``FSDPModule`` is the first base.
    """
    return next(cls for cls in type(module).__mro__ if issubclass(cls.__bases__[0], nn.Module))


def inject_class(module: nn.Module) -> None:
    """Gives a module a parametrized class of its own, without properties.

    Raises:
        RuntimeError: this version of torch makes such classes in another way.
    """
    _function("_inject_new_class")(module)


def inject_properties(module: Any) -> None:
    """Makes the parametrized tensors properties of the module's class.

    Raises:
        RuntimeError: this version of torch makes such properties in another way.
    """
    inject = _function("_inject_property")
    for name in module._modules["parametrizations"]:
        inject(module, name)


def _function(name: str) -> Any:
    found = getattr(parametrize, name, None)
    if found is None:
        import torch

        raise RuntimeError(
            f"torch {torch.__version__} has no torch.nn.utils.parametrize.{name}: a parametrized "
            "module cannot be copied or pickled as a whole, only its state_dict()"
        )
    return found
