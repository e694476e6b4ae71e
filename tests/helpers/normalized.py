"""The forms that normalized models have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsn
from helpers.accelerated import chain
from helpers.torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED, TORCH_HOOK, TORCH_PARAMETRIZED

double = pytest.mark.usefixtures("double")


def plain():
    """What all of these models are without normalization."""
    layers = nn.Conv1d(2, 3, 2), nn.Linear(9, 6), nn.Linear(6, 5)
    return nn.Sequential(layers[0], nn.Tanh(), nn.Flatten(), layers[1], nn.Tanh(), layers[2])


def modules(prefix, **options):
    convolution, linear = (getattr(fastsn.nn, prefix + kind) for kind in ("Conv1d", "Linear"))
    layers = convolution(2, 3, 2, scale=1.2, **options), linear(9, 6, **options), linear(6, 5)
    return nn.Sequential(layers[0], nn.Tanh(), nn.Flatten(), layers[1], nn.Tanh(), layers[2])


def settled(model):
    """With a forward behind it: the random u and v of before are no estimate."""
    with torch.no_grad():
        model(torch.randn(4, 2, 4))
    return model


MODELS = {
    "hook": lambda: settled(chain(FASTSN_HOOK)),
    "parametrized": lambda: chain(FASTSN_PARAMETRIZED),
    "SN": lambda: modules("SN"),
    "BSN": lambda: modules("BSN"),
    "accelerated-torch-hook": lambda: fastsn.accelerate(chain(TORCH_HOOK)),
    "accelerated-torch-parametrized": lambda: fastsn.accelerate(chain(TORCH_PARAMETRIZED)),
    "accelerated-BSN": lambda: fastsn.accelerate(modules("BSN")),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
