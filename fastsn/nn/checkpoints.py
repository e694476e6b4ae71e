"""State dicts of other layers, brought into the form of those with a running mean.

What a batch norm's statistics become is said once, here, for models in memory and for files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsn import engine, layout
from fastsn.checkpoints import convert, forms
from fastsn.engine import Pass

#: The entries of a batch norm's state dict.
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_ORIGINAL = "parametrizations.weight.original"
#: torch's default, where nobody knows the eps of the batch norm that a file is of.
_EPS = 1e-5


@torch.no_grad()
def mean_only_state(
    norm: Mapping[str, Tensor],
    *,
    eps: float,
    gain: bool,
    shift: Tensor | None = None,
    factor: float = 1.0,
) -> dict[str, Tensor]:
    """The state of a mean-only norm that takes the place of a batch norm with the state ``norm``.

    The batch norm saw ``x + shift``, and its successor sees ``factor * x``. With ``gain`` both do
    the same in eval mode, to rounding; without, the scale is lost.
    """
    state = {name: norm[name] for name in ("bias", "num_batches_tracked") if name in norm}
    if "running_mean" in norm:
        mean = norm["running_mean"]
        mean = mean.to(layout.accumulate_type(mean))
        state["running_mean"] = (mean if shift is None else mean - shift) * factor
        # Batch norms of old did not count.
        state.setdefault("num_batches_tracked", torch.zeros((), dtype=torch.long))
    weight, var = norm.get("weight"), norm.get("running_var")
    if gain and var is not None:
        value = (var.to(layout.accumulate_type(var)) + eps).rsqrt()
        value = value if weight is None else value * weight
        state["gain"] = value / factor if factor else value
    elif gain and weight is not None:
        state["gain"] = weight
    return state


@torch.no_grad()
def factor(norm: Any, weight: Tensor, u: list[Tensor], v: list[Tensor]) -> float:
    """f in ``normalized weight = f * weight``, where u and v stay; 0 for a weight of zeros."""
    if weight.is_meta:
        return 1.0  # there are no numbers yet
    work = Pass(norm.call(norm, weight.shape), [weight], u, v, [0])
    normalized = engine.normalize(work)[0][0]
    wide = layout.accumulate_type(weight)
    flat = weight.flatten().to(wide)
    square = float(flat.dot(flat))
    return float(flat.dot(normalized.flatten().to(wide))) / square if square else 0.0


def load_weight(layer: Any, state: dict[str, Any], prefix: str) -> float:
    """Brings the weight of a layer, in whatever form, into that of the parametrization.

    Returns f in ``normalized weight = f * weight of that layer in eval mode``: 1, unless the weight
    was a plain one.
    """
    found = forms.read(state, prefix, "weight")
    convert.load(layer, state, prefix)
    original, norm = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    if found is None or found.form != "plain" or found.roles["weight"].shape != original.shape:
        return 1.0
    vectors = forms.look(state, "parametrization", prefix, "weight").roles
    u, v = (
        [vectors[role] for role in pair if role in vectors] for pair in (("u", "u2"), ("v", "v2"))
    )
    return factor(norm, found.roles["weight"].detach().to(original), u, v)


def load_layer(layer: Any, state: dict[str, Any], prefix: str) -> None:
    """Brings the state of a plain or spectrally normalized layer into that of an MSN layer.

    A layer that knows nothing of means starts with a mean and a bias of 0, and a gain of 1.
    """
    load_weight(layer, state, prefix)
    own = ("running_mean", "num_batches_tracked", "gain")
    if prefix + _ORIGINAL not in state or any(prefix + name in state for name in own):
        return
    for name in (*own, "bias"):
        value = getattr(layer, name)
        if value is not None:
            start = torch.ones_like(value) if name == "gain" else torch.zeros_like(value)
            state.setdefault(prefix + name, start.detach())
    if layer.bias is None:
        state.pop(prefix + "bias", None)  # would be taken away with the mean


def take_batch_norm(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Takes the state of a batch norm out of a state dict, by its names without the prefix."""
    return {name: state.pop(prefix + name) for name in BATCH_NORM if prefix + name in state}


def load_batch_norm(layer: Any, state: dict[str, Any], prefix: str) -> None:
    """Brings the state of a batch norm into that of a mean-only one."""
    if prefix + "weight" not in state and prefix + "running_var" not in state:
        return
    norm = take_batch_norm(state, prefix)
    found = mean_only_state(norm, eps=getattr(layer, "old_eps", _EPS), gain=layer.gain is not None)
    state.update({prefix + name: value for name, value in found.items()})
