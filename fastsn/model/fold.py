"""``fastsn.fold``: plain layers for inference and export."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsn import hooks
from fastsn.checkpoints import convert
from fastsn.grouping import take_over
from fastsn.nn.msn import MeanNormalized
from fastsn.weights import biggan, classes, find, group

T_module = TypeVar("T_module", bound=nn.Module)


def fold(model: T_module) -> T_module:
    """A copy of the model with plain layers that hold the normalized weights, for inference.

    The weights are those of eval mode, each a parameter of its own, also where layers shared one.
    No power iteration, no division, no u and v are left in the graph or in checkpoints. fastsn's
    layers become those of ``torch.nn``, running mean and gain of MSN layers a part of their weight
    and bias; layers with torch's spectral norm are folded as well; a weight with further
    parametrizations keeps their result. The model itself stays as it is.

    Raises:
        ValueError: an MSN layer without running mean, whose eval mode depends on the batch.

    Example::

        >>> plain = fastsn.fold(model).eval()
        >>> torch.export.export(plain, (x,))
    """
    for name, module in model.named_modules():
        if isinstance(module, MeanNormalized) and module.running_mean is None:
            raise ValueError(
                f"expected layers with track_running_stats=True, got {name or 'a layer'} without: "
                "there is no mean to fold"
            )
    folded = _copy(model)
    take_over(folded)
    for module in folded.modules():
        group.remove(module)
    for module in list(folded.modules()):
        weights = [weight for weight in find.of_module(module) if weight.is_ours]
        _fold_parametrized(module, [w.tensor_name for w in weights if w.form == "parametrization"])
        for weight in weights:
            if weight.form == "hook":
                requires_grad = weight.original().requires_grad
                hooks.remove_spectral_norm(module, weight.tensor_name)
                getattr(module, weight.tensor_name).requires_grad_(requires_grad)
            if weight.form == "biggan":
                biggan.fold(module)
        convert.uninstall(module)
    return folded


def _copy(model: T_module) -> T_module:
    """A deep copy, also where a forward has left tensors behind, which have a graph."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # Weights that a hook has set, that an RNN has read; what a forward of the user's notes.
        for left in [*module.__dict__.values(), *getattr(module, "_flat_weights", [])]:
            if isinstance(left, Tensor) and not left.is_leaf:
                memo[id(left)] = left.detach()
    return copy.deepcopy(model, memo)


@torch.no_grad()
def _fold_parametrized(module: Any, names: list[str]) -> None:
    if not names:
        return
    classes.rebuild(module, parametrize.type_before_parametrizations(module))
    for name in names:
        norms = module.parametrizations[name].eval()
        value = norms()
        is_parameter = "original" not in norms._buffers
        requires_grad = any(p.requires_grad for p in norms.parameters(recurse=False))
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        if is_parameter:
            setattr(module, name, nn.Parameter(value, requires_grad))
        else:
            setattr(module, name, value)
    # A subclass of one of fastsn's layers is somebody else's and stays.
    if not parametrize.is_parametrized(module) and "plain" in type(module).__dict__:
        if isinstance(module, MeanNormalized):
            module.fold_mean()
        module.__class__ = type(module).__dict__["plain"]
