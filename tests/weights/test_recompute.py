"""Activation checkpointing: a part of the forward that is repeated sees the weight of the first.

With torch's spectral norm the repetition iterates once more (PEERS: chainer#5742, chainer#6655).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed import _composable as composable
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastsn
from helpers.accelerated import Calls, chain, chain_input
from helpers.answers import answers
from helpers.biggan import Conv, Linear
from helpers.torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED

KINDS = {"reentrant": True, "non-reentrant": False}
each_kind = pytest.mark.parametrize("reentrant", KINDS.values(), ids=KINDS)
double = pytest.mark.usefixtures("double")


class BigGan(nn.Module):
    """Two layers that normalize themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv(2, 3, 2)
        self.linear = Linear(45, 5)

    def forward(self, x):
        return self.linear(self.conv(x.unsqueeze(-1).expand(-1, -1, -1, 2)).tanh().flatten(1))


MODELS = {
    "hook": lambda: chain(FASTSN_HOOK),
    "parametrization": lambda: chain(FASTSN_PARAMETRIZED),
    "nn": lambda: nn.Sequential(
        fastsn.nn.BSNConv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), fastsn.nn.SNLinear(9, 5)
    ),
    "biggan": lambda: fastsn.accelerate(BigGan()),
    "hook, grouped": lambda: fastsn.accelerate(chain(FASTSN_HOOK)),
    "parametrization, grouped": lambda: fastsn.accelerate(chain(FASTSN_PARAMETRIZED)),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def unsettled(build):
    """A model whose u and v have far to go, so that every iteration gives another weight."""
    torch.manual_seed(3)
    model = build()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.numel() > 1:
                buffer.normal_().div_(buffer.norm())
    return model


def results(build, forward, passes=2):
    """Losses of several forwards before one backward, gradients, u and v; of several steps."""
    model = unsettled(build)
    inputs = [chain_input().requires_grad_() for _ in range(passes)]
    found = []
    for _ in range(2):
        loss = sum((i + 1) * forward(model, x).square().sum() for i, x in enumerate(inputs))
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in [*model.parameters(), *inputs])]
        found += [value.clone() for value in model.state_dict().values()]
    return found


def plainly(model, x):
    return model(x)


@double
@each_kind
@each_model
def test_two_checkpointed_forwards_before_a_backward(build, reentrant):
    def checkpointed(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    torch.testing.assert_close(results(build, checkpointed), results(build, plainly))


@double
@each_kind
@pytest.mark.parametrize("form", [FASTSN_HOOK, FASTSN_PARAMETRIZED], ids=["hook", "parametrized"])
def test_checkpoints_within_a_grouped_forward(form, reentrant):
    """The grouped call ran outside of them, its weights are read within."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = chain(form)

        def forward(self, x, checkpointed=True):
            if not checkpointed:
                return self.parts(x)
            return checkpoint_sequential(self.parts, 2, x, use_reentrant=reentrant)

    def build():
        return fastsn.accelerate(Parts())

    expected = results(build, lambda model, x: model(x, False))
    torch.testing.assert_close(results(build, plainly), expected)


@double
@pytest.mark.parametrize("name", ["hook", "parametrization"])
@pytest.mark.parametrize("outer, inner", [(False, False), (False, True), (True, False)])
def test_a_checkpoint_within_a_checkpoint(name, outer, inner):
    build = MODELS[name]

    def nested(model, x):
        def last(y):
            return checkpoint(model[3:], y, use_reentrant=inner)

        return checkpoint(lambda y: last(model[:3](y)), x, use_reentrant=outer)

    torch.testing.assert_close(results(build, nested), results(build, plainly))


@double
@each_kind
def test_a_layer_used_twice_in_a_checkpoint(reentrant):
    def build():
        return fastsn.parametrizations.spectral_norm(nn.Linear(4, 4))

    def twice(model, x):
        return model(model(x).tanh())

    def checkpointed(model, x):
        return checkpoint(lambda y: twice(model, y), x, use_reentrant=reentrant)

    torch.testing.assert_close(results(build, checkpointed), results(build, twice))


@double
def test_a_graph_that_is_kept_repeats_twice():
    def penalized(forward):
        model, x = unsettled(MODELS["parametrization"]), chain_input().requires_grad_()
        loss = forward(model, x).square().sum() + forward(model, 2 * x).square().sum()
        model(x)
        first = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
        return *first, *torch.autograd.grad(loss, [x]), *model.buffers()

    expected = penalized(plainly)
    actual = penalized(lambda model, x: checkpoint(model, x, use_reentrant=False))
    torch.testing.assert_close(actual, expected)


@double
@each_kind
def test_training_mode_has_ended_before_the_backward(reentrant):
    """The repetition is of a forward in training mode, whatever the mode is now."""
    model = unsettled(MODELS["parametrization"])
    x = chain_input().requires_grad_()
    outputs = checkpoint(model, x, use_reentrant=reentrant)
    expected = [layer.weight.detach().clone() for layer in (model.eval()[0], model[3])]
    before = [buffer.clone() for buffer in model.buffers()]
    outputs.sum().backward()
    torch.testing.assert_close(list(model.buffers()), before, rtol=0, atol=0)
    torch.testing.assert_close([model[0].weight, model[3].weight], expected)


@double
@answers("chainer#5742", "chainer#6655")
@each_kind
def test_a_repeated_forward_does_not_iterate(normalize, reentrant):
    model = nn.Sequential(normalize(nn.Linear(4, 6)), nn.Tanh(), normalize(nn.Linear(6, 3)))
    outputs = checkpoint(model, torch.randn(2, 4).requires_grad_(), use_reentrant=reentrant)
    before = [buffer.clone() for buffer in model.buffers()]
    outputs.square().sum().backward()
    torch.testing.assert_close(list(model.buffers()), before, rtol=0, atol=0)


def identity(x):
    return x


@double
@pytest.mark.parametrize("name", ["hook", "parametrization", "nn"])
def test_hooks_for_saved_tensors_within_a_checkpoint_and_around_it(name):
    """Those of a checkpoint are not the last ones then."""

    def part(model, x):
        with saved_tensors_hooks(identity, identity):
            x = model[:-1](x)
        return model[-1](x)

    def checkpointed(model, x):
        with save_on_cpu():
            return checkpoint(part, model, x, use_reentrant=False)

    build = MODELS[name]
    torch.testing.assert_close(results(build, checkpointed), results(build, plainly))


@double
def test_a_module_that_is_always_checkpointed():
    """No function of a checkpoint is running during its forward."""

    def build():
        return composable.checkpoint(MODELS["parametrization"]())

    expected = results(MODELS["parametrization"], plainly)
    torch.testing.assert_close(results(build, plainly), expected)


@double
def test_a_gradient_within_a_checkpoint():
    def penalized(model, x):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return model(2 * x) + gradient.square().sum()

    def checkpointed(model, x):
        return checkpoint(penalized, model, x, use_reentrant=False)

    build = MODELS["parametrization"]
    torch.testing.assert_close(results(build, checkpointed), results(build, penalized))


@double
def test_a_backward_within_a_checkpoint_repeats_another():
    """What the inner one repeats is no part of the outer one's forward."""

    def through(inner):
        def forward(model, x):
            own = x.detach().requires_grad_()
            inner(model, own).square().sum().backward()
            return model(x) + own.grad.sum()

        return forward

    def gradients(forward):
        model, x = unsettled(MODELS["parametrization"]), chain_input().requires_grad_()
        loss = forward(model, x).square().sum() + forward(model, 2 * x).square().sum()
        loss.backward()
        return loss.detach(), x.grad, *model.buffers()  # to those of parameters repetitions add

    def checkpointed(model, x):
        inner = through(lambda model, x: checkpoint(model, x, use_reentrant=True))
        return checkpoint(inner, model, x, use_reentrant=False)

    torch.testing.assert_close(gradients(checkpointed), gradients(through(plainly)))


class HomeMade(torch.autograd.Function):
    """A checkpoint that torch does not know."""

    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        ctx.save_for_backward(x)
        return model(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            ctx.model(x).backward(grad)
        return x.grad, None


@double
@pytest.mark.parametrize(
    "name", ["hook", "parametrization", "hook, grouped", "parametrization, grouped"]
)
def test_a_checkpoint_of_another_library(name):
    """What its first forward used cannot be told: that is right where u and v do not move on, and
    else an error, not a guess."""

    def repeated(model, x):
        return HomeMade.apply(x, model)

    with pytest.raises(RuntimeError, match="which u and v the first forward used cannot be told"):
        results(MODELS[name], repeated, passes=1)

    def build():
        return fastsn.set_update_policy(MODELS[name](), "step")

    actual = results(build, repeated, passes=2)
    torch.testing.assert_close(actual, results(build, plainly, passes=2))


@double
@each_kind
def test_running_means_move_once(reentrant):
    torch.manual_seed(0)
    model = nn.Sequential(fastsn.nn.MSNLinear(4, 5), nn.Tanh(), fastsn.nn.MeanOnlyBatchNorm1d(5))
    checkpoint(model, torch.randn(3, 4).requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert model[0].num_batches_tracked == model[2].num_batches_tracked == 1


@double
@pytest.mark.parametrize(
    "name", ["hook", "parametrization", "hook, grouped", "parametrization, grouped"]
)
def test_checkpoints_within_a_mode_that_sees_every_operator(name):
    """As a FLOP counter or the debug mode of checkpoints sets one."""

    def watched(model, x):
        return checkpoint(model, x, use_reentrant=False)

    with Calls():
        actual = results(MODELS[name], watched)
    torch.testing.assert_close(actual, results(MODELS[name], plainly))
