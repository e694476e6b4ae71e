"""Drop-in for ``torch.nn.utils.parametrizations.spectral_norm``.

Signature, buffers, iteration order, warm-up, random numbers, checkpoints and errors are torch's;
the class below *is* a torch ``_SpectralNorm``, with the arithmetic replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as _TorchSpectralNorm

from fastsn import autocast, backends, functional
from fastsn.functional import Method

__all__ = ["spectral_norm"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WARM_UP = 15  # iterations at registration, as in torch


def default_dim(module: nn.Module) -> int:
    """The dimension of a weight that counts outputs: 1 for transposed convolutions, else 0."""
    return 1 if isinstance(module, _TRANSPOSED) else 0


def rebuild(module: Any, plain: type[nn.Module]) -> None:
    """Gives a parametrized module a parametrized class of its own, made from its class before.

    A copy shares the class of what it was copied from, and removing a parametrization takes the
    property out of that class: it would break the other. A pickle has no such class at all.
    """
    lists = module._modules.pop("parametrizations")
    module.__class__ = plain
    modes = {id(child): child.training for child in lists.modules()}
    for name, old in lists.items():
        if isinstance(old.original, nn.Parameter):
            module._parameters[name] = old.original
        else:
            module._buffers[name] = old.original
        for parametrization in old:
            # unsafe: nothing is evaluated, so that nothing iterates.
            parametrize.register_parametrization(module, name, parametrization, unsafe=True)
            for child in parametrization.modules():
                child.training = modes[id(child)]
        module.parametrizations[name].unsafe = old.unsafe
        module.parametrizations[name].training = old.training
    module.parametrizations.training = lists.training


def install_shortcut(module: nn.Module, name: str) -> None:
    """Lets a read of ``module.<name>`` find a pending weight without the way through torch.

    Torch's property calls two modules and catches an exception, which costs more than normalizing a
    small weight. Everything but the first read after a grouped call still goes that way.
    """
    read = getattr(type(module), name)
    if read.fget.__name__ == "get_pending":
        return

    def get_pending(self: nn.Module) -> Tensor:
        weights = self.__dict__["_modules"]["parametrizations"]._modules[name]
        norms = weights._modules
        # A copy of the module from before has the same class, and perhaps torch's own norm in it.
        pending = getattr(norms["0"], "pending", ()) if len(norms) == 1 else ()
        if pending and not parametrize._cache_enabled:
            weight = pending.pop()
            if weight.dtype is torch.float32:
                return weight
            return norms["0"].settled(weight, weights.original)
        return read.fget(self)

    setattr(type(module), name, property(get_pending, read.fset))


class _SpectralNorm(_TorchSpectralNorm):
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
        # Set first: torch's constructor draws u and v and runs the warm-up, which needs it.
        self.method = method
        super().__init__(weight, n_power_iterations, dim, eps)
        for other in functional.estimate_dims(weight.shape, self.dim, method.norm)[1:]:
            (u,), (v,) = functional.init_vectors(weight, dim=other, eps=eps)
            self._warm_up(weight, u, v, other, _WARM_UP, v_first=True)
            self.register_buffer("_u2", u)
            self.register_buffer("_v2", v)

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(u, v), one of each per estimate."""
        buffers: dict[str, Any] = self._buffers
        if "_u2" in buffers:
            return [buffers["_u"], buffers["_u2"]], [buffers["_v"], buffers["_v2"]]
        return [buffers["_u"]], [buffers["_v"]]

    def call(self, shape: torch.Size) -> functional.Call:
        """The constants of a call for a weight of this shape."""
        norm, scale, bound, zero_guard = self.method
        dims = functional.estimate_dims(shape, self.dim, norm)
        return functional.make_call([dims], [scale], self.eps, False, bound, zero_guard)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return functional.normalize_vector(weight, self.eps, self.method)
        if self.pending:
            return self.settled(self.pending.pop(), weight)
        iterations = self.n_power_iterations if self.training else 0
        u, v = self.vectors()
        return functional.normalize(self.call(weight.shape), [weight], u, v, [iterations])[0][0]

    def settled(self, normalized: Tensor, weight: Tensor) -> Tensor:
        """A pending weight, which may be in autocast's type, in the type that is right for its use.

        Where autocast has been turned off in between, it is computed again with the same u and v.
        """
        if autocast.fits(normalized, weight):
            return normalized
        u, v = self.vectors()
        return functional.normalize(self.call(weight.shape), [weight], u, v, [0])[0][0]

    def _power_method(self, weight_mat: Tensor, n_power_iterations: int) -> None:
        self._warm_up(weight_mat, self._u, self._v, 0, n_power_iterations, v_first=False)

    def _warm_up(
        self, weight: Tensor, u: Tensor, v: Tensor, dim: int, iterations: int, v_first: bool
    ) -> None:
        weights = [weight.detach()]
        backends.select(weights).power_(
            weights, [u], [v], [0], [dim], [iterations], self.eps, v_first, self.method.zero_guard
        )

    @torch.no_grad()
    def adapt(self, weight: Tensor) -> None:
        """Iterates u and v for a new weight, as often as at registration."""
        functional.iterate(self.call(weight.shape), [weight], *self.vectors(), [_WARM_UP])

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
    at registration. Gradients flow through W and sigma, with u and v constant.

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
            or a scale that is not finite and positive.
        IndexError: ``dim`` out of range.
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
    parametrize.register_parametrization(
        module, name, _SpectralNorm(weight, n_power_iterations, dim, eps, method)
    )
    return module
