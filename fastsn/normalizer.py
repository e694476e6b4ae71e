"""What decides for one weight whether u and v move, and where they start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsn import functional, placements, recompute
from fastsn.functional import Call
from fastsn.memory import Memory, version_of, watch

#: When a forward in training mode iterates.
POLICIES = ("forward", "step", "frozen")

NARROW = (torch.bfloat16, torch.float16)

# u and v, one of each per estimate, and a number of power iterations.
State = tuple[list[Tensor], list[Tensor], int]


class Normalizer:
    """A mixin of every form of layer."""

    # Class attributes: objects of torch's classes become ones with this by changing their class.
    policy = "forward"
    # u and v came without values, from the meta device, and nobody has seen any in them yet.
    was_meta = False

    @property
    def memory(self) -> Memory:
        memory = self.__dict__.get("_memory")
        return self.prepare() if memory is None else memory

    def prepare(self) -> Memory:
        """Makes the memory, before the first forward: the compiler sees what an object has."""
        return self.__dict__.setdefault("_memory", Memory())

    def iterations(self, weight: Tensor, training: bool, n_power_iterations: int) -> int:
        """How many steps the forward that comes now does."""
        if not training or self.policy == "frozen" or self.is_frozen() or recompute.is_repeating():
            return 0
        if self.policy == "step":
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "expected update policy 'forward' or 'frozen' under torch.compile, got 'step': "
                    "a compiled graph cannot tell whether a weight has changed. Compile the layers "
                    "of a model that fastsn.accelerate serves, or use fastsn.frozen"
                )
            watch(weight)
            version = version_of(weight)
            if version is not None and version == self.memory.seen:
                return 0
            self.memory.seen = version
        return n_power_iterations

    def settle(self, call: Call, weight: Tensor, u: list[Tensor], v: list[Tensor]) -> None:
        """Gives u and v values where those that came from the meta device have none.

        The same ones in every process: no random number of the user's is spent on them.
        """
        if weight.is_meta:
            return
        if not are_units(u + v):
            restart(call, weight, u, v, torch.Generator(weight.device).manual_seed(0))
        # A weight that has no values yet either would spoil them.
        sigma = functional.iterate(call, [weight.detach()], u, v, [0])[-1]
        self.was_meta = not bool(sigma.isfinite())

    def is_frozen(self) -> bool:
        """Whether a ``with fastsn.frozen(...)`` keeps u and v where they are."""
        return self.memory.frozen > 0


@torch.no_grad()
def restart(
    call: Call,
    weight: Tensor,
    u: list[Tensor],
    v: list[Tensor],
    generator: torch.Generator | None = None,
) -> None:
    """Draws u and v anew, in place, and iterates them for the weight.

    For a weight that is not finite they stay as drawn: a first value must not spoil all later ones.
    """
    drawn: list[list[Tensor]] = [[], []]
    like = placements.stand_in(weight)
    for dim in call.dims:
        own = functional.init_vectors(like, dim=dim, eps=call.eps, generator=generator)
        for all_of, new in zip(drawn, own, strict=True):
            all_of += new
    placements.agree(weight, drawn[0] + drawn[1])
    _write(u + v, drawn[0] + drawn[1])
    functional.iterate(call, [weight], u, v, [functional.WARM_UP])
    if not are_units(u + v):
        _write(u + v, drawn[0] + drawn[1])


def _write(vectors: list[Tensor], values: list[Tensor]) -> None:
    for vector, value in zip(vectors, values, strict=True):
        vector.copy_(value)


def are_units(vectors: list[Tensor]) -> bool:
    """Whether these are u and v of some weight, and not what memory happened to hold."""
    norms = torch.stack([torch.linalg.vector_norm(vector.detach()) for vector in vectors])
    return bool(((norms - 1).abs() < 1e-2).all())


def vectors_in(buffers: dict[str, Any], name: str) -> tuple[list[Tensor], list[Tensor]]:
    """(u, v) of the weight, one of each per estimate, widened to fp32 where they are narrower.

    The weight's type shall not round them, and sigma with them.
    """
    names = [f"{name}_u", f"{name}_v"]
    if f"{name}_u2" in buffers:
        names += [f"{name}_u2", f"{name}_v2"]
    for own in names:
        buffers[own] = placements.plain(buffers[own])  # distribute_module makes DTensors of them
        if buffers[own].dtype in NARROW:
            buffers[own] = buffers[own].to(torch.float32)
    vectors = [buffers[own] for own in names]
    return vectors[::2], vectors[1::2]
