"""Checkpoints of every spectral norm: detected when they are loaded, or converted as a whole.

:mod:`fastsn.checkpoints.forms` knows a single weight; here are modules and state dicts.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastsn.checkpoints import forms
from fastsn.checkpoints.forms import Entry, Norm
from fastsn.weights import find
from fastsn.weights.find import Weight

__all__ = ["convert_state_dict"]

# What wrappers of torch put into the names of modules.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Loading


def load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of ``load_state_dict``: brings the weights of a module into the forms it has.

    Whatever is not whole or does not fit is left to torch, which reports it in its own words.
    """
    weights = list(find.of_module(module))
    for weight in weights:
        # u and v of the hook form are not the random ones any more.
        if weight.form == "hook" and weight.is_ours and f"{prefix}{weight.tensor_name}_v" in state:
            weight.norm.drawn = None
    if all(_is_as_here(weight, state, prefix) for weight in weights):
        return
    for norm in list(forms.norms(module)):
        assert norm.form is not None
        found = forms.read(state, prefix, norm.name)
        if found is None or (norm.form in forms.WITHOUT_V and "u2" in found.roles):
            continue
        if forms.misfit(found, norm):
            own = forms.read(module.state_dict(), "", norm.name)
            roles = found.roles if own is None else own.roles | found.roles
        else:
            roles = forms.converted(found, norm.form, norm)
        for key in found.keys:
            del state[key]
        original = roles["weight"]
        roles = {
            k: forms.widened(x, original) if k in forms.VECTORS else x for k, x in roles.items()
        }
        state.update(forms.written(norm.form, prefix, norm.name, roles))


def _is_as_here(weight: Weight, state: dict[str, Any], prefix: str) -> bool:
    """Whether a state dict has a weight just as the module does, so that nothing is to be done."""
    name = weight.tensor_name
    if weight.form == "parametrization":
        own = f"{prefix}parametrizations.{name}.original"
    elif weight.form == "hook" and prefix + name not in state:
        own = f"{prefix}{name}_orig"
    else:
        return False
    given = state.get(own)
    if not weight.is_first or given is None or given.shape != weight.original().shape:
        return False
    for key, vector in weight.buffers().items():
        given = state.get(prefix + key)
        if given is None or given.shape != vector.shape or given.element_size() < 4:
            return False
    return True


def install(module: nn.Module) -> None:
    """Lets a module load the weights that fastsn normalizes, if any, from every form."""
    hooks = module._load_state_dict_pre_hooks
    if any(_is_own(hook) for hook in hooks.values()):
        return
    if any(norm.is_ours for norm in forms.norms(module)):
        handle = module.register_load_state_dict_pre_hook(load)
        hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]  # before torch's


def uninstall(module: nn.Module) -> None:
    """Takes back :func:`install`, where nothing is normalized any more."""
    hooks = module._load_state_dict_pre_hooks
    if not any(forms.norms(module)):
        for key in [key for key, hook in hooks.items() if _is_own(hook)]:
            del hooks[key]


def _is_own(hook: Any) -> bool:
    return getattr(hook, "hook", None) is load


# Conversion of whole state dicts


def _canonical(prefix: str) -> str:
    return ".".join(part for part in prefix.split(".") if part not in _WRAPPERS)


def _place(key: str) -> tuple[str, str, bool]:
    """(prefix, name) of the weight that a key may belong to; whether the key alone says so."""
    match = re.fullmatch(r"((?:.*\.)?)parametrizations\.([^.]+)\.(original|\d+\._u)", key)
    if match:
        return match[1], match[2], match[3] != "original"
    prefix, dot, last = key.rpartition(".")
    if last in ("sv0", "sn_u", "sn_sigma"):
        return prefix + dot, "weight", True
    return prefix + dot, last.removesuffix("_orig"), last.endswith("_orig")


def _complain(state: Mapping[str, Any], key: str, prefix: str, name: str) -> None:
    """Raises ValueError for a weight that is not whole."""
    for form in forms.KEYS:
        found = forms.look(state, form, prefix, name)
        absent = forms.missing(found)
        if key in found.keys and absent:
            raise ValueError(
                f"expected {absent} besides {key!r} in state_dict, as the form {form!r} has them; "
                f"got {found.keys}"
            )
    others = forms.others(state, forms.look(state, "parametrization", prefix, name))
    raise ValueError(
        f"expected {prefix + name!r} to have a spectral norm as its only parametrization, got "
        f"others as well, with {others}"
    )


def _find(state: Mapping[str, Any], to: str, known: Mapping[str, Norm]) -> list[tuple[Entry, Norm]]:
    """The normalized weights of a state dict, and how they are normalized."""
    found: dict[tuple[str, str], tuple[Entry, Norm]] = {}
    for key in state:
        prefix, name, is_sure = _place(key)
        norm = known.get(_canonical(prefix) + name)
        is_pruned = f"{prefix}{name}_mask" in state
        if (prefix, name) in found or is_pruned or not (is_sure or norm):
            continue
        weight = forms.read(state, prefix, name)
        if weight is not None and (norm or weight.form != "plain"):
            found[prefix, name] = weight, norm or Norm(name)
        elif is_sure and not (to == "parametrization" and ".parametrizations." in f".{key}"):
            _complain(state, key, prefix, name)
    return list(found.values())


def _check(found: Entry, to: str, norm: Norm) -> None:
    """Raises ValueError for a weight that cannot be brought into the form ``to``."""
    keys = forms.keys_of(found.form, found.prefix, found.name)
    misfit = forms.misfit(found, norm)
    if misfit:
        model = "" if norm.shape is None else f" and the model's {tuple(norm.shape)}"
        dim = "" if norm.dim is None else f" along dim={norm.dim}"
        raise ValueError(
            f"expected {keys[misfit]!r} to fit {keys['weight']!r} of shape "
            f"{tuple(found.roles['weight'].shape)}{model}{dim}, got shape "
            f"{tuple(found.roles[misfit].shape)}"
        )
    if to in forms.WITHOUT_V and found.name != "weight":
        raise ValueError(
            f"expected names 'weight', the only ones of the form {to!r}, got {keys['weight']!r}"
        )
    if to in forms.WITHOUT_V and (norm.method.norm != "matrix" or "u2" in found.roles):
        raise ValueError(f"the form {to!r} has no place for BSN, which {keys['weight']!r} has")


def _note(metadata: dict[str, Any], found: Entry, to: str) -> None:
    """Brings the metadata of a state dict into another form."""
    module, name = found.prefix[:-1], found.name
    lists = [f"{found.prefix}parametrizations{end}" for end in ("", f".{name}", f".{name}.0")]
    version = f"{name}.version"
    if found.form == "hook":
        versions = metadata.get(module, {}).get("spectral_norm", {})
        versions.pop(version, None)
        if not versions:
            metadata.get(module, {}).pop("spectral_norm", None)
    if found.form == "parametrization":
        for path in lists:
            metadata.pop(path, None)
    if to == "hook":
        metadata.setdefault(module, {}).setdefault("spectral_norm", {})[version] = 1
    if to == "parametrization":
        for path in lists:
            metadata[path] = {"version": 1}


def convert_state_dict(
    state_dict: Mapping[str, Any], to: str = "parametrization", *, model: nn.Module | None = None
) -> dict[str, Any]:
    """A state dict whose spectrally normalized weights are in another form.

    The forms are ``"hook"`` (``torch.nn.utils.spectral_norm`` and :func:`fastsn.spectral_norm`),
    ``"parametrization"`` (``torch.nn.utils.parametrizations.spectral_norm`` and fastsn's layers),
    ``"biggan"`` (BigGAN-PyTorch), ``"mimicry"`` and ``"plain"``, the normalized weights themselves.
    The form of each weight is detected, and several may be mixed. fastsn's layers, and those of
    accelerated models, load all of them without this function.

    What a model computes in eval mode stays: u and v are carried over as they are, and where a form
    keeps u alone, v is what its eval mode computes from it. Towards ``"biggan"`` and ``"mimicry"``,
    which iterate in eval mode, sigma is that of one step more. From ``"plain"``, u and v are those
    of 100 steps from vectors that depend on the shape only; sigma of a large random matrix, the
    slowest to converge, is then 0.1% too small.

    Args:
        state_dict: as ``model.state_dict()`` returns it, or read from a file. It stays as it is;
            the result shares the tensors that need not change.
        to: the form.
        model: a model with the same weights, all of them normalized as those of the state dict
            are, in any form: says which plain weights are meant, and the dimension, norm, scale and
            bound of each. Without it a weight is normalized along the dimension that u has the
            length of; if several have it, the one that fits u and v better, or the first in the
            forms that keep no v; BSN is known by its second vectors, and scale is 1. Prefixes of
            ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` may differ.

    Returns:
        The new state dict, with the metadata that torch needs if ``state_dict`` has any.

    Raises:
        ValueError: an unknown form; no normalized weight was found; keys of a weight are missing or
            do not fit each other or the model; a weight that the form has no place for.

    Example::

        >>> state = fastsn.convert_state_dict(torch.load("biggan.pth"), "hook")
        >>> model.load_state_dict(state)  # with torch.nn.utils.spectral_norm
    """
    if to not in forms.KEYS:
        raise ValueError(f"to must be one of {tuple(forms.KEYS)}, got {to!r}")
    known = {}
    for path, module in model.named_modules(remove_duplicate=False) if model is not None else ():
        for norm in forms.norms(module):
            known[_canonical(f"{path}." if path else "") + norm.name] = norm
    weights = _find(state_dict, to, known)
    if not weights and to != "plain":
        raise ValueError(
            "expected a state_dict with spectrally normalized weights, got none among "
            f"{list(state_dict)[:5]}...; for plain ones give model=, whose layers are normalized"
        )
    owners: dict[str, int] = {}
    for i, (found, norm) in enumerate(weights):
        _check(found, to, norm)
        owners.update(dict.fromkeys(found.keys, i))
    metadata = copy.deepcopy(getattr(state_dict, "_metadata", None))
    new: OrderedDict[str, Any] = OrderedDict()
    done: set[int] = set()
    for key, value in state_dict.items():
        owner = owners.get(key)
        if owner is None:
            new[key] = value
        elif owner not in done:
            done.add(owner)
            found, norm = weights[owner]
            roles = forms.converted(found, to, norm)
            new.update(forms.written(to, found.prefix, found.name, roles))
            if metadata is not None:
                _note(metadata, found, to)
    if metadata is not None:
        new._metadata = metadata  # type: ignore[attr-defined]
    return new
