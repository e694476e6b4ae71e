"""Whole models: all normalized weights in one call, and the calls that users make on a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsn import functional, parametrizations, reference
from fastsn.functional import Call
from fastsn.layers import Layer, find, take_over

__all__ = ["Report", "accelerate", "apply", "fold", "refresh", "sigmas"]

T_module = TypeVar("T_module", bound=nn.Module)


class Batch(NamedTuple):
    """Layers that one call of the operators serves, and the constants of that call."""

    layers: list[Layer]
    call: Call

    def run(self) -> list[Tensor]:
        """The normalized weights; iterates as the layers' modes say."""
        weights = [layer.weight() for layer in self.layers]
        u, v = self.vectors()
        iterations = [layer.iterations() for layer in self.layers]
        normalized, snapshot = functional.normalize(self.call, weights, u, v, iterations)
        if any(layer.keeps_sigma for layer in self.layers):
            for layer, sigma in zip(self.layers, self.sigmas_of(snapshot), strict=True):
                layer.keep_sigma(sigma)
        return normalized

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        """All u and all v, one of each per estimate."""
        u: list[Tensor] = []
        v: list[Tensor] = []
        for layer in self.layers:
            own_u, own_v = layer.vectors()
            u += own_u
            v += own_v
        return u, v

    def sigmas_of(self, snapshot: Tensor) -> list[Tensor]:
        """The sigma of every layer, out of a snapshot of this batch."""
        return reference.sigmas_of(snapshot, self.call.layers)


def _kind(weight: Tensor) -> tuple[torch.device, torch.dtype]:
    return weight.device, reference.accumulate_type(weight)


def _batches(layers: Iterable[Layer]) -> list[Batch]:
    """The layers sorted into as few calls as their devices, types and constants allow."""
    found: dict[tuple[Any, ...], list[tuple[Layer, Call]]] = {}
    for layer in layers:
        call = layer.call()
        key = (*_kind(layer.weight()), call.eps, call.v_first, call.bound, call.zero_guard)
        found.setdefault(key, []).append((layer, call))
    batches = []
    for members in found.values():
        first = members[0][1]
        call = functional.make_call(
            [own.dims for _, own in members],
            [own.scales[0] for _, own in members],
            first.eps,
            first.v_first,
            first.bound,
            first.zero_guard,
        )
        batches.append(Batch([layer for layer, _ in members], call))
    return batches


class Group:
    """All layers below one root module. As hooks of the root it serves each of its forwards."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.layers: list[Layer] = list(find(root))
        self._kinds: list[tuple[torch.device, torch.dtype]] | None = None
        self._batches: list[Batch] = []
        self.batches()

    def batches(self) -> list[Batch]:
        """The calls to make, planned anew when layers were removed, moved or cast."""
        if not all(layer.alive() for layer in self.layers):
            self.layers = [layer for layer in self.layers if layer.alive()]
            self._kinds = None
        kinds = [_kind(layer.weight()) for layer in self.layers]
        if kinds != self._kinds:
            self._batches = _batches(self.layers)
            self._kinds = kinds
        return self._batches

    def before(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the root: computes all weights and hands them to the layers."""
        # A replica of DataParallel shares this hook but not its layers; they serve themselves. So do
        # those of a root within another accelerated root, which has served them already.
        if module is not self.root or any(layer.has_weight() for layer in self.layers):
            return
        for batch in self.batches():
            for layer, weight in zip(batch.layers, batch.run(), strict=True):
                layer.put(weight)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the root: a weight that nothing has read must not be read later."""
        if module is self.root:
            for layer in self.layers:
                layer.take_back()


def _groups(model: nn.Module) -> list[tuple[dict[int, Any], int, Group]]:
    """The groups hooked to this very module, each with the dictionary and key of its hook."""
    found = []
    for registered in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in registered.items():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Group):
                found.append((registered, key, owner))
    return found


def _remove_groups(model: nn.Module) -> None:
    for registered, key, _ in _groups(model):
        del registered[key]
        model._forward_hooks_always_called.pop(key, None)


def _group_of(model: nn.Module) -> Group:
    for _, _, group in _groups(model):
        if group.root is model:
            return group
    return Group(model)


def accelerate(model: T_module) -> T_module:
    """Serves all spectrally normalized weights of a model by one fused call per forward.

    Takes over, in place, the layers that carry ``torch.nn.utils.spectral_norm``,
    ``torch.nn.utils.parametrizations.spectral_norm``, fastsn's own, or a ``W_()`` method as in
    BigGAN-PyTorch. Numbers, buffers, parameters and checkpoint keys stay what they were, to rounding.

    Each forward of ``model`` computes the normalized weights of all layers below it at once, one
    power iteration step as configured in training mode, none in eval mode, and the first read of a
    layer's weight in that forward finds it. Every other read computes by itself, as before: a layer
    used a second time in the same forward (torch iterates for each use), a sub-module called on its
    own, a weight read outside. Two forwards before one backward are safe. The one difference from
    torch: a layer that a forward does not use iterates too. Calling ``accelerate`` again takes in
    layers that were added since.

    Args:
        model: the module whose forward is called in training, for example a discriminator.

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
    take_over(model)
    _remove_groups(model)
    group = Group(model)
    if not group.layers:
        warnings.warn(
            f"fastsn.accelerate found no layer with spectral norm in {type(model).__name__}",
            stacklevel=2,
        )
    model.register_forward_pre_hook(group.before, prepend=True)
    model.register_forward_hook(group.after, always_call=True)
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
    return {
        layer.name: layer.finish(weight)
        for batch in _group_of(model).batches()
        for layer, weight in zip(batch.layers, batch.run(), strict=True)
    }


@torch.no_grad()
def sigmas(model: nn.Module) -> dict[str, Tensor]:
    """The present estimate of sigma of every layer, without iterating or waiting for a device.

    sigma = u^T M v with the present weight and the u, v of the last forward (BSN: the mean over both
    matrices): what a forward in eval mode divides by.

    Returns:
        ``{"conv1.weight": 0-d tensor, ...}`` in fp32 or wider, without gradient.

    Example::

        >>> {name: float(sigma) for name, sigma in fastsn.sigmas(model).items()}
    """
    result: dict[str, Tensor] = {}
    for batch in _group_of(model).batches():
        weights = [layer.weight() for layer in batch.layers]
        u, v = batch.vectors()
        snapshot = functional.estimate(batch.call, weights, u, v)
        for layer, sigma in zip(batch.layers, batch.sigmas_of(snapshot), strict=True):
            result[layer.name] = sigma
    return result


def fold(model: T_module) -> T_module:
    """A copy of the model with plain layers that hold the normalized weights, for inference.

    The weights are those of eval mode. Nothing of fastsn or of a parametrization is left: no power
    iteration, no division, no u and v in the graph or in checkpoints. The model itself stays.

    Example::

        >>> plain = fastsn.fold(model).eval()
        >>> torch.export.export(plain, (x,))
    """
    folded = copy.deepcopy(model)
    for module in folded.modules():
        _remove_groups(module)
    for layer in list(find(folded)):
        layer.fold()
    return folded


@dataclass
class Report:
    """What :func:`apply` did: names of weights touched, and of modules skipped with the reason."""

    method: str
    touched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.method} applied to {len(self.touched)} weights, {len(self.skipped)} skipped"]
        lines += [f"  + {name}" for name in self.touched]
        lines += [f"  - {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


_METHODS = {"sn": "matrix", "bsn": "bidirectional"}
_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.EmbeddingBag,
)


def _why_not(name: str, module: nn.Module, normalized: Sequence[nn.Module]) -> str | None:
    if not isinstance(module, _LAYERS):
        return f"{type(module).__name__} is no convolution, linear or embedding layer"
    if module in normalized or parametrize.is_parametrized(module, "weight"):
        return "its weight is normalized or parametrized already"
    weight = module._parameters.get("weight")
    if weight is None:
        return "it has no parameter `weight` of its own"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialized: run a forward first"
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"its weight has type {weight.dtype}"
    return None


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
) -> Report:
    """Normalizes every layer of a plain model, and accelerates it.

    Convolution, transposed convolution, linear, bilinear and embedding layers get
    :func:`fastsn.parametrizations.spectral_norm` on their ``weight``. Layers that share a weight get
    vectors of their own each.

    Args:
        model: changed in place.
        method: ``"sn"`` or ``"bsn"``; with ``scale``: SSN, BSSN.
        filter: which layers; called with the module's name and the module.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

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
    functional.check_method(_METHODS[method], scale, bound, zero_guard)
    if n_power_iterations <= 0:
        raise ValueError(
            f"Expected n_power_iterations to be positive, but got {n_power_iterations=}"
        )
    normalized = [layer.module for layer in find(model)]
    report = Report(method)
    chosen = []
    for name, module in model.named_modules():
        if not isinstance(module, _LAYERS) and not module._parameters:
            continue
        reason = _why_not(name, module, normalized)
        if reason is None and filter is not None and not filter(name, module):
            reason = "the filter left it out"
        if reason is None:
            chosen.append((name, module))
        else:
            report.skipped[name] = reason
    for name, module in chosen:
        parametrizations.spectral_norm(
            module,
            n_power_iterations=n_power_iterations,
            eps=eps,
            norm=_METHODS[method],
            scale=scale,
            bound=bound,
            zero_guard=zero_guard,
        )
        report.touched.append(f"{name}.weight" if name else "weight")
    accelerate(model)
    return report
