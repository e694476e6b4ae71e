"""``fastsn.accelerate``, ``fastsn.refresh`` and ``fastsn.sigmas``."""

from __future__ import annotations

import types
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsn.checkpoints import convert
from fastsn.weights import classes, find, group
from fastsn.weights.gathering import Unscaled
from fastsn.weights.group import Group

__all__ = ["accelerate", "refresh", "sigmas"]

T_module = TypeVar("T_module", bound=nn.Module)
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def take_over(model: nn.Module) -> None:
    """Turns torch's spectral norm and BigGAN-style layers into fastsn's, in place."""
    find.adopt(model)
    for module in model.modules():
        # The compiler changes no class; the way through torch's property serves as well.
        if parametrize.is_parametrized(module) and not torch.compiler.is_compiling():
            classes.teach(module)
        convert.install(module)


def _of_its_own(method: Any) -> Any:
    """The method with a code object of its own: the compiler limits the graphs of each."""
    function = method.__func__
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return types.MethodType(own, method.__self__)


def accelerate(model: T_module) -> T_module:
    """Serves all spectrally normalized weights of a model by one fused call per forward.

    Takes over, in place, the layers that carry ``torch.nn.utils.spectral_norm``,
    ``torch.nn.utils.parametrizations.spectral_norm``, fastsn's own, or a ``W_()`` method as in
    BigGAN-PyTorch. Numbers, buffers, parameters and checkpoint keys stay what they were, to
    rounding.

    Each forward of ``model`` computes the normalized weights of all layers below it at once, one
    power iteration step as configured in training mode, none in eval mode, and the first read of a
    layer's weight in that forward finds it. Every other read computes by itself, as before: a layer
    used a second time in the same forward (torch iterates for each use), a sub-module called on its
    own, a weight read outside. Under autocast, the weights of torch's linear layers and
    convolutions (parametrization form) come in autocast's type at once, which are the numbers that
    autocast would round them to; where a part of the forward turns autocast off, in their own.
    Two forwards before one backward are safe. The one difference from
    torch: a layer that a forward does not use iterates too. Calling ``accelerate`` again takes in
    layers that were added since.

    Args:
        model: the module whose forward is called in training, for example a discriminator. Of a
            ``DataParallel`` or ``DistributedDataParallel``, the module within is accelerated.

    Returns:
        The model itself.

    Warns:
        UserWarning: no layer was found.

    Example::

        >>> from torch.nn.utils.parametrizations import spectral_norm
        >>> model = nn.Sequential(spectral_norm(nn.Conv2d(3, 64, 3)), nn.ReLU(), nn.Flatten(),
        ...                       spectral_norm(nn.Linear(64, 1)))
        >>> model = fastsn.accelerate(model)
    """
    if isinstance(model, _WRAPPERS):
        accelerate(model.module)
        return model
    take_over(model)
    for module in model.modules():
        group.remove(module)
    own = Group(model)
    if not own.weights:
        warnings.warn(
            f"fastsn.accelerate found no layer with spectral norm in {type(model).__name__}",
            stacklevel=2,
        )
    model.register_forward_pre_hook(_of_its_own(own.before), prepend=True)
    model.register_forward_hook(_of_its_own(own.after), always_call=True)
    return model


def refresh(model: nn.Module) -> dict[str, Tensor]:
    """All normalized weights of a model at once, with their graph.

    The call that :func:`accelerate` makes for each forward: in training mode every layer iterates,
    in eval mode none does.

    Returns:
        ``{"conv1.weight": normalized weight, ...}``, for fastsn's layers and those taken over.

    Example::

        >>> weights = fastsn.refresh(model)
        >>> penalty = sum(w.square().sum() for w in weights.values())
    """
    found = {}
    for batch, originals in group.batches_of(model):
        results = batch.run(originals, [weight.vectors() for weight in batch.weights])
        for weight, original, result in zip(batch.weights, originals, results, strict=True):
            normalized = result.normalized(original) if isinstance(result, Unscaled) else result
            found[weight.name] = weight.norm.finish(weight.module, weight.tensor_name, normalized)
    return found


@torch.no_grad()
def sigmas(model: nn.Module) -> dict[str, Tensor]:
    """The present estimate of sigma of every layer, without iterating or waiting for a device.

    sigma = u^T M v with the present weight and the u, v of the last forward (BSN: the mean over
    both matrices): what a forward in eval mode divides by.

    Returns:
        ``{"conv1.weight": 0-d tensor, ...}`` in fp32 or wider, without gradient.

    Example::

        >>> {name: float(sigma) for name, sigma in fastsn.sigmas(model).items()}
    """
    return {
        weight.name: sigma
        for batch, originals in group.batches_of(model)
        for weight, sigma in zip(batch.weights, batch.sigmas(originals), strict=True)
    }
