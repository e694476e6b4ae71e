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
from typing import Any

import torch
from torch import Tensor, nn

from fastsn import functional, normalizer, placements, recompute
from fastsn.functional import Call

_STATE = "_fastsn_state"


class State(normalizer.Normalizer):
    """What marks an instance as taken over. Unpickling it replaces ``W_`` in its class again."""

    def __init__(self, owner: type, is_folded: bool = False) -> None:
        _replace(owner)
        self.owner = owner
        self.is_folded = is_folded
        self.pending: list[Tensor] = []
        self.prepare()
        self.v: Tensor | None = None  # of the last iteration, where the policy is "step"

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self.owner, self.is_folded), {"policy": self.policy}


def _replace(owner: Any) -> None:
    original = owner.__dict__["W_"]
    if hasattr(original, "_is_fastsn"):
        return

    @functools.wraps(original)
    def W_(self: Any) -> Tensor:
        state = self.__dict__.get(_STATE)
        if state is None:
            return original(self)
        return self.weight if state.is_folded else normalized_weight(self)

    W_._is_fastsn = True  # type: ignore[attr-defined]
    owner.W_ = W_


def is_similar(module: Any) -> bool:
    """Whether the layer is written in this way, with one singular value of a matrix as needed."""
    return bool(
        callable(getattr(module, "W_", None))
        and all(name in module._buffers for name in ("u0", "sv0"))
        and all(hasattr(module, name) for name in ("num_svs", "num_itrs", "transpose", "eps"))
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and module.num_svs == 1
        and (not module.transpose or module.weight.ndim == 2)
    )


def is_taken_over(module: Any) -> bool:
    """Whether fastsn computes its weight."""
    state = module.__dict__.get(_STATE)
    return state is not None and not state.is_folded


def state_of(module: Any) -> State:
    """What fastsn keeps with the layer; in ``pending`` a grouped call leaves the weight."""
    return module.__dict__[_STATE]


def take_over(module: Any) -> None:
    """Makes fastsn compute the layer's weight from now on."""
    if _STATE not in module.__dict__:
        owner = next(cls for cls in type(module).__mro__ if "W_" in cls.__dict__)
        module.__dict__[_STATE] = State(owner)


def fold(module: Any) -> None:
    """Makes the normalized weight, as eval mode computes it, the layer's plain weight."""
    was_training = module.training
    with torch.no_grad():
        normalized = normalized_weight(module.eval())
    module.train(was_training)
    module.weight = nn.Parameter(normalized, requires_grad=module.weight.requires_grad)
    del module._buffers["u0"], module._buffers["sv0"]
    module.__dict__[_STATE].is_folded = True


def normalized_weight(module: Any) -> Tensor:
    """What ``W_`` returns: the pending weight, or one computed for this layer alone."""
    own = state_of(module)
    given = recompute.take(own.pending, own, module.training)
    if isinstance(given, placements.Unscaled):
        return given.normalized(module.weight)
    if given is not None:
        return given
    u, v, iterations = state(module, module.training and not recompute.is_repeating())
    normalized, snapshot = own.memory.normalize(
        call(module), [module.weight], u, v, [iterations], keep=own.policy == "step"
    )
    keep_sigma(module, snapshot[-1])
    return normalized[0]


def call(module: Any) -> Call:
    """The constants of a call for this layer alone."""
    dims = [(1 if module.transpose else 0,)]
    return functional.make_call(dims, [1.0], module.eps, True, False, False)


def vectors(module: Any) -> tuple[list[Tensor], list[Tensor]]:
    """u, and room for the v that is never kept."""
    u = module.u0[0]
    return [u], [u.new_empty(module.weight.numel() // u.numel())]


def state(module: Any, training: bool) -> normalizer.State:
    """u, v and the iterations of a forward; when training u is updated.

    Outside training every iteration starts from the same u, so that one does what many do.
    """
    own = state_of(module)
    u, v = vectors(module)
    iterations = own.iterations(module.weight, training, module.num_itrs)
    if iterations:
        own.v = v[0] if own.policy == "step" else None
    elif training and own.v is not None and own.v.device == u[0].device:
        return u, [own.v], 0
    else:
        return [u[0].clone()], v, 1
    return u, v, iterations


@torch.no_grad()
def keep_sigma(module: Any, sigma: Tensor) -> None:
    """Writes ``sv0``, in training mode."""
    if module.training and not recompute.is_repeating():
        module.sv0.copy_(sigma)
