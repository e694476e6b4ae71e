"""Drop-in for ``torch.nn.utils.parametrizations.spectral_norm``.

Signature, buffers, iteration order, warm-up, random numbers, checkpoints and errors are torch's;
the class below *is* a torch ``_SpectralNorm``, with the arithmetic replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as _TorchSpectralNorm

from fastsn import (
    autocast,
    checkpoints,
    functional,
    memory,
    normalizer,
    pickling,
    placements,
    recompute,
)
from fastsn.functional import Method
from fastsn.normalizer import Normalizer, State

__all__ = ["spectral_norm"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def default_dim(module: nn.Module) -> int:
    """The dimension of a weight that counts outputs: 1 for transposed convolutions, else 0."""
    return 1 if isinstance(module, _TRANSPOSED) else 0


def install_shortcut(module: nn.Module, name: str) -> None:
    """Lets a read of ``module.<name>`` find a pending weight without the way through torch.

    Torch's property calls two modules and catches an exception, which costs more than normalizing a
    small weight. Everything but the first read after a grouped call still goes that way.
    """
    pickling.allow(module)
    placements.install(module)
    cls = placements.parametrized_class(module)
    read = getattr(cls, name)
    if read.fget.__name__ == "get_pending":
        return

    def get_pending(self: nn.Module) -> Tensor:
        weights = self.__dict__["_modules"]["parametrizations"]._modules[name]
        norms = weights._modules
        # A copy of the module from before has the same class, and perhaps torch's own norm in it.
        pending = getattr(norms["0"], "pending", ()) if len(norms) == 1 else ()
        if pending and not parametrize._cache_enabled:
            norm, weight = norms["0"], pending.pop()
            if recompute.may_be_repeated():
                recompute.record(norm, weight, norm.training)
            if weight.dtype is torch.float32:
                return weight
            return norm.settled(weight, weights.original)
        return read.fget(self)

    setattr(cls, name, property(get_pending, read.fset))


class _SpectralNorm(Normalizer, _TorchSpectralNorm):
    # Class attributes: an object of torch's class becomes one of this by changing its class.
    method = functional.SN
    # The weight that a grouped call has computed for the next read, in an accelerated model.
    pending: list[Tensor] | tuple[()] = ()

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        method: Method = functional.SN,
    ) -> None:
        nn.Module.__init__(self)
        self.method = method
        ndim = weight.ndim
        if not -ndim <= dim < ndim:
            raise IndexError(
                "Dimension out of range (expected to be in range of "
                f"[-{ndim}, {ndim - 1}] but got {dim})"
            )
        if n_power_iterations <= 0:
            raise ValueError(
                "Expected n_power_iterations to be positive, but "
                f"got n_power_iterations={n_power_iterations}"
            )
        if not (weight.is_floating_point() or weight.is_complex()):
            raise RuntimeError(f"expected a floating-point or complex weight, got {weight.dtype}")
        self.dim, self.eps = dim % ndim, eps
        if ndim > 1:
            self.n_power_iterations = n_power_iterations
            drawn_like = placements.stand_in(weight)
            dims = functional.estimate_dims(weight.shape, self.dim, method.norm)
            for own_dim, suffix in zip(dims, ("", "2"), strict=False):
                (u,), (v,) = functional.init_vectors(drawn_like, dim=own_dim, eps=eps)
                self.register_buffer(f"_u{suffix}", u)
                self.register_buffer(f"_v{suffix}", v)
            placements.agree(weight, list(self.buffers()))
            self.adapt(weight)
        self.was_meta = weight.is_meta
        self.prepare()

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(u, v), one of each per estimate, in fp32 also where torch has made them narrower."""
        buffers: dict[str, Any] = self._buffers
        u, v = buffers["_u"], buffers["_v"]
        if "_u2" in buffers or not (normalizer.is_usable(u) and normalizer.is_usable(v)):
            return normalizer.vectors_in(buffers, "")
        return [u], [v]

    def call(self, shape: torch.Size) -> functional.Call:
        """The constants of a call for a weight of this shape."""
        norm, scale, bound, zero_guard = self.method
        dims = functional.estimate_dims(shape, self.dim, norm)
        return functional.make_call([dims], [scale], self.eps, False, bound, zero_guard)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return functional.normalize_vector(weight, self.eps, self.method)
        repeats = recompute.is_repeating()
        if self.pending or repeats:
            given = recompute.take(self.pending, self, self.training)
            if given is not None:
                return self.settled(given, weight)
        u, v, iterations = self.state(weight, self.training and not repeats)
        return self.memory.normalize(
            self.call(weight.shape), [weight], u, v, [iterations], keep=self.policy == "step"
        )[0][0]

    def state(self, weight: Tensor, training: bool) -> State:
        """u, v and the iterations of the forward that comes now."""
        u, v = self.vectors()
        if self.was_meta:
            self.settle(self.call(weight.shape), weight, u, v)
        return u, v, self.iterations(weight, training, self.n_power_iterations)

    def train(self, mode: bool = True) -> Any:
        memory.begin_era()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, after in self._buffers.items():
            # half() and its like round weights, but not u and v
            if after is not None and after.dtype in normalizer.NARROW and not before[name].is_meta:
                self._buffers[name] = before[name].to(after.device, torch.float32)
        return self

    def settled(self, normalized: Tensor | placements.Unscaled, weight: Tensor) -> Tensor:
        """A pending weight, which may be in autocast's type, in the type that is right for its use.

        Where the weight was sharded when the group was served, it is normalized here.
        Where autocast has been turned off in between, it is computed again with the same u and v.
        """
        if isinstance(normalized, placements.Unscaled):
            normalized = normalized.normalized(weight)
        if autocast.fits(normalized, weight):
            return normalized
        call = self.call(weight.shape)
        return self.memory.normalize(call, [weight], *self.vectors(), [0])[0][0]

    @torch.no_grad()
    def adapt(self, weight: Tensor) -> None:
        """Iterates u and v for a new weight, as often as at registration."""
        functional.iterate(self.call(weight.shape), [weight], *self.vectors(), [functional.WARM_UP])

    def extra_repr(self) -> str:
        shown = {"dim": self.dim, "eps": self.eps}
        if hasattr(self, "n_power_iterations"):
            shown["n_power_iterations"] = self.n_power_iterations
        return ", ".join(f"{k}={v!r}" for k, v in {**shown, **changed(self.method)}.items())


def changed(method: Method) -> dict[str, object]:
    """The fields of a method that differ from plain SN, for representations."""
    return {k: v for k, v in method._asdict().items() if v != Method._field_defaults[k]}


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    norm: str = "matrix",
    scale: float = 1.0,
    bound: bool = False,
    zero_guard: bool = False,
) -> nn.Module:
    r"""Normalizes a weight spectrally, as ``torch.nn.utils.parametrizations.spectral_norm`` does.

    .. math::
        W_{SN} = s \, W / \sigma(W), \quad \sigma \approx u^T W v

    with W as a matrix of shape (d_dim, product of the others); a 1-D weight becomes
    ``s * w / max(|w|, eps)`` exactly. With the defaults every number, buffer, checkpoint key,
    random draw and error is torch's, to rounding.

    In training mode **every read** of ``module.<name>`` performs ``n_power_iterations`` steps (u,
    then v) and updates the buffers ``_u`` and ``_v`` in place; in eval mode none. 15 steps are done
    at registration. Gradients flow through W and sigma, with u and v constant. Checkpoints of every
    form load, see :func:`fastsn.convert_state_dict`.

    Unlike torch's: u and v stay in fp32 where the weight is narrower; a forward that activation
    checkpointing repeats does not iterate and sees the weight of the first; in eval mode u and v
    that are averages of several models' are iterated before use, without being written back, and
    without gradients a read returns the tensor of before until something has changed (a write into
    ``weight.data`` is noticed after the next step of an optimizer, or ``train()`` or ``eval()``).

    The weight may be sharded, before or after this call, by FSDP2 (``fully_shard``) or tensor
    parallel (``parallelize_module``): a DTensor is normalized where its parts lie, which all ranks
    must do together, and gives a DTensor. u and v are whole and equal on every rank.

    Args:
        module: the module that holds the parameter.
        name: the parameter.
        n_power_iterations: steps per read in training mode, at least 1.
        eps: least norm that u and v are divided by.
        dim: the dimension that counts outputs; default 0, and 1 for transposed convolutions.
        norm: ``"matrix"`` for SN, ``"bidirectional"`` for BSN (sigma is the mean over the weight as
            (out, in * k) and as (in, out * k), with buffers ``_u2`` and ``_v2`` for the second).
        scale: s above; other than 1: SSN and BSSN. The bias is not scaled.
        bound: use ``min(1, s / sigma) W`` instead, which leaves a weight of norm below s alone.
        zero_guard: a weight with sigma = 0 stays zero, and so do not u and v; torch and the default
            make it NaN.

    Returns:
        The module itself, its class now ``Parametrized...`` as with every parametrization.

    Raises:
        ValueError: no parameter or buffer of that name, ``n_power_iterations`` < 1, an unknown norm
            or a scale that is not finite and positive; a DTensor that is not replicated or split
            along one dimension of its mesh.
        IndexError: ``dim`` out of range.
        RuntimeError: a weight of ``fully_shard`` in a version of torch that keeps them in another
            way than those known here: normalize before.
        The module is unchanged then.

    Example::

        >>> conv = fastsn.parametrizations.spectral_norm(nn.Conv2d(3, 64, 3), norm="bidirectional")
        >>> conv.weight.shape
        torch.Size([64, 3, 3, 3])

    Source: Miyato et al., ICLR 2018 (arXiv 1802.05957); Lin, Sekar, Fanti, NeurIPS 2021
    (arXiv 2009.02773).
    """
    method = functional.check_method(norm, scale, bound, zero_guard)
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"Module '{module}' has no parameter or buffer with name '{name}'")
    if dim is None:
        dim = default_dim(module)
    placements.check(weight, f"{name} of {type(module).__name__}")
    owner = placements.owner_of(weight)
    parametrize.register_parametrization(
        module, name, _SpectralNorm(weight, n_power_iterations, dim, eps, method)
    )
    placements.moved(owner, (module, name), (module.parametrizations[name], "original"))  # type: ignore
    pickling.allow(module)
    placements.install(module)
    checkpoints.install(module)
    return module
