"""Models in pairs, one of them compiled, which have to take the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from helpers.accelerated import step

#: The compiler looks at `grad` of every input, and hides the warning that this may raise.
quiet = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:`torch.jit.[a-z_]+` is (deprecated|not supported)",
)


def forget() -> None:
    """Makes the compiler forget what it has compiled, and counted."""
    torch._dynamo.reset()
    counters.clear()


def no_recompiles():
    return torch._dynamo.config.patch(error_on_recompile=True)


class Twins:
    """An eager model, the same again, and the second one compiled."""

    def __init__(self, build: Callable[[], nn.Module], **options: object) -> None:
        models = []
        for _ in range(2):
            torch.manual_seed(1)
            models.append(build())
        self.eager, self.twin = models
        self.compiled = torch.compile(
            self.twin, **{"fullgraph": True, "backend": "aot_eager", **options}
        )

    def __iter__(self):
        """Each model, and what to call in its place."""
        return iter([(self.eager, self.eager), (self.twin, self.compiled)])

    def train(self, mode: bool) -> None:
        for model, _ in self:
            model.train(mode)

    def step(self, x: Tensor, **tolerances: float) -> None:
        """The same outputs, gradients, and state: u and v advance as often as in eager mode."""
        expected, actual = (step(model, x, forward=call) for model, call in self)
        torch.testing.assert_close(actual, expected, **tolerances)
        assert not counters["graph_break"]

    def steps(self, inputs: Iterable[Tensor], modes: Iterable[bool]) -> None:
        for mode in modes:
            self.train(mode)
            for x in inputs:
                self.step(x)
