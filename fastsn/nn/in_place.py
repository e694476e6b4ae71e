"""Plain and spectrally normalized layers that become MSN layers by changing their class.

References, hooks and optimizers that hold the layer or its parameters stay valid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from fastsn import engine, hooks, parametrizations
from fastsn.means import Group
from fastsn.nn import msn
from fastsn.nn.modules import Normalized
from fastsn.weights import autocast, classes, find, hooked, parametrized

_MSN: dict[type[nn.Module], Any] = {
    cls.plain: cls
    for cls in (
        msn.MSNLinear,
        msn.MSNConv1d,
        msn.MSNConv2d,
        msn.MSNConv3d,
        msn.MSNConvTranspose1d,
        msn.MSNConvTranspose2d,
        msn.MSNConvTranspose3d,
    )
}
_PARAMETRIZATIONS = (parametrized.TorchParametrization, parametrized._SpectralNorm)
_HOOKS = (hooked.TorchHook, hooked.SpectralNorm)


def _plain(module: Any) -> type[nn.Module]:
    """The class of torch that the layer is of; any other one's own class is its own."""
    cls: Any = parametrize.type_before_parametrizations(module)
    return cls.__dict__.get("plain", cls) if issubclass(cls, Normalized) else cls


def _hook(module: nn.Module) -> Any:
    return next((w.norm for w in find.of_module(module) if type(w.norm) in _HOOKS), None)


def check(n_power_iterations: int, eps: float, **method: Any) -> None:
    """Raises ValueError for keywords of a spectral norm that are not valid."""
    engine.check_method(**method)
    if n_power_iterations <= 0:
        raise ValueError(
            f"Expected n_power_iterations to be positive, but got {n_power_iterations=}"
        )


def channels(layer: Any) -> int:
    """The number of outputs of a convolution or linear layer."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def is_normalized(module: Any) -> bool:
    """Whether the weight of a layer that can become an MSN layer is normalized already."""
    return _hook(module) is not None or parametrize.is_parametrized(module)


def why_not(module: Any) -> str | None:
    """Why a layer cannot become an MSN layer, or None if it can."""
    cls = parametrize.type_before_parametrizations(module)
    if isinstance(module, msn.MeanNormalized):
        return "it is an MSN layer already"
    if isinstance(module, LazyModuleMixin):
        return "it is not initialized: run a forward first"
    if _plain(module) not in _MSN:
        if isinstance(module, autocast.LAYERS):
            return f"{cls.__name__} is a subclass, which may do anything with its weight"
        return f"{cls.__name__} is no convolution or linear layer"
    weight = _weight(module)
    if weight is None:
        return "its weight is parametrized by something else than one spectral norm"
    if "bias" not in module._parameters:
        return "its bias is no parameter of its own"
    if weight.layout != torch.strided:
        return f"its weight is {weight.layout}, not dense"
    if not weight.is_floating_point():
        return f"its weight has type {weight.dtype}"
    return None


def _weight(module: Any) -> nn.Parameter | None:
    """The parameter, if it is plain or normalized spectrally and in no other way."""
    if parametrize.is_parametrized(module):
        lists = module.parametrizations
        if set(lists) != {"weight"} or len(lists.weight) > 1:
            return None
        if type(lists.weight[0]) not in _PARAMETRIZATIONS:
            return None
        return lists.weight._parameters.get("original")
    return module._parameters.get("weight" if _hook(module) is None else "weight_orig")


def to_msn(
    layer: Any,
    method: dict[str, Any],
    *,
    momentum: float | None = 0.1,
    gain: bool = False,
    track_running_stats: bool = True,
    process_group: Group = None,
) -> None:
    """Makes an MSN layer of a layer that can become one.

    A spectral norm that is there stays, with its u and v; else one is made by ``method``, the
    keywords of :func:`fastsn.parametrizations.spectral_norm`. Statistics start at 0.
    """
    cls = _MSN[_plain(layer)]
    found = _unhook(layer)
    if parametrize.is_parametrized(layer):
        parametrized.adopt(layer.parametrizations.weight[0])
        classes.rebuild(layer, cls)
    else:
        layer.__class__ = cls
        if found is not None:
            hook, u, v = found
            method = {
                "n_power_iterations": hook.n_power_iterations, "eps": hook.eps, "dim": hook.dim,
                **hook.method._asdict(),
            }  # fmt: skip
        parametrizations.spectral_norm(layer, **method)
        layer.parametrizations.train(layer.training)
        if found is not None:
            norm = layer.parametrizations.weight[0]
            new_u, new_v = norm.vectors(norm)
            for new, old in zip(new_u + new_v, u + v, strict=True):
                new.copy_(old)
    layer.norm = layer.parametrizations.weight[0].method.norm
    original = layer.parametrizations.weight.original
    layer.start(channels(layer), momentum, gain, track_running_stats, process_group, original)


def _unhook(layer: Any) -> tuple[hooks.SpectralNorm, list[Any], list[Any]] | None:
    """Makes the weight of a hook the layer's own parameter again; the hook and its u and v."""
    hook = _hook(layer)
    if hook is None:
        return None
    hooked.adopt(layer)
    weight = layer.weight_orig
    u, v = hook.vectors(layer)
    hooks.remove_spectral_norm(layer)
    layer.weight = weight
    return hook, u, v
