"""When u and v move: every forward, once per change of the weight, or never."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastsn
from helpers.accelerated import chain_input
from helpers.answers import FASTSN, answers
from helpers.every_form import MODELS, each_grouping, each_model
from helpers.torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED


def made(build, grouped):
    torch.manual_seed(2)
    model = build()
    return fastsn.accelerate(model) if grouped else model


def vectors(model):
    endings = ("_u", "_v", "_u2", "_v2", "u0")
    return [x.clone() for name, x in model.named_buffers() if name.endswith(endings)]


def have_moved(before, after):
    moved = {not torch.equal(x, y) for x, y in zip(before, after, strict=True)}
    assert before and len(moved) == 1
    return moved.pop()


def moves(model, x=None):
    before = vectors(model)
    model(chain_input() if x is None else x)
    return have_moved(before, vectors(model))


@each_grouping
@each_model
def test_once_per_step_of_an_optimizer(build, grouped):
    model = fastsn.set_update_policy(made(build, grouped), "step")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        assert [moves(model) for _ in range(3)] == [True, False, False]
        model(chain_input()).square().sum().backward()
        assert not moves(model)  # gradients change no weight
        optimizer.step()


@each_grouping
@each_model
def test_both_forwards_of_a_step_see_the_same_weight(build, grouped):
    """To rounding, in training mode: addons#2411 asks for it."""
    model = fastsn.set_update_policy(made(build, grouped), "step")
    x = chain_input()
    first, second = model(x), model(x)
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)
    (first - second).square().sum().backward()


@each_grouping
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("implementation", ["foreach", "fused", "for loop"])
def test_every_optimizer_is_noticed(optimizer, implementation, grouped):
    options = {"foreach": implementation == "foreach"}
    if implementation == "fused":
        options = {"fused": True}
    model = fastsn.set_update_policy(made(MODELS["parametrization"], grouped), "step")
    steps = optimizer(model.parameters(), 0.1, **options)
    model(chain_input()).sum().backward()
    assert not moves(model)
    steps.step()
    assert moves(model)


@each_grouping
@pytest.mark.parametrize("name", ["hook", "parametrization"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model, weight: model.load_state_dict(copy.deepcopy(model.state_dict())),
        lambda model, weight: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda model, weight: setattr(weight, "data", weight.data.clone()),
        lambda model, weight: torch.no_grad()(weight.mul_)(2.0),
        lambda model, weight: model.double(),
    ],
    ids=["load", "assign", "data", "in place", "double"],
)
def test_other_changes_are_noticed(name, change, grouped):
    model = fastsn.set_update_policy(made(MODELS[name], grouped), "step")
    assert moves(model)
    for parameter in list(model.parameters()):
        if parameter.ndim > 1:
            change(model, parameter)
    x = chain_input().to(next(model.parameters()).dtype)
    assert moves(model, x) and not moves(model, x)


@each_grouping
@each_model
def test_frozen_for_a_while(build, grouped):
    model = made(build, grouped)
    assert moves(model)
    with fastsn.frozen(model):
        assert not moves(model)
        with fastsn.frozen(model):
            assert not moves(model)
        assert not moves(model)
    assert moves(model)


@each_grouping
@each_model
def test_the_policy_frozen(build, grouped):
    model = fastsn.set_update_policy(made(build, grouped), "frozen")
    assert not moves(model)
    assert moves(fastsn.set_update_policy(model, "forward"))


def test_an_error_within_leaves_nothing_frozen():
    model = made(MODELS["parametrization"], True)
    with pytest.raises(ZeroDivisionError), fastsn.frozen(model):
        raise ZeroDivisionError
    assert moves(model)


@each_grouping
@pytest.mark.parametrize("name", ["hook", "parametrization"])
def test_a_frozen_forward_has_the_numbers_of_eval_mode_and_trains(name, grouped):
    model, x = made(MODELS[name], grouped), chain_input()
    model(x)
    with fastsn.frozen(model):
        outputs = model(x)
    outputs.sum().backward()
    frozen = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = model.eval()(x)
    expected.sum().backward()
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(frozen, [p.grad for p in model.parameters()])


def test_a_weight_can_be_read_without_a_side_effect():
    layer = fastsn.parametrizations.spectral_norm(nn.Linear(4, 4))
    before = vectors(layer)
    with fastsn.frozen(layer):
        assert hasattr(layer, "weight") and layer.weight.requires_grad
    assert not have_moved(before, vectors(layer))
    assert layer.weight is not None and have_moved(before, vectors(layer))


@answers("addons#2411")
def test_real_and_fake_samples_meet_the_same_weight(normalize):
    model = nn.Sequential(normalize(nn.Linear(6, 6)), nn.Tanh(), normalize(nn.Linear(6, 3)))
    if normalize in FASTSN:
        fastsn.set_update_policy(model, "step")
    x = torch.randn(2, 6, dtype=torch.float64)
    model = model.double()
    torch.testing.assert_close(model(x), model(x), rtol=1e-13, atol=1e-13)


def test_copies_and_pickles_keep_the_policy_but_are_not_frozen():
    for name in ("hook", "parametrization", "biggan"):
        model = fastsn.set_update_policy(made(MODELS[name], True), "step")
        with fastsn.frozen(model):
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert [moves(other), moves(other)] == [True, False]


def test_gradients_of_both_forwards_reach_the_weight():
    """Two backwards, one for each: no graph is shared."""
    model, x = made(MODELS["parametrization"], True), chain_input()
    fastsn.set_update_policy(model, "step")
    real, fake = model(x).sum(), model(2 * x).sum()
    real.backward()
    fake.backward()
    assert all(p.grad.any() for p in model.parameters())


def test_errors_change_nothing():
    model = made(MODELS["parametrization"], True)
    with pytest.raises(ValueError, match=r"\('forward', 'step', 'frozen'\), got 'always'"):
        fastsn.set_update_policy(model, "always")
    assert moves(model) and moves(model)
    for call in (
        lambda: fastsn.set_update_policy(nn.Linear(2, 2), "step"),
        lambda: fastsn.frozen(nn.Linear(2, 2)).__enter__(),
        lambda: fastsn.reset_parameters(nn.Linear(2, 2)),
    ):
        with pytest.raises(ValueError, match="got none in Linear: fastsn.accelerate takes over"):
            call()


def test_a_compiled_graph_cannot_tell_a_step():
    model = fastsn.set_update_policy(made(MODELS["parametrization"], False), "step")
    with pytest.raises(Exception, match="policy 'forward' or 'frozen' under torch.compile"):
        torch.compile(model, fullgraph=True, backend="eager")(chain_input())


@pytest.mark.parametrize("name", ["hook", "parametrization"])
def test_compiled_and_frozen(name):
    model = made(MODELS[name], False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert moves(compiled)
    with fastsn.frozen(model):
        assert not moves(compiled)
    assert moves(compiled)


# Changes that nothing tells of


def by_hand(model, optimizer):
    """Without an optimizer of torch's, through `.data`."""
    for p in model.parameters():
        p.data -= 0.01 * p.grad
    fastsn.advance(model)


def master_weights(model, optimizer):
    """An optimizer's own copies, from which the weights are written after its step."""
    copies = optimizer.param_groups[0]["params"]
    for own, p in zip(copies, model.parameters(), strict=True):
        own.grad = p.grad.double()
    optimizer.step()
    for own, p in zip(copies, model.parameters(), strict=True):
        p.data.copy_(own.data)


@pytest.mark.parametrize("change", [by_hand, master_weights])
@each_grouping
@pytest.mark.parametrize(
    "form", [FASTSN_HOOK, FASTSN_PARAMETRIZED], ids=["hook", "parametrization"]
)
def test_u_and_v_follow_updates_that_no_version_tells(form, grouped, change):
    """Spectral norms stay within 10 % of 1; without moving u and v they would not."""

    def build():
        sizes = zip((24, 24, 24), (24, 24, 8), strict=True)
        return nn.Sequential(*(form.spectral_norm(nn.Linear(*size)) for size in sizes))

    model = fastsn.converge(fastsn.set_update_policy(made(build, grouped), "step"), 100)
    optimizer = torch.optim.SGD([p.detach().double() for p in model.parameters()], 0.01)
    x = torch.randn(64, 24)
    wanted = x @ torch.randn(24, 8) / 5
    for _ in range(200):
        model.zero_grad()
        (model(x) - wanted).square().mean().backward()
        model(-x)
        change(model, optimizer)
    with fastsn.frozen(model):
        model(x)
        weights = [layer.weight.detach() for layer in model]
    norms = torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in weights])
    assert ((norms - 1).abs() < 0.1).all(), norms


@each_grouping
def test_a_missed_change_costs_accuracy_but_never_a_stale_weight(grouped):
    model = fastsn.set_update_policy(made(MODELS["parametrization"], grouped), "step")
    model(chain_input())
    for p in model.parameters():
        p.data *= -2
    assert not moves(model)
    weight = model[3].weight
    original = model[3].parametrizations.weight.original
    u, v = model[3].parametrizations.weight[0].buffers()
    torch.testing.assert_close(weight, original / (u @ original @ v))
    assert moves(fastsn.advance(model)) and not moves(model)


def test_importing_installs_nothing_on_optimizers():
    code = (
        "import fastsn, torch.optim.optimizer as o; from torch import nn;"
        "layer = fastsn.accelerate(fastsn.spectral_norm(nn.Linear(2, 2)));"
        "layer(__import__('torch').ones(1, 2));"
        "assert not o._global_optimizer_post_hooks and not o._global_optimizer_pre_hooks;"
        "fastsn.set_update_policy(layer, 'step')(__import__('torch').ones(1, 2));"
        "assert len(o._global_optimizer_post_hooks) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
