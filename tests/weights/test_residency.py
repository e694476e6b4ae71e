"""Weights that are not there when a grouped call begins, or become others before they are read."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import parametrize, prune

import fastsn
from helpers.accelerated import calls_of, chain, chain_input
from helpers.torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED, TORCH_HOOK, TORCH_PARAMETRIZED

FORMS = {
    "hook": (FASTSN_HOOK, TORCH_HOOK),
    "parametrization": (FASTSN_PARAMETRIZED, TORCH_PARAMETRIZED),
}
each = pytest.mark.parametrize("ours, theirs", FORMS.values(), ids=FORMS)
NORMALIZED = (0, 3, 5)


def pair(ours, theirs):
    """An accelerated model of fastsn's and one of torch's with the same state."""
    torch.manual_seed(3)
    fast, plain = fastsn.accelerate(chain(ours)), chain(theirs)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def original(form, layer):
    return form.vectors(layer)[0]


def compare(fast, plain):
    """Three steps in training mode and one in eval, with gradients where parameters have any."""
    x = chain_input()
    for training in (True, True, True, False):
        outputs = [model.train(training)(x) for model in (fast, plain)]
        torch.testing.assert_close(*outputs)
        gradients = []
        for output, model in zip(outputs, (fast, plain), strict=True):
            parameters = [p for p in model.parameters() if p.requires_grad]
            if parameters:
                gradients.append(torch.autograd.grad(output.sum(), parameters, allow_unused=True))
        if gradients:
            torch.testing.assert_close(*gradients)


# Storage that comes and goes


def late(form, model, prepend):
    """The storage of each weight is empty but while its own layer runs, as sharding engines do."""
    for index in NORMALIZED:
        layer = model[index]
        weight = original(form, layer).requires_grad_(False)
        kept = weight.detach().clone()
        size = weight.untyped_storage().nbytes()

        def fill(module, args, weight=weight, kept=kept, size=size):
            weight.untyped_storage().resize_(size)
            weight.data.copy_(kept)

        def empty(module, args, output, weight=weight):
            weight.untyped_storage().resize_(0)

        layer.register_forward_pre_hook(fill, prepend=prepend)
        layer.register_forward_hook(empty)
        empty(layer, (), None)
    return model


@pytest.mark.usefixtures("double")
@each
def test_storage_that_a_hook_of_the_layer_fills(ours, theirs):
    fast, plain = pair(ours, theirs)
    compare(late(ours, fast, True), late(theirs, plain, True))


@pytest.mark.usefixtures("double")
@each
def test_storage_that_a_block_around_the_layer_fills(ours, theirs):
    """The layer itself has no hook that would tell."""

    def wrapped(form, model):
        for index in NORMALIZED:
            block = nn.Sequential(model[index])
            weight = original(form, model[index]).requires_grad_(False)
            kept, size = weight.detach().clone(), weight.untyped_storage().nbytes()

            def fill(module, args, weight=weight, kept=kept, size=size):
                weight.untyped_storage().resize_(size)
                weight.data.copy_(kept)

            block.register_forward_pre_hook(fill)

            def empty(module, args, output, weight=weight):
                weight.untyped_storage().resize_(0)

            block.register_forward_hook(empty)
            empty(None, (), None)
            model[index] = block
        return model

    fast, plain = pair(ours, theirs)
    compare(wrapped(ours, fast), wrapped(theirs, plain))
    served = [name for name, _ in calls_of(lambda: fast.eval()(chain_input()))]
    assert served == ["estimate", "scale"] * 3  # each by itself


@each
def test_an_empty_storage_that_nobody_fills_is_an_error(ours, theirs):
    for build in (chain, lambda form: fastsn.accelerate(chain(form))):
        model = build(ours)
        weight = original(ours, model[0])
        needed = weight.numel() * weight.element_size()
        weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=rf"weights\[0\].*{needed} bytes.*0"):
            model(chain_input())
        with pytest.raises(RuntimeError, match=rf"weights\[0\].*{needed} bytes.*0"):
            fastsn.sigmas(model)


# Weights on the meta device


@each
@torch.no_grad()
def test_weights_that_offloading_brings(ours, theirs):
    torch.manual_seed(3)
    model = chain(ours)
    x = chain_input()
    model(x)
    expected = model.eval()(x)
    fast = fastsn.accelerate(copy.deepcopy(model))
    offloaded = [cpu_offload(copy.deepcopy(model), "cpu"), cpu_offload(fast, "cpu")]
    for moved in offloaded:
        assert original(ours, moved[0]).is_meta
        if ours is FASTSN_PARAMETRIZED:
            torch.testing.assert_close(moved(x), expected)
        else:  # whose hook runs before that of offloading: torch raises, too
            with pytest.raises(RuntimeError, match=r"weights\[0\].*meta.*cpu|u\[0\].*meta.*cpu"):
                moved(x)


def test_a_model_on_the_meta_device_gives_shapes():
    for form in (FASTSN_HOOK, FASTSN_PARAMETRIZED):
        with torch.device("meta"):
            model = fastsn.accelerate(chain(form))
        assert model(torch.randn(4, 2, 4, device="meta")).shape == (4, 5)


# Weights that are computed from others


@pytest.mark.usefixtures("double")
@each
def test_a_hook_that_computes_the_weight(ours, theirs):
    """As scaled learning rates and weight demodulation do, before the normalizer reads it."""

    def scaled(form, model):
        for index in NORMALIZED:
            layer = model[index]
            weight = original(form, layer)
            layer.raw = nn.Parameter(weight.detach() * 3 - 1)
            weight.requires_grad_(False)

            def compute(module, args, weight=weight):
                with torch.no_grad():
                    weight.copy_(module.raw * 2)

            layer.register_forward_pre_hook(compute, prepend=True)
        return model

    compare(
        *(
            scaled(form, model)
            for form, model in zip((ours, theirs), pair(ours, theirs), strict=True)
        )
    )


@pytest.mark.usefixtures("double")
def test_a_weight_of_the_hook_form_that_is_no_parameter():
    def replaced(model):
        for index in NORMALIZED:
            layer = model[index]
            raw = layer._parameters.pop("weight_orig")
            layer.register_parameter("raw", nn.Parameter(raw.detach().clone()))
            layer.weight_orig = layer.raw * 2

            def compute(module, args):
                module.weight_orig = module.raw * 2

            layer.register_forward_pre_hook(compute, prepend=True)
        return model

    compare(*map(replaced, pair(FASTSN_HOOK, TORCH_HOOK)))


@pytest.mark.usefixtures("double")
def test_a_weight_of_the_hook_form_that_is_parametrized():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    def doubled(model):
        for index in NORMALIZED:
            parametrize.register_parametrization(model[index], "weight_orig", Doubled())
        return model

    compare(*map(doubled, pair(FASTSN_HOOK, TORCH_HOOK)))


@pytest.mark.usefixtures("double")
def test_a_weight_of_the_hook_form_that_is_pruned():
    def pruned(model):
        for index in NORMALIZED:
            prune.random_unstructured(model[index], "weight_orig", 0.5)
            hooks = model[index]._forward_pre_hooks
            hooks.move_to_end(next(k for k, h in hooks.items() if "pectral" in type(h).__name__))
        return model

    torch.manual_seed(7)
    fast, plain = pair(FASTSN_HOOK, TORCH_HOOK)
    state = torch.get_rng_state()
    fast = pruned(fast)
    torch.set_rng_state(state)
    compare(fast, pruned(plain))


def test_hooks_that_come_later_leave_the_layers_in_the_group():
    model = fastsn.accelerate(chain(FASTSN_HOOK))
    model[3].register_forward_pre_hook(lambda module, args: None)
    assert calls_of(lambda: model(chain_input())) == [("power_", 3), ("scale", 3)]
    model[5].register_forward_pre_hook(lambda module, args: None, prepend=True)
    names = calls_of(lambda: model(chain_input()))
    assert names == [("power_", 2), ("scale", 2), ("power_", 1), ("scale", 1)]


@pytest.mark.usefixtures("double")
@each
def test_gradients_that_are_turned_on_within_the_forward(ours, theirs):
    """As forces and test-time training do; the group was served without."""

    class Outer(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            with torch.enable_grad():
                self.body(x).square().sum().backward()

    gradients = []
    fast, plain = pair(ours, theirs)
    for model in (fastsn.accelerate(Outer(fast)), Outer(plain)):
        with torch.no_grad():
            model(torch.linspace(-1, 1, 32).view(4, 2, 4))
        gradients.append([p.grad for p in model.parameters()])
    assert all(grad is not None for grad in gradients[0])
    torch.testing.assert_close(*gradients)
