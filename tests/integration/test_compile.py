"""Compiled and exported layers compute what eager ones do, in one graph and without recompiling."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fastsn
from helpers.accelerated import chain, chain_input, step
from helpers.compiled import Twins, forget, no_recompiles, quiet
from helpers.sweeps import each_value, long, sweep
from helpers.torch_peers import (
    FASTSN_HOOK,
    FASTSN_PARAMETRIZED,
    TORCH_HOOK,
    TORCH_PARAMETRIZED,
    slow_linear,
    start,
    steps_taken,
)

pytestmark = quiet
double = pytest.mark.usefixtures("double")


@pytest.fixture(autouse=True)
def fresh_compiler():
    forget()


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


def some_models(*names, in_long_runs=()):
    cases = [pytest.param(MODELS[name], id=name) for name in names]
    cases += [pytest.param(MODELS[name], id=name, marks=long) for name in in_long_runs]
    return pytest.mark.parametrize("build", cases)


def batches(*sizes):
    return [torch.randn(size, 2, 4) for size in sizes]


@double
@each_model
def test_training_and_evaluation(build):
    twins = Twins(build)
    twins.steps(batches(4), [True, False])
    assert counters["stats"]["unique_graphs"] == 2
    with no_recompiles():
        twins.steps(batches(4), [True, True, False, True])
    assert counters["stats"]["unique_graphs"] == 2


@double
@some_models(
    *("hook", "SN", "accelerated-parametrized", "accelerated-BSN"),
    in_long_runs=("parametrized", "BSN", "accelerated-hook", "accelerated-SN"),
)
def test_batches_of_any_size(build):
    twins = Twins(build)
    twins.steps(batches(4, 5), [True, False])
    with no_recompiles():
        twins.steps(batches(7, 3, 11), [True, False, True])


@double
@some_models("hook", "BSN", "accelerated-parametrized", "accelerated-hook")
def test_a_batch_that_is_marked_as_dynamic(build):
    twins = Twins(build)
    (first,) = batches(4)
    torch._dynamo.mark_dynamic(first, 0)
    twins.step(first)
    with no_recompiles():
        twins.steps(batches(7, 3), [True])
    assert counters["stats"]["unique_graphs"] == 1


@sweep
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("form", [FASTSN_HOOK, FASTSN_PARAMETRIZED], ids=["hook", "parametrized"])
def test_every_forward_iterates_once(form, iterations, accelerated):
    layer = form.spectral_norm(slow_linear(), n_power_iterations=iterations)
    model = nn.Sequential(layer)
    if accelerated:
        fastsn.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, dtype=torch.float64)
    for grad in (True, False):
        before = start(form, layer)
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                compiled(x)
        assert steps_taken(form, layer, before) == 3 * iterations
    before = start(form, layer)
    model.eval()
    compiled(x)
    assert steps_taken(form, layer, before) == 0


@double
@some_models("hook", "BSN", "accelerated-parametrized", "accelerated-hook")
def test_two_forwards_before_one_backward(build):
    """Within one graph, as calls of one graph, and the first of them in eval mode."""

    def loss(model, real, fake):
        return (model(real).square() - model(fake).square()).sum()

    def mixed(model, call, real, fake):
        model.eval()
        evaluated = call(real)
        model.train()
        return (evaluated.square() - call(fake).square()).sum()

    twins = Twins(build)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    losses = [
        ((twins.eager, loss), (twins.twin, compiled)),
        [(call, loss) for _, call in twins],
        [(model, lambda m, r, f, call=call: mixed(m, call, r, f)) for model, call in twins],
    ]
    for pair in losses:
        for _ in range(2):
            real, fake = batches(4, 4)
            for (model, _), (argument, call) in zip(twins, pair, strict=True):
                model.zero_grad()
                call(argument, real, fake).backward()
            for expected, actual in zip(
                twins.eager.parameters(), twins.twin.parameters(), strict=True
            ):
                torch.testing.assert_close(actual.grad, expected.grad)
            torch.testing.assert_close(twins.twin.state_dict(), twins.eager.state_dict())
    assert not counters["graph_break"]


@double
@some_models("parametrized", "accelerated-hook")
def test_gradient_penalties_call_the_eager_model(build):
    """The compiler has no double backward, whatever the layers; both kinds of call may alternate.

    The penalty is taken of the model itself, which shares everything with the compiled one.
    """
    twins = Twins(build)

    def penalty(call, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
        return slope.square().sum()

    with pytest.raises(RuntimeError, match="double backward"):
        penalty(twins.compiled, chain_input()).backward()
    penalty(twins.eager, chain_input())  # the forward has moved u and v, as it does here
    for _ in range(2):
        x, y = batches(4, 4)
        for model, call in twins:
            model.zero_grad()
            (call(x).square().sum() + penalty(model, y)).backward()
        for expected, actual in zip(twins.eager.parameters(), twins.twin.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
        torch.testing.assert_close(twins.twin.state_dict(), twins.eager.state_dict())


@double
@some_models("parametrized", "accelerated-BSN")
def test_training_with_an_optimizer(build):
    twins = Twins(build)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model, _ in twins]
    for _ in range(4):
        x = chain_input()
        for (_, call), optimizer in zip(twins, optimizers, strict=True):
            optimizer.zero_grad()
            call(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(twins.twin.state_dict(), twins.eager.state_dict())
    assert counters["stats"]["unique_graphs"] == 1


@double
@some_models("SN", "accelerated-hook")
def test_without_autograd(build):
    twins = Twins(build)
    with torch.no_grad():
        for mode in (True, True, False):
            twins.train(mode)
            x = chain_input()
            torch.testing.assert_close(twins.compiled(x), twins.eager(x))
    torch.testing.assert_close(twins.twin.state_dict(), twins.eager.state_dict())


@double
@some_models("hook", "BSN", "accelerated-hook", "accelerated-parametrized")
def test_frozen_weights(build):
    """u and v of a weight without gradient move; weights may be frozen and freed between steps."""
    twins = Twins(build)
    weights = [[p for p in model.parameters() if p.ndim > 1] for model, _ in twins]
    for frozen in (slice(None), slice(1), slice(0)):
        for own in weights:
            for i, weight in enumerate(own):
                weight.requires_grad_(i not in range(*frozen.indices(len(own))))
        twins.steps(batches(4), [True, True])


@double
@some_models("hook", "accelerated-parametrized")
def test_frozen_for_a_while(build):
    """u and v stay in the context; then the first graph serves again."""
    twins = Twins(build)

    def frozen_steps():
        with fastsn.frozen(twins.eager), fastsn.frozen(twins.twin):
            twins.steps(batches(4), [True, True])

    twins.steps(batches(4), [True])
    frozen_steps()
    with no_recompiles():
        twins.steps(batches(4), [True])
        frozen_steps()
        twins.steps(batches(4), [True])
    assert counters["stats"]["unique_graphs"] == 2


@each_value
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@some_models("hook", "parametrized", "accelerated-hook", "accelerated-parametrized")
def test_narrow_weights(build, dtype):
    """The model is made narrow at the end; u and v are fp32 in the graph as well."""
    twins = Twins(lambda: build().to(dtype))
    band = 8 * torch.finfo(dtype).eps
    for mode in (True, True, False, True):
        twins.train(mode)
        x = chain_input().to(dtype)
        expected, actual = (step(model, x, forward=call) for model, call in twins)
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            # Sums of gradients are rounded in another order by the compiler; u and v are not.
            tolerances = {} if name.endswith(("_u", "_v")) else {"rtol": band, "atol": band}
            torch.testing.assert_close(value, expected[name], **tolerances)
            assert value.dtype == (torch.float32 if name.endswith(("_u", "_v")) else dtype)
    with no_recompiles():
        for mode in (True, False):
            twins.train(mode)
            step(twins.twin, x, forward=twins.compiled)


@double
@some_models("hook", "accelerated-parametrized")
def test_loaded_states(build):
    """A checkpoint of the compiled model, loaded into it and into the eager one."""
    twins = Twins(build)
    twins.steps(batches(4), [True])
    saved = {name: value.clone() for name, value in twins.compiled.state_dict().items()}
    twins.steps(batches(4), [True])
    twins.compiled.load_state_dict(saved)
    plain = {name.removeprefix("_orig_mod."): value for name, value in saved.items()}
    twins.eager.load_state_dict(plain)
    torch.testing.assert_close(twins.twin.state_dict(), plain, rtol=0, atol=0)
    with no_recompiles():
        twins.steps(batches(4), [True])


class Within(nn.Module):
    """Autocast for a part of the forward."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x)


@each_value
@pytest.mark.parametrize("inside", [False, True])
@some_models("hook", "parametrized", "accelerated-BSN", "accelerated-hook")
def test_autocast(build, inside):
    """u and v are those of fp32; outputs are as rounded as in eager mode."""
    twins = Twins(lambda: Within(build()) if inside else build())
    for enabled in (True, False, True):
        x = chain_input()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and not inside):
            expected, actual = twins.eager(x), twins.compiled(x)
        assert actual.dtype == expected.dtype
        low = torch.bfloat16 if inside or enabled else torch.float32
        assert actual.dtype == low
        band = 8 * torch.finfo(low).eps
        torch.testing.assert_close(actual, expected, rtol=band, atol=band)
        torch.testing.assert_close(twins.twin.state_dict(), twins.eager.state_dict())


def test_one_call_in_the_graph_of_an_accelerated_model():
    targets = []

    def record(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    twins = Twins(MODELS["accelerated-parametrized"], backend=record)
    twins.compiled(chain_input())
    assert sum("power_" in target for target in targets) == 1


@double
@pytest.mark.parametrize(
    "name, options",
    [
        ("hook", {}),
        ("parametrized", {}),
        ("accelerated-BSN", {}),
        # Without a GPU it is as if this had not been asked for.
        ("accelerated-hook", {"mode": "reduce-overhead"}),
    ],
)
def test_inductor(name, options):
    Twins(MODELS[name], backend="inductor", **options).steps(batches(4), [True, True, False])


@double
def test_calls_on_the_whole_model_between_compiled_steps():
    twins = Twins(MODELS["accelerated-parametrized"])
    twins.steps(batches(4), [True])
    with no_recompiles():
        for call in (fastsn.sigmas, fastsn.refresh, fastsn.fold):
            for model, _ in twins:
                call(model)
            twins.steps(batches(4), [True])


# Export


@each_model
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")
def test_export_in_eval(build):
    model, x = build(), chain_input()
    model(x), model.eval()  # the random u and v of the hook form are no estimate
    expected = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(dict(program.state_dict), state, rtol=0, atol=0)
    # The model goes on as before.
    torch.testing.assert_close(model(x), expected)
    step(model.train(), x)
