"""When u and v move, and where they start anew: calls for a model or a layer of one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from fastsn import engine
from fastsn.weights import cache, find
from fastsn.weights.find import Weight
from fastsn.weights.normalizer import POLICIES, Normalizer

__all__ = ["advance", "cached", "converge", "frozen", "reset_parameters", "set_update_policy"]

T_module = TypeVar("T_module", bound=nn.Module)


def _nothing_in(model: nn.Module) -> str:
    return (
        f"expected a model with spectral norm by fastsn, got none in {type(model).__name__}: "
        "fastsn.accelerate takes over torch's"
    )


def _normalizers(model: nn.Module) -> list[Normalizer]:
    found = find.normalizers(model)
    if not found:
        raise ValueError(_nothing_in(model))
    others = [weight.name for weight in find.weights(model) if not weight.is_ours]
    if others:
        warnings.warn(
            f"this reaches the weights that fastsn normalizes, not those of {others}: "
            "fastsn.accelerate takes over torch's",
            stacklevel=3,
        )
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
    held = [norm.transient for norm in _normalizers(model)]
    for transient in held:
        transient.frozen += 1
    try:
        yield
    finally:
        for transient in held:
            transient.frozen -= 1


@contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Within this context each weight of the model is normalized once, at its first read.

    What ``torch.nn.utils.parametrize.cached`` does for every parametrization, for all forms of
    spectral norm, and for one model: in training mode u and v move at the first read and no more.
    Later reads give the tensor of the first one (one with a graph, one without, one for each type
    of autocast, where both are asked for), **whatever happens to the weight**: change no weight
    within. It serves the thread that entered it, nests, and ends with an exception as well. Graphs
    that ``torch.compile`` has made compute as ever.

    Raises:
        ValueError: the model has no layer with fastsn's spectral norm.

    Example::

        >>> with torch.no_grad(), fastsn.cached(generator):
        ...     images = [generator(noise) for noise in batches]
    """
    with cache.remembering(_normalizers(model)):
        yield


def advance(model: T_module) -> T_module:
    """Says that weights have changed by hand: with policy "step", u and v move at the next read.

    For updates that neither an optimizer of ``torch.optim`` does nor an in-place operation on the
    weight itself: ``p.data -= lr * g``, master weights, a write by NumPy or another process.

    Returns:
        The model itself.

    Raises:
        ValueError: the model has no layer with fastsn's spectral norm.

    Example::

        >>> for p in critic.parameters():
        ...     p.data -= lr * p.grad
        >>> fastsn.advance(critic)
    """
    for norm in _normalizers(model):
        norm.transient.seen = None
    return model


@torch.no_grad()
def converge(model: T_module, n_power_iterations: int = engine.WARM_UP) -> T_module:
    """Iterates u and v of all layers of a model for the present weights, in place.

    For a model whose weights, u and v are averages of others' (EMA, SWA, soups), before it is used
    or published: averaged u and v have the right direction nearly, this brings the last percent. In
    training and eval mode alike; weights stay.

    Args:
        model: a model, or a single layer.
        n_power_iterations: steps, at least 1.

    Returns:
        The model itself.

    Raises:
        ValueError: fewer steps than 1, or a model without fastsn's spectral norm. Nothing is
            changed then.

    Example::

        >>> averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        >>> fastsn.converge(averaged)
    """
    if not isinstance(n_power_iterations, int) or n_power_iterations < 1:
        raise ValueError(f"n_power_iterations must be at least 1, got {n_power_iterations!r}")
    for weight in _weights(model):
        weight.norm.converge(weight.holder, weight.original(), n_power_iterations)
    return model


def set_update_policy(model: T_module, policy: str) -> T_module:
    """Says when u and v of all layers of a model move in training mode.

    ==============  ===========================================================================
    ``policy``      u and v move
    ==============  ===========================================================================
    ``"forward"``   in every forward, in parametrization form at every read (torch's; default)
    ``"step"``      in the first forward after the weight has changed: once per optimizer step,
                    so that D(real) and D(fake) see the same weight, to rounding
    ``"frozen"``    never
    ==============  ===========================================================================

    A change is a step of any optimizer of ``torch.optim``, ``load_state_dict``, an in-place
    operation or ``weight.data = ...``; for others there is :func:`advance`. Whether a change is
    noticed decides over u and v alone: sigma is always that of the present weight. The policy is a
    part of copies and pickles, not of state dicts.

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
    found = _weights(model)
    for weight in found:
        if weight.original().is_meta:
            raise ValueError(
                f"expected weights with values, got {weight.name} on the meta device: call "
                "to_empty first"
            )
    for weight in found:
        weight.norm.restart(weight.holder, weight.original(), generator)
    return model


def _weights(model: nn.Module) -> list[Weight]:
    """Those that have u and v of fastsn's."""
    found = [w for w in find.weights(model) if w.is_ours and w.is_first and w.original().ndim > 1]
    if not found:
        raise ValueError(_nothing_in(model))
    return found
