"""Models in pairs, one of them accelerated, and the operators of fastsn that a call runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsn


class Calls(TorchDispatchMode):
    """Records the operators of fastsn that run, each with its number of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastsn":
            self.seen.append((func.overloadpacket.__name__, len(args[0])))
        return func(*args, **(kwargs or {}))


def calls_of(call):
    with Calls() as calls:
        call()
    return calls.seen


@contextmanager
def weights_left(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """What a group leaves for the reads of its parametrized layers, children of the model."""
    found: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for name, layer in model.named_children():
            norm = layer.parametrizations.weight[0]

            def note(module, left, thread, name=name, put=norm.put):
                found.append((name, left.normalized))
                put(module, left, thread)

            stack.enter_context(mock.patch.object(norm, "put", note))
        yield found


def fused(*counts):
    """The operators of forwards in training mode that serve so many weights each."""
    return [(name, count) for count in counts for name in ("power_", "scale")]


def pair(build, *args):
    """The same model twice, the second accelerated."""
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(build(*args))
    return models[0], fastsn.accelerate(models[1])


def step(model, *inputs, forward=None):
    """A forward and a backward: the output, all that is in the model, and its gradients.

    `forward` is called in place of the model.
    """
    model.zero_grad()
    output = (model if forward is None else forward)(*inputs)
    output.square().sum().backward()
    gradients = {
        f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"output": output.detach(), **gradients, **state}


def assert_same_steps(plain, fast, *inputs, steps=2):
    for _ in range(steps):
        torch.testing.assert_close(step(fast, *inputs), step(plain, *inputs))


def chain(form):
    return nn.Sequential(
        form.spectral_norm(nn.Conv1d(2, 3, 2)),
        nn.Tanh(),
        nn.Flatten(),
        form.spectral_norm(nn.Linear(9, 6)),
        nn.Tanh(),
        form.spectral_norm(nn.Linear(6, 5)),
    )


def chain_input():
    return torch.randn(4, 2, 4)
