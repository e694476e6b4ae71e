"""What is remembered is remembered because the user has said so: `fastsn.cached`."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import fastsn
from helpers.accelerated import calls_of, chain_input
from helpers.every_form import MODELS, each_grouping, each_model


def made(build, grouped):
    torch.manual_seed(2)
    model = build()
    model = fastsn.accelerate(model) if grouped else model
    model(chain_input())
    return model


@each_grouping
@each_model
@torch.no_grad()
def test_each_weight_is_normalized_once(build, grouped):
    model, x = made(build, grouped).eval(), chain_input()
    expected = model(x)
    with fastsn.cached(model):
        assert calls_of(lambda: model(x))
        assert not calls_of(lambda: model(x))
        torch.testing.assert_close(model(x), expected)
    assert calls_of(lambda: model(x))


@each_grouping
@each_model
def test_in_training_mode_u_and_v_move_once(build, grouped):
    model, x = made(build, grouped), chain_input()
    ours = [name for name, _ in model.named_buffers() if name.endswith(("_u", "_v", "u0"))]

    def vectors():
        return [dict(model.named_buffers())[name].clone() for name in ours]

    before = vectors()
    with fastsn.cached(model):
        first = model(x)
        moved = vectors()
        if not isinstance(model[0], fastsn.nn.MSNConv1d):  # whose mean is that of each batch
            torch.testing.assert_close(model(x), first, rtol=0, atol=0)
        with torch.no_grad():
            model(x)
        torch.testing.assert_close(vectors(), moved, rtol=0, atol=0)
    assert not any(map(torch.equal, before, moved))
    model(x)
    assert not any(map(torch.equal, moved, vectors()))


@each_grouping
def test_who_needs_a_graph_gets_one(grouped):
    """Whatever was read before, and in autocast's type whoever asks for it."""
    model, x = made(MODELS["parametrization"], grouped).eval(), chain_input()
    with fastsn.cached(model):
        for context in (torch.inference_mode, torch.no_grad):
            with context():
                model(x)
        output = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert model(x).dtype == torch.float32
        output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


@each_grouping
@torch.no_grad()
def test_it_nests_and_ends(grouped):
    model, x = made(MODELS["hook"], grouped).eval(), chain_input()
    with fastsn.cached(model):
        model(x)
        with fastsn.cached(model[3]):
            assert not calls_of(lambda: model(x))
        assert not calls_of(lambda: model(x))
    with fastsn.cached(model[3]):
        model(x)
        counts = [count for _, count in calls_of(lambda: model(x))]
        assert sum(counts) == 4 and (not grouped or counts == [2, 2])
    with pytest.raises(ZeroDivisionError), fastsn.cached(model):
        model(x)
        raise ZeroDivisionError
    before = model(x)
    for p in model.parameters():
        p.data.mul_(-3)
    assert not torch.allclose(model(x), before)


@torch.no_grad()
def test_it_is_for_the_thread_that_asks():
    model, x = made(MODELS["parametrization"], True).eval(), chain_input()
    seen = []
    with fastsn.cached(model):
        before = model(x)
        model[3].parametrizations.weight.original.data.neg_()
        thread = threading.Thread(target=lambda: seen.append(model(x).detach()))
        thread.start()
        thread.join()
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    torch.testing.assert_close(seen[0], model(x))
    torch.testing.assert_close(model(x), seen[0])


def test_a_model_without_layers_is_an_error():
    with pytest.raises(ValueError, match="expected a model with spectral norm by fastsn, got none"):
        with fastsn.cached(nn.Linear(2, 2)):
            pass
