"""``fastsn.unnormalized``: for a while the layers of before, to be distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fastsn.weights import find

__all__ = ["unnormalized"]


@contextmanager
def unnormalized(model: nn.Module) -> Iterator[None]:
    """Within this context the normalized layers of a model are what they were before.

    Plain layers with a plain ``weight``, which is the parameter that is normalized otherwise: for
    ``parallelize_module`` and ``distribute_module``, which know no others. What they make of the
    parameter is normalized afterwards. No u, v, name or random number changes.

    Raises:
        RuntimeError: at the end, if a layer's class was changed within, as ``fully_shard`` does,
            which needs no such context.

    Example::

        >>> model = nn.Sequential(fastsn.nn.SNLinear(16, 32), nn.ReLU(), fastsn.nn.SNLinear(32, 4))
        >>> with fastsn.unnormalized(model):
        ...     parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    """
    with ExitStack() as stack:
        for module in list(model.modules()):
            weights = [weight for weight in find.of_module(module) if weight.is_ours]
            hooked = [weight.tensor_name for weight in weights if weight.form == "hook"]
            if hooked:
                stack.enter_context(_without_hooks(module, hooked))
            if any(weight.form == "parametrization" for weight in weights):
                stack.enter_context(_without_parametrizations(module))
        yield


@contextmanager
def _without_hooks(module: Any, names: list[str]) -> Iterator[None]:
    for name in names:
        module.__dict__.pop(name, None)
        module._parameters[name] = module._parameters.pop(f"{name}_orig")
    try:
        yield
    finally:
        for name in names:
            weight = module._parameters[f"{name}_orig"] = module._parameters.pop(name)
            module.__dict__[name] = weight.data


@contextmanager
def _without_parametrizations(module: Any) -> Iterator[None]:
    lists = module._modules["parametrizations"]
    if not all(own.is_tensor for own in lists.values()):
        yield  # some other parametrization, in terms of several tensors
        return
    of_now, of_before = type(module), parametrize.type_before_parametrizations(module)
    module.__class__ = of_before
    del module._modules["parametrizations"]
    kinds = {}
    for name, own in lists.items():
        kind = kinds[name] = "_parameters" if "original" in own._parameters else "_buffers"
        getattr(module, kind)[name] = getattr(own, kind).pop("original")
    try:
        yield
    finally:
        is_changed = type(module) is not of_before
        for name, own in lists.items():
            getattr(own, kinds[name])["original"] = getattr(module, kinds[name]).pop(name)
        module.__class__ = of_now
        module._modules["parametrizations"] = lists
        if is_changed:
            raise RuntimeError(
                f"expected layers that keep their class within fastsn.unnormalized, got another "
                f"one for a {of_before.__name__}: call fully_shard and its like outside"
            )
