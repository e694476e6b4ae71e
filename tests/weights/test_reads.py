"""Every read computes from the weight as it is: torch's numbers, whatever a program does to it."""

from __future__ import annotations

import copy
import io
import pickle
import random
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastsn
from helpers.accelerated import chain, chain_input
from helpers.torch_peers import (
    FASTSN_HOOK,
    FASTSN_PARAMETRIZED,
    TORCH_HOOK,
    TORCH_PARAMETRIZED,
)

# Each a model of fastsn's, and the form of torch's that it is to do as.
FORMS = {
    "hook": (lambda: chain(FASTSN_HOOK), TORCH_HOOK),
    "parametrization": (lambda: chain(FASTSN_PARAMETRIZED), TORCH_PARAMETRIZED),
    "nn": (lambda: layers(), TORCH_PARAMETRIZED),
    "accelerated hook": (lambda: fastsn.accelerate(chain(TORCH_HOOK)), TORCH_HOOK),
    "accelerated parametrization": (
        lambda: fastsn.accelerate(chain(TORCH_PARAMETRIZED)),
        TORCH_PARAMETRIZED,
    ),
}


def layers():
    convolution = fastsn.nn.SNConv1d(2, 3, 2)
    first, last = fastsn.nn.SNLinear(9, 6), fastsn.nn.SNLinear(6, 5)
    return nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), first, nn.Tanh(), last)


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def pair(request, double):
    """(fastsn's, torch's) with the same weights, u and v, after a forward in training mode."""
    build, form = request.param
    torch.manual_seed(3)
    ours, theirs = build(), chain(form)
    theirs.load_state_dict(ours.state_dict())
    x = chain_input()
    ours(x), theirs(x)
    return ours, theirs


def originals(model):
    return [p for p in model.parameters() if p.ndim > 1]


def compare(ours, theirs):
    x = torch.linspace(-1, 1, 32).view(4, 2, 4)
    # What is remembered of one evaluation would be met by the next of the same kind.
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad):
        with context():
            torch.testing.assert_close(ours(x), theirs(x))


def by_numpy(model):
    for p in originals(model):
        p.detach().numpy()[...] *= -3


def soft_update(model):
    for p in model.parameters():
        p.data.mul_(0.5).add_(torch.full_like(p, 0.1), alpha=0.5)


def through_state_dict(model):
    for value in model.state_dict().values():
        value.data.copy_(value.data.flip(0))


def vectors(model):
    for name, buffer in model.named_buffers():
        if name.endswith(("_u", "_v")):
            buffer.data.copy_(buffer.data.flip(0))


def other_storage(model):
    for p in originals(model):
        p.data = -2 * p.data


def raw_memory(model):
    for p in originals(model):
        untyped = p.untyped_storage()
        other = torch.tensor([], dtype=p.dtype).set_(untyped, 0, (p.numel(),))
        other.neg_()


WRITES = {
    "data.copy_": lambda m: [p.data.copy_(p.data.flip(0)) for p in m.parameters()],
    "one entry": lambda m: [p.data.view(-1)[0].add_(1.0) for p in originals(m)],
    "soft update": soft_update,
    "numpy": by_numpy,
    "state_dict": through_state_dict,
    "u and v": vectors,
    "data =": other_storage,
    "memory": raw_memory,
    "in place": lambda m: [torch.no_grad()(p.mul_)(-1.5) for p in originals(m)],
    "load": lambda m: m.load_state_dict({k: v.flip(0) for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_evaluation_sees_every_write(pair, write):
    for model in pair:
        model.eval()
    compare(*pair)
    for _ in range(2):
        for model in pair:
            write(model)
        compare(*pair)


def test_averages_are_swapped_in_and_out(pair):
    """What EMA helpers do: the averages for an evaluation, and the weights back after it."""
    kept = [[p.data.clone() for p in model.parameters()] for model in pair]
    for model in pair:
        model.eval()
    compare(*pair)
    for model in pair:
        for p in model.parameters():
            p.data.copy_(p.data.roll(1, 0))
    compare(*pair)
    for model, values in zip(pair, kept, strict=True):
        for p, value in zip(model.parameters(), values, strict=True):
            p.data.copy_(value)
    compare(*pair)


@torch.no_grad()
def test_a_numerical_derivative(pair):
    x, h = chain_input(), 1e-4
    slopes = []
    for model in pair:
        weight, values = originals(model.eval())[1], []
        for step in (h, -2 * h):
            weight.data[0, 0] += step
            values.append(model(x).sum())
        weight.data[0, 0] += h
        slopes.append((values[0] - values[1]) / (2 * h))
    assert slopes[1].abs() > 1e-3
    torch.testing.assert_close(*slopes)


@torch.no_grad()
def test_what_is_handed_out_is_the_users(pair):
    x = chain_input()
    for model in pair:
        model.eval()(x)
        for index in (0, 3, 5):
            model[index].weight.data.mul_(0)
    compare(*pair)


def _write(weights, done):
    for weight in weights:
        weight.mul_(-2)
    done.set()


def test_another_process_writes_to_shared_memory(pair):
    context = torch.multiprocessing.get_context("fork")
    for model in pair:
        model.eval().share_memory()
    compare(*pair)
    for model in pair:
        done = context.Event()
        weights = [p.detach() for p in originals(model)]
        process = context.Process(target=_write, args=(weights, done))
        process.start()
        process.join(60)
        assert done.is_set()
    compare(*pair)


# A sequence of what programs do, drawn at random


def _train(model):
    model.train()
    loss = model(torch.ones(4, 2, 4)).square().sum()
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad


def _train_by_data(model):
    model.train()
    model.zero_grad()
    (model(torch.ones(4, 2, 4)).sum() - model(torch.zeros(4, 2, 4)).sum()).backward()
    for p in model.parameters():
        p.data -= 0.01 * p.grad


def _evaluate(model):
    model.eval()(torch.ones(4, 2, 4))


def _switch(model):
    model.train(not model.training)


def _copy(model):
    # torch's hook form has weights with a graph after a forward, and refuses.
    training = model.training
    with torch.no_grad():
        model.eval()(torch.ones(4, 2, 4))
    return copy.deepcopy(model.train(training))


def _pickle(model):
    if not any("Parametrized" in type(module).__name__ for module in model.modules()):
        return pickle.loads(pickle.dumps(model))
    return _copy(model)  # torch's refuse


def _fail(model):
    training = model.training  # in which fastsn iterates all layers at once, and torch some of them
    with pytest.raises(RuntimeError):
        model.eval()(torch.ones(4, 2, 5))
    model.train(training)


def _one_layer(model):
    model[3](torch.ones(2, 9))


def _read(model):
    model[5].weight.detach().zero_()


STEPS = [
    *WRITES.values(), _train, _train_by_data, _evaluate, _switch, _copy, _pickle, _fail, _one_layer,
    _read,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_random_sequences_beside_torch(pair, seed):
    draw = random.Random(seed)
    for _ in range(15):
        step = draw.choice(STEPS)
        results = [step(model) for model in pair]
        if step in (_copy, _pickle):
            pair = tuple(results)
        modes = [model.training for model in pair]
        for model in pair:
            model.eval()
        compare(*pair)
        for model, mode in zip(pair, modes, strict=True):
            model.train(mode)
        ours, theirs = (model.state_dict() for model in pair)
        torch.testing.assert_close(dict(ours), dict(theirs))


# Classes of the user's


class Scaled:
    """A learned scale, as sigmaReparam and others have it."""

    def __init__(self, weight):
        super().__init__(weight)
        self.gamma = nn.Parameter(torch.tensor(3.0))
        self.is_on = True

    def forward(self, weight):
        return self.gamma * super().forward(weight) if self.is_on else weight


class OwnMatrix:
    """Rows are the last dimension, as some matricize."""

    def _reshape_weight_to_matrix(self, weight):
        return weight.flatten(0, -2).T


class OwnMethod:
    @torch.no_grad()
    def _power_method(self, weight_mat, n_power_iterations):
        self._u.copy_(torch.nn.functional.normalize(self._u + weight_mat.sum(1), dim=0))
        self._v.copy_(torch.nn.functional.normalize(weight_mat.T @ self._u, dim=0))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("override", [Scaled, OwnMethod, OwnMatrix])
@pytest.mark.parametrize("group", [False, True])
def test_what_a_subclass_overrides_is_used(override, group):
    models = []
    for form in (FASTSN_PARAMETRIZED, TORCH_PARAMETRIZED):
        torch.manual_seed(5)
        own = type(override.__name__, (override, form.SpectralNorm), {})
        model = nn.Sequential(nn.Linear(6, 6), form.spectral_norm(nn.Linear(6, 6)))
        parametrize.register_parametrization(model[0], "weight", own(model[0].weight))
        models.append(fastsn.accelerate(model) if group and form is FASTSN_PARAMETRIZED else model)
    ours, theirs = models
    x = torch.randn(3, 6)
    for training in (True, True, False):
        a, b = ours.train(training)(x), theirs.train(training)(x)
        torch.testing.assert_close(a, b)
        gradients = [
            torch.autograd.grad(output.square().sum(), list(model.parameters()))
            for output, model in ((a, ours), (b, theirs))
        ]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    if override is Scaled:
        for model in models:
            model[0].parametrizations.weight[0].is_on = False
        torch.testing.assert_close(ours(x), theirs(x))


def test_a_matrix_of_a_subclass_is_one():
    class Own(OwnMatrix, fastsn.parametrizations._SpectralNorm):
        pass

    layer = nn.Conv1d(3, 4, 2)
    norm = Own(layer.weight, method=fastsn.functional.Method("bidirectional"))
    with pytest.raises(ValueError, match="expected norm='matrix' where Own overrides the matrix"):
        norm(layer.weight)


# Other processes


@pytest.mark.parametrize("group", [False, True])
def test_the_hook_form_crosses_processes_after_a_forward(group):
    model = chain(FASTSN_HOOK)
    model = fastsn.accelerate(model) if group else model
    x = chain_input()
    model(x).sum().backward()
    for training in (True, False):
        model.train(training)(x)
        other = pickle.load(io.BytesIO(ForkingPickler.dumps(model)))
        assert not other[0].weight.requires_grad and model[0].weight.requires_grad
        torch.testing.assert_close(other.eval()(x), model.eval()(x))
        again = pickle.load(io.BytesIO(ForkingPickler.dumps(other)))
        torch.testing.assert_close(again(x), model(x))
    with pytest.raises(RuntimeError, match="non-leaf"):
        plain = chain(TORCH_HOOK)
        plain(x)
        ForkingPickler.dumps(plain)


# Removal


@pytest.mark.parametrize("remove", [FASTSN_HOOK.remove, TORCH_HOOK.remove], ids=["own", "torch"])
def test_a_layer_without_its_hook_loads_its_own_state(remove):
    layer = FASTSN_HOOK.spectral_norm(nn.Linear(4, 3))
    layer(torch.randn(1, 4))
    remove(layer)
    state = {k: 2 * v for k, v in layer.state_dict().items()}
    assert list(state) == ["bias", "weight"]
    layer.load_state_dict(state)
    torch.testing.assert_close(layer.weight.detach(), state["weight"])
    assert not layer._forward_pre_hooks and "__getstate__" not in layer.__dict__
