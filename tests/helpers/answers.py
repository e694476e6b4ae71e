"""Tests that answer a complaint: what fails with torch's spectral norm passes with fastsn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastsn


class Peer(NamedTuple):
    """The two functions that change one import line, of one library."""

    hook: Callable[..., nn.Module]
    parametrization: Callable[..., nn.Module]

    def form(self, name: str) -> Callable[..., nn.Module]:
        return self.hook if name == "hook" else self.parametrization


FASTSN = Peer(fastsn.spectral_norm, fastsn.parametrizations.spectral_norm)
TORCH = Peer(torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm)


def answers(*threads: str, forms: tuple[str, ...] = ("hook", "parametrization")) -> Callable:
    """Runs a test(normalize, ...) with every form of fastsn and, expecting it to fail, of torch.

    ``threads`` are those that complain of it, such as ``"pytorch#51800"``. Strict: a test that
    passes with torch's function fails, as there is nothing left to answer.
    """
    fails = pytest.mark.xfail(strict=True, reason=", ".join(threads))
    return pytest.mark.parametrize(
        "normalize",
        [
            *(pytest.param(FASTSN.form(form), id=f"fastsn-{form}") for form in forms),
            *(pytest.param(TORCH.form(form), id=f"torch-{form}", marks=fails) for form in forms),
        ],
    )
