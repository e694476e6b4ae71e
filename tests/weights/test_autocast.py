"""Accelerated models under autocast: the numbers that autocast would make, without its casts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_norm

import fastsn
from helpers.accelerated import weights_left

low_types = pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)


def on(dtype: torch.dtype, enabled: bool = True):
    return torch.autocast("cpu", dtype, enabled=enabled)


class Standardized(nn.Conv2d):
    """A layer that does more with its weight than autocast would cast it for."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return self._conv_forward(x, weight - weight.mean(), self.bias)


class Net(nn.Module):
    """`head` runs with autocast turned off where `careful`."""

    def __init__(self, careful: bool = False) -> None:
        super().__init__()
        self.conv = torch_norm(nn.Conv2d(3, 8, 3))
        self.up = torch_norm(nn.ConvTranspose2d(8, 4, 2))
        self.own = torch_norm(Standardized(4, 4, 3))
        self.head = torch_norm(nn.Linear(4, 2))
        self.classes = torch_norm(nn.Embedding(5, 2))
        self.careful = careful

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.conv(x))))
        x = self.own(x).mean((2, 3))
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and not self.careful):
            x = self.head(x.float())
        return x.float() * self.classes(torch.arange(len(x)))


def pair(careful: bool = False) -> tuple[Net, Net]:
    """The same network twice, the second accelerated."""
    plain = Net(careful)
    fast = copy.deepcopy(plain)
    return plain, fastsn.accelerate(fast)


def results(model: Net, x: Tensor) -> dict[str, Tensor]:
    """The output, all gradients and all buffers after one step."""
    model.zero_grad()
    out = model(x)
    out.float().square().sum().backward()
    gradients = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters()}
    return {"out": out.detach(), **gradients, **{n: b.clone() for n, b in model.named_buffers()}}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], low: torch.dtype) -> None:
    """To a few roundings of the low type: that is as far as two ways of computing sigma differ."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        scale = value.float().abs().max().item()
        eps = torch.finfo(low).eps
        torch.testing.assert_close(
            actual[name].float(), value.float(), rtol=0, atol=8 * eps * scale + 1e-7, msg=name
        )


@low_types
@pytest.mark.parametrize("careful", [False, True], ids=["throughout", "off-in-between"])
def test_numbers_are_those_of_layers_on_their_own(low, careful):
    ungrouped = fastsn.accelerate(Net(careful))
    fast = copy.deepcopy(ungrouped)
    for hooks in (ungrouped._forward_pre_hooks, ungrouped._forward_hooks):
        hooks.clear()  # its layers serve themselves
    x = torch.randn(5, 3, 8, 8)
    for _ in range(3):
        with on(low):
            actual, expected = results(fast, x), results(ungrouped, x)
        for name in expected:
            if name.endswith(("_u", "_v")):
                assert torch.equal(actual[name], expected[name]), name
        assert_same(actual, expected, low)


@low_types
def test_numbers_are_near_those_of_torch(low):
    plain, fast = pair()
    x = torch.randn(5, 3, 8, 8)
    with on(low):
        # torch iterates in the low type under autocast: its u, v and sigma are that far off.
        plain.eval(), fast.eval()
        actual, expected = fast(x), plain(x)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=0.1)


def types_read(model: Net, x: Tensor) -> dict[str, torch.dtype]:
    """The type of the weight that a forward leaves for each layer."""
    with weights_left(model) as left:
        model(x)
    return {name: weight.dtype for name, weight in left}


@low_types
def test_weights_come_in_the_type_of_autocast_where_it_would_cast_them(low):
    _, fast = pair()
    x = torch.randn(2, 3, 8, 8)
    full = dict.fromkeys(["conv", "up", "own", "head", "classes"], torch.float32)
    with on(low):
        assert types_read(fast, x) == full | dict.fromkeys(["conv", "up", "head"], low)
    with on(low, enabled=False):
        assert types_read(fast, x) == full
    assert types_read(fast, x) == full
    with on(low):
        assert types_read(fast.eval(), x) == full | dict.fromkeys(["conv", "up", "head"], low)
    assert all(w.dtype == torch.float32 for w in fastsn.refresh(fast).values())


def test_weights_read_outside_and_a_second_time_keep_their_type():
    _, fast = pair()
    with on(torch.bfloat16):
        assert fast.conv.weight.dtype == torch.float32
        fast(torch.randn(2, 3, 8, 8))
        assert fast.conv.weight.dtype == torch.float32


def test_a_part_without_autocast_gets_the_exact_weight_and_iterates_once():
    _, fast = pair(careful=True)
    seen = []
    fast.head.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with on(torch.bfloat16):
        fast(torch.randn(2, 3, 8, 8))
    (x, out), weight = seen[0], fast.eval().head.weight
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, F.linear(x, weight, fast.head.bias))


def test_hook_form_and_other_types_are_left_alone():
    hooked = fastsn.accelerate(nn.Sequential(fastsn.spectral_norm(nn.Linear(3, 3))))
    with on(torch.bfloat16):
        assert hooked(torch.randn(2, 3)).dtype == torch.bfloat16
    assert hooked[0].weight.dtype == torch.float32
    half = fastsn.accelerate(nn.Sequential(torch_norm(nn.Linear(3, 3))).bfloat16())
    with on(torch.float16):
        assert half(torch.randn(2, 3)).dtype == torch.float16
    with on(torch.bfloat16):
        assert half(torch.randn(2, 3)).dtype == torch.bfloat16


def test_a_later_parametrization_sees_the_full_type():
    types = []

    class Later(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            types.append(weight.dtype)
            return weight

    layer = torch_norm(nn.Linear(3, 3))
    parametrize.register_parametrization(layer, "weight", Later())
    model = fastsn.accelerate(nn.Sequential(layer))
    types.clear()
    with on(torch.bfloat16):
        model(torch.randn(2, 3))
    assert types == [torch.float32]


def test_cached_parametrizations_keep_the_full_type():
    model = fastsn.accelerate(nn.Sequential(torch_norm(nn.Linear(3, 3))))
    with parametrize.cached():
        with on(torch.bfloat16):
            model(torch.randn(2, 3))
        assert model[0].weight.dtype == torch.float32


# Dynamo asks the pending weights for .grad, and hides the warning from all but filters like ours.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_under_autocast():
    _, fast = pair()
    other = copy.deepcopy(fast)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        with on(torch.bfloat16):
            torch.testing.assert_close(compiled(x), other(x), rtol=0.05, atol=0.05)
    for a, b in zip(fast.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
