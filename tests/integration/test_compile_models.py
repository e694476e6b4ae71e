"""Compiled models whose forward is their user's own, and calls that only have such a model within.

``torch.compile(model)`` calls the hooks of such a model outside of the graph of its forward: those
of :func:`fastsn.accelerate` are a graph of their own, before it and after it.
"""

from __future__ import annotations

import functools
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import fastsn
from helpers.accelerated import chain, chain_input, step
from helpers.compiled import Twins, forget, no_recompiles, quiet
from helpers.convertible import ResNet, images
from helpers.torch_peers import TORCH_HOOK, TORCH_PARAMETRIZED, slow_linear, start, steps_taken

pytestmark = quiet
double = pytest.mark.usefixtures("double")
each_form = pytest.mark.parametrize(
    "form", [TORCH_HOOK, TORCH_PARAMETRIZED], ids=["hook", "parametrized"]
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    forget()


def batches(*sizes):
    return [torch.randn(size, 2, 4) for size in sizes]


class Root(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.layers = chain(form)
        self.head = form.spectral_norm(nn.Linear(5, 3))

    def forward(self, x):
        y = self.layers(x)
        # The second use of a layer iterates once more, as in torch.
        return self.head(y) + self.head(torch.tanh(y))


class Modules(nn.Module):
    """fastsn's modules, with MSN."""

    def __init__(self):
        super().__init__()
        self.first = fastsn.nn.MSNConv1d(2, 3, 2, gain=True)
        self.second = fastsn.nn.BSNConv1d(3, 4, 2)
        self.last = fastsn.nn.SNLinear(8, 3, n_power_iterations=2)

    def forward(self, x):
        return self.last(self.second(torch.tanh(self.first(x))).flatten(1))


def nested():
    """A root within a root; the outer one serves the layers of both."""
    model = nn.Sequential(Root(TORCH_PARAMETRIZED), TORCH_HOOK.spectral_norm(nn.Linear(3, 2)))
    fastsn.accelerate(model[0])
    return fastsn.accelerate(model)


MODELS = {
    "hook": lambda: fastsn.accelerate(Root(TORCH_HOOK)),
    "parametrized": lambda: fastsn.accelerate(Root(TORCH_PARAMETRIZED)),
    "modules": Modules,
    "accelerated-modules": lambda: fastsn.accelerate(Modules()),
    "nested": nested,
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
accelerated_models = pytest.mark.parametrize(
    "build", [MODELS["hook"], MODELS["parametrized"]], ids=["hook", "parametrized"]
)


@double
@each_model
def test_training_and_evaluation(build):
    twins = Twins(build)
    twins.steps(batches(4, 5), [True, False])
    with no_recompiles():
        twins.steps(batches(7, 3), [True, True, False, True])


@double
@pytest.mark.parametrize("gain", [False, True])
def test_a_converted_model(gain):
    def build():
        model = ResNet()
        fastsn.nn.convert_batchnorm(model, gain=gain)
        return fastsn.accelerate(model)

    twins = Twins(build)
    twins.steps([images(), images()[:3]], [True, False])
    with no_recompiles():
        twins.steps([images()], [True, True, False])


@double
@each_form
def test_inductor(form):
    twins = Twins(lambda: fastsn.accelerate(Root(form)), backend="inductor")
    twins.steps(batches(4), [True, True, False])


@torch._dynamo.config.patch(recompile_limit=4)
def test_many_models():
    """Of classes of their own: their hooks do not use up each other's limit of graphs either."""
    for layers in range(torch._dynamo.config.recompile_limit // 2 + 1):
        forward = types.FunctionType(Root.forward.__code__.replace(), globals())
        model = type("Own", (Root,), {"forward": forward})(TORCH_PARAMETRIZED)
        extra = (TORCH_PARAMETRIZED.spectral_norm(nn.Linear(5, 5)) for _ in range(layers))
        model.layers.extend(extra)
        compiled = torch.compile(fastsn.accelerate(model), fullgraph=True, backend="eager")
        for mode in (True, False):
            model.train(mode)
            compiled(chain_input())


class Single(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@each_form
@pytest.mark.parametrize("iterations", [1, 2])
def test_every_forward_iterates_once(form, iterations):
    layer = form.spectral_norm(slow_linear(), n_power_iterations=iterations)
    model = fastsn.accelerate(Single(layer))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for grad in (True, False):
        before = start(form, layer)
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                compiled(torch.randn(3, 5, dtype=torch.float64))
        assert steps_taken(form, layer, before) == 3 * iterations


@double
@accelerated_models
def test_two_forwards_before_one_backward(build):
    twins = Twins(build)
    for _ in range(2):
        real, fake = batches(4, 4)
        for model, call in twins:
            model.zero_grad()
            (call(real).square() - call(fake).square()).sum().backward()
        for expected, actual in zip(twins.eager.parameters(), twins.twin.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
        torch.testing.assert_close(twins.twin.state_dict(), twins.eager.state_dict())


class Picky(Root):
    def forward(self, x):
        # An index out of range is found when the graph runs, and not before.
        return super().forward(F.embedding(x, torch.eye(5)[:, :4]))


@double
@each_form
def test_a_forward_that_fails_leaves_no_weight_behind(form):
    """In the compiler, or when the compiled graph runs: the next forward is right."""
    twins = Twins(lambda: fastsn.accelerate(Picky(form)))
    good = torch.arange(6).view(3, 2) % 5
    wrong_shape = torch.zeros(3, 3, dtype=torch.long)
    twins.step(good)
    for bad, error in ((good + 3, IndexError), (wrong_shape, RuntimeError)):
        for _, call in twins:
            with pytest.raises(error):
                call(bad)
        # Where it failed decides whether u and v had moved.
        twins.twin.load_state_dict(twins.eager.state_dict())
        twins.step(good)


class Spare(Root):
    def __init__(self, form):
        super().__init__(form)
        self.spare = form.spectral_norm(nn.Linear(5, 5))


@double
@each_form
@pytest.mark.parametrize("order", ["accelerated first", "compiled first"])
def test_a_layer_that_is_not_used(form, order):
    """It has no gradient; or one of zeros, where the compiler has seen its weight."""
    if order == "accelerated first":
        twins = Twins(lambda: fastsn.accelerate(Spare(form)))
    else:
        twins = Twins(lambda: Spare(form))
        fastsn.accelerate(twins.eager), fastsn.accelerate(twins.compiled)
    for mode in (True, True, False, True):
        twins.train(mode)
        x = chain_input()
        expected, actual = (step(model, x, forward=call) for model, call in twins)
        spare = [name for name in actual if name not in expected]
        if order == "accelerated first":
            assert len(spare) == 1 and "spare" in spare[0]
            assert not actual.pop(spare[0]).any()
        torch.testing.assert_close(actual, expected)


@double
@accelerated_models
def test_within_a_function(build):
    """All in one graph then, the hooks of the model included."""
    twins = Twins(build)

    def loss(model, x):
        return model(x).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x in batches(4, 4):
        results = []
        for model, call in ((twins.eager, loss), (twins.twin, compiled)):
            results.append(step(model, x, forward=functools.partial(call, model)))
        torch.testing.assert_close(results[1], results[0])
    assert counters["stats"]["unique_graphs"] == 1


@double
@each_form
def test_a_part_of_the_model(form):
    """The eager root serves layers that are compiled."""

    def build():
        return fastsn.accelerate(nn.Sequential(Root(form), form.spectral_norm(nn.Linear(3, 2))))

    twins = Twins(build)
    twins.twin[0].compile(fullgraph=True, backend="aot_eager")
    for mode in (True, True, False, True):
        twins.train(mode)
        x = chain_input()
        torch.testing.assert_close(step(twins.twin, x), step(twins.eager, x))
    assert counters["stats"]["unique_graphs"]


@double
@accelerated_models
def test_compiled_in_place(build):
    twins = Twins(build)
    twins.twin.compile(fullgraph=True, backend="aot_eager")
    for mode in (True, True, False, True):
        twins.train(mode)
        x = chain_input()
        torch.testing.assert_close(step(twins.twin, x), step(twins.eager, x))
    assert counters["stats"]["unique_graphs"]


@double
@each_form
@pytest.mark.parametrize("which", ["compiled", "model"])
def test_accelerated_after_it_was_compiled(form, which):
    twins = Twins(lambda: Root(form))
    fastsn.accelerate(twins.eager)
    fastsn.accelerate(twins.compiled if which == "compiled" else twins.twin)
    twins.steps(batches(4), [True, True, False, True])


@double
@each_form
def test_once_per_optimizer_step(form):
    """Where the model is accelerated after it was compiled, u and v can follow the weights."""
    twins = Twins(lambda: Single(form.spectral_norm(slow_linear())))
    fastsn.accelerate(twins.eager), fastsn.accelerate(twins.compiled)
    for model, _ in twins:
        fastsn.set_update_policy(model, "step")
    before = start(form, twins.twin.layer)
    x = torch.randn(3, 5)
    for moved in (1, 2):
        for _ in range(2):
            twins.step(x)
            assert steps_taken(form, twins.twin.layer, before) == moved
        with torch.no_grad():
            for model, _ in twins:
                form.vectors(model.layer)[0].mul_(1)


@each_form
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(form, enabled):
    twins = Twins(lambda: fastsn.accelerate(Root(form)))
    for on in (enabled, not enabled, enabled):
        x = chain_input()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            expected, actual = twins.eager(x), twins.compiled(x)
        low = torch.bfloat16 if on else torch.float32
        assert actual.dtype == expected.dtype == low
        band = 8 * torch.finfo(low).eps
        torch.testing.assert_close(actual, expected, rtol=band, atol=band)
        torch.testing.assert_close(twins.twin.state_dict(), twins.eager.state_dict())


@double
@each_form
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("order", ["of the wrapper", "within it"])
def test_distributed_data_parallel(form, order, tmp_path):
    """pytorch#113415: the wrapper itself has no full graph, whatever is within."""
    rendezvous = (tmp_path / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        if order == "of the wrapper":
            twins = Twins(
                lambda: DistributedDataParallel(fastsn.accelerate(Root(form))), fullgraph=False
            )
        else:
            twins = Twins(lambda: fastsn.accelerate(Root(form)))
            twins.compiled = DistributedDataParallel(twins.compiled)
        for mode in (True, True, False, True):
            twins.train(mode)
            x = chain_input()
            expected, actual = (step(model, x, forward=call) for model, call in twins)
            torch.testing.assert_close(actual, expected)
        assert counters["stats"]["unique_graphs"]
    finally:
        dist.destroy_process_group()
