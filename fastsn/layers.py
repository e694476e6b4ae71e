"""Spectrally normalized layers as a model holds them, seen alike whatever form they have.

Three forms exist: torch's parametrization, torch's hook, and the ``W_()`` method of BigGAN's layers.
:func:`find` lists those of a model; :func:`take_over` turns torch's and BigGAN's objects into
fastsn's in place, which changes no number, no buffer and no checkpoint key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as _TorchParametrization
from torch.nn.utils.spectral_norm import SpectralNorm as _TorchHook

from fastsn import functional, hooks, parametrizations
from fastsn.functional import Call
from fastsn.nn.modules import Normalized

__all__ = ["Layer", "find", "take_over"]


class Layer(Protocol):
    """One normalized weight of a model, ready for a grouped call."""

    name: str  # of the weight, such as "conv1.weight"
    keeps_sigma: bool

    def call(self) -> Call:
        """The constants of a call for this layer alone."""

    def alive(self) -> bool:
        """Whether the model still normalizes this weight in this way."""

    def weight(self) -> Tensor:
        """The parameter."""

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(u, v), one of each per estimate, to be updated in place."""

    def iterations(self) -> int:
        """Power iterations that the next forward performs."""

    def keep_sigma(self, sigma: Tensor) -> None:
        """Takes note of the sigma that an iteration has estimated; few forms do."""

    def put(self, weight: Tensor) -> None:
        """Hands the layer its normalized weight for the next read."""

    def has_weight(self) -> bool:
        """Whether a weight was put and is not read yet."""

    def take_back(self) -> None:
        """Forgets a weight that was put and not read."""

    def finish(self, weight: Tensor) -> Tensor:
        """What a read returns once the normalized weight is known."""

    def fold(self) -> None:
        """Leaves a plain parameter with the normalized weight, as eval mode computes it."""


class ParametrizedLayer:
    """A layer with ``fastsn.parametrizations.spectral_norm`` as its first parametrization."""

    keeps_sigma = False

    def __init__(self, name: str, module: nn.Module, tensor_name: str) -> None:
        self.name = name
        self.module = module
        self.tensor_name = tensor_name
        self.list = module.parametrizations[tensor_name]
        self.norm = self.list[0]

    def call(self) -> Call:
        return self.norm.call(self.weight().shape)

    def alive(self) -> bool:
        lists = self.module._modules.get("parametrizations")
        return (
            lists is not None
            and lists._modules.get(self.tensor_name) is self.list
            and self.list._modules.get("0") is self.norm
        )

    def weight(self) -> Tensor:
        original = self.list._parameters.get("original")
        return self.list.original if original is None else original

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.norm.vectors()

    def iterations(self) -> int:
        # Within parametrize.cached() a weight read before is not computed again.
        if parametrize._cache_enabled and self._is_cached():
            return 0
        return self.norm.n_power_iterations if self.norm.training else 0

    def _is_cached(self) -> bool:
        return (id(self.module), self.tensor_name) in parametrize._cache

    def put(self, weight: Tensor) -> None:
        self.norm.pending = [weight]

    def has_weight(self) -> bool:
        return bool(self.norm.pending)

    def take_back(self) -> None:
        self.norm.pending = ()

    def finish(self, weight: Tensor) -> Tensor:
        for later in list(self.list)[1:]:
            weight = later(weight)
        return weight

    def fold(self) -> None:
        self.norm.eval()
        before = parametrize.type_before_parametrizations(self.module)
        parametrizations.rebuild(self.module, before)
        parametrize.remove_parametrizations(self.module, self.tensor_name)
        if isinstance(self.module, Normalized):
            self.module.__class__ = self.module.plain


class HookedLayer:
    """A layer with the hook of ``fastsn.spectral_norm``."""

    keeps_sigma = False

    def __init__(self, name: str, module: nn.Module, hook: hooks.SpectralNorm) -> None:
        self.name = name
        self.module = module
        self.hook = hook

    def call(self) -> Call:
        return self.hook.call(self.weight().shape)

    def alive(self) -> bool:
        return self.hook in self.module._forward_pre_hooks.values()

    def weight(self) -> Tensor:
        return getattr(self.module, f"{self.hook.name}_orig")

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.hook.vectors(self.module)

    def iterations(self) -> int:
        return self.hook.n_power_iterations if self.module.training else 0

    def put(self, weight: Tensor) -> None:
        self.hook.set_weight(self.module, weight)
        # The forward of MultiheadAttention's out_proj, and so its hook, never runs.
        self.hook.fresh = not isinstance(self.module, NonDynamicallyQuantizableLinear)

    def has_weight(self) -> bool:
        return self.hook.fresh

    def take_back(self) -> None:
        self.hook.fresh = False

    def finish(self, weight: Tensor) -> Tensor:
        return weight

    def fold(self) -> None:
        requires_grad = self.weight().requires_grad
        hooks.remove_spectral_norm(self.module, self.hook.name)
        getattr(self.module, self.hook.name).requires_grad_(requires_grad)


class BigGanWeight:
    """Replaces the method ``W_`` of a layer written as in BigGAN-PyTorch (one singular value).

    Such a layer keeps u as a buffer ``u0`` of shape (1, rows) and the last sigma as ``sv0``. It
    iterates in eval mode too, and then keeps neither.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.pending: Tensor | None = None

    def dim(self) -> int:
        return 1 if self.module.transpose else 0

    def call(self) -> Call:
        return functional.make_call([(self.dim(),)], [1.0], self.module.eps, True, False, False)

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        u = self.module.u0[0] if self.module.training else self.module.u0[0].clone()
        weight = self.module.weight
        return [u], [u.new_empty(weight.numel() // weight.shape[self.dim()])]

    def iterations(self) -> int:
        # In eval mode every iteration of the original starts from the same u.
        return self.module.num_itrs if self.module.training else 1

    def keep_sigma(self, sigma: Tensor) -> None:
        if self.module.training:
            with torch.no_grad():
                self.module.sv0.copy_(sigma)

    def __call__(self) -> Tensor:
        if self.pending is not None:
            weight, self.pending = self.pending, None
            return weight
        u, v = self.vectors()
        call, weights = self.call(), [self.module.weight]
        normalized, snapshot = functional.normalize(call, weights, u, v, [self.iterations()])
        self.keep_sigma(snapshot[-1])
        return normalized[0]


class PlainWeight:
    """The ``W_`` of a folded layer: its weight as it is."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> Tensor:
        return self.module.weight


class BigGanLayer:
    """A layer whose ``W_`` is a :class:`BigGanWeight`."""

    keeps_sigma = True

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.source: BigGanWeight = module.W_
        self.call = self.source.call
        self.vectors = self.source.vectors
        self.iterations = self.source.iterations
        self.keep_sigma = self.source.keep_sigma

    def alive(self) -> bool:
        return self.module.__dict__.get("W_") is self.source

    def weight(self) -> Tensor:
        return self.module.weight

    def put(self, weight: Tensor) -> None:
        self.source.pending = weight

    def has_weight(self) -> bool:
        return self.source.pending is not None

    def take_back(self) -> None:
        self.source.pending = None

    def finish(self, weight: Tensor) -> Tensor:
        return weight

    def fold(self) -> None:
        training = self.module.training
        with torch.no_grad():
            self.module.eval()
            self.module.weight.copy_(self.source())
            self.module.train(training)
        self.module.W_ = PlainWeight(self.module)


def _is_biggan_style(module: nn.Module) -> bool:
    return (
        callable(getattr(module, "W_", None))
        and all(name in module._buffers for name in ("u0", "sv0"))
        and all(hasattr(module, name) for name in ("num_svs", "num_itrs", "transpose", "eps"))
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and module.num_svs == 1
        and (not module.transpose or module.weight.ndim == 2)
    )


def take_over(model: nn.Module) -> None:
    """Turns torch's spectral norm and BigGAN-style layers into fastsn's, in place.

    Objects of torch's exact classes change their class; subclasses are somebody else's and stay.
    """
    for module in model.modules():
        if type(module) is _TorchParametrization:
            module.__class__ = parametrizations._SpectralNorm
        for hook in module._forward_pre_hooks.values():
            if type(hook) is _TorchHook:
                hook.__class__ = hooks.SpectralNorm
        if _is_biggan_style(module) and "W_" not in module.__dict__:
            module.W_ = BigGanWeight(module)


def find(model: nn.Module) -> Iterator[Layer]:
    """The layers of a model that a grouped call can serve, each once, in the order of its modules.

    Left out are those that a call for many cannot help: 1-D weights, whose norm is exact, and weights
    that another parametrization has changed before.
    """
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        if parametrize.is_parametrized(module):
            for tensor_name, norms in module.parametrizations.items():
                if isinstance(norms[0], parametrizations._SpectralNorm) and norms.original.ndim > 1:
                    yield ParametrizedLayer(path + tensor_name, module, tensor_name)
        for hook in module._forward_pre_hooks.values():
            if type(hook) is hooks.SpectralNorm:
                yield HookedLayer(path + hook.name, module, hook)
        if isinstance(module.__dict__.get("W_"), BigGanWeight):
            yield BigGanLayer(f"{path}weight", module)
