"""torch's two spectral norms and fastsn's under one set of names, and the arithmetic of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as torch_hook_spectral_norm
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
    remove_spectral_norm,
)

import fastsn
import fastsn.hooks
import fastsn.parametrizations


@dataclass(frozen=True)
class HookForm:
    """What `torch.nn.utils.spectral_norm` and its classes are called in one implementation."""

    spectral_norm: Callable[..., nn.Module]
    remove: Callable[..., nn.Module]
    SpectralNorm: type
    StateDictHook: type
    LoadStateDictPreHook: type
    v_first = True

    def vectors(self, module: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor, Tensor]:
        """The original weight, u and v."""
        return tuple(getattr(module, name + suffix) for suffix in ("_orig", "_u", "_v"))

    def place(self, module: nn.Module, name: str = "weight") -> tuple[nn.Module, str, list[str]]:
        """The module that u and v are buffers of, its prefix, and their names."""
        return module, "", [name + "_u", name + "_v"]

    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        """The normalized weight as a forward takes it, and moves u and v."""
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
        return getattr(module, name)


@dataclass(frozen=True)
class ParametrizedForm:
    """The same for `torch.nn.utils.parametrizations.spectral_norm`."""

    spectral_norm: Callable[..., nn.Module]
    SpectralNorm: type
    v_first = False

    def vectors(self, module: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor, Tensor]:
        """The original weight, u and v."""
        parametrizations = module.parametrizations[name]
        return parametrizations.original, parametrizations[0]._u, parametrizations[0]._v

    def remove(self, module: nn.Module, name: str = "weight") -> nn.Module:
        return parametrize.remove_parametrizations(module, name)

    def place(self, module: nn.Module, name: str = "weight") -> tuple[nn.Module, str, list[str]]:
        """The module that u and v are buffers of, its prefix, and their names."""
        return module.parametrizations[name][0], f"parametrizations.{name}.0.", ["_u", "_v"]

    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        """The normalized weight as a forward takes it, and moves u and v."""
        return getattr(module, name)


TORCH_HOOK = HookForm(
    torch_hook_spectral_norm,
    remove_spectral_norm,
    SpectralNorm,
    SpectralNormStateDictHook,
    SpectralNormLoadStateDictPreHook,
)
FASTSN_HOOK = HookForm(
    fastsn.spectral_norm,
    fastsn.remove_spectral_norm,
    fastsn.hooks.SpectralNorm,
    fastsn.hooks.SpectralNormStateDictHook,
    fastsn.hooks.SpectralNormLoadStateDictPreHook,
)
TORCH_PARAMETRIZED = ParametrizedForm(
    torch_parametrizations.spectral_norm, torch_parametrizations._SpectralNorm
)
FASTSN_PARAMETRIZED = ParametrizedForm(
    fastsn.parametrizations.spectral_norm, fastsn.parametrizations._SpectralNorm
)

HOOKS = {"torch-hook": TORCH_HOOK, "fastsn-hook": FASTSN_HOOK}
PARAMETRIZED = {
    "torch-parametrized": TORCH_PARAMETRIZED,
    "fastsn-parametrized": FASTSN_PARAMETRIZED,
}
FORMS = {**HOOKS, **PARAMETRIZED}


def combined(names: str, *groups: tuple[dict, list]) -> pytest.MarkDecorator:
    """Every form of each group of forms with each of the group's values."""
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(form, *(x if isinstance(x, tuple) else (x,)), id=f"{name}-{x}")
            for forms, values in groups
            for name, form in forms.items()
            for x in values
        ],
    )


each_hook_form = pytest.mark.parametrize("form", HOOKS.values(), ids=["torch", "fastsn"])
each_parametrized_form = pytest.mark.parametrize(
    "form", PARAMETRIZED.values(), ids=["torch", "fastsn"]
)
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_pair = pytest.mark.parametrize(
    "peer, ours",
    [
        pytest.param(TORCH_HOOK, FASTSN_HOOK, id="hook"),
        pytest.param(TORCH_PARAMETRIZED, FASTSN_PARAMETRIZED, id="parametrized"),
    ],
)


class Holder(nn.Module):
    """One tensor as parameter `weight`, and nothing else."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=weight.dtype != torch.int64)

    def forward(self) -> Tensor:
        return self.weight


@dataclass(frozen=True)
class Layer:
    """A way to build a layer, the weight to normalize, and an input for the layer."""

    build: Callable[[], nn.Module]
    example: Callable[[], tuple[Tensor, ...]]
    name: str = "weight"

    def call(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        output = module(*inputs)
        return output[0] if isinstance(output, tuple) else output


def _input(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


LAYERS = {
    "linear": Layer(lambda: nn.Linear(5, 7), _input(3, 5)),
    "linear-bias": Layer(lambda: nn.Linear(5, 7), _input(3, 5), "bias"),
    "bilinear": Layer(lambda: nn.Bilinear(3, 4, 5), lambda: (torch.randn(2, 3), torch.randn(2, 4))),
    "conv1d": Layer(lambda: nn.Conv1d(3, 5, 3), _input(2, 3, 8)),
    "conv2d": Layer(lambda: nn.Conv2d(3, 5, (2, 3)), _input(2, 3, 6, 7)),
    "conv2d-grouped": Layer(lambda: nn.Conv2d(4, 6, 3, groups=2), _input(2, 4, 6, 7)),
    "conv3d": Layer(lambda: nn.Conv3d(2, 3, 2), _input(2, 2, 4, 5, 3)),
    "conv_transpose1d": Layer(lambda: nn.ConvTranspose1d(3, 5, 3), _input(2, 3, 8)),
    "conv_transpose2d": Layer(lambda: nn.ConvTranspose2d(3, 4, (5, 6)), _input(2, 3, 4, 5)),
    "conv_transpose3d": Layer(lambda: nn.ConvTranspose3d(2, 3, 2), _input(2, 2, 4, 5, 3)),
    "embedding": Layer(lambda: nn.Embedding(9, 4), lambda: (torch.randint(9, (2, 3)),)),
    "lstm": Layer(lambda: nn.LSTM(3, 4), _input(5, 2, 3), "weight_hh_l0"),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def twins(
    build: Callable[[], nn.Module], peer, ours, *args, **kwargs
) -> tuple[nn.Module, nn.Module]:
    """The same module normalized by both, from the same random state."""
    original = build()
    modules = []
    for form in (peer, ours):
        torch.manual_seed(11)
        modules.append(form.spectral_norm(copy.deepcopy(original), *args, **kwargs))
    return modules[0], modules[1]


def slow_weight(height: int = 6, width: int = 5) -> Tensor:
    """A float64 matrix on which power iterations can be counted: it converges slowly."""
    rank = min(height, width)
    left, _ = torch.linalg.qr(torch.randn(height, rank, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64))
    return left @ torch.diag(torch.linspace(3.0, 2.7, rank, dtype=torch.float64)) @ right.T


def slow_linear() -> nn.Linear:
    layer = nn.Linear(5, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(slow_weight())
    return layer


def as_matrix(weight: Tensor, dim: int = 0) -> Tensor:
    return weight.detach().movedim(dim, 0).reshape(weight.shape[dim], -1)


def iterate(
    matrix: Tensor, u: Tensor, v: Tensor, *, steps: int = 1, eps: float = 1e-12, v_first: bool
) -> tuple[Tensor, Tensor]:
    """`steps` power iterations, written out."""
    for _ in range(steps):
        if v_first:
            v = F.normalize(matrix.mH @ u, dim=0, eps=eps)
            u = F.normalize(matrix @ v, dim=0, eps=eps)
        else:
            u = F.normalize(matrix @ v, dim=0, eps=eps)
            v = F.normalize(matrix.mH @ u, dim=0, eps=eps)
    return u, v


def normalized(weight: Tensor, u: Tensor, v: Tensor, dim: int = 0) -> Tensor:
    """weight / sigma, differentiable in weight, u and v constant."""
    return weight / torch.vdot(u, weight.movedim(dim, 0).reshape(weight.shape[dim], -1) @ v)


def steps_taken(form, module: nn.Module, before: Tensor, name: str = "weight") -> int:
    """How many iterations lie between `before` (u of the hook form, else v) and now."""
    weight, u, v = form.vectors(module, name)
    matrix = as_matrix(weight)
    expected_u = expected_v = before
    matches = []
    for count in range(40):
        if torch.allclose(expected_u if form.v_first else expected_v, u if form.v_first else v):
            matches.append(count)
        expected_u, expected_v = iterate(matrix, expected_u, expected_v, v_first=form.v_first)
    assert len(matches) == 1, f"iteration counts that fit: {matches}"
    return matches[0]


def start(form, module: nn.Module, name: str = "weight") -> Tensor:
    """A copy of the vector that the next iteration starts from, for `steps_taken`."""
    _, u, v = form.vectors(module, name)
    return (u if form.v_first else v).clone()


def copy_double(tensor: Tensor) -> Tensor:
    """A detached copy in float64, or complex128."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).clone()


def assert_no_worse(actual: Tensor, peer: Tensor, exact: Tensor) -> None:
    """The error against float64 is at most twice that of `peer`, and a rounding band."""
    assert actual.dtype == peer.dtype and actual.shape == peer.shape
    error = (copy_double(actual) - exact).abs().max()
    peer_error = (copy_double(peer) - exact).abs().max()
    band = 2 * torch.finfo(peer.dtype).eps * exact.abs().max()
    assert error <= 2 * peer_error + band, f"error {error:.3g}, torch's {peer_error:.3g}"


def raised(call: Callable[[], object]) -> Exception:
    """The exception of a call that must fail."""
    with pytest.raises(Exception) as caught:  # noqa: B017  (compared with torch's by the caller)
        call()
    return caught.value
