"""Averages of models: u and v are averaged as well, and are no units any more.

torch takes sigma from them as they are: too small, so that weights are too large, and a deep
network blows up (NCAR/miles-credit#394, #409).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastsn
from helpers.answers import FASTSN, answers

LAYERS = (nn.Conv2d, nn.Linear)


def critic(normalize):
    return nn.Sequential(
        normalize(nn.Conv2d(3, 16, 3, padding=1)),
        nn.ReLU(),
        normalize(nn.Conv2d(16, 32, 3, 2, 1)),
        nn.ReLU(),
        nn.Flatten(),
        normalize(nn.Linear(512, 16)),
        nn.ReLU(),
        normalize(nn.Linear(16, 1)),
    )


def trained(normalize, average, seed=0):
    """An average of a critic over 40 large steps."""
    torch.manual_seed(seed)
    model = critic(normalize)
    averaged = AveragedModel(model, use_buffers=True, multi_avg_fn=average)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    torch.manual_seed(1)
    for _ in range(40):
        x = torch.randn(16, 3, 8, 8)
        loss = nn.functional.softplus(-model(x)[:, 0] * x.mean((1, 2, 3)).sign()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
    return averaged.eval()


@torch.no_grad()
def norms(model):
    """The true spectral norms of the weights that a forward has used."""
    model(torch.randn(2, 3, 8, 8))
    used = [module.weight for module in model.modules() if isinstance(module, LAYERS)]
    return torch.tensor([torch.linalg.matrix_norm(weight.flatten(1), 2) for weight in used])


AVERAGES = {"equal": None, "exponential": get_ema_multi_avg_fn(0.9)}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@answers("NCAR/miles-credit#394", "NCAR/miles-credit#409")
def test_an_averaged_model_does_not_blow_up(normalize, average):
    """Lengths of u and v do not count: what is left is the angle between them and those wanted."""
    found = norms(trained(normalize, average))
    assert (found < (1.3 if average is None else 1.1)).all() and (found > 0.995).all(), found


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("normalize", FASTSN)
def test_an_averaged_model_converges_to_norm_one(normalize, average):
    model = fastsn.converge(trained(normalize, average))
    assert ((norms(model) - 1).abs() < 0.005).all()
    assert ((norms(fastsn.fold(model)) - 1).abs() < 0.005).all()


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_so_does_an_accelerated_one(average):
    def grouped(layer):
        return torch.nn.utils.parametrizations.spectral_norm(layer)

    torchs = trained(grouped, average).module
    others = norms(torchs)
    model = fastsn.accelerate(torchs)
    found = norms(model)
    assert (found <= others + 1e-6).all() and (found < others - 0.01).any()
    expected = torch.stack(list(fastsn.sigmas(model).values()))
    fastsn.converge(model)
    assert ((norms(model) - 1).abs() < 0.005).all()
    sigmas = torch.stack(list(fastsn.sigmas(model).values()))
    true = torch.tensor(
        [
            torch.linalg.matrix_norm(module.parametrizations.weight.original.detach().flatten(1), 2)
            for module in model
            if isinstance(module, LAYERS)
        ]
    )
    assert ((sigmas / true - 1).abs() < 0.005).all()
    torch.testing.assert_close(found, true / expected)


@pytest.mark.parametrize("normalize", FASTSN)
def test_a_soup_of_models_that_were_trained_apart(normalize):
    """NCAR/miles-credit#394. Their u and v have nothing to do with each other."""
    models = [critic(normalize) for _ in range(2)]
    x = torch.randn(2, 3, 8, 8)
    for model in models:
        for _ in range(20):
            model(x)
    states = [model.state_dict() for model in models]
    mean = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    models[0].load_state_dict(mean)
    found = norms(fastsn.converge(models[0].eval(), 100))
    assert ((found - 1).abs() < 0.005).all(), found


def test_converge_refuses_what_it_cannot_do():
    model = critic(fastsn.spectral_norm)
    before = [buffer.clone() for buffer in model.buffers()]
    for steps in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"n_power_iterations must be at least 1, got {steps}"):
            fastsn.converge(model, steps)
    with pytest.raises(ValueError, match="expected a model with spectral norm by fastsn, got none"):
        fastsn.converge(nn.Linear(2, 2))
    torch.testing.assert_close(list(model.buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("normalize", [fastsn.spectral_norm, fastsn.parametrizations.spectral_norm])
def test_gradients_are_those_of_the_norm_that_is_used(normalize):
    """In eval mode with gradients; u and v are directions, and are not written."""
    torch.manual_seed(0)
    layer = normalize(nn.Linear(6, 5)).double()
    for _ in range(300):
        layer(torch.randn(1, 6, dtype=torch.float64))
    vectors = [buffer.clone() for buffer in layer.buffers()]
    with torch.no_grad():
        for buffer in layer.buffers():
            buffer.mul_(0.7)
    layer.eval()(torch.randn(1, 6, dtype=torch.float64))
    torch.testing.assert_close(list(layer.buffers()), [0.7 * vector for vector in vectors])
    (original,) = (p for p in layer.parameters() if p.ndim == 2)
    expected = original / torch.dot(vectors[0], original @ vectors[1])
    torch.testing.assert_close(layer.weight, expected)
    direction = torch.randn_like(original)
    actual = torch.autograd.grad((layer.weight * direction).sum(), original)
    torch.testing.assert_close(actual, torch.autograd.grad((expected * direction).sum(), original))


def test_training_goes_on_from_an_average():
    model = trained(fastsn.parametrizations.spectral_norm, None).module.train()
    for _ in range(30):
        model(torch.randn(2, 3, 8, 8))
    assert ((norms(model.eval()) - 1).abs() < 0.005).all()


def test_zero_and_short_for_other_reasons():
    """A large eps makes u and v shorter, too, and zeros are what a weight of zeros leaves."""
    layer = fastsn.parametrizations.spectral_norm(nn.Linear(4, 4), eps=1.0).eval()
    weight, (u, v) = layer.parametrizations.weight.original, layer.buffers()
    assert min(u.norm(), v.norm()) < 0.99
    torch.testing.assert_close(layer.weight, weight / (u @ weight @ v))
    layer.train(), layer.weight, layer.eval()
    torch.testing.assert_close(layer.weight, weight / (u @ weight @ v))
    zero = nn.Linear(4, 4)
    nn.init.zeros_(zero.weight)
    fastsn.parametrizations.spectral_norm(zero, zero_guard=True).eval()
    with torch.no_grad():
        assert not zero.weight.any()
