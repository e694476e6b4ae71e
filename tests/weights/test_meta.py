"""Models made on the meta device: u and v get values, and sigma never comes out of empty memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsn
from helpers.answers import FASTSN, TORCH

FORMS = {
    "hook": FASTSN.hook,
    "parametrization": FASTSN.parametrization,
    "bsn": lambda layer: FASTSN.parametrization(layer, norm="bidirectional"),
    "bsn hook": lambda layer: FASTSN.hook(layer, norm="bidirectional"),
    "torch's, accelerated": TORCH.parametrization,
    "torch's hook, accelerated": TORCH.hook,
}
each_form = pytest.mark.parametrize("normalize", FORMS.values(), ids=FORMS)
X = torch.randn(3, 2, 6, 6)


def build(normalize):
    model = nn.Sequential(
        normalize(nn.Conv2d(2, 6, 3)), nn.ReLU(), nn.Flatten(), normalize(nn.Linear(96, 5))
    )
    return fastsn.accelerate(model) if normalize in TORCH else model


def deferred(normalize, garbage=float("nan")):
    """A model with weights, and with what memory happens to hold in u and v."""
    with torch.device("meta"):
        model = build(normalize)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(garbage)
    return model


@torch.no_grad()
def fill(model):
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.normal_(generator=generator)


def true_sigmas(model):
    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    return torch.stack([torch.linalg.matrix_norm(w.flatten(1), 2) for w in weights])


def vectors(model):
    return [buffer.clone() for buffer in model.buffers()]


@each_form
def test_reset_parameters(normalize):
    model = deferred(normalize)
    fill(model)
    assert fastsn.reset_parameters(model, torch.Generator().manual_seed(1)) is model
    first = vectors(model)
    assert all(torch.allclose(x.norm(), torch.ones(())) for x in first)
    if "bsn" not in [name for name, form in FORMS.items() if form is normalize][0]:
        found = torch.stack(list(fastsn.sigmas(model).values()))
        assert ((found / true_sigmas(model) - 1).abs() < 0.1).all()
    fastsn.reset_parameters(model, torch.Generator().manual_seed(2))
    assert not any(torch.equal(x, y) for x, y in zip(first, vectors(model), strict=True))
    fastsn.reset_parameters(model, torch.Generator().manual_seed(1))
    torch.testing.assert_close(vectors(model), first, rtol=0, atol=0)
    torch.manual_seed(1)
    fastsn.reset_parameters(model)
    torch.testing.assert_close(vectors(model), first, rtol=0, atol=0)


@each_form
def test_reset_parameters_before_the_weights_have_values(normalize):
    model = fastsn.reset_parameters(deferred(normalize))
    assert all(torch.allclose(x.norm(), torch.ones(())) for x in vectors(model))


@each_form
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("garbage", [float("nan"), 0.0, 1e30, float("inf")])
def test_no_garbage_where_nobody_calls_it(normalize, training, garbage):
    model = deferred(normalize, garbage)
    fill(model)
    state = torch.random.get_rng_state()
    outputs = [model.train(training)(X) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody's random numbers are spent
    assert outputs[1].isfinite().all()
    found = torch.stack(list(fastsn.sigmas(model).values()))
    assert found.isfinite().all() and (found > 0.5 * true_sigmas(model)).all()


@each_form
def test_sigmas_before_any_forward(normalize):
    model = deferred(normalize)
    fill(model)
    found = torch.stack(list(fastsn.sigmas(model).values()))
    assert found.isfinite().all() and (found > 0.5 * true_sigmas(model)).all()


@each_form
def test_a_forward_before_the_weights_have_values_spoils_nothing(normalize):
    model = deferred(normalize)
    for _ in range(2):
        model(X)
    fill(model)
    model(X)
    assert model(X).isfinite().all()


@each_form
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_brings_its_own(normalize, assign):
    torch.manual_seed(1)
    source = build(normalize)
    source(X)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    with torch.device("meta"):
        model = build(normalize)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(state, assign=assign)
    assert torch.equal(model.eval()(X), source.eval()(X))
    torch.testing.assert_close(vectors(model), vectors(source), rtol=0, atol=0)


def test_layers_that_reset_themselves():
    """The way of deferred initialization: reset_parameters of every module that has one."""
    with torch.device("meta"):
        model = nn.Sequential(fastsn.nn.SNConv2d(2, 6, 3), nn.Flatten(), fastsn.nn.BSNLinear(96, 5))
    model = model.to_empty(device="cpu")
    for module in model:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    found = torch.stack(list(fastsn.sigmas(model).values()))
    assert ((found / true_sigmas(model) - 1).abs() < 0.1).all()
    assert model(X).isfinite().all()


@each_form
def test_the_meta_device_itself(normalize):
    with torch.device("meta"):
        model = build(normalize)
        assert model(torch.empty(3, 2, 6, 6)).shape == (3, 5)
    with pytest.raises(ValueError, match="got 0.weight on the meta device: call to_empty first"):
        fastsn.reset_parameters(model)


@pytest.mark.xfail(strict=True, reason="pytorch has no way to give u and v values again")
@pytest.mark.parametrize("normalize", [TORCH.hook, TORCH.parametrization])
def test_what_torch_does(normalize):
    with torch.device("meta"):
        layer = normalize(nn.Linear(3, 3))
    layer = layer.to_empty(device="cpu")
    for buffer in layer.buffers():
        buffer.fill_(float("nan"))
    fill(layer)
    assert layer(torch.randn(2, 3)).isfinite().all()
