"""Layers written as in BigGAN-PyTorch: a method ``W_()`` that returns the normalized weight.

Such a layer keeps u as a buffer ``u0`` of shape (1, rows) and the last sigma as ``sv0``, and has
the attributes ``num_svs``, ``num_itrs``, ``transpose`` and ``eps``. v comes first, then u. It
iterates in eval mode too, from the same u, and then keeps nothing.

``W_`` is replaced in the class that defines it, where it serves the instances that were taken over
and leaves the others as they were: an attribute of the instance would be lost in pickles, and in
the replicas of ``DataParallel`` it would refer to the original.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fastsn import functional
from fastsn.functional import Call

_PENDING = "_fastsn_pending"  # marks an instance as taken over
_FOLDED = "_fastsn_folded"


def is_similar(module: nn.Module) -> bool:
    """Whether the layer is written in this way, with one singular value of a matrix as needed."""
    return (
        callable(getattr(module, "W_", None))
        and all(name in module._buffers for name in ("u0", "sv0"))
        and all(hasattr(module, name) for name in ("num_svs", "num_itrs", "transpose", "eps"))
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and module.num_svs == 1
        and (not module.transpose or module.weight.ndim == 2)
    )


def is_taken_over(module: nn.Module) -> bool:
    """Whether :func:`take_over` was called on it."""
    return _PENDING in module.__dict__


def pending(module: nn.Module) -> list[Tensor]:
    """Where a grouped call leaves the weight for the next read."""
    return module.__dict__[_PENDING]


def take_over(module: nn.Module) -> None:
    """Makes fastsn compute the layer's weight from now on."""
    owner = next(cls for cls in type(module).__mro__ if "W_" in cls.__dict__)
    original = owner.__dict__["W_"]
    if not hasattr(original, "_is_fastsn"):

        @functools.wraps(original)
        def W_(self: nn.Module) -> Tensor:
            if _FOLDED in self.__dict__:
                return self.weight
            return normalized_weight(self) if is_taken_over(self) else original(self)

        W_._is_fastsn = True  # type: ignore[attr-defined]
        owner.W_ = W_  # type: ignore[attr-defined]
    module.__dict__.setdefault(_PENDING, [])


def fold(module: nn.Module) -> None:
    """Makes the normalized weight, as eval mode computes it, the layer's plain weight."""
    was_training = module.training
    with torch.no_grad():
        normalized = normalized_weight(module.eval())
    module.train(was_training)
    module.weight = nn.Parameter(normalized, requires_grad=module.weight.requires_grad)
    del module.__dict__[_PENDING], module._buffers["u0"], module._buffers["sv0"]
    module.__dict__[_FOLDED] = True


def normalized_weight(module: nn.Module) -> Tensor:
    """What ``W_`` returns: the pending weight, or one computed for this layer alone."""
    if pending(module):
        return pending(module).pop()
    u, v = vectors(module, module.training)
    steps = [iterations(module, module.training)]
    normalized, snapshot = functional.normalize(call(module), [module.weight], u, v, steps)
    if module.training:
        keep_sigma(module, snapshot[-1])
    return normalized[0]


def call(module: nn.Module) -> Call:
    """The constants of a call for this layer alone."""
    dims = [(1 if module.transpose else 0,)]
    return functional.make_call(dims, [1.0], module.eps, True, False, False)


def vectors(module: nn.Module, training: bool) -> tuple[list[Tensor], list[Tensor]]:
    """u, to be updated in place when training, and room for v, which is not kept."""
    u = module.u0[0] if training else module.u0[0].clone()
    return [u], [u.new_empty(module.weight.numel() // u.numel())]


def iterations(module: nn.Module, training: bool) -> int:
    """Steps per forward: outside training each of them starts from the same u."""
    return module.num_itrs if training else 1


@torch.no_grad()
def keep_sigma(module: nn.Module, sigma: Tensor) -> None:
    """Writes ``sv0``."""
    module.sv0.copy_(sigma)
