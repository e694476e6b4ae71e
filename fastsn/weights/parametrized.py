"""The form of ``torch.nn.utils.parametrizations.spectral_norm``: a parametrization with u and v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm as TorchParametrization

from fastsn import engine, recompute
from fastsn.engine import Method
from fastsn.sharded import placements
from fastsn.weights import autocast, normalizer
from fastsn.weights.normalizer import Normalizer

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def default_dim(module: nn.Module) -> int:
    """The dimension of a weight that counts outputs: 1 for transposed convolutions, else 0."""
    return 1 if isinstance(module, _TRANSPOSED) else 0


def all_of(module: Any, name: str) -> Any:
    """All parametrizations of a weight, without the long search for an attribute of a module."""
    return module._modules["parametrizations"]._modules[name]


class _SpectralNorm(Normalizer, TorchParametrization):
    """The parametrization behind :func:`fastsn.parametrizations.spectral_norm`, to derive from.

    It takes torch's arguments, has torch's buffers ``_u`` and ``_v``, and *is* a torch
    ``_SpectralNorm``. A subclass may override

    - ``forward(weight)``, the normalized weight of one read; ``super().forward(weight)`` is that of
      fastsn, to be scaled or switched off;
    - ``_reshape_weight_to_matrix(weight)`` and ``_power_method(matrix, n_power_iterations)``, which
      are then used as torch uses them (``norm="matrix"`` only).

    :func:`fastsn.accelerate` groups objects of this very class; those of subclasses serve
    themselves.

    Example::

        >>> class LearnedScale(fastsn.parametrizations._SpectralNorm):
        ...     def __init__(self, weight):
        ...         super().__init__(weight)
        ...         self.gamma = nn.Parameter(torch.ones(()))
        ...
        ...     def forward(self, weight):
        ...         return self.gamma * super().forward(weight)
        >>> layer = nn.Linear(8, 8)
        >>> parametrize.register_parametrization(layer, "weight", LearnedScale(layer.weight))
    """

    form = "parametrization"
    reads_directly = True  # objects of this very class, see fastsn.weights.classes

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        method: Method = engine.SN,
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
            dims = engine.estimate_dims(weight.shape, self.dim, method.norm)
            if self._has_own_matrix():
                drawn_like, dims = self._reshape_weight_to_matrix(weight), (0,)
            for own_dim, suffix in zip(dims, ("", "2"), strict=False):
                (u,), (v,) = engine.init_vectors(drawn_like, [own_dim], eps)
                self.register_buffer(f"_u{suffix}", u)
                self.register_buffer(f"_v{suffix}", v)
            placements.agree(weight, list(self.buffers()))
            self.converge(self, weight, engine.WARM_UP)
        self.was_meta = weight.is_meta
        self.prepare()

    def forward(self, weight: Tensor) -> Tensor:
        """The normalized weight, for one read of it."""
        if weight.ndim == 1:
            return engine.normalize_vector(weight, self.eps, self.method)
        if self._has_own_matrix():
            return self._by_matrix(weight)
        return self.read(self, weight)

    def _has_own_matrix(self) -> bool:
        own, torchs = type(self), TorchParametrization
        return own is not _SpectralNorm and (
            own._power_method is not torchs._power_method
            or own._reshape_weight_to_matrix is not torchs._reshape_weight_to_matrix
        )

    def _by_matrix(self, weight: Tensor) -> Tensor:
        """torch's formula, around the helpers that a subclass has made its own."""
        if self.method.norm != "matrix":
            raise ValueError(
                f"expected norm='matrix' where {type(self).__name__} overrides the matrix, got "
                f"norm={self.method.norm!r}"
            )
        matrix = self._reshape_weight_to_matrix(weight)
        moves = self.training and not recompute.is_repeating()
        n = self.state(self, weight, moves, *self.vectors(self))[2]
        if n:
            self._power_method(matrix, n)
        # Copies: u and v may move on before the backward.
        (u,), (v,) = self.vectors(self)
        wide = matrix.to(u.dtype)
        sigma = torch.vdot(u.clone(), torch.mv(wide, v.clone()))
        return engine.constrain(weight, sigma, self.method)

    def vectors(self, holder: Any) -> tuple[list[Tensor], list[Tensor]]:
        return normalizer.vectors_in(holder._buffers, "")

    def source(self, module: Any, name: str) -> Tensor | None:
        lists = module._modules.get("parametrizations")
        norms = None if lists is None else lists._modules.get(name)
        if (
            norms is None
            or norms._modules.get("0") is not self
            # Whatever is to run before a read might change what is read.
            or norms._forward_pre_hooks
            or norms._forward_hooks
            or self._forward_pre_hooks
            or self._forward_hooks
            or "forward" in norms.__dict__
            or "forward" in self.__dict__
        ):
            return None
        original = norms._parameters.get("original")
        return norms._buffers.get("original") if original is None else original

    def casts(self, module: Any, name: str) -> bool:
        return len(all_of(module, name)) == 1 and autocast.casts(module, name)

    def finish(self, module: Any, name: str, weight: Tensor) -> Tensor:
        for later in list(all_of(module, name))[1:]:
            weight = later(weight)
        return weight

    @torch.no_grad()
    def converge(self, holder: Any, weight: Tensor, n_power_iterations: int) -> None:
        if self._has_own_matrix():
            self._power_method(self._reshape_weight_to_matrix(weight), n_power_iterations)
        else:
            super().converge(holder, weight, n_power_iterations)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, after in self._buffers.items():
            self.was_meta = self.was_meta or (after is not None and after.is_meta)
            # half() and its like round weights, but not u and v
            if after is not None and after.dtype in normalizer.NARROW and not before[name].is_meta:
                self._buffers[name] = before[name].to(after.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        shown = {"dim": self.dim, "eps": self.eps}
        if hasattr(self, "n_power_iterations"):
            shown["n_power_iterations"] = self.n_power_iterations
        return ", ".join(f"{k}={v!r}" for k, v in {**shown, **self.method.changed()}.items())


def adopt(norm: TorchParametrization) -> None:
    """Makes an object of torch's class one of fastsn's, in place; others stay what they are."""
    if type(norm) is TorchParametrization:
        own: Any = norm
        own.__class__ = _SpectralNorm
        own.was_meta = any(vector.is_meta for vector in norm.buffers())
        own.prepare()
