"""Drop-in for ``torch.nn.utils.spectral_norm``, the form that works through a forward pre-hook.

Signature, buffers, iteration order, random numbers, checkpoints and errors are torch's.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.spectral_norm import (
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.spectral_norm import remove_spectral_norm as _torch_remove

from fastsn import engine
from fastsn.checkpoints import convert
from fastsn.sharded import placements
from fastsn.weights.hooked import SpectralNorm
from fastsn.weights.parametrized import default_dim

__all__ = [
    "SpectralNorm",
    "SpectralNormLoadStateDictPreHook",
    "SpectralNormStateDictHook",
    "remove_spectral_norm",
    "spectral_norm",
]

T_module = TypeVar("T_module", bound=nn.Module)


def spectral_norm(
    module: T_module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    norm: str = "matrix",
    scale: float = 1.0,
    bound: bool = False,
    zero_guard: bool = False,
) -> T_module:
    r"""Normalizes a weight spectrally before each forward, as ``torch.nn.utils.spectral_norm``
    does.

    .. math::
        W_{SN} = s \, W / \sigma(W), \quad \sigma \approx u^T W v

    with W as a matrix of shape (d_dim, product of the others). With the defaults every number,
    buffer, checkpoint key, random draw and error is torch's, to rounding.

    The parameter moves to ``<name>_orig``; before each forward of ``module``, ``module.<name>``
    becomes the normalized weight, a plain attribute with a graph. In training mode each forward
    performs ``n_power_iterations`` steps (v, then u) and updates the buffers ``<name>_u`` and
    ``<name>_v`` in place; in eval mode none. There is no warm-up. Gradients flow through W and
    sigma, with u and v constant. Unlike torch's, a forward in eval mode followed by one in training
    mode may be followed by the backward of both; a module can be deep-copied, pickled and sent to
    another process after a forward; an evaluation before u and v have moved or were loaded, which
    are random then, iterates them 15 times without writing them back; and what
    :func:`fastsn.parametrizations.spectral_norm` says of precision, activation checkpoints and
    averages holds here, too.
    Checkpoints of every form load, see :func:`fastsn.convert_state_dict`.

    Args:
        module: the module that holds the parameter.
        name: the parameter.
        n_power_iterations: steps per forward in training mode, at least 1.
        eps: least norm that u and v are divided by.
        dim: the dimension that counts outputs; default 0, and 1 for transposed convolutions.
        norm, scale, bound, zero_guard: the method, as in
            :func:`fastsn.parametrizations.spectral_norm`; BSN keeps its second pair of vectors in
            ``<name>_u2`` and ``<name>_v2``.

    Returns:
        The module itself.

    Raises:
        KeyError: no parameter of that name.
        ValueError: the parameter is None or uninitialized, ``n_power_iterations`` < 1, an unknown
            norm or a scale that is not finite and positive.
        RuntimeError: the parameter has a spectral norm hook already, or ``dim`` is out of range.
        Sharded weights: as :func:`fastsn.parametrizations.spectral_norm`. ``RowwiseParallel`` must
        come before this call, as the attribute ``<name>`` is in its way.
        The module is unchanged then.

    Warns:
        UserWarning: for the ``out_proj`` of a ``MultiheadAttention``, whose forward never runs, and
            so neither does a hook.

    Example::

        >>> layer = fastsn.spectral_norm(nn.Linear(20, 40))
        >>> layer.weight_u.shape
        torch.Size([40])

    Source: Miyato et al., ICLR 2018 (arXiv 1802.05957); Lin, Sekar, Fanti, NeurIPS 2021
    (arXiv 2009.02773).
    """
    method = engine.check_method(norm, scale, bound, zero_guard)
    if dim is None:
        dim = default_dim(module)
    placements.check(module._parameters.get(name), f"{name} of {type(module).__name__}")
    SpectralNorm.apply(module, name, n_power_iterations, dim, eps, method)
    convert.install(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        warnings.warn(
            "MultiheadAttention reads out_proj's weight without calling out_proj, so that this "
            "hook never runs and the weight stays as it is. Use "
            "fastsn.parametrizations.spectral_norm, or fastsn.accelerate on the model, which sets "
            "the weight in every forward.",
            stacklevel=2,
        )
    return module


def remove_spectral_norm(module: T_module, name: str = "weight") -> T_module:
    """Removes the hook of :func:`spectral_norm`, leaving the normalized weight as a new parameter.

    Raises:
        ValueError: there is no such hook.

    Example::

        >>> layer = fastsn.spectral_norm(nn.Linear(40, 10))
        >>> fastsn.remove_spectral_norm(layer)
        Linear(in_features=40, out_features=10, bias=True)
    """
    _torch_remove(module, name)
    convert.uninstall(module)
    return module
