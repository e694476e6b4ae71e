"""Layers whose ``weight`` is spectrally normalized: torch's constructors, plus keywords."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fastsn import parametrizations
from fastsn.weights import classes


def _blank(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


class Normalized:
    """What all layers here share; a mixin before a class of ``torch.nn``.

    ``weight`` is the normalized weight (reading it in training mode iterates, see
    :func:`fastsn.parametrizations.spectral_norm`), the parameter is
    ``parametrizations.weight.original``, and checkpoints are those of torch's parametrization;
    those of every other form load too (:mod:`fastsn.checkpoints`).
    """

    plain: type[nn.Module]  # the class of torch.nn that the layer becomes when it is folded
    norm: str

    def __init__(
        self,
        *args: Any,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        scale: float = 1.0,
        bound: bool = False,
        zero_guard: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        parametrizations.spectral_norm(
            self,  # type: ignore[arg-type]
            n_power_iterations=n_power_iterations,
            eps=eps,
            norm=self.norm,
            scale=scale,
            bound=bound,
            zero_guard=zero_guard,
        )

    def reset_parameters(self) -> None:
        """Draws new parameters as the plain layer does, and iterates u and v for them."""
        if not parametrize.is_parametrized(self, "weight"):  # type: ignore[arg-type]
            super().reset_parameters()  # type: ignore[misc]  # in the constructor
            return
        norms = self.parametrizations.weight  # type: ignore[attr-defined]
        parameters = self._parameters  # type: ignore[attr-defined]
        plain: Any = _blank(self.plain)
        plain.__dict__.update(self.__dict__, _parameters={**parameters, "weight": norms.original})
        plain.reset_parameters()
        norms[0].adapt(norms.original)

    def __repr__(self) -> str:
        name = parametrize.type_before_parametrizations(self).__name__  # type: ignore[arg-type]
        return f"{name}({self.extra_repr()})"

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        if not parametrize.is_parametrized(self, "weight"):  # type: ignore[arg-type]
            return own
        return f"{own}, {self.parametrizations.weight[0].extra_repr()}"  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Mixins before this one extend it.
        return classes.deep_copy(self, memo)  # type: ignore[arg-type]


class SNLinear(Normalized, nn.Linear):
    """``nn.Linear`` with ``scale * W / sigma(W)`` as its weight, W as a matrix (SN, SSN).

    Args:
        *args, **kwargs: those of ``nn.Linear``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.SNLinear(128, 10)
    """

    plain = nn.Linear
    norm = "matrix"


class SNConv1d(Normalized, nn.Conv1d):
    """``nn.Conv1d`` with ``scale * W / sigma(W)`` as its weight, W as a matrix (SN, SSN).

    Args:
        *args, **kwargs: those of ``nn.Conv1d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.SNConv1d(3, 64, 3, padding=1)
    """

    plain = nn.Conv1d
    norm = "matrix"


class SNConv2d(Normalized, nn.Conv2d):
    """``nn.Conv2d`` with ``scale * W / sigma(W)`` as its weight, W as a matrix (SN, SSN).

    Args:
        *args, **kwargs: those of ``nn.Conv2d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.SNConv2d(3, 64, 3, padding=1)
    """

    plain = nn.Conv2d
    norm = "matrix"


class SNConv3d(Normalized, nn.Conv3d):
    """``nn.Conv3d`` with ``scale * W / sigma(W)`` as its weight, W as a matrix (SN, SSN).

    Args:
        *args, **kwargs: those of ``nn.Conv3d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.SNConv3d(3, 64, 3, padding=1)
    """

    plain = nn.Conv3d
    norm = "matrix"


class SNConvTranspose1d(Normalized, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with ``scale * W / sigma(W)`` as its weight, W as a matrix (SN, SSN).

    Args:
        *args, **kwargs: those of ``nn.ConvTranspose1d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.SNConvTranspose1d(3, 64, 3, padding=1)
    """

    plain = nn.ConvTranspose1d
    norm = "matrix"


class SNConvTranspose2d(Normalized, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with ``scale * W / sigma(W)`` as its weight, W as a matrix (SN, SSN).

    Args:
        *args, **kwargs: those of ``nn.ConvTranspose2d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.SNConvTranspose2d(3, 64, 3, padding=1)
    """

    plain = nn.ConvTranspose2d
    norm = "matrix"


class SNConvTranspose3d(Normalized, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with ``scale * W / sigma(W)`` as its weight, W as a matrix (SN, SSN).

    Args:
        *args, **kwargs: those of ``nn.ConvTranspose3d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.SNConvTranspose3d(3, 64, 3, padding=1)
    """

    plain = nn.ConvTranspose3d
    norm = "matrix"


class SNEmbedding(Normalized, nn.Embedding):
    """``nn.Embedding`` with ``scale * W / sigma(W)`` as its weight, W as a matrix (SN, SSN).

    Args:
        *args, **kwargs: those of ``nn.Embedding``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.SNEmbedding(10, 128)
    """

    plain = nn.Embedding
    norm = "matrix"


class BSNLinear(Normalized, nn.Linear):
    """``nn.Linear`` with ``scale * W / ((sigma_1 + sigma_2) / 2)`` as its weight (BSN, BSSN).

    sigma_1 and sigma_2 are the norms of W as (out, in * k) and as (in, out * k); for a matrix both
    are one and BSN is SN.

    Args:
        *args, **kwargs: those of ``nn.Linear``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.BSNLinear(128, 10)
    """

    plain = nn.Linear
    norm = "bidirectional"


class BSNConv1d(Normalized, nn.Conv1d):
    """``nn.Conv1d`` with ``scale * W / ((sigma_1 + sigma_2) / 2)`` as its weight (BSN, BSSN).

    sigma_1 and sigma_2 are the norms of W as (out, in * k) and as (in, out * k).

    Args:
        *args, **kwargs: those of ``nn.Conv1d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.BSNConv1d(3, 64, 3, padding=1)
    """

    plain = nn.Conv1d
    norm = "bidirectional"


class BSNConv2d(Normalized, nn.Conv2d):
    """``nn.Conv2d`` with ``scale * W / ((sigma_1 + sigma_2) / 2)`` as its weight (BSN, BSSN).

    sigma_1 and sigma_2 are the norms of W as (out, in * k) and as (in, out * k).

    Args:
        *args, **kwargs: those of ``nn.Conv2d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.BSNConv2d(3, 64, 3, padding=1)
    """

    plain = nn.Conv2d
    norm = "bidirectional"


class BSNConv3d(Normalized, nn.Conv3d):
    """``nn.Conv3d`` with ``scale * W / ((sigma_1 + sigma_2) / 2)`` as its weight (BSN, BSSN).

    sigma_1 and sigma_2 are the norms of W as (out, in * k) and as (in, out * k).

    Args:
        *args, **kwargs: those of ``nn.Conv3d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.BSNConv3d(3, 64, 3, padding=1)
    """

    plain = nn.Conv3d
    norm = "bidirectional"


class BSNConvTranspose1d(Normalized, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with ``scale * W / ((sigma_1 + sigma_2) / 2)`` as its weight (BSN,
    BSSN).

    sigma_1 and sigma_2 are the norms of W as (out, in * k) and as (in, out * k).

    Args:
        *args, **kwargs: those of ``nn.ConvTranspose1d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.BSNConvTranspose1d(3, 64, 3, padding=1)
    """

    plain = nn.ConvTranspose1d
    norm = "bidirectional"


class BSNConvTranspose2d(Normalized, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with ``scale * W / ((sigma_1 + sigma_2) / 2)`` as its weight (BSN,
    BSSN).

    sigma_1 and sigma_2 are the norms of W as (out, in * k) and as (in, out * k).

    Args:
        *args, **kwargs: those of ``nn.ConvTranspose2d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.BSNConvTranspose2d(3, 64, 3, padding=1)
    """

    plain = nn.ConvTranspose2d
    norm = "bidirectional"


class BSNConvTranspose3d(Normalized, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with ``scale * W / ((sigma_1 + sigma_2) / 2)`` as its weight (BSN,
    BSSN).

    sigma_1 and sigma_2 are the norms of W as (out, in * k) and as (in, out * k).

    Args:
        *args, **kwargs: those of ``nn.ConvTranspose3d``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.BSNConvTranspose3d(3, 64, 3, padding=1)
    """

    plain = nn.ConvTranspose3d
    norm = "bidirectional"


class BSNEmbedding(Normalized, nn.Embedding):
    """``nn.Embedding`` with ``scale * W / ((sigma_1 + sigma_2) / 2)`` as its weight (BSN, BSSN).

    sigma_1 and sigma_2 are the norms of W as (out, in * k) and as (in, out * k); for a matrix both
    are one and BSN is SN.

    Args:
        *args, **kwargs: those of ``nn.Embedding``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Example::

        >>> layer = fastsn.nn.BSNEmbedding(10, 128)
    """

    plain = nn.Embedding
    norm = "bidirectional"
