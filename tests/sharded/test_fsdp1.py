"""FullyShardedDataParallel of old, whose flat parameters come with the hooks of each block."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import fastsn
from helpers import rank_fixtures
from helpers.torch_peers import FASTSN_PARAMETRIZED, TORCH_PARAMETRIZED

started, two = rank_fixtures.started, rank_fixtures.two


def block(form, inputs, outputs):
    return nn.Sequential(form.spectral_norm(nn.Linear(inputs, outputs)), nn.Tanh())


def losses(form, nested, use_orig_params, accelerated):
    torch.manual_seed(0)
    model = nn.Sequential(
        block(form, 8, 20), block(form, 20, 12), form.spectral_norm(nn.Linear(12, 1))
    )
    model = fastsn.accelerate(model) if accelerated else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}
        if nested:
            for index in (0, 1):
                model[index] = FSDP(model[index], **options)
        model = FSDP(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found = []
        for _ in range(3):
            loss = model(torch.linspace(-1, 1, 32).view(4, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss))
        with torch.no_grad():
            found.append(float(model.eval()(torch.ones(2, 8)).mean()))
    return found


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_ranks_have_torchs_numbers(two, nested, use_orig_params, accelerated):
    case = nested, use_orig_params
    expected = two(losses, TORCH_PARAMETRIZED, *case, False)
    for found, wanted in zip(
        two(losses, FASTSN_PARAMETRIZED, *case, accelerated), expected, strict=True
    ):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert found[0] > found[2] > 0
