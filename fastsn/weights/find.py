"""The spectrally normalized weights of a model, whatever their form and whoever normalizes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastsn.engine import Call
from fastsn.sharded import placements
from fastsn.weights import biggan, hooked, parametrized
from fastsn.weights.biggan import BigGanNorm
from fastsn.weights.hooked import TorchHook
from fastsn.weights.normalizer import Normalizer
from fastsn.weights.parametrized import TorchParametrization

#: The classes whose objects a grouped call serves; one derived from them may do anything.
_EXACT = (parametrized._SpectralNorm, hooked.SpectralNorm, BigGanNorm)
_VECTORS: tuple[str, ...] = ("_u", "_v", "_u2", "_v2")


class Weight(NamedTuple):
    """One normalized weight of a model."""

    module: Any  # the layer that has it
    path: str  # of that layer in the model, with a dot behind it
    tensor_name: str
    form: str
    norm: Any  # its normalizer, or torch's object; None: the layer itself does it
    holder: Any  # the module whose buffers u and v are

    @property
    def name(self) -> str:
        """Such as "conv1.weight"."""
        return self.path + self.tensor_name

    @property
    def is_ours(self) -> bool:
        """Whether fastsn normalizes it, or a class derived from fastsn's."""
        return isinstance(self.norm, Normalizer)

    @property
    def is_first(self) -> bool:
        """Whether nothing else has changed the weight before."""
        if self.form != "parametrization":
            return True
        norms = parametrized.all_of(self.module, self.tensor_name)
        return norms._modules["0"] is self.norm and norms.is_tensor

    def buffers(self) -> dict[str, Tensor]:
        """u, v and what else moves with them, by the names that they have in the model."""
        prefix, names = self.path, _VECTORS
        if self.form == "parametrization":
            norms = parametrized.all_of(self.module, self.tensor_name)._modules.items()
            index = next(i for i, norm in norms if norm is self.norm)
            prefix = f"{prefix}parametrizations.{self.tensor_name}.{index}."
        elif self.form == "biggan":
            names = ("u0", "sv0")
        else:
            names = tuple([self.tensor_name + name for name in _VECTORS])
        held = self.holder._buffers
        return {prefix + name: held[name] for name in names if held.get(name) is not None}

    def original(self) -> Tensor:
        """The weight that is first normalized, as the layer has it now."""
        if self.form == "parametrization":
            norms = parametrized.all_of(self.module, self.tensor_name)
            original = norms._parameters.get("original")
            return norms.original if original is None else original
        suffix = "_orig" if self.form == "hook" else ""
        return getattr(self.module, self.tensor_name + suffix)

    # Of fastsn's own

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(u, v), one of each per estimate."""
        return self.norm.vectors(self.holder)

    def call(self) -> Call:
        """The constants of a pass for this weight alone."""
        return self.norm.call(self.holder, self.original().shape)

    def ahead(self) -> Tensor | None:
        """The weight, if it can be read now in place of the layer's own read later."""
        module, _, name, _, norm, _ = self
        weight = norm.source(module, name)
        if module._forward_pre_hooks and not placements.is_distributed(weight):
            for hook in module._forward_pre_hooks.values():
                if hook is norm:
                    break
                # Any but these might bring another weight, or change this one.
                is_group = getattr(hook, "__self__", None) is norm.transient.server
                if not (is_group or type(hook) is hooked.SpectralNorm):
                    return None
        return weight


def of_module(module: Any, path: str = "") -> Iterator[Weight]:
    """The normalized weights of this very module."""
    children = module._modules  # of a scripted module no dictionary
    lists = children["parametrizations"] if "parametrizations" in children else None
    if isinstance(lists, nn.ModuleDict):
        for name, norms in lists._modules.items():
            for norm in norms._modules.values():
                if isinstance(norm, TorchParametrization):
                    yield Weight(module, path, name, "parametrization", norm, norm)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, TorchHook):
            yield Weight(module, path, hook.name, "hook", hook, module)
    if biggan.is_similar(module):
        yield Weight(module, path, "weight", "biggan", biggan.of(module), module)
    elif "sn_u" in module._buffers and "weight" in module._parameters:
        yield Weight(module, path, "weight", "mimicry", None, module)


def weights(model: nn.Module) -> Iterator[Weight]:
    """Those of a model, each once, in the order of its modules."""
    for prefix, module in model.named_modules():
        # Most modules have none of what any form needs.
        if module._buffers or module._forward_pre_hooks or "parametrizations" in module._modules:
            yield from of_module(module, f"{prefix}." if prefix else "")


def is_groupable(weight: Weight) -> bool:
    """Whether a grouped call can serve it.

    Left out are those that a call for many cannot help or might do wrong: of other classes, 1-D
    weights, whose norm is exact, weights that another parametrization has changed before, and
    those before whose read something else is to run.
    """
    original = weight.ahead() if type(weight.norm) in _EXACT else None
    return original is not None and original.ndim > 1


def is_alone(weight: Weight) -> bool:
    """Whether a grouped call outside of any forward can serve it: hooks of the layer run later."""
    is_exact = type(weight.norm) in _EXACT
    original = weight.norm.source(weight.module, weight.tensor_name) if is_exact else None
    return original is not None and original.ndim > 1


def normalizers(model: nn.Module) -> list[Normalizer]:
    """All that fastsn has in a model, also where a class of the user's holds it."""
    found = {weight.norm: None for weight in weights(model) if weight.is_ours}
    found |= {module: None for module in model.modules() if isinstance(module, Normalizer)}
    return list(found)


def adopt(model: nn.Module) -> None:
    """Turns torch's spectral norm and BigGAN-style layers into fastsn's, in place.

    Objects of torch's exact classes change their class; subclasses are somebody else's and stay.
    No number, buffer or checkpoint key changes.
    """
    for module in model.modules():
        if isinstance(module, TorchParametrization):
            parametrized.adopt(module)
        hooked.adopt(module)
        biggan.adopt(module)
