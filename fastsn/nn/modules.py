"""Layers whose ``weight`` is spectrally normalized: torch's constructors, plus keywords."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fastsn import parametrizations
from fastsn.engine import WARM_UP
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
        norms[0].converge(norms[0], norms.original, WARM_UP)

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


_DOC = r"""``nn.{plain}`` with a spectrally normalized weight ({methods}).

    .. math::
        y = f(x, s \, W / \sigma(W)), \quad {sigma}

    with f = ``nn.{plain}`` and s = ``scale``, and
    {matrices}. A bias is left alone.
    In training mode every forward does ``n_power_iterations`` steps for u and v and then uses them;
    in eval mode they stay. Gradients flow through W and sigma, with u and v constant.

    ``weight`` is computed at every read, and as with torch's parametrization a write into it is
    lost: assign it (``layer.weight = ...``), or initialize ``parametrizations.weight.original``.

    Shapes: {shapes}.
    Types: those of ``nn.{plain}``; sigma, u and v are computed and kept in fp32 or wider.

    Args:
        *args, **kwargs: those of ``nn.{plain}``.
        n_power_iterations, eps, scale, bound, zero_guard: see
            :func:`fastsn.parametrizations.spectral_norm`.

    Raises:
        ValueError: ``n_power_iterations`` < 1, or a scale that is not finite and positive.
        Besides, what ``nn.{plain}`` raises.

    Example::

        >>> layer = fastsn.nn.{prefix}{plain}({example})
        >>> layer({input}).shape
        torch.Size({output})

    Source: {source}.
    """

_SN = {
    "prefix": "SN",
    "methods": "SN; SSN with a scale",
    "sigma": r"\sigma(W) \approx u^T W v",
    "matrices": "W as the matrix (outputs, all else)",
    "source": "Miyato et al., ICLR 2018 (arXiv 1802.05957)",
}
_BSN = {
    "prefix": "BSN",
    "methods": "BSN; BSSN with a scale",
    "sigma": r"\sigma(W) \approx (u_1^T W_1 v_1 + u_2^T W_2 v_2) / 2",
    "matrices": "W as the matrices (out, in * k) and (in, out * k); for a matrix BSN is SN",
    "source": "Lin, Sekar, Fanti, NeurIPS 2021 (arXiv 2009.02773)",
}
_LINEAR = {
    "shapes": "(*, in_features) to (*, out_features)",
    "example": "128, 10", "input": "torch.randn(4, 128)", "output": "[4, 10]",
}  # fmt: skip
_EMBEDDING = {
    "shapes": "indices (*) to (*, embedding_dim)",
    "example": "10, 128", "input": "torch.tensor([1, 5])", "output": "[2, 128]",
}  # fmt: skip
_CONVOLUTIONS = {
    f"{name}{n}d": {
        "shapes": "(N, C_in, *size) to (N, C_out, *output_size), or both without N",
        "example": "3, 64, 3, padding=1",
        "input": f"torch.randn(2, 3{', 8' * n})",
        "output": f"[2, 64{', 8' * n}]",
    }
    for name in ("Conv", "ConvTranspose")
    for n in (1, 2, 3)
}
#: What docstrings say of each class of torch.
KINDS = {"Linear": _LINEAR, "Embedding": _EMBEDDING, **_CONVOLUTIONS}


def _doc(method: dict[str, str], plain: str) -> str:
    return _DOC.format(plain=plain, **method, **KINDS[plain])


class SNLinear(Normalized, nn.Linear):
    __doc__ = _doc(_SN, "Linear")
    plain = nn.Linear
    norm = "matrix"


class SNConv1d(Normalized, nn.Conv1d):
    __doc__ = _doc(_SN, "Conv1d")
    plain = nn.Conv1d
    norm = "matrix"


class SNConv2d(Normalized, nn.Conv2d):
    __doc__ = _doc(_SN, "Conv2d")
    plain = nn.Conv2d
    norm = "matrix"


class SNConv3d(Normalized, nn.Conv3d):
    __doc__ = _doc(_SN, "Conv3d")
    plain = nn.Conv3d
    norm = "matrix"


class SNConvTranspose1d(Normalized, nn.ConvTranspose1d):
    __doc__ = _doc(_SN, "ConvTranspose1d")
    plain = nn.ConvTranspose1d
    norm = "matrix"


class SNConvTranspose2d(Normalized, nn.ConvTranspose2d):
    __doc__ = _doc(_SN, "ConvTranspose2d")
    plain = nn.ConvTranspose2d
    norm = "matrix"


class SNConvTranspose3d(Normalized, nn.ConvTranspose3d):
    __doc__ = _doc(_SN, "ConvTranspose3d")
    plain = nn.ConvTranspose3d
    norm = "matrix"


class SNEmbedding(Normalized, nn.Embedding):
    __doc__ = _doc(_SN, "Embedding")
    plain = nn.Embedding
    norm = "matrix"


class BSNLinear(Normalized, nn.Linear):
    __doc__ = _doc(_BSN, "Linear")
    plain = nn.Linear
    norm = "bidirectional"


class BSNConv1d(Normalized, nn.Conv1d):
    __doc__ = _doc(_BSN, "Conv1d")
    plain = nn.Conv1d
    norm = "bidirectional"


class BSNConv2d(Normalized, nn.Conv2d):
    __doc__ = _doc(_BSN, "Conv2d")
    plain = nn.Conv2d
    norm = "bidirectional"


class BSNConv3d(Normalized, nn.Conv3d):
    __doc__ = _doc(_BSN, "Conv3d")
    plain = nn.Conv3d
    norm = "bidirectional"


class BSNConvTranspose1d(Normalized, nn.ConvTranspose1d):
    __doc__ = _doc(_BSN, "ConvTranspose1d")
    plain = nn.ConvTranspose1d
    norm = "bidirectional"


class BSNConvTranspose2d(Normalized, nn.ConvTranspose2d):
    __doc__ = _doc(_BSN, "ConvTranspose2d")
    plain = nn.ConvTranspose2d
    norm = "bidirectional"


class BSNConvTranspose3d(Normalized, nn.ConvTranspose3d):
    __doc__ = _doc(_BSN, "ConvTranspose3d")
    plain = nn.ConvTranspose3d
    norm = "bidirectional"


class BSNEmbedding(Normalized, nn.Embedding):
    __doc__ = _doc(_BSN, "Embedding")
    plain = nn.Embedding
    norm = "bidirectional"
