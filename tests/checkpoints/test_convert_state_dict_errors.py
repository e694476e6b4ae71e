"""What `fastsn.convert_state_dict` refuses: it says why, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as torch_hook

from fastsn import convert_state_dict


def hooked(**changes):
    state = torch_hook(nn.Linear(4, 3)).state_dict()
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


def parametrized_twice():
    layer = torch_parametrizations.spectral_norm(nn.Linear(4, 3))
    parametrize.register_parametrization(layer, "weight", nn.Sequential(nn.Linear(4, 4)))
    return layer.state_dict()


ERRORS = {
    "form": (hooked(), "onnx", None, r"to must be one of \('hook', .*'plain'\), got 'onnx'"),
    "no u": (
        hooked(weight_u=None),
        "plain",
        None,
        r"expected \['weight_u'\] besides 'weight_orig'",
    ),
    "no v": (hooked(weight_v=None), "plain", None, r"expected \['weight_v'\] besides"),
    "no v2": (hooked(weight_u2=torch.ones(4)), "plain", None, r"expected \['weight_v2'\] besides"),
    "shape of u": (hooked(weight_u=torch.ones(2)), "parametrization", None, r"'weight_u' to fit"),
    "shape of v": (
        hooked(weight_v=torch.ones(3)),
        "parametrization",
        None,
        r"'weight_v' to fit 'weight_orig' of shape \(3, 4\), got shape \(3,\)",
    ),
    "u without a dimension": (
        hooked(weight_u=torch.ones(1, 3)),
        "plain",
        None,
        "'weight_u' to fit",
    ),
    "sigma alone": (
        {"a.weight": torch.ones(3, 4), "a.sv0": torch.ones(1)},
        "hook",
        None,
        r"expected \['a.u0'\] besides 'a.sv0'",
    ),
    "no sigma": (
        {"a.weight": torch.ones(3, 4), "a.sn_u": torch.ones(1, 3)},
        "hook",
        None,
        r"expected \['a.sn_sigma'\] besides 'a.sn_u'",
    ),
    "no weight": (
        {"sn_u": torch.ones(1, 3), "sn_sigma": torch.ones(1)},
        "hook",
        None,
        r"expected \['weight'\] besides 'sn_u'",
    ),
    "no original": (
        {"parametrizations.weight.0._u": torch.ones(3)},
        "hook",
        None,
        r"'parametrizations.weight.original'.* besides 'parametrizations.weight.0._u'",
    ),
    "others": (parametrized_twice(), "hook", None, r"expected 'weight' .* only.*weight.1.0.weight"),
    "plain": (nn.Linear(4, 3).state_dict(), "hook", None, r"got none among \['weight'.*model="),
    "nested": ({"model": hooked()}, "hook", None, r"got none among \['model'\]"),
    "model of another shape": (
        nn.Linear(4, 3).state_dict(),
        "hook",
        torch_hook(nn.Linear(5, 3)),
        r"'weight' to fit .*shape \(3, 4\) and the model's \(3, 5\)",
    ),
    "model with another dimension": (
        hooked(),
        "plain",
        torch_hook(nn.Linear(4, 3), dim=1),
        r"'weight_u' to fit .* along dim=1, got shape \(3,\)",
    ),
    "name": (
        torch_hook(nn.LSTM(4, 3), "weight_hh_l0").state_dict(),
        "biggan",
        None,
        r"'weight', the only ones of the form 'biggan', got 'weight_hh_l0_orig'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    state, to, model, message = ERRORS[case]
    before = dict(state)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state, to, model=model)
    assert list(state) == list(before) and all(state[key] is before[key] for key in before)
