"""``fastsn.nn.convert_batchnorm``: batch normalization becomes mean-only, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from fastsn.grouping import accelerate
from fastsn.means import Group
from fastsn.nn import checkpoints, in_place, mean_only
from fastsn.nn.batch_norms import WithoutVariance
from fastsn.nn.msn import MeanNormalized
from fastsn.nn.pairs import find
from fastsn.report import Report

__all__ = ["convert_batchnorm"]


class MeanOnlyBatchNorm(mean_only._MeanOnlyBatchNorm):
    """In the place of a SyncBatchNorm, which takes inputs of every dimension."""

    _dims = (2, 3, 4, 5)


# What each class becomes when it stands alone, and the dimensions of layers that it can follow.
_NORMS: dict[type[nn.Module], tuple[type[mean_only._MeanOnlyBatchNorm], tuple[int, ...]]] = {
    nn.BatchNorm1d: (mean_only.MeanOnlyBatchNorm1d, (0, 1)),
    nn.BatchNorm2d: (mean_only.MeanOnlyBatchNorm2d, (2,)),
    nn.BatchNorm3d: (mean_only.MeanOnlyBatchNorm3d, (3,)),
    nn.SyncBatchNorm: (MeanOnlyBatchNorm, (0, 1, 2, 3)),
}


class Pair(NamedTuple):
    """The names of a layer and of the norm that was behind it, and the eps of that norm."""

    layer: str
    norm: str
    eps: float


class LoadPairs:
    """Pre-hook of ``load_state_dict``: state dicts from before a conversion load after it."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        modules = dict(module.named_modules())
        for pair in self.pairs:
            layer: Any = modules.get(pair.layer)
            if not isinstance(layer, MeanNormalized):
                continue  # folded since, or replaced
            norm = checkpoints.take_batch_norm(state, f"{prefix}{pair.norm}.")
            if norm:
                own = f"{prefix}{pair.layer}."
                factor = checkpoints.load_weight(layer, state, own)
                new = checkpoints.mean_only_state(
                    norm,
                    eps=pair.eps,
                    gain=layer.gain is not None,
                    shift=state.pop(f"{own}bias", None),
                    factor=factor,
                )
                state.update({own + key: value for key, value in new.items()})


def convert_batchnorm(
    model: nn.Module,
    *,
    pairs: Mapping[str, str] | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    gain: bool = False,
    process_group: Group = None,
    norm: str = "matrix",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    scale: float = 1.0,
    bound: bool = False,
    zero_guard: bool = False,
) -> Report:
    """Replaces batch normalization by mean spectral normalization (MSN), and accelerates the model.

    A convolution or linear layer whose output goes into a batch norm and nowhere else becomes an
    ``MSN...`` layer, and the norm ``nn.Identity``. Any other batch norm becomes a
    ``MeanOnlyBatchNorm...``. All of them change their class in place: references, hooks and
    optimizers stay valid. The weight and the norm's bias remain the parameters they were; a bias of
    the layer, which the norm took away again, goes.

    Pairs are found by tracing the model symbolically (``torch.fx``), in the mode it is in and
    without a number being computed. Where a forward cannot be traced, modules within it are traced
    on their own, so that what an ``nn.Sequential`` holds is found; the report names the norms whose
    input nobody knows, and ``pairs`` can help.

    Bias, running mean (of the normalized weight's output), momentum, number of batches, training
    mode and process group carry over. The variance does not: without ``gain`` outputs change by one
    factor per channel, and the model is to be trained on. With it, ``gain`` takes up running
    variance, gamma and sigma, and outputs in eval mode stay what they were, to rounding.

    State dicts from before the conversion load into the model after it, in the same manner.

    Args:
        model: changed in place. Convert before wrapping it in ``DistributedDataParallel``.
        pairs: names of layers, and of the norms that take their output, ``{"conv1": "bn1"}``; goes
            before what is found, and before ``filter``.
        filter: which batch norms; called with the name and the module.
        gain: see above. A norm that had no gamma gets a trainable gain as well.
        process_group: of the new layers, see :class:`MSNConv2d`. Synchronized batch norms keep
            theirs if it is None.
        norm, n_power_iterations, eps, scale, bound, zero_guard: of the weights that have no
            spectral norm yet, see :func:`fastsn.parametrizations.spectral_norm`.

    Returns:
        A report of what was touched, and of what was skipped and why; print it.

    Raises:
        ValueError: ``pairs`` names what is not there or what cannot be a pair, the model is a
            ``DistributedDataParallel``, or one of the other arguments is not valid. The model is
            unchanged then.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(fastsn.nn.convert_batchnorm(model, gain=True))
        msn applied to 1 layers, 0 skipped
          + 0 + 1 -> MSNConv2d

    Source: Subramanian, Chong, CASE 2019 (arXiv 1907.04003), for the layers.
    """
    method: dict[str, Any] = {
        "norm": norm, "n_power_iterations": n_power_iterations, "eps": eps, "scale": scale,
        "bound": bound, "zero_guard": zero_guard,
    }  # fmt: skip
    in_place.check(**method)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "expected a model that is not wrapped yet, got DistributedDataParallel, which has "
            "taken note of the parameters: convert first"
        )
    modules = dict(model.named_modules())
    layers = _checked(pairs or {}, modules, gain)
    report = Report("msn", kind="layers")
    norms = []
    for name, module in modules.items():
        if isinstance(module, _NormBase) and not isinstance(module, WithoutVariance):
            reason = _why_not(module, modules, gain)
            if reason is None and name not in layers and filter and not filter(name, module):
                reason = "the filter left it out"
            if reason is None:
                norms.append(name)
            else:
                report.skipped[name] = reason
    _find(model, norms, modules, layers, report)

    joined = []
    for name in norms:
        old: Any = modules[name]
        if name in layers:
            joined.append(Pair(layers[name], name, old.eps))
            new = modules[layers[name]]
            _join(new, old, gain, process_group, method)
        else:
            new = old
            _stand_alone(old, gain, process_group)
        shown = f"{layers[name]} + {name}" if name in layers else name or "the model"
        kind = parametrize.type_before_parametrizations(new)
        report.touched.append(f"{shown} -> {kind.__name__}")
    if not norms and not report.skipped:
        report.notes.append("nothing to do: there is no batch norm")
    elif norms and not gain:
        report.notes.append(
            "variances are no longer normalized: outputs change by a factor per channel, unless "
            "gain=True"
        )
    if joined:
        model.register_load_state_dict_pre_hook(LoadPairs(joined))
        accelerate(model)
    return report


def _checked(pairs: Mapping[str, str], modules: dict[str, nn.Module], gain: bool) -> dict[str, str]:
    """``{norm: layer}`` of the pairs that the user names, which must all be possible."""
    for layer, norm in pairs.items():
        for name in (layer, norm):
            if name not in modules:
                raise ValueError(
                    f"pairs must name modules of the model, got {name!r}; there are "
                    f"{', '.join(filter(None, modules)) or 'none'}"
                )
        reason = _why_no_pair(layer, norm, modules)
        if not isinstance(modules[norm], _NormBase) or _why_not(modules[norm], modules, gain):
            reason = f"{norm}: {_why_not(modules[norm], modules, gain)}"
        if reason is not None:
            raise ValueError(
                "pairs must be of a convolution or linear layer and of the batch norm behind it, "
                f"got {layer!r}: {norm!r} ({reason})"
            )
    layers = {norm: layer for layer, norm in pairs.items()}
    if len(layers) < len(pairs):
        raise ValueError(f"pairs must name every norm once, got {dict(pairs)}")
    return layers


def _why_not(norm: Any, modules: dict[str, nn.Module], gain: bool) -> str | None:
    """Why a norm cannot become a mean-only one, or None if it can."""
    if isinstance(norm, LazyModuleMixin):
        return "it is not initialized: run a forward first"
    if type(norm) not in _NORMS:
        names = ", ".join(cls.__name__ for cls in _NORMS)
        return f"{type(norm).__name__} is none of {names}"
    if gain and norm.weight is not None:
        every = Counter(id(p) for module in modules.values() for p in module._parameters.values())
        if every[id(norm.weight)] > 1:
            return "its weight is that of another module too, and cannot be the gain of both"
    return None


def _why_no_pair(layer: str, norm: str, modules: dict[str, Any]) -> str | None:
    """Why a layer and the norm behind it cannot become one layer, or None if they can."""
    first, second = modules[layer], modules[norm]
    reason = in_place.why_not(first)
    if reason is not None or type(second) not in _NORMS:
        return reason
    if len(getattr(first, "kernel_size", ())) not in _NORMS[type(second)][1]:
        return f"{norm} is a {type(second).__name__}"
    channels = in_place.channels(first)
    if channels != second.num_features:
        return f"it has {channels} outputs, and {norm} has {second.num_features} features"
    return None


def _find(
    model: nn.Module,
    norms: list[str],
    modules: dict[str, nn.Module],
    layers: dict[str, str],
    report: Report,
) -> None:
    """Adds to ``layers`` those that norms without one follow, and to the report why not."""
    unknown = [name for name in norms if name not in layers]
    if not unknown:
        return
    found = find(model, unknown)
    near = dict(found.near)
    for norm, layer in found.pairs.items():
        reason = _why_no_pair(layer, norm, modules)
        if layer in layers.values():
            reason = "pairs names another norm for it"
        if reason is None:
            layers[norm] = layer
        else:
            near[norm] = layer, reason
    for layer in dict.fromkeys(layer for layer, _ in near.values()):
        reasons = {norm: reason for norm, (other, reason) in near.items() if other == layer}
        why = ", ".join(dict.fromkeys(reasons.values()))
        report.skipped[layer] = f"no pair with {', '.join(reasons)}: {why}"
    lost: dict[str, list[str]] = {}
    for norm in unknown:
        if norm in found.seen:
            continue
        around = [name for name in found.failed if not name or norm.startswith(f"{name}.")]
        if around:
            lost.setdefault(max(around, key=len), []).append(norm)
        else:
            report.notes.append(f"{norm} is not called in the mode that the model is in")
    for name, inside in lost.items():
        report.notes.append(
            f"{name or type(model).__name__} cannot be traced ({found.failed[name]}): what "
            f"comes before {', '.join(inside)} is not known, pairs= can name it"
        )


class _Old(NamedTuple):
    """What of a batch norm carries over."""

    state: dict[str, Tensor]
    parameters: dict[str, nn.Parameter | None]
    settings: dict[str, Any]
    eps: float


def _take_apart(norm: Any, process_group: Group, replacement: type[nn.Module]) -> _Old:
    """Makes an empty module of another class of a batch norm."""
    if process_group is None and type(norm) is nn.SyncBatchNorm:
        process_group = norm.process_group or "world"
    old = _Old(
        {
            name: value.detach()
            for name in checkpoints.BATCH_NORM
            if (value := getattr(norm, name)) is not None
        },
        dict(norm._parameters),
        {
            "momentum": norm.momentum,
            "track_running_stats": norm.running_mean is not None,
            "process_group": process_group,
        },
        norm.eps,
    )
    norm.__class__ = replacement
    for table in (norm._parameters, norm._buffers, norm._non_persistent_buffers_set):
        table.clear()
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        delattr(norm, name)
    norm.__dict__.pop("process_group", None)
    return old


@torch.no_grad()
def _fill(new: Any, old: _Old, state: dict[str, Tensor]) -> None:
    """Hands a layer with a running mean what it has from a batch norm."""
    new.bias = old.parameters["bias"]
    if new.running_mean is not None:
        new.running_mean.copy_(state["running_mean"])
        new.num_batches_tracked.copy_(state["num_batches_tracked"])
    if new.gain is not None:
        if old.parameters["weight"] is not None:
            new.gain = old.parameters["weight"]
        if "gain" in state:
            new.gain.copy_(state["gain"])


def _join(layer: Any, norm: Any, gain: bool, process_group: Group, method: dict[str, Any]) -> None:
    """Makes an MSN layer of a layer and the norm behind it, of which an identity remains."""
    was_normalized = in_place.is_normalized(layer)
    shift = None if layer.bias is None else layer.bias.detach()
    old = _take_apart(norm, process_group, nn.Identity)
    in_place.to_msn(layer, method, gain=gain, **old.settings)
    factor = 1.0
    if not was_normalized:
        weight = layer.parametrizations.weight
        (norm_of,) = weight
        u, v = norm_of.vectors(norm_of)
        factor = checkpoints.factor(norm_of, weight.original.detach(), u, v)
    state = checkpoints.mean_only_state(
        old.state, eps=old.eps, gain=gain, shift=shift, factor=factor
    )
    _fill(layer, old, state)
    layer.training = layer.batch_norm.training = norm.training


def _stand_alone(norm: Any, gain: bool, process_group: Group) -> None:
    """Makes a mean-only norm of a batch norm."""
    features = norm.num_features
    old = _take_apart(norm, process_group, _NORMS[type(norm)][0])
    norm.num_features = features
    norm.old_eps = old.eps  # for state dicts of batch norms that come later
    like = next(iter(old.state.values()), torch.empty(0))
    norm.start(features, gain=gain, like=like, **old.settings)
    _fill(norm, old, checkpoints.mean_only_state(old.state, eps=old.eps, gain=gain))
