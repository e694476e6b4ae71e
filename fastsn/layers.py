"""Spectrally normalized layers as a model holds them, seen alike whatever form they have.

Three forms exist: torch's parametrization, torch's hook, and the ``W_()`` method of BigGAN's
layers. :func:`take_over` turns torch's and BigGAN's objects into fastsn's in place, which changes
no number, no buffer and no checkpoint key; :func:`find` lists the layers that a call for many can
serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as _TorchParametrization

from fastsn import autocast, biggan, checkpoints, hooks, parametrizations, pickling, placements
from fastsn.functional import Call
from fastsn.normalizer import State

__all__ = ["Layer", "find", "take_over"]


class Layer(Protocol):
    """One normalized weight of a model, ready for a grouped call."""

    name: str  # of the weight, such as "conv1.weight"
    module: Any
    norm: Any  # its Normalizer
    pending: list[Any]  # not empty between :meth:`put` and the read that finds the weight
    keeps_sigma: bool

    def casts(self) -> bool:
        """Whether the weight may be put in the type that autocast would cast it to."""

    def call(self) -> Call:
        """The constants of a call for this layer alone."""

    def weight(self) -> Tensor | None:
        """The parameter, or None if the model no longer normalizes it in this way."""

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        """u and v themselves; those that the layer does not keep, without values."""

    def step(self, weight: Tensor) -> State:
        """u, v and the iterations of the next forward; u and v are updated in place."""

    def rest(self, weight: Tensor) -> State:
        """u, v and the iterations of a forward in eval mode; nothing that the layer keeps moves."""

    def put(self, weight: Any) -> None:
        """Hands the layer its normalized weight for the next read."""

    def keep_sigma(self, sigma: Tensor) -> None:
        """Takes note of the sigma of a forward; few forms do, and only in training mode."""

    def finish(self, weight: Tensor) -> Tensor:
        """What a read returns, out of the normalized weight."""


class ParametrizedLayer:
    """A layer with ``fastsn.parametrizations.spectral_norm`` as its first parametrization."""

    keeps_sigma = False

    def __init__(self, name: str, module: Any, tensor_name: str) -> None:
        self.name = name
        self.module = module
        self.tensor_name = tensor_name
        self.list: Any = module.parametrizations[tensor_name]
        self.norm: Any = self.list[0]
        if not isinstance(self.norm.pending, list):
            self.norm.pending = []
        self.pending = self.norm.pending

    def casts(self) -> bool:
        return len(self.list) == 1 and autocast.casts(self.module, self.tensor_name)

    def call(self) -> Call:
        return self.norm.call(self.list.original.shape)

    def weight(self) -> Tensor | None:
        lists = self.module._modules.get("parametrizations")
        if (
            lists is None
            or lists._modules.get(self.tensor_name) is not self.list
            or self.list._modules.get("0") is not self.norm
            or self.list._forward_pre_hooks
            or self.list._forward_hooks
            or self.norm._forward_pre_hooks
            or self.norm._forward_hooks
        ):
            return None
        original = self.list._parameters.get("original")
        return self.list.original if original is None else original

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.norm.vectors()

    def step(self, weight: Tensor) -> State:
        # Within parametrize.cached() a weight that was read before is not computed again.
        iterates = self.norm.training and not (
            parametrize._cache_enabled and (id(self.module), self.tensor_name) in parametrize._cache
        )
        return self.norm.state(weight, iterates)

    def rest(self, weight: Tensor) -> State:
        return self.norm.state(weight, False)

    def put(self, weight: Any) -> None:
        self.pending.append(weight)

    def keep_sigma(self, sigma: Tensor) -> None:
        pass

    def finish(self, weight: Tensor) -> Tensor:
        if len(self.list._modules) > 1:
            for later in list(self.list)[1:]:
                weight = later(weight)
        return weight


class HookedLayer:
    """A layer with the hook of ``fastsn.spectral_norm``."""

    keeps_sigma = False

    def __init__(self, name: str, module: Any, hook: hooks.SpectralNorm) -> None:
        self.name = name
        self.module = module
        self.hook = self.norm = hook
        self.pending = hook.own_pending()

    def casts(self) -> bool:
        return False  # the weight stays on as an attribute when autocast has ended

    def call(self) -> Call:
        return self.hook.call(getattr(self.module, f"{self.hook.name}_orig").shape)

    def weight(self) -> Tensor | None:
        if self.hook not in self.module._forward_pre_hooks.values():
            return None
        return getattr(self.module, f"{self.hook.name}_orig")

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.hook.vectors(self.module)

    def step(self, weight: Tensor) -> State:
        return self.hook.state(self.module, self.module.training)

    def rest(self, weight: Tensor) -> State:
        return self.hook.state(self.module, False)

    def put(self, weight: Any) -> None:
        # As an attribute, so that MultiheadAttention finds it too: it reads the weight of its
        # out_proj without calling it, and no hook runs.
        if not isinstance(weight, placements.Unscaled):
            self.hook.set_weight(self.module, weight)
        elif isinstance(self.module, NonDynamicallyQuantizableLinear):
            raise RuntimeError(
                f"{self.name} is sharded by fully_shard, and MultiheadAttention reads it without "
                "running hooks: use fastsn.parametrizations.spectral_norm instead"
            )
        self.pending.append(weight)

    def keep_sigma(self, sigma: Tensor) -> None:
        pass

    def finish(self, weight: Tensor) -> Tensor:
        return weight


class BigGanLayer:
    """A layer that normalizes itself in a method ``W_``, see :mod:`fastsn.biggan`."""

    keeps_sigma = True

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.norm = biggan.state_of(module)
        self.pending = self.norm.pending

    def casts(self) -> bool:
        return False  # somebody else's forward

    def call(self) -> Call:
        return biggan.call(self.module)

    def weight(self) -> Tensor | None:
        return self.module.weight

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        return biggan.vectors(self.module)

    def step(self, weight: Tensor) -> State:
        return biggan.state(self.module, self.module.training)

    def rest(self, weight: Tensor) -> State:
        return biggan.state(self.module, False)

    def put(self, weight: Any) -> None:
        self.pending.append(weight)

    def keep_sigma(self, sigma: Tensor) -> None:
        biggan.keep_sigma(self.module, sigma)

    def finish(self, weight: Tensor) -> Tensor:
        return weight


def take_over(model: nn.Module) -> None:
    """Turns torch's spectral norm and BigGAN-style layers into fastsn's, in place.

    Objects of torch's exact classes change their class; subclasses are somebody else's and stay.
    """
    for module in model.modules():
        taken: Any = module
        if type(module) is _TorchParametrization:
            taken.__class__ = parametrizations._SpectralNorm
            taken.was_meta = any(vector.is_meta for vector in module.buffers())
            taken.prepare()
        for hook in module._forward_pre_hooks.values():
            if type(hook) is hooks.TorchHook:
                taken = hook
                taken.__class__ = hooks.SpectralNorm
                taken.was_meta = getattr(module, f"{hook.name}_u").is_meta
                taken.prepare()
        if biggan.is_similar(module):
            biggan.take_over(module)
        if parametrize.is_parametrized(module):
            pickling.allow(module)
    # Afterwards: a layer comes before the parametrization that makes it one of fastsn's.
    for module in model.modules():
        checkpoints.install(module)


def _is_watched(norms: Any, norm: Any) -> bool:
    """Whether hooks are to run with the parametrizations, as those that prune a weight do."""
    return bool(
        norms._forward_pre_hooks
        or norms._forward_hooks
        or norm._forward_pre_hooks
        or norm._forward_hooks
    )


def find(model: nn.Module) -> Iterator[Layer]:
    """The layers of a model that a grouped call can serve, each once, in the order of its modules.

    Left out are those that a call for many cannot help: 1-D weights, whose norm is exact, weights
    that another parametrization has changed before, and those whose parametrization has hooks.
    """
    module: Any
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        if parametrize.is_parametrized(module):
            for tensor_name, norms in module.parametrizations.items():
                if isinstance(norms[0], parametrizations._SpectralNorm) and norms.original.ndim > 1:
                    if not _is_watched(norms, norms[0]):
                        yield ParametrizedLayer(path + tensor_name, module, tensor_name)
        for hook in module._forward_pre_hooks.values():
            if type(hook) is hooks.SpectralNorm:
                yield HookedLayer(path + hook.name, module, hook)
        if biggan.is_taken_over(module):
            yield BigGanLayer(f"{path}weight", module)
