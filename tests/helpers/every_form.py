"""A small model of every form that fastsn has, alone or with its layers grouped."""

from __future__ import annotations

import pytest
from torch import nn

import fastsn
from helpers.accelerated import chain
from helpers.biggan import Linear
from helpers.torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED

MODELS = {
    "hook": lambda: chain(FASTSN_HOOK),
    "parametrization": lambda: chain(FASTSN_PARAMETRIZED),
    "bsn": lambda: nn.Sequential(fastsn.nn.BSNConv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 5)),
    "msn": lambda: nn.Sequential(fastsn.nn.MSNConv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 5)),
    "biggan": lambda: nn.Sequential(nn.Flatten(), fastsn.accelerate(Linear(8, 5))),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
each_grouping = pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
