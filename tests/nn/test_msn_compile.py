"""Compiled and exported networks of MSN layers compute what eager ones do, in one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastsn
from fastsn.nn import msn
from helpers.msn_cases import image, network, weights_of

double = pytest.mark.usefixtures("double")


@pytest.fixture(params=[1e9, 0.0], ids=["folded", "direct"])
def form(request, monkeypatch):
    monkeypatch.setattr(msn, "_DIRECT", request.param)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


# The compiler looks at `grad` of every input, and hides the warning that this may raise.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def train(model: nn.Module, call, sizes, modes) -> list[dict[str, Tensor]]:
    """All that is there after each step, of batches of these sizes."""
    torch.manual_seed(3)
    history = []
    for size in sizes:
        for training in modes:
            model.train(training), model.zero_grad()
            y = call(image(size))
            (y * weights_of(y)).sum().backward()
            gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
            state = {name: value.clone() for name, value in model.state_dict().items()}
            history.append({"output": y.detach(), **gradients, **state})
    return history


SIZES, MODES = (4, 5, 7, 6), (True, True, False)


@double
@compiles
@pytest.mark.parametrize("accelerated, momentum", [(False, None), (True, 0.1)])
def test_compiled_with_a_full_graph(accelerated, momentum, form, fresh_compiler):
    """Numbers and statistics of eager mode, for batches of every size."""
    model = network(momentum=momentum)
    if accelerated:
        fastsn.accelerate(model)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        train(model, compiled, SIZES, MODES), train(eager, eager, SIZES, MODES)
    )
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, compiled, SIZES[::-1], MODES)


@compiles
def test_compiled_no_more_often_than_batch_norm(form, fresh_compiler):
    graphs = []
    norms = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5)]
    for layers in (norms, [fastsn.nn.MSNConv2d(3, 8, 3), nn.Flatten(), fastsn.nn.MSNLinear(32, 5)]):
        torch._dynamo.reset(), counters.clear()
        model = nn.Sequential(*layers)
        train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), SIZES, MODES)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] <= graphs[0]


@double
@compiles
@pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is (deprecated|not supported)")
def test_inductor(fresh_compiler):
    model = fastsn.accelerate(network())
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(
        train(model, compiled, [4], MODES[:2]), train(eager, eager, [4], MODES[:2])
    )


@compiles
def test_compiled_under_autocast(fresh_compiler):
    model = network()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = image()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(x), eager(x), rtol=0.05, atol=0.05)
    for a, b in zip(model.buffers(), eager.buffers(), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_exported_in_eval():
    model = network().eval()
    x = image()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
