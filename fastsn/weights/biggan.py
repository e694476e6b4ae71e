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

from fastsn import engine, recompute
from fastsn.engine import State
from fastsn.torch_internals import modes
from fastsn.weights import steps
from fastsn.weights.normalizer import Normalizer

_NORMALIZER = "_fastsn_normalizer"


class BigGanNorm(Normalizer):
    """What marks an instance as taken over. Unpickling it replaces ``W_`` in its class again."""

    form = "biggan"
    v_first = True
    keeps_sigma = True

    def __init__(self, owner: type, is_folded: bool = False) -> None:
        _replace(owner)
        self.owner = owner
        self.is_folded = is_folded
        self.prepare()
        # Of policy "step": v of the last iteration, and the u0 that it belongs to.
        self.v: Tensor | None = None
        self.v_of: tuple[int | None, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return BigGanNorm, (self.owner, self.is_folded), {"policy": self.policy}

    def vectors(self, holder: Any) -> tuple[list[Tensor], list[Tensor]]:
        """u, and room for the v that is never kept."""
        u = holder.u0[0]
        return [u], [u.new_empty(holder.weight.numel() // u.numel())]

    def call(self, holder: Any, shape: torch.Size) -> engine.Call:
        dims = [(1 if holder.transpose else 0,)]
        return engine.make_call(dims, engine.SN, holder.eps, True)

    def source(self, module: Any, name: str) -> Tensor | None:
        return module._parameters.get(name) if of(module) is self else None

    def state(
        self, holder: Any, weight: Tensor, training: bool, u: list[Tensor], v: list[Tensor]
    ) -> State:
        """u, v and the iterations of a forward; when training u is updated.

        Outside training every iteration starts from the same u, so that one does what many do.
        """
        if training and self.moves_for(weight):
            self.v, self.v_of = (v[0] if self.policy == "step" else None), None
            return u, v, holder.num_itrs
        # Also where the forward of a checkpoint is repeated. A graph cannot ask.
        if holder.training and self.v is not None and not modes.is_read_by_dynamo():
            if self.v_of == steps.state_of(holder.u0):
                return u, [self.v], 0
        return [u[0].clone()], v, 1

    @torch.no_grad()
    def keep_sigma(self, holder: Any, sigma: Tensor) -> None:
        """Writes ``sv0``, in training mode."""
        if holder.training and not recompute.is_repeating():
            holder.sv0.copy_(sigma)
            if self.v is not None and self.v_of is None:
                self.v_of = steps.state_of(holder.u0)
                if self.v_of[0] is None:  # then nothing tells whether u0 is still this one
                    self.v = None


def _replace(owner: Any) -> None:
    original = owner.__dict__["W_"]
    if hasattr(original, "_is_fastsn"):
        return

    @functools.wraps(original)
    def W_(self: Any) -> Tensor:
        norm = self.__dict__.get(_NORMALIZER)
        if norm is None:
            return original(self)
        return self.weight if norm.is_folded else norm.read(self, self.weight)

    W_._is_fastsn = True  # type: ignore[attr-defined]
    owner.W_ = W_


def is_similar(module: Any) -> bool:
    """Whether the layer is written in this way, with one singular value of a matrix as needed."""
    return bool(
        "u0" in module._buffers
        and "sv0" in module._buffers
        and callable(getattr(module, "W_", None))
        and all(hasattr(module, name) for name in ("num_svs", "num_itrs", "transpose", "eps"))
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and module.num_svs == 1
        and (not module.transpose or module.weight.ndim == 2)
    )


def of(module: Any) -> BigGanNorm | None:
    """What normalizes the layer's weight, if it was taken over and is not folded."""
    norm = module.__dict__.get(_NORMALIZER)
    return None if norm is None or norm.is_folded else norm


def adopt(module: Any) -> None:
    """Makes fastsn compute the layer's weight from now on, if it is similar."""
    if _NORMALIZER in module.__dict__ or not is_similar(module):
        return
    owner = next((cls for cls in type(module).__mro__ if "W_" in cls.__dict__), None)
    if owner is not None and "W_" not in module.__dict__:
        norm = BigGanNorm(owner)
        if _does_the_same(module, norm):
            module.__dict__[_NORMALIZER] = norm


def _does_the_same(module: Any, norm: BigGanNorm) -> bool:
    """Whether the layer's own method computes nothing else, such as with a gain of its own.

    Tried on stand-ins with made-up values, in both modes and with gradients: the layer's own may be
    elsewhere (the meta device, shards), and a gain that is 1 today would hide.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        for training in (False, True):
            found = []
            for read in (lambda probe: norm.read(probe, probe.weight), lambda probe: probe.W_()):
                probe = _stand_in(module, training)
                try:
                    weight = read(probe)
                    (grad,) = torch.autograd.grad(
                        weight.square().sum() + weight.sum(), probe.weight
                    )
                except Exception:  # it asks for more than a stand-in has
                    return False
                found.append((weight.detach(), grad, probe.u0))
            for ours, theirs in zip(*found, strict=True):
                if theirs.shape != ours.shape:
                    return False
                if not torch.allclose(theirs, ours, rtol=1e-2, atol=1e-3 * float(ours.abs().max())):
                    return False
    return True


def _stand_in(module: Any, training: bool) -> Any:
    """The same layer with other values, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def made_up(x: Any) -> Any:
        if x is None or not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").float()

    probe = object.__new__(type(module))
    probe.__dict__.update(module.__dict__)
    probe._parameters = {
        name: None if x is None else nn.Parameter(made_up(x), requires_grad=x.is_floating_point())
        for name, x in module._parameters.items()
    }
    probe._buffers = {name: made_up(x) for name, x in module._buffers.items()}
    probe.u0 /= torch.linalg.vector_norm(probe.u0)
    probe.training = training
    return probe


def fold(module: Any) -> None:
    """Makes the normalized weight, as eval mode computes it, the layer's plain weight."""
    was_training = module.training
    with torch.no_grad():
        normalized = module.eval().W_()
    module.train(was_training)
    module.weight = nn.Parameter(normalized, requires_grad=module.weight.requires_grad)
    del module._buffers["u0"], module._buffers["sv0"]
    module.__dict__[_NORMALIZER].is_folded = True
