"""``fastsn.apply``: spectral normalization for every layer of a plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastsn import parametrizations
from fastsn.grouping import accelerate
from fastsn.means import Group
from fastsn.nn import in_place
from fastsn.nn.mean_only import check_momentum
from fastsn.report import Report
from fastsn.weights import autocast, find

__all__ = ["Report", "apply"]


_METHODS = {"sn": "matrix", "bsn": "bidirectional", "msn": "matrix"}
_LAYERS = (*autocast.LAYERS, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)


def _is_normalized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight") or any(find.of_module(module))


def _why_not(module: nn.Module) -> str | None:
    if _is_normalized(module):
        return "its weight is normalized or parametrized already"
    if not isinstance(module, _LAYERS):
        return f"{type(module).__name__} is no convolution, linear or embedding layer"
    weight = module._parameters.get("weight")
    if weight is None:
        return "it has no parameter `weight`"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialized: run a forward first"
    if weight.layout != torch.strided:
        return f"its weight is {weight.layout}, not dense"
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"its weight has type {weight.dtype}"
    return None


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold parameters of their own, or did before they were parametrized."""
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        if isinstance(module, _LAYERS) or module._parameters or parametrize.is_parametrized(module):
            yield name, module


def apply(
    model: nn.Module,
    method: str = "sn",
    filter: Callable[[str, nn.Module], bool] | None = None,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    scale: float = 1.0,
    bound: bool = False,
    zero_guard: bool = False,
    momentum: float | None = 0.1,
    gain: bool = False,
    process_group: Group = None,
) -> Report:
    """Normalizes every layer of a plain model, and accelerates it.

    Convolution, transposed convolution, linear, bilinear and embedding layers get
    :func:`fastsn.parametrizations.spectral_norm` on their ``weight``. Layers that share a weight
    get vectors of their own each. For BSN the weight (out, in1, in2) of a bilinear layer counts as
    that of a convolution with in1 inputs.

    With ``"msn"`` convolution and linear layers become ``fastsn.nn.MSN...`` layers, in place; their
    bias remains. Batch norms are not touched: see :func:`fastsn.nn.convert_batchnorm`.

    Args:
        model: changed in place.
        method: ``"sn"``, ``"bsn"`` or ``"msn"``; with ``scale``: SSN, BSSN.
        filter: which layers; called with the module's name and the module.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.
        momentum, gain, process_group: of MSN layers, see :class:`fastsn.nn.MSNConv2d`.

    Returns:
        A :class:`Report` of what was touched, and of what was skipped and why; print it.

    Raises:
        ValueError: an unknown method, or one of the other arguments is not valid. The model is
            unchanged then.

    Example::

        >>> print(fastsn.apply(discriminator, "bsn", lambda name, module: name != "embed"))
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {tuple(_METHODS)}, got {method!r}")
    is_msn = method == "msn"
    norm: dict[str, Any] = {
        "n_power_iterations": n_power_iterations, "eps": eps, "norm": _METHODS[method],
        "scale": scale, "bound": bound, "zero_guard": zero_guard,
    }  # fmt: skip
    in_place.check(**norm)
    check_momentum(momentum)
    if not is_msn and (momentum, gain, process_group) != (0.1, False, None):
        raise ValueError(
            "momentum, gain and process_group are for method 'msn', got "
            f"{momentum=}, {gain=}, {process_group=} with method {method!r}"
        )
    report = Report(method)
    chosen = []
    for name, module in _candidates(model):
        reason = in_place.why_not(module) if is_msn else _why_not(module)
        if reason is None and filter is not None and not filter(name, module):
            reason = "the filter left it out"
        if reason is None:
            chosen.append((name, module))
        else:
            report.skipped[name] = reason
    for name, module in chosen:
        if is_msn:
            in_place.to_msn(module, norm, momentum=momentum, gain=gain, process_group=process_group)
        else:
            parametrizations.spectral_norm(module, **norm)
        report.touched.append(f"{name}.weight" if name else "weight")
    accelerate(model)
    return report
