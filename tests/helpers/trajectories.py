"""Whether two trainings are the same but for how they round, however training amplifies that.

A training is the tensors after each of its steps, by name, in float64 or converted to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

History = list[dict[str, Tensor]]

#: A step of float32, of which the nudges are made.
UNIT = torch.finfo(torch.float32).eps
#: Nudged trainings that show the amplification. A single one may miss it by much.
SAMPLES = 3
#: Roundings to a nudge: of a weight's normalization, of what is computed with it, and of the
#: gradients of both. They are smaller than it and partly cancel, so that the error is about one.
ROUNDINGS = 4


class Nudge:
    """Moves each element of the parameters by one step of float32, up or down by chance."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, parameters: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for parameter in parameters:
                up = torch.randint(2, parameter.shape, generator=self.generator)
                parameter.mul_(1 + UNIT * (2 * up - 1).to(parameter.dtype))


def divergence(history: History, exact: History) -> Tensor:
    """Up to each step, the largest error of any tensor, relative to the tensor's largest size."""
    sizes = {key: torch.stack([true[key].abs().max() for true in exact]).max() for key in exact[0]}
    steps = []
    for now, true in zip(history, exact, strict=True):
        assert now.keys() == sizes.keys()
        errors = [(now[key].double() - true[key]).abs().max() / sizes[key] for key in sizes]
        steps.append(torch.stack(errors).max())
    return torch.stack(list(itertools.accumulate(steps, torch.maximum)))


class Band:
    """How far rounding alone may lead a training away: what nudges do to it in float64.

    Args:
        train: the training in float64, given what to do with the parameters before every step.
    """

    def __init__(self, train: Callable[[Callable[[Iterable[Tensor]], None]], History]) -> None:
        self.exact = train(lambda parameters: None)
        nudged = [divergence(train(Nudge(seed)), self.exact) for seed in range(SAMPLES)]
        self.amplified = torch.stack(nudged).amax(0) / UNIT

    def check(self, history: History, dtype: torch.dtype) -> None:
        """That `history`, of a training in `dtype`, is this one.

        Raises:
            AssertionError: it is further away than by rounding in `dtype`.
        """
        errors = divergence(history, self.exact)
        allowed = (ROUNDINGS * self.amplified + 16) * torch.finfo(dtype).eps
        # Written so that NaN fails.
        assert (errors <= allowed).all(), f"{dtype}: {errors} over {allowed}"
