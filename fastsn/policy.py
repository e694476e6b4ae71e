"""When u and v move, and where they start anew: calls for a model or a layer of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from fastsn import biggan, hooks, normalizer, parametrizations
from fastsn.layers import find
from fastsn.normalizer import POLICIES, Normalizer

__all__ = ["frozen", "reset_parameters", "set_update_policy"]

T_module = TypeVar("T_module", bound=nn.Module)


def _nothing_in(model: nn.Module) -> str:
    return (
        f"expected a model with spectral norm by fastsn, got none in {type(model).__name__}: "
        "fastsn.accelerate takes over torch's"
    )


def _normalizers(model: nn.Module) -> list[Normalizer]:
    """What moves u and v, of every weight, also of those that no grouped call serves."""
    found: list[Normalizer] = []
    for module in model.modules():
        if isinstance(module, parametrizations._SpectralNorm):
            found.append(module)
        hooked = module._forward_pre_hooks.values()
        found += [hook for hook in hooked if isinstance(hook, hooks.SpectralNorm)]
        if biggan.is_taken_over(module):
            found.append(biggan.state_of(module))
    if not found:
        raise ValueError(_nothing_in(model))
    return found


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within this context no u and v of the model move, also in training mode.

    Forwards and reads of a weight use the present u and v, as eval mode does; dropout and all else
    train as before. Gradients are those of training. Works on a single layer as well, and nests;
    the running means of MSN layers move all the same.

    Raises:
        ValueError: the model has no layer with fastsn's spectral norm.

    Example::

        >>> with fastsn.frozen(discriminator):
        ...     weight = discriminator.conv1.weight      # read without side effect
    """
    memories = [norm.memory for norm in _normalizers(model)]
    for memory in memories:
        memory.frozen += 1
    try:
        yield
    finally:
        for memory in memories:
            memory.frozen -= 1


def set_update_policy(model: T_module, policy: str) -> T_module:
    """Says when u and v of all layers of a model move in training mode.

    ==============  ===========================================================================
    ``policy``      u and v move
    ==============  ===========================================================================
    ``"forward"``   in every forward, in parametrization form at every read (torch's; default)
    ``"step"``      in the first forward after the weight has changed: once per optimizer step,
                    so that D(real) and D(fake) see the same weight, bit for bit
    ``"frozen"``    never
    ==============  ===========================================================================

    A change is what the weight's version counter or address tells: steps of optimizers,
    ``load_state_dict``, in-place operations, ``weight.data = ...``. A write into ``weight.data`` is
    not seen. The policy is a part of copies and pickles, not of state dicts.

    Args:
        model: a model, or a single layer.
        policy: one of those above.

    Returns:
        The model itself.

    Raises:
        ValueError: another policy, or a model without fastsn's spectral norm. Nothing is changed.
        RuntimeError: in a forward that ``torch.compile`` traces, with ``"step"``.

    Example::

        >>> fastsn.set_update_policy(discriminator, "step")
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
    for norm in _normalizers(model):
        norm.policy = policy
    return model


def reset_parameters(model: T_module, generator: torch.Generator | None = None) -> T_module:
    """Draws u and v of all layers of a model anew and iterates them for the present weights.

    For a model that comes from the meta device: after ``to_empty`` and the initialization of its
    weights. 15 iterations follow the draw, as at registration; weights stay. Where nobody calls it,
    the first forward after ``to_empty`` does the same with a fixed seed, so that sigma never comes
    from memory without values.

    Args:
        model: a model, or a single layer.
        generator: of the random numbers, on the device of the weights; default: torch's.

    Returns:
        The model itself.

    Raises:
        ValueError: a model without fastsn's spectral norm, or one that is on the meta device.
            Nothing is changed then.

    Example::

        >>> with torch.device("meta"):
        ...     model = nn.Sequential(fastsn.nn.SNLinear(784, 128), nn.ReLU(), nn.Linear(128, 1))
        >>> model = model.to_empty(device="cpu")
        >>> for layer in model:
        ...     if hasattr(layer, "reset_parameters"):
        ...         layer.reset_parameters()
        >>> model = fastsn.reset_parameters(model, torch.Generator().manual_seed(0))
    """
    found = list(find(model))
    if not found:
        raise ValueError(_nothing_in(model))
    for layer in found:
        weight = layer.weight()
        if weight is None or weight.is_meta:
            raise ValueError(
                f"expected weights with values, got {layer.name} on the meta device: call to_empty "
                "first"
            )
    for layer in found:
        weight = layer.weight()
        assert weight is not None
        normalizer.restart(layer.call(), weight.detach(), *layer.vectors(), generator)
    return model
