"""Compiled and exported models compute what eager ones do, in one graph and without recompiling."""

from __future__ import annotations

import pytest
import torch
from accelerated import chain, chain_input, step
from torch import nn
from torch._dynamo.utils import counters
from torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED, TORCH_HOOK, TORCH_PARAMETRIZED

import fastsn

double = pytest.mark.usefixtures("double")


def modules(prefix):
    make = [getattr(fastsn.nn, prefix + kind) for kind in ("Conv1d", "Linear", "Linear")]
    return nn.Sequential(
        make[0](2, 3, 2, scale=1.2),
        nn.Tanh(),
        nn.Flatten(),
        make[1](9, 6, n_power_iterations=2),
        nn.Tanh(),
        make[2](6, 5, zero_guard=True),
    )


MODELS = {
    "hook": lambda: chain(FASTSN_HOOK),
    "parametrized": lambda: chain(FASTSN_PARAMETRIZED),
    "SN": lambda: modules("SN"),
    "BSN": lambda: modules("BSN"),
    "accelerated-hook": lambda: fastsn.accelerate(chain(TORCH_HOOK)),
    "accelerated-parametrized": lambda: fastsn.accelerate(chain(TORCH_PARAMETRIZED)),
    "accelerated-SN": lambda: fastsn.accelerate(modules("SN")),
    "accelerated-BSN": lambda: fastsn.accelerate(modules("BSN")),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def compiled_twins(build, **options):
    """A model, the same again, and the second one compiled."""
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(build())
    options = {"backend": "aot_eager", **options}
    return *models, torch.compile(models[1], fullgraph=True, **options)


def assert_same_steps(eager, twin, compiled, modes):
    """u and v are among what is compared: they advance once per forward."""
    for mode in modes:
        eager.train(mode), twin.train(mode)
        x = chain_input()
        torch.testing.assert_close(step(twin, x, forward=compiled), step(eager, x))


@double
@each_model
def test_training_and_evaluation(build):
    models = compiled_twins(build)
    assert_same_steps(*models, [True, False])
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_steps(*models, [True, True, False, True])
    assert counters["stats"]["unique_graphs"] == 2


class Root(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.layers = chain(form)

    def forward(self, x):
        return self.layers(x)


# The compiler looks at `grad` of every input, and hides the warning that this may raise.
@double
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("form", [TORCH_HOOK, TORCH_PARAMETRIZED], ids=["hook", "parametrized"])
def test_a_root_with_a_forward_of_its_own(form):
    """torch compiles the hooks of such a module apart from its forward, each once per mode."""
    models = compiled_twins(lambda: fastsn.accelerate(Root(form)))
    assert_same_steps(*models, [True, False])
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_steps(*models, [True, True, False, True])


@double
@pytest.mark.parametrize("name", ["hook", "BSN", "accelerated-parametrized", "accelerated-hook"])
def test_two_forwards_before_one_backward(name):
    eager, twin, _ = compiled_twins(MODELS[name])

    def loss(model, real, fake):
        return (model(real).square() - model(fake).square()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        real, fake = chain_input(), chain_input()
        for model, call in ((eager, loss), (twin, compiled)):
            model.zero_grad()
            call(model, real, fake).backward()
        for expected, actual in zip(eager.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
        torch.testing.assert_close(twin.state_dict(), eager.state_dict())
    assert counters["stats"]["unique_graphs"] == 1


@double
@pytest.mark.parametrize("name", ["parametrized", "accelerated-BSN"])
def test_training_with_an_optimizer(name):
    eager, twin, compiled = compiled_twins(MODELS[name])
    calls = {eager: eager, twin: compiled}
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in calls]
    for _ in range(4):
        x = chain_input()
        for call, optimizer in zip(calls.values(), optimizers, strict=True):
            optimizer.zero_grad()
            call(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(twin.state_dict(), eager.state_dict())
    assert counters["stats"]["unique_graphs"] == 1


@double
@pytest.mark.parametrize("name", ["SN", "accelerated-hook"])
def test_without_autograd(name):
    eager, twin, compiled = compiled_twins(MODELS[name])
    with torch.no_grad():
        for mode in (True, True, False):
            eager.train(mode), twin.train(mode)
            x = chain_input()
            torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(twin.state_dict(), eager.state_dict())


def test_one_call_in_the_graph_of_an_accelerated_model():
    targets = []

    def record(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    model, _, compiled = compiled_twins(MODELS["accelerated-parametrized"], backend=record)
    compiled(chain_input())
    assert sum("power_" in target for target in targets) == 1


@double
def test_any_batch_size():
    eager, _, compiled = compiled_twins(MODELS["accelerated-BSN"], dynamic=True)
    for size in (7, 11, 13):
        x = torch.randn(size, 2, 4)
        torch.testing.assert_close(compiled(x), eager(x))
    assert counters["stats"]["unique_graphs"] == 1


@double
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_inductor():
    models = compiled_twins(MODELS["accelerated-BSN"], backend="inductor")
    assert_same_steps(*models, [True, True])


@double
def test_calls_on_the_whole_model_between_compiled_steps():
    models = compiled_twins(MODELS["accelerated-parametrized"])
    assert_same_steps(*models, [True])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for call in (fastsn.sigmas, fastsn.refresh, fastsn.fold):
            for model in models[:2]:
                call(model)
            assert_same_steps(*models, [True])


# Export


@each_model
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")
def test_export_in_eval(build):
    model = build().eval()
    x = chain_input()
    expected = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(dict(program.state_dict), state, rtol=0, atol=0)
    # The model goes on as before.
    torch.testing.assert_close(model(x), expected)
    step(model.train(), x)
